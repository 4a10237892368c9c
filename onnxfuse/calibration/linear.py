"""Linear nodes as regressions: what they read row by row, and where their results end.

A convolution or a matrix product with a constant weight computes Y = X V^T + b, with a row of X for every place where
it is applied. What counts is not Y but the value that it ends in: behind the normalisation and the bias that follow,
and behind the residual addition if there is one, where other branches' errors can be made good.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from onnx import TensorProto

from onnxfuse.arrays import FloatArray, IntArray
from onnxfuse.coupling.groups import ChannelGraph
from onnxfuse.coupling.layout import leaves
from onnxfuse.coupling.scales_behind import scale_behind
from onnxfuse.graph.view import DEFAULT_DOMAIN, GraphView, NodeView, Operand
from onnxfuse.statistics.patches import convolution_pads, patch_rows, place_count, taps_in_sight

__all__ = ["Ending", "LinearNode", "ending_of", "linear_nodes", "value_readers"]

# The weight's slot of every operator that can be fitted.
_WEIGHT_SLOTS: Mapping[tuple[str, str], int] = {
    **{(DEFAULT_DOMAIN, op): 1 for op in ("Conv", "Gemm", "MatMul", "ConvInteger", "MatMulInteger")},
    **{(DEFAULT_DOMAIN, op): 3 for op in ("QLinearConv", "QLinearMatMul")},
    ("com.microsoft", "QGemm"): 3,
}
# What reads only how large a value is.
_SIZES = frozenset({"Shape", "Size"})
_FINE_INTEGERS = frozenset({TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16})

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class LinearNode:
    """A node whose weight can be fitted.

    Attributes:
        node: The node.
        weight: Its weight: a constant, the integers that are decoded for it, or the floats that are rounded for it.
        result: What it computes, in numbers: its output, or what becomes of that once a scale behind it is applied.
        filters: How many filters each group of a convolution has in the file.
        loses_groups: Whether it is groups that a convolution loses, and not filters of each.
    """

    node: NodeView
    weight: Operand
    result: str
    filters: int = 1
    loses_groups: bool = False

    def is_shared(self, graph: GraphView) -> bool:
        """Whether other nodes read the same weight, which could not be fitted for all of them."""
        slot = _WEIGHT_SLOTS[self.node.domain, self.node.op]
        return any(value_readers(graph, name) > 1 for name in (self.weight.name, self.node.inputs[slot]))

    @property
    def is_convolution(self) -> bool:
        """Whether it reads patches, so that channels are on axis 1; otherwise they are on the last axis."""
        return "Conv" in self.node.op

    @property
    def output_axis(self) -> int:
        """The axis of its weight that has its outputs."""
        return 0 if self.is_convolution or self._is_transposed else 1

    @property
    def is_clipped(self) -> bool:
        """Whether its result is rounded and clipped to integers, and so may be an activation of what it computes."""
        return self.node.op in {"QLinearConv", "QLinearMatMul"} or (self.node.op == "QGemm" and _has_scale(self.node))

    def groups(self, value: AnyArray) -> int:
        """Return into how many groups its channels fall, for the present value of its weight."""
        if not self.is_convolution:
            return 1
        stated = int(self.node.attributes.get("group", 1))
        # A depthwise convolution loses whole groups; each keeps its filters.
        return len(value) // self.filters if stated > 1 and (value.shape[1] == 1 or self.loses_groups) else stated

    def matrices(self, value: FloatArray) -> FloatArray:
        """Return a value of the weight as one matrix for each group, shape (G, O / G, D)."""
        if self.is_convolution:
            groups = self.groups(value)
            return value.reshape(groups, len(value) // groups, -1)
        return (value if self._is_transposed else value.T)[None]

    def row_length(self, value: AnyArray) -> int:
        """Return how many numbers each output of it reads at a place, for the present value of its weight."""
        return int(self.matrices(value).shape[2])

    def weight_like(self, matrices: FloatArray, value: FloatArray) -> FloatArray:
        """Turn matrices back into the weight's own shape."""
        if self.is_convolution:
            return matrices.reshape(value.shape)
        return np.ascontiguousarray(matrices[0] if self._is_transposed else matrices[0].T)

    def place_count(self, x: AnyArray, value: AnyArray) -> tuple[int, int]:
        """Return how many samples an input has, and in how many places in each the node is applied."""
        if not self.is_convolution:
            return int(np.prod(x.shape[:-1])), 1
        padded, kernel, strides, dilations = self._geometry(x, value)
        return len(x), place_count(padded, kernel, strides, dilations)

    def places_of(self, y: AnyArray) -> tuple[int, int]:
        """Return how many samples a value of the shape of its output has, and how many places each."""
        if not self.is_convolution:
            return int(np.prod(y.shape[:-1])), 1
        return len(y), int(np.prod(y.shape[2:]))

    def rows(self, x: AnyArray, value: AnyArray, places: IntArray) -> AnyArray:
        """Return what the node reads at some places, shape (n, G, D).

        Args:
            x: Its input.
            value: Its weight.
            places: Shape (n, 2): sample, and place in it.
        """
        if not self.is_convolution:
            return x.reshape(-1, 1, x.shape[-1])[places[:, 0]]
        padded, kernel, strides, dilations = self._geometry(x, value, materialise=True)
        found = patch_rows(padded, kernel, strides, dilations, places)
        return found.reshape(len(places), self.groups(value), -1)

    def outputs(self, y: AnyArray, places: IntArray) -> AnyArray:
        """Return a value of the shape of its output at some places, shape (n, O)."""
        if not self.is_convolution:
            return y.reshape(-1, y.shape[-1])[places[:, 0]]
        return y.reshape(y.shape[0], y.shape[1], -1)[places[:, 0], :, places[:, 1]]

    def taps_in_sight(self, dims: Sequence[int], value: AnyArray) -> FloatArray:
        """Return in what share of all places each tap reads its input, and not the zeros around it; shape (taps,).

        Args:
            dims: The shape of its input.
            value: Its weight.
        """
        return taps_in_sight(dims[2:], *self._window(dims, value)) if self.is_convolution else np.ones(1)

    @property
    def _is_transposed(self) -> bool:
        return self.node.op.endswith("Gemm") and bool(self.node.attributes.get("transB", 0))

    def _geometry(
        self, x: AnyArray, value: AnyArray, *, materialise: bool = False
    ) -> tuple[AnyArray, list[int], list[int], list[int]]:
        pads, kernel, strides, dilations = self._window(x.shape, value)
        if materialise:
            return np.pad(x, ((0, 0), (0, 0), *pads)), kernel, strides, dilations
        sizes = [size + before + after for size, (before, after) in zip(x.shape[2:], pads, strict=True)]
        return np.broadcast_to(np.zeros((), x.dtype), (*x.shape[:2], *sizes)), kernel, strides, dilations

    def _window(
        self, dims: Sequence[int], value: AnyArray
    ) -> tuple[Sequence[tuple[int, int]], list[int], list[int], list[int]]:
        """Return zeros around the map, and the size, steps and dilations of the filter, along each spatial axis."""
        attributes = self.node.attributes
        kernel = list(value.shape[2:])
        strides = [int(s) for s in attributes.get("strides", [1] * len(kernel))]
        dilations = [int(d) for d in attributes.get("dilations", [1] * len(kernel))]
        window = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        auto_pad = attributes.get("auto_pad", b"NOTSET").decode()
        pads = convolution_pads(auto_pad, dims[2:], window, strides, attributes.get("pads", []))
        return pads, kernel, strides, dilations


