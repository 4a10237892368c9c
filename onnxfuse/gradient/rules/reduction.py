"""Reductions over axes; the gradient is spread over what was reduced."""

import math
from collections.abc import Callable

from onnxfuse.gradient.expressions import Expr, Gradients, Rule, Site, call, integers
from onnxfuse.gradient.rules.pooling import to_the_largest

__all__ = ["RULES"]

# The version from which the axes are an input.
_AXES_AS_INPUT = {"ReduceSum": 13}
_OTHERS_AS_INPUT = 18


def _reduction(spread: Callable[[Site, list[int], Expr, Expr], Expr]) -> Callable[[Site], Gradients]:
    """Make a rule from a formula in terms of the reduced axes, the gradient and the output, both with axes kept."""

    def rule(site: Site) -> Gradients:
        dims = site.dims_in()
        axes = site.listed("axes", 1, _AXES_AS_INPUT.get(site.node.op, _OTHERS_AS_INPUT))
        if not axes:
            if site.attribute("noop_with_empty_axes", 0):
                return {0: site.g}
            axes = list(range(len(dims)))
        axes = sorted({axis % len(dims) for axis in axes})
        kept = integers([1 if i in axes else size for i, size in enumerate(dims)])
        g, y = (call("Reshape", value, kept) for value in (site.g, site.y))
        return {0: spread(site, axes, g, y)}

    return rule


def _evenly(site: Site, _axes: list[int], g: Expr, _y: Expr) -> Expr:
    return call("Expand", g, integers(site.dims_in()))


def _mean(site: Site, axes: list[int], g: Expr, _y: Expr) -> Expr:
    count = math.prod(site.dims_in()[axis] for axis in axes)
    return call("Expand", g * (1.0 / count), integers(site.dims_in()))


def _squares(site: Site, _axes: list[int], g: Expr, _y: Expr) -> Expr:
    return 2.0 * site.x * g


def _length(site: Site, _axes: list[int], g: Expr, y: Expr) -> Expr:
    return site.x * (g / y)


def _magnitudes(site: Site, _axes: list[int], g: Expr, _y: Expr) -> Expr:
    return call("Sign", site.x) * g


RULES = (
    Rule("ReduceSum", _reduction(_evenly)),
    Rule("ReduceMean", _reduction(_mean)),
    Rule("ReduceSumSquare", _reduction(_squares)),
    Rule("ReduceL1", _reduction(_magnitudes)),
    Rule("ReduceL2", _reduction(_length)),
    Rule("ReduceMax", _reduction(to_the_largest)),
    Rule("ReduceMin", _reduction(to_the_largest)),
)
