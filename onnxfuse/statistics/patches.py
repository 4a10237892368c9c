"""What a linear node reads, row by row: the patches of a convolution, the rows of a matrix product.

A linear node computes Y = P W^T + b with P (n, D) the rows that it reads: one row for every place where a filter is
applied, and D = C x taps numbers in a row. Its weights can be fitted anew from P alone, whatever the node.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from onnxfuse.arrays import FloatArray, IntArray

__all__ = ["convolution_pads", "patch_rows", "place_count", "taps_in_sight"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def convolution_pads(
    auto_pad: str, sizes: Sequence[int], window: Sequence[int], strides: Sequence[int], pads: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Return the zeros before and after each spatial axis of a convolution (ONNX operator Conv, ``auto_pad``).

    Args:
        auto_pad: ``NOTSET``, ``VALID``, ``SAME_UPPER`` or ``SAME_LOWER``.
        sizes: Sizes of the spatial axes.
        window: Extent of the dilated filter along each.
        strides: Steps along each.
        pads: Stated zeros, all befores first.

    Example:
        >>> convolution_pads("SAME_UPPER", [5], [2], [2], [])
        ((0, 1),)
    """
    count = len(sizes)
    if auto_pad in {"SAME_UPPER", "SAME_LOWER"}:
        found = []
        for size, extent, step in zip(sizes, window, strides, strict=True):
            total = max((-(-size // step) - 1) * step + extent - size, 0)
            small, large = total // 2, total - total // 2
            found.append((small, large) if auto_pad == "SAME_UPPER" else (large, small))
        return tuple(found)
    if auto_pad == "VALID" or not pads:
        return ((0, 0),) * count
    return tuple((pads[i], pads[i + count]) for i in range(count))


def place_count(x: AnyArray, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> int:
    """Return in how many places per sample a filter is applied to a padded input."""
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    return int(np.prod([(s - e) // t + 1 for s, e, t in zip(x.shape[2:], extents, strides, strict=True)]))


def taps_in_sight(
    sizes: Sequence[int],
    pads: Sequence[tuple[int, int]],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> FloatArray:
    """Return in what share of all places each tap of a filter reads the map, and not the zeros around it.

    Args:
        sizes: Sizes of the spatial axes, without zeros.
        pads: Zeros before and after each.
        kernel: Size of the filter along each.
        strides: Steps along each.
        dilations: Distance of its taps along each.

    Returns:
        Shape (taps,), float64, in [0, 1].

    Example:
        >>> taps_in_sight([4], [(1, 1)], [3], [1], [1]).tolist()
        [0.75, 1.0, 0.75]
    """
    shares: FloatArray = np.ones(1)
    for size, (before, after), taps, step, distance in zip(sizes, pads, kernel, strides, dilations, strict=True):
        count = (size + before + after - (taps - 1) * distance - 1) // step + 1
        read = np.arange(count)[:, None] * step + np.arange(taps) * distance - before
        shares = np.asarray(np.kron(shares, ((read >= 0) & (read < size)).mean(axis=0)), np.float64)
    return shares


def patch_rows(
    x: AnyArray, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], places: IntArray
) -> AnyArray:
    """Return what a convolution reads at some places.

    Args:
        x: The padded input, shape (N, C, spatial...).
        kernel: Size of the filter along each spatial axis.
        strides: Steps along each.
        dilations: Distance of its taps along each.
        places: Shape (n, 2), int64: sample and flat output position of every row asked for.

    Returns:
        Shape (n, C x taps), of the data type of x, channels first as in a flattened filter.
    """
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    grid = [(s - e) // t + 1 for s, e, t in zip(x.shape[2:], extents, strides, strict=True)]
    corners = np.stack(np.unravel_index(places[:, 1], grid)) * np.array(strides)[:, None]
    taps = np.stack(np.unravel_index(np.arange(int(np.prod(kernel))), list(kernel))) * np.array(dilations)[:, None]
    # Flat positions in the padded map of every tap of every place asked for: (n, taps).
    shape = x.shape[2:]
    where = np.ravel_multi_index(tuple(corners[:, :, None] + taps[:, None, :]), shape)
    flat = x.reshape(x.shape[0], x.shape[1], -1)
    rows = flat[places[:, 0][:, None], :, where]
    return np.ascontiguousarray(rows.transpose(0, 2, 1)).reshape(len(places), -1)
