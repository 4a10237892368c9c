"""Operators that rearrange: Reshape and its kin, Transpose, Concat, Split, Slice, Pad, Expand.

None of them computes anything, so each is a set of equations. Reshape equates the product of all its input axes with
the product of all its output axes; the unifier finds which axes merged and which were split.
"""

from collections.abc import Iterator, Sequence

from onnxfuse.coupling.constraints import (
    Constraint,
    Equal,
    Freeze,
    Fresh,
    Rule,
    Site,
    Tensor,
    Weight,
    cat,
    prod,
)
from onnxfuse.statistics.features import Role

__all__ = ["RULES", "concatenated", "made_here", "pad", "squeeze"]


def reshape(site: Site) -> Iterator[Constraint]:
    """Reshape; entries of the target shape that hold sizes follow them, 0 copies, -1 is inferred."""
    x, y = site.input(0), site.output()
    yield Equal(prod(*x.axes), prod(*y.axes))
    target = site.integers("shape", 1)
    for i, axis in enumerate(y.axes):
        entry = None if target is None or len(target) != y.rank else target[i]
        if entry == 0 and not site.attribute("allowzero", 0):
            yield Equal(x[i], axis)
        elif entry != -1:
            yield site.entry_size("shape", 1, i, axis)


def flatten(site: Site) -> Iterator[Constraint]:
    """Flatten to a matrix: the axes before ``axis`` and those from it on."""
    x, y = site.input(0), site.output()
    axis = int(site.attribute("axis", 1))
    axis = axis + x.rank if axis < 0 else axis
    yield Equal(prod(*x.axes[:axis]), y[0])
    yield Equal(prod(*x.axes[axis:]), y[1])


def squeeze(site: Site) -> Iterator[Constraint]:
    """Squeeze and Unsqueeze move only axes of size 1, so the axes that are longer pass through in order."""
    x, y = site.input(0), site.output()
    yield Equal(prod(*x.axes), prod(*y.axes))
    for tensor in (x, y):
        yield from (Equal(axis, axis) for axis, size in zip(tensor.axes, tensor.dims, strict=True) if size == 1)
    if site.node.op == "Squeeze" and site.integers("axes", 1) is None:
        yield from (Freeze(axis, f"{site.node.title} names no axes, so it would drop one of size 1") for axis in x.axes)


def transpose(site: Site) -> Iterator[Constraint]:
    """Transpose permutes the axes."""
    x, y = site.input(0), site.output()
    order = site.attribute("perm", list(range(x.rank))[::-1])
    for i, source in enumerate(order):
        yield Equal(y[i], x[int(source)])


def concat(site: Site) -> Iterator[Constraint]:
    """Concat: one after the other along ``axis``, equal along the others."""
    yield from concatenated(site, [x for x in site.inputs if x is not None])


def concatenated(site: Site, parts: Sequence[Tensor]) -> Iterator[Constraint]:
    """Some of the inputs one after the other along attribute ``axis``."""
    y = site.output()
    along = int(site.attribute("axis", 1)) % y.rank
    yield Equal(y[along], cat(*(x[along] for x in parts)))
    for x in parts:
        for i in range(y.rank):
            if i != along:
                yield Equal(x[i], y[i])
            yield from made_here(x, i)


def split(site: Site) -> Iterator[Constraint]:
    """Split, even or not; sizes that the file states follow the parts, equal parts stay equal."""
    x = site.input(0)
    along = int(site.attribute("axis", 0)) % x.rank
    parts = [y for y in site.outputs if y is not None]
    if len(parts) != len(site.outputs):
        yield from (Freeze(axis, f"an output of {site.node.title} is left out") for axis in x.axes)
        return
    yield Equal(x[along], cat(*(y[along] for y in parts)))
    for i, y in enumerate(parts):
        yield from (Equal(x[j], y[j]) for j in range(x.rank) if j != along)
        if "split" in site.node.attributes or site.optional_input(1) is not None:
            yield site.entry_size("split", 1, i, y[along])
        elif y.dims[along] == parts[0].dims[along]:
            # Without stated sizes the operator cuts evenly, so the parts have to keep one common size.
            yield Equal(y[along], parts[0][along])
        else:
            yield Freeze(x[along], f"{site.node.title} cuts it unevenly without stating sizes")


def slice_(site: Site) -> Iterator[Constraint]:
    """Slice with known bounds; a step other than 1 fixes the axis unless it takes one of every so many neighbours."""
    x, y = site.input(0), site.output()
    starts, ends = site.integers("starts", 1), site.integers("ends", 2)
    if starts is None or ends is None or (site.integers("axes", 3) is None and site.optional_input(3) is not None):
        axes, steps = list(range(x.rank)), [0] * x.rank
        starts = ends = [0] * x.rank
    else:
        axes = [a % x.rank for a in site.integers("axes", 3) or range(len(starts))]
        stated = site.integers("steps", 4)
        steps = stated if stated is not None else [int(site.optional_input(4) is None)] * len(starts)
    for i in range(x.rank):
        if i not in axes:
            yield Equal(x[i], y[i])
            yield from made_here(x, i)
    for position, axis in enumerate(axes):
        if any(site.moves(slot, position) for slot in (1, 2, 4)):
            # Even where nothing is cut off here: elsewhere something may be.
            yield Freeze(x[axis], f"{site.node.title} cuts it at a bound that follows sizes of the inputs")
            yield Freeze(y[axis], f"{site.node.title} cuts it at a bound that follows sizes of the inputs")
        elif x.dims[axis] == y.dims[axis] and steps[position] == 1:
            yield Equal(x[axis], y[axis])
            yield from made_here(x, axis)
        elif steps[position] > 1 and _is_every(x.dims[axis], steps[position], starts[position], ends[position]):
            # One of the k that lie side by side, all along the axis, as the even ones of interleaved pairs.
            whole = prod(y[axis], Fresh(steps[position], "neighbours", f"{site.node.title} takes one of them"))
            yield Equal(x[axis], whole)
            if ends[position] == x.dims[axis]:
                yield site.entry_size("ends", 2, position, whole)
        elif steps[position] != 1:
            yield Freeze(x[axis], f"{site.node.title} takes every other index, or bounds known at run time only")
            yield Freeze(y[axis], f"{site.node.title} takes every other index, or bounds known at run time only")
        else:
            yield from _cut(site, position, axis, starts[position], ends[position])


