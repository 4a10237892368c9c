"""Weights of floats that the graph rounds to integers and back, as training for quantisation leaves them.

Exporters write such a weight as QuantizeLinear -> DequantizeLinear, with a Clip between where not all of the integers
are used, and a Transpose or Reshape anywhere. The layer behind computes with the rounded weight. It follows its
channels like any other, and scales and zero points follow it: those of both nodes are one scale, stated twice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from onnx import TensorProto, helper

from onnxfuse.coupling.constraints import Rounded
from onnxfuse.coupling.rearranged import REARRANGING, moved_axis
from onnxfuse.graph.shapes import Shapes
from onnxfuse.graph.view import GraphView, NodeView, Operand

__all__ = ["Rounding", "RoundingFinder"]

OperandOf: TypeAlias = Callable[[NodeView, int], Operand]
Limits: TypeAlias = tuple[int, int]

_FINE_TYPES = frozenset({TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16})
_MOVING = REARRANGING - {"Cast", "DequantizeLinear", "QuantizeLinear"}


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a weight of floats is rounded: it counts as (q - z) s with q = w / s + z rounded to the nearest integer.

    Attributes:
        scales: The scale s, as every node on the way reads it; all of them are equal.
        zeros: The zero point z, likewise; none for 0.
        axes: The axes of the weight that scale and zero point run along, in their order; none for one scale for all.
        along: The axis of ``axes`` that falls into blocks.
        block: How many indices along it share a scale.
        limits: The least and the largest q; what is beyond counts as them.
    """

    scales: tuple[Operand, ...]
    zeros: tuple[Operand, ...]
    axes: tuple[int, ...]
    along: int
    block: int
    limits: Limits


class _OddRoundingError(Exception):
    """A weight is not just rounded and taken for what it was rounded to."""


