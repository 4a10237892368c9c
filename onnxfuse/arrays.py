"""The array types that the numerical parts share: work is done in float64 and cast once, when a weight is written."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["FloatArray", "IntArray", "finite_rows", "unit_rows"]

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]


def unit_rows(x: FloatArray) -> FloatArray:
    """Scale every row to Euclidean length 1; rows of zeros (dead channels) stay zero instead of becoming NaN.

    Args:
        x: Any values, shape (C, D), float64.

    Returns:
        A new array, shape (C, D), float64.

    Example:
        >>> unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.6, 0.8], [0.0, 0.0]]
    """
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norms > 0, norms, 1.0)


def finite_rows(*arrays: np.ndarray[Any, np.dtype[Any]]) -> list[np.ndarray[Any, np.dtype[Any]]]:
    """Return the rows of arrays, all of n rows, that are finite in every one of them: others would spoil every sum.

    Example:
        >>> finite_rows(np.array([[1.0], [np.inf], [3.0]]), np.array([[4.0], [5.0], [np.nan]]))
        [array([[1.]]), array([[4.]])]
    """
    whole = np.logical_and.reduce([np.isfinite(a).all(axis=tuple(range(1, a.ndim))) for a in arrays])
    return list(arrays) if whole.all() else [a[whole] for a in arrays]
