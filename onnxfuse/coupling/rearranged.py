"""Where the axes of a weight go on its way through operators that only rearrange it."""

from collections.abc import Sequence

from onnxfuse.graph.shapes import Shapes
from onnxfuse.graph.view import NodeView

__all__ = ["REARRANGING", "moved_axis"]

REARRANGING = frozenset(
    {
        "Cast",
        "DequantizeLinear",
        "Flatten",
        "Identity",
        "QuantizeLinear",
        "Reshape",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators that pass a weight on with its elements merely moved or written in another way, so that axes stay axes."""


def moved_axis(node: NodeView, axis: int, rank: int, shapes: Shapes) -> int | None:
    """Return what an axis becomes in the result of a rearranging node; None where axes may merge or part."""
    match node.op:
        case "Cast" | "Clip" | "DequantizeLinear" | "Identity" | "QuantizeLinear":
            return axis
        case "Transpose":
            order = [int(i) for i in node.attributes.get("perm", range(rank)[::-1])]
            return order.index(axis)
        case "Squeeze" | "Unsqueeze":
            ones = _stated_axes(node, shapes)
            return None if ones is None else _past_ones(ones, axis, rank, squeezed=node.op == "Squeeze")
        case _:
            return None


def _stated_axes(node: NodeView, shapes: Shapes) -> list[int] | None:
    """Return the axes that a Squeeze or Unsqueeze states, as an attribute or an input."""
    if "axes" in node.attributes:
        return [int(axis) for axis in node.attributes["axes"]]
    if len(node.inputs) > 1 and node.inputs[1] in shapes.static:
        return [int(axis) for axis in shapes.static[node.inputs[1]].ravel()]
    return None


def _past_ones(axes: Sequence[int], axis: int, rank: int, *, squeezed: bool) -> int | None:
    """Return where an axis goes when axes of size 1 are taken out, or put in."""
    if squeezed:
        gone = {a % rank for a in axes}
        return None if axis in gone else axis - sum(a < axis for a in gone)
    total = rank + len(axes)
    new = {a % total for a in axes}
    return [a for a in range(total) if a not in new][axis]
