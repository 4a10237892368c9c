"""The array types that the numerical parts share: work is done in float64 and cast once, when a weight is written."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["FloatArray", "IntArray", "unit_rows"]

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
