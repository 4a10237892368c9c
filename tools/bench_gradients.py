#!/usr/bin/env python3
"""How fast gradients of convolutions are in ONNX Runtime, in the forms that the rules choose and in the plain ones.

Plain are a transposed convolution for the gradient of the input and a convolution over the samples for that of the
weight. All run in turn within one process, so that ratios mean something on a machine that does other things too.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
import onnx
from onnx import TensorProto, helper
from rich.console import Console

from onnxfuse.config import Provider
from onnxfuse.gradient.backward import build_backward
from onnxfuse.gradient.rules import linear
from onnxfuse.graph.shapes import infer_shapes
from onnxfuse.graph.view import GraphView
from onnxfuse.proof.runtime import Session

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.timing import interleaved, median_ratio

Arrays: TypeAlias = dict[str, np.ndarray[Any, np.dtype[np.float32]]]

# Samples, channels in and out, side, taps along a side, step, groups.
LAYERS = (
    (64, 16, 16, 32, 3, 1, 1),
    (64, 64, 64, 32, 3, 1, 1),
    (27, 64, 128, 16, 3, 2, 1),
    (64, 64, 128, 32, 3, 2, 1),
    (27, 128, 128, 8, 3, 1, 1),
    (64, 256, 256, 8, 3, 1, 1),
    (64, 512, 512, 4, 3, 1, 1),
    (16, 16, 96, 112, 1, 1, 1),
    (64, 960, 160, 7, 1, 1, 1),
    (7, 75, 75, 28, 3, 1, 75),
    (7, 174, 174, 14, 3, 1, 174),
    (35, 810, 810, 7, 3, 1, 810),
    (64, 384, 384, 14, 3, 1, 384),
)


def layer(samples: int, inputs: int, outputs: int, side: int, taps: int, step: int, groups: int) -> onnx.ModelProto:
    """Return a network of one convolution, whose input and weight are its inputs."""
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[taps // 2] * 4, strides=[step] * 2, group=groups)
    dims = {"x": (samples, inputs, side, side), "w": (outputs, inputs // groups, taps, taps)}
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in dims.items()]
    graph = helper.make_graph([node], "layer", given, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)])


@contextmanager
def plain_forms() -> Iterator[None]:
    """Let the rules choose the plain forms."""
    with (
        mock.patch.object(linear, "_MOST_TAPS", 0),
        mock.patch.object(linear, "_MOST_TAPS_OF_ONE", 0),
        mock.patch.object(linear, "_back", _spread),
    ):
        yield


def _spread(*args: Any, **_: Any) -> Any:
    return linear.spread(*args)


def sessions(model: onnx.ModelProto) -> dict[str, tuple[Session, Arrays]]:
    """Return what runs each gradient in both forms, and what it takes, by name."""
    graph = GraphView(model)
    shapes = infer_shapes(
        graph, {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in model.graph.input}
    )
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shapes.dims[name]).astype(np.float32) for name in ("x", "w", "y")}
    found = {}
    for form in ("chosen", "plain"):
        for name in ("x", "w"):
            with plain_forms() if form == "plain" else nullcontext():
                plan = build_backward(graph, shapes, [name])
            fed = {own: values[original] for original, own in {**plan.values, **plan.seeds}.items()}
            found[f"{name}, {form}"] = Session(plan.model, Provider.CPU), fed
    return found


def main() -> int:
    """Print the table, line by line as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each layer (default: 10)")
    options = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(
        "| samples, channels, side, taps, step, groups | input, ms | plain / chosen | weight, ms | plain / chosen |"
    )
    console.print("| --- | ---: | ---: | ---: | ---: |")
    for sizes in LAYERS:
        n, inputs, outputs, side, taps, step, groups = sizes
        functions = {name: partial(session.run, fed) for name, (session, fed) in sessions(layer(*sizes)).items()}
        times = interleaved(functions, options.rounds, warm_up=2)
        cells = [f"{n}, {inputs} to {outputs}, {side}, {taps}, {step}, {groups}"]
        for name in ("x", "w"):
            chosen, plain = times[f"{name}, chosen"], times[f"{name}, plain"]
            cells += [f"{1000 * statistics.median(chosen):.1f}", f"{median_ratio(plain, chosen):.2f}"]
        console.print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
