"""A batch normalisation, and how a channel map carries it along so that its function is kept exactly."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxfuse.arrays import FloatArray, IntArray
from onnxfuse.fusion.mapping import map_axes
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.matrices import Matrix

__all__ = ["Norm", "mapped_norm"]


@dataclass(frozen=True, slots=True)
class Norm:
    """A batch normalisation: y = scale (z - mean) / sqrt(variance + epsilon) + shift, all vectors of shape (C,)."""

    scale: FloatArray
    shift: FloatArray
    mean: FloatArray
    variance: FloatArray
    epsilon: float

    @property
    def factor(self) -> FloatArray:
        """What the input is multiplied by; an epsilon of 0 on a variance of 0 gives factor 0, not infinity."""
        deviation = np.sqrt(self.variance + self.epsilon)
        return np.divide(self.scale, deviation, out=np.zeros_like(self.scale), where=deviation > 0)


def mapped_norm(norm: Norm, channel_map: ChannelMap, old: IntArray, new: IntArray, *, is_folded: bool) -> Norm:
    """Carry a normalisation through a map: its scale as a mean, its shift like a bias, its function exactly.

    Written as y = f z + t, the map makes t' = A t. Where the normalisation is folded, f acts before the map, so any f'
    will do as long as the layer before is divided by it: that of the anchor channel keeps selections bit-identical.
    Otherwise z' = A z is given, and f' is the mean of f weighted by the map.

    Args:
        norm: The normalisation.
        channel_map: The map.
        old: Shape (C, m): places of the group's channels.
        new: Shape (K, m): where the fused channels go.
        is_folded: Whether the layer before is folded into it.
    """

    def mapped(values: FloatArray, matrix: Matrix) -> FloatArray:
        return map_axes(values, (0,), old, new, matrix)

    anchor = old[channel_map.anchors]
    if channel_map.is_selection:
        vectors = (norm.scale, norm.shift, norm.mean, norm.variance)
        scale, shift, mean, variance = (_select(vector, old, new, anchor) for vector in vectors)
        return Norm(scale, shift, mean, variance, norm.epsilon)
    if is_folded:
        return _folded(norm, channel_map, old, new, mapped)
    factor = norm.factor
    variance = _select(norm.variance, old, new, anchor)
    new_factor = mapped(factor, channel_map.carried)
    mean = mapped(norm.mean, channel_map.making)
    scale = new_factor * np.sqrt(variance + norm.epsilon)
    shift = mapped(norm.shift - factor * norm.mean, channel_map.making) + new_factor * mean
    return Norm(scale, shift, mean, variance, norm.epsilon)


def _folded(
    norm: Norm,
    channel_map: ChannelMap,
    old: IntArray,
    new: IntArray,
    mapped: Callable[[FloatArray, Matrix], FloatArray],
) -> Norm:
    factor = norm.factor
    anchor = _strongest(channel_map, factor, old)
    scale, variance = _select(norm.scale, old, new, anchor), _select(norm.variance, old, new, anchor)
    shift = mapped(norm.shift, channel_map.making)
    # Outside the group, and where the factor is 0 so that the mean does not matter, the mean stays.
    mean = _select(norm.mean, old, new, anchor)
    result = Norm(scale, shift, mean, variance, norm.epsilon)
    folded_mean = mapped(factor * norm.mean, channel_map.making)
    new_factor = result.factor
    inside = new.ravel()[new_factor[new.ravel()] != 0]
    mean[inside] = folded_mean[inside] / new_factor[inside]
    return result


def _strongest(channel_map: ChannelMap, factor: FloatArray, old: IntArray) -> IntArray:
    """For every fused channel the place of the source that contributes most to it, which is never a dead one."""
    share = np.abs(channel_map.output[:, :, None] * factor[old][None])
    best = np.where(share.max(axis=1) > 0, share.argmax(axis=1), channel_map.anchors[:, None])
    return np.take_along_axis(old, best, axis=0)


def _select(vector: FloatArray, old: IntArray, new: IntArray, anchor: IntArray) -> FloatArray:
    """Keep the entries of other groups, and put those at ``anchor`` where the fused channels go."""
    result = np.empty(len(vector) - old.size + new.size)
    result[np.delete(np.arange(len(result)), new.ravel())] = np.delete(vector, old.ravel())
    result[new] = vector[anchor]
    return result
