"""What proposes output maps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnxfuse.arrays import FloatArray, IntArray
from onnxfuse.statistics.damage import Reading
from onnxfuse.statistics.features import ChannelFeatures

__all__ = ["Candidate", "Known"]


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What candidates may look at.

    Attributes:
        features: The weights around the group's C channels.
        readings: What each reader sees of them, all with `Reading.channels`; at least one.
        selected: The K channels that selection keeps, shape (K,), int64, ascending.
    """

    features: ChannelFeatures
    readings: tuple[Reading, ...]
    selected: IntArray

    @property
    def selection(self) -> FloatArray:
        """The output map of the selection, shape (K, C)."""
        return np.eye(self.features.channels)[self.selected]


class Candidate(Protocol):
    """Proposes output maps for one coupling group; the damage J decides which is taken, if any is.

    Members of `onnxfuse.fusion.candidates.CANDIDATES` keep these laws: what they yield is finite, of the shape (K, C),
    and the same for the same state of ``rng``; a permutation of the channels permutes it (up to ties, the order of
    the fused channels, and rounding).
    """

    def __call__(self, known: Known, rng: np.random.Generator, /) -> Iterator[FloatArray]:
        """Yield output maps.

        Args:
            known: What is known about the group's C channels, and which K are selected.
            rng: Source of randomness.

        Yields:
            A, shape (K, C), float64; none where there is nothing to propose.
        """
