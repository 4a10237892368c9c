"""Weights stored as integers behind a DequantizeLinear: decoded to be fused, encoded again when they are written.

The stored numbers are q, and the weight is w = (q - z) s with a scale s and a zero point z for the whole tensor or for
each index of one axis (ONNX operator DequantizeLinear). As long as channels are only dropped, scales and integers stay
as they are; once channels are mixed, the scale is chosen anew from the largest magnitude that is left.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxfuse.arrays import FloatArray

__all__ = ["Encoding", "decode", "encode", "fitting_encoding"]


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """How a tensor is stored as integers.

    Attributes:
        scale: Shape () or (n,), float64, > 0.
        zero_point: Shape () or (n,), float64, whole numbers.
        axis: The axis that scales of shape (n,) run along.
    """

    scale: FloatArray
    zero_point: FloatArray
    axis: int

    def along(self, vector: FloatArray, rank: int) -> FloatArray:
        """Shape a scale or zero point so that it broadcasts against a tensor of some rank."""
        if vector.size == 1:
            return vector.reshape([1] * rank)
        return vector.reshape([-1 if i == self.axis else 1 for i in range(rank)])


def decode(stored: FloatArray, encoding: Encoding) -> FloatArray:
    """Return w = (q - z) s, float64."""
    zero, scale = encoding.along(encoding.zero_point, stored.ndim), encoding.along(encoding.scale, stored.ndim)
    return (stored - zero) * scale


def encode(values: FloatArray, encoding: Encoding, dtype: np.dtype[Any]) -> FloatArray:
    """Return the integers q nearest to w / s + z in the range of ``dtype``, as float64."""
    bounds = np.iinfo(dtype)
    zero, scale = encoding.along(encoding.zero_point, values.ndim), encoding.along(encoding.scale, values.ndim)
    return np.clip(np.rint(values / scale + zero), bounds.min, bounds.max)


def fitting_encoding(values: FloatArray, old: Encoding, dtype: np.dtype[Any]) -> Encoding:
    """Choose scales for values, of the same form as an old encoding had, so that the largest magnitude just fits.

    Zero points stay, so a symmetric encoding stays symmetric; scales are rounded to float32, as they are stored.
    """
    bounds = np.iinfo(dtype)
    rest = tuple(i for i in range(values.ndim) if old.scale.size == 1 or i != old.axis)
    highest, lowest = values.max(axis=rest, initial=0.0), values.min(axis=rest, initial=0.0)
    zero = old.zero_point.reshape(-1) if old.zero_point.size > 1 else old.zero_point.reshape(())
    up, down = np.maximum(bounds.max - zero, 1.0), np.maximum(zero - bounds.min, 1.0)
    if np.all(zero == 0):
        # Symmetric in the usual sense: -128 is not used, so that the range is the same on both sides.
        down = np.minimum(up, down)
    needed = np.maximum(highest / up, -lowest / down)
    scale = np.where(needed > 0, needed, old.scale.max()).astype(np.float32).astype(np.float64)
    return Encoding(scale.reshape(old.scale.shape), old.zero_point, old.axis)
