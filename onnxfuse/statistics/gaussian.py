r"""Moments of activations of jointly Gaussian channels, without a sample: by Hermite expansion.

Channels z with means m, deviations s and correlations :math:`\rho` become h = f(z), each by itself. With the normalised
Hermite polynomials of x ~ N(0, 1) (Mehler's formula; dual activations: Daniely, Frostig and Singer, "Toward deeper
understanding of neural networks", NeurIPS 2016; for ReLU the arc-cosine kernel: Cho and Saul, NeurIPS 2009),

.. math::
    c_k(i) = E[f(m_i + s_i x) He_k(x)] / \sqrt{k!}, \quad
    E[h_i] = c_0(i), \quad Cov(h_i, h_j) = \sum_{k \ge 1} c_k(i) c_k(j) \rho_{ij}^k

A linear map of z is Gaussian too, so the same holds for f(A z), and for z and A z together: any fusion can be judged by
means and correlations alone. Batch normalisation states the former of what it gives.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from onnxfuse.arrays import FloatArray

__all__ = ["Elementwise", "gaussian_moments", "hermite_coefficients"]

Elementwise: TypeAlias = Callable[[FloatArray], FloatArray]
"""A function of every number by itself, for arrays of any shape."""

# The last power takes all that is left of the series: see `gaussian_moments`. It is even, since what is left of ReLU at
# a mean of 0 is.
_TERMS = 24
# Of a kink Gauss-Hermite quadrature is wrong by the inverse of the number of points, the trapezoid rule by that of
# its square; and of smooth functions, under a Gaussian, it is as exact (Trefethen and Weideman, SIAM Review 2014).
_POINTS = np.linspace(-9.0, 9.0, 1801)
# How many channels to evaluate at once: 15 MB.
_CHUNK = 1024


def hermite_coefficients(function: Elementwise, mean: FloatArray, deviation: FloatArray, terms: int) -> FloatArray:
    r"""Return :math:`c_k(i) = E[f(m_i + s_i x) He_k(x)] / \sqrt{k!}` for x ~ N(0, 1).

    Args:
        function: f.
        mean: m, shape (C,), float64.
        deviation: s, shape (C,), float64, ``>= 0``.
        terms: How many, from k = 0 on.

    Returns:
        Shape (C, terms), float64.

    Example:
        >>> hermite_coefficients(np.square, np.array([1.0]), np.array([2.0]), 3).round(6).tolist()
        [[5.0, 4.0, 5.656854]]
    """
    return _expanded(function, mean, deviation, terms)[0]


def gaussian_moments(function: Elementwise, mean: FloatArray, covariance: FloatArray) -> tuple[FloatArray, FloatArray]:
    r"""Return mean and covariance of f(z) for Gaussian z.

    The series ends after 23 terms. What a channel's variance has beyond them, t, is known, and goes into one more term
    :math:`\sqrt{t_i t_j} \rho_{ij}^{24}`: so variances are exact, so are covariances of copies of one channel, and the
    result is positive semidefinite whenever the correlations are (Schur's product theorem). What is left is an error of
    some 0.1 % of the variance for a kink and 2 % for a jump.

    Args:
        function: f; finite on what Gaussian numbers reach (nine deviations).
        mean: Shape (C,), float64.
        covariance: Shape (C, C), float64, positive semidefinite.

    Returns:
        Mean, shape (C,), and covariance, shape (C, C), float64.

    Example:
        >>> relu = lambda x: np.maximum(x, 0.0)
        >>> mean, covariance = gaussian_moments(relu, np.zeros(2), np.array([[1.0, -1.0], [-1.0, 1.0]]))
        >>> mean.round(4).tolist(), covariance.round(4).tolist()
        ([0.3989, 0.3989], [[0.3408, -0.1592], [-0.1592, 0.3408]])
    """
    deviation = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    coefficients, variance = _expanded(function, mean, deviation, _TERMS)
    rest = np.sqrt(np.maximum(variance - np.square(coefficients[:, 1:]).sum(axis=1), 0.0))
    scale = np.outer(deviation, deviation)
    correlation = np.clip(np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 0), -1.0, 1.0)
    # A channel that never changes has no term but the first.
    np.fill_diagonal(correlation, 1.0)
    # Horner's rule, from the last power down.
    total = np.outer(rest, rest)
    for k in range(_TERMS - 1, 0, -1):
        total = total * correlation + np.outer(coefficients[:, k], coefficients[:, k])
    return coefficients[:, 0], total * correlation


def _expanded(
    function: Elementwise, mean: FloatArray, deviation: FloatArray, terms: int
) -> tuple[FloatArray, FloatArray]:
    """Return coefficients, shape (C, terms), and variances, shape (C,)."""
    weights = np.exp(-0.5 * np.square(_POINTS))
    weights /= weights.sum()
    basis = _hermite_polynomials(_POINTS, terms) * weights
    found, variance = np.empty((len(mean), terms)), np.empty(len(mean))
    for start in range(0, len(mean), _CHUNK):
        part = np.s_[start : start + _CHUNK]
        values = function(mean[part, None] + deviation[part, None] * _POINTS)
        found[part] = values @ basis.T
        variance[part] = np.square(values - found[part, :1]) @ weights
    return found, variance


def _hermite_polynomials(x: FloatArray, terms: int) -> FloatArray:
    r"""Return :math:`He_k(x) / \sqrt{k!}` for k below ``terms``, shape (terms, n), by their recurrence."""
    found = np.ones((terms, len(x)))
    for k in range(1, terms):
        before = found[k - 2] * np.sqrt(k - 1) if k > 1 else 0.0
        found[k] = (x * found[k - 1] - before) / np.sqrt(k)
    return found
