"""How a channel map acts on an array: on the entries of some axes that belong to a group; the others move along."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from onnxfuse.arrays import BoolArray, FloatArray, Floats, IntArray, join_axes
from onnxfuse.coupling.sets import Places
from onnxfuse.matrices import Matrix, product

__all__ = ["along", "map_axes", "map_sides", "rows_of"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def map_axes(array: AnyArray, axes: Sequence[int], old: IntArray, new: IntArray, matrix: Matrix) -> AnyArray:
    """Apply a channel map to the part of some axes that belongs to a group; the rest moves along unchanged.

    Args:
        array: Any shape and float type.
        axes: The axis that holds the channels, behind those that are looked at as one axis with it.
        old: Shape (C, m): indices of that one axis that belong to each channel.
        new: Shape (K, m): where the fused channels go on it.
        matrix: Shape (K, C), dense or sparse.

    Returns:
        A new array of the same type; the last of the axes has (K - C) m more entries (so fewer), over the size of the
        others.

    Example:
        >>> whole, pair = np.arange(4.0).reshape(2, 2), np.array([[0], [1], [2], [3]])
        >>> kept = np.array([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
        >>> map_axes(whole, (0, 1), pair, pair[:2], kept).tolist()
        [[1.0], [2.0]]
    """
    moved = join_axes(array, axes)
    outer, rest = [array.shape[axis] for axis in axes[:-1]], moved.shape[1:]
    block = moved[old.ravel()].reshape(old.shape[0], -1)
    fused = product(matrix, block).reshape(new.size, *rest)
    if old.size == moved.shape[0]:
        result = np.empty((new.size, *rest), fused.dtype)
    else:
        result = np.empty((moved.shape[0] - old.size + new.size, *rest), fused.dtype)
        result[np.delete(np.arange(len(result)), new.ravel())] = np.delete(moved, old.ravel(), axis=0)
    result[new.ravel()] = fused
    result = result.reshape(*outer, len(result) // math.prod(outer), *rest)
    return np.moveaxis(result, range(len(axes)), axes)


def map_sides(
    array: AnyArray, old: Places, new: Places, matrices: tuple[Matrix, Matrix], mirrored: BoolArray | None
) -> AnyArray:
    """Apply one channel map to some places of every channel, and another one to the others.

    Args:
        array: Any shape and float type.
        old: Where the channels are.
        new: Where the fused channels go.
        matrices: Shape (K, C) each: that for all places, and that for mirrored ones.
        mirrored: Which of the m places of each channel are mirrored, shape (m,); None for none.

    Returns:
        A new array, as `map_axes` has it.

    Example:
        >>> both, first = np.array([[0, 2], [1, 3]]), np.array([[0, 1]])
        >>> maps = (np.array([[1.0, 0.0]]), np.array([[1.0, 1.0]]))
        >>> map_sides(np.arange(4.0), Places((0,), both), Places((0,), first), maps, np.array([False, True])).tolist()
        [0.0, 5.0]
    """
    plain, other = matrices
    if mirrored is None or not mirrored.any():
        return map_axes(array, old.axes, old.index, new.index, plain)
    result = map_axes(array, old.axes, old.index, new.index, other)
    if mirrored.all():
        return result
    where = new.index[:, ~mirrored].ravel()
    joined = join_axes(result, old.axes).copy()
    joined[where] = join_axes(map_axes(array, old.axes, old.index, new.index, plain), old.axes)[where]
    sizes = [result.shape[axis] for axis in old.axes]
    return np.moveaxis(joined.reshape(*sizes, *joined.shape[1:]), range(len(sizes)), old.axes)


def rows_of(array: Floats, where: Places) -> Floats:
    """Return everything in an array that belongs to each channel, shape (C, D)."""
    rows: Floats = join_axes(array, where.axes)[where.index.ravel()].reshape(len(where.index), -1)
    return rows


def along(vector: FloatArray, axis: int, rank: int) -> FloatArray:
    """Return a vector as an array of some rank that is longer than 1 along one axis alone."""
    return vector.reshape([-1 if i == axis else 1 for i in range(rank)])
