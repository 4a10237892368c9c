"""The choice among candidates by the damage J, on what no input map was fitted to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxfuse.fusion.candidates import CANDIDATES, Known
from onnxfuse.fusion.candidates.protocol import set_by_set
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.statistics.damage import judged_map

__all__ = ["Choice", "best_candidate"]

# A candidate that is no better than this has won by chance.
_BETTER = 0.99
# Where selection loses no more than this share of what is read, it is exact but for rounding, and stays.
_EXACT = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The candidate that has won.

    Attributes:
        name: Its name in `CANDIDATES`.
        channel_map: Its output map with the best input map.
        gain: Its J, in J of the selection.
        selected: J of the selection.
    """

    name: str
    channel_map: ChannelMap
    gain: float
    selected: float


def best_candidate(known: Known, names: Sequence[str], rng: np.random.Generator) -> Choice | None:
    """Return the candidate with the least J; None where none is better than the selection.

    Where readers hear each set of channels apart, J is a sum over the sets, and each gets what is best for it.

    Args:
        known: What is known about the group's channels, and which are selected.
        names: Which members of `CANDIDATES` propose.
        rng: Source of randomness.
    """
    if any(reading.channels is None for reading in known.readings):
        return None
    if any(reading.sets > 1 for reading in known.readings):
        return _best_of_each([(part, best_candidate(part, names, rng)) for part in known.parts()])
    least, _ = judged_map(known.readings, known.selection)
    if least <= _EXACT * sum(reading.damage for reading in known.readings):
        return None
    best, selected = None, least
    least *= _BETTER
    for name in names:
        for output in set_by_set(CANDIDATES[name])(known, rng):
            damage, fitted = judged_map(known.readings, output)
            if damage < least:
                least, best = (
                    damage,
                    Choice(name, ChannelMap(output, fitted, known.selected), damage / selected, selected),
                )
    return best


def _best_of_each(choices: Sequence[tuple[Known, Choice | None]]) -> Choice | None:
    """Put together what was chosen for each set of channels; selected channels stay where nothing was better."""
    won = [choice for _, choice in choices if choice is not None]
    if not won:
        return None
    maps, damage, selected = [], 0.0, 0.0
    for known, choice in choices:
        if choice is not None:
            maps.append(choice.channel_map)
            damage, selected = damage + choice.gain * choice.selected, selected + choice.selected
        else:
            least, fitted = judged_map(known.readings, known.selection)
            maps.append(ChannelMap(known.selection, fitted, known.selected))
            damage, selected = damage + least, selected + least
    names = " and ".join(sorted({choice.name for choice in won}))
    return Choice(names, ChannelMap.side_by_side(maps), damage / selected, selected)
