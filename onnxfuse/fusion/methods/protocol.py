"""What a fusion method is."""

from typing import Protocol

import numpy as np

from onnxfuse.errors import InvariantError
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.fusion.options import FusionOptions
from onnxfuse.statistics.features import ChannelFeatures

__all__ = ["Method", "check_kept"]


class Method(Protocol):
    """Finds the map that shrinks one coupling group.

    Members of `onnxfuse.fusion.methods.METHODS` keep these laws: K = C gives exactly the identity; the same
    state of ``rng`` gives the same map; channels of zeros never make a NaN; a permutation of the channels
    permutes the map (up to ties, the order of the fused channels, and rounding; not where scores are random).
    """

    def __call__(
        self, features: ChannelFeatures, kept: int, options: FusionOptions, rng: np.random.Generator, /
    ) -> ChannelMap:
        """Return the map.

        Args:
            features: What is known about the group's C channels.
            kept: K, from 1 to C.
            options: What the user asked for.
            rng: Source of randomness.

        Returns:
            The map from C to K channels.

        Raises:
            InvariantError: ``kept`` is not from 1 to C.
            ModelError: A weight is not finite.
            SolverError: The transport could not be solved.
        """


def check_kept(kept: int, channels: int) -> None:
    """Raise unless ``kept`` of ``channels`` channels can be kept.

    Raises:
        InvariantError: ``kept`` is not from 1 to C.
    """
    if not 1 <= kept <= channels:
        what = f"{kept} of {channels} channels can't be kept"
        raise InvariantError(what, where="fusion method")
