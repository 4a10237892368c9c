"""The array types that the numerical parts share: work is done in float64 and cast once, when a weight is written."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["FloatArray", "IntArray", "finite_rows", "is_finite", "unit_rows"]

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


def is_finite(array: np.ndarray[Any, np.dtype[Any]]) -> npt.NDArray[np.bool_]:
    """Return where an array of any type is neither NaN nor infinite.

    Example:
        >>> is_finite(np.array([1.0, np.nan])).tolist(), is_finite(np.array(["text"])).tolist()
        ([True, False], [True])
    """
    if array.dtype.kind not in "fV":
        return np.ones(array.shape, np.bool_)
    # Types that NumPy knows only by their size, such as bfloat16, are of kind V.
    return np.asarray(np.isfinite(array.astype(np.float64) if array.dtype.kind == "V" else array))


def finite_rows(*arrays: np.ndarray[Any, np.dtype[Any]]) -> list[np.ndarray[Any, np.dtype[Any]]]:
    """Return the rows of arrays, all of n rows, that are finite in every one of them: others would spoil every sum.

    Example:
        >>> finite_rows(np.array([[1.0], [np.inf], [3.0]]), np.array([[4.0], [5.0], [np.nan]]))
        [array([[1.]]), array([[4.]])]
    """
    whole = np.logical_and.reduce([np.isfinite(a).all(axis=tuple(range(1, a.ndim))) for a in arrays])
    return list(arrays) if whole.all() else [a[whole] for a in arrays]
