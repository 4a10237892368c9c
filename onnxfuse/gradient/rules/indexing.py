"""Operators that only move elements: the gradient goes back to where each came from.

Slice, Pad, Gather and Resize take elements along one axis after the other, mostly by indices that are known. What
was taken once comes back by taking from the gradient at the inverse indices, with a zero for what was not taken; what
was taken several times is a sum of such.
"""

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from onnxfuse.gradient.expressions import AnyArray, Expr, Gradients, Literal, Rule, Site, call, integers

__all__ = ["RULES"]

# Numpy's name for each way of padding.
_PADDING = {"constant": "constant", "edge": "edge", "reflect": "reflect", "wrap": "wrap"}


def reshaped(site: Site) -> Gradients:
    """Reshape, Flatten, Squeeze, Unsqueeze: the same elements in the same order."""
    return {0: call("Reshape", site.g, integers(site.dims_in()), allowzero=1)}


def transposed(site: Site) -> Gradients:
    """Transpose: by the inverse permutation."""
    rank = len(site.dims_in())
    perm = [int(p) for p in site.attribute("perm") or range(rank - 1, -1, -1)]
    return {0: call("Transpose", site.g, perm=[perm.index(i) for i in range(rank)])}


def expanded(site: Site) -> Gradients:
    """Expand: summed over the copies."""
    return {0: site.fitted(site.g, 0)}


def concat(site: Site) -> Gradients:
    """Concat: each operand gets its part."""
    axis = int(site.attribute("axis", 1)) % len(site.dims_out())
    found: dict[int, Expr | None] = {}
    start = 0
    for slot in range(len(site.node.inputs)):
        end = start + site.dims_in(slot)[axis]
        found[slot] = call("Slice", site.g, integers([start]), integers([end]), integers([axis]))
        start = end
    return found


def split(site: Site) -> Gradients:
    """Split: the parts' gradients side by side, zeros for parts that the loss does not depend on."""
    axis = int(site.attribute("axis", 0)) % len(site.dims_in())
    parts = [
        Literal(np.zeros(site.dims_out(slot))) if gradient is None else gradient
        for slot, gradient in enumerate(site.gradients)
    ]
    return {0: call("Concat", *parts, axis=axis)}


def sliced(site: Site) -> Gradients:
    """Slice, with known bounds of any sign and step."""
    dims = site.dims_in()
    starts, ends = site.listed("starts", 1, 10) or [], site.listed("ends", 2, 10) or []
    axes = site.listed("axes", 3, 10) or list(range(len(starts)))
    steps = site.listed("steps", 4, 10) or [1] * len(starts)
    taken = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = dims[axis % len(dims)]
        # Before the first element there is nothing that a slice in Python could name by a negative number.
        until = None if step < 0 and end < -size else end
        taken[axis % len(dims)] = np.arange(size)[start:until:step]
    return {0: _put_back(site.g, site.dims_out(), dims, taken)}


def padded(site: Site) -> Gradients:
    """Pad in any mode, by known widths, negative ones too."""
    dims = site.dims_in()
    pads = site.listed("pads", 1, 11) or []
    axes = [axis % len(dims) for axis in (site.listed("axes", 3, 18) or range(len(dims)))]
    mode = site.attribute("mode", b"constant").decode()
    if mode not in _PADDING:
        site.refuse(f"padding by {mode!r} is not known")
    taken = {}
    for i, axis in enumerate(axes):
        before, after = pads[i], pads[i + len(axes)]
        indices = np.arange(max(-before, 0), dims[axis] - max(-after, 0))
        widths = (max(before, 0), max(after, 0))
        if mode == "constant":
            taken[axis] = np.pad(indices, widths, constant_values=-1)
        elif mode == "edge":
            taken[axis] = np.pad(indices, widths, mode="edge")
        else:
            taken[axis] = np.pad(indices, widths, mode="reflect" if mode == "reflect" else "wrap")
    return {0: _put_back(site.g, site.dims_out(), dims, taken)}


