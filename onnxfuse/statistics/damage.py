r"""How much the layers behind a group lose when its channels become fewer: the quantity J, and what makes it small.

For channels h with covariance S, read by a layer with weights V (C, D), a fusion that rebuilds h as B h' changes the
layer's outputs by

.. math:: J(A, B) = \mathrm{tr}\, V^T [S_{hh} - B S_{h'h} - S_{hh'} B^T + B S_{h'h'} B^T] V

(method of output reconstruction: He et al., ICCV 2017; Luo et al., "ThiNet", ICCV 2017). For a given A the best B does
not depend on V. A group with several readers has the sum over them, each relative to the variance of what its result
ends in, so that damages of different layers can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxfuse.arrays import FloatArray, IntArray
from onnxfuse.statistics.channels import Channels, FusedMoments

__all__ = [
    "Reading",
    "best_input_map",
    "fused_damage",
    "fused_input_map",
    "greedy_order",
    "judged_map",
    "lone_damage",
    "selection_damage",
    "shrunk",
]

# Residual variances below this share of the original are rounding.
_ROUNDING = 1e-10
# Ridge of correlations that are inverted.
_SMALL = 1e-9
# Ridge of the input map, in mean second moments of a channel.
_RIDGE = 1e-4
# From this many channels on several are chosen at a time.
_MOST_STEPS = 512


@dataclass(frozen=True, slots=True)
class Reading:
    """One reader's view of the channels of a group.

    Attributes:
        covariance: S, shape (C, C), float64: of the channels as the reader sees them; about zero, not about the mean,
            where nothing can make a mean good.
        moments: E[h h^T], shape (C, C), float64.
        strength: V V^T divided by the variance of what the reader's result ends in, shape (C, C), float64.
        has_shift: Whether something can make a mean good, behind the reader.
        channels: The channels before their activation, twice: as the input map is fitted to them, and as what it misses
            is measured. Two independent halves of what was observed; None where they do not have the form of f(z).
    """

    covariance: FloatArray
    moments: FloatArray
    strength: FloatArray
    has_shift: bool = True
    channels: tuple[Channels, Channels] | None = None

    @property
    def damage(self) -> float:
        """J if all channels went, relative to the variance of what the result ends in."""
        return float((self.covariance * self.strength).sum())


def shrunk(covariance: FloatArray, count: float) -> FloatArray:
    r"""Shrink the correlations of a covariance that was estimated from few observations.

    With fewer observations than channels every channel seems to follow from the others. Correlations R are replaced by
    :math:`(1 - \rho) R + \rho I`, with the oracle-approximating :math:`\rho` (Chen, Wiesel, Eldar and Hero, "Shrinkage
    algorithms for MMSE covariance estimation", IEEE Transactions on Signal Processing 58, 2010, equation 23); variances
    stay.

    Args:
        covariance: Shape (C, C), float64.
        count: How many independent observations it is from, > 0.

    Example:
        >>> shrunk(np.array([[1.0, 1.0], [1.0, 4.0]]), 3.0).round(3).tolist()
        [[1.0, 0.0], [0.0, 4.0]]
    """
    deviation = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    scale = np.outer(deviation, deviation)
    correlation = np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)
    alive = max(int(np.count_nonzero(deviation)), 1)
    squares, trace = float(np.square(correlation).sum()), float(np.trace(correlation))
    above = (1 - 2 / alive) * squares + trace**2
    below = (count + 1 - 2 / alive) * (squares - trace**2 / alive)
    rho = min(above / below, 1.0) if below > 0 else 1.0
    result = (1 - rho) * covariance
    np.fill_diagonal(result, np.diag(covariance))
    return result


def greedy_order(readings: Sequence[Reading]) -> tuple[IntArray, FloatArray]:
    """Order channels so that the first K of them, for any K, leave a small damage with the best input map.

    Every step keeps the channel that reduces the summed J most, given those that are kept already (forward selection
    with rank-one updates of the residual covariance; O(C^3) for each reader, a matrix-vector product a step).

    Args:
        readings: At least one; all of the same C.

    Returns:
        Channels in order, shape (C,), int64, and the damage that is left with the first k kept, shape (C + 1,).
    """
    channels = len(readings[0].covariance)
    residuals = [reading.covariance.copy() for reading in readings]
    products = [s @ r.strength for s, r in zip(residuals, readings, strict=True)]
    # The diagonal of S M S, and that of S: a channel's gain is the ratio.
    explained = [np.einsum("ij,ji->i", p, s) for p, s in zip(products, residuals, strict=True)]
    floors = [_ROUNDING * np.maximum(np.diag(s), 0.0) + np.finfo(float).tiny for s in residuals]
    strength_of = [np.einsum("ij,ji->", s, r.strength) for s, r in zip(residuals, readings, strict=True)]
    damage = [float(np.sum(strength_of))]
    order = np.empty(channels, np.int64)
    left = np.ones(channels, bool)
    for step in range(channels):
        gains = np.zeros(channels)
        for residual, gain, floor in zip(residuals, explained, floors, strict=True):
            variance = np.diag(residual)
            gains += np.where(variance > floor, gain / np.maximum(variance, floor), 0.0)
        gains[~left] = -1.0
        best = int(np.argmax(gains))
        order[step] = best
        left[best] = False
        lost = 0.0
        for i, reading in enumerate(readings):
            lost += _eliminate(residuals[i], explained[i], reading.strength, best, floors[i][best])
        damage.append(max(damage[-1] - lost, 0.0))
    return order, np.asarray(damage)


def _eliminate(residual: FloatArray, explained: FloatArray, strength: FloatArray, channel: int, floor: float) -> float:
    """Regress every channel on one, in place; return by how much J falls."""
    variance = residual[channel, channel]
    if variance <= floor:
        return 0.0
    u = residual[channel] / np.sqrt(variance)
    w = strength @ u
    total = float(u @ w)
    sw = residual @ w
    explained += -2 * u * sw + u * u * total
    residual -= np.outer(u, u)
    return total


def selection_damage(readings: Sequence[Reading], kept: IntArray) -> float:
    """Return J for keeping some channels with the best input map; the independent form of `greedy_order`'s damage."""
    total = 0.0
    for reading in readings:
        cross = reading.covariance[:, kept]
        inside = reading.covariance[np.ix_(kept, kept)]
        solved = np.linalg.lstsq(inside, cross.T, rcond=_ROUNDING)[0]
        total += float(((reading.covariance - cross @ solved) * reading.strength).sum())
    return max(total, 0.0)


def lone_damage(readings: Sequence[Reading]) -> FloatArray:
    r"""Return J for every channel if it alone went, with the best input map.

    What the others can't tell of a channel c has variance :math:`1 / (S^{-1})_{cc}` (partial regression), so

    .. math:: J_c = (V V^T)_{cc} / (S^{-1})_{cc}

    summed over the readers.

    Args:
        readings: At least one; all of the same C.

    Returns:
        Shape (C,), float64, ``>= 0``; 0 for a channel that follows from the others, or that never changes.

    Example:
        >>> copies = Reading(np.diag([2.0, 1.0]), np.eye(2), np.diag([3.0, 5.0]))
        >>> lone_damage([copies]).round(6).tolist()
        [6.0, 5.0]
    """
    total = np.zeros(len(readings[0].covariance))
    for reading in readings:
        variance = np.maximum(np.diag(reading.covariance), 0.0)
        scale = np.sqrt(np.outer(variance, variance))
        correlation = np.divide(reading.covariance, scale, out=np.zeros_like(scale), where=scale > 0)
        np.fill_diagonal(correlation, 1.0 + _SMALL)
        unexplained = variance / np.maximum(np.diag(np.linalg.inv(correlation)), 1.0)
        total += np.diag(reading.strength) * unexplained
    return total


def best_input_map(readings: Sequence[Reading], output: FloatArray) -> FloatArray:
    r"""Return :math:`B^* = S_{hh'} (S_{h'h'} + \lambda I)^{-1}` for channels of which h' = A h is left.

    Second moments stand for covariances, so that means are rebuilt as well as can be without a shift. Several readers
    share one map: that of their moments' average, each weighted by its damage.

    Args:
        readings: At least one.
        output: A, shape (K, C); as it acts on the channels that readers see.

    Returns:
        Shape (C, K), float64; rows of channels that A keeps as they are, are exact.
    """
    moments = np.sum([w * r.moments for w, r in zip(_shares(readings), readings, strict=True)], axis=0)
    cross = moments @ output.T
    return _exact_where_kept(_input_map(cross, output @ cross), output)


def _shares(readings: Sequence[Reading]) -> FloatArray:
    """Return how much each reader counts for the map that they share; sum 1."""
    weights = np.array([max(reading.damage, 0.0) for reading in readings]) + np.finfo(float).tiny
    return np.asarray(weights / weights.sum())


def _input_map(cross: FloatArray, inside: FloatArray) -> FloatArray:
    scale = float(np.trace(inside)) / len(inside)
    solved = np.linalg.solve(inside + _RIDGE * (scale if scale > 0 else 1.0) * np.eye(len(inside)), cross.T).T
    return np.asarray(solved, np.float64)


def _exact_where_kept(input_map: FloatArray, output: FloatArray) -> FloatArray:
    """Let channels that the output map keeps as they are be rebuilt from themselves alone; changes the input map."""
    for k, row in enumerate(output):
        if np.count_nonzero(row) == 1 and row.max() == 1.0:
            input_map[int(row.argmax())] = np.eye(len(output))[k]
    return input_map


def fused_input_map(
    readings: Sequence[Reading], moments: Sequence[FusedMoments], output: FloatArray, *, exact: bool = True
) -> FloatArray:
    """Return the best input map for channels that are fused before their activation.

    Args:
        readings: At least one.
        moments: Those of each reader's channels and fused channels.
        output: A, shape (K, C).
        exact: Whether channels that it keeps as they are, are rebuilt from themselves alone.

    Returns:
        Shape (C, K), float64.
    """
    seen = [(share, found.about_zero()) for share, found in zip(_shares(readings), moments, strict=True)]
    cross = np.sum([share * found.cross for share, found in seen], axis=0)
    inside = np.sum([share * found.inside for share, found in seen], axis=0)
    found = _input_map(cross, inside)
    return _exact_where_kept(found, output) if exact else found


def fused_damage(readings: Sequence[Reading], moments: Sequence[FusedMoments], input_map: FloatArray) -> float:
    """Return J of an output and an input map, summed over readers: of any two, fused before the activation.

    Args:
        readings: At least one.
        moments: Those of each reader's channels and fused channels.
        input_map: B, shape (C, K).
    """
    total = 0.0
    for reading, found in zip(readings, moments, strict=True):
        seen = found if reading.has_shift else found.about_zero()
        rebuilt = seen.cross @ input_map.T
        missed = seen.whole - rebuilt - rebuilt.T + input_map @ seen.inside @ input_map.T
        total += float((missed * reading.strength).sum())
    return max(total, 0.0)


def judged_map(readings: Sequence[Reading], output: FloatArray) -> tuple[float, FloatArray]:
    """Return J of an output map, and its best input map: fitted to one half of what is known, judged by the other.

    Args:
        readings: At least one, all with `Reading.channels`.
        output: A, shape (K, C).
    """
    known = [reading.channels for reading in readings if reading.channels is not None]
    fitted = fused_input_map(readings, [fitting.fused(output) for fitting, _ in known], output)
    return fused_damage(readings, [judging.fused(output) for _, judging in known], fitted), fitted
