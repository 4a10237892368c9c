r"""How much the layers behind a group lose when its channels become fewer: the quantity J, and what makes it small.

For channels h with covariance S, read by a layer with weights V (C, D), a fusion that rebuilds h as B h' changes the
layer's outputs by

.. math:: J(A, B) = \mathrm{tr}\, V^T [S_{hh} - B S_{h'h} - S_{hh'} B^T + B S_{h'h'} B^T] V

(method of output reconstruction: He et al., ICCV 2017; Luo et al., "ThiNet", ICCV 2017). For a given A the best B does
not depend on V. A group with several readers has the sum over them, each relative to the variance of what its result
ends in (`onnxfuse.statistics.relative`), so that damages of different layers can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from onnxfuse.arrays import BoolArray, FloatArray, Floats, IntArray, precision, row_coordinates, strips
from onnxfuse.statistics.channels import Channels, FusedMoments

__all__ = [
    "Half",
    "Reading",
    "fused_damage",
    "fused_input_map",
    "greedy_order",
    "judged_map",
    "lone_damage",
    "rebuilding_map",
    "selection_damage",
    "shrunk",
    "within_sets",
]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# Residual variances below this share of the original are rounding, in double and in single precision.
_ROUNDING, _SINGLE_ROUNDING = 1e-10, 1e-5
# Ridge of correlations that are inverted.
_SMALL = 1e-11
# Ridge of the input map, in mean variances of a channel.
_RIDGE = 1e-4
# After so many choices their effect on what is left is worked out, as one product of matrices.
_BLOCK = 64
# Channels that are kept leave the matrices once they are this share of them.
_CROWDED = 0.15


@dataclass(frozen=True, slots=True)
class Half:
    """What half of the samples says of the channels of a group.

    Attributes:
        covariance: As it is, not shrunk, shape (C, C), float32.
        mean: Shape (C,), float64.
        count: How many independent observations it is from.
    """

    covariance: Floats
    mean: FloatArray
    count: float


@dataclass(frozen=True, slots=True)
class Reading:
    """One reader's view of the channels of a group.

    Attributes:
        covariance: S, shape (C, C), float64, or float32 if it is large: of the channels as the reader sees them; about
            zero, not about the mean, where nothing can make a mean good.
        means: E[h] at each of the m places that a channel has on the axis that is read, shape (C, m), float64.
        weights: V divided by the deviation of what the reader's result ends in, of all outputs or of each, shape
            (C, D), as precise as S; or anything else with the same V V^T.
        has_shift: Whether something can make a mean good, behind the reader.
        channels: The channels before their activation, twice: as the input map is fitted to them, and as what it misses
            is measured. Two independent halves of what was observed; None where they do not have the form of f(z).
        sets: Into how many sets of equal size the channels fall, one after the other, of which none can stand in for
            another: the reader's results are made of one set each. Covariances between sets are zero then.
        parameter: Which of the group's parameters reads them so; -1 if none does, as in a product of computed tensors.
        halves: What two halves of the samples say, each by itself; None where samples are so many that they say the
            same, or there are none.
    """

    covariance: Floats
    means: FloatArray
    weights: Floats
    has_shift: bool = True
    channels: tuple[Channels, Channels] | None = None
    sets: int = 1
    parameter: int = -1
    halves: tuple[Half, Half] | None = None

    @property
    def strength(self) -> FloatArray:
        """V V^T divided by the variance of what the reader's result ends in, shape (C, C), float64."""
        return np.asarray(within_sets(self.weights @ self.weights.T, self.sets), np.float64)

    @property
    def damage(self) -> float:
        """J if all channels went, relative to the variance of what the result ends in."""
        return float(np.vdot(self.covariance @ self.weights, self.weights))

    def part(self, some: slice) -> "Reading":
        """Return the same view of some of the channels, all of one set or of them all."""
        channels = None if self.channels is None else (self.channels[0].part(some), self.channels[1].part(some))
        return Reading(self.covariance[some, some], self.means[some], self.weights[some], self.has_shift, channels)


