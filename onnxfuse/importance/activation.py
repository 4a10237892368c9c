r"""Importances by what samples make the channels do, and what the loss and the readers make of it.

``taylor`` is what the paper and its released code call so: :math:`\sum |w\, \partial L / \partial w|` over the weights
of a channel, for a loss summed over all samples before the absolute value is taken. Molchanov et al. ("Pruning
convolutional neural networks for resource efficient inference", ICLR 2017) take :math:`|h\, \partial L / \partial h|`
of the activations instead, and in 2019 ("Importance estimation for neural network pruning", CVPR) the square of the
weights' sum. For the filters of one layer without a bias the sums without absolute values agree: both are the first
order change of the loss if the channel went.
"""

from collections.abc import Callable

import numpy as np

from onnxfuse.arrays import FloatArray
from onnxfuse.errors import DataError
from onnxfuse.importance.reduction import over_mean
from onnxfuse.statistics.damage import lone_damage
from onnxfuse.statistics.features import ActivationFeatures, ChannelFeatures

__all__ = ["activation_l1", "activation_l2", "chip", "damage", "taylor"]


def _seen(features: ChannelFeatures, get: Callable[[ActivationFeatures], FloatArray | None]) -> FloatArray:
    """Return a statistic of the channels over its mean."""
    found = None if features.activations is None else get(features.activations)
    if found is None:
        what = "this importance looks at what samples make the channels do, and none was seen"
        mend = "give samples with --calibration, or choose an importance that looks at weights alone, such as l1"
        raise DataError(what, where=features.members[0].node, mend=mend)
    if not np.isfinite(found).all():
        what = "on these samples the channels, or gradients at them, overflow, so they can't be scored"
        mend = "check that the samples are prepared as the model expects them, or choose another importance"
        raise DataError(what, where=features.members[0].node, mend=mend)
    return over_mean(np.array(found))


def activation_l1(features: ChannelFeatures, rng: np.random.Generator, /) -> FloatArray:
    """Score by the mean of |h| over samples, where the channel's readers see it. Needs samples.

    Args:
        features: What is known about the group's C channels.
        rng: Not used.

    Returns:
        Shape (C,), float64, ``>= 0``, mean 1; ones where every channel is 0.

    Raises:
        DataError: No samples were seen.
    """
    del rng
    return _seen(features, lambda seen: seen.magnitude)


def activation_l2(features: ChannelFeatures, rng: np.random.Generator, /) -> FloatArray:
    """Score by the root of the mean of h^2 over samples, where the channel's readers see it. Needs samples.

    Args:
        features: What is known about the group's C channels.
        rng: Not used.

    Returns:
        Shape (C,), float64, ``>= 0``, mean 1; ones where every channel is 0.

    Raises:
        DataError: No samples were seen.
    """
    del rng
    return _seen(features, lambda seen: None if seen.square is None else np.sqrt(seen.square))


def chip(features: ChannelFeatures, rng: np.random.Generator, /) -> FloatArray:
    """Score by what the nuclear norm of the feature map loses without the channel (CHIP). Needs samples.

    Args:
        features: What is known about the group's C channels.
        rng: Not used.

    Returns:
        Shape (C,), float64, ``>= 0``, mean 1; ones where every channel is 0.

    Raises:
        DataError: No samples were seen.
    """
    del rng
    return _seen(features, lambda seen: seen.independence)


def taylor(features: ChannelFeatures, rng: np.random.Generator, /) -> FloatArray:
    r"""Score by :math:`\sum |w dL/dw|`, what the loss changes by, to first order, as weights vanish. Needs samples.

    Args:
        features: What is known about the group's C channels.
        rng: Not used.

    Returns:
        Shape (C,), float64, ``>= 0``, mean 1; ones where every gradient is 0.

    Raises:
        DataError: No samples were seen.
    """
    del rng
    return _seen(features, lambda seen: seen.sensitivity)


def damage(features: ChannelFeatures, rng: np.random.Generator, /) -> FloatArray:
    """Score by what the readers lose if the channel alone went and the others stood in for it. Needs samples.

    Where no weight reads the channels, it is their mean square.

    Args:
        features: What is known about the group's C channels.
        rng: Not used.

    Returns:
        Shape (C,), float64, ``>= 0``, mean 1; ones where nothing is ever lost.

    Raises:
        DataError: No samples were seen.
    """
    del rng
    return _seen(features, lambda seen: lone_damage(seen.readings) if seen.readings else seen.square)
