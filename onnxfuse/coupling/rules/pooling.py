"""Pooling, resampling and reductions: batch and channels pass through, what is pooled or reduced is fixed."""

from collections.abc import Iterator, Sequence

from onnxfuse.coupling.constraints import AxisRef, Constraint, Equal, Freeze, Rule, Site, Statistic
from onnxfuse.coupling.rules.shape import made_here

__all__ = ["RULES", "pooled"]


def pool(site: Site) -> Iterator[Constraint]:
    """Pools over the spatial axes, from 2 on."""
    x = site.input(0)
    yield from pooled(site, x.axes, site.output().axes)
    for indices in site.outputs[1:]:
        if indices is not None:
            # The indices count elements of the flattened input, so their values depend on the number of channels.
            for axis in (*x.axes, *indices.axes):
                yield Freeze(axis, f"the indices of {site.node.title} depend on the number of channels")


def pooled(site: Site, x: Sequence[AxisRef], y: Sequence[AxisRef]) -> Iterator[Constraint]:
    """The axes of what is pooled, and of the result: batch, channels, space."""
    yield Equal(x[0], y[0])
    yield Equal(x[1], y[1])
    untouched = _untouched(site, len(x) - 2)
    for i, (axis_x, axis_y) in enumerate(zip(x[2:], y[2:], strict=True)):
        if i in untouched:
            yield Equal(axis_x, axis_y)
        else:
            yield Freeze(axis_x, f"a spatial axis of {site.node.title}")
            yield Freeze(axis_y, f"a spatial axis of {site.node.title}")


def _untouched(site: Site, count: int) -> set[int]:
    """Which of so many spatial axes a window of 1 goes along, step by step, so that it changes nothing there."""
    kernel, steps = site.attribute("kernel_shape", ()), site.attribute("strides", [1] * count)
    pads = site.attribute("pads", [0] * (2 * count))
    return {i for i, size in enumerate(kernel) if (size, steps[i], pads[i], pads[i + count]) == (1, 1, 0, 0)}


def reduce(site: Site) -> Iterator[Constraint]:
    """Reductions: the axes reduced are fixed, the others pass through."""
    x, y = site.input(0), site.output()
    axes = site.integers("axes", 1)
    if axes is None and site.optional_input(1) is not None:
        yield from (Freeze(axis, f"the axes of {site.node.title} are computed at run time") for axis in x.axes)
        yield from (Freeze(axis, f"the axes of {site.node.title} are computed at run time") for axis in y.axes)
        return
    if not axes:
        axes = [] if site.attribute("noop_with_empty_axes", 0) else list(range(x.rank))
    kind = site.node.op.removeprefix("Reduce")
    gone = {axis % x.rank for axis in axes}
    yield from _reduced(site, gone, keep=bool(site.attribute("keepdims", 1)), statistic=_STATISTICS.get(kind, ""))


def arg_reduce(site: Site) -> Iterator[Constraint]:
    """ArgMax and ArgMin: positions along the axis, which is fixed."""
    x = site.input(0)
    gone = {int(site.attribute("axis", 0)) % x.rank}
    yield from _reduced(site, gone, keep=bool(site.attribute("keepdims", 1)), statistic="")


def resize(site: Site) -> Iterator[Constraint]:
    """Resize and Upsample: axes of unchanged size pass through, the others are resampled and fixed."""
    x, y = site.input(0), site.output()
    order = [int(axis) % x.rank for axis in site.attribute("axes", range(x.rank))]
    scales = 1 if len(site.inputs) == 2 else 2
    for i, (axis_x, axis_y) in enumerate(zip(x.axes, y.axes, strict=True)):
        follows = i in order and any(site.moves(slot, order.index(i)) for slot in (scales, 3))
        # A table that has the wanted size already may be resampled elsewhere.
        if x.dims[i] == y.dims[i] and not (x.is_weight and follows):
            yield Equal(axis_x, axis_y)
            yield from made_here(x, i)
        else:
            yield Freeze(axis_x, f"{site.node.title} resamples it")
            yield Freeze(axis_y, f"{site.node.title} resamples it")
    for settings in site.inputs[1:]:
        if settings is not None:
            yield from (Equal(axis, axis) for axis in settings.axes)
    sizes = site.optional_input(3)
    if site.node.op == "Resize" and sizes is not None:
        yield from (site.entry_size("", 3, i, y[axis]) for i, axis in enumerate(order[: sizes.dims[0]]))


def _reduced(site: Site, gone: set[int], *, keep: bool, statistic: str) -> Iterator[Constraint]:
    """The axes of a reduction; an average over fewer channels is still one, a sum or a position is something else.

    Args:
        site: The node.
        gone: The axes that are reduced.
        keep: Whether they stay, with size 1.
        statistic: What is computed over them that fewer channels approximate, in words; empty if it is no such thing.
    """
    x, y = site.input(0), site.output()
    kept = [i for i in range(x.rank) if keep or i not in gone]
    for i in range(x.rank):
        if i not in gone:
            yield Equal(x[i], y[kept.index(i)])
        elif statistic:
            yield Statistic(x[i], f"{site.node.title} {statistic} over it")
        else:
            yield Freeze(x[i], f"{site.node.title} reduces over it")
    if keep:
        yield from (Freeze(y[i], f"{site.node.title} reduces over it") for i in gone)


_POOLS = ("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
# A norm, or its square, is what a tensor is divided by to have length 1, so it shrinks as it should when channels go.
_STATISTICS = {
    "Mean": "averages",
    "Max": "takes the maximum",
    "Min": "takes the minimum",
    "L1": "computes the norm",
    "L2": "computes the norm",
    "SumSquare": "computes the norm",
}
_REDUCTIONS = ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")

RULES = (
    *(Rule(op, pool) for op in _POOLS),
    *(Rule(f"Reduce{kind}", reduce) for kind in _REDUCTIONS),
    *(Rule(op, arg_reduce) for op in ("ArgMax", "ArgMin")),
    *(Rule(op, resize) for op in ("Resize", "Upsample")),
)
