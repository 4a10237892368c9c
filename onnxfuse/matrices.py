"""Matrices that may be nearly all zeros, as selections and transport plans are: plain arrays, or sparse ones of SciPy.

A map between 14,336 channels and half as many has 10^8 entries, of which a selection fills 7,168. So what is known to
be sparse is made sparse once it is large, and stays so; everything else is a plain array.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from onnxfuse.arrays import FloatArray, Floats, IntArray, strips

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = [
    "Matrix",
    "added",
    "as_dense",
    "count_entries",
    "entries_at",
    "from_entries",
    "has_finite_entries",
    "magnitudes",
    "product",
    "rows_to_one",
    "transposed",
]

Matrix: TypeAlias = "Floats | csr_array"
"""A matrix; of double precision, but for large plain ones."""

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# From so many entries on it is worth while to see whether a matrix is sparse: that is, has at most such a share of
# others than zeros.
_WORTH_A_LOOK, _SPARSE = 2**16, 0.02


def from_entries(values: FloatArray, rows: IntArray, columns: IntArray, shape: tuple[int, int]) -> Matrix:
    """Return a matrix of zeros but for some entries, no two at one place: sparse if it is large.

    Example:
        >>> from_entries(np.array([2.0]), np.array([0]), np.array([1]), (1, 2)).tolist()
        [[0.0, 2.0]]
    """
    if shape[0] * shape[1] < _WORTH_A_LOOK:
        plain = np.zeros(shape)
        plain[rows, columns] = values
        return plain
    from scipy.sparse import csr_array

    return csr_array((values, (rows, columns)), shape=shape)


def as_dense(matrix: Matrix) -> FloatArray:
    """Return a matrix as a plain array, float64."""
    return np.asarray(matrix if isinstance(matrix, np.ndarray) else matrix.toarray(), np.float64)


def added(first: Matrix, second: Matrix) -> Matrix:
    """Return the sum of two matrices; sparse if both are."""
    if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
        return as_dense(first) + as_dense(second)
    return first + second


def transposed(matrix: Matrix) -> Matrix:
    """Return the transpose."""
    return matrix.T if isinstance(matrix, np.ndarray) else matrix.T.tocsr()


def magnitudes(matrix: Matrix) -> Matrix:
    """Return the magnitude of every entry."""
    return np.abs(matrix) if isinstance(matrix, np.ndarray) else abs(matrix)


def rows_to_one(matrix: Matrix) -> Matrix:
    """Divide rows of numbers ``>= 0`` by their sums; rows of zeros stay zero.

    Example:
        >>> rows_to_one(np.array([[1.0, 3.0], [0.0, 0.0]])).tolist()
        [[0.25, 0.75], [0.0, 0.0]]
    """
    sums = np.asarray(matrix.sum(axis=1))
    sums = np.where(sums > 0, sums, 1.0)
    if isinstance(matrix, np.ndarray):
        return np.asarray(matrix / sums[:, None])
    result = matrix.copy()
    result.data /= np.repeat(sums, np.diff(result.indptr))
    return result


def entries_at(matrix: Matrix, rows: IntArray, columns: IntArray) -> FloatArray:
    """Return the entries at some places, shape (n,)."""
    return np.asarray(matrix[rows, columns])


def count_entries(matrix: Matrix) -> int:
    """Return how many entries are not zero."""
    return int(np.count_nonzero(matrix if isinstance(matrix, np.ndarray) else matrix.data))


def has_finite_entries(matrix: Matrix) -> bool:
    """Return whether no entry is NaN or infinite."""
    if isinstance(matrix, np.ndarray):
        return all(np.isfinite(matrix[rows]).all() for rows in strips(len(matrix)))
    return bool(np.isfinite(matrix.data).all())


def product(matrix: Matrix, block: AnyArray) -> AnyArray:
    """Multiply a matrix with a plain one, in the precision of that, or in single if it has less.

    Args:
        matrix: Shape (K, C).
        block: Shape (C, n), of any float type.

    Returns:
        Shape (K, n), of the type of ``block``.

    Example:
        >>> product(np.array([[0.5, 0.5]]), np.array([[1.0], [2.0]], np.float16))
        array([[1.5]], dtype=float16)
    """
    if block.dtype == np.float16:
        # There is no fast code for half precision, and its sums overflow.
        return product(matrix, block.astype(np.float32)).astype(np.float16)
    if isinstance(matrix, np.ndarray):
        same: AnyArray = matrix.astype(block.dtype, copy=False)
        if matrix.size < _WORTH_A_LOOK or np.count_nonzero(matrix) > _SPARSE * matrix.size:
            return np.asarray(same @ block)
        from scipy.sparse import csr_array

        by_columns = matrix.flags.f_contiguous
        return np.asarray((csr_array(same.T).T if by_columns else csr_array(same)) @ block)
    return np.asarray(matrix.astype(block.dtype, copy=False) @ block)
