#!/usr/bin/env python3
"""Top-1 accuracy of real networks before and after compression, as Markdown tables.

The networks, the labelled images and the program that evaluates them are not part of this project: they are in a
folder that the environment variable ``ONNXFUSE_ZOO`` names (default: ``../shared`` beside the checkout) with
``models/``, ``data/`` and ``tools/evaluate.py``. Nothing is fine-tuned. Two tiers are measured: without any data, and
calibrated on unlabelled images that are not among those of the evaluation.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

import onnxfuse
from onnxfuse.importance import IMPORTANCES

ROOT = Path(__file__).resolve().parent.parent
TIERS = ("data-free", "calibrated")


@dataclass(frozen=True)
class Images:
    """Labelled images, and which part of them.

    Attributes:
        name: Name of the set.
        words: Which images of it, as words for the evaluating program.
    """

    name: str
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Networks that are compressed with the same options and evaluated on the same images.

    Attributes:
        models: Names of the networks.
        evaluation: The images that are evaluated on.
        calibration: The images that are calibrated on.
        settings: Options of `onnxfuse.compress`, one column for each, by the column's title.
        tiers: Which tiers make sense for them.
        larger: A larger set of images like those, but not so near to what the networks were trained on: on it, what
            counts is by how much the accuracy changes.
    """

    models: tuple[str, ...]
    evaluation: Images
    calibration: Images
    settings: Mapping[str, Mapping[str, Any]]
    tiers: tuple[str, ...] = field(default=TIERS)
    larger: Images | None = None


CIFAR = Images("cifar10_test")
CIFAR_TRAINING = Images("cifar10_calibration", ("--limit", "512"))
JPEG = Images("cifar10_test_jpeg")
JPEG_TRAINING = Images("cifar10_calibration_jpeg", ("--limit", "512"))
IMAGENET = Images("imagenet_sample1000_jpeg256", ("--offset", "500"))
IMAGENET_OTHERS = Images("imagenet_sample1000_jpeg256", ("--limit", "500"))

RESNETS = ("cifar10_resnet20_bn", "cifar10_resnet20_folded", "cifar10_resnet56_bn", "cifar10_resnet56_folded")


def uniform(scope: str, ratio: float) -> dict[str, dict[str, Any]]:
    """Return the settings that compare methods at one ratio for all groups."""
    return {method: {"method": method, "scope": scope, "ratio": ratio} for method in ("prune", "intra-fusion", "fold")}


def importances(method: str) -> dict[str, dict[str, Any]]:
    """Return the settings that compare what makes a channel worth keeping, for a quarter of the hidden channels."""
    return {name: {"method": method, "importance": name, "scope": "hidden", "ratio": 0.25} for name in IMPORTANCES}


def budgets(*shares: float, **options: Any) -> dict[str, dict[str, Any]]:
    """Return the settings for budgets of multiply-accumulates."""
    return {f"macs={share}": {"target": f"macs={share}", **options} for share in shares}


TABLES: Mapping[str, Table] = {
    "hidden channels of ResNets, by budget": Table(
        (*RESNETS, "cifar10_resnet20_dynamo18"),
        CIFAR,
        CIFAR_TRAINING,
        budgets(0.75, 0.5, 0.35, scope="hidden"),
        larger=JPEG,
    ),
    "all channels of ResNets, by budget": Table(RESNETS, CIFAR, CIFAR_TRAINING, budgets(0.75, 0.5), larger=JPEG),
    "VGG, all channels": Table(
        ("vgg11half_cifar10jpeg_bn",),
        JPEG,
        JPEG_TRAINING,
        {f"ratio={r}": {"ratio": r} for r in (0.3, 0.5, 0.7)} | budgets(0.5, 0.25),
    ),
    "ImageNet MobileNets, by budget": Table(
        ("tfl_mobilenetv2_1.0_224_imagenet_deq", "tfl_mobilenetv1_05_160_imagenet_deq"),
        IMAGENET,
        IMAGENET_OTHERS,
        budgets(0.8, 0.6),
    ),
    "hidden channels, a quarter of each group, weights alone": Table(
        (*RESNETS, "cifar10_resnet20_dynamo18"), CIFAR, CIFAR_TRAINING, uniform("hidden", 0.25), ("data-free",)
    ),
    "hidden channels, half of each group, weights alone": Table(
        (*RESNETS, "cifar10_resnet20_dynamo18"), CIFAR, CIFAR_TRAINING, uniform("hidden", 0.5), ("data-free",)
    ),
    "hidden channels, a quarter of each group, dropped by importance": Table(
        ("cifar10_resnet20_bn",), CIFAR, CIFAR_TRAINING, importances("prune"), ("calibrated",)
    ),
    "hidden channels, a quarter of each group, transported to the most important": Table(
        ("cifar10_resnet20_bn",), CIFAR, CIFAR_TRAINING, importances("intra-fusion"), ("calibrated",)
    ),
    "all channels, a tenth of each group, weights alone": Table(
        RESNETS, CIFAR, CIFAR_TRAINING, uniform("all", 0.1), ("data-free",)
    ),
}


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

    def top1(self, path: Path, like: str, images: Images) -> tuple[float, int]:
        """Return the top-1 accuracy of a file in percent, and the number of images; ``like`` names its original."""
        figure = json.loads(self._evaluate(path, images, "--like", like, "--json"))
        return float(figure["top1"]), int(figure["n"])

    def write_calibration(self, name: str, images: Images, path: Path) -> None:
        """Write images, prepared for a network, as a samples file."""
        self._evaluate(self.model(name), images, "--export", str(path))

    def _evaluate(self, path: Path, images: Images, *words: str) -> str:
        """Run the evaluating program and return the last line of its output."""
        program = self.folder / "tools" / "evaluate.py"
        command = [sys.executable, str(program), str(path), "--set", images.name, *images.words, *words]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.splitlines()[-1]


