#!/usr/bin/env python3
"""Top-1 accuracy of real networks before and after compression, as Markdown tables.

The networks, the labelled images and the program that evaluates them are not part of this project: they are in a
folder that the environment variable ``ONNXFUSE_ZOO`` names (default: ``../shared`` beside the checkout) with
``models/``, ``data/`` and ``tools/evaluate.py``. Nothing is fine-tuned. Each setting is measured without any data and
with a refit on unlabelled training images.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

import onnxfuse

ROOT = Path(__file__).resolve().parent.parent
MODELS = (
    "cifar10_resnet20_bn",
    "cifar10_resnet20_folded",
    "cifar10_resnet20_dynamo18",
    "cifar10_resnet56_bn",
    "cifar10_resnet56_folded",
)
METHODS = ("prune", "intra-fusion", "fold")
# Residual streams are cut too in scope all, which costs far more accuracy at the same ratio.
SETTINGS = (("hidden", 0.25), ("hidden", 0.5), ("all", 0.1))
TIERS = ("no-data", "refit")
EVALUATION_SET = "cifar10_test"
CALIBRATION_SET = "cifar10_calibration"
CALIBRATION_COUNT = 512


@dataclass(frozen=True)
class Zoo:
    """Where networks, images and the evaluating program are.

    Attributes:
        folder: The folder that has them.
    """

    folder: Path

    def model(self, name: str) -> Path:
        """Return the path of a network."""
        return self.folder / "models" / f"{name}.onnx"

    def top1(self, path: Path, like: str) -> tuple[float, int]:
        """Return the top-1 accuracy of a file in percent, and the number of images; ``like`` names its original."""
        figure = json.loads(self._evaluate(path, EVALUATION_SET, "--like", like, "--json"))
        return float(figure["top1"]), int(figure["n"])

    def write_calibration(self, name: str, path: Path) -> None:
        """Write training images, prepared for a network, as a samples file."""
        words = ("--limit", str(CALIBRATION_COUNT), "--export", str(path))
        self._evaluate(self.model(name), CALIBRATION_SET, *words)

    def _evaluate(self, path: Path, images: str, *words: str) -> str:
        """Run the evaluating program and return the last line of its output."""
        program = self.folder / "tools" / "evaluate.py"
        command = [sys.executable, str(program), str(path), "--set", images, *words]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.splitlines()[-1]


@dataclass(frozen=True)
class Setting:
    """One table.

    Attributes:
        scope: Which groups change.
        ratio: Share of the channels to remove.
        refit: Whether consumers are fitted anew on calibration images.
    """

    scope: str
    ratio: float
    refit: bool

    @property
    def title(self) -> str:
        """The options, and the data that they use."""
        data = f" --refit`, {CALIBRATION_COUNT} unlabelled training images" if self.refit else "`, no data"
        return f"`--scope {self.scope} --ratio {self.ratio}{data}:"


def cell(zoo: Zoo, name: str, setting: Setting, method: str) -> str:
    """Compress one network in one way, and return what a table says about it."""
    with tempfile.TemporaryDirectory() as folder:
        path, samples = Path(folder) / "compressed.onnx", Path(folder) / "samples.npz"
        if setting.refit:
            zoo.write_calibration(name, samples)
        result = onnxfuse.compress(
            zoo.model(name),
            path,
            calibration=samples if setting.refit else None,
            scope=setting.scope,
            ratio=setting.ratio,
            refit=setting.refit,
            method=method,
            provider="cpu",
        )
        accuracy, _ = zoo.top1(path, name)
    report = result.report
    parameters = 100 * report.after.parameters / report.before.parameters
    macs = 100 * report.after.macs / report.before.macs
    return f"{accuracy:.2f} ({parameters:.0f} / {macs:.0f})"


def lines(zoo: Zoo, models: Sequence[str], methods: Sequence[str], tiers: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the tables; every cell is measured when its line is asked for."""
    bases = {name: zoo.top1(zoo.model(name), name) for name in models}
    for setting in (Setting(scope, ratio, tier == "refit") for tier in tiers for scope, ratio in SETTINGS):
        yield setting.title
        yield ""
        yield f"| network | n | base | {' | '.join(f'`{method}`' for method in methods)} |"
        yield f"| --- | ---: | ---: |{' ---: |' * len(methods)}"
        for name, (base, n) in bases.items():
            cells = " | ".join(cell(zoo, name, setting, method) for method in methods)
            yield f"| `{name}` | {n} | {base:.2f} | {cells} |"
        yield ""


def main() -> int:
    """Print the tables, line by line as they are measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=METHODS, help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="default: all")
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=TIERS, help=f"default: {' '.join(TIERS)}")
    options = parser.parse_args()
    zoo = Zoo(Path(os.environ.get("ONNXFUSE_ZOO", ROOT.parent / "shared")))
    if not zoo.model(MODELS[0]).is_file():
        sys.stderr.write(f"{zoo.model(MODELS[0])} is not there; set ONNXFUSE_ZOO to the folder with the networks\n")
        return 1
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for line in lines(zoo, options.models, options.methods, options.tiers):
        console.print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
