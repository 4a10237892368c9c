"""What is summed up, or kept, of the values of one run after the other: moments, variances, rows.

Memory is that of the results, however many samples there are.
"""

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from onnxfuse.arrays import FloatArray, Floats, IntArray, add_products, finite_rows, join_axes, mirror, strips
from onnxfuse.coupling.sets import Places
from onnxfuse.statistics.channels import Channels, ObservedChannels
from onnxfuse.statistics.damage import shrunk
from onnxfuse.statistics.gaussian import Elementwise
from onnxfuse.statistics.relative import variance_errors

__all__ = ["FEWEST_CHANNEL_ROWS", "ChannelRows", "MomentSums", "OutputSpread"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# How many numbers of a value are squared at a time.
_PART = 2**21
FEWEST_CHANNEL_ROWS = 1.5
"""Rows of channels before their activation are worth halving if each half has so many for every channel."""


@dataclass
class MomentSums:
    """Sums over rows of one group's channels in one value; a channel has m places on the axis, each in rows of its own.

    Attributes:
        value: The value.
        places: Where the channels are in it.
        independent: How many independent observations the rows are worth.
        totals: Sums of each place, shape (m, C), float64.
        counts: How many rows each place has, shape (m,), int64.
        products: X^T X, of which the upper triangle is known, shape (C, C), float64.
        powers: Sums of the first four powers of what each channel is away from ``origin``, shape (4, C), float64.
        origin: The mean of each channel in the first rows, shape (C,), float64; None before there are any.
    """

    value: str
    places: Places
    independent: float = 0.0
    totals: FloatArray = field(init=False)
    counts: IntArray = field(init=False)
    products: FloatArray = field(init=False)
    powers: FloatArray = field(init=False)
    origin: FloatArray | None = None

    def __post_init__(self) -> None:
        """Start with nothing summed."""
        channels, copies = self.places.index.shape
        self.totals, self.counts = np.zeros((copies, channels)), np.zeros(copies, np.int64)
        self.products, self.powers = np.zeros((channels, channels)), np.zeros((4, channels))

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
        self.counts += np.bincount(of_copy, minlength=copies)
        if len(part) == len(rows) * copies:
            self.totals += part.reshape(-1, copies, len(where)).sum(axis=0, dtype=np.float64)
        else:
            np.add.at(self.totals, of_copy, part)
        # Squares of large numbers may overflow; what is not finite in the end is left out.
        with np.errstate(over="ignore", invalid="ignore"):
            add_products(self.products, part)
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
        return bool(self.counts.all()) and bool(np.isfinite(self.products.sum()))

    @property
    def means(self) -> FloatArray:
        """Those of every channel at each of its places, shape (C, m)."""
        return np.asarray((self.totals / self.counts[:, None]).T)

    @property
    def variance_errors(self) -> FloatArray:
        """By how much each channel's variance may well be larger than it seems: its relative standard error, (C,)."""
        with np.errstate(over="ignore", invalid="ignore"):
            return variance_errors(self.powers / int(self.counts.sum()), self.independent)

    def estimates(self, *, centred: bool) -> tuple[Floats, Floats]:
        """Return the covariance and the second moments about zero; twice the latter if not ``centred``.

        The sums, which may be the largest thing in memory, are used up.
        """
        count = int(self.counts.sum())
        mean = self.totals.sum(axis=0) / count
        products, self.products = self.products, np.zeros((0, 0))
        mirror(products)
        for strip in strips(len(mean)):
            products[strip] /= count
            products[strip] -= np.outer(mean[strip], mean)
        second = covariance = shrunk(products, self.independent)
        del products
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
