#!/usr/bin/env python3
"""How well each method does without data, judged on pictures: ``without_data.py DIR PICTURES``.

Every network of a folder that takes images is compressed with nothing but its file, by the methods that look at
weights alone and by ``auto``. Then original and result run on pictures that none of them has seen: the table has how
many decibels the outputs of the original have over the difference, the mean over its outputs. More is better; 0 dB is
as wrong as outputs that are all zero. No labels are needed.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import onnxfuse

METHODS = ("prune", "intra-fusion", "auto")


def decibels(path: Path, pictures: Path, method: str, ratio: float, effort: float) -> float | None:
    """Return how well one method does on one network; None where its outputs are not numbers that can be compared."""
    model = onnxfuse.compress(path, method=method, ratio=ratio, effort=effort, provider="cpu").model
    outputs = onnxfuse.validate(path, model, data=pictures, provider="cpu").drift.outputs
    found = [output.sqnr_db for output in outputs if output.sqnr_db is not None]
    return fmean(found) if found else None


def row(path: Path, pictures: Path, ratios: Sequence[float], effort: float) -> str:
    """Return a line of the table."""
    cells = []
    for ratio in ratios:
        try:
            found = [decibels(path, pictures, method, ratio, effort) for method in METHODS]
        except onnxfuse.OnnxFuseError as error:
            cells.append(error.what)
            break
        cells.extend("" if value is None else f"{value:.1f}" for value in found)
    return f"| {path.name} | {' | '.join(cells)} |"


def lines(folder: Path, pictures: Path, ratios: Sequence[float], effort: float) -> Iterator[str]:
    """Yield the table, one network after the other."""
    yield "| file | " + " | ".join(f"`{method}`, {ratio:g}" for ratio in ratios for method in METHODS) + " |"
    yield f"| --- |{' ---: |' * len(ratios) * len(METHODS)}"
    for path in sorted(folder.glob("*.onnx")):
        yield row(path, pictures, ratios, effort)


def main() -> int:
    """Measure every file of a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="its .onnx files are measured")
    parser.add_argument("pictures", type=Path, help="a folder of pictures")
    parser.add_argument("--ratios", type=float, nargs="+", default=(0.25, 0.5), help="default: 0.25 0.5")
    parser.add_argument("--effort", type=float, default=0.0, help="effort of auto (default: 0)")
    options = parser.parse_args()
    for line in lines(options.folder, options.pictures, options.ratios, options.effort):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
