"""What only rearranges numbers, as long as channels stay on an axis; a Flatten makes channels of places as well."""

from collections.abc import Sequence
from math import prod

import numpy as np

from onnxfuse.analytic.moments import Gain, Made, Moments, Rule, Site, Unknown
from onnxfuse.arrays import FloatArray, IntArray

__all__ = ["RULES"]

# More channels than this after a Flatten would take gigabytes.
_MOST_CHANNELS = 4096


def _same(cross: FloatArray) -> FloatArray:
    return cross


def reshaped(site: Site) -> Sequence[Made] | Unknown:
    """Reshape, Flatten, Squeeze, Unsqueeze: the channels' axis stays, or neighbouring axes of places join it."""
    x, dims, new = site.x, site.dims_in(), site.dims_out()
    before, behind = prod(dims[: x.axis]), prod(dims[x.axis + 1 :])
    for axis, size in enumerate(new):
        if size == dims[x.axis] and prod(new[:axis]) == before:
            decay = (*_regrouped(x.decay[: x.axis], dims[: x.axis], new[:axis]), 0.0)
            decay += _regrouped(x.decay[x.axis + 1 :], dims[x.axis + 1 :], new[axis + 1 :])
            return [Made(Moments(axis, x.mean, x.covariance, decay), {site.name(0): _same})]
    for axis, size in enumerate(new):
        outer, inner = prod(new[:axis]), prod(new[axis + 1 :])
        if before % outer == 0 and behind % inner == 0 and size == prod(dims) // (outer * inner):
            return _joined(site, axis, outer, inner)
    return site.unknown("its channels do not stay on an axis")


