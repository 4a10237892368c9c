"""What a graph tells of its inputs: sizes that weights need, the range of indices, numbers that they are compared with.

Random inputs have to be in range where they look something up, and a branch that is taken for one sample rate alone is
never seen if the rate is drawn at random.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxfuse.graph.view import DEFAULT_DOMAIN, GraphView, NodeView

__all__ = ["ValueHints", "needed_sizes", "value_hints"]

# Operators that pass the values of their first input on, all of them or some.
_PASSING = frozenset(
    {"Cast", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
)
# Operators that look something up in their first input, with the attribute that has the axis.
_LOOKING_UP = {"Gather": "axis", "GatherElements": "axis", "GatherBlockQuantized": "gather_axis"}
# Operators that keep the axes of their first input, where the others are constants.
_KEEPING = frozenset({"Add", "BatchNormalization", "Cast", "Clip", "Div", "Identity", "Mul", "QuantizeLinear", "Sub"})
_COMPARING = frozenset({"Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
# How far values are followed.
_MOST_NODES = 32


@dataclass(frozen=True)
class ValueHints:
    """What is known of the values of one input.

    Attributes:
        below: They are indices from 0 on, and less than this; None if nothing is looked up with them.
        compared: Numbers that decide comparisons with constants, one way and the other.
    """

    below: int | None = None
    compared: tuple[float, ...] = ()


def value_hints(graph: GraphView, name: str) -> ValueHints:
    """Return what the readers of a graph input tell of its values.

    Example:
        >>> import onnx
        >>> model = onnx.parser.parse_model('''
        ...     <ir_version: 8, opset_import: ["" : 17]>
        ...     net (int64[3] ids, int64 rate) => (float[3, 2] y, bool z)
        ...     <float[4, 2] table = {1, 2, 3, 4, 5, 6, 7, 8}, int64 wide = {16000}>
        ...     { y = Gather(table, ids)  z = Equal(rate, wide) }
        ... ''')
        >>> value_hints(GraphView(model), "ids"), value_hints(GraphView(model), "rate")
        (ValueHints(below=4, compared=()), ValueHints(below=None, compared=(16000.0,)))
    """
    bounds, compared = [], dict[float, None]()
    for node, slot in _readers(graph, name):
        if node.op in _LOOKING_UP and slot == 1 and node.inputs[0] in graph.constants:
            dims = graph.constants[node.inputs[0]].dims
            bounds.append(dims[int(node.attributes.get(_LOOKING_UP[node.op], 0))])
        elif node.op == "Equal" or node.op in _COMPARING:
            for number in _numbers(graph, node.inputs[1 - slot]):
                told = (number,) if node.op == "Equal" else (number - 1, number + 1)
                compared.update((value, None) for value in told)
    return ValueHints(min(bounds, default=None), tuple(compared))


def needed_sizes(graph: GraphView, name: str) -> dict[int, int]:
    """Return the sizes that weights demand of a graph input's axes, by axis (from the end where it is negative).

    Example:
        >>> import onnx
        >>> model = onnx.parser.parse_model('''
        ...     <ir_version: 8, opset_import: ["" : 17]>
        ...     net (float[n, c, h, w] x) => (float[n, 1, h, w] y)
        ...     <float[1, 3, 1, 1] w = {1, 2, 3}>
        ...     { y = Conv(x, w) }
        ... ''')
        >>> needed_sizes(GraphView(model), "x")
        {1: 3}
    """
    found: dict[int, int] = {}
    for node, slot in _readers(graph, name, _KEEPING):
        if slot == 0 and len(node.inputs) > 1 and node.inputs[1] in graph.constants:
            for axis, size in _demanded(node, graph.constants[node.inputs[1]].dims):
                found.setdefault(axis, size)
    return found


def _demanded(node: NodeView, weight: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield axis and size that a node with a constant weight demands of its first input."""
    match node.op:
        case "Conv" if len(weight) > 1:
            yield 1, weight[1] * int(node.attributes.get("group", 1))
        case "ConvTranspose" | "BatchNormalization" if weight:
            yield 1, weight[0]
        case "Gemm" if len(weight) > 1:
            axis = 0 if node.attributes.get("transA", 0) else 1
            yield axis, weight[1 if node.attributes.get("transB", 0) else 0]
        case "MatMul" if len(weight) > 1:
            yield -1, weight[-2]
        case "LSTM" | "GRU" | "RNN" if len(weight) > 1:
            yield 2, weight[2]


def _readers(graph: GraphView, name: str, passing: frozenset[str] = _PASSING) -> Iterator[tuple[NodeView, int]]:
    """Yield what reads a value, straight or behind operators that pass it on."""
    waiting, seen = [name], {name}
    while waiting and len(seen) < _MOST_NODES:
        for reader in graph.readers.get(waiting.pop(), []):
            node = graph.nodes[reader.node]
            if reader.slot < 0 or (node.domain != DEFAULT_DOMAIN and node.op not in _LOOKING_UP):
                continue
            yield node, reader.slot
            if node.op in passing and reader.slot == 0 and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                waiting.append(node.outputs[0])


def _numbers(graph: GraphView, name: str) -> Iterator[float]:
    """Yield the number that a constant of one element holds."""
    if name in graph.constants and int(np.prod(graph.constants[name].dims, dtype=np.int64)) == 1:
        value = graph.array(name)
        if value.dtype.kind in "iuf":
            yield float(value.ravel()[0])
