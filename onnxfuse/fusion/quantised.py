"""Weights stored as integers: decoded to be fused, encoded again when they are written.

The stored numbers are q, and the weight is w = (q - z) s with a scale s and a zero point z for the whole tensor, for
each index of one axis, or for each block of consecutive indices (ONNX operator DequantizeLinear). As long as channels
are only dropped, scales and integers stay as they are; once channels are mixed, the scale is chosen anew from the
largest magnitude that is left.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from onnxfuse.arrays import FloatArray

__all__ = ["Encoding", "clipped", "decode", "encode", "fitting_encoding", "integer_range", "pack", "unpack"]

Range: TypeAlias = tuple[int, int]
_BITS_OF_A_BYTE = 8
# Types that NumPy does not have itself.
_NARROW_RANGES: Mapping[str, Range] = {"int4": (-8, 7), "uint4": (0, 15)}


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """How a tensor is stored as integers.

    Attributes:
        scale: One number, or one for each index of ``axes`` (for each block along ``along``) in row-major order, of any
            shape; float64, not 0.
        zero_point: The same, whole numbers.
        axes: The axes that scales and zero points run along.
        along: The axis of ``axes`` that falls into blocks.
        block: How many indices make a block; the last one may be shorter.
    """

    scale: FloatArray
    zero_point: FloatArray
    axes: tuple[int, ...] = ()
    along: int = -1
    block: int = 1

    def spread(self, parameter: FloatArray, shape: tuple[int, ...]) -> FloatArray:
        """Shape a scale or zero point so that it broadcasts against a tensor of some shape."""
        if parameter.size == 1:
            return parameter.reshape([1] * len(shape))
        counts = [-(-size // self.block) if i == self.along else size for i, size in enumerate(shape)]
        whole = parameter.reshape([count if i in self.axes else 1 for i, count in enumerate(counts)])
        if self.block == 1:
            return whole
        return np.take(np.repeat(whole, self.block, axis=self.along), np.arange(shape[self.along]), axis=self.along)

    def extrema(self, values: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the least and the largest value that each scale is for, or 0 if that is beyond; shaped like them."""
        rest = tuple(i for i in range(values.ndim) if self.scale.size == 1 or i not in self.axes)
        low, high = (f(values, axis=rest, keepdims=True, initial=0.0) for f in (np.min, np.max))
        if self.block > 1 and self.scale.size > 1:
            starts = np.arange(0, values.shape[self.along], self.block)
            low = np.minimum.reduceat(low, starts, axis=self.along)
            high = np.maximum.reduceat(high, starts, axis=self.along)
        return low.reshape(self.scale.shape), high.reshape(self.scale.shape)


def integer_range(dtype: np.dtype[Any]) -> Range:
    """Return the least and the largest integer of a type, those of four bits included.

    Example:
        >>> integer_range(np.dtype(np.int8))
        (-128, 127)
    """
    if dtype.name in _NARROW_RANGES:
        return _NARROW_RANGES[dtype.name]
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


def decode(stored: FloatArray, encoding: Encoding) -> FloatArray:
    """Return w = (q - z) s, float64."""
    zero, scale = (encoding.spread(p, stored.shape) for p in (encoding.zero_point, encoding.scale))
    return (stored - zero) * scale


def encode(values: FloatArray, encoding: Encoding, bounds: Range) -> FloatArray:
    """Return the integers q nearest to w / s + z within ``bounds``, as float64."""
    zero, scale = (encoding.spread(p, values.shape) for p in (encoding.zero_point, encoding.scale))
    return np.clip(np.rint(values / scale + zero), *bounds)


def clipped(values: FloatArray, encoding: Encoding, bounds: Range) -> FloatArray:
    """Return values with those that are no integer within ``bounds`` moved just so far that they are."""
    zero, scale = (encoding.spread(p, values.shape) for p in (encoding.zero_point, encoding.scale))
    # What is within half a step of the ends is rounded to them anyway; a negative scale turns them round.
    ends = [(end - zero) * scale for end in (bounds[0] - 0.5, bounds[1] + 0.5)]
    found: FloatArray = np.clip(values, np.minimum(*ends), np.maximum(*ends))
    return found


def fitting_encoding(values: FloatArray, old: Encoding, bounds: Range, dtype: Any = np.float32) -> Encoding:
    """Choose scales for values, of the same form as an old encoding had, so that the largest magnitude just fits.

    Zero points stay, so a symmetric encoding stays symmetric.

    Args:
        values: What is to be stored, float64.
        old: How it was stored.
        bounds: The least and the largest integer.
        dtype: What scales are stored as; they are rounded to it.
    """
    low, high = old.extrema(values)
    zero = np.broadcast_to(old.zero_point.reshape(-1), (old.scale.size,)).reshape(old.scale.shape)
    up, down = np.maximum(bounds[1] - zero, 1.0), np.maximum(zero - bounds[0], 1.0)
    if np.all(zero == 0):
        # Symmetric in the usual sense: -128 is not used, so that the range is the same on both sides.
        down = np.minimum(up, down)
    needed = np.maximum(high / up, -low / down).astype(dtype).astype(np.float64)
    scale = np.where(needed > 0, needed, np.abs(old.scale).max())
    return Encoding(scale, old.zero_point, old.axes, old.along, old.block)


def unpack(stored: np.ndarray[Any, np.dtype[Any]], bits: int) -> FloatArray:
    """Return the integers that bytes hold along the last axis, the lowest bits first, as float64.

    Example:
        >>> unpack(np.array([[0x21, 0xF3]], np.uint8), 4).tolist()
        [[1.0, 2.0, 3.0, 15.0]]
    """
    shifts = np.arange(0, _BITS_OF_A_BYTE, bits)
    parts = (stored.astype(np.int64)[..., None] >> shifts) & (2**bits - 1)
    integers: FloatArray = parts.reshape(*stored.shape[:-1], -1).astype(np.float64)
    return integers


def pack(integers: FloatArray, bits: int) -> FloatArray:
    """Return the bytes that hold integers along the last axis, the inverse of `unpack`, as float64."""
    shifts = np.arange(0, _BITS_OF_A_BYTE, bits)
    parts = integers.astype(np.int64).reshape(*integers.shape[:-1], -1, len(shifts))
    stored: FloatArray = (parts << shifts).sum(axis=-1).astype(np.float64)
    return stored
