"""What is summed up, or kept, of the values of one run after the other: moments, variances, rows.

Memory is that of the results, however many samples there are.
"""

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from onnxfuse.arrays import FloatArray, Floats, IntArray, add_products, finite_rows, join_axes, mirror, strips
from onnxfuse.coupling.sets import Places
from onnxfuse.statistics.channels import Channels, ObservedChannels
from onnxfuse.statistics.damage import Half, shrunk
from onnxfuse.statistics.gaussian import Elementwise
from onnxfuse.statistics.relative import variance_errors

__all__ = ["FEWEST_CHANNEL_ROWS", "ChannelRows", "MomentSums", "OutputSpread"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# How many numbers of a value are squared at a time.
_PART = 2**21
FEWEST_CHANNEL_ROWS = 1.5
"""Rows of channels before their activation are worth halving if each half has so many for every channel."""


class _Sums:
    """Sums over rows of C channels, each with m places.

    Attributes:
        totals: Sums of each place, shape (m, C), float64.
        counts: How many rows each place has, shape (m,), int64.
        products: X^T X, of which the upper triangle is known, shape (C, C), float64.
    """

    def __init__(self, channels: int, copies: int) -> None:
        """Start with nothing summed."""
        self.totals, self.counts = np.zeros((copies, channels)), np.zeros(copies, np.int64)
        self.products = np.zeros((channels, channels))

    def add(self, part: AnyArray, of_copy: IntArray) -> None:
        """Add rows, shape (rows, C), of some of the places, shape (rows,)."""
        copies, channels = self.totals.shape
        counts = np.bincount(of_copy, minlength=copies)
        self.counts += counts
        if (counts == counts[0]).all() and np.array_equal(of_copy, np.tile(np.arange(copies), counts[0])):
            self.totals += part.reshape(-1, copies, channels).sum(axis=0, dtype=np.float64)
        else:
            np.add.at(self.totals, of_copy, part)
        # Squares of large numbers may overflow; what is not finite in the end is left out.
        with np.errstate(over="ignore", invalid="ignore"):
            add_products(self.products, part)

    def merge(self, other: "_Sums") -> None:
        """Add what others have summed."""
        self.totals += other.totals
        self.counts += other.counts
        self.products += other.products

    @property
    def mean(self) -> FloatArray:
        """That of every channel over all its places, shape (C,)."""
        return np.asarray(self.totals.sum(axis=0) / int(self.counts.sum()))

    def half(self, count: float) -> Half:
        """Return what these sums say, if they are worth so many independent observations."""
        return Half(_covariance(self.products.copy(), self).astype(np.float32), self.mean, count)

    def covariance(self) -> FloatArray:
        """Return the covariance; the products, which may be the largest thing in memory, are used up."""
        products, self.products = self.products, np.zeros((0, 0))
        return _covariance(products, self)


def _covariance(products: FloatArray, sums: _Sums) -> FloatArray:
    """Return the covariance that products of sums say, in their memory."""
    mirror(products)
    mean, count = sums.mean, int(sums.counts.sum())
    for strip in strips(len(mean)):
        products[strip] /= count
        products[strip] -= np.outer(mean[strip], mean)
    return products


@dataclass
class MomentSums:
    """Sums over rows of one group's channels in one value; a channel has m places on the axis, each in rows of its own.

    Attributes:
        value: The value.
        places: Where the channels are in it.
        in_halves: Whether to tell apart what one half of the samples says, and the other.
        independent: How many independent observations the rows are worth.
        powers: Sums of the first four powers of what each channel is away from ``origin``, shape (4, C), float64.
        origin: The mean of each channel in the first rows, shape (C,), float64; None before there are any.
        runs: How many runs there were.
    """

    value: str
    places: Places
    in_halves: bool = False
    independent: float = 0.0
    powers: FloatArray = field(init=False)
    origin: FloatArray | None = None
    runs: int = 0

    def __post_init__(self) -> None:
        """Start with nothing summed."""
        shape = self.places.index.shape
        self._sums = [_Sums(*shape) for _ in range(1 + self.in_halves)]
        self.powers = np.zeros((4, shape[0]))

    def add(self, array: AnyArray, samples: int, share: float, rng: np.random.Generator) -> None:
        """Add a share of the places of a run that has so many samples."""
        # Neighbouring places of one sample are alike; the root of their number is a fair guess of how many count.
        where = self.places.index
        moved = np.atleast_2d(join_axes(array, self.places.axes, last=True))
        places = array.size // moved.shape[-1]
        self.independent += samples * float(np.sqrt(max(places // samples, 1)))
        wanted = max(2, int(np.ceil(share * places)))
        # Places are chosen first, so that nothing else is copied.
        chosen = rng.choice(places, wanted, replace=False) if wanted < places else np.arange(places)
        rows = moved[np.unravel_index(chosen, moved.shape[:-1])]
        # (rows, C, m) -> (rows x m, C)
        copies = where.shape[1]
        part = rows[:, where].transpose(0, 2, 1).reshape(-1, len(where))
        part, of_copy = finite_rows(part, np.tile(np.arange(copies), len(rows)))
        self._sums[self.runs % len(self._sums)].add(part, of_copy)
        self.runs += 1
        # Squares of large numbers may overflow; what is not finite in the end is left out.
        with np.errstate(over="ignore", invalid="ignore"):
            self._add_powers(part)

    def _add_powers(self, part: AnyArray) -> None:
        if not len(part):
            return
        if self.origin is None:
            self.origin = part.mean(axis=0, dtype=np.float64)
        for rows in np.array_split(part, max(1, part.size // _PART)):
            away = rows - self.origin
            square = away * away
            self.powers += [x.sum(axis=0) for x in (away, square, square * away, square * square)]

    @property
    def is_sound(self) -> bool:
        """Whether there are sums, and none has overflown; samples that do say nothing, and the drift will tell."""
        seen = bool(self._counts.all())
        return seen and all(bool(np.isfinite(sums.products.sum())) for sums in self._sums)

    @property
    def means(self) -> FloatArray:
        """Those of every channel at each of its places, shape (C, m)."""
        totals = np.sum([sums.totals for sums in self._sums], axis=0)
        return np.asarray((totals / self._counts[:, None]).T)

    @property
    def variance_errors(self) -> FloatArray:
        """By how much each channel's variance may well be larger than it seems: its relative standard error, (C,)."""
        with np.errstate(over="ignore", invalid="ignore"):
            return variance_errors(self.powers / int(self._counts.sum()), self.independent)

    @property
    def _counts(self) -> IntArray:
        return np.asarray(np.sum([sums.counts for sums in self._sums], axis=0))

    def halves(self) -> tuple[Half, Half] | None:
        """Return what each half of the samples says; None where they are not told apart, or say nothing."""
        if not self.in_halves or not all(sums.counts.all() for sums in self._sums):
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            first, second = (sums.half(self.independent / 2) for sums in self._sums)
            # What single precision can't hold says nothing of other samples.
            is_finite = bool(np.isfinite(first.covariance.sum() + second.covariance.sum()))
        return (first, second) if is_finite else None

    def estimates(self, *, centred: bool) -> tuple[Floats, Floats]:
        """Return the covariance and the second moments about zero; twice the latter if not ``centred``.

        The sums, which may be the largest thing in memory, are used up.
        """
        whole, *others = self._sums
        for other in others:
            whole.merge(other)
        self._sums = [whole]
        mean = whole.mean
        second = covariance = shrunk(whole.covariance(), self.independent)
        if centred:
            second = covariance.copy()
        for strip in strips(len(mean)):
            second[strip] += np.outer(mean[strip], mean)
        return covariance, second


@dataclass
class OutputSpread:
    """Sums of a value, channel by channel.

    Attributes:
        axis: The axis that has the channels.
        count: How many rows there are.
        total: The sum of each channel, shape (O,), float64.
        squares: The sum of each channel's squares, likewise.
    """

    axis: int
    count: int = 0
    total: FloatArray = field(default_factory=lambda: np.zeros(1))
    squares: FloatArray = field(default_factory=lambda: np.zeros(1))

    def add(self, array: AnyArray) -> None:
        """Add all places of a run."""
        moved = np.moveaxis(array, self.axis, -1)
        for part in np.array_split(moved, max(1, array.size // _PART)):
            rows = finite_rows(part.reshape(-1, moved.shape[-1]))[0]
            self.count += len(rows)
            self.total = self.total + rows.sum(axis=0, dtype=np.float64)
            self.squares = self.squares + np.square(rows, dtype=np.float64).sum(axis=0)

    @property
    def variances(self) -> FloatArray:
        """The variance of each channel, shape (O,), float64."""
        count = max(self.count, 1)
        return np.asarray(np.maximum(self.squares / count - (self.total / count) ** 2, 0.0))


@dataclass
class ChannelRows:
    """Rows of one group's channels before their activation, in two halves from different samples.

    Attributes:
        value: The value.
        places: Where the channels are in it.
        wanted: About how many rows to take.
        halves: What was taken.
        seen: How many samples there were.
    """

    value: str
    places: Places
    wanted: int
    halves: tuple[list[AnyArray], list[AnyArray]] = field(default_factory=lambda: ([], []))
    seen: int = 0

    def add(self, array: AnyArray, samples: int, total: int, rng: np.random.Generator) -> None:
        """Take rows of a run that has so many of all samples."""
        where, parts = self.places.index, join_axes(array, self.places.axes, last=True)
        # Where samples are not along the first axis, a whole run counts as one.
        parts = parts.reshape(samples if len(parts) % samples == 0 else 1, -1, parts.shape[-1])
        places = -(-self.wanted * samples // (total * len(parts)))
        for part in parts:
            rows = part[rng.integers(0, len(part), min(places, len(part)))]
            spread = rows[:, where].transpose(0, 2, 1).reshape(-1, len(where))
            self.halves[self.seen % 2].append(finite_rows(spread)[0])
            self.seen += 1

    def channels(self, function: Elementwise) -> tuple[Channels, Channels] | None:
        """Return both halves; None where there are too few samples for two."""
        rows = [np.concatenate(half).astype(np.float32) if half else np.empty((0, 0)) for half in self.halves]
        if min(len(half) for half in rows) < FEWEST_CHANNEL_ROWS * len(self.places.index):
            return None
        first, second = (ObservedChannels(function, half) for half in rows)
        return first, second
