"""Pools: an average hands its gradient to all it read, a maximum to the element that it took."""

import math

import numpy as np

from onnxfuse.gradient.expressions import AnyArray, Expr, Gradients, Literal, Rule, Site, call, integers
from onnxfuse.gradient.rules.linear import Window, spread
from onnxfuse.statistics.patches import convolution_pads

__all__ = ["RULES"]


def _window(site: Site) -> tuple[Window, list[int]]:
    """Return how a pool moves, and the zeros after each axis."""
    large, small = site.dims_in()[2:], site.dims_out()[2:]
    kernel = [int(k) for k in site.attribute("kernel_shape")]
    strides, dilations = ([int(s) for s in site.attribute(n) or [1] * len(kernel)] for n in ("strides", "dilations"))
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    auto_pad = site.attribute("auto_pad", b"NOTSET").decode()
    pads = convolution_pads(auto_pad, large, extent, strides, site.attribute("pads", []))
    return Window(kernel, strides, dilations, [p for p, _ in pads], large, small), [p for _, p in pads]


def average_pool(site: Site) -> Gradients:
    """AveragePool: by a transposed convolution of every channel with ones."""
    window, after = _window(site)
    counts: AnyArray = np.ones(())
    padded = bool(site.attribute("count_include_pad", 0))
    for axis in range(len(window.kernel)):
        counts = np.multiply.outer(counts, _counted(window, after, axis, padded=padded))
    n, c = site.dims_in()[:2]
    g = call("Reshape", site.g / Literal(counts[None, None]), integers([n * c, 1, *window.small]))
    back = spread(window, g, Literal(np.ones((1, 1, *window.kernel))), 1)
    return {0: call("Reshape", back, integers(site.dims_in()))}


def _counted(window: Window, after: list[int], axis: int, *, padded: bool) -> AnyArray:
    """Return over how many elements each place takes the mean, along one axis."""
    starts = np.arange(window.small[axis]) * window.strides[axis] - window.before[axis]
    taps = starts[:, None] + np.arange(window.kernel[axis]) * window.dilations[axis]
    low, high = (-window.before[axis], window.large[axis] + after[axis]) if padded else (0, window.large[axis])
    found: AnyArray = ((taps >= low) & (taps < high)).sum(axis=1).astype(np.float64)
    return found


def max_pool(site: Site) -> Gradients:
    """MaxPool: to where the operator itself says that it took the maximum from."""
    if site.attribute("storage_order", 0):
        site.refuse("its indices are column-major")
    dims = site.dims_in()
    names = ("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides")
    told = {name: site.attribute(name) for name in names if site.attribute(name) is not None}
    places = call("MaxPool", site.x, output=1, **told)
    nothing = Literal(np.zeros(math.prod(dims)))
    flat = integers([-1])
    added = call(
        "ScatterElements",
        nothing,
        call("Reshape", places, flat),
        call("Reshape", site.g, flat),
        axis=0,
        reduction="add",
    )
    return {0: call("Reshape", added, integers(dims))}


def global_average_pool(site: Site) -> Gradients:
    """GlobalAveragePool: evenly to all places."""
    dims = site.dims_in()
    return {0: call("Expand", site.g * (1.0 / math.prod(dims[2:])), integers(dims))}


def global_max_pool(site: Site) -> Gradients:
    """GlobalMaxPool: to the largest; those that tie share."""
    return {0: to_the_largest(site, list(range(2, len(site.dims_in()))), site.g, site.y)}


def to_the_largest(site: Site, axes: list[int], g: Expr, y: Expr) -> Expr:
    """Return the gradient through a maximum (or minimum) over axes that are kept as size 1 in ``g`` and ``y``."""
    taken = call("Where", call("Equal", site.x, y), 1.0, 0.0)
    return taken * (g / call("ReduceSum", taken, integers(axes), keepdims=1))


RULES = (
    Rule("AveragePool", average_pool),
    Rule("MaxPool", max_pool),
    Rule("GlobalAveragePool", global_average_pool),
    Rule("GlobalMaxPool", global_max_pool),
)
