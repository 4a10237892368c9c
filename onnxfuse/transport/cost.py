"""The ground cost of the transport: how unlike each channel is to each target (paper, section 3.2.2).

The released code's "normalized l1 distance" is the L1 distance of rows scaled to Euclidean length 1
(``optimal_transport.py``, ``_cost``). A dead channel (a row of zeros) has no direction; it stays at the
origin, where the released code divides by 0.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from onnxfuse.arrays import FloatArray, Floats, unit_rows
from onnxfuse.errors import InvariantError

__all__ = ["THREADS", "distances", "ground_cost"]

# Rows per piece of work. Small enough to keep a few threads busy on a group of 64 channels.
_CHUNK = 16
# Beyond a few threads the memory bus is the limit, not the arithmetic.
THREADS = min(os.cpu_count() or 1, 8)


def ground_cost(vectors: Floats, targets: Floats, *, p: float, normalised: bool) -> FloatArray:
    """Return the distance of every channel to every target, by the p-norm.

    The cost of equal rows is exactly 0. Every entry is computed by itself, so the result does not depend on
    the number of threads. Time is O(C K D): about 0.8 ns an entry and dimension for p of 1, 2 and infinity on
    one core (the rows are spread over the cores), some twenty-five times that for any other p.

    Args:
        vectors: One row per channel, shape (C, D), float64, finite.
        targets: One row per target, shape (K, D), float64, finite.
        p: Order of the norm, from 1 up to and including infinity.
        normalised: Whether rows of both are scaled to Euclidean length 1 first; rows of zeros stay zero.

    Returns:
        Shape (C, K), float64, ``>= 0``, no unit.

    Raises:
        InvariantError: The two have different D, or p is less than 1.

    Example:
        >>> x = np.array([[3.0, 4.0], [0.0, 0.0]])
        >>> ground_cost(x, 2 * x[:1], p=1.0, normalised=True).tolist()
        [[0.0], [1.4]]
    """
    if vectors.shape[1] != targets.shape[1]:
        what = f"channels have {vectors.shape[1]} features and targets have {targets.shape[1]}"
        raise InvariantError(what, where="ground cost")
    if not p >= 1:
        what = f"the order of the norm is {p}, and only orders from 1 on give a distance"
        raise InvariantError(what, where="ground cost")
    x, y = (unit_rows(vectors), unit_rows(targets)) if normalised else (vectors, targets)

    def of_chunk(start: int) -> FloatArray:
        return distances(x[start : start + _CHUNK], y, p)

    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        return np.concatenate(list(pool.map(of_chunk, range(0, len(x), _CHUNK))))


def distances(x: Floats, y: Floats, p: float) -> FloatArray:
    """Return p-norm distances of rows; SciPy lets go of the interpreter's lock meanwhile."""
    from scipy.spatial.distance import cdist

    if p == 1:
        return cdist(x, y, "cityblock")
    if p == 2:
        return cdist(x, y, "euclidean")
    if p == np.inf:
        return cdist(x, y, "chebyshev")
    return cdist(x, y, "minkowski", p=p)
