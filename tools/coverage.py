#!/usr/bin/env python3
"""How much of every ONNX file in a folder onnxfuse can compress, and why not the rest: ``coverage.py DIR``."""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten

from rich.console import Console
from rich.table import Table

import onnxfuse

RATIO = 0.3
MOST_REASONS = 3
MOST_LETTERS = 100
COLUMNS = (
    "file",
    "parameters",
    "groups (free)",
    "compressible",
    "params -",
    "MACs -",
    "s",
    "what stops most of the rest",
)


@dataclass(frozen=True)
class Coverage:
    """What became of one file.

    Attributes:
        file: Its name.
        parameters: How many it has.
        groups: How many coupling groups it has.
        free_groups: How many of them may change.
        compressible: Share of the parameters that follow the channels of such a group, 0 to 1.
        parameters_removed: Share of the parameters that `compress` removes, 0 to 1.
        macs_removed: Share of the multiply-accumulates that it removes, 0 to 1.
        seconds: Time of `inspect` and `compress` together.
        reasons: The reasons that freeze the most parameters, with their numbers.
        problem: What onnxfuse refused the file for; empty if it did not.
    """

    file: str
    parameters: int = 0
    groups: int = 0
    free_groups: int = 0
    compressible: float = 0.0
    parameters_removed: float = 0.0
    macs_removed: float = 0.0
    seconds: float = 0.0
    reasons: tuple[str, ...] = ()
    problem: str = ""


def measure(path: Path, method: str) -> Coverage:
    """Inspect and compress one file."""
    start = time.perf_counter()
    try:
        found = onnxfuse.inspect(path)
    except onnxfuse.OnnxFuseError as error:
        return Coverage(path.name, seconds=time.perf_counter() - start, problem=error.what)
    parameters = macs = 0.0
    problem = ""
    try:
        report = onnxfuse.compress(path, ratio=RATIO, method=method, provider="cpu").report
        parameters = 1 - report.after.parameters / max(report.before.parameters, 1)
        macs = 1 - report.after.macs / max(report.before.macs, 1)
    except onnxfuse.OnnxFuseError as error:
        problem = error.what
    return Coverage(
        file=path.name,
        parameters=found.cost.parameters,
        groups=len(found.groups),
        free_groups=sum(group.frozen is None for group in found.groups),
        compressible=found.compressible_share,
        parameters_removed=parameters,
        macs_removed=macs,
        seconds=time.perf_counter() - start,
        reasons=top_reasons(found),
        problem=problem,
    )


def top_reasons(report: onnxfuse.InspectReport) -> tuple[str, ...]:
    """Return the reasons that freeze the most parameters."""
    counts = Counter({reason: entry["parameters"] for reason, entry in report.frozen_reasons.items()})
    return tuple(f"{reason} ({count:,})" for reason, count in counts.most_common(MOST_REASONS) if count)


def cells(row: Coverage) -> tuple[str, ...]:
    """Return what a row of a table says, column by column."""
    return (
        row.file,
        f"{row.parameters:,}",
        f"{row.groups} ({row.free_groups})",
        f"{100 * row.compressible:.1f} %",
        f"{100 * row.parameters_removed:.1f} %",
        f"{100 * row.macs_removed:.1f} %",
        f"{row.seconds:.1f}",
        shorten(row.problem.partition(";")[0] or (row.reasons[0] if row.reasons else ""), MOST_LETTERS),
    )


def table(rows: Sequence[Coverage]) -> Table:
    """Return a table for a terminal."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in COLUMNS[:-1]:
        shown.add_column(name, justify="left" if name == COLUMNS[0] else "right", no_wrap=True)
    shown.add_column(COLUMNS[-1])
    for row in rows:
        shown.add_row(*cells(row))
    return shown


def markdown(rows: Sequence[Coverage]) -> str:
    """Return the same as Markdown."""
    lines = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 2), "---")]
    lines += [tuple(cell.replace("|", "\\|") for cell in cells(row)) for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    """Measure every file of a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="its .onnx files are measured")
    parser.add_argument("--method", default="auto", help="fusion method (default: auto)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON list with all reasons")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args()
    rows = [measure(path, options.method) for path in sorted(options.folder.glob("*.onnx"))]
    if not rows:
        sys.stderr.write(f"{options.folder} has no .onnx files\n")
        return 1
    if options.json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    elif options.markdown:
        sys.stdout.write(markdown(rows))
    else:
        Console().print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