def cell(zoo: Zoo, name: str, table: Table, tier: str, options: Mapping[str, Any], larger_base: float | None) -> str:
    """Compress one network in one way, and return what a table says about it."""
    with tempfile.TemporaryDirectory() as folder:
        path, samples = Path(folder) / "compressed.onnx", Path(folder) / "samples.npz"
        if tier == "calibrated":
            zoo.write_calibration(name, table.calibration, samples)
        calibration = samples if tier == "calibrated" else None
        result = onnxfuse.compress(zoo.model(name), path, calibration=calibration, provider="cpu", **options)
        figures = f"{zoo.top1(path, name, table.evaluation)[0]:.2f}"
        if table.larger is not None and larger_base is not None:
            figures += f", {zoo.top1(path, name, table.larger)[0] - larger_base:+.2f}"
    report = result.report
    parameters = 100 * report.after.parameters / report.before.parameters
    macs = 100 * report.after.macs / report.before.macs
    return f"{figures} ({parameters:.0f} / {macs:.0f})"


def lines(
    zoo: Zoo, title: str, tiers: Sequence[str], models: Sequence[str] | None, effort: float | None
) -> Iterator[str]:
    """Yield the lines of one table; every cell is measured when its line is asked for."""
    more = {} if effort is None else {"effort": effort}
    table = TABLES[title]
    images = f"`{table.evaluation.name}` {' '.join(table.evaluation.words)}".strip()
    others = f"`{table.calibration.name}` {' '.join(table.calibration.words)}".strip()
    yield f"### {title[0].upper()}{title[1:]}" + ("" if effort is None else f", effort {effort:g}")
    yield ""
    evaluated = f"Evaluated on {images}"
    if table.larger is not None:
        evaluated += f" and, behind the comma, on `{table.larger.name}`, as the difference from the base there"
    yield evaluated + (f"; calibrated on {others}, unlabelled." if "calibrated" in table.tiers else ".")
    yield ""
    yield f"| network | n | base | tier | {' | '.join(f'`{column}`' for column in table.settings)} |"
    yield f"| --- | ---: | ---: | --- |{' ---: |' * len(table.settings)}"
    for name in table.models:
        if models and name not in models:
            continue
        base, n = zoo.top1(zoo.model(name), name, table.evaluation)
        larger_base = None if table.larger is None else zoo.top1(zoo.model(name), name, table.larger)[0]
        bases = f"{base:.2f}" if larger_base is None else f"{base:.2f}, {larger_base:.2f}"
        for tier in (tier for tier in table.tiers if tier in tiers):
            settings = [{**options, **more} for options in table.settings.values()]
            cells = " | ".join(cell(zoo, name, table, tier, options, larger_base) for options in settings)
            yield f"| `{name}` | {n} | {bases} | {tier} | {cells} |"
    yield ""


def main() -> int:
    """Print the tables, line by line as they are measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=tuple(TABLES), help="default: all")
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=TIERS, help="default: both")
    parser.add_argument("--models", nargs="+", help="default: all")
    parser.add_argument("--effort", type=float, help="for all of them; default: that of the package")
    options = parser.parse_args()
    zoo = Zoo(Path(os.environ.get("ONNXFUSE_ZOO", ROOT.parent / "shared")))
    if not zoo.model(RESNETS[0]).is_file():
        sys.stderr.write(f"{zoo.model(RESNETS[0])} is not there; set ONNXFUSE_ZOO to the folder with the networks\n")
        return 1
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for title in options.tables:
        for line in lines(zoo, title, options.tiers, options.models, options.effort):
            console.print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
