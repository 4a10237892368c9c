"""Where the numbers in shape computations come from: Shape -> Gather -> Concat -> Reshape, element by element.

Exporters compute target shapes at run time from a mixture of sizes that the graph reads (these follow a compressed
axis by themselves) and numbers written into the file (these must be rewritten). This module tells the two apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from onnxfuse.graph.shapes import Shapes
from onnxfuse.graph.view import DEFAULT_DOMAIN, GraphView, NodeView, Operand

__all__ = ["Origin", "ShapeTrace", "SizeOf", "Stated", "trace_shape_values"]


@dataclass(frozen=True, slots=True)
class Stated:
    """A number in the constant that node ``node`` reads at ``slot``: element ``index``."""

    node: int
    slot: int
    index: int


@dataclass(frozen=True, slots=True)
class SizeOf:
    """The size of an axis, read at run time."""

    operand: Operand
    axis: int


Origin: TypeAlias = Stated | SizeOf | None
_Origins: TypeAlias = np.ndarray[Any, Any]

# Operators that only move the elements of a shape vector about.
_MOVING = frozenset({"Concat", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze", "Cast", "Where"})
# Inputs that are sizes or positions by definition: a size that arrives here is not part of the computation itself.
_SHAPE_SLOTS = frozenset(
    {
        *(("Reshape", 1), ("Expand", 1), ("ConstantOfShape", 0), ("Resize", 3), ("Pad", 1)),
        *(("Slice", slot) for slot in (1, 2, 3, 4)),
        *(("Split", 1), ("Tile", 1), ("Upsample", 1), ("Squeeze", 1), ("Unsqueeze", 1)),
    }
)


@dataclass(frozen=True)
class ShapeTrace:
    """What `trace_shape_values` found.

    Attributes:
        origins: Origin of every element, by value name; None where an element is computed, not moved.
        used: Numbers and axis sizes that take part in a computation, with the title of the first node that computes
            with them. They must stay as they are: an attention scale computed from the width would change with it.
        readers: For every number in the file and every size read at run time, where it arrives as a size: (node, slot,
            element) of the reading node.
    """

    origins: Mapping[str, _Origins]
    used: Mapping[Stated | SizeOf, str]
    readers: Mapping[Stated | SizeOf, Sequence[tuple[int, int, int]]]


def trace_shape_values(graph: GraphView, shapes: Shapes) -> ShapeTrace:
    """Trace every small integer tensor back to the numbers that it is made of."""
    origins: dict[str, _Origins] = {}
    used: dict[Stated | SizeOf, str] = {}
    readers: dict[Stated | SizeOf, list[tuple[int, int, int]]] = {}
    for node in graph.nodes:
        if all(name in shapes.fixed for name in node.outputs if name):
            # Readers see a constant; where it comes from does not matter.
            continue
        if node.domain == DEFAULT_DOMAIN and node.op in {"Shape", "Size"}:
            _start(node, shapes, origins, used)
        elif node.domain == DEFAULT_DOMAIN and node.op in _MOVING and _moves(node, graph, shapes, origins):
            continue
        else:
            _arrive(node, shapes, origins, used, readers)
    return ShapeTrace(origins, used, readers)


def _arrive(
    node: NodeView,
    shapes: Shapes,
    origins: Mapping[str, _Origins],
    used: dict[Stated | SizeOf, str],
    readers: dict[Stated | SizeOf, list[tuple[int, int, int]]],
) -> None:
    """Note what a node that does not just move shape values does with those that it reads."""
    for name in node.captured:
        for origin in origins[name].ravel().tolist() if name in origins else ():
            if origin is not None:
                used.setdefault(origin, node.title)
    for slot, name in enumerate(node.inputs):
        for index, origin in enumerate(origins[name].ravel().tolist() if name in origins else ()):
            if origin is None or _asks_for_open_size(node, shapes):
                continue
            if (node.op, slot) not in _SHAPE_SLOTS:
                used.setdefault(origin, node.title)
            else:
                readers.setdefault(origin, []).append((node.index, slot, index))


def _asks_for_open_size(node: NodeView, shapes: Shapes) -> bool:
    """Whether a node compares sizes with -1, as the expansion of ``expand(-1)`` does: no size is negative."""
    others = [shapes.static.get(name) for name in node.inputs]
    return node.op == "Equal" and any(v is not None and v.size > 0 and bool((v < 0).all()) for v in others)


def _start(node: NodeView, shapes: Shapes, origins: dict[str, _Origins], used: dict[Stated | SizeOf, str]) -> None:
    name = node.inputs[0]
    if name not in shapes.dims or name in shapes.fixed:
        return
    sizes = [SizeOf(Operand(name), axis) for axis in range(len(shapes.dims[name]))]
    if node.op == "Size":
        used.update({size: node.title for size in sizes if size not in used})
        return
    start = int(node.attributes.get("start", 0))
    end = int(node.attributes.get("end", len(sizes)))
    origins[node.outputs[0]] = _vector(sizes[start:end])


def _moves(node: NodeView, graph: GraphView, shapes: Shapes, origins: dict[str, _Origins]) -> bool:
    """Carry origins through a node that rearranges; return whether it was one that does."""
    moved = {"Concat": range(len(node.inputs)), "Where": range(1, 3)}.get(node.op, range(1))
    names = [node.inputs[i] for i in moved]
    if not all(name in shapes.static for name in (*node.inputs, node.outputs[0]) if name):
        return False
    if shapes.static[node.outputs[0]].dtype.kind not in "iu":
        return False
    # Number all elements, push the numbers through the node with NumPy, and read off where each one went.
    parts = []
    table: list[Origin] = []
    for slot, name in zip(moved, names, strict=True):
        elements = origins.get(name)
        if elements is None:
            elements = _stated(
                node, slot, shapes.static[name], constant=name in graph.constants or name in shapes.fixed
            )
        parts.append(np.arange(elements.size).reshape(elements.shape) + len(table))
        table.extend(elements.ravel().tolist())
    numbers = _rearrange(node, parts, shapes)
    out = node.outputs[0]
    if numbers is None or numbers.shape != shapes.static[out].shape:
        return False
    origins[out] = _vector([table[i] for i in numbers.flat]).reshape(numbers.shape)
    return True


def _rearrange(
    node: NodeView, parts: list[np.ndarray[Any, np.dtype[np.int64]]], shapes: Shapes
) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    x = parts[0]
    target = shapes.static[node.outputs[0]].shape
    match node.op:
        case "Concat":
            return np.concatenate(parts, axis=int(node.attributes["axis"]))
        case "Gather":
            return np.take(x, shapes.static[node.inputs[1]].astype(np.int64), axis=int(node.attributes.get("axis", 0)))
        case "Slice":
            return _slice(node, x, shapes)
        case "Where":
            return np.where(shapes.static[node.inputs[0]], parts[0], parts[1])
        case _:
            return x.reshape(target) if x.size == int(np.prod(target)) else None


def _slice(
    node: NodeView, x: np.ndarray[Any, np.dtype[np.int64]], shapes: Shapes
) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    def integers(name: str, slot: int) -> list[int] | None:
        if name in node.attributes:
            return [int(i) for i in node.attributes[name]]
        if slot < len(node.inputs) and node.inputs[slot]:
            return [int(i) for i in np.atleast_1d(shapes.static[node.inputs[slot]])]
        return None

    starts, ends = integers("starts", 1), integers("ends", 2)
    if x.ndim != 1 or starts is None or ends is None:
        return None
    step = (integers("steps", 4) or [1])[0]
    return x[starts[0] : ends[0] : step]


def _stated(node: NodeView, slot: int, value: np.ndarray[Any, np.dtype[Any]], *, constant: bool) -> _Origins:
    found: list[Origin] = [Stated(node.index, slot, i) if constant else None for i in range(value.size)]
    return _vector(found).reshape(value.shape)


def _vector(items: "list[Origin] | list[SizeOf]") -> _Origins:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array
