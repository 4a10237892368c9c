"""Projections that one layer makes together, such as queries, keys and values: cut apart where it makes them.

Exporters write *reshape to (3, heads, size), move the 3 to the front, pick one of them*. Then the channels of queries,
keys and values lie on one axis of one tensor, and must stay as many, and the same ones, in all three. Cutting first and
reshaping each part is the same computation,

.. code-block:: text

    x -> Reshape -> Transpose -> Gather 0 -> q        x -> Split -> Reshape -> Transpose -> q
                              -> Gather 1 -> k   =             -> Reshape -> Transpose -> k
                              -> Gather 2 -> v                 -> Reshape -> Transpose -> v

with as many numbers moved, and each part has channels of its own: queries and keys may be mixed with each other, values
with what reads them, and all may have another width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxfuse.graph.bodies import value_names
from onnxfuse.graph.shapes import Shapes, shapes_at_other_sizes
from onnxfuse.graph.targets import fresh_name, own_targets
from onnxfuse.graph.unread import drop_unread
from onnxfuse.graph.view import DEFAULT_DOMAIN, GraphView, NodeView

__all__ = ["unstacked"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# From this operator set on, these attributes of Split, Squeeze and Unsqueeze are inputs.
_SIZES_ARE_INPUTS = 13
_INPUTS = frozenset({"split", "axes"})
# Before this IR version every initializer has to be listed among the graph's inputs.
_CONSTANTS_ARE_NO_INPUTS = 4
# An axis of more parts is no stack of projections, but channels or places.
_MOST_PARTS = 8


@dataclass(frozen=True, eq=False)
class _Move:
    """A node that moves a stack, and what it is for one part of it, which has an axis less.

    Attributes:
        node: The node.
        attribute: The attribute that is about axes; empty if there is none.
        axes: Its value for a part.
    """

    node: NodeView
    attribute: str = ""
    axes: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class _Pick:
    """One part of a stack on its way to those who read it.

    Attributes:
        part: Which part.
        moves: What moves it, from behind the Reshape on.
        node: What picks it.
        value: The result.
        axis: Where the axis of parts is in what that node reads, if it stays, with one entry; else None.
    """

    part: int
    moves: tuple[_Move, ...]
    node: NodeView
    value: str
    axis: int | None


@dataclass(frozen=True, eq=False)
class _Target:
    """Where the target of a Reshape states the number of parts.

    Attributes:
        pieces: The values that a Concat puts the target together from, or the target alone.
        piece: Which of them states it.
        rest: The numbers in that one without it.
        maker: The Concat, if there is one.
    """

    pieces: tuple[str, ...]
    piece: int
    rest: AnyArray
    maker: NodeView | None


@dataclass(frozen=True, eq=False)
class _Stack:
    """A Reshape that makes an axis of parts, each of which is picked.

    Attributes:
        node: The Reshape.
        axis: The axis of its input that has the parts one behind the other; that of parts has the same place.
        size: How long it is.
        parts: How many parts there are.
        target: What the Reshape makes of it.
        picks: What becomes of the parts.
    """

    node: NodeView
    axis: int
    size: int
    parts: int
    target: _Target
    picks: tuple[_Pick, ...]


def unstacked(graph: GraphView, shapes: Shapes, input_dims: Mapping[str, Sequence[int]]) -> onnx.ModelProto | None:
    """Return a copy of a model in which what is made together is cut apart as early as can be, into parts of any width.

    Stacked projections are cut before they are reshaped. A Split that cuts evenly without stating sizes gets these
    stated, so that the parts need not stay as wide as each other.

    Args:
        graph: The model's graph; not changed.
        shapes: Its shapes.
        input_dims: The input shapes that they hold for.

    Returns:
        A model that computes the same, bit for bit; None where there is nothing to cut.
    """
    stacks = [stack for node in graph.nodes if (stack := _stack(graph, shapes, node)) is not None]
    even = [node for node in graph.nodes if node.op == "Split" and node.domain == DEFAULT_DOMAIN and _is_unstated(node)]
    if stacks or even:
        known = [shapes.dims, *shapes_at_other_sizes(graph, input_dims)]
        stacks = [stack for stack in stacks if _is_settled(stack.node.inputs[0], stack.axis, known)]
        even = [node for node in even if _is_even(node, shapes) and _is_settled(node.inputs[0], _axis(node), known)]
    return _Rewriting(graph).with_cut(stacks, even, shapes) if stacks or even else None


def _is_unstated(node: NodeView) -> bool:
    """Whether a Split makes parts of sizes that it does not state."""
    return "split" not in node.attributes and len(node.inputs) == 1 and len(node.outputs) > 1 and all(node.outputs)


def _axis(node: NodeView) -> int:
    return int(node.attributes.get("axis", 0))


def _is_even(node: NodeView, shapes: Shapes) -> bool:
    """Whether all that a Split makes is of one size."""
    return len({shapes.dims[name][_axis(node)] if name in shapes.dims else None for name in node.outputs}) == 1


def _is_settled(name: str, axis: int, known: Sequence[Mapping[str, tuple[int, ...]]]) -> bool:
    """Whether an axis of a value has the same size for every input of the network."""
    sizes = {dims[name][axis] if name in dims else None for dims in known}
    return len(sizes) == 1 and None not in sizes


def _stack(graph: GraphView, shapes: Shapes, node: NodeView) -> _Stack | None:
    """Return the stack that a Reshape makes; None where it makes none."""
    if node.op != "Reshape" or node.domain != DEFAULT_DOMAIN:
        return None
    before, after = shapes.dims.get(node.inputs[0], ()), shapes.dims.get(node.outputs[0], ())
    different = (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
    axis = next(different, None)
    if axis is None or node.inputs[0] in graph.constants or len(after) <= len(before):
        return None
    size, parts = before[axis], after[axis]
    target = _target(graph, shapes, node, axis, parts)
    if not 2 <= parts <= _MOST_PARTS or target is None or not _is_split_whole(shapes, node, axis):
        return None
    picks = list(_picks(graph, shapes, node.outputs[0], axis, parts, ()))
    if not picks or any(pick is None for pick in picks):
        return None
    return _Stack(node, axis, size, parts, target, tuple(pick for pick in picks if pick is not None))


def _is_split_whole(shapes: Shapes, node: NodeView, axis: int) -> bool:
    """Whether a Reshape makes some axes of a single one."""
    size, after = shapes.dims[node.inputs[0]][axis], shapes.dims[node.outputs[0]]
    return any(prod(after[axis:end]) == size for end in range(axis + 2, len(after) + 1))


def _target(graph: GraphView, shapes: Shapes, node: NodeView, axis: int, parts: int) -> _Target | None:
    """Return where a target states the number of parts.

    None where it is computed, or where taking the entry away would change what others mean: a 0 copies the size of the
    axis at its own place.
    """
    name = node.inputs[1]
    maker = None if name in graph.constants or name not in graph.producers else graph.nodes[graph.producers[name]]
    if maker is not None and (maker.op != "Concat" or maker.domain != DEFAULT_DOMAIN):
        return None
    pieces = (name,) if maker is None else maker.inputs
    values = [graph.array(p).ravel() if p in graph.constants else None for p in pieces]
    sizes = [prod(shapes.dims.get(p, (1,))) for p in pieces]
    starts = np.cumsum([0, *sizes])
    zeros = [
        s + i for s, value in zip(starts, values, strict=False) if value is not None for i in np.flatnonzero(value == 0)
    ]
    piece = int(np.searchsorted(starts, axis, side="right")) - 1
    told = values[piece] if piece < len(values) else None
    if told is None or told[axis - starts[piece]] != parts or any(zero > axis for zero in zeros):
        return None
    return _Target(pieces, piece, np.delete(told, axis - starts[piece]), maker)


def _picks(
    graph: GraphView, shapes: Shapes, name: str, axis: int, parts: int, moves: tuple[_Move, ...]
) -> Iterator[_Pick | None]:
    """Yield what picks parts of a value; None for every reader that does anything else with them."""
    if name in graph.outputs or name not in shapes.dims:
        yield None
        return
    rank = len(shapes.dims[name])
    for reader in graph.readers.get(name, []):
        node = graph.nodes[reader.node]
        moved = _moved(graph, node, axis, rank) if reader.slot == 0 and node.domain == DEFAULT_DOMAIN else None
        if moved is None:
            yield from _picked(graph, node, axis, rank, parts, moves) if reader.slot == 0 else [None]
        else:
            move, place = moved
            yield from _picks(graph, shapes, node.outputs[0], place, parts, (*moves, move))


def _moved(graph: GraphView, node: NodeView, axis: int, rank: int) -> tuple[_Move, int] | None:
    """Return what a node is for a part, and where it puts the axis of parts; None if it does not merely move axes."""
    if node.op == "Identity":
        return _Move(node), axis
    if node.op == "Transpose":
        order = list(node.attributes.get("perm", range(rank)[::-1]))
        return _Move(node, "perm", tuple(a - (a > axis) for a in order if a != axis)), order.index(axis)
    axes = _axes(graph, node, rank) if node.op in {"Squeeze", "Unsqueeze"} else None
    if axes is None:
        return None
    if node.op == "Squeeze":
        place, counted = axis - sum(a < axis for a in axes), axis
    else:
        place = counted = [p for p in range(rank + len(axes)) if p not in axes][axis]
    return _Move(node, "axes", tuple(a - (a > counted) for a in axes)), place


def _axes(graph: GraphView, node: NodeView, rank: int) -> list[int] | None:
    """Return the axes that a Squeeze takes away or an Unsqueeze makes, counted from the front; None if unknown."""
    axes = node.attributes.get("axes")
    if axes is None and len(node.inputs) > 1 and node.inputs[1] in graph.constants:
        axes = graph.array(node.inputs[1]).ravel().tolist()
    if axes is None:
        return None
    count = rank if node.op == "Squeeze" else rank + len(axes)
    return sorted(a % count for a in axes)


def _picked(
    graph: GraphView, node: NodeView, axis: int, rank: int, parts: int, moves: tuple[_Move, ...]
) -> Iterator[_Pick | None]:
    """Yield the part, or the parts, that a node picks; None if it picks none."""
    if node.op == "Split" and _is_along(node, axis, rank) and len(node.outputs) == parts:
        # As many as there are, so one each.
        yield from (_Pick(i, moves, node, value, axis) for i, value in enumerate(node.outputs) if value)
    elif node.op == "Gather" and _is_along(node, axis, rank) and node.inputs[1] in graph.constants:
        index = graph.array(node.inputs[1])
        is_one = index.size == 1 and index.ndim <= 1
        place = axis if index.ndim else None
        yield _Pick(int(index.ravel()[0]) % parts, moves, node, node.outputs[0], place) if is_one else None
    else:
        part = _sliced(graph, node, axis, rank, parts) if node.op == "Slice" else None
        yield None if part is None else _Pick(part, moves, node, node.outputs[0], axis)


def _is_along(node: NodeView, axis: int, rank: int) -> bool:
    return node.domain == DEFAULT_DOMAIN and node.attributes.get("axis", 0) % rank == axis


def _sliced(graph: GraphView, node: NodeView, axis: int, rank: int, parts: int) -> int | None:
    """Return the part that a Slice cuts out; None if it cuts out something else."""
    names = ("starts", "ends", "axes", "steps")
    given = dict(zip(names, node.inputs[1:], strict=False))
    if node.domain != DEFAULT_DOMAIN or any(name not in graph.constants for name in given.values() if name):
        return None
    told = {key: graph.array(name).ravel().tolist() for key, name in given.items() if name}
    # Before operator set 10 these were attributes.
    told |= {key: list(node.attributes[key]) for key in names if key in node.attributes}
    axes = [a % rank for a in told.get("axes", range(len(told["starts"])))]
    if axes != [axis] or told.get("steps", [1]) != [1]:
        return None
    cut = range(parts)[slice(told["starts"][0], told["ends"][0])]
    return cut[0] if len(cut) == 1 else None


class _Rewriting:
    """A copy of a model that is being changed."""

    def __init__(self, graph: GraphView) -> None:
        self.graph = graph
        self.model = onnx.ModelProto()
        self.model.CopyFrom(graph.model)
        self.taken = {*value_names(graph.model.graph), *(node.name for node in graph.nodes)}
        self.version = graph.opsets[DEFAULT_DOMAIN]

    def with_cut(self, stacks: Sequence[_Stack], even: Sequence[NodeView], shapes: Shapes) -> onnx.ModelProto:
        """Return the copy with all stacks cut apart and sizes stated; what is new comes where the Reshape was."""
        fresh = {stack.node.position: list(self._cut(stack)) for stack in stacks}
        gone = set(fresh)
        for pick in (pick for stack in stacks for pick in stack.picks):
            gone |= {pick.node.position, *(move.node.position for move in pick.moves)}
        for node in (node for node in even if node.position not in gone):
            fresh[node.position] = [self._stated(node, shapes)]
            gone.add(node.position)
        nodes: list[onnx.NodeProto] = []
        for position, proto in enumerate(self.graph.model.graph.node):
            nodes += fresh.get(position, [])
            nodes += [] if position in gone else [proto]
        nodes = list(own_targets(nodes, self._name))
        graph = self.model.graph
        released = {name for position in gone for name in self.graph.model.graph.node[position].input}
        del graph.node[:]
        graph.node.extend(nodes)
        drop_unread(graph, released, {name for node in self.graph.nodes for name in node.captured})
        made = {name for node in graph.node for name in node.output}
        values = graph.value_info
        for i in reversed([i for i, v in enumerate(values) if v.name in self.graph.producers and v.name not in made]):
            del values[i]
        return self.model

    def _stated(self, node: NodeView, shapes: Shapes) -> onnx.NodeProto:
        """Return an even Split with its sizes stated."""
        axis = _axis(node)
        like = self._node(
            node, "Split", node.inputs[0], node.outputs, "split", [shapes.dims[name][axis] for name in node.outputs]
        )
        like.name, like.doc_string, like.domain = node.proto.name, node.proto.doc_string, node.proto.domain
        like.attribute.extend(a for a in node.proto.attribute if a.name != "num_outputs")
        like.metadata_props.extend(node.proto.metadata_props)
        return like

    def _cut(self, stack: _Stack) -> Iterator[onnx.NodeProto]:
        """Yield the nodes that take the place of a stack."""
        reshape = stack.node
        parts = [self._name(f"{reshape.outputs[0]}_{part}") for part in range(stack.parts)]
        sizes = [stack.size // stack.parts] * stack.parts
        yield self._node(reshape, "Split", reshape.inputs[0], parts, "split", sizes, axis=stack.axis)
        shape = self._name(f"{reshape.inputs[1]}_of_part")
        yield from self._shape(stack.target, shape)
        for pick in stack.picks:
            value = parts[pick.part]
            names = [f"{node.outputs[0]}_{pick.part}" for node in (reshape, *(move.node for move in pick.moves))]
            results = [self._name(name) for name in names]
            if pick.axis is None:
                results[-1] = pick.value
            yield self._node(reshape, "Reshape", value, results[:1], "shape", shape, **_zeros(reshape))
            for move, read, result in zip(pick.moves, results, results[1:], strict=False):
                yield self._node(move.node, move.node.op, read, [result], move.attribute, move.axes)
            if pick.axis is not None:
                yield self._node(pick.node, "Unsqueeze", results[-1], [pick.value], "axes", [pick.axis])

    def _shape(self, target: _Target, name: str) -> Iterator[onnx.NodeProto]:
        """Make the target of a part: that of the stack without the number of parts."""
        if target.maker is None:
            self._constant(name, target.rest)
            return
        pieces = list(target.pieces)
        if target.rest.size:
            pieces[target.piece] = self._constant(self._name(f"{pieces[target.piece]}_of_part"), target.rest)
        else:
            del pieces[target.piece]
        yield helper.make_node("Concat", pieces, [name], self._name(f"{target.maker.name}_of_part"), axis=0)

    def _node(
        self,
        like: NodeView,
        op: str,
        value: str,
        results: Sequence[str],
        about: str,
        told: Sequence[int] | str,
        **more: int,
    ) -> onnx.NodeProto:
        """Return a node with what says how it acts as an attribute or as an input, as the operator set wants it."""
        name = self._name(f"{like.name}_{op.lower()}")
        inputs = [value]
        if isinstance(told, str):
            inputs.append(told)
        elif about in _INPUTS and self.version >= _SIZES_ARE_INPUTS:
            inputs.append(self._constant(self._name(f"{name}_{about}"), np.array(told, np.int64)))
        made = helper.make_node(op, inputs, results, name)
        if about and len(inputs) == 1:
            made.attribute.append(helper.make_attribute(about, list(told)))
        made.attribute.extend(helper.make_attribute(key, number) for key, number in more.items())
        return made

    def _constant(self, name: str, value: AnyArray) -> str:
        self.model.graph.initializer.append(numpy_helper.from_array(value.astype(np.int64), name))
        if self.graph.model.ir_version < _CONSTANTS_ARE_NO_INPUTS:
            self.model.graph.input.append(helper.make_tensor_value_info(name, onnx.TensorProto.INT64, value.shape))
        return name

    def _name(self, wanted: str) -> str:
        """Return a name that nothing has yet."""
        return fresh_name(wanted, self.taken)


def _zeros(node: NodeView) -> dict[str, int]:
    """Return what a Reshape says of zeros in its target."""
    return {key: value for key, value in node.attributes.items() if key == "allowzero"}
