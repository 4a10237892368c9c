"""Conv, ConvTranspose and DeformConv: filters make the output channels, their slices read the input channels.

With ``group`` G, the input channels are G x c and the output channels G x o in row-major order; the weight of Conv is
(G x o, c, taps...), that of ConvTranspose (G x c, o, taps...). A depthwise convolution is the case c = 1: every channel
has filters of its own, one or several (o), so a channel goes with its group, and the attribute ``group`` follows G.
Otherwise channels go inside the groups, as many from each, and whole groups only where what is inside has to stay.
"""

import math
from collections.abc import Iterator, Sequence

from onnxfuse.coupling.constraints import (
    AttributeSize,
    AxisRef,
    Constraint,
    Equal,
    Freeze,
    Fresh,
    Parallel,
    Rule,
    SelectOnly,
    Site,
    Spare,
    Tensor,
    Weight,
    prod,
)
from onnxfuse.statistics.features import Role

__all__ = ["RULES", "channels_first", "conv", "convolution"]


def conv(site: Site) -> Iterator[Constraint]:
    """Conv, any number of spatial axes, any group."""
    yield from convolution(site, site.input(0).axes, site.input(1), site.optional_input(2), site.output().axes)


def channels_first(site: Site, tensor: Tensor) -> tuple[AxisRef, ...]:
    """Return the axes of a tensor as batch, channels, space, where attribute ``channels_last`` may say otherwise."""
    axes = tensor.axes
    return (axes[0], axes[-1], *axes[1:-1]) if site.attribute("channels_last", 0) else axes


