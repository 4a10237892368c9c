"""Few samples: how many there are really, for how many channels, and images that are made up beside them.

Second moments of a few samples say more of these than of the network. Images that are made up are no data either, but
there are as many as one likes. So they count as a prior does, for as much as a fixed number of the user's: the fewer of
these there are, the more is decided by the made-up ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxfuse.analysis import Analysis
from onnxfuse.arrays import IntArray, is_finite
from onnxfuse.calibration.batches import in_larger_runs
from onnxfuse.calibration.images import image_inputs
from onnxfuse.calibration.observe import reading_places
from onnxfuse.calibration.synthetic import calibration_samples
from onnxfuse.config import CompressionConfig
from onnxfuse.coupling.groups import CouplingGroup
from onnxfuse.coupling.sets import places
from onnxfuse.graph.view import Operand
from onnxfuse.proof.samples import Samples, arrange

__all__ = ["Supplement", "different_samples", "supplement"]

# From so many images on, made-up ones beside them do harm. Seen on images that nothing was fitted to, of the kind that
# ResNet-20 and the example network were trained on: with 64, the made-up ones lower the error of the outputs by a tenth
# to a half; with 128 nothing is gained any more, with 256 a fifth is lost.
_ENOUGH = 128
# As how many of the user's images the made-up ones count. Between 8 and 64 it hardly matters there.
_WORTH = 16
# Pixels whose deviation is so many times that of others are of another scale.
_OTHER_SCALE = 8.0


@dataclass(frozen=True)
class Supplement:
    """What there is to choose and fit on where samples are few.

    Attributes:
        runs: The user's samples with made-up ones among them; None where they are left alone.
        note: What a reader should know; empty if samples are not few.
    """

    runs: Samples | None = None
    note: str = ""


def supplement(
    analysis: Analysis, groups: Sequence[CouplingGroup], samples: Samples, config: CompressionConfig
) -> Supplement:
    """Count samples, and put made-up images beside them if they are few images.

    Args:
        analysis: The network.
        groups: The groups that may change.
        samples: The user's.
        config: The options: the seed and the effort, and how pixels become inputs.

    Raises:
        RuntimeFailedError: ONNX Runtime could not run the network.
    """
    different = different_samples(samples)
    count = len(different)
    widest = max((group.sets * group.channels for group in groups), default=0)
    told = f"few samples: {count} different of {samples.total}, and groups of up to {widest} channels are chosen "
    told += "and fitted on them"
    if samples.arrays and set(image_inputs(analysis, samples)) == set(samples.arrays):
        if not 0 < count < _ENOUGH:
            return Supplement()
        found = _beside_made_up(analysis, samples, different, config)
        if found is not None:
            runs, added = found
            mend = f"give {_ENOUGH} or more for better results"
            return Supplement(runs, f"{told}; {added} made-up images stand beside them; {mend}")
        return Supplement(None, f"{told}; give {_ENOUGH} or more")
    wanted = min(_fewest(analysis, groups), _ENOUGH)
    return Supplement(None, f"{told}; give {wanted} or more") if 0 < count < wanted else Supplement()


def different_samples(samples: Samples) -> IntArray:
    """Return the position of every sample without NaN or infinities, of equal ones that of the first."""
    names = sorted(samples.arrays)
    arrays = [samples.arrays[name][: samples.total] for name in names]
    sound = np.ones(samples.total, bool)
    for array in arrays:
        sound &= is_finite(array).all(axis=tuple(range(1, array.ndim)))
    first: dict[tuple[bytes, ...], int] = {}
    for number in np.flatnonzero(sound):
        first.setdefault(tuple(array[number].tobytes() for array in arrays), int(number))
    return np.array(list(first.values()), np.int64)


def _beside_made_up(
    analysis: Analysis, samples: Samples, different: IntArray, config: CompressionConfig
) -> tuple[Samples, int] | None:
    """Return each different sample several times among made-up ones, and the number of these.

    None where as few are made up, or their pixels are of another scale than the user's.
    """
    made_up = calibration_samples(analysis, samples, config).samples
    # Where the file states how many it takes at once, a run of them may be one made-up sample.
    images = {name: made_up.arrays[name].reshape(-1, *array.shape[1:]) for name, array in samples.arrays.items()}
    for name, array in samples.arrays.items():
        seen, made = (float(a.astype(np.float64).std()) for a in (array[different], images[name]))
        if seen > 0 and not 1 / _OTHER_SCALE < made / seen < _OTHER_SCALE:
            return None
    total = min(map(len, images.values()))
    times = max(1, round(total / (len(different) + _WORTH)))
    added = total - times * len(different)
    if added < 1:
        return None
    # Samples are held back by their number, so they must not lie in order.
    order = np.random.default_rng(config.seed).permutation(total)
    arrays = {
        name: np.concatenate([np.repeat(array[different], times, axis=0), images[name][:added]])[order]
        for name, array in samples.arrays.items()
    }
    words = f"{samples.origin}, and {added} of {made_up.origin}"
    batch = None if samples.divisible else samples.batch
    mixed = arrange(arrays, analysis.graph, samples.origin, words, batch)
    return in_larger_runs(analysis, mixed, config.provider), added


def _fewest(analysis: Analysis, groups: Sequence[CouplingGroup]) -> int:
    """Return how many samples make as many independent observations as every group has channels.

    With fewer, each channel seems to follow from the others. Neighbouring places of one sample are alike; the root of
    their number is what counts, as where moments are summed.
    """
    wanted = 1
    for group, found in zip(groups, reading_places(analysis, groups).values(), strict=True):
        for name, axis in {place.moments for place in found}:
            where = places(analysis.channels.layouts[Operand(name)], axis, group, {})
            dims = analysis.shapes.dims[name]
            spots = math.prod(dims) // max(math.prod(dims[axis] for axis in where.axes), 1) // analysis.batch
            wanted = max(wanted, math.ceil(len(where.index) / math.sqrt(max(spots, 1))))
    return wanted
