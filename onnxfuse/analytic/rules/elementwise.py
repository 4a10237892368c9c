"""Functions of every number by itself: by Hermite expansion, of the last value that is taken as Gaussian.

A chain of such functions, also one that parts and meets again (x sigmoid(x), or GELU written out), is one function of
where it began; so what an activation makes is not taken as Gaussian before something else is done with it.
"""

from collections.abc import Sequence
from math import prod

import numpy as np

from onnxfuse.analytic.moments import Made, Moments, Rule, Site, Source, Unknown, clipped, scaled_rows
from onnxfuse.analytic.rules.combination import combined
from onnxfuse.arrays import FloatArray
from onnxfuse.coupling.rules.elementwise import UNARY
from onnxfuse.statistics.gaussian import Elementwise, gaussian_moments, hermite_coefficients

__all__ = ["RULES", "activated"]

_ARITHMETIC = ("Add", "Div", "Max", "Mean", "Min", "Mul", "Pow", "Sub", "Sum")
_LOGICAL = frozenset({"Cast", "IsInf", "IsNaN", "Not", "BitwiseNot"})
_TERMS = 24


def unary(site: Site) -> Sequence[Made] | Unknown:
    """One tensor in, one out; further inputs are single numbers (Clip's bounds)."""
    found = composed(site)
    return site.unknown("it is no function of single numbers") if found is None else [found]


def arithmetic(site: Site) -> Sequence[Made] | Unknown:
    """Sums, products and the like: of values with one source a function of it, else of two tensors."""
    found = composed(site)
    return combined(site) if found is None else [found]


def prelu(site: Site) -> Sequence[Made] | Unknown:
    """PRelu: relu(z) - a relu(-z) with a slope for every channel, so two activations of one vector (z, -z)."""
    x, slope = site.x, site.constant(1)
    if slope is None or slope.size not in {1, len(x.mean)}:
        return site.unknown("its slopes are computed, or not one for every channel")
    a, count = np.broadcast_to(slope.reshape(-1), len(x.mean)), len(x.mean)
    both = np.block([[x.covariance, -x.covariance], [-x.covariance, x.covariance]])
    mean, joint = gaussian_moments(_relu, np.concatenate([x.mean, -x.mean]), both)
    join = np.concatenate([np.diag(np.ones(count)), -np.diag(a)], axis=1)
    slopes = join @ np.concatenate([_slopes(_relu, x.mean, x), -_slopes(_relu, -x.mean, x)])
    # How fast it changes from place to place as if all slopes were one.
    typical, _ = activated(lambda z: np.where(z > 0, z, a.mean() * z), x)
    moments = Moments(x.axis, join @ mean, join @ joint @ join.T, typical.decay)
    return [Made(moments, {site.name(0): scaled_rows(slopes)})]


def _relu(x: FloatArray) -> FloatArray:
    return np.maximum(x, 0.0)


def _slopes(function: Elementwise, mean: FloatArray, like: Moments) -> FloatArray:
    """Return E[f'(z_i)] for the deviations of some channels, shape (C,)."""
    deviation = np.sqrt(like.variance)
    first = hermite_coefficients(function, mean, deviation, 2)[:, 1]
    return np.divide(first, deviation, out=np.zeros_like(first), where=deviation > 0)


def activated(function: Elementwise, z: Moments) -> tuple[Moments, FloatArray]:
    """Return the moments of f(z), and how z moves it, shape (C,)."""
    mean, covariance = gaussian_moments(function, z.mean, z.covariance)
    coefficients = hermite_coefficients(function, z.mean, np.sqrt(z.variance), _TERMS)
    # Of how much of the variance each power has, all channels together, follows how fast f(z) changes with the place.
    power = np.square(coefficients[:, 1:]).sum(axis=0)
    total = float(np.diag(covariance).sum())
    rest = max(total - float(power.sum()), 0.0)
    powers = np.arange(1, _TERMS)
    decay = [
        clipped((float(power @ np.power(rho, powers)) + rest * rho**_TERMS) / total) if total > 0 else 0.0
        for rho in z.decay
    ]
    return Moments(z.axis, mean, covariance, tuple(decay)), _slopes(function, z.mean, z)


def composed(site: Site) -> Made | None:
    """Return what a node makes as a function of one source; None if it has several, or constants with more numbers."""
    names = [name for name in site.node.inputs if name]
    computed = list(dict.fromkeys(name for name in names if name in site.known))
    numbers = [name for name in names if name not in site.known]
    sources = [site.sources[name] for name in computed]
    first = sources[0]
    is_one = all(source.name == first.name and source.moments is first.moments for source in sources)
    if not is_one or any((c := site.constants(name)) is None or prod(c.shape) != 1 for name in numbers):
        return None
    dims = site.dims_out()
    if any(site.dims[name] != dims for name in computed) or len(first.moments.decay) != len(dims):
        return None
    nodes = {node.index: node for source in sources for node in source.nodes} | {site.node.index: site.node}
    source = Source(first.name, first.moments, tuple(nodes[i] for i in sorted(nodes)))
    function = site.function(first.name, site.node.outputs[0], source.nodes)
    moments, slopes = activated(function, first.moments)
    return Made(moments, {first.name: scaled_rows(slopes)}, source)


RULES = (
    *(Rule(op, unary) for op in UNARY if op not in _LOGICAL),
    *(Rule(op, arithmetic) for op in _ARITHMETIC),
    Rule("PRelu", prelu),
)
