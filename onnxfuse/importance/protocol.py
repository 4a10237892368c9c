"""What an importance is."""

from typing import Protocol

import numpy as np

from onnxfuse.arrays import FloatArray
from onnxfuse.statistics.features import ChannelFeatures

__all__ = ["Importance"]


class Importance(Protocol):
    """Scores the channels of a coupling group: the higher, the more the channel is worth keeping.

    Members of `onnxfuse.importance.IMPORTANCES` return finite scores ``>= 0`` and, but for ``random``,
    permute with the channels (up to rounding: a mean over channels depends on their order in the last
    digits).
    """

    def __call__(self, features: ChannelFeatures, rng: np.random.Generator, /) -> FloatArray:
        """Score every channel.

        Args:
            features: What is known about the group's C channels.
            rng: Source of randomness; deterministic importances don't touch it.

        Returns:
            Shape (C,), float64, finite, ``>= 0``, no unit; a new array.

        Raises:
            ModelError: A weight that the score is made of is not finite.
        """
