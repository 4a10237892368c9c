#!/usr/bin/env python3
"""How long the coupling analysis takes, by the size of the graph: ``bench_analysis.py [NODES ...]``.

Three kinds of networks: a deep residual one, a transformer, and a densely connected one, each of whose layers reads all
layers before it. In the last one the number of edges, the values that nodes read, grows with the square of the nodes,
and so does the file; what counts there is the time for each of them.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxfuse.analysis import analyse
from onnxfuse.graph.files import read_model
from onnxfuse.graph.view import GraphView

WIDTH = 8
TOKENS = 6
SIZES = (250, 500, 1000, 2000)


class Writer:
    """Writes a model node by node."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; return its output."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=f"{op}_{len(self.nodes)}", **attributes))
        return name

    def weight(self, *dims: int) -> str:
        """Add a random weight."""
        name = f"w{len(self.weights)}"
        value = (self.rng.uniform(0.5, 1.0, dims) / np.prod(dims[1:])).astype(np.float32)
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def constant(self, *values: int) -> str:
        """Add a vector of integers."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def conv(self, x: str, inputs: int, outputs: int) -> str:
        """Add Conv, BatchNormalization and Relu."""
        y = self.node("Conv", x, self.weight(outputs, inputs, 1, 1))
        y = self.node("BatchNormalization", y, *(self.weight(outputs) for _ in range(4)))
        return self.node("Relu", y)

    def model(self, y: str, *dims: int) -> onnx.ModelProto:
        """Return the model, whose output is ``y``."""
        kind = onnx.TensorProto.FLOAT
        x = helper.make_tensor_value_info("x", kind, ["batch", *dims])
        graph = helper.make_graph(
            self.nodes, "bench", [x], [helper.make_tensor_value_info(y, kind, None)], self.weights
        )
        return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def residual(nodes: int) -> onnx.ModelProto:
    """Blocks of two convolutions with a shortcut."""
    net = Writer()
    x = net.conv("x", 3, WIDTH)
    while len(net.nodes) < nodes - 1:
        x = net.node("Relu", net.node("Add", x, net.conv(net.conv(x, WIDTH, 2 * WIDTH), 2 * WIDTH, WIDTH)))
    return net.model(net.node("Conv", x, net.weight(2, WIDTH, 1, 1)), 3, 4, 4)


def dense(nodes: int) -> onnx.ModelProto:
    """Layers that read all layers before them, in blocks of any length."""
    net = Writer()
    parts = [net.conv("x", 3, WIDTH)]
    while len(net.nodes) < nodes - 2:
        parts.append(net.conv(net.node("Concat", *parts, axis=1), WIDTH * len(parts), WIDTH))
    x = net.node("Concat", *parts, axis=1)
    return net.model(net.node("Conv", x, net.weight(2, WIDTH * len(parts), 1, 1)), 3, 4, 4)


def transformer(nodes: int) -> onnx.ModelProto:
    """Blocks of attention with two heads and a network with one hidden layer."""
    net, width = Writer(), 2 * WIDTH
    target, back = net.constant(0, 0, 2, WIDTH), net.constant(0, 0, width)
    x = net.node("MatMul", "x", net.weight(width, width))
    while len(net.nodes) < nodes - 1:
        h = net.node("LayerNormalization", x, net.weight(width), net.weight(width))
        heads = [
            net.node("Transpose", net.node("Reshape", net.node("MatMul", h, net.weight(width, width)), target), perm=p)
            for p in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        ]
        scores = net.node("Softmax", net.node("MatMul", *heads[:2]), axis=-1)
        mixed = net.node("Transpose", net.node("MatMul", scores, heads[2]), perm=[0, 2, 1, 3])
        mixed = net.node("MatMul", net.node("Reshape", mixed, back), net.weight(width, width))
        x = net.node("Add", x, mixed)
        h = net.node("LayerNormalization", x, net.weight(width), net.weight(width))
        h = net.node("Relu", net.node("MatMul", h, net.weight(width, 4 * width)))
        x = net.node("Add", x, net.node("MatMul", h, net.weight(4 * width, width)))
    return net.model(net.node("MatMul", x, net.weight(width, 2)), TOKENS, width)


NETWORKS: dict[str, Callable[[int], onnx.ModelProto]] = {
    "residual": residual,
    "transformer": transformer,
    "dense": dense,
}


def main() -> int:
    """Time the analysis of every kind at every size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nodes", type=int, nargs="*", default=SIZES, help="sizes (default: 250 500 1000 2000)")
    parser.add_argument("--kind", choices=list(NETWORKS), action="append", help="network (default: all)")
    options = parser.parse_args()
    row = "{:<12}{:>8}{:>8}{:>8}{:>10}{:>14}{:>14}\n"
    sys.stdout.write(row.format("network", "nodes", "edges", "groups", "seconds", "ms per node", "us per edge"))
    for kind in options.kind or NETWORKS:
        for size in options.nodes:
            source = read_model(NETWORKS[kind](size))
            start = time.perf_counter()
            found = analyse(source, GraphView(source.model), None)
            seconds = time.perf_counter() - start
            nodes = len(found.graph.nodes)
            free = sum(not group.frozen for group in found.channels.groups)
            edges = sum(bool(name) for node in found.graph.nodes for name in node.inputs)
            times = (f"{seconds:.2f}", f"{1000 * seconds / nodes:.2f}", f"{1e6 * seconds / edges:.0f}")
            sys.stdout.write(row.format(kind, nodes, edges, free, *times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
