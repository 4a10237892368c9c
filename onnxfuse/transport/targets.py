"""Targets: the K points that C channels are transported to (paper, algorithm 2 and appendix A.2).

Each target is a point in the space of the channels' feature vectors, with a score (its importance, for masses
that are informed by it) and an anchor: the one channel that it stands for most.
"""

import warnings
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnxfuse.arrays import FloatArray, Floats, IntArray
from onnxfuse.errors import InvariantError
from onnxfuse.transport.clusters import Clusters, cluster_rows, compact_rows, distinct_rows, seed_from, single_threaded

__all__ = ["Target", "Targets", "gaussian_mixture", "kmeans", "most_important", "top_channels"]

# What scikit-learn adds to variances; here of points scaled to a mean square of 1.
_SMALLEST_VARIANCE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """K points to transport channels to.

    Attributes:
        vectors: Shape (K, D), float64: where they are.
        scores: Shape (K,), float64, ``>= 0``: the importance that each stands for: a channel's own score, or
            the sum of its cluster's (a sum, because it becomes a mass: a cluster of ten equal channels is to
            receive ten times what a single one receives).
        anchors: Shape (K,), int64, ascending, all different: the source channel that each stands for most.
    """

    vectors: Floats
    scores: FloatArray
    anchors: IntArray


class Target(Protocol):
    """Chooses the points that the channels of a group are transported to."""

    def __call__(self, vectors: Floats, scores: FloatArray, kept: int, rng: np.random.Generator, /) -> Targets:
        """Return K points.

        Args:
            vectors: One row per channel, shape (C, D), float64, finite.
            scores: Importances, shape (C,), float64, finite, ``>= 0``.
            kept: K, from 1 to C.
            rng: Source of randomness; deterministic choices don't touch it.

        Returns:
            K targets by ascending anchor.

        Raises:
            InvariantError: ``kept`` is not from 1 to C.
        """


def top_channels(scores: FloatArray, kept: int) -> IntArray:
    """Return the channels of highest score; among equals those of lower index.

    Args:
        scores: Shape (C,), float64.
        kept: K, from 1 to C.

    Returns:
        Shape (K,), int64, ascending.

    Raises:
        InvariantError: ``kept`` is not from 1 to C.

    Example:
        >>> top_channels(np.array([1.0, 3.0, 2.0, 2.0]), 2).tolist()
        [1, 2]
    """
    if not 1 <= kept <= len(scores):
        what = f"{kept} of {len(scores)} channels can't be kept"
        raise InvariantError(what, where="targets")
    return np.sort(np.argsort(-scores, kind="stable")[:kept])


def most_important(vectors: Floats, scores: FloatArray, kept: int, rng: np.random.Generator, /) -> Targets:
    """Take the K most important channels themselves: the default of the paper, used for all of its results.

    Args:
        vectors: Shape (C, D), float64.
        scores: Shape (C,), float64.
        kept: K, from 1 to C.
        rng: Not used.

    Returns:
        Those channels, in their order.

    Raises:
        InvariantError: ``kept`` is not from 1 to C.
    """
    del rng
    anchors = top_channels(scores, kept)
    return Targets(vectors[anchors], scores[anchors], anchors)


def kmeans(vectors: Floats, scores: FloatArray, kept: int, rng: np.random.Generator, /) -> Targets:
    """Take the centroids of K k-means clusters (in the paper; its released code never uses them).

    Args:
        vectors: Shape (C, D), float64, finite.
        scores: Shape (C,), float64, ``>= 0``.
        kept: K, from 1 to C.
        rng: Source of the starting points.

    Returns:
        The centroids; their scores are the sums over their clusters, their anchors the nearest members.

    Raises:
        InvariantError: ``kept`` is not from 1 to C.
    """
    return _centroid_targets(cluster_rows(vectors, kept, rng), scores)


def gaussian_mixture(vectors: Floats, scores: FloatArray, kept: int, rng: np.random.Generator, /) -> Targets:
    """Take the means of a mixture of K spherical Gaussians (``cluster_centroid`` of the released code).

    Expectation-maximisation starts from k-means clusters and runs in the space that the channels span, where
    points are scaled to a mean square of 1, so that the variance floor means the same for weights of any
    size. (The released code fits the raw rows, whose many dimensions make each channel belong to one Gaussian
    only.) A mixture that has not converged after scikit-learn's 100 steps is taken as it is: its means are as
    good a place as any.

    Args:
        vectors: Shape (C, D), float64, finite.
        scores: Shape (C,), float64, ``>= 0``.
        kept: K, from 1 to C.
        rng: Source of the starting points.

    Returns:
        The means; their scores are sums weighted by responsibility, their anchors those different channels
        whose distances to the means add up to the least.

    Raises:
        InvariantError: ``kept`` is not from 1 to C.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    start = cluster_rows(vectors, kept, rng)
    kinds = distinct_rows(vectors)
    if len(kinds.first) <= kept:
        # Every kind of channel is a cluster without extent: there is nothing to fit.
        return _centroid_targets(start, scores)
    points = compact_rows(vectors[kinds.first])[kinds.kind]
    points /= np.sqrt(np.mean(np.square(points)))
    shares = _responsibilities(points, start.labels, kept, seed_from(rng))
    masses = shares.sum(axis=0)
    # A Gaussian that lost all of its channels has no mean; it stays where it started.
    lost = masses < _SMALLEST_VARIANCE
    shares[:, lost] = start.labels[:, None] == np.flatnonzero(lost)
    weights = (shares / shares.sum(axis=0)).T
    _, anchors = linear_sum_assignment(cdist(weights @ points, points))
    sums: FloatArray = shares.T @ scores
    order = np.argsort(anchors)
    return Targets(
        (weights @ vectors)[order],
        sums[order],
        anchors.astype(np.int64)[order],
    )


def _centroid_targets(clusters: Clusters, scores: FloatArray) -> Targets:
    sums = np.bincount(clusters.labels, weights=scores, minlength=len(clusters.anchors))
    return Targets(clusters.centroids, sums.astype(np.float64), clusters.anchors)


def _responsibilities(points: FloatArray, labels: IntArray, count: int, seed: int) -> FloatArray:
    """Fit a mixture from clusters on; return each channel's shares in its Gaussians, shape (C, K)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    members = np.eye(count)[labels]
    sizes = members.sum(axis=0)
    means = members.T @ points / sizes[:, None]
    squares = np.mean(np.square(points - means[labels]), axis=1)
    variances = members.T @ squares / sizes + _SMALLEST_VARIANCE
    mixture = GaussianMixture(
        n_components=count,
        covariance_type="spherical",
        reg_covar=_SMALLEST_VARIANCE,
        # The cheapest initialisation: all that it gives is replaced by the values below.
        init_params="random_from_data",
        weights_init=sizes / len(points),
        means_init=means,
        precisions_init=1.0 / variances,
        random_state=seed,
    )
    with warnings.catch_warnings(), single_threaded():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return mixture.fit(points).predict_proba(points)
