#!/usr/bin/env python3
"""One network of every family in timm, exported as ONNX files: ``export_timm.py DIR [--exporter legacy|dynamo]``.

timm has about a hundred families of image networks, a module each. Of every module the network with the fewest
parameters is taken, with random weights and distinct norm parameters and statistics, and exported with an open batch
size; what can't be exported is said and left out. ``tools/coverage.py DIR`` then shows what onnxfuse does with them.

Needs torch, timm and onnxscript. Nothing is downloaded.
"""

import argparse
import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.make_probes import LEGACY_OPSET, SEED, Probe, export, randomise

MOST_PARAMETERS = 30_000_000
SECONDS = 300
LONGEST_SIDE = 224


def smallest(timm: Any, t: Any, names: Sequence[str]) -> tuple[int, str]:
    """Return the network with the fewest parameters, with their number; weights are not made."""
    found = []
    for name in names:
        with t.device("meta"):
            network = timm.create_model(name)
        found.append((sum(parameter.numel() for parameter in network.parameters()), name))
    return min(found)


def families(timm: Any) -> dict[str, list[str]]:
    """Return the names of all networks, by the module that they are in."""
    found: dict[str, list[str]] = {}
    for name in timm.list_models():
        found.setdefault(timm.models.model_entrypoint(name).__module__.rsplit(".", 1)[-1], []).append(name)
    return found


def write(name: str, exporter: str, path: Path) -> None:
    """Export one network."""
    t, timm = importlib.import_module("torch"), importlib.import_module("timm")
    t.manual_seed(SEED)
    network = timm.create_model(name)
    randomise(t, network)
    network.eval()
    side = min(network.pretrained_cfg["input_size"][-1], LONGEST_SIDE)
    if network.pretrained_cfg.get("fixed_input_size"):
        side = network.pretrained_cfg["input_size"][-1]
    export(t, Probe(network, (t.randn(2, 3, side, side),)), exporter, path)


def main(arguments: list[str] | None = None) -> int:
    """Export one network of every family, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--exporter", choices=("legacy", "dynamo"), default="legacy", help=f"opset {LEGACY_OPSET} or 18"
    )
    parser.add_argument("--one", metavar="NAME", help="this network alone, in this process")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.one:
        write(options.one, options.exporter, options.folder / f"{options.one}.onnx")
        return 0
    console = Console(soft_wrap=True, highlight=False, markup=False)
    t, timm = importlib.import_module("torch"), importlib.import_module("timm")
    for family, names in families(timm).items():
        count, name = smallest(timm, t, names)
        if count > MOST_PARAMETERS:
            console.print(f"{family}: {name} has {count:,} parameters, which is too many here")
            continue
        command = [sys.executable, "-W", "ignore", __file__, str(options.folder)]
        command += ["--exporter", options.exporter, "--one", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            problem = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1]
        except subprocess.TimeoutExpired:
            problem = f"not exported after {SECONDS} seconds"
        if problem:
            (options.folder / f"{name}.onnx").unlink(missing_ok=True)
        console.print(f"{family}: {name}, {count:,} parameters" + (f": {problem}" if problem else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
