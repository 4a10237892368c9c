"""Normalisation with statistics per channel: scale and shift follow the channels they belong to.

Layer normalisation computes its statistics over the channels themselves: with fewer channels they are an estimate of
what they were, which is noted with the group.
"""

from collections.abc import Iterator, Sequence

from onnxfuse.coupling.constraints import (
    AxisRef,
    Constraint,
    Equal,
    Freeze,
    Fresh,
    Normalises,
    Rule,
    Site,
    Statistic,
    Tensor,
    Weight,
    prod,
)
from onnxfuse.coupling.rules.shape import made_here
from onnxfuse.statistics.features import Role

__all__ = ["RULES"]


def batch_normalization(site: Site) -> Iterator[Constraint]:
    """BatchNormalization in inference form; its training form and per-element form (``spatial`` = 0) are frozen."""
    x, y = site.input(0), site.output()
    for axis_x, axis_y in zip(x.axes, y.axes, strict=True):
        yield Equal(axis_x, axis_y)
    training = bool(site.attribute("training_mode", 0)) or any(o is not None for o in site.outputs[1:])
    parameters = [site.input(slot) for slot in range(1, 5)]
    if training or site.attribute("spatial", 1) == 0 or not all(p.is_weight for p in parameters):
        for axis in (*x.axes, *(axis for p in parameters for axis in p.axes)):
            yield Freeze(axis, f"{site.node.title} is not in inference form with constant parameters")
        return
    if all(p.operand.is_constant for p in parameters):
        yield Normalises(x[1])
        roles = (Role.CARRIED,) * 4
    else:
        # Parameters that are decoded first are not folded: scale and variance are carried, shift and mean added.
        roles = (Role.CARRIED, Role.BIAS, Role.BIAS, Role.CARRIED)
    for parameter, role in zip(parameters, roles, strict=True):
        yield Equal(parameter[0], x[1])
        yield Weight(parameter[0], role)


def instance_normalization(site: Site) -> Iterator[Constraint]:
    """InstanceNormalization: statistics per sample and channel, over space, which may hold channels too."""
    x, y = site.input(0), site.output()
    for axis_x, axis_y in zip(x.axes, y.axes, strict=True):
        yield Equal(axis_x, axis_y)
    yield from (Statistic(axis, f"the statistics of {site.node.title} run over it") for axis in x.axes[2:])
    for slot in (1, 2):
        yield Equal(site.input(slot)[0], x[1])
        yield Weight(site.input(slot)[0], Role.CARRIED)


def layer_normalization(site: Site) -> Iterator[Constraint]:
    """LayerNormalization, RMSNormalization and SimplifiedLayerNormalization over the axes from ``axis`` on."""
    x, y = site.input(0), site.output()
    first = int(site.attribute("axis", -1)) % x.rank
    for i, (axis_x, axis_y) in enumerate(zip(x.axes, y.axes, strict=True)):
        yield Equal(axis_x, axis_y)
        # A table, such as that of the relative positions of DeBERTa, may be normalised before it is read.
        yield from made_here(x, i)
    yield from (Statistic(axis, f"the statistics of {site.node.title} run over it") for axis in x.axes[first:])
    yield from _per_channel(site.input(1), x.axes[first:], Role.CARRIED)
    bias = site.optional_input(2)
    if bias is not None:
        yield from _per_channel(bias, x.axes[first:], Role.BIAS)
    for statistic in site.outputs[1:]:
        if statistic is not None:
            yield from (Equal(statistic[i], x[i]) for i in range(first))
            yield from (Freeze(axis, f"a statistic of {site.node.title}") for axis in statistic.axes[first:])


def group_normalization(site: Site) -> Iterator[Constraint]:
    """GroupNormalization: groups x channels, with the statistics of a group over its channels.

    Before version 21 scale and shift are per group, from then on per channel.
    """
    x, y, scale, shift = site.input(0), site.output(), site.input(1), site.input(2)
    for axis_x, axis_y in zip(x.axes, y.axes, strict=True):
        yield Equal(axis_x, axis_y)
    count = int(site.attribute("num_groups"))
    groups = Fresh(count, "groups", f"the groups of {site.node.title} are kept", apart=True)
    inside = Fresh(x.dims[1] // count, "channels of a group")
    yield Equal(x[1], prod(groups, inside))
    yield Statistic(inside, f"the statistics of {site.node.title} run over it")
    for parameter, role in ((scale, Role.CARRIED), (shift, Role.BIAS)):
        yield Equal(parameter[0], x[1] if parameter.dims[0] == x.dims[1] else groups)
        yield Weight(parameter[0], role)


def _per_channel(parameter: Tensor, axes: Sequence[AxisRef], role: Role) -> Iterator[Constraint]:
    for axis, channels in zip(parameter.axes[::-1], axes[::-1], strict=False):
        if parameter.dims[axis.axis] > 1:
            yield Equal(axis, channels)
            yield Weight(axis, role)


def lrn(site: Site) -> Iterator[Constraint]:
    """LRN and LpNormalization mix neighbouring or all channels: frozen."""
    x, y = site.input(0), site.output()
    for axis_x, axis_y in zip(x.axes, y.axes, strict=True):
        yield Equal(axis_x, axis_y)
    mixed = 1 if site.node.op == "LRN" else int(site.attribute("axis", -1))
    yield Freeze(x[mixed], f"{site.node.title} mixes the channels")


def mean_variance_normalization(site: Site) -> Iterator[Constraint]:
    """MeanVarianceNormalization: statistics over the axes that it states, by default all but the channels."""
    x, y = site.input(0), site.output()
    for axis_x, axis_y in zip(x.axes, y.axes, strict=True):
        yield Equal(axis_x, axis_y)
    for axis in site.attribute("axes", (0, 2, 3)):
        yield Statistic(x[int(axis)], f"the statistics of {site.node.title} run over it")


def softmax(site: Site) -> Iterator[Constraint]:
    """Softmax, LogSoftmax, Hardmax: frozen along the axis that they normalise.

    Before version 13 they normalise over all axes from ``axis`` on, flattened.
    """
    x, y = site.input(0), site.output()
    for axis_x, axis_y in zip(x.axes, y.axes, strict=True):
        yield Equal(axis_x, axis_y)
    flattened = site.node.version < 13
    first = int(site.attribute("axis", 1 if flattened else -1)) % x.rank
    for axis in x.axes[first:] if flattened else (x[first],):
        yield Freeze(axis, f"{site.node.title} normalises over it")


RULES = (
    Rule("BatchNormalization", batch_normalization),
    Rule("InstanceNormalization", instance_normalization),
    Rule("LayerNormalization", layer_normalization),
    Rule("RMSNormalization", layer_normalization),
    # ONNX Runtime keeps both under ONNX's own domain too.
    Rule("SimplifiedLayerNormalization", layer_normalization),
    Rule("GroupNormalization", group_normalization),
    Rule("MeanVarianceNormalization", mean_variance_normalization, since=9),
    *(Rule(op, lrn) for op in ("LRN", "LpNormalization")),
    *(Rule(op, softmax) for op in ("Softmax", "LogSoftmax", "Hardmax")),
)
