"""Pools: means over places, and maxima over places as of numbers that are alike in pairs."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import prod
from statistics import NormalDist

import numpy as np

from onnxfuse.analytic.moments import Made, Moments, Rule, Site, Unknown, clipped, scaled_rows, tap_correlations
from onnxfuse.analytic.rules.elementwise import activated
from onnxfuse.arrays import FloatArray, IntArray

__all__ = ["RULES", "mean_over", "mean_similarity"]

_POINTS = 20_001
_STANDARD = NormalDist()
Pool = Callable[[Moments, FloatArray, float], Sequence[Made] | Unknown]


def average_pool(site: Site) -> Sequence[Made] | Unknown:
    """AveragePool: variances fall by as much as the places of a window differ; its zeros count as more of the same."""
    return _windowed(site, partial(_average, site))


def max_pool(site: Site) -> Sequence[Made] | Unknown:
    """MaxPool: see `_maximum`."""
    return _windowed(site, partial(_maximum, site))


def _windowed(site: Site, pool: "Pool") -> Sequence[Made] | Unknown:
    x, axes = site.x, range(2, len(site.dims_in()))
    if x.axis != 1 or len([name for name in site.node.outputs if name]) != 1:
        return site.unknown("channels are not on axis 1, or indices are asked for")
    kernel = [int(k) for k in site.attribute("kernel_shape")]
    strides, dilations = ([int(s) for s in site.attribute(n) or [1] * len(axes)] for n in ("strides", "dilations"))
    offsets: list[IntArray] = [np.arange(k) * d for k, d in zip(kernel, dilations, strict=True)]
    decay = [x.decay[axis] for axis in axes]
    alike = tap_correlations(decay, offsets, [0] * len(axes))
    total, found = float(alike.sum()), [0.0, 0.0]
    for number in range(len(axes)):
        shift = [stride if i == number else 0 for i, stride in enumerate(strides)]
        further = float(tap_correlations(decay, offsets, shift).sum())
        found.append(clipped(further / total) if total > 0 else 0.0)
    return pool(Moments(1, x.mean, x.covariance, tuple(found)), alike, total / alike.size)


def _average(site: Site, x: Moments, alike: FloatArray, similarity: float) -> Sequence[Made] | Unknown:
    seen = float(alike.mean(axis=1)[len(alike) // 2])
    moments = Moments(x.axis, x.mean, similarity * x.covariance, x.decay)
    return [Made(moments, {site.name(0): scaled_rows(np.full(len(x.mean), seen))})]


def _maximum(site: Site, x: Moments, alike: FloatArray, similarity: float) -> Sequence[Made] | Unknown:
    r"""The largest of n numbers that are alike in pairs, :math:`z = \sqrt r c + \sqrt{1 - r} e`.

    Their largest is :math:`\sqrt r c + \sqrt{1 - r} M_n`, with M_n the largest of n independent ones, of mean
    :math:`\mu_n` and variance :math:`v_n`; r is the mean over the pairs. Of M_n the share 1 / n is linear in the
    numbers (by Stein's lemma each moves it by 1 / n), and what is left is taken for quadratic: so channels whose
    numbers correlate by :math:`\rho` have :math:`\rho / n + (v_n - 1 / n) \rho^2` of M_n in common. Where the values
    come from Gaussian ones by a function that never falls, the largest is that of these.
    """
    count = len(alike)
    pairs = count * (count - 1)
    r = float(np.clip((similarity * count**2 - count) / pairs, 0.0, 1.0)) if pairs else 1.0
    source = site.sources[site.name(0)]
    rising = bool(source.nodes) and _never_falls(site, source.moments)
    z = source.moments if rising else site.x
    middle, spread = _largest(count)
    mean = z.mean + np.sqrt(z.variance * (1.0 - r)) * middle
    deviation = np.sqrt(z.variance)
    size = np.outer(deviation, deviation)
    rho = np.divide(z.covariance, size, out=np.zeros_like(size), where=size > 0)
    largest = size * (rho / count + (spread - 1.0 / count) * np.square(rho))
    moments = Moments(x.axis, mean, r * z.covariance + (1.0 - r) * largest, x.decay)
    # The place where something else is seen is the largest one time in n.
    gain, name = np.full(len(z.mean), r + (1.0 - r) / count), site.name(0)
    if rising:
        function = site.function(source.name, name, source.nodes)
        moments, slopes = activated(function, moments)
        gain, name = gain * slopes, source.name
    return [Made(moments, {name: scaled_rows(gain)})]


def _never_falls(site: Site, z: Moments) -> bool:
    """Whether f rises or stays wherever z gets to."""
    source = site.sources[site.name(0)]
    deviation = float(np.sqrt(z.variance).max(initial=0.0))
    reach = float(np.abs(z.mean).max(initial=0.0)) + 6.0 * deviation
    values = site.function(source.name, site.name(0), source.nodes)(np.linspace(-reach, reach, 501)[None])
    return bool(np.isfinite(values).all() and (np.diff(values[0]) >= -1e-6 * reach).all())


@cache
def _largest(count: int) -> tuple[float, float]:
    """Return mean and variance of the largest of so many standard normal numbers, by quantiles."""
    share = (np.arange(_POINTS) + 0.5) / _POINTS
    values = np.array([_STANDARD.inv_cdf(float(s ** (1.0 / count))) for s in share])
    return float(values.mean()), float(values.var())


def mean_similarity(decay: float, count: int) -> float:
    """Return the mean correlation of two of so many places in a row, the same one included.

    Example:
        >>> mean_similarity(0.5, 2)
        0.75
    """
    gaps = np.arange(1, count)
    return float((count + 2.0 * ((count - gaps) * np.power(float(decay), gaps)).sum()) / count**2)


def mean_over(site: Site, axes: Sequence[int], *, keeps: bool) -> Sequence[Made] | Unknown:
    """The mean over some axes of places."""
    x, dims = site.x, site.dims_in()
    taken = {axis % len(dims) for axis in axes}
    if x.axis in taken or 0 in taken:
        return site.unknown("it is over the channels, or over samples")
    similarity = prod(mean_similarity(x.decay[axis], dims[axis]) for axis in taken)
    decay = [1.0 if axis in taken else rho for axis, rho in enumerate(x.decay)]
    axis = x.axis
    if not keeps:
        decay = [rho for i, rho in enumerate(decay) if i not in taken]
        axis -= len([a for a in taken if a < x.axis])
    moments = Moments(axis, x.mean, similarity * x.covariance, tuple(decay))
    return [Made(moments, {site.name(0): scaled_rows(np.full(len(x.mean), similarity))})]


def global_average_pool(site: Site) -> Sequence[Made] | Unknown:
    """GlobalAveragePool: the mean over all places."""
    return mean_over(site, range(2, len(site.dims_in())), keeps=True)


def reduce_mean(site: Site) -> Sequence[Made] | Unknown:
    """ReduceMean over places."""
    axes = site.listed("axes", 1)
    if not axes:
        return site.unknown("its axes are computed, or all")
    return mean_over(site, axes, keeps=bool(site.attribute("keepdims", 1)))


def global_max_pool(site: Site) -> Sequence[Made] | Unknown:
    """GlobalMaxPool: the largest of all places."""
    x, dims = site.x, site.dims_in()
    if x.axis != 1:
        return site.unknown("channels are not on axis 1")
    count = prod(dims[2:])
    similarity = prod(mean_similarity(rho, size) for rho, size in zip(x.decay[2:], dims[2:], strict=True))
    still = Moments(1, x.mean, x.covariance, (0.0, 0.0, *([1.0] * (len(dims) - 2))))
    return _maximum(site, still, np.broadcast_to(1.0, (count, 1)), similarity)


RULES = (
    Rule("AveragePool", average_pool),
    Rule("MaxPool", max_pool),
    Rule("GlobalAveragePool", global_average_pool),
    Rule("GlobalMaxPool", global_max_pool),
    Rule("ReduceMean", reduce_mean),
)
