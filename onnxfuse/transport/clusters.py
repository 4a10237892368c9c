"""K-means clusters of channels, none of them empty.

Three things are done around scikit-learn's k-means. (1) Equal rows are merged to one weighted point and the
points are put in an order of their own, so that the outcome does not depend on the order of the channels. (2)
C points with D > C coordinates span at most C dimensions: they are rotated into those, which keeps every
distance (up to rounding) and makes each step D / C times cheaper. (3) A cluster that k-means leaves empty, as
it may where points are nearly equal, gets the point that is worst off where it is; so an answer always has as
many clusters as were asked for.
"""

import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from onnxfuse.arrays import FloatArray, Floats, IntArray, project_rows, row_coordinates, strips
from onnxfuse.errors import InvariantError

__all__ = ["Clusters", "DistinctRows", "cluster_rows", "compact_rows", "distinct_rows", "seed_from", "single_threaded"]

# k-means only finds a local optimum: the best of a few starts costs little once the points are compact.
_STARTS = 4
# Products of rows, dimensions and clusters from which on k-means works on a random projection, and how many steps
# and trials for each starting point it makes then.
_MOST_WORK = 2**33
_FEW_STEPS = 10
_TRIALS = 3


def single_threaded() -> AbstractContextManager[object]:
    """Return a context in which linear algebra uses one thread.

    The problems here are so small that threads gain little, and on a busy machine waiting for each other costs them a
    factor of ten. It also makes the result the same on any machine with the same libraries.
    """
    return threadpool_limits(limits=1)


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """A partition of C channels into K clusters, numbered by ascending anchor.

    Attributes:
        labels: The cluster of each channel, shape (C,), int64, in [0, K); every cluster has a member.
        centroids: The mean of each cluster's rows, shape (K, D), float64.
        anchors: The member nearest to each centroid (ties: the lower index), shape (K,), int64, ascending.
    """

    labels: IntArray
    centroids: FloatArray
    anchors: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class DistinctRows:
    """The different rows of a matrix with C rows, in an order that does not depend on where they stand in it.

    Attributes:
        first: Index of the first row of each kind, shape (U,), int64.
        kind: The kind of every row, shape (C,), int64, in [0, U).
        counts: How many rows there are of each kind, shape (U,), int64.
    """

    first: IntArray
    kind: IntArray
    counts: IntArray


def distinct_rows(vectors: Floats) -> DistinctRows:
    """Find equal rows (0 and -0 are equal).

    Args:
        vectors: Shape (C, D), float64.

    Returns:
        The kinds of rows.

    Example:
        >>> distinct_rows(np.array([[2.0], [1.0], [2.0]])).counts.tolist()
        [2, 1]
    """
    # Adding 0 turns -0 into 0. Bytes hash and sort in no meaningful, but in a fixed order, and fast.
    keys = [row.tobytes() for row in vectors + 0.0]
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    kind_of = {key: kind for kind, key in enumerate(sorted(first))}
    kind = np.array([kind_of[key] for key in keys], dtype=np.int64)
    return DistinctRows(np.array([first[key] for key in kind_of], dtype=np.int64), kind, np.bincount(kind))


def compact_rows(vectors: Floats) -> FloatArray:
    """Rotate C rows into at most C dimensions and scale them to largest magnitude 1.

    Ratios of distances between rows are kept, up to rounding.

    Args:
        vectors: Shape (C, D), float64, finite.

    Returns:
        Shape (C, min(C, D)), float64, magnitudes up to 1 (all 0 where ``vectors`` is).
    """
    with single_threaded():
        rows = row_coordinates(vectors)
    largest = np.abs(rows).max(initial=0.0)
    return np.ascontiguousarray(rows / largest if largest > 0 else rows, np.float64)


def seed_from(rng: np.random.Generator) -> int:
    """Draw a seed for scikit-learn, which does not take a `numpy.random.Generator`."""
    return int(rng.integers(2**31))