def shrunk(covariance: FloatArray, count: float) -> Floats:
    r"""Shrink the correlations of a covariance that was estimated from few observations.

    With fewer observations than channels every channel seems to follow from the others. Correlations R are replaced by
    :math:`(1 - \rho) R + \rho I`, with the oracle-approximating :math:`\rho` (Chen, Wiesel, Eldar and Hero, "Shrinkage
    algorithms for MMSE covariance estimation", IEEE Transactions on Signal Processing 58, 2010, equation 23); variances
    stay.

    Args:
        covariance: Shape (C, C), float64.
        count: How many independent observations it is from, > 0.

    Returns:
        Shape (C, C), float64; float32 if it is large.

    Example:
        >>> shrunk(np.array([[1.0, 1.0], [1.0, 4.0]]), 3.0).round(3).tolist()
        [[1.0, 0.0], [0.0, 4.0]]
    """
    variance = np.maximum(np.diag(covariance), 0.0)
    inverse = np.divide(1.0, np.sqrt(variance), out=np.zeros_like(variance), where=variance > 0)
    alive = max(int(np.count_nonzero(variance)), 1)
    squares = sum(
        float(np.square(covariance[strip] * inverse[strip, None] * inverse).sum()) for strip in strips(len(covariance))
    )
    trace = float(np.count_nonzero(variance))
    above = (1 - 2 / alive) * squares + trace**2
    below = (count + 1 - 2 / alive) * (squares - trace**2 / alive)
    rho = min(above / below, 1.0) if below > 0 else 1.0
    result: Floats = np.empty(covariance.shape, precision(covariance.size))
    for strip in strips(len(covariance)):
        result[strip] = (1 - rho) * covariance[strip]
    np.fill_diagonal(result, np.diag(covariance))
    return result


