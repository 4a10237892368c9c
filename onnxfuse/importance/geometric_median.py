"""Importance by distance from the others: a channel that others stand around can be replaced by them.

He et al., "Filter pruning via geometric median for deep convolutional neural networks acceleration", CVPR 2019,
equation 4.
"""

import numpy as np

from onnxfuse.arrays import FloatArray
from onnxfuse.importance.reduction import mean_over_members, over_mean
from onnxfuse.statistics.features import ChannelFeatures, MemberFeatures

__all__ = ["geometric_median"]


def _sum_of_distances(member: MemberFeatures) -> FloatArray:
    """Return each channel's summed Euclidean distance from all others, through one product of the weights."""
    weights = member.weights
    squares = np.einsum("cd,cd->c", weights, weights)
    apart = squares[:, None] + squares[None, :] - 2 * (weights @ weights.T)
    distances: FloatArray = np.sqrt(np.maximum(apart, 0.0)).sum(axis=1)
    return distances


def geometric_median(features: ChannelFeatures, rng: np.random.Generator, /) -> FloatArray:
    r"""Score by :math:`\sum_j ||w_c - w_j||` (FPGM): the channels nearest to the geometric median of all go first.

    Args:
        features: What is known about the group's C channels.
        rng: Not used.

    Returns:
        Shape (C,), float64, ``>= 0``, mean 1; ones where all channels are alike.

    Raises:
        ModelError: A weight is not finite.

    Example:
        >>> from onnxfuse.statistics.features import Role
        >>> member = MemberFeatures("conv", Role.PRODUCER, np.array([[0.0], [1.0], [2.0]]))
        >>> geometric_median(ChannelFeatures(3, (member,)), np.random.default_rng(0)).tolist()
        [1.125, 0.75, 1.125]
    """
    del rng
    return over_mean(mean_over_members(features.members, _sum_of_distances))
