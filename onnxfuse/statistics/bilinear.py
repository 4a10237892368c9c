r"""Channels of products of two computed tensors, :math:`q^T k`, as in the scores of an attention.

With q mapped by A and k by B transposed, scores become :math:`q^T A^T B^T k`. For independent q and k with second
moments S and T, they miss

.. math:: J(A, B) = \mathrm{tr}\, T (I - B A) S (I - B A)^T

which is the damage of a reader with weights V of which :math:`V V^T = T`. Here A may be anything, and so the least J of
K channels is what an approximation of rank K leaves (Eckart and Young, Psychometrika 1, 1936): with eigenvalues
:math:`\lambda` and eigenvectors P of :math:`V^T S V`, the largest first, J is the sum of all but the first K, at

.. math:: A = P_K^T V^T, \qquad B = S V P_K \, \mathrm{diag}(\lambda_K)^{-1}

Where channels can only be dropped, from both sides alike, J is the sum of :math:`S_{cd} T_{cd}` over all c and d that
go.
"""

from collections.abc import Sequence

import numpy as np

from onnxfuse.arrays import FloatArray, Floats, IntArray, block_diagonal
from onnxfuse.statistics.damage import Reading

__all__ = ["best_pair", "dropping_order", "pair_damage", "root"]

# Eigenvalues below this share of the largest are rounding.
_ROUNDING = 1e-12


def root(moments: Floats) -> FloatArray:
    """Return V with V V^T equal to a positive semidefinite matrix, shape (C, C), float64."""
    values, vectors = np.linalg.eigh(np.asarray(moments, np.float64))
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))


def pair_damage(readings: Sequence[Reading], sets: int) -> FloatArray:
    """Return the least J for every number of channels that each set may keep, shape (C + 1,), float64.

    Args:
        readings: What each contraction makes of the channels; at least one.
        sets: Into how many sets of equal size the channels fall, one after the other.

    Example:
        >>> seen = Reading(np.diag([4.0, 1.0]), np.zeros((2, 1)), np.eye(2))
        >>> pair_damage([seen], 1).round(6).tolist()
        [5.0, 1.0, 0.0]
    """
    total = np.sum([_Set(moments, weights).eigenvalues for moments, weights in _each(readings, sets)], axis=0)
    return np.concatenate([np.cumsum(total[::-1])[::-1], [0.0]])


def best_pair(readings: Sequence[Reading], kept: int, sets: int) -> tuple[FloatArray, FloatArray, IntArray]:
    """Return the map with the least J; both sides of it have channels of one size.

    Args:
        readings: What each contraction makes of the channels; at least one.
        kept: K, how many channels each set keeps.
        sets: The number of sets, S.

    Returns:
        A, shape (S K, S C), B, shape (S C, S K), and the channel that weighs most in each row of A, shape (S K,).
    """
    maps = [_Set(moments, weights).maps(kept) for moments, weights in _each(readings, sets)]
    output, read = (block_diagonal([pair[i] for pair in maps]) for i in range(2))
    return output, read, np.abs(output).argmax(axis=1).astype(np.int64)


def dropping_order(readings: Sequence[Reading], sets: int) -> tuple[IntArray, FloatArray]:
    """Order channels so that J is small without all but the first K of each set, for any K (backward elimination).

    Args:
        readings: What each contraction makes of the channels; at least one.
        sets: Into how many sets of equal size the channels fall, one after the other.

    Returns:
        Channels in order, shape (S C,), int64, every S of them one of each set; and J with the first k of each set
        kept, shape (C + 1,), float64.

    Example:
        >>> seen = Reading(np.diag([1.0, 4.0]), np.zeros((2, 1)), np.eye(2))
        >>> [found.tolist() for found in dropping_order([seen], 1)]
        [[1, 0], [5.0, 1.0, 0.0]]
    """
    size = len(readings[0].covariance) // sets
    total, orders = np.zeros(size + 1), []
    for number in range(sets):
        some = slice(number * size, (number + 1) * size)
        parts = [(r.covariance[some, some], r.weights[some]) for r in readings]
        shared = np.sum([np.asarray(s, np.float64) * (v @ v.T) for s, v in parts], axis=0)
        # What a channel adds to J, given those that are gone already.
        adds, gone, left = np.diag(shared).copy(), np.empty(size, np.int64), np.ones(size, bool)
        for step in range(size):
            gone[step] = np.where(left, adds, np.inf).argmin()
            total[size - step - 1] += sum(shared[gone[step], gone[:step]]) * 2 + shared[gone[step], gone[step]]
            left[gone[step]] = False
            adds += 2 * shared[gone[step]]
        orders.append(gone[::-1] + some.start)
    return np.stack(orders, axis=1).ravel(), np.maximum(np.cumsum(total[::-1])[::-1], 0.0)


def _each(readings: Sequence[Reading], sets: int) -> list[tuple[FloatArray, FloatArray]]:
    """Return second moments S and weights V for each set; of several contractions S is the mean, by damage."""
    size = len(readings[0].covariance) // sets
    shares = np.array([max(reading.damage, 0.0) for reading in readings]) + np.finfo(float).tiny
    shares /= shares.sum()
    found = []
    for start in range(0, sets * size, size):
        some = slice(start, start + size)
        moments = np.sum([share * r.covariance[some, some] for share, r in zip(shares, readings, strict=True)], axis=0)
        weights = np.concatenate([reading.weights[some] for reading in readings], axis=1)
        found.append((np.asarray(moments, np.float64), np.asarray(weights, np.float64)))
    return found


class _Set:
    """The eigenvectors of one set's channels, as both sides see them."""

    def __init__(self, moments: FloatArray, weights: FloatArray) -> None:
        self.moments, self.weights = moments, root(weights @ weights.T)
        values, vectors = np.linalg.eigh(self.weights.T @ moments @ self.weights)
        self.eigenvalues, self.vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]

    def maps(self, kept: int) -> tuple[FloatArray, FloatArray]:
        """Return A, shape (K, C), and B, shape (C, K), such that channels of both sides have one size."""
        values, vectors = self.eigenvalues[:kept], self.vectors[:, :kept]
        is_there = values > _ROUNDING * self.eigenvalues.max(initial=0.0)
        safe = np.where(is_there, values, 1.0)
        # A q has second moments of the eigenvalues, B^T k of ones.
        balance = safe**0.25
        output = np.where(is_there[:, None], (self.weights @ vectors).T / balance[:, None], 0.0)
        read = np.where(is_there, self.moments @ self.weights @ vectors / safe * balance, 0.0)
        return output, read