def within_sets(matrix: Floats, sets: int) -> Floats:
    """Return a matrix over channels, or fused channels, without what it says of two of different sets.

    Example:
        >>> within_sets(np.ones((4, 2)), 2).tolist()
        [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    """
    if sets == 1:
        return matrix
    rows, columns = (np.repeat(np.arange(sets), size // sets) for size in matrix.shape)
    return np.where(rows[:, None] == columns, matrix, matrix.dtype.type(0))


def greedy_order(readings: Sequence[Reading], sets: int = 1) -> tuple[IntArray, FloatArray]:
    """Order channels so that the first K of them, for any K, leave a small damage with the best input map.

    Every step keeps the channel that reduces the summed J most, given those that are kept already (forward selection).
    Time is O(C^3) for each covariance, nearly all of it in products of matrices.

    Args:
        readings: At least one; all of the same C.
        sets: Into how many sets of equal size the channels fall, one after the other; after every round of so many
            steps each set has as many channels that are kept.

    Returns:
        Channels in order, shape (C,), int64, and the damage that is left with the first k kept, shape (C + 1,).
    """
    channels = len(readings[0].covariance)
    residuals = [_Residual(covariance, weights) for covariance, weights in _by_covariance(readings)]
    damage = [sum(residual.damage for residual in residuals)]
    order = np.empty(channels, np.int64)
    # The channel of every row that the residuals still have, and whether it is left to be chosen.
    rows, left = np.arange(channels), np.ones(channels, bool)
    waits = np.ones(sets, bool)
    for step in range(channels):
        gains = sum(residual.gains() for residual in residuals) + np.zeros(len(rows))
        gains[~left | ~waits[rows * sets // channels]] = -1.0
        best = int(np.argmax(gains))
        order[step] = rows[best]
        left[best] = waits[order[step] * sets // channels] = False
        if not waits.any():
            waits[:] = True
        lost = sum(residual.eliminate(best) for residual in residuals)
        damage.append(max(damage[-1] - lost, 0.0))
        if residuals[0].pending == _BLOCK and step + 1 < channels:
            for residual in residuals:
                residual.update()
            if left.mean() <= 1 - _CROWDED:
                for residual in residuals:
                    residual.drop(left)
                rows, left = rows[left], left[left]
    return order, np.asarray(damage)


def _by_covariance(readings: Sequence[Reading]) -> list[tuple[Floats, Floats]]:
    """Return every covariance with the weights of all who see it; the same array is the same covariance."""
    found: dict[int, list[Reading]] = {}
    for reading in readings:
        found.setdefault(id(reading.covariance), []).append(reading)
    return [(same[0].covariance, np.concatenate([r.weights for r in same], axis=1)) for same in found.values()]


class _Residual:
    r"""What the channels that are kept don't tell of the others: S, and what it means to the readers, G = S V V^T S.

    Keeping channel c lowers J by :math:`G_{cc} / S_{cc}`, and with :math:`u = S_c / \sqrt{S_{cc}}`,
    :math:`g = G_c / \sqrt{S_{cc}}` and :math:`h = g - u G_{cc} / 2 S_{cc}`

    .. math:: S' = S - u u^T, \qquad G' = G - u h^T - h u^T

    so the two matrices follow from themselves. Only their diagonals are needed at each step, and one column; so the
    products are put off and done for a block of steps at once. Of both matrices only the upper triangle is kept.

    Args:
        covariance: S with nothing kept, shape (C, C); not changed.
        weights: V, shape (C, D).

    Attributes:
        damage: J with nothing kept.
    """

    def __init__(self, covariance: Floats, weights: Floats) -> None:
        """Start with nothing kept."""
        channels = len(covariance)
        self.covariance: Floats = covariance.copy()
        # What is below the diagonal is carried along here and there, so it must be numbers.
        self.meaning: Floats = np.zeros_like(self.covariance)
        read: AnyArray = np.asarray(row_coordinates(weights), covariance.dtype)
        seen = covariance @ read
        self.damage = sum(float(np.vdot(seen[strip], read[strip])) for strip in strips(channels))
        for strip in strips(channels):
            np.matmul(seen[strip], seen[strip.start :].T, out=self.meaning[strip, strip.start :])
        rounding = _ROUNDING if covariance.dtype == np.float64 else _SINGLE_ROUNDING
        self.floor = rounding * np.maximum(np.diag(covariance).astype(np.float64), 0.0) + np.finfo(float).tiny
        self._start()

    def _start(self) -> None:
        self.pending = 0
        self.variance = np.diag(self.covariance).astype(np.float64)
        self.explained = np.diag(self.meaning).astype(np.float64)
        self.u, self.h = np.empty((2, _BLOCK, len(self.floor)), self.covariance.dtype)

    def gains(self) -> FloatArray:
        """Return by how much J falls with each channel; 0 for those that are told already."""
        is_open = self.variance > self.floor
        gains: FloatArray = np.zeros_like(self.variance)
        np.divide(np.maximum(self.explained, 0.0), self.variance, out=gains, where=is_open)
        return gains

    def eliminate(self, channel: int) -> float:
        """Regress every channel on one; return by how much J falls."""
        step = self.pending
        self.pending += 1
        u, h = self.u[step], self.h[step]
        if self.variance[channel] <= self.floor[channel]:
            u[:], h[:] = 0.0, 0.0
            return 0.0
        before_u, before_h = self.u[:step], self.h[:step]
        root = np.sqrt(self.variance[channel])
        u[:] = (_column(self.covariance, channel) - before_u[:, channel] @ before_u) / root
        h[:] = _column(self.meaning, channel) - before_h[:, channel] @ before_u - before_u[:, channel] @ before_h
        lost = max(float(h[channel] / self.variance[channel]), 0.0)
        h[:] = h / root - 0.5 * lost * u
        self.variance -= u * u
        self.explained -= 2 * u * h
        return lost

    def update(self) -> None:
        """Work out what the choices since the last time leave of the matrices."""
        u, h = self.u[: self.pending], self.h[: self.pending]
        left, right = np.concatenate([u, h]), np.concatenate([h, u])
        for strip in strips(len(self.covariance)):
            rest = slice(strip.start, None)
            self.covariance[strip, rest] -= u[:, strip].T @ u[:, rest]
            self.meaning[strip, rest] -= left[:, strip].T @ right[:, rest]
        self._start()

    def drop(self, left: BoolArray) -> None:
        """Forget all channels but some, of which no column is asked for any more."""
        self.covariance, self.meaning = _part(self.covariance, left), _part(self.meaning, left)
        self.floor = self.floor[left]
        self._start()


def _column(matrix: Floats, channel: int) -> Floats:
    """Return a column of a symmetric matrix of which the upper triangle is known."""
    return np.concatenate([matrix[:channel, channel], matrix[channel, channel:]])


def _part(matrix: Floats, left: BoolArray) -> Floats:
    """Return the rows and columns that are left of a symmetric matrix's upper triangle, in the memory of the whole."""
    rows = np.flatnonzero(left)
    # A row never moves behind the place where the next one is read from.
    part = matrix.reshape(-1)[: len(rows) ** 2].reshape(len(rows), len(rows))
    for strip in strips(len(rows)):
        part[strip, strip.start :] = matrix[rows[strip]].take(rows[strip.start :], axis=1)
    return part


def selection_damage(readings: Sequence[Reading], kept: IntArray) -> float:
    """Return J for keeping some channels with the best input map; the independent form of `greedy_order`'s damage."""
    total = 0.0
    for reading in readings:
        cross = reading.covariance[:, kept]
        inside = reading.covariance[np.ix_(kept, kept)]
        solved = np.linalg.lstsq(inside, cross.T @ reading.weights, rcond=_ROUNDING)[0]
        total += float(np.vdot(reading.covariance @ reading.weights - cross @ solved, reading.weights))
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
        >>> copies = Reading(np.diag([2.0, 1.0]), np.eye(2), np.diag([3.0, 5.0]) ** 0.5)
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
        total += np.square(reading.weights).sum(axis=1) * unexplained
    return total


def rebuilding_map(readings: Sequence[Reading], kept: IntArray) -> Floats:
    r"""Return :math:`B^* = S_{hh'} (S_{h'h'} + \lambda I)^{-1}` where some channels h' are kept, and the others go.

    Several readers share one map: that of their covariances' average, each weighted by its damage.

    Args:
        readings: At least one.
        kept: The channels, shape (K,).

    Returns:
        Shape (C, K), float64, float32 if the covariances are; rows of channels that are kept are exact.
    """
    covariance = _shared_covariance(readings)
    inside = _ridged(covariance[np.ix_(kept, kept)])
    # What is kept as it is needs no solution; often that is half of all.
    rest = np.delete(np.arange(len(covariance)), kept)
    solved: Floats = np.zeros((len(covariance), len(kept)), covariance.dtype)
    solved[rest] = np.linalg.solve(inside, covariance[np.ix_(rest, kept)].T).T
    solved[kept, np.arange(len(kept))] = 1.0
    return solved


def _ridged(inside: Floats) -> Floats:
    """Add the ridge of the input map to the covariance of the channels that are left; changes it."""
    scale = float(np.trace(inside)) / len(inside)
    inside[np.diag_indices(len(inside))] += _RIDGE * (scale if scale > 0 else 1.0)
    return inside


def _shared_covariance(readings: Sequence[Reading]) -> Floats:
    """Return the average of the readings' covariances, each weighted by its damage."""
    if all(reading.covariance is readings[0].covariance for reading in readings):
        return readings[0].covariance
    total = np.zeros_like(readings[0].covariance)
    for share, reading in zip(_shares(readings), readings, strict=True):
        total += share * reading.covariance
    return total


def _shares(readings: Sequence[Reading]) -> FloatArray:
    """Return how much each reader counts for the map that they share; sum 1."""
    weights = np.array([max(reading.damage, 0.0) for reading in readings]) + np.finfo(float).tiny
    return np.asarray(weights / weights.sum())


def _input_map(cross: Floats, inside: Floats) -> FloatArray:
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
    heard = [_heard(reading, found) for reading, found in zip(readings, moments, strict=True)]
    shares = _shares(readings)
    cross = np.sum([share * found.cross for share, found in zip(shares, heard, strict=True)], axis=0)
    inside = np.sum([share * found.inside for share, found in zip(shares, heard, strict=True)], axis=0)
    sets = max(reading.sets for reading in readings)
    found = _input_map(within_sets(cross, sets), within_sets(inside, sets))
    return _exact_where_kept(found, output) if exact else found


def _heard(reading: Reading, moments: FusedMoments) -> FusedMoments:
    """Return the moments that count for a reader: about zero where nothing makes means good."""
    return moments if reading.has_shift else moments.about_zero()


def fused_damage(readings: Sequence[Reading], moments: Sequence[FusedMoments], input_map: FloatArray) -> float:
    """Return J of an output and an input map, summed over readers: of any two, fused before the activation.

    Args:
        readings: At least one.
        moments: Those of each reader's channels and fused channels.
        input_map: B, shape (C, K).
    """
    total = 0.0
    for reading, found in zip(readings, moments, strict=True):
        seen = _heard(reading, found)
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
