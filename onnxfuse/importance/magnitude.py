"""Importances that measure how large a channel's weights are.

Each is a sum (or maximum) over everything in a member that belongs to a channel, averaged over the members,
divided by its mean over the channels. As in the released code, ``l2`` is the sum of squares without the root.
"""

import numpy as np

from onnxfuse.arrays import FloatArray
from onnxfuse.importance.reduction import mean_over_members, over_mean
from onnxfuse.statistics.features import ChannelFeatures, MemberFeatures

__all__ = ["l1", "l2", "linf", "sum_of_squares"]


def sum_of_squares(member: MemberFeatures) -> FloatArray:
    """Return the squared Euclidean norm of a member's weights per channel, shape (C,), float64."""
    squares: FloatArray = np.einsum("cd,cd->c", member.weights, member.weights, dtype=np.float64)
    return squares


def _sum_of_magnitudes(member: MemberFeatures) -> FloatArray:
    sums: FloatArray = np.abs(member.weights).sum(axis=1, dtype=np.float64)
    return sums


def _largest_magnitude(member: MemberFeatures) -> FloatArray:
    # The initial 0 makes a member without any weight score 0 instead of failing.
    largest: FloatArray = np.abs(member.weights).max(axis=1, initial=0.0)
    return largest


def l1(features: ChannelFeatures, rng: np.random.Generator, /) -> FloatArray:
    r"""Score by :math:`\sum |w|`.

    Args:
        features: What is known about the group's C channels.
        rng: Not used.

    Returns:
        Shape (C,), float64, ``>= 0``, mean 1; ones where every weight is 0.

    Raises:
        ModelError: A weight is not finite.

    Example:
        >>> from onnxfuse.statistics.features import Role
        >>> member = MemberFeatures("conv", Role.PRODUCER, np.array([[1.0, -2.0], [0.0, 1.0]]))
        >>> l1(ChannelFeatures(2, (member,)), np.random.default_rng(0)).tolist()
        [1.5, 0.5]
    """
    del rng
    return over_mean(mean_over_members(features.members, _sum_of_magnitudes))


def l2(features: ChannelFeatures, rng: np.random.Generator, /) -> FloatArray:
    r"""Score by :math:`\sum w^2`, without the root.

    Args:
        features: What is known about the group's C channels.
        rng: Not used.

    Returns:
        Shape (C,), float64, ``>= 0``, mean 1; ones where every weight is 0.

    Raises:
        ModelError: A weight is not finite.
    """
    del rng
    return over_mean(mean_over_members(features.members, sum_of_squares))


def linf(features: ChannelFeatures, rng: np.random.Generator, /) -> FloatArray:
    r"""Score by :math:`\max |w|`.

    The released code sums :math:`|w|^\infty` instead, which is 0 or infinite, and so gives NaN for every
    channel; this is what the name says.

    Args:
        features: What is known about the group's C channels.
        rng: Not used.

    Returns:
        Shape (C,), float64, ``>= 0``, mean 1; ones where every weight is 0.

    Raises:
        ModelError: A weight is not finite.
    """
    del rng
    return over_mean(mean_over_members(features.members, _largest_magnitude))
