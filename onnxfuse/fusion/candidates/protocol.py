"""What proposes output maps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnxfuse.arrays import FloatArray, IntArray, block_diagonal
from onnxfuse.statistics.damage import Reading
from onnxfuse.statistics.features import ChannelFeatures

__all__ = ["Candidate", "Known", "set_by_set"]


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What candidates may look at.

    Attributes:
        features: The weights around the group's C channels.
        readings: What each reader sees of them, all with `Reading.channels`; at least one.
        selected: The K channels that selection keeps, shape (K,), int64, ascending.
        sets: Into how many sets the channels fall, one after the other, all of one size and with as many selected
            channels: a fused channel is made of one set.
    """

    features: ChannelFeatures
    readings: tuple[Reading, ...]
    selected: IntArray
    sets: int = 1

    def parts(self) -> Iterator["Known"]:
        """Yield what may be looked at of each set, as if there were no other."""
        for number, features in enumerate(self.features.sets(self.sets)):
            some = slice(number * features.channels, (number + 1) * features.channels)
            inside = self.selected[(self.selected >= some.start) & (self.selected < some.stop)]
            readings = tuple(reading.part(some) for reading in self.readings)
            yield Known(features, readings, inside - some.start)

    @property
    def selection(self) -> FloatArray:
        """The output map of the selection, shape (K, C)."""
        return np.eye(self.features.channels)[self.selected]


class Candidate(Protocol):
    """Proposes output maps for one coupling group; the damage J decides which is taken, if any is.

    Members of `onnxfuse.fusion.candidates.CANDIDATES` keep these laws: what they yield is finite, of the shape (K, C),
    and the same for the same state of ``rng``; a permutation of the channels permutes it (up to ties, the order of
    the fused channels, and rounding). They are asked for each set of channels by itself (`set_by_set`).
    """

    def __call__(self, known: Known, rng: np.random.Generator, /) -> Iterator[FloatArray]:
        """Yield output maps.

        Args:
            known: What is known about the group's C channels, and which K are selected.
            rng: Source of randomness.

        Yields:
            A, shape (K, C), float64; none where there is nothing to propose.
        """


def set_by_set(candidate: Candidate) -> Candidate:
    """Return a candidate that proposes for each set of channels what another one proposes for that set alone."""

    def together(known: Known, rng: np.random.Generator, /) -> Iterator[FloatArray]:
        if known.sets == 1:
            yield from candidate(known, rng)
            return
        for outputs in zip(*(candidate(part, rng) for part in known.parts()), strict=False):
            yield block_diagonal(outputs)

    return together