def convolution(
    site: Site, x: Sequence[AxisRef], w: Tensor, bias: Tensor | None, y: Sequence[AxisRef]
) -> Iterator[Constraint]:
    """A convolution, whatever the slots are that it reads.

    Args:
        site: The node.
        x: The axes of its input: batch, channels, space.
        w: Its weight: filters, channels of a group, space.
        bias: Its bias, if it has one.
        y: The axes of its output.
    """
    group = int(site.attribute("group", 1))
    groups = Fresh(group, "groups of a convolution")
    outputs = _outputs(site, w.dims[0] // group, w.dims[1], group)
    inputs = Fresh(w.dims[1], "input channels of a group")
    yield Equal(x[0], y[0])
    yield Equal(x[1], prod(groups, inputs))
    yield Equal(y[1], prod(groups, outputs))
    yield Equal(w[0], prod(groups, outputs))
    yield Equal(w[1], inputs)
    passed = _passed_axes(site, w)
    yield from (Equal(x[axis], y[axis]) for axis in passed)
    space = [axes[i] for axes in (x, w.axes, y) for i in range(2, len(axes)) if i not in passed]
    yield from _weights(site, space, w, producer_axis=0, consumer_axis=1, group=group)
    yield from _bias(bias, y[1])
    if not w.is_weight:
        yield from _computed(site, inputs, groups, (*x, *w.axes, *y))
    if group > 1:
        yield AttributeSize("group", groups)
        if w.dims[1] > 1:
            yield from _whole(site, groups, (x[1], y[1]))


def deform_conv(site: Site) -> Iterator[Constraint]:
    """DeformConv: a Conv whose taps are moved by a second input, alike for all channels of an offset group."""
    x, count = site.input(0), int(site.attribute("offset_group", 1))
    yield from convolution(site, x.axes, site.input(1), site.optional_input(3), site.output().axes)
    title, taps = site.node.title, math.prod(site.input(1).dims[2:])
    groups = Fresh(count, "offset groups")
    if count > 1:
        yield Equal(x[1], prod(groups, Fresh(x.dims[1] // count, "channels of an offset group")))
        yield AttributeSize("offset_group", groups)
        yield SelectOnly(groups, f"the offset groups of {title} have offsets of their own")
        yield Spare(groups, f"the offset groups of {title} are kept; channels are fused inside each of them", (x[1],))
    # Two coordinates, and one factor, for every tap of the weight.
    for slot, numbers in ((2, 2 * taps), (4, taps)):
        moved = site.optional_input(slot)
        if moved is not None:
            inside = Fresh(numbers, "offsets")
            yield Equal(moved[1], prod(groups, inside))
            yield Freeze(inside, f"the offsets of {title}")
            yield from (Freeze(axis, f"the offsets of {title}") for axis in (moved[0], *moved.axes[2:]))


def conv_transpose(site: Site) -> Iterator[Constraint]:
    """ConvTranspose, any number of spatial axes, any group."""
    x, w, y = site.input(0), site.input(1), site.output()
    group = int(site.attribute("group", 1))
    groups = Fresh(group, "groups of a convolution")
    outputs = _outputs(site, w.dims[1], w.dims[0] // group, group)
    inputs = Fresh(w.dims[0] // group, "input channels of a group")
    yield Equal(x[0], y[0])
    yield Equal(x[1], prod(groups, inputs))
    yield Equal(y[1], prod(groups, outputs))
    yield Equal(w[0], prod(groups, inputs))
    yield Equal(w[1], outputs)
    space = (*x.axes[2:], *w.axes[2:], *y.axes[2:])
    yield from _weights(site, space, w, producer_axis=1, consumer_axis=0, group=group)
    yield from _bias(site.optional_input(2), y[1])
    if not w.is_weight:
        yield from _computed(site, inputs, groups, (*x.axes, *w.axes, *y.axes))
    if group > 1:
        yield AttributeSize("group", groups)
        if w.dims[0] > group:
            yield from _whole(site, groups, (x[1], y[1]))


def _passed_axes(site: Site, w: Tensor) -> list[int]:
    """Return the spatial axes along which a filter has one tap that is put on every index: it knows no neighbours."""
    if site.node.op not in {"Conv", "FusedConv"}:
        return []
    space = len(w.dims) - 2
    steps, pads = site.attribute("strides", [1] * space), site.attribute("pads", [0] * (2 * space))
    alone = zip(w.dims[2:], steps, pads[:space], pads[space:], strict=True)
    return [axis for axis, numbers in enumerate(alone, start=2) if numbers == (1, 1, 0, 0)]


def _whole(site: Site, groups: Fresh, axes: tuple[AxisRef, ...]) -> Iterator[Constraint]:
    """Groups of several channels: what is made of one has nothing to do with another."""
    yield SelectOnly(groups, f"the groups of {site.node.title} have filters of their own")
    yield Spare(groups, f"the groups of {site.node.title} are kept; channels are fused inside each group", axes)


def _outputs(site: Site, outputs: int, inputs: int, group: int) -> Fresh:
    """The output channels of a group; where a group is one channel, all of them are made of it, and go with it."""
    kept = f"every channel of {site.node.title} has as many filters" if group > 1 == inputs else ""
    return Fresh(outputs, "output channels of a group", kept)


def _weights(
    site: Site, space: Sequence[AxisRef], w: Tensor, *, producer_axis: int, consumer_axis: int, group: int
) -> Iterator[Constraint]:
    """Roles of the weight, and the axes that never change: spatial ones."""
    if not w.is_weight:
        # What makes it has the roles.
        pass
    elif group > 1 and w.dims[consumer_axis] == (1 if consumer_axis == 1 else group):
        # A depthwise filter belongs to one channel; it neither mixes channels nor makes new ones.
        yield Weight(w[0], Role.CARRIED)
        yield Weight(w[1], Role.CARRIED)
    else:
        yield Weight(w[producer_axis], Role.PRODUCER)
        yield Weight(w[consumer_axis], Role.CONSUMER)
    yield from (Freeze(axis, f"a spatial axis of {site.node.title}") for axis in space)


def _bias(bias: Tensor | None, channels: AxisRef) -> Iterator[Constraint]:
    if bias is not None:
        yield Equal(bias[0], channels)
        if bias.is_weight:
            yield Weight(bias[0], Role.BIAS)


def _computed(site: Site, inputs: Fresh, groups: Fresh, axes: Sequence[AxisRef]) -> Iterator[Constraint]:
    """A weight that is computed at run time, as a mean of several or from a style: two tensors are multiplied."""
    if site.node.op not in {"Conv", "ConvTranspose"}:
        yield from (Freeze(axis, f"the weight of {site.node.title} is computed at run time") for axis in axes)
        return
    yield SelectOnly(inputs, f"{site.node.title} multiplies two computed tensors over it")
    if groups.size > 1:
        yield Parallel(groups, f"{site.node.title} multiplies index by index over it")


RULES = (
    Rule("Conv", conv),
    Rule("ConvTranspose", conv_transpose),
    Rule("DeformConv", deform_conv, since=19),
)
