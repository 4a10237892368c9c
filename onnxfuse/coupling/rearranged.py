"""Where the axes of a weight go on its way through operators that only rearrange it."""

from collections.abc import Sequence

from onnxfuse.graph.view import NodeView

__all__ = ["moved_axis"]


def moved_axis(node: NodeView, axis: int, rank: int, ones: Sequence[int] | None) -> int | None:
    """Return what an axis becomes in the result of a rearranging node; None where axes may merge or part."""
    match node.op:
        case "Cast" | "Identity":
            return axis
        case "Transpose":
            order = [int(i) for i in node.attributes.get("perm", range(rank)[::-1])]
            return order.index(axis)
        case "Squeeze" | "Unsqueeze" if ones is not None:
            return _past_ones(ones, axis, rank, squeezed=node.op == "Squeeze")
        case _:
            return None


def _past_ones(axes: Sequence[int], axis: int, rank: int, *, squeezed: bool) -> int | None:
    """Return where an axis goes when axes of size 1 are taken out, or put in."""
    if squeezed:
        gone = {a % rank for a in axes}
        return None if axis in gone else axis - sum(a < axis for a in gone)
    total = rank + len(axes)
    new = {a % total for a in axes}
    return [a for a in range(total) if a not in new][axis]
