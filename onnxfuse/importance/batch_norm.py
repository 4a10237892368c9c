"""Importance by the scale of batch normalisation (Liu et al., "Network slimming", ICCV 2017)."""

import numpy as np

from onnxfuse.arrays import FloatArray
from onnxfuse.importance.magnitude import l1
from onnxfuse.importance.reduction import mean_over_members, over_mean
from onnxfuse.statistics.features import ChannelFeatures, MemberFeatures

__all__ = ["bn_scale"]


def _scale_magnitude(member: MemberFeatures) -> FloatArray:
    return np.abs(member.bn_scale) if member.bn_scale is not None else np.zeros(len(member.weights))


def bn_scale(features: ChannelFeatures, rng: np.random.Generator, /) -> FloatArray:
    r"""Score by :math:`|\gamma|` of the batch normalisations that follow the producers.

    Members without one are left out of the mean. Where no member has one (the usual state of an exported
    file, whose batch normalisations are folded), this is `l1`.

    Args:
        features: What is known about the group's C channels.
        rng: Not used.

    Returns:
        Shape (C,), float64, ``>= 0``, mean 1; ones where every scale is 0.

    Raises:
        ModelError: A scale (or, without scales, a weight) is not finite.
    """
    scaled = [member for member in features.members if member.bn_scale is not None]
    if not scaled:
        return l1(features, rng)
    return over_mean(mean_over_members(scaled, _scale_magnitude))
