r"""Transport between so many channels that the whole problem can't be solved: each to one of the nearest targets only.

Network simplex on C x K pairs, and C K distances in D dimensions, take hours for the 14,336 channels of a feed-forward
layer. There the ground cost is worked out for a few candidates of every channel alone. Candidates are the nearest in a
random projection, which keeps distances up to a few percent (Johnson and Lindenstrauss, "Extensions of Lipschitz
mappings into a Hilbert space", 1984); masses flow along them by Sinkhorn's iteration; and what has no way left along
them goes wherever there is room, so that every mass ends up whole (as Altschuler, Weed and Rigollet, NeurIPS 2017,
algorithm 2, with a sparse remainder).
"""

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from onnxfuse.arrays import FloatArray, IntArray, project_rows, strips, unit_rows
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
    vectors: FloatArray,
    targets: FloatArray,
    a: FloatArray,
    b: FloatArray,
    *,
    p: float,
    normalised: bool,
    regularisation: float,
) -> FloatArray:
    """Return a transport plan in which nearly all mass goes to near targets.

    Args:
        vectors: One row per channel, shape (C, D), float64, finite.
        targets: One row per target, shape (K, D), float64, finite.
        a: Masses of the channels, shape (C,), float64, ``>= 0``, sum 1.
        b: Masses of the targets, shape (K,), likewise.
        p: Order of the norm of the ground cost.
        normalised: Whether rows of both are scaled to Euclidean length 1 first.
        regularisation: Weight of the entropic term, in mean ground costs of candidates, above 0.

    Returns:
        Shape (C, K), float64, ``>= 0``; its sums are the masses. It has at most 18 C + K entries above 0.
    """
    from scipy.sparse import csr_array

    x, y = (unit_rows(vectors), unit_rows(targets)) if normalised else (vectors, targets)
    near = _candidates(x, y)
    cost = _candidate_costs(x, y, near, p)
    mean = float(cost.mean())
    # Only differences within a row matter: its masses are fixed.
    scaled = (cost - cost.min(axis=1, keepdims=True)) / (regularisation * mean if mean > 0 else 1.0)
    starts = np.arange(len(a) + 1) * near.shape[1]
    kernel = csr_array((np.exp(-scaled).ravel(), near.ravel(), starts), shape=(len(a), len(b)))
    return _with_rest(_sinkhorn(kernel, a, b), a, b)


def _candidates(x: FloatArray, y: FloatArray) -> IntArray:
    """Return for every channel the targets that seem nearest, shape (C, at most 16)."""
    wanted = min(_CANDIDATES, len(y))
    points, goals = project_rows(x), project_rows(y)
    squares = np.square(goals).sum(axis=1)
    found = np.empty((len(x), wanted), np.int64)
    for strip in strips(len(x)):
        distance = squares - 2 * (points[strip] @ goals.T)
        found[strip] = np.argpartition(distance, wanted - 1, axis=1)[:, :wanted]
    found.sort(axis=1)
    return found


def _candidate_costs(x: FloatArray, y: FloatArray, near: IntArray, p: float) -> FloatArray:
    """Return the distances to the candidates, shape (C, candidates)."""
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        return np.concatenate(list(pool.map(lambda c: distances(x[c : c + 1], y[near[c]], p), range(len(x)))))


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


def _with_rest(plan: "csr_array", a: FloatArray, b: FloatArray) -> FloatArray:
    """Cut a plan down to the masses, and put what is missing wherever there is room."""
    whole = plan.toarray()
    whole *= np.minimum(_ratio(a, whole.sum(axis=1)), 1.0)[:, None]
    whole *= np.minimum(_ratio(b, whole.sum(axis=0)), 1.0)
    rest_a, rest_b = np.maximum(a - whole.sum(axis=1), 0.0), np.maximum(b - whole.sum(axis=0), 0.0)
    # Both in a row, one above the other: where an end of one lies between two of the other, a flow begins.
    ends_a, ends_b = np.cumsum(rest_a), np.cumsum(rest_b)
    total = min(ends_a[-1], ends_b[-1])
    cuts = np.unique(np.minimum(np.concatenate([[0.0], ends_a, ends_b]), total))
    middles = (cuts[1:] + cuts[:-1]) / 2
    rows, columns = np.searchsorted(ends_a, middles), np.searchsorted(ends_b, middles)
    np.add.at(whole, (rows, columns), np.diff(cuts))
    return whole


def _ratio(wanted: FloatArray, present: FloatArray) -> FloatArray:
    """Divide; nothing by nothing is nothing."""
    return np.divide(wanted, present, out=np.zeros_like(wanted), where=present > 0)
