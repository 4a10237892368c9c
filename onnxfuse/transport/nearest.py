r"""Transport between so many channels that the whole problem can't be solved: each to one of the nearest targets only.

Network simplex on C x K pairs, and C K distances in D dimensions, take hours for the 14,336 channels of a feed-forward
layer. There the ground cost is worked out for a few candidates of every channel alone. Candidates are the nearest in a
random projection, which keeps distances up to a few percent (Johnson and Lindenstrauss, "Extensions of Lipschitz
mappings into a Hilbert space", 1984); masses flow along them by Sinkhorn's iteration; and what has no way left along
them goes wherever there is room, so that every mass ends up whole (as Altschuler, Weed and Rigollet, NeurIPS 2017,
algorithm 2, with a sparse remainder).
"""

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onnxfuse.arrays import FloatArray, Floats, IntArray, project_rows, row_lengths, strips
from onnxfuse.transport.cost import THREADS, distances

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["SHARP", "is_too_large", "nearest_plan"]

# Pairs of channel and target, and these times their dimensions, from which on the whole problem is not solved.
_MOST_PAIRS, _MOST_WORK = 2**23, 2**36
_CANDIDATES = 16
_ITERATIONS = 300
# Weight of the entropic term, in mean costs of candidates, where an exact plan was asked for.
SHARP = 0.02


def is_too_large(channels: int, kept: int, dimensions: int) -> bool:
    """Return whether a transport problem is solved among nearest targets only.

    Example:
        >>> is_too_large(2048, 1024, 9216), is_too_large(14336, 7168, 12288)
        (False, True)
    """
    pairs = channels * kept
    return pairs > _MOST_PAIRS or pairs * dimensions > _MOST_WORK


def nearest_plan(
    vectors: Floats,
    targets: Floats,
    a: FloatArray,
    b: FloatArray,
    *,
    p: float,
    normalised: bool,
    regularisation: float,
) -> "csr_array":
    """Return a transport plan in which nearly all mass goes to near targets.

    Args:
        vectors: One row per channel, shape (C, D), finite.
        targets: One row per target, shape (K, D), finite.
        a: Masses of the channels, shape (C,), float64, ``>= 0``, sum 1.
        b: Masses of the targets, shape (K,), likewise.
        p: Order of the norm of the ground cost.
        normalised: Whether rows of both are scaled to Euclidean length 1 first.
        regularisation: Weight of the entropic term, in mean ground costs of candidates, above 0.

    Returns:
        Shape (C, K), float64, sparse, ``>= 0``; its sums are the masses. It has at most 18 C + K entries above 0.
    """
    from scipy.sparse import csr_array

    x, y = _Rows(vectors, normalised=normalised), _Rows(targets, normalised=normalised)
    near = _candidates(x, y)
    cost = _candidate_costs(x, y, near, p)
    mean = float(cost.mean())
    # Only differences within a row matter: its masses are fixed.
    scaled = (cost - cost.min(axis=1, keepdims=True)) / (regularisation * mean if mean > 0 else 1.0)
    starts = np.arange(len(a) + 1) * near.shape[1]
    kernel = csr_array((np.exp(-scaled).ravel(), near.ravel(), starts), shape=(len(a), len(b)))
    return _with_rest(_sinkhorn(kernel, a, b), a, b)


class _Rows:
    """Feature vectors as they are compared; those of so many channels are scaled some at a time.

    Args:
        vectors: One row per channel, shape (C, D).
        normalised: Whether rows are scaled to Euclidean length 1.
    """

    def __init__(self, vectors: Floats, *, normalised: bool) -> None:
        """Measure the rows."""
        self.vectors = vectors
        self.lengths = row_lengths(vectors) if normalised else None

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: slice | IntArray) -> Floats:
        chosen: Floats = self.vectors[rows]
        if self.lengths is not None:
            chosen = chosen / self.lengths[rows][:, None]
        return chosen

    def projected(self) -> NDArray[np.float32]:
        """Return all rows in few dimensions."""
        return np.concatenate([project_rows(self[strip]) for strip in strips(len(self))])


def _candidates(x: _Rows, y: _Rows) -> IntArray:
    """Return for every channel the targets that seem nearest, shape (C, at most 16)."""
    wanted = min(_CANDIDATES, len(y))
    points, goals = x.projected(), y.projected()
    squares = np.square(goals).sum(axis=1)
    found = np.empty((len(x), wanted), np.int64)
    for strip in strips(len(x)):
        distance = squares - 2 * (points[strip] @ goals.T)
        found[strip] = np.argpartition(distance, wanted - 1, axis=1)[:, :wanted]
    found.sort(axis=1)
    return found


def _candidate_costs(x: _Rows, y: _Rows, near: IntArray, p: float) -> FloatArray:
    """Return the distances to the candidates, shape (C, candidates)."""

    def of_channel(c: int) -> FloatArray:
        return distances(x[c : c + 1], y[near[c]], p)

    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        return np.concatenate(list(pool.map(of_channel, range(len(x)))))


def _sinkhorn(kernel: "csr_array", a: FloatArray, b: FloatArray) -> "csr_array":
    """Scale rows and columns in turn towards the masses; what can't get there is left to the remainder."""
    from scipy.sparse import coo_array, csr_array

    back = csr_array(kernel.T)
    v = np.ones(len(b))
    u = np.zeros(len(a))
    for _ in range(_ITERATIONS):
        u = _ratio(a, kernel @ v)
        v = _ratio(b, back @ u)
    plan = coo_array(kernel)
    return csr_array((plan.data * u[plan.coords[0]] * v[plan.coords[1]], plan.coords), shape=plan.shape)


def _with_rest(plan: "csr_array", a: FloatArray, b: FloatArray) -> "csr_array":
    """Cut a plan down to the masses, and put what is missing wherever there is room."""
    from scipy.sparse import coo_array, csr_array

    cut = coo_array(plan)
    rows, columns = cut.coords
    mass = cut.data * np.minimum(_ratio(a, _sums(cut.data, rows, len(a))), 1.0)[rows]
    mass *= np.minimum(_ratio(b, _sums(mass, columns, len(b))), 1.0)[columns]
    rest_a = np.maximum(a - _sums(mass, rows, len(a)), 0.0)
    rest_b = np.maximum(b - _sums(mass, columns, len(b)), 0.0)
    # Both in a row, one above the other: where an end of one lies between two of the other, a flow begins.
    ends_a, ends_b = np.cumsum(rest_a), np.cumsum(rest_b)
    total = min(ends_a[-1], ends_b[-1])
    cuts = np.unique(np.minimum(np.concatenate([[0.0], ends_a, ends_b]), total))
    middles = (cuts[1:] + cuts[:-1]) / 2
    whole = np.concatenate([mass, np.diff(cuts)])
    rows = np.concatenate([rows, np.searchsorted(ends_a, middles)])
    columns = np.concatenate([columns, np.searchsorted(ends_b, middles)])
    # What flows twice between the same two is added up.
    return csr_array((whole, (rows, columns)), shape=plan.shape)


def _sums(mass: FloatArray, places: NDArray[np.signedinteger[Any]], count: int) -> FloatArray:
    sums: FloatArray = np.asarray(np.bincount(places, mass, count), np.float64)
    return sums


def _ratio(wanted: FloatArray, present: FloatArray) -> FloatArray:
    """Divide; nothing by nothing is nothing."""
    return np.divide(wanted, present, out=np.zeros_like(wanted), where=present > 0)
