"""Mixtures of two images, as more samples to fit on.

A few hundred images show late layers few of the things that they tell apart, and a fit to these alone makes good on
them what it can't make good on others. Beside the images stand as many mixtures of two, a part of one and the rest of
the other (mixup: Zhang et al., ICLR 2018, equation 1; here without labels, since the original network says what it
makes of them). They are for fits alone: what channels are worth is judged on images as they are.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from onnxfuse.analysis import Analysis
from onnxfuse.arrays import IntArray
from onnxfuse.calibration import images, refit
from onnxfuse.calibration.images import image_inputs
from onnxfuse.proof.samples import Samples

__all__ = ["with_mixtures"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# The share of the first of two images: at least, and at most.
_SHARES = (0.2, 0.8)
# No more samples than that, mixtures among them, and none for which the largest value would need more memory, in both
# networks.
_MOST = 2048
_MOST_BYTES = 6 * 2**30


def with_mixtures(analysis: Analysis, samples: Samples, seed: int) -> Samples:
    """Return samples with mixtures among them: one for each, unless they are very many or very large.

    What a fit holds back stays apart: a mixture that is held back is one of images that are, and one to fit on is one
    of images to fit on.

    Args:
        analysis: The network.
        samples: The samples.
        seed: Seed of what is mixed.

    Returns:
        The same samples where not all inputs are images.
    """
    found = image_inputs(analysis, samples)
    total = samples.count
    mixed = min(total, _affordable(analysis) - total) // samples.batch * samples.batch
    if set(found) != set(samples.arrays) or mixed < 1:
        return samples
    rng = np.random.default_rng(seed)
    # The last samples are held back by some, so images and mixtures both end there.
    held = total // images.HELD_BACK
    parts = ((0, total - held, mixed - held * mixed // total), (total - held, total, held * mixed // total))
    pairs = list(_pairs(parts, rng))
    firsts, seconds = (np.concatenate(chosen) for chosen in zip(*pairs, strict=True))
    shares = np.where(firsts == seconds, 1.0, rng.uniform(*_SHARES, len(firsts)))
    arrays = {name: _mixed(array, firsts, seconds, shares) for name, array in samples.arrays.items()}
    return replace(samples, arrays=arrays)


def _affordable(analysis: Analysis) -> int:
    """Return how many samples there may be in all."""
    largest = max((math.prod(dims) for dims in analysis.shapes.dims.values()), default=1) // analysis.batch
    return min(_MOST, _MOST_BYTES // max(2 * 4 * largest, 1))


def _pairs(parts: Iterable[tuple[int, int, int]], rng: np.random.Generator) -> Iterator[tuple[IntArray, IntArray]]:
    """Yield for each part the two images of every sample, the images themselves first, and then so many mixtures."""
    offset = 0
    for start, stop, mixed in parts:
        own = np.arange(start, stop)
        sides = np.arange(offset, offset + len(own) + mixed) % refit.HELD_BACK == refit.HELD_BACK - 1
        offset += len(sides)
        firsts, seconds = (np.concatenate([own, np.zeros(mixed, np.int64)]) for _ in range(2))
        for side in (False, True):
            choice = rng.permutation(own[sides[: len(own)] == side])
            places = len(own) + np.flatnonzero(sides[len(own) :] == side)
            if len(places):
                # Of no image on this side there is no mixture either: another image stands there, as it is.
                choice = choice if len(choice) else own[:1]
                turn = np.arange(len(places))
                firsts[places] = choice[turn % len(choice)]
                seconds[places] = choice[(turn + 1 + turn // len(choice)) % len(choice)]
        yield firsts, seconds


def _mixed(
    array: AnyArray, firsts: IntArray, seconds: IntArray, shares: "np.ndarray[Any, np.dtype[np.float64]]"
) -> AnyArray:
    """Return mixtures, in the type of the images."""
    found = array[firsts]
    for number in np.flatnonzero(firsts != seconds):
        share = shares[number]
        mixed = share * found[number].astype(np.float64) + (1.0 - share) * array[seconds[number]]
        found[number] = np.rint(mixed) if array.dtype.kind in "iu" else mixed
    return found
