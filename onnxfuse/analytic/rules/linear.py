"""Convolutions and products with a constant matrix: covariances become W S W^T, summed over taps."""

from collections.abc import Sequence

import numpy as np

from onnxfuse.analytic.moments import Gain, Made, Moments, Rule, Site, Unknown, clipped, tap_correlations
from onnxfuse.analytic.rules.combination import per_channel
from onnxfuse.arrays import FloatArray, IntArray
from onnxfuse.statistics.patches import convolution_pads, taps_in_sight

__all__ = ["RULES"]


def conv(site: Site) -> Sequence[Made] | Unknown:
    r"""Conv: :math:`S_y = \sum_{t, t'} \kappa(t - t') W_t S W_{t'}^T`, of any group, stride and dilation."""
    x, weight = site.x, site.constant(1)
    if weight is None or x.axis != 1:
        return site.unknown("its weight is computed, or channels are not on axis 1")
    groups, axes = int(site.attribute("group", 1)), range(2, len(site.dims_in()))
    strides, dilations = ([int(s) for s in site.attribute(n) or [1] * len(axes)] for n in ("strides", "dilations"))
    extent = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    auto_pad = site.attribute("auto_pad", b"NOTSET").decode()
    pads = convolution_pads(auto_pad, site.dims_in()[2:], extent, strides, site.attribute("pads", []))
    offsets: list[IntArray] = [np.arange(k) * d for k, d in zip(weight.shape[2:], dilations, strict=True)]
    decay = [x.decay[axis] for axis in axes]
    taps = _Taps(weight.reshape(groups, len(weight) // groups, weight.shape[1], -1), x.covariance)
    alike = tap_correlations(decay, offsets, [0] * len(axes))
    shares = taps.shares
    total = float(np.vdot(alike, shares))
    found = [0.0, 0.0]
    for number in range(len(axes)):
        shift = [stride if i == number else 0 for i, stride in enumerate(strides)]
        further = float(np.vdot(tap_correlations(decay, offsets, shift), shares))
        found.append(clipped(further / total) if total > 0 else 0.0)
    in_sight = taps_in_sight(site.dims_in()[2:], pads, weight.shape[2:], strides, dilations)
    mean = taps.weight @ in_sight @ x.mean.reshape(groups, -1, 1)
    bias = site.constant(2)
    # What else is at a place goes with the tap that reads there, and less with its neighbours.
    seen: FloatArray = np.ones(1)
    for rho, at, (before, _) in zip(decay, offsets, pads, strict=True):
        seen = np.asarray(np.kron(seen, np.power(float(rho), np.abs(at - before).astype(np.int64))), np.float64)
    made = Moments(1, mean.reshape(-1) + (0.0 if bias is None else bias), taps.covariance(alike), tuple(found))
    return [Made(made, {site.name(0): _grouped_gain(taps.weight @ seen)})]


class _Taps:
    """A filter bank, and what the channels that it reads have in common.

    Args:
        weight: Shape (G, O, C, T), float64.
        covariance: Of all G C channels.
    """

    def __init__(self, weight: FloatArray, covariance: FloatArray) -> None:
        self.weight, self.groups = weight, len(weight)
        inputs = weight.shape[2]
        # (G, C, G, C): of the channels of one group with those of another.
        self.blocks = covariance.reshape(self.groups, inputs, self.groups, inputs)

    @property
    def shares(self) -> FloatArray:
        """What the covariance of two taps adds to all variances, tr W_t S W_t'^T, shape (T, T)."""
        found = np.zeros((self.weight.shape[3],) * 2)
        for number, bank in enumerate(self.weight):
            own = self.blocks[number, :, number]
            # (O, C, T) with (C, C) -> (O, C, T)
            heard = np.einsum("cd,odt->oct", own, bank, optimize=True)
            found += np.einsum("oct,ocs->ts", bank, heard, optimize=True)
        return found

    def covariance(self, alike: FloatArray) -> FloatArray:
        """Return the covariance of all outputs for given correlations of taps, shape (G O, G O)."""
        groups, outputs, inputs, _ = self.weight.shape
        smoothed = self.weight @ alike
        if inputs == 1:
            rows = self.weight.reshape(groups * outputs, -1)
            own = np.repeat(np.repeat(self.blocks[:, 0, :, 0], outputs, axis=0), outputs, axis=1)
            return symmetric(own * (rows @ smoothed.reshape(groups * outputs, -1).T))
        found = np.empty((groups, outputs, groups, outputs))
        for number, bank in enumerate(self.weight):
            for other in range(groups):
                heard = np.einsum("oct,cd->odt", bank, self.blocks[number, :, other], optimize=True)
                found[number, :, other] = heard.reshape(outputs, -1) @ smoothed[other].reshape(outputs, -1).T
        return symmetric(found.reshape(groups * outputs, -1))


def _grouped_gain(weight: FloatArray) -> Gain:
    """Return the gain of a matrix for each group, shape (G, O, C)."""
    groups, outputs, inputs = weight.shape
    return lambda cross: (weight @ cross.reshape(groups, inputs, -1)).reshape(groups * outputs, -1)


def symmetric(matrix: FloatArray) -> FloatArray:
    """Return a matrix without what rounding makes asymmetric."""
    return 0.5 * (matrix + matrix.T)


def product(x: Moments, matrix: FloatArray, axis: int, name: str) -> Made:
    """Return what a matrix, shape (O, C), makes of channels."""
    covariance = symmetric(matrix @ x.covariance @ matrix.T)
    return Made(Moments(axis, matrix @ x.mean, covariance, x.decay), {name: lambda cross: matrix @ cross})


def gemm(site: Site) -> Sequence[Made] | Unknown:
    """Gemm: rows times a constant matrix, and a constant bias."""
    weight, bias = site.constant(1), site.constant(2)
    is_computed = bool(site.name(2)) and bias is None
    if weight is None or is_computed or site.attribute("transA", 0) or site.x.axis != 1:
        return site.unknown("an operand is computed, or transposed")
    matrix = site.attribute("alpha", 1.0) * (weight if site.attribute("transB", 0) else weight.T)
    made = product(site.x, matrix, 1, site.name(0))
    if bias is None:
        return [made]
    shift = per_channel(bias, site.dims_out(), 1)
    if shift is None:
        return site.unknown("its bias is another one for every row")
    m = made.moments
    moments = Moments(1, m.mean + site.attribute("beta", 1.0) * shift, m.covariance, m.decay)
    return [Made(moments, made.gains)]


def matmul(site: Site) -> Sequence[Made] | Unknown:
    """MatMul: rows times a constant matrix, or a constant matrix times columns."""
    left, right = site.constant(0), site.constant(1)
    if (left is None) == (right is None):
        return site.unknown("both operands are computed")
    x = site.known[site.name(0 if left is None else 1)]
    rank = len(x.decay)
    if left is None and right is not None and right.ndim == 2 and rank > 1 and x.axis == rank - 1:
        return [product(x, right.T, rank - 1, site.name(0))]
    if left is not None and left.ndim == 2 and rank > 1 and x.axis == rank - 2:
        return [product(x, left, rank - 2, site.name(1))]
    return site.unknown("channels are not on the axis that is summed over")


RULES = (Rule("Conv", conv), Rule("Gemm", gemm), Rule("MatMul", matmul))
