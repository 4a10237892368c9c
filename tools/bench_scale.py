#!/usr/bin/env python3
"""What the compression of one large feed-forward layer costs: seconds and memory of every stage, for every method.

The layer is that of a language model: a normalisation, a gate and an upward projection, their product (SwiGLU), a
downward projection and a residual addition, in float16, with random weights. Its inner channels are one group. Every
method runs in a process of its own, so that none inherits what another has allocated.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

import onnxfuse

METHODS = ("prune", "fold", "intra-fusion", "auto")
SEQUENCE = 128
MEGABYTE = 2**20

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def feed_forward(hidden: int, inner: int, seed: int = 0) -> onnx.ModelProto:
    """Return the layer: ``x + down(silu(gate(n)) * up(n))`` with ``n`` the normalised ``x``, in float16."""
    rng = np.random.default_rng(seed)

    def weight(name: str, rows: int, columns: int) -> TensorProto:
        values = rng.standard_normal((rows, columns), np.float32)
        values *= np.float32(rows**-0.5)
        return numpy_helper.from_array(values.astype(np.float16), name)

    constants = [
        numpy_helper.from_array(np.ones(hidden, np.float16), "norm"),
        weight("w_gate", hidden, inner),
        weight("w_up", hidden, inner),
        weight("w_down", inner, hidden),
    ]
    nodes = [
        helper.make_node("LayerNormalization", ["x", "norm"], ["n"], "/norm", axis=-1, epsilon=1e-5),
        helper.make_node("MatMul", ["n", "w_gate"], ["gate"], "/gate"),
        helper.make_node("Sigmoid", ["gate"], ["sigmoid"], "/sigmoid"),
        helper.make_node("Mul", ["gate", "sigmoid"], ["silu"], "/silu"),
        helper.make_node("MatMul", ["n", "w_up"], ["up"], "/up"),
        helper.make_node("Mul", ["silu", "up"], ["gated"], "/gated"),
        helper.make_node("MatMul", ["gated", "w_down"], ["down"], "/down"),
        helper.make_node("Add", ["x", "down"], ["y"], "/add"),
    ]
    shape: list[int | str | None] = ["batch", SEQUENCE, hidden]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "feed-forward", [ends[0]], [ends[1]], constants)
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])


def tokens(hidden: int, count: int, seed: int = 1) -> AnyArray:
    """Return rows that vary in few directions more than in others, shape (batch, sequence, hidden), float16."""
    rng = np.random.default_rng(seed)
    rank = max(hidden // 8, 1)
    rows = rng.standard_normal((count, rank), np.float32) @ rng.standard_normal((rank, hidden), np.float32)
    rows = rows / np.float32(rank**0.5) + rng.standard_normal((count, hidden), np.float32) / np.float32(4)
    return rows.astype(np.float16).reshape(-1, SEQUENCE, hidden)


class Peaks:
    """The most memory that the process has held in each stage, in MB; Linux alone tells."""

    def __init__(self) -> None:
        """Start before the first stage."""
        self.stage = ""
        self.megabytes: dict[str, float] = {}

    def __call__(self, stage: str, _done: int, _total: int) -> None:
        """Note the peak of the stage that ends, and start anew for the one that begins."""
        self.close()
        if stage != self.stage:
            self.stage = stage
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def close(self) -> None:
        """Note the peak so far."""
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
        self.megabytes[self.stage] = max(self.megabytes.get(self.stage, 0.0), peak)


def measure(folder: Path, method: str, ratio: float, effort: float) -> dict[str, Any]:
    """Compress the layer once; return seconds and peaks by stage, and how far the result's outputs are."""
    peaks = Peaks()
    options: dict[str, Any] = {"ratio": ratio, "method": method, "provider": "cpu", "effort": effort}
    calibration = folder / "tokens.npz"
    report = onnxfuse.compress(folder / "layer.onnx", calibration=calibration, progress=peaks, **options).report
    peaks.close()
    drift = report.drift.outputs[0].sqnr_db
    cpu = time.process_time()
    return {"seconds": report.seconds, "peaks": peaks.megabytes, "drift": drift, "cpu": cpu, "notes": report.notes}


def table(results: Mapping[str, Mapping[str, Any]], weights: int) -> Sequence[str]:
    """Return a Markdown table: seconds and peak of every stage."""
    stages = dict.fromkeys(stage for result in results.values() for stage in result["seconds"])
    lines = [f"| seconds / peak MB | {' | '.join(f'`{method}`' for method in results)} |"]
    lines.append(f"| --- |{' ---: |' * len(results)}")
    for stage in stages:
        cells = (
            f"{r['seconds'][stage]:.1f} / {r['peaks'][stage]:,.0f}" if stage in r["seconds"] else ""
            for r in results.values()
        )
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    whole = (f"{sum(r['seconds'].values()):.1f} / {max(r['peaks'].values()):,.0f}" for r in results.values())
    lines.append(f"| whole | {' | '.join(whole)} |")
    seconds = (f"{result['cpu']:.0f}" for result in results.values())
    lines.append(f"| seconds of one core | {' | '.join(seconds)} |")
    times = (f"{max(r['peaks'].values()) * MEGABYTE / weights:.1f}" for r in results.values())
    lines.append(f"| peak, in sizes of the weights | {' | '.join(times)} |")
    drifts = ("" if r["drift"] is None else f"{r['drift']:.1f}" for r in results.values())
    lines.append(f"| signal to difference, dB | {' | '.join(drifts)} |")
    return lines


def main() -> int:
    """Make the layer and its tokens, compress it by every method, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024, help="width of the stream (default: 1024)")
    parser.add_argument("--inner", type=int, default=3584, help="channels of the group (default: 3584)")
    parser.add_argument("--tokens", type=int, default=4096, help=f"rows, a multiple of {SEQUENCE} (default: 4096)")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of channels to remove (default: 0.5)")
    parser.add_argument("--effort", type=float, default=0.0, help="effort of the reconstruction (default: 0)")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="methods (default: all)")
    parser.add_argument("--folder", type=Path, help="where layer and tokens lie: measure one method, print JSON")
    options = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if options.folder is not None:
        console.print(json.dumps(measure(options.folder, options.methods[0], options.ratio, options.effort)))
        return 0
    results = {}
    with tempfile.TemporaryDirectory(prefix="onnxfuse-bench-") as name:
        folder = Path(name)
        model = feed_forward(options.hidden, options.inner)
        weights = model.ByteSize()
        onnx.save(model, folder / "layer.onnx")
        del model
        np.savez(folder / "tokens.npz", x=tokens(options.hidden, options.tokens))
        for method in options.methods:
            command = [sys.executable, __file__, "--folder", name, "--methods", method]
            command += ["--ratio", str(options.ratio), "--effort", str(options.effort)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results[method] = json.loads(done.stdout)
    console.print(f"{options.inner} channels in a stream of {options.hidden}, {weights / MEGABYTE:,.0f} MB of weights")
    console.print()
    for line in table(results, weights):
        console.print(line)
    for note in dict.fromkeys(note for result in results.values() for note in result["notes"]):
        console.print(f"note: {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