def gathered(site: Site) -> Gradients:
    """Gather: of known indices by taking from where they went, of others, as of tokens, by adding where they point."""
    dims = site.dims_in()
    axis = int(site.attribute("axis", 0)) % len(dims)
    if not site.is_known(1):
        return {0: _added(site, axis)}
    indices = site.known(1).reshape(-1) % dims[axis]
    flat = (*dims[:axis], len(indices), *dims[axis + 1 :])
    g = call("Reshape", site.g, integers(flat), allowzero=1)
    return {0: _put_back(g, flat, dims, {axis: indices})}


def _added(site: Site, axis: int) -> Expr:
    """Add what was gathered along an axis where the indices point, which are known at run time alone."""
    dims, count = site.dims_in(), int(np.prod(site.dims_in(1)))
    flat = (*dims[:axis], count, *dims[axis + 1 :])
    indices = call("Cast", site.input(1), to=TensorProto.INT64)
    # Negative ones count from the end.
    indices = call("Mod", call("Add", indices, integers([dims[axis]])), integers([dims[axis]]))
    along = [count if i == axis else 1 for i in range(len(dims))]
    places = call("Expand", call("Reshape", indices, integers(along), allowzero=1), integers(flat))
    nothing = call("Expand", Literal(np.array(0.0)), integers(dims))
    g = call("Reshape", site.g, integers(flat), allowzero=1)
    return call("ScatterElements", nothing, places, g, axis=axis, reduction="add")


def resized(site: Site) -> Gradients:
    """Resize and Upsample to the nearest element, or linear between the two nearest along each axis."""
    small, large = site.dims_in(), site.dims_out()
    mode = site.attribute("mode", b"nearest").decode()
    if mode not in {"nearest", "linear", "bilinear"} or site.attribute("antialias", 0):
        site.refuse("it interpolates; only the modes nearest and linear are known")
    old = site.node.op == "Upsample" or site.node.version < 11
    how = "asymmetric" if old else site.attribute("coordinate_transformation_mode", b"half_pixel").decode()
    nearest = "floor" if old else site.attribute("nearest_mode", b"round_prefer_floor").decode()
    if how not in {"half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"}:
        site.refuse(f"coordinates by {how!r} are not known")
    scales = _scales(site)
    where = {
        axis: _places(size, wanted, scales.get(axis, wanted / size), how)
        for axis, (size, wanted) in enumerate(zip(small, large, strict=True))
    }
    if mode != "nearest":
        return {0: _shared_back(site.g, small, where)}
    return {0: _put_back(site.g, large, small, {axis: _nearest(p, small[axis], nearest) for axis, p in where.items()})}


def _scales(site: Site) -> dict[int, float]:
    """Return the scales that a Resize states, by axis; where it states sizes there are none."""
    if site.node.op == "Upsample" and site.node.version < 9:
        found = np.array(site.attribute("scales"))
    else:
        found = site.known(1 if site.node.op == "Upsample" or site.node.version < 11 else 2)
    axes = site.attribute("axes") or range(len(found))
    return {int(axis) % len(site.dims_in()): float(scale) for axis, scale in zip(axes, found, strict=False)}


def _places(size: int, wanted: int, scale: float, how: str) -> AnyArray:
    """Return where each place of a resized axis lies among the old ones (operator Resize of ONNX)."""
    places: AnyArray = np.arange(wanted, dtype=np.float64)
    if how == "asymmetric":
        return places / scale
    if how == "align_corners":
        return places * (size - 1) / max(wanted - 1, 1)
    if how == "pytorch_half_pixel" and wanted == 1:
        return np.zeros(1)
    return (places + 0.5) / scale - 0.5


def _nearest(where: AnyArray, size: int, nearest: str) -> AnyArray:
    """Return which element each place of a resized axis takes."""
    chosen = {
        "floor": np.floor(where),
        "ceil": np.ceil(where),
        "round_prefer_floor": np.ceil(where - 0.5),
        "round_prefer_ceil": np.floor(where + 0.5),
    }[nearest]
    found: AnyArray = np.clip(chosen, 0, size - 1).astype(np.int64)
    return found


