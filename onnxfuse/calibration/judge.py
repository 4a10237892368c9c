"""What samples say of every group: in which order its channels matter to their readers, and how to do without some."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxfuse.analysis import Analysis
from onnxfuse.arrays import FloatArray, IntArray
from onnxfuse.calibration.observe import observe_readings
from onnxfuse.config import Provider
from onnxfuse.coupling.groups import CouplingGroup
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.proof.samples import Samples
from onnxfuse.statistics.bilinear import best_pair, dropping_order, pair_damage
from onnxfuse.statistics.crossing import crossed_damage
from onnxfuse.statistics.damage import Reading, greedy_order, rebuilding_map

__all__ = ["Judgement", "judge_groups", "judge_readings"]


@dataclass(frozen=True, eq=False)
class Judgement:
    """What samples say of one group.

    Attributes:
        readings: What each reader sees of the channels.
        order: The channels, those first that leave the least damage; shape (S C,), where every S of them are one of
            each set of channels.
        damage: The damage J with the first k of each set kept, shape (C + 1,): relative to the variance of what the
            readers' results end in; on samples that neither the choice nor the map has seen, where that is known.
        sets: The number of sets, S.
    """

    readings: tuple[Reading, ...]
    order: IntArray
    damage: FloatArray
    sets: int = 1

    @property
    def knows_channels(self) -> bool:
        """Whether it is known of every reader what it would see of fused channels."""
        return all(reading.channels is not None for reading in self.readings)

    def channel_map(self, kept: int) -> ChannelMap:
        """Return the map that keeps the first so many of each set, and has readers rebuild the others from them."""
        selection = self.selection(kept)
        if selection.is_identity:
            return selection
        return ChannelMap(selection.making, rebuilding_map(self.readings, selection.anchors), selection.anchors)

    def pair_map(self, kept: int) -> ChannelMap:
        """Return the best map of both sides of a contraction that keeps so many channels of each set."""
        return ChannelMap(*best_pair(self.readings, kept, self.sets))

    def selection(self, kept: int) -> ChannelMap:
        """Return the map that keeps the first so many of each set and does without the others."""
        return ChannelMap.selection(self.selected(kept), len(self.order))

    def selected(self, kept: int) -> IntArray:
        """Return the first so many channels of each set, ascending, and so set by set."""
        return np.sort(self.order[: kept * self.sets])


def judge_groups(
    analysis: Analysis,
    groups: Sequence[CouplingGroup],
    samples: Samples,
    provider: Provider,
    seed: int,
    *,
    is_made_up: bool = False,
) -> Mapping[str, Judgement]:
    """Run the original on samples and judge every group by what its readers would lose.

    Args:
        analysis: The original.
        groups: The groups.
        samples: Inputs.
        provider: Where to run.
        seed: Seed of the choice of places in large values.
        is_made_up: Whether the samples were made up.

    Returns:
        A judgement by the name of each group that some weight reads.

    Raises:
        RuntimeFailedError: ONNX Runtime could not run the network.
    """
    readings = observe_readings(analysis, groups, samples, provider, seed, is_made_up=is_made_up)
    return judge_readings(groups, readings)


def judge_readings(
    groups: Sequence[CouplingGroup], readings: Mapping[str, tuple[Reading, ...]]
) -> Mapping[str, Judgement]:
    """Judge every group by what its readers see, however that is known.

    Args:
        groups: The groups.
        readings: What each reader sees, by the group's name.

    Returns:
        A judgement by the name of each group of which something is seen.
    """
    return {group.name: _judgement(group, found) for group in groups if (found := readings[group.name])}


def _judgement(group: CouplingGroup, readings: tuple[Reading, ...]) -> Judgement:
    if group.unmixable and all(reading.parameter < 0 for reading in readings):
        return Judgement(readings, *dropping_order(readings, group.sets), group.sets)
    order, damage = greedy_order(readings, group.sets)
    if group.mirrored:
        return Judgement(readings, order, pair_damage(readings, group.sets), group.sets)
    return Judgement(readings, order, crossed_damage(readings, damage[:: group.sets], group.sets), group.sets)