def _regrouped(decay: Sequence[float], dims: Sequence[int], new: Sequence[int]) -> tuple[float, ...]:
    """Return the correlations of neighbours along axes that were split or joined: those of the axes' last places."""
    steps = [(prod(dims[i + 1 :]), rho) for i, rho in enumerate(decay) if dims[i] > 1]
    found = []
    for axis, size in enumerate(new):
        step = prod(new[axis + 1 :])
        # The axis whose places are next to each other in the same distance, or some of them.
        own = [rho ** (step // s) for s, rho in steps if step % s == 0 and s <= step]
        found.append(own[0] if own and size > 1 else 0.0)
    return tuple(found)


def _joined(site: Site, axis: int, outer: int, inner: int) -> Sequence[Made] | Unknown:
    """Places next to the channels become channels: each of these for every place."""
    x, dims = site.x, site.dims_in()
    first = max((i for i in range(x.axis + 1) if prod(dims[:i]) == outer), default=0)
    ends = [i for i in range(x.axis + 1, len(dims) + 1) if prod(dims[i:]) == inner]
    count = site.dims_out()[axis]
    if not ends or first == 0 or count > _MOST_CHANNELS:
        return site.unknown("more than 4096 channels, or samples, become channels")
    mean: FloatArray = np.ones(1)
    covariance: FloatArray = np.ones((1, 1))
    for i in range(first, ends[0]):
        if i == x.axis:
            ours, alike = x.mean, x.covariance
        else:
            steps = np.arange(dims[i])
            alike = np.power(float(x.decay[i]), np.abs(steps[:, None] - steps))
            ours = np.ones(dims[i])
        mean, covariance = _kron(mean, ours), _kron(covariance, alike)
    new = site.dims_out()
    decay = (*_regrouped(x.decay[:first], dims[:first], new[:axis]), 0.0)
    decay += _regrouped(x.decay[ends[0] :], dims[ends[0] :], new[axis + 1 :])
    # Which places are one with those of other values is not known here, so it counts as independent of them.
    return [Made(Moments(axis, mean, covariance, decay))]


def _kron(left: FloatArray, right: FloatArray) -> FloatArray:
    return np.asarray(np.kron(left, right), np.float64)


def transpose(site: Site) -> Sequence[Made] | Unknown:
    """Transpose: axes in another order."""
    x, rank = site.x, len(site.dims_in())
    order = [int(i) for i in site.attribute("perm") or range(rank - 1, -1, -1)]
    if order[0] != 0:
        return site.unknown("samples are no longer on the first axis")
    decay = tuple(x.decay[i] for i in order)
    return [Made(Moments(order.index(x.axis), x.mean, x.covariance, decay), {site.name(0): _same})]


def _chosen(x: Moments, axis: int, index: IntArray, name: str) -> Made:
    """Return some of the channels; places are all alike."""
    if axis != x.axis:
        return Made(x, {name: _same})
    moments = Moments(x.axis, x.mean[index], x.covariance[np.ix_(index, index)], x.decay)
    return Made(moments, {name: lambda cross: cross[index]})


def slice_(site: Site) -> Sequence[Made] | Unknown:
    """Slice with constant bounds."""
    starts, ends = site.listed("starts", 1), site.listed("ends", 2)
    if starts is None or ends is None or (site.name(3) and site.constant(3) is None):
        return site.unknown("its bounds are computed")
    rank = len(site.dims_in())
    axes = site.listed("axes", 3) or list(range(len(starts)))
    steps = site.listed("steps", 4) or [1] * len(starts)
    made = Made(site.x, {site.name(0): _same})
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = site.dims_in()[axis % rank]
        if axis % rank == site.x.axis:
            made = _chosen(site.x, site.x.axis, np.arange(size)[start:end:step], site.name(0))
    return [made]


def split(site: Site) -> Sequence[Made] | Unknown:
    """Split: parts of the channels, or of the places."""
    axis = int(site.attribute("axis", 0)) % len(site.dims_in())
    sizes = [site.dims[name][axis] for name in site.node.outputs]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    parts = [np.arange(starts[i], starts[i + 1]) for i in range(len(sizes))]
    return [_chosen(site.x, axis, part, site.name(0)) for part in parts]


def gather(site: Site) -> Sequence[Made] | Unknown:
    """Gather of some channels, in an order that is stored."""
    axis, index = int(site.attribute("axis", 0)) % len(site.dims_in()), site.constant(1)
    if index is None or index.ndim != 1 or axis != site.x.axis:
        return site.unknown("its indices are computed, or not those of channels")
    return [_chosen(site.x, axis, index.astype(np.int64) % site.dims_in()[axis], site.name(0))]


def pad(site: Site) -> Sequence[Made] | Unknown:
    """Pad: places that are added count as more of the same; channels that are added never change."""
    x, pads, rank = site.x, site.listed("pads", 1), len(site.dims_in())
    if pads is None or len(pads) != 2 * rank or min(pads[x.axis], pads[x.axis + rank]) < 0:
        return site.unknown("its margins are computed, or cut channels away")
    margins = (pads[x.axis], pads[x.axis + rank])
    value = site.constant(2) if site.name(2) else np.zeros(1)
    if not any(margins):
        return [Made(x, {site.name(0): _same})]
    if value is None or site.attribute("mode", b"constant") != b"constant":
        return site.unknown("its channels are reflected, or their value is computed")
    mean = np.pad(x.mean, margins, constant_values=float(value.reshape(-1)[0]))
    return [Made(Moments(x.axis, mean, np.pad(x.covariance, margins), x.decay), {site.name(0): _padded(margins)})]


def _padded(margins: tuple[int, int]) -> Gain:
    return lambda cross: np.pad(cross, (margins, (0, 0)))


def resize(site: Site) -> Sequence[Made] | Unknown:
    """Resize, Upsample: nearest neighbours, so places are alike over a longer way."""
    x, dims, new = site.x, site.dims_in(), site.dims_out()
    if dims[x.axis] != new[x.axis] or site.attribute("mode", b"nearest") != b"nearest":
        return site.unknown("channels are resized, or places are mixed")
    decay = tuple(
        (b - a + a * rho) / b if b > a else float(np.sign(rho) * abs(rho) ** (a / b))
        for rho, a, b in zip(x.decay, dims, new, strict=True)
    )
    return [Made(Moments(x.axis, x.mean, x.covariance, decay), {site.name(0): _same})]


RULES = (
    *(Rule(op, reshaped) for op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze")),
    Rule("Transpose", transpose),
    Rule("Slice", slice_),
    Rule("Split", split),
    Rule("Gather", gather),
    Rule("Pad", pad),
    *(Rule(op, resize) for op in ("Resize", "Upsample")),
)
