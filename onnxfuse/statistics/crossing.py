r"""The damage on samples that neither the choice of channels nor their input map has seen.

With hundreds of channels and hundreds of samples, a few channels that are left out seem to follow from all the others:
the damage is what a regression misses on the samples that it was fitted to. So the channels are chosen and the map is
fitted on one half of the samples, and J is measured on the other half; and the other way round (cross-validation with
two folds: Stone, "Cross-validatory choice and assessment of statistical predictions", 1974).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onnxfuse.arrays import FloatArray, Floats, IntArray
from onnxfuse.statistics.damage import Reading, greedy_order, rebuilding_map, shrunk, within_sets

__all__ = ["crossed_damage"]

# The shares of the channels that are kept where it is measured; between these it changes little by little.
_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.87, 0.93, 0.97)


def crossed_damage(readings: Sequence[Reading], damage: FloatArray, sets: int = 1) -> FloatArray:
    """Return the damage that is to be expected on other samples.

    Args:
        readings: At least one; all of the same C.
        damage: What the samples say that chose and fitted, with the first k of each set kept, shape (C / S + 1,).
        sets: Into how many sets of equal size the channels fall, S.

    Returns:
        The same for other samples, nowhere less; the damage itself where there are no halves. Never more for more
        channels, and 0 if all are kept.
    """
    each = len(damage) - 1
    widths = sorted({round(share * each) for share in _SHARES} - {0, each})
    if not widths or any(reading.halves is None for reading in readings):
        return damage
    more = np.zeros(len(widths))
    for fold in (0, 1):
        fitted, others = _seen(readings, fold, shrink=True), _seen(readings, 1 - fold, shrink=False)
        order, _ = greedy_order(fitted, sets)
        found = [_missed(fitted, others, np.sort(order[: width * sets])) for width in widths]
        more += (np.asarray(found) - damage[widths]) / 2
    # Nothing is learnt by heart where none or all are kept.
    excess = np.interp(np.arange(each + 1), [0, *widths, each], [0.0, *np.maximum(more, 0.0), 0.0])
    # With a channel more there is never more to lose, and with none all is lost.
    return np.maximum.accumulate(np.minimum(damage + excess, damage[0])[::-1])[::-1]


def _seen(readings: Sequence[Reading], fold: int, *, shrink: bool) -> list[Reading]:
    """Return what readers see on one half of the samples; those that share a half share its covariance."""
    known: dict[tuple[int, bool], Floats] = {}
    found = []
    for reading in readings:
        if reading.halves is None:
            continue
        half = reading.halves[fold]
        key = (id(half), reading.has_shift)
        if key not in known:
            raw = half.covariance.astype(np.float64)
            covariance = shrunk(raw, half.count) if shrink else raw
            about = covariance if reading.has_shift else covariance + np.outer(half.mean, half.mean)
            known[key] = within_sets(about, reading.sets)
        found.append(replace(reading, covariance=known[key]))
    return found


def _missed(fitted: Sequence[Reading], others: Sequence[Reading], kept: IntArray) -> float:
    """Return J of keeping some channels on one half of the samples, with the input map that is fitted to the other."""
    rebuilt = rebuilding_map(fitted, kept)
    total = 0.0
    for reading in others:
        missed = reading.weights.astype(np.float64)
        missed[kept] -= rebuilt.T @ reading.weights
        total += float(np.vdot(missed, reading.covariance @ missed))
    return max(total, 0.0)
