"""Random importance: the paper's control experiment (appendix C.4, table 5)."""

import numpy as np

from onnxfuse.arrays import FloatArray
from onnxfuse.statistics.features import ChannelFeatures

__all__ = ["chance"]


def chance(features: ChannelFeatures, rng: np.random.Generator, /) -> FloatArray:
    """Score at random, blind to the weights.

    Args:
        features: What is known about the group's C channels; only C is looked at.
        rng: Source of the scores: the same state gives the same scores.

    Returns:
        Shape (C,), float64, uniform in [0, 1).
    """
    return rng.random(features.channels)