class RoundingFinder:
    """Finds the weights that a network rounds.

    Args:
        graph: The network.
        shapes: Its shapes.
        operand_of: Gives the operand that a node reads at a slot.
    """

    def __init__(self, graph: GraphView, shapes: Shapes, operand_of: OperandOf) -> None:
        """Remember where to look."""
        self._graph = graph
        self._shapes = shapes
        self._operand_of = operand_of

    def find(self, rounded: Mapping[int, Rounded]) -> tuple[dict[Operand, Rounding], dict[Operand, str]]:
        """Find how every weight that is rounded somewhere is rounded.

        Args:
            rounded: What rules say of the nodes that round a weight, by their index.

        Returns:
            The roundings by weight; and for weights whose scale can't be chosen anew the reason.
        """
        found: dict[Operand, Rounding] = {}
        odd: dict[Operand, str] = {}
        for index, told in rounded.items():
            title = self._graph.nodes[index].title
            source = self._back(told.operand, ())[0]
            if source in found or source in odd:
                found.pop(source, None)
                odd[source] = f"{title} rounds {source.name!r}, but another node does so too"
                continue
            try:
                found[source] = self._rounding(told)
            except _OddRoundingError as error:
                odd[source] = f"{title} rounds {source.name!r}, but {error}"
        return found, odd

    def _back(self, operand: Operand, axes: Sequence[int | None]) -> tuple[Operand, list[int | None], list[NodeView]]:
        """Follow a weight back to where it is stored; return that, where axes were there, and the nodes on the way."""
        places, nodes = list(axes), []
        while not operand.is_constant:
            node = self._graph.nodes[self._graph.producers[operand.name]]
            operand = self._operand_of(node, 0)
            rank = len(self._shapes.dims[operand.name])
            now = [moved_axis(node, axis, rank, self._shapes) for axis in range(rank)]
            places = [now.index(place) if place is not None and place in now else None for place in places]
            nodes.append(node)
        return operand, places, nodes

    def _rounding(self, told: Rounded) -> Rounding:
        """Put together what a node that rounds and those that decode its result say."""
        source, axes, before = self._back(told.operand, told.axes)
        if any(other.op not in _MOVING | {"Cast"} for other in before):
            what = "it is rounded before that"
            raise _OddRoundingError(what)
        along = self._back(told.operand, [told.along])[1][0] if told.block > 1 else -1
        places = [axis for axis in axes if axis is not None]
        if len(places) < len(axes) or places != sorted(places) or along is None:
            what = "the axes of its scales are rearranged"
            raise _OddRoundingError(what)
        limits = self._limits(told.result.name)
        scales, zeros = [told.scale], [] if told.zero is None else [told.zero]
        for decoder, narrower in self._decoders(told.result.name, limits):
            limits = narrower
            scale, zero = self._operand_of(decoder, 1), self._zero(decoder)
            if not self._same(scale, told.scale) or not self._same(zero, told.zero):
                what = f"{decoder.title} has another scale or zero point"
                raise _OddRoundingError(what)
            self._check_axis(decoder, source, tuple(places))
            scales.append(scale)
            zeros.extend([] if zero is None else [zero])
        return Rounding(tuple(scales), tuple(zeros), tuple(places), along, told.block, limits)

    def _zero(self, node: NodeView) -> Operand | None:
        return self._operand_of(node, 2) if len(node.inputs) > 2 and node.inputs[2] else None

    def _check_axis(self, decoder: NodeView, source: Operand, axes: tuple[int, ...]) -> None:
        """Check that a scale per channel is for the same channels where the weight is decoded."""
        if len(axes) != 1:
            return
        rank = len(self._shapes.dims[decoder.inputs[0]])
        axis = int(decoder.attributes.get("axis", 1)) % rank
        if self._back(self._operand_of(decoder, 0), [axis])[1] != [axes[0]]:
            what = f"{decoder.title} has scales along another axis of {source.name!r}"
            raise _OddRoundingError(what)

    def _limits(self, name: str) -> Limits:
        kind = self._shapes.types.get(name, TensorProto.UNDEFINED)
        if kind not in _FINE_TYPES:
            what = "its integers have few bits"
            raise _OddRoundingError(what)
        info = np.iinfo(helper.tensor_dtype_to_np_dtype(kind))
        return int(info.min), int(info.max)

    def _decoders(self, name: str, limits: Limits) -> Iterator[tuple[NodeView, Limits]]:
        """Yield the nodes that decode a value of integers, and the integers that are left of it on the way there."""
        readers = self._graph.readers.get(name, [])
        if name in self._graph.outputs or not readers:
            what = "its integers are a result"
            raise _OddRoundingError(what)
        for reader in readers:
            node = self._graph.nodes[reader.node]
            if node.op == "DequantizeLinear" and reader.slot == 0:
                yield node, limits
            elif node.op == "Clip" and reader.slot == 0 and not node.domain:
                yield from self._decoders(node.outputs[0], self._clipped(node, limits))
            elif node.op in _MOVING and reader.slot == 0:
                yield from self._decoders(node.outputs[0], limits)
            else:
                what = f"{node.title} reads its integers"
                raise _OddRoundingError(what)

    def _clipped(self, node: NodeView, limits: Limits) -> Limits:
        ends = list(limits)
        for slot, choose in ((1, max), (2, min)):
            if slot < len(node.inputs) and node.inputs[slot]:
                bound = self._value(self._operand_of(node, slot))
                if bound is None or bound.size != 1:
                    what = f"{node.title} clips its integers to bounds that are not known"
                    raise _OddRoundingError(what)
                ends[slot - 1] = choose(ends[slot - 1], int(bound.reshape(-1)[0]))
        return ends[0], ends[1]

    def _value(self, operand: Operand) -> np.ndarray[Any, np.dtype[Any]] | None:
        if operand.name in self._graph.constants:
            return self._graph.array(operand.name)
        return self._shapes.static[operand.name] if operand.is_constant else None

    def _same(self, left: Operand | None, right: Operand | None) -> bool:
        """Whether two scales or zero points are equal constants; none is a zero point of 0."""
        a, b = (np.zeros(1) if operand is None else self._value(operand) for operand in (left, right))
        return (
            a is not None
            and b is not None
            and (a.size == b.size or 1 in (a.size, b.size))
            and bool(np.all(a.ravel() == b.ravel()))
        )
