"""Operators that order, sum, fill in or select along an axis, or that make numbers from sizes.

The axis that they go along is fixed: what becomes of an index depends on those beside it. The other axes pass through.
Operators whose result depends on how many channels there are, or on all of them at once, are frozen as a whole.
"""

from collections.abc import Iterator

from onnxfuse.coupling.constraints import Constraint, Equal, Freeze, Rule, Site

__all__ = ["RULES", "frozen", "passing", "trilu"]


def passing(site: Site, fixed: set[int], why: str) -> Iterator[Constraint]:
    """One tensor in, the same axes in every output; some of them are fixed.

    Args:
        site: The node.
        fixed: Axes of its first input, counted from the start.
        why: What it does with them.
    """
    x = site.input(0)
    for y in site.outputs:
        if y is None:
            continue
        for i, axis in enumerate(x.axes):
            if x.dims[i] == y.dims[i]:
                yield Equal(axis, y[i])
            if i in fixed or x.dims[i] != y.dims[i]:
                reason = f"{site.node.title} {why}"
                yield from (Freeze(axis, reason), Freeze(y[i], reason))


def frozen(site: Site) -> Iterator[Constraint]:
    """Nothing passes: all axes of all inputs and outputs are fixed."""
    for tensor in (*site.inputs, *site.outputs):
        if tensor is not None:
            yield from (Freeze(axis, f"{site.node.title} depends on all of it") for axis in tensor.axes)


def cumulate(site: Site) -> Iterator[Constraint]:
    """CumSum, CumProd: an entry holds the sum or product of those before it, so the axis summed along is fixed."""
    x, along = site.input(0), site.integers("axis", 1)
    fixed = set(range(x.rank)) if along is None else {along[0] % x.rank}
    yield from passing(site, fixed, "sums along it")


def top_k(site: Site) -> Iterator[Constraint]:
    """TopK: values and positions along the axis, which is fixed."""
    x = site.input(0)
    yield from passing(site, {int(site.attribute("axis", -1)) % x.rank}, "chooses along it")


def reverse_sequence(site: Site) -> Iterator[Constraint]:
    """ReverseSequence: time and batch are fixed, features pass through."""
    time, batch = int(site.attribute("time_axis", 0)), int(site.attribute("batch_axis", 1))
    yield from passing(site, {time, batch}, "reverses it")
    yield from (Freeze(axis, f"the lengths of {site.node.title}") for axis in site.input(1).axes)


def trilu(site: Site) -> Iterator[Constraint]:
    """Trilu: the last two axes are rows and columns of a triangle."""
    rank = site.input(0).rank
    yield from passing(site, {rank - 2, rank - 1}, "keeps a triangle of it")


def compress(site: Site) -> Iterator[Constraint]:
    """Compress: indices of the axis are selected; without an axis, elements of all."""
    x, y = site.input(0), site.output()
    yield from (Freeze(axis, f"the selection of {site.node.title}") for axis in site.input(1).axes)
    if "axis" in site.node.attributes:
        yield from passing(site, {int(site.attribute("axis")) % x.rank}, "selects from it")
    else:
        yield from (Freeze(axis, f"{site.node.title} selects elements of all axes") for axis in (*x.axes, *y.axes))


def one_hot(site: Site) -> Iterator[Constraint]:
    """OneHot: a new axis, fixed; the axes of the indices pass through."""
    x, y = site.input(0), site.output()
    new = int(site.attribute("axis", -1)) % y.rank
    for i, axis in enumerate(x.axes):
        yield Equal(axis, y[i if i < new else i + 1])
    yield Freeze(y[new], f"the classes of {site.node.title}")
    yield from (
        Freeze(axis, f"the values of {site.node.title}") for tensor in (1, 2) for axis in site.input(tensor).axes
    )


def center_crop_pad(site: Site) -> Iterator[Constraint]:
    """CenterCropPad: the axes that it resizes are fixed, the others pass through."""
    x = site.input(0)
    axes = {int(axis) % x.rank for axis in site.attribute("axes", range(x.rank))}
    yield from passing(site, axes, "crops or pads it")


def eye_like(site: Site) -> Iterator[Constraint]:
    """EyeLike: ones where row and column have one number, so both are fixed."""
    yield from passing(site, {0, 1}, "counts rows and columns")


RULES = (
    Rule("CumSum", cumulate, since=11),
    Rule("CumProd", cumulate, since=26),
    Rule("TopK", top_k),
    Rule("ReverseSequence", reverse_sequence, since=10),
    Rule("Trilu", trilu, since=14),
    Rule("Compress", compress, since=9),
    Rule("OneHot", one_hot, since=9),
    Rule("CenterCropPad", center_crop_pad, since=18),
    Rule("EyeLike", eye_like, since=9),
    *(Rule(op, frozen) for op in ("NonMaxSuppression", "NonZero", "Range", "Unique", "Multinomial", "Bernoulli")),
    *(Rule(f"Random{kind}{like}", frozen) for kind in ("Normal", "Uniform") for like in ("", "Like")),
)
