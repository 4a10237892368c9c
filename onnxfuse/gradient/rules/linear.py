"""Convolutions and matrix products: linear in each operand, so that each gradient is an operator of the same kind."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from onnxfuse.gradient.expressions import Expr, Gradients, Rule, Site, call, integers, summed_to
from onnxfuse.statistics.patches import convolution_pads

__all__ = ["RULES", "Window", "spread"]

# One product for each tap is faster than a convolution over the samples, unless taps are many or products are thin.
_MOST_TAPS, _FEWEST_CHANNELS = 64, 8
# With so many channels one product for all taps is faster still; with steps of more than one from fewer on.
_FEWEST_GATHERED, _FEWEST_STRIDED = 128, 64
# Where every channel is a group of its own, sums of products are faster than a convolution, but not for more taps or
# fewer places.
_MOST_TAPS_OF_ONE, _FEWEST_PLACES_OF_ONE = 25, 128
# With so many places in a sample, samples are multiplied one by one, unless their products are many; else all at once.
_MANY_PLACES, _MOST_PRODUCTS = 64, 2**24


@dataclass(frozen=True)
class Window:
    """How a window moves over the spatial axes of a tensor.

    Attributes:
        kernel: Its taps along each axis.
        strides: Its steps.
        dilations: The distance of its taps.
        before: Zeros before the tensor.
        large: Sizes of the tensor that it moves over.
        small: How many places it takes.
    """

    kernel: Sequence[int]
    strides: Sequence[int]
    dilations: Sequence[int]
    before: Sequence[int]
    large: Sequence[int]
    small: Sequence[int]

    @property
    def extent(self) -> list[int]:
        """From the first tap to the last, along each axis."""
        return [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]

    @property
    def beyond(self) -> list[int]:
        """How far the last place reaches over the end of the tensor; negative where it does not reach the end."""
        rows = zip(self.strides, self.small, self.extent, self.before, self.large, strict=True)
        return [s * (n - 1) + extent - before - size for s, n, extent, before, size in rows]


def spread(window: Window, value: Expr, weight: Expr, group: int) -> Expr:
    """Return the transposed convolution that takes places of a window back to the tensor that it moves over."""
    return call(
        "ConvTranspose",
        value,
        weight,
        strides=list(window.strides),
        dilations=list(window.dilations),
        pads=[*window.before, *(max(b, 0) for b in window.beyond)],
        output_padding=[max(-b, 0) for b in window.beyond],
        group=group,
    )


def _back(window: Window, value: Expr, weight: Expr, group: int, *, is_depthwise: bool = False) -> Expr:
    """Return what `spread` does, as a convolution with mirrored filters where steps are by one: that runs faster."""
    before = [extent - 1 - b for extent, b in zip(window.extent, window.before, strict=True)]
    behind = [extent - 1 - b for extent, b in zip(window.extent, window.beyond, strict=True)]
    can_turn = group == 1 or is_depthwise
    if not can_turn or max(window.strides, default=1) > 1 or min(*before, *behind, 0) < 0:
        return spread(window, value, weight, group)
    rank = len(window.kernel)
    turned = weight if is_depthwise else call("Transpose", weight, perm=[1, 0, *range(2, 2 + rank)])
    if max(window.kernel) > 1:
        down, ends = integers([-1] * rank), integers([-(k + 1) for k in window.kernel])
        turned = call("Slice", turned, down, ends, integers(range(2, 2 + rank)), down)
    return call("Conv", value, turned, dilations=list(window.dilations), pads=[*before, *behind], group=group)


def _gather(window: Window, value: Expr, weight: Expr, group: int) -> Expr:
    """Return the convolution over a window; the places that ``window.small`` counts."""
    y = call(
        "Conv",
        value,
        weight,
        strides=list(window.strides),
        dilations=list(window.dilations),
        pads=[*window.before, *(max(b, 0) for b in window.beyond)],
        group=group,
    )
    return _first(y, window.small)


def _first(value: Expr, sizes: Sequence[int]) -> Expr:
    """Cut spatial axes to their first entries."""
    axes = list(range(2, 2 + len(sizes)))
    return call("Slice", value, integers([0] * len(sizes)), integers(sizes), integers(axes))


def _correlate(window: Window, large: Expr, small: Expr, dims: tuple[tuple[int, ...], tuple[int, ...]], g: int) -> Expr:
    r"""Return the gradient of a convolution's weight: :math:`\sum_{n, p} small_{n o p}\, large_{n i (p s + k d)}`.

    It is a convolution over the samples, with strides and dilations exchanged, one group of channels at a time; or a
    product of matrices for every tap.

    Args:
        window: How the convolution moves.
        large: What it moves over, shape (N, G i, ...).
        small: Its results' gradient, shape (N, G o, ...).
        dims: Their shapes.
        g: G.

    Returns:
        Shape (G o, i, *kernel).
    """
    n, rank = dims[0][0], len(window.kernel)
    inner, taps = dims[0][1] // g, prod(window.kernel)
    is_strided = max(window.strides, default=1) > 1
    is_one = g > 1 and g == dims[0][1] == dims[1][1] and prod(window.small) >= _FEWEST_PLACES_OF_ONE
    if is_one and taps <= _MOST_TAPS_OF_ONE and not is_strided:
        return _of_each_channel(window, large, small, g)
    if g == 1 and 1 < taps <= _MOST_TAPS and inner >= (_FEWEST_STRIDED if is_strided else _FEWEST_GATHERED):
        return _gathered(window, large, small, (n, inner, dims[1][1]))
    if g == 1 and inner >= _FEWEST_CHANNELS and taps <= _MOST_TAPS:
        return _by_taps(window, large, small, (n, inner, dims[1][1]))
    behind = list(range(3, 3 + rank))
    x = call("Reshape", large, integers([n, g, inner, *window.large]))
    x = call("Reshape", call("Transpose", x, perm=[2, 1, 0, *behind]), integers([inner, g * n, *window.large]))
    w = call("Transpose", small, perm=[1, 0, *(i - 1 for i in behind)])
    y = call(
        "Conv",
        x,
        w,
        strides=list(window.dilations),
        dilations=list(window.strides),
        pads=[*window.before, *(max(b, 0) for b in window.beyond)],
        group=g,
    )
    return call("Transpose", _first(y, window.kernel), perm=[1, 0, *(i - 1 for i in behind)])


def _of_each_channel(window: Window, large: Expr, small: Expr, channels: int) -> Expr:
    """Return `_correlate` where every channel is a group of its own: for every tap a sum of products.

    Args:
        window: How the convolution moves.
        large: What it moves over, shape (N, C, ...).
        small: Its results' gradient, shape (N, C, ...).
        channels: C.
    """
    rank = len(window.kernel)
    axes, places = integers(range(2, 2 + rank)), integers([0, *range(2, 2 + rank)])
    padded = _padded(window, large, 2)
    sums = (call("ReduceSum", call("Mul", met, small), places, keepdims=0) for met in _met(window, padded, axes))
    joined = call("Concat", *(call("Unsqueeze", total, integers([1])) for total in sums), axis=1)
    return call("Reshape", joined, integers([channels, 1, *window.kernel]))


def _gathered(window: Window, large: Expr, small: Expr, sizes: tuple[int, int, int]) -> Expr:
    """Return `_correlate` of one group: what all taps meet side by side, channels last, and one product of matrices.

    Args:
        window: How the convolution moves.
        large: What it moves over, shape (N, I, ...).
        small: Its results' gradient, shape (N, O, ...).
        sizes: N, I and O.
    """
    n, inner, outer = sizes
    rank, rows, taps = len(window.kernel), n * prod(window.small), prod(window.kernel)
    last = [0, *range(2, 2 + rank), 1]
    padded = _padded(window, call("Transpose", large, perm=last), 1)
    met = call("Concat", *_met(window, padded, integers(range(1, 1 + rank))), axis=1 + rank)
    g = call("Reshape", call("Transpose", small, perm=last), integers([rows, outer]))
    product = call("Gemm", g, call("Reshape", met, integers([rows, taps * inner])), transA=1)
    turned = call("Transpose", call("Reshape", product, integers([outer, taps, inner])), perm=[0, 2, 1])
    return call("Reshape", turned, integers([outer, inner, *window.kernel]))


def _by_taps(window: Window, large: Expr, small: Expr, sizes: tuple[int, int, int]) -> Expr:
    """Return `_correlate` of one group: for every tap the product of both tensors where that tap meets the large one.

    Args:
        window: How the convolution moves.
        large: What it moves over, shape (N, I, ...).
        small: Its results' gradient, shape (N, O, ...).
        sizes: N, I and O.
    """
    n, inner, outer = sizes
    rank, places = len(window.kernel), prod(window.small)
    swapped = [1, 0, *range(2, 2 + rank)]
    is_single = places >= _MANY_PLACES and n * inner * outer <= _MOST_PRODUCTS
    g = small if is_single else call("Transpose", small, perm=swapped)
    g = call("Reshape", g, integers([n, outer, places] if is_single else [outer, n * places]))
    found = []
    for met in _met(window, _padded(window, large, 2), integers(range(2, 2 + rank))):
        if is_single:
            turned = call("Transpose", call("Reshape", met, integers([n, inner, places])), perm=[0, 2, 1])
            product = call("ReduceSum", call("MatMul", g, turned), integers([0]), keepdims=0)
        else:
            rows = call("Reshape", call("Transpose", met, perm=swapped), integers([inner, n * places]))
            product = call("Gemm", g, rows, transB=1)
        found.append(call("Unsqueeze", product, integers([2])))
    return call("Reshape", call("Concat", *found, axis=2), integers([outer, inner, *window.kernel]))


def _padded(window: Window, large: Expr, first: int) -> Expr:
    """Return what a window moves over with the zeros around it; its spatial axes begin at the first one given."""
    before, behind = list(window.before), [max(b, 0) for b in window.beyond]
    if not any(before) and not any(behind):
        return large
    lead, rest = [0] * first, [0] * (2 - first)
    return call("Pad", large, integers([*lead, *before, *rest, *lead, *behind, *rest]))


def _met(window: Window, padded: Expr, axes: Expr) -> Iterator[Expr]:
    """Yield, for one tap after the other, what it meets in all places, of the shape of the results."""
    for tap in np.ndindex(*window.kernel):
        first = [t * d for t, d in zip(tap, window.dilations, strict=True)]
        last = [f + s * (size - 1) + 1 for f, s, size in zip(first, window.strides, window.small, strict=True)]
        yield call("Slice", padded, integers(first), integers(last), axes, integers(window.strides))


def _ones(site: Site, name: str, rank: int) -> list[int]:
    return [int(s) for s in site.attribute(name) or [1] * rank]


def conv(site: Site) -> Gradients:
    """Conv: back by the transposed convolution with the same filters."""
    large, kernel = site.dims_in(), site.dims_in(1)[2:]
    strides, dilations = (_ones(site, name, len(kernel)) for name in ("strides", "dilations"))
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    auto_pad = site.attribute("auto_pad", b"NOTSET").decode()
    pads = convolution_pads(auto_pad, large[2:], extent, strides, site.attribute("pads", []))
    window = Window(kernel, strides, dilations, [before for before, _ in pads], large[2:], site.dims_out()[2:])
    group = int(site.attribute("group", 1))
    is_depthwise = group == large[1] == site.dims_out()[1]
    return {
        0: _back(window, site.g, site.input(1), group, is_depthwise=is_depthwise),
        1: _correlate(window, site.x, site.g, (large, site.dims_out()), group),
        2: _per_channel(site),
    }


def conv_transpose(site: Site) -> Gradients:
    """ConvTranspose: back by the convolution with the same filters."""
    small, large, kernel = site.dims_in(), site.dims_out(), site.dims_in(1)[2:]
    strides, dilations = (_ones(site, name, len(kernel)) for name in ("strides", "dilations"))
    more = [int(p) for p in site.attribute("output_padding") or [0] * len(kernel)]
    pads = site.attribute("pads")
    auto_pad = site.attribute("auto_pad", b"NOTSET").decode()
    before = [int(p) for p in (pads or [0] * 2 * len(kernel))[: len(kernel)]]
    if auto_pad.startswith("SAME") or site.attribute("output_shape"):
        for i, (k, d, s) in enumerate(zip(kernel, dilations, strides, strict=True)):
            total = max(s * (small[2 + i] - 1) + more[i] + (k - 1) * d + 1 - large[2 + i], 0)
            before[i] = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
    window = Window(kernel, strides, dilations, before, large[2:], small[2:])
    group = int(site.attribute("group", 1))
    return {
        0: _gather(window, site.g, site.input(1), group),
        1: _correlate(window, site.g, site.x, (large, small), group),
        2: _per_channel(site),
    }


def _per_channel(site: Site) -> Expr:
    axes = [i for i in range(len(site.dims_out())) if i != 1]
    return call("ReduceSum", site.g, integers(axes), keepdims=0)


def gemm(site: Site) -> Gradients:
    """Gemm: Y = alpha A' B' + beta C."""
    a, b, g = site.x, site.input(1), site.g
    ta, tb = (int(site.attribute(name, 0)) for name in ("transA", "transB"))
    alpha, beta = float(site.attribute("alpha", 1.0)), float(site.attribute("beta", 1.0))
    da = call("Gemm", b, g, transA=tb, transB=1, alpha=alpha) if ta else call("Gemm", g, b, transB=1 - tb, alpha=alpha)
    db = call("Gemm", g, a, transA=1, transB=ta, alpha=alpha) if tb else call("Gemm", a, g, transA=1 - ta, alpha=alpha)
    found: dict[int, Expr | None] = {0: da, 1: db}
    if site.has(2):
        found[2] = site.fitted(g * beta, 2)
    return found


def matmul(site: Site) -> Gradients:
    """MatMul, with vectors as matrices of one row or column, and stacks of matrices broadcast."""
    first, second = site.dims_in(0), site.dims_in(1)
    left = first if len(first) > 1 else (1, *first)
    right = second if len(second) > 1 else (*second, 1)
    # The product as it would be without vectors.
    stack = site.dims_out()[: max(len(left), len(right)) - 2]
    product = (*stack, left[-2], right[-1])
    g = call("Reshape", site.g, integers(product), allowzero=1)
    a = call("Reshape", site.x, integers(left), allowzero=1)
    b = call("Reshape", site.input(1), integers(right), allowzero=1)
    da = call("MatMul", g, _turned(b, len(right)))
    db = call("MatMul", _turned(a, len(left)), g)
    return {
        0: _shaped(summed_to(da, (*stack, *left[-2:]), left), first),
        1: _shaped(summed_to(db, (*stack, *right[-2:]), right), second),
    }


def _turned(value: Expr, rank: int) -> Expr:
    return call("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])


def _shaped(value: Expr, dims: Sequence[int]) -> Expr:
    return call("Reshape", value, integers(dims), allowzero=1)


def einsum(site: Site) -> Gradients:
    """Einsum: linear in each operand, whose gradient is an Einsum of the output's with the other operands."""
    equation = bytes(site.attribute("equation")).decode().replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    sizes: dict[str, int] = {}
    if not arrow or "." in equation or any(len(set(term)) < len(term) for term in terms):
        site.refuse(f"the form {equation!r} of its equation is not known")
    for slot, term in enumerate(terms):
        for letter, size in zip(term, site.dims_in(slot), strict=True):
            if sizes.setdefault(letter, size) != size:
                site.refuse(f"it repeats an axis of size 1 for {letter!r}")
    found: dict[int, Expr | None] = {}
    for slot, term in enumerate(terms):
        others = [other for other in range(len(terms)) if other != slot]
        known = {*result, *(letter for other in others for letter in terms[other])}
        kept = "".join(letter for letter in term if letter in known)
        asked = f"{','.join([result, *(terms[other] for other in others)])}->{kept}"
        g: Expr = call("Einsum", site.g, *(site.input(other) for other in others), equation=asked)
        if kept != term:
            # What is only summed over gets the same gradient everywhere.
            apart = call("Reshape", g, integers([sizes[letter] if letter in known else 1 for letter in term]))
            g = call("Expand", apart, integers([sizes[letter] for letter in term]))
        found[slot] = g
    return found


RULES = (
    Rule("Conv", conv),
    Rule("ConvTranspose", conv_transpose),
    Rule("Gemm", gemm),
    Rule("MatMul", matmul),
    Rule("Einsum", einsum, since=12),
)
