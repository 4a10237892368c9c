"""Normalisations in inference form, and softmax."""

import math
from collections.abc import Sequence

from onnxfuse.gradient.expressions import Expr, Gradients, Rule, Site, call, integers

__all__ = ["RULES"]


def _along(site: Site, value: Expr, axis: int) -> Expr:
    """Give a vector the rank of the input, along one axis."""
    dims = [1] * len(site.dims_in())
    dims[axis] = site.dims_in()[axis]
    return call("Reshape", value, integers(dims))


def _mean(value: Expr, axes: Sequence[int]) -> Expr:
    return call("ReduceMean", value, integers(axes), keepdims=1)


def _unit(x: Expr, axes: Sequence[int], epsilon: float, *, centred: bool = True) -> tuple[Expr, Expr]:
    """Return a tensor divided by the root of its mean square over some axes, about the mean or not; and that root."""
    middle = x - _mean(x, axes) if centred else x
    deviation = call("Sqrt", _mean(middle * middle, axes) + epsilon)
    return middle / deviation, deviation


def _normalised(x: Expr, g: Expr, axes: Sequence[int], epsilon: float, *, centred: bool = True) -> Expr:
    """Return the gradient through `_unit`."""
    unit, deviation = _unit(x, axes, epsilon, centred=centred)
    rest = g - unit * _mean(g * unit, axes)
    return (rest - _mean(g, axes) if centred else rest) / deviation


def batch_norm(site: Site) -> Gradients:
    """BatchNormalization in inference form: a scale for every channel."""
    if site.attribute("training_mode", 0) or not site.attribute("spatial", 1) or len(site.node.outputs) > 1:
        site.refuse("it is not in inference form")
    deviation = call("Sqrt", site.input(4) + float(site.attribute("epsilon", 1e-5)))
    factor = site.input(1) / deviation
    unit = (site.x - _along(site, site.input(3), 1)) / _along(site, deviation, 1)
    return {
        0: site.g * _along(site, factor, 1),
        1: _per_channel(site, site.g * unit),
        2: _per_channel(site, site.g),
        3: -(_per_channel(site, site.g) * factor),
    }


def _per_channel(site: Site, value: Expr) -> Expr:
    """Sum over everything but axis 1."""
    axes = [i for i in range(len(site.dims_in())) if i != 1]
    return call("ReduceSum", value, integers(axes), keepdims=0)


def layer_norm(site: Site) -> Gradients:
    """LayerNormalization: over the last axes."""
    if any(site.gradients[1:]):
        site.refuse("more than its first output is read")
    return _over_last(site, centred=True)


def rms_norm(site: Site) -> Gradients:
    """RMSNormalization: over the last axes, without a mean."""
    return _over_last(site, centred=False)


def _over_last(site: Site, *, centred: bool) -> Gradients:
    rank = len(site.dims_in())
    axes = list(range(int(site.attribute("axis", -1)) % rank, rank))
    epsilon = float(site.attribute("epsilon", 1e-5))
    found: dict[int, Expr | None] = {
        0: _normalised(site.x, site.g * site.input(1), axes, epsilon, centred=centred),
        1: site.fitted(site.g * _unit(site.x, axes, epsilon, centred=centred)[0], 1),
    }
    if site.has(2):
        found[2] = site.fitted(site.g, 2)
    return found


def instance_norm(site: Site) -> Gradients:
    """InstanceNormalization: every channel over its places."""
    axes = list(range(2, len(site.dims_in())))
    scale, epsilon = _along(site, site.input(1), 1), float(site.attribute("epsilon", 1e-5))
    return {
        0: _normalised(site.x, site.g * scale, axes, epsilon),
        1: _per_channel(site, site.g * _unit(site.x, axes, epsilon)[0]),
        2: _per_channel(site, site.g),
    }


def group_norm(site: Site) -> Gradients:
    """GroupNormalization: channels in groups, with a scale for every channel, or before version 21 for every group."""
    dims, groups = site.dims_in(), int(site.attribute("num_groups"))
    apart = [dims[0], groups, math.prod(dims[1:]) // groups]
    scaled = site.g * _along(site, site.input(1), 1) if site.dims_in(1) == (dims[1],) else site.g
    x, g = (call("Reshape", value, integers(apart)) for value in (site.x, scaled))
    if site.dims_in(1) != (dims[1],):
        g = g * call("Reshape", site.input(1), integers([1, groups, 1]))
    made = _normalised(x, g, [2], float(site.attribute("epsilon", 1e-5)))
    return {0: call("Reshape", made, integers(dims))}


def _sum(value: Expr, axes: Sequence[int]) -> Expr:
    return call("ReduceSum", value, integers(axes), keepdims=1)


def softmax(site: Site) -> Gradients:
    """Softmax along one axis, or before version 13 along all from one axis on."""
    axes = _softmax_axes(site)
    return {0: site.y * (site.g - _sum(site.g * site.y, axes))}


def log_softmax(site: Site) -> Gradients:
    """LogSoftmax along one axis, or before version 13 along all from one axis on."""
    axes = _softmax_axes(site)
    return {0: site.g - call("Exp", site.y) * _sum(site.g, axes)}


def _softmax_axes(site: Site) -> list[int]:
    rank = len(site.dims_in())
    if site.node.version >= 13:
        return [int(site.attribute("axis", -1)) % rank]
    return list(range(int(site.attribute("axis", 1)) % max(rank, 1), rank))


RULES = (
    Rule("BatchNormalization", batch_norm),
    Rule("LayerNormalization", layer_norm),
    Rule("RMSNormalization", rms_norm),
    # One of ONNX Runtime's own that it keeps under ONNX's domain.
    Rule("SimplifiedLayerNormalization", rms_norm),
    Rule("InstanceNormalization", instance_norm),
    Rule("GroupNormalization", group_norm),
    Rule("Softmax", softmax),
    Rule("LogSoftmax", log_softmax),
)
