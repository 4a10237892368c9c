#!/usr/bin/env python3
"""What the compression of a ResNet-18 costs, stage by stage, and what it gains in ONNX Runtime.

All groups of the paper's CIFAR ResNet-18 (random weights) at ratio 0.5, by every method. Methods, and original and
compressed network, are run in turn within one process, so that ratios mean something on a machine that does other
things too; the seconds alone do not.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from rich.console import Console

import onnxfuse
from onnxfuse.config import CompressionConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.networks import INPUT_NAME, resnet18
from tools.timing import StageTimes, interleaved, median_ratio

METHODS = ("prune", "fold", "intra-fusion", "auto")
RATIO = 0.5
THREADS = (1, 2)
BATCHES = (1, 32)


def compression_times(model: onnx.ModelProto, rounds: int, effort: float) -> Iterator[str]:
    """Yield a Markdown table of the median seconds of each stage."""
    runs: dict[str, list[onnxfuse.CompressionReport]] = {method: [] for method in METHODS}
    functions = {method: partial(_compress, model, method, effort, runs[method]) for method in METHODS}
    totals = interleaved(functions, rounds)
    stages = dict.fromkeys(stage for method in reversed(METHODS) for stage in runs[method][0].seconds)
    yield f"| median seconds of {rounds} rounds | {' | '.join(f'`{method}`' for method in METHODS)} |"
    yield f"| --- |{' ---: |' * len(METHODS)}"
    for stage in stages:
        medians = (
            statistics.median(report.seconds.get(stage, 0.0) for report in runs[method][1:]) for method in METHODS
        )
        yield f"| {stage} | {' | '.join(f'{median:.2f}' for median in medians)} |"
    yield f"| whole | {' | '.join(f'{statistics.median(totals[method]):.2f}' for method in METHODS)} |"
    ratios = (median_ratio(totals[method], totals[METHODS[0]]) for method in METHODS)
    yield f"| times `{METHODS[0]}` | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |"


def _compress(
    model: onnx.ModelProto, method: str, effort: float, reports: list[onnxfuse.CompressionReport]
) -> StageTimes:
    times = StageTimes()
    options = {"ratio": RATIO, "method": method, "effort": effort, "provider": "cpu"}
    reports.append(onnxfuse.compress(model, progress=times, config=CompressionConfig.from_options(options)).report)
    return times


def processor_times(model: onnx.ModelProto, effort: float) -> Iterator[str]:
    """Yield a Markdown table of the processor time of each stage of one run of the default method."""
    times = _compress(model, METHODS[-1], effort, []).seconds
    yield f"| stage of `{METHODS[-1]}` | processor seconds |"
    yield "| --- | ---: |"
    for stage, seconds in times.items():
        yield f"| {stage} | {seconds:.1f} |"
    yield f"| whole | {sum(times.values()):.1f} |"


def latencies(model: onnx.ModelProto, rounds: int) -> Iterator[str]:
    """Yield a Markdown table of the latency of the original and the compressed network in ONNX Runtime."""
    result = onnxfuse.compress(model, ratio=RATIO, method="prune", provider="cpu")
    before, after = result.report.before, result.report.after
    yield f"MACs {before.macs:,} -> {after.macs:,}: {before.macs / after.macs:.2f} times fewer."
    yield ""
    yield "| threads | batch | original, ms | compressed, ms | times faster |"
    yield "| ---: | ---: | ---: | ---: | ---: |"
    for threads in THREADS:
        for batch in BATCHES:
            image = np.random.default_rng(0).standard_normal((batch, 3, 32, 32)).astype(np.float32)
            functions = {
                "original": _runner(model, threads, image),
                "compressed": _runner(result.model, threads, image),
            }
            times = interleaved(functions, rounds, warm_up=3)
            milliseconds = (f"{1000 * statistics.median(times[name]):.1f}" for name in functions)
            ratio = median_ratio(times["original"], times["compressed"])
            yield f"| {threads} | {batch} | {' | '.join(milliseconds)} | {ratio:.2f} |"


def _runner(
    model: onnx.ModelProto, threads: int, image: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
) -> Callable[[], object]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {INPUT_NAME: image})


def main() -> int:
    """Print both tables, line by line as they are measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds of compression; 0 for processor time alone (default: 5)"
    )
    parser.add_argument("--runs", type=int, default=30, help="rounds of inference (default: 30)")
    parser.add_argument("--effort", type=float, default=0.0, help="effort of the reconstruction (default: 0)")
    options = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False, markup=False)
    model = resnet18()
    parts = [processor_times(model, options.effort)]
    if options.rounds:
        parts += [compression_times(model, options.rounds, options.effort), latencies(model, options.runs)]
    for part in parts:
        for line in part:
            console.print(line)
        console.print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
