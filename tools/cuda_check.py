#!/usr/bin/env python3
"""Whether everything works on an NVIDIA GPU, and how fast, as a Markdown page to paste into ``docs/cuda.md``.

Compresses the example network and the paper's ResNet-18 (random weights) with the proof on CUDA, measures the example's
accuracy there, compares what CPU and CUDA compute, and times original and compressed networks in turn. Exits with 6
where CUDA does not work.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
from rich.console import Console

import onnxfuse
from onnxfuse.arrays import FloatArray
from onnxfuse.proof.runtime import Session

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.networks import INPUT_NAME, resnet18
from tools.timing import interleaved, median_ratio

BATCHES = (1, 64)
MODELS = Path(__file__).resolve().parent.parent / "models"
# A difference between CPU and CUDA above this share of the largest output is no rounding, TF32 included.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Case:
    """A network before and after compression.

    Attributes:
        name: What the tables call it.
        original: Before.
        result: After, with the report of the run on CUDA.
        shape: Shape of one sample of its input, which is called ``INPUT_NAME``.
    """

    name: str
    original: onnx.ModelProto
    result: onnxfuse.Compressed
    shape: tuple[int, ...]

    def images(self, batch: int) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
        """Return random inputs."""
        rng = np.random.default_rng(0)
        return {INPUT_NAME: rng.standard_normal((batch, *self.shape)).astype(np.float32)}


def compressed_cases() -> list[Case]:
    """Compress both networks with everything that runs on CUDA."""
    digits, wide = onnx.load(MODELS / "digits_bn.onnx"), resnet18()
    return [
        Case(
            "digits_bn, `--scope hidden --ratio 0.3`",
            digits,
            onnxfuse.compress(digits, scope="hidden", ratio=0.3, provider="cuda"),
            (1, 8, 8),
        ),
        Case(
            # Random weights have nothing that a reconstruction could bring back; the other network has one.
            "ResNet-18 (CIFAR, random weights), `--ratio 0.5 --effort 0`",
            wide,
            onnxfuse.compress(wide, ratio=0.5, effort=0, provider="cuda"),
            (3, 32, 32),
        ),
    ]


def software(versions: Mapping[str, str]) -> Iterator[str]:
    """Yield what it ran on: versions, the driver and the GPU."""
    for package, version in versions.items():
        yield f"- {package} {version}"
    nvidia = {d.name: d.version for d in metadata.distributions() if d.name.startswith("nvidia-")}
    for package in sorted(nvidia):
        yield f"- {package} {nvidia[package]}"
    program = shutil.which("nvidia-smi")
    if program is not None:
        query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        done = subprocess.run(query, check=False, stdout=subprocess.PIPE, text=True)
        yield from (f"- GPU: {line.strip()}" for line in done.stdout.splitlines())


def accuracy(case: Case) -> Iterator[str]:
    """Yield the true accuracy of the example network on both providers."""
    yield "| provider | original | compressed | n |"
    yield "| --- | ---: | ---: | ---: |"
    for provider in ("cpu", "cuda"):
        data = MODELS / "digits_test.npz"
        report = onnxfuse.validate(case.original, case.result.model, data=data, provider=provider)
        shares = report.accuracy or {}
        cells = " | ".join(f"{100 * shares[word]:.2f}" for word in ("original", "compressed"))
        yield f"| {report.provider} | {cells} | {report.drift.samples} |"


def differences(case: Case) -> Iterator[tuple[str, float]]:
    """Yield what a row says of the CPU against CUDA, and the largest difference as a share of the largest output."""
    for word, model in (("original", case.original), ("compressed", case.result.model)):
        feeds = case.images(BATCHES[-1])
        y, z = (_outputs(model, provider, feeds) for provider in (onnxfuse.Provider.CPU, onnxfuse.Provider.CUDA))
        share = float(np.abs(y - z).max() / np.abs(y).max())
        same = float((y.argmax(axis=1) == z.argmax(axis=1)).mean())
        yield f"| {case.name} | {word} | {share:.1e} | {100 * same:.1f} % |", share


def _outputs(
    model: onnx.ModelProto,
    provider: onnxfuse.Provider,
    feeds: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]],
) -> FloatArray:
    values: FloatArray = np.asarray(next(iter(Session(model, provider).run(feeds).values())), np.float64)
    return values


def latency(case: Case, runs: int) -> Iterator[str]:
    """Yield the median latency of the original and the compressed network on CUDA, copies to and fro included."""
    sessions = {
        "original": Session(case.original, onnxfuse.Provider.CUDA),
        "compressed": Session(case.result.model, onnxfuse.Provider.CUDA),
    }
    for batch in BATCHES:
        feeds = case.images(batch)
        functions = {name: partial(session.run, feeds) for name, session in sessions.items()}
        times = interleaved(functions, runs, warm_up=20)
        cells = " | ".join(f"{1000 * statistics.median(times[name]):.2f}" for name in functions)
        yield f"| {case.name} | {batch} | {cells} | {median_ratio(times['original'], times['compressed']):.2f} |"


def page(console: Console, runs: int) -> bool:
    """Print everything; return whether CPU and CUDA agree."""
    cases = compressed_cases()
    for line in software(cases[0].result.report.versions):
        console.print(line)
    console.print("\n| network | proof ran on | parameters | MACs | seconds |\n| --- | --- | ---: | ---: | ---: |")
    for case in cases:
        report = case.result.report
        sizes = (
            f"{before:,} -> {after:,}"
            for before, after in (
                (report.before.parameters, report.after.parameters),
                (report.before.macs, report.after.macs),
            )
        )
        console.print(f"| {case.name} | {report.provider} | {' | '.join(sizes)} | {sum(report.seconds.values()):.1f} |")
    console.print()
    for line in accuracy(cases[0]):
        console.print(line)
    console.print("\n| network | | CPU against CUDA: largest difference / largest output | same top-1 |")
    console.print("| --- | --- | ---: | ---: |")
    shares = []
    for case in cases:
        for line, share in differences(case):
            console.print(line)
            shares.append(share)
    console.print("\n| network | batch | original, ms | compressed, ms | times faster |")
    console.print("| --- | ---: | ---: | ---: | ---: |")
    for case in cases:
        for line in latency(case, runs):
            console.print(line)
    return max(shares) <= TOLERANCE


def main() -> int:
    """Print the page; exit with 0 if all is well, 1 if CPU and CUDA disagree, 6 if CUDA does not work."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="rounds of inference (default: 200)")
    options = parser.parse_args()
    try:
        agree = page(Console(soft_wrap=True, highlight=False, markup=False), options.runs)
    except onnxfuse.OnnxFuseError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    if not agree:
        sys.stderr.write("CPU and CUDA differ by more than rounding explains\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
