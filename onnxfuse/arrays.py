"""Array types and helpers that the numerical parts share.

Work is done in float64 and cast once, when a weight is written; large weights are worked on in float32, which still
has bits to spare where files have float16. Large matrices are worked on in strips of rows, so that
what is computed in between stays small.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "BoolArray",
    "FloatArray",
    "Floats",
    "IntArray",
    "add_products",
    "block_diagonal",
    "finite_rows",
    "is_finite",
    "join_axes",
    "mirror",
    "precision",
    "project_rows",
    "row_coordinates",
    "row_lengths",
    "strips",
    "unit_rows",
]

BoolArray: TypeAlias = npt.NDArray[np.bool_]
FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float32] | FloatArray
"""What is in single precision where there is much of it."""

# Rows of a strip.
_STRIP = 1024
# Matrices of more entries are large: 134 MB in double precision.
_LARGE = 2**24
# Dimensions of a random projection.
_PROJECTED = 256


def block_diagonal(blocks: Sequence[FloatArray]) -> FloatArray:
    """Return a matrix with blocks along its diagonal, and zeros around them.

    Example:
        >>> block_diagonal([np.ones((1, 2)), np.full((1, 1), 2.0)]).tolist()
        [[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]]
    """
    whole = np.zeros((sum(len(block) for block in blocks), sum(block.shape[1] for block in blocks)))
    row = column = 0
    for block in blocks:
        whole[row : row + len(block), column : column + block.shape[1]] = block
        row, column = row + len(block), column + block.shape[1]
    return whole


def precision(entries: int) -> np.dtype[Any]:
    """Return what a matrix of statistics of so many entries is worked on in: single precision if it is large.

    Sums over samples are in double precision whatever their size; what is made of them is an estimate, whose error from
    a few thousand samples is many times the rounding.

    Example:
        >>> precision(1000 * 1000), precision(14336 * 14336)
        (dtype('float64'), dtype('float32'))
    """
    return np.dtype(np.float32 if entries > _LARGE else np.float64)


def unit_rows(x: Floats) -> Floats:
    """Scale every row to Euclidean length 1; rows of zeros (dead channels) stay zero instead of becoming NaN.

    Args:
        x: Any values, shape (C, D).

    Returns:
        A new array of the same shape and type.

    Example:
        >>> unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[0.6, 0.8], [0.0, 0.0]]
    """
    units: Floats = x / row_lengths(x)[:, None]
    return units


def row_lengths(x: Floats) -> Floats:
    """Return the Euclidean length of every row, or 1 where it is 0; shape (C,), of the type of ``x``."""
    lengths: Floats = np.empty(len(x), x.dtype)
    for strip in strips(len(x)):
        lengths[strip] = np.linalg.norm(x[strip], axis=1)
    return np.where(lengths > 0, lengths, np.ones_like(lengths))


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

    Half precision becomes single: its products overflow soon, and there is no fast code for them.

    Example:
        >>> finite_rows(np.array([[1.0], [np.inf], [3.0]]), np.array([[4.0], [5.0], [np.nan]]))
        [array([[1.]]), array([[4.]])]
    """
    arrays = tuple(a.astype(np.float32) if a.dtype == np.float16 else a for a in arrays)
    whole = np.logical_and.reduce([np.isfinite(a).all(axis=tuple(range(1, a.ndim))) for a in arrays])
    return list(arrays) if whole.all() else [a[whole] for a in arrays]


def join_axes(
    array: np.ndarray[Any, np.dtype[Any]], axes: Sequence[int], *, last: bool = False
) -> np.ndarray[Any, np.dtype[Any]]:
    """Return an array with some of its axes as one, row-major, which is the first, or the last; a view if possible.

    Example:
        >>> join_axes(np.zeros((2, 3, 4)), (2, 0)).shape, join_axes(np.zeros((2, 3, 4)), (1,), last=True).shape
        ((8, 3), (2, 4, 3))
    """
    count = len(axes)
    if last:
        moved = np.moveaxis(array, axes, range(-count, 0))
        return moved.reshape(*moved.shape[:-count], -1)
    moved = np.moveaxis(array, axes, range(count))
    return moved.reshape(-1, *moved.shape[count:])


def project_rows(x: Floats) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a random projection of rows into few dimensions, the same for all rows of one length.

    Squared distances are kept up to about 9 % (one standard deviation); rows that are short enough stay.

    Args:
        x: Shape (C, D).

    Returns:
        Shape (C, min(D, 256)), float32.
    """
    dimensions = x.shape[1]
    if dimensions <= _PROJECTED:
        return x.astype(np.float32)
    matrix = np.random.default_rng(dimensions).standard_normal((dimensions, _PROJECTED), np.float32)
    matrix *= np.float32(_PROJECTED**-0.5)
    return np.concatenate([x[strip].astype(np.float32) @ matrix for strip in strips(len(x))])


def row_coordinates(x: Floats) -> Floats:
    """Return rows in an orthonormal basis of their span, so that all products of rows are what they were.

    Args:
        x: Shape (C, D).

    Returns:
        Shape (C, min(C, D)): R transposed, where Q R is the transpose.
    """
    if x.shape[0] >= x.shape[1]:
        return x
    triangle: Floats = np.asarray(np.linalg.qr(x.T, mode="r"))
    return triangle.T


def strips(count: int) -> list[slice]:
    """Return the rows of a large matrix in pieces.

    Example:
        >>> strips(1500)
        [slice(0, 1024, None), slice(1024, 1500, None)]
    """
    return [slice(start, min(start + _STRIP, count)) for start in range(0, count, _STRIP)]


def add_products(total: FloatArray, rows: np.ndarray[Any, np.dtype[Any]]) -> None:
    """Add X^T X to the upper triangle of a matrix; what is below it means nothing until `mirror` was called.

    Args:
        total: Shape (C, C), float64; changed.
        rows: X, shape (n, C), of any float type: products are in that type, which BLAS is fast at, sums in float64.
    """
    for strip in strips(len(total)):
        total[strip, strip.start :] += rows[:, strip].T @ rows[:, strip.start :]


def mirror(matrix: FloatArray) -> None:
    """Make a square matrix symmetric by its upper triangle.

    Example:
        >>> x = np.array([[1.0, 2.0], [9.0, 3.0]])
        >>> mirror(x)
        >>> x.tolist()
        [[1.0, 2.0], [2.0, 3.0]]
    """
    for strip in strips(len(matrix)):
        matrix[strip.stop :, strip] = matrix[strip, strip.stop :].T
        corner = matrix[strip, strip]
        corner[:] = np.triu(corner) + np.triu(corner, 1).T