def value_readers(graph: GraphView, name: str) -> int:
    """Return how many nodes read the numbers of a value, and not its shape alone."""
    readers = graph.readers.get(name, [])
    return sum(reader.slot < 0 or graph.nodes[reader.node].op not in _SIZES for reader in readers)


def linear_nodes(graph: GraphView, channels: ChannelGraph) -> Iterator[LinearNode]:
    """Yield the nodes that can be fitted, in the order in which they run."""
    free = {group.atom for group in channels.groups if not group.frozen}
    counted = {size.node: set(leaves(size.layout)) for size in channels.sizes if size.attribute == "group"}
    for node in graph.nodes:
        slot = _WEIGHT_SLOTS.get((node.domain, node.op))
        first = graph.operand(node, 0)
        weight = None if slot is None else graph.decoded_operand(node, slot)
        if weight is None or first is None or first.is_constant or not _is_fine(weight, node, graph, channels):
            continue
        # What is known without an input, such as the keys of a table of positions, is no layer.
        if weight not in channels.layouts:
            continue
        dims, groups = graph.constants[weight.name].dims, int(node.attributes.get("group", 1))
        told = counted.get(node.index, set())
        going = {atom in told for atom in leaves(channels.layouts[weight][0]) if atom in free}
        # Of what is left of a weight that may lose groups and filters of each nobody could tell which it has lost.
        if _is_plain(node, len(dims)) and (groups == 1 or len(going) < 2):
            behind = scale_behind(graph, node)
            result = node.outputs[0] if behind is None else behind.result
            yield LinearNode(node, weight, result, dims[0] // groups, loses_groups=True in going)


def _has_scale(node: NodeView) -> bool:
    """Whether a QGemm has a scale for its result, which is of floats otherwise."""
    return len(node.inputs) > 7 and bool(node.inputs[7])


def _is_plain(node: NodeView, rank: int) -> bool:
    """Whether a node is nothing but a product of its rows with a matrix, or with one for each group."""
    if node.op.endswith("Gemm"):
        factors = (node.attributes.get("alpha", 1.0), node.attributes.get("beta", 1.0))
        return not node.attributes.get("transA", 0) and factors == (1.0, 1.0)
    return not node.attributes.get("channels_last", 0) if "Conv" in node.op else rank == 2


def _is_fine(weight: Operand, node: NodeView, graph: GraphView, channels: ChannelGraph) -> bool:
    """Whether a weight is a constant, of floats or of integers that are fine enough for what is fitted."""
    if not weight.is_constant:
        return False
    encoded = channels.encodings.get(weight)
    if encoded is None:
        return weight.node == node.index or weight in channels.roundings
    return encoded.scale is not None and graph.constants[weight.name].data_type in _FINE_INTEGERS


@dataclass(frozen=True)
class Ending:
    """Where the result of a linear node ends.

    Attributes:
        value: The last value on the way in which what the node computes is only scaled and shifted.
        steps: The nodes that scale and shift it on the way, in order.
        other: What a residual addition adds to it in the end; empty if nothing is.
        before: The value before that addition; the same as ``value`` if there is none.
    """

    value: str
    steps: tuple[NodeView, ...]
    other: str
    before: str

    @property
    def plain(self) -> "Ending":
        """The same without the residual addition."""
        return Ending(self.before, self.steps, "", self.before)


def ending_of(linear: LinearNode, graph: GraphView, channels: ChannelGraph) -> Ending:
    """Follow a linear node's result through the normalisation and the biases behind it, up to a residual addition."""
    value = linear.result
    axis = 1 if linear.is_convolution else -1
    steps: list[NodeView] = []
    while (reader := graph.sole_reader(value)) is not None:
        if reader.index in channels.normalising:
            if channels.batch_norms.get(reader.index, (-1,))[-1] != linear.node.index:
                break
        elif reader.op == "Add" and reader.domain == DEFAULT_DOMAIN and len(set(reader.inputs)) > 1:
            other = reader.inputs[1 - list(reader.inputs).index(value)]
            if other not in graph.constants:
                same = channels.layouts.get(Operand(other)) == channels.layouts.get(Operand(value))
                if not same:
                    break
                return Ending(reader.outputs[0], tuple(steps), other, value)
            rank = len(channels.layouts.get(Operand(value), ()))
            if not _is_bias(tuple(graph.constants[other].dims), axis, rank):
                break
        else:
            break
        steps.append(reader)
        value = reader.outputs[0]
    return Ending(value, tuple(steps), "", value)


def _is_bias(dims: tuple[int, ...], axis: int, rank: int) -> bool:
    """Whether a constant of this shape adds one number to every channel."""
    padded = (1,) * (rank - len(dims)) + dims
    return len(padded) == rank and all(size == 1 for i, size in enumerate(padded) if i != axis % rank)