def _is_every(size: int, step: int, start: int, end: int) -> bool:
    """Whether a slice takes one of every ``step`` neighbours from the beginning of an axis to its end."""
    return size % step == 0 and 0 <= start < step and end >= size


def _cut(site: Site, position: int, axis: int, start: int, end: int) -> Iterator[Constraint]:
    """A slice of consecutive indices: what is before, what is kept, what is after."""
    x, y = site.input(0), site.output()
    first = max(start + x.dims[axis], 0) if start < 0 else min(start, x.dims[axis])
    before = Fresh(first, "cut off before")
    after = Fresh(x.dims[axis] - first - y.dims[axis], "cut off after")
    yield Equal(x[axis], cat(before, y[axis], after))
    if start > 0:
        yield site.entry_size("starts", 1, position, before)
    elif start < 0 and first > 0:
        yield site.entry_size("starts", 1, position, cat(y[axis], after), -1)
    if 0 < end < x.dims[axis]:
        yield site.entry_size("ends", 2, position, cat(before, y[axis]))
    elif end < 0:
        yield site.entry_size("ends", 2, position, after, -1)


def pad(site: Site) -> Iterator[Constraint]:
    """Pad: new indices before and after; along channels only zeros can be added and resized."""
    x, y = site.input(0), site.output()
    pads = site.integers("pads", 1)
    axes = site.integers("axes", 3) if site.optional_input(3) is not None else list(range(x.rank))
    if pads is None or axes is None:
        for tensor in (x, y):
            yield from (Freeze(a, f"the padding of {site.node.title} is known at run time only") for a in tensor.axes)
        return
    axes = [a % x.rank for a in axes]
    yield from (Equal(x[i], y[i]) for i in range(x.rank) if i not in axes)
    value = site.optional_input(2)
    filler = site.attribute("value", 0.0) if value is None else value.value
    zeros = site.attribute("mode", b"constant") == b"constant" and filler is not None and not filler
    for position, axis in enumerate(axes):
        before, after = pads[position], pads[position + len(axes)]
        if site.moves(1, position) or site.moves(1, position + len(axes)):
            yield Freeze(x[axis], f"{site.node.title} pads it by what follows sizes of the inputs")
            yield Freeze(y[axis], f"{site.node.title} pads it by what follows sizes of the inputs")
        elif before == after == 0:
            yield Equal(x[axis], y[axis])
        elif zeros and before >= 0 and after >= 0:
            head, tail = Fresh(before, "zeros before"), Fresh(after, "zeros after")
            yield Equal(y[axis], cat(head, x[axis], tail))
            yield site.entry_size("pads", 1, position, head)
            yield site.entry_size("pads", 1, position + len(axes), tail)
        else:
            yield Freeze(x[axis], f"{site.node.title} pads it with something else than zeros")
            yield Freeze(y[axis], f"{site.node.title} pads it with something else than zeros")


def expand(site: Site) -> Iterator[Constraint]:
    """Expand: axes of the output that the input has at full size pass through, the others take the stated size."""
    x, y = site.input(0), site.output()
    target = site.input(1)
    for position in range(1, y.rank + 1):
        if position <= x.rank and x.dims[-position] == y.dims[-position]:
            yield Equal(x[-position], y[-position])
            yield from made_here(x, x.rank - position)
        else:
            # Copies of one entry: there may be any number of them.
            yield Equal(y[-position], y[-position])
        if position <= target.dims[0]:
            stated = None if target.value is None else int(target.value[-position])
            if stated != 1:
                yield site.entry_size("", 1, target.dims[0] - position, y[-position])


def made_here(x: Tensor, axis: int) -> Iterator[Constraint]:
    """A constant that becomes a part of a computed tensor, such as a class token, makes channels like a bias does."""
    if x.is_weight and x.dims[axis] > 1:
        yield Weight(x[axis], Role.PRODUCER)


def constant_of_shape(site: Site) -> Iterator[Constraint]:
    """ConstantOfShape: one value everywhere, so any axis may shrink with what its size is taken from."""
    for i, axis in enumerate(site.output().axes):
        yield Equal(axis, axis)
        yield site.entry_size("", 0, i, axis)


def shape(site: Site) -> Iterator[Constraint]:
    """Shape and Size read sizes at run time: the input is free, the result is a vector of rank entries."""
    yield from (Equal(axis, axis) for axis in site.input(0).axes)
    yield from (Freeze(axis, f"the result of {site.node.title}") for axis in site.output().axes)


RULES = (
    Rule("Reshape", reshape),
    Rule("Flatten", flatten),
    *(Rule(op, squeeze) for op in ("Squeeze", "Unsqueeze")),
    Rule("Transpose", transpose),
    Rule("Concat", concat),
    Rule("Split", split),
    Rule("Slice", slice_),
    Rule("Pad", pad),
    Rule("Expand", expand),
    Rule("ConstantOfShape", constant_of_shape),
    *(Rule(op, shape) for op in ("Shape", "Size")),
)