def _shared_back(g: Expr, sizes: Sequence[int], where: dict[int, AnyArray]) -> Expr:
    """Undo linear interpolation: along every axis, each place gives back to the two that it lies between.

    Args:
        g: The gradient of what was interpolated.
        sizes: The shape of what it was interpolated from.
        where: By axis, where each place lies; beyond the ends the end is taken.
    """
    for axis, places in where.items():
        size = sizes[axis]
        inside = np.clip(places, 0, size - 1)
        shares = np.maximum(1.0 - np.abs(inside[:, None] - np.arange(size)), 0.0)
        if shares.shape[0] == size and np.array_equal(shares, np.eye(size)):
            continue
        swapped = list(range(len(sizes)))
        swapped[axis], swapped[-1] = swapped[-1], swapped[axis]
        last = call("MatMul", call("Transpose", g, perm=swapped), Literal(shares))
        g = call("Transpose", last, perm=swapped)
    return g


def _put_back(g: Expr, dims: Sequence[int], wanted: Sequence[int], taken: dict[int, AnyArray]) -> Expr:
    """Undo taking elements along axes.

    Args:
        g: The gradient of what was taken.
        dims: Its shape.
        wanted: The shape of what it was taken from.
        taken: By axis, the index that each element was taken from; -1 for one that was not taken from anywhere.
    """
    for axis in sorted(taken):
        indices, size = taken[axis], wanted[axis]
        if np.array_equal(indices, np.arange(size)):
            continue
        zeros = Literal(np.zeros((*(dims[:axis]), 1, *dims[axis + 1 :])))
        full = call("Concat", g, zeros, axis=axis)
        total: Expr | None = None
        for inverse in _inverses(indices, size):
            part = call("Gather", full, Literal(inverse), axis=axis)
            total = part if total is None else total + part
        dims = (*dims[:axis], size, *dims[axis + 1 :])
        g = Literal(np.zeros(dims)) if total is None else total
    return g


def _inverses(indices: AnyArray, size: int) -> list[AnyArray]:
    """Return where each index occurs first, second and so on; the length of the indices where it does no more.

    Example:
        >>> [inverse.tolist() for inverse in _inverses(np.array([2, 0, 2]), 4)]
        [[1, 3, 0, 3], [3, 3, 2, 3]]
    """
    found: list[AnyArray] = []
    seen = np.zeros(size, np.int64)
    for place, index in enumerate(indices.tolist()):
        if index < 0:
            continue
        if seen[index] == len(found):
            found.append(np.full(size, len(indices), np.int64))
        found[seen[index]][index] = place
        seen[index] += 1
    return found


def depth_to_space(site: Site) -> Gradients:
    """DepthToSpace: back by the inverse rearrangement."""
    n, c, h, w = site.dims_in()
    b = int(site.attribute("blocksize"))
    column_row = site.attribute("mode", b"DCR") == b"CRD"
    apart = call("Reshape", site.g, integers([n, c // (b * b), h, b, w, b]))
    perm = [0, 1, 3, 5, 2, 4] if column_row else [0, 3, 5, 1, 2, 4]
    return {0: call("Reshape", call("Transpose", apart, perm=perm), integers([n, c, h, w]))}


def space_to_depth(site: Site) -> Gradients:
    """SpaceToDepth: back by DepthToSpace."""
    return {0: call("DepthToSpace", site.g, blocksize=int(site.attribute("blocksize")))}


RULES = (
    *(Rule(op, reshaped) for op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze")),
    Rule("Transpose", transposed),
    Rule("Expand", expanded),
    Rule("Concat", concat),
    Rule("Split", split),
    Rule("Slice", sliced),
    Rule("Pad", padded),
    Rule("Gather", gathered),
    Rule("Resize", resized),
    Rule("Upsample", resized),
    Rule("DepthToSpace", depth_to_space),
    Rule("SpaceToDepth", space_to_depth),
)