def cluster_rows(vectors: Floats, count: int, rng: np.random.Generator) -> Clusters:
    """Cluster channels by k-means (squared Euclidean distance).

    Where there are fewer different rows than clusters, every kind of row gets a cluster and surplus copies
    become clusters of their own.

    Args:
        vectors: One row per channel, shape (C, D), float64, finite.
        count: The number of clusters, K, from 1 to C.
        rng: Source of the starting points.

    Returns:
        K clusters, none of them empty. A permutation of the channels permutes them alike, but for the choice
        among equal channels and equally good places.

    Raises:
        InvariantError: ``count`` is not from 1 to C.

    Example:
        >>> cluster_rows(np.array([[0.0], [9.0], [1.0]]), 2, np.random.default_rng(0)).labels.tolist()
        [0, 1, 0]
    """
    if not 1 <= count <= len(vectors):
        what = f"{len(vectors)} channels can't make {count} clusters"
        raise InvariantError(what, where="k-means")
    kinds = distinct_rows(vectors)
    if len(kinds.first) <= count:
        labels = _spread_copies(kinds, count)
    else:
        labels = _kmeans_labels(vectors[kinds.first], kinds.counts, count, seed_from(rng))[kinds.kind]
    return _describe(vectors, labels, count)


def _spread_copies(kinds: DistinctRows, count: int) -> IntArray:
    """Label C rows of U <= K kinds with K clusters: kinds first, then surplus copies by index."""
    labels = kinds.kind.copy()
    copies = np.setdiff1d(np.arange(len(labels)), kinds.first)
    surplus = count - len(kinds.first)
    labels[copies[:surplus]] = np.arange(len(kinds.first), count)
    return labels


def _kmeans_labels(points: Floats, counts: IntArray, count: int, seed: int) -> IntArray:
    """Label U > K different points, shape (U, D), that stand for ``counts`` channels each."""
    from sklearn.cluster import KMeans, kmeans_plusplus
    from sklearn.exceptions import ConvergenceWarning

    if points.size * count > _MOST_WORK:
        compact = project_rows(points).astype(np.float64)
        with single_threaded():
            starts, _ = kmeans_plusplus(compact, count, random_state=seed, n_local_trials=_TRIALS)
        kmeans = KMeans(n_clusters=count, init=starts, n_init=1, max_iter=_FEW_STEPS, random_state=seed)
    else:
        compact = compact_rows(points)
        kmeans = KMeans(n_clusters=count, n_init=_STARTS, random_state=seed)
    with warnings.catch_warnings(), single_threaded():
        # It warns of clusters left empty; they are filled below.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = kmeans.fit(compact, sample_weight=counts.astype(np.float64))
    return _fill_empty(compact, fitted.labels_.astype(np.int64), count)


def _fill_empty(points: Floats, labels: IntArray, count: int) -> IntArray:
    """Give every empty cluster the point that is farthest from the centroid of a cluster of more than one."""
    labels = labels.copy()
    for empty in np.flatnonzero(np.bincount(labels, minlength=count) == 0):
        crowded = np.bincount(labels, minlength=count)[labels] > 1
        distances = np.linalg.norm(points - _centroids(points, labels, count)[labels], axis=1)
        labels[np.argmax(np.where(crowded, distances, -1.0))] = empty
    return labels


def _centroids(points: Floats, labels: IntArray, count: int) -> FloatArray:
    """Return the means of the clusters, shape (K, D); that of an empty cluster is 0."""
    from scipy.sparse import csr_array

    membership = csr_array((np.ones(len(labels)), (labels, np.arange(len(labels)))), shape=(count, len(labels)))
    sums = np.asarray(membership @ points)
    sums /= np.maximum(np.bincount(labels, minlength=count), 1)[:, None]
    return sums


def _describe(vectors: Floats, labels: IntArray, count: int) -> Clusters:
    """Add centroids and anchors to a labelling without empty clusters, and number the clusters by anchor."""
    centroids = _centroids(vectors, labels, count)
    distances = np.concatenate(
        [np.linalg.norm(vectors[strip] - centroids[labels[strip]], axis=1) for strip in strips(len(vectors))]
    )
    # Two members are always equally near: rounding must not decide between them.
    farthest = distances.max()
    nearness = np.round(distances / farthest, 9) if farthest > 0 else distances
    # By cluster, then nearest first, then lowest index first: the first of each cluster is its anchor.
    order = np.lexsort((nearness, labels))
    anchors = order[np.searchsorted(labels[order], np.arange(count))]
    by_anchor = np.argsort(anchors)
    rank = np.empty(count, dtype=np.int64)
    rank[by_anchor] = np.arange(count)
    return Clusters(rank[labels], centroids[by_anchor], anchors[by_anchor])
