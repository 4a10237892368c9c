"""Windows: the part of every sample's places that a step of the reconstruction takes.

Early layers of a network of images have many places, neighbouring ones are much alike, and each is made from a few
neighbours. So a step learns nearly as much from a window of some samples as from all their places, for a fraction of
the work.

At the border of a window a convolution meets zeros where in the whole sample there are neighbours. Which places of a
window come out as they do in the whole is found by trying: two windows in the middle and one in either corner are run
by themselves and compared with the whole. That needs no rule for any operator. Where no place comes out right, what is
made is not local (there is a mean over all places, or an attention), and there are no windows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np

__all__ = ["Windows", "find_windows"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Shape: TypeAlias = tuple[int, ...]
Part = TypeVar("Part")

# How wide a border to allow for, in places of the coarsest value: the first that leaves enough places.
_BORDERS = (2, 4, 8, 16)
# A window is worth it if a sample has so many times its places.
_LEAST_GAIN = 2.0
# Which share of a window has to come out right.
_LEAST_SHARE = 0.2
# After so many windows of which nothing comes out right, what is made is not local.
_MOST_MISSES = 2
# Places agree if they differ by less than this share of the values' deviation.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class _Grid:
    """Where the places of a value are.

    Attributes:
        axes: Its axes that places are on.
        scales: How many of its indices make one of a window's places, for each.
    """

    axes: Shape
    scales: Shape

    def window(self, value: AnyArray, at: Shape, size: Shape) -> AnyArray:
        """Return the part of a value that belongs to a window."""
        index = [slice(None)] * value.ndim
        for axis, scale, start, count in zip(self.axes, self.scales, at, size, strict=True):
            index[axis] = slice(start * scale, (start + count) * scale)
        return np.ascontiguousarray(value[tuple(index)])

    def shape(self, shape: Shape, size: Shape) -> Shape:
        """Return the shape of that part."""
        found = list(shape)
        for axis, scale, count in zip(self.axes, self.scales, size, strict=True):
            found[axis] = scale * count
        return tuple(found)

    def mask(self, dimensions: int, right: Sequence[AnyArray]) -> AnyArray:
        """Return a mask that broadcasts against a value, from one for each axis of places."""
        mask = np.ones((1,) * dimensions, bool)
        for axis, one in zip(self.axes, right, strict=True):
            mask = mask & np.expand_dims(one, tuple(a for a in range(dimensions) if a != axis))
        return mask


@dataclass(frozen=True)
class Windows:
    """Windows of one size, anywhere in a sample.

    Attributes:
        counts: How many places a sample has on each axis, in the coarsest value.
        size: How many of them a window has.
        inputs: Where the places of each input are.
        outputs: Where the places of each output are.
        right: Which of a window's indices come out right: for every output and axis a mask for windows at the start of
            the sample, one for windows anywhere in it, and one for those at its end.
    """

    counts: Shape
    size: Shape
    inputs: tuple[_Grid, ...]
    outputs: tuple[_Grid, ...]
    right: tuple[tuple[tuple[AnyArray, ...], ...], ...] = ()

    def draw(
        self, inputs: Sequence[AnyArray], targets: Sequence[AnyArray], rng: np.random.Generator
    ) -> tuple[list[AnyArray], list[AnyArray], list[AnyArray]]:
        """Return a window at a random place.

        Args:
            inputs: What goes in, whole.
            targets: What should come out, whole.
            rng: Draws the place.

        Returns:
            The window of each input and of each target, and for each target which places come out right: booleans
            that broadcast against it.
        """
        at = tuple(int(rng.integers(0, last + 1)) for last in self._last)
        masks = []
        for target, grid, axes in zip(targets, self.outputs, self.right, strict=True):
            cases = [
                told[0 if start == 0 else 2 if start == last else 1]
                for told, start, last in zip(axes, at, self._last, strict=True)
            ]
            masks.append(grid.mask(target.ndim, cases))
        return *self._cut(inputs, targets, at), masks

    def compared(
        self,
        inputs: Sequence[AnyArray],
        outputs: Sequence[AnyArray],
        run: Callable[[Sequence[AnyArray]], Sequence[AnyArray]],
    ) -> "tuple[Windows, float]":
        """Find out which places come out right.

        Args:
            inputs: What goes in, whole.
            outputs: What comes out of that, whole.
            run: Returns what comes out of a window.

        Returns:
            The same windows, which know it, and the smallest share of a window that comes out right.
        """
        # What goes down to fewer places and up again treats every second place, say, alike, but not neighbours: so of
        # two neighbouring windows in the middle, only what is right in both counts.
        middle = tuple(last // 2 for last in self._last)
        beside = tuple(min(start + 1, last) for start, last in zip(middle, self._last, strict=True))
        first, *two, final = (
            self._right(inputs, outputs, run, at) for at in (tuple(0 for _ in middle), middle, beside, self._last)
        )
        anywhere = [[x & y for x, y in zip(*axes, strict=True)] for axes in zip(*two, strict=True)]
        cases = (first, anywhere, final)
        least = min(math.prod(float(one.mean()) for one in axes) for case in cases for axes in case)
        return replace(self, right=tuple(tuple(zip(*axes, strict=True)) for axes in zip(*cases, strict=True))), least

    def _right(
        self,
        inputs: Sequence[AnyArray],
        outputs: Sequence[AnyArray],
        run: Callable[[Sequence[AnyArray]], Sequence[AnyArray]],
        at: Shape,
    ) -> list[list[AnyArray]]:
        """Return which indices of one window come out right, for every output and axis."""
        cut_inputs, cut_outputs = self._cut(inputs, outputs, at)
        made = zip(run(cut_inputs), cut_outputs, self.outputs, strict=True)
        return [_agreeing(found, wanted, grid.axes) for found, wanted, grid in made]

    @property
    def _last(self) -> Shape:
        return tuple(count - size for count, size in zip(self.counts, self.size, strict=True))

    def _cut(
        self, inputs: Sequence[AnyArray], outputs: Sequence[AnyArray], at: Shape
    ) -> tuple[list[AnyArray], list[AnyArray]]:
        return (
            [grid.window(value, at, self.size) for value, grid in zip(inputs, self.inputs, strict=True)],
            [grid.window(value, at, self.size) for value, grid in zip(outputs, self.outputs, strict=True)],
        )


def find_windows(
    inputs: Sequence[AnyArray],
    outputs: Sequence[AnyArray],
    places: int,
    build: Callable[[Sequence[Shape], Sequence[Shape]], Part | None],
    run: Callable[[Part, Sequence[AnyArray]], Sequence[AnyArray]],
) -> tuple[Windows, Part] | None:
    """Find windows of a segment.

    Args:
        inputs: What goes in, for some samples, on the first axis.
        outputs: What comes out of that.
        places: How many places of all these samples together are wanted, in the coarsest value.
        build: Builds the segment for inputs and outputs of some shapes; None if it can't be for these.
        run: Returns what the built segment makes of inputs.

    Returns:
        The smallest windows of which a fair share comes out as in the whole, with what was built for them; None if all
        are too large to be of use, or what is made is not local.
    """
    misses = 0
    for proposal in _proposals([x.shape for x in inputs], [y.shape for y in outputs], places):
        part = build(
            [grid.shape(x.shape, proposal.size) for x, grid in zip(inputs, proposal.inputs, strict=True)],
            [grid.shape(y.shape, proposal.size) for y, grid in zip(outputs, proposal.outputs, strict=True)],
        )
        if part is None:
            continue
        windows, share = proposal.compared(inputs, outputs, partial(run, part))
        if share >= _LEAST_SHARE:
            return windows, part
        misses += not share
        if misses == _MOST_MISSES:
            break
    return None


def _proposals(inputs: Sequence[Shape], outputs: Sequence[Shape], places: int) -> Iterator[Windows]:
    """Yield windows to try, those with narrow borders first."""
    dimensions = min(len(shape) for shape in (*inputs, *outputs)) - 2
    if dimensions < 1 or not outputs[0][0]:
        return
    for border in _BORDERS:
        for shapes in (outputs, (*outputs, *inputs)):
            counts = tuple(min(shape[2 + axis] for shape in shapes) for axis in range(dimensions))
            grids = [_grid(shape, counts) for shape in (*inputs, *outputs)]
            known = tuple(grid for grid in grids if grid is not None)
            if len(known) < len(grids):
                continue
            side = math.ceil((places / outputs[0][0]) ** (1 / dimensions)) + 2 * border
            size = tuple(min(side, count) for count in counts)
            if math.prod(counts) >= _LEAST_GAIN * math.prod(size):
                yield Windows(counts, size, known[: len(inputs)], known[len(inputs) :])
            break


def _grid(shape: Shape, counts: Shape) -> _Grid | None:
    """Return where the places of a value are, behind its channels or before them; None if it doesn't have such."""
    if len(shape) != len(counts) + 2:
        return None
    for first in (2, 1):
        sizes = shape[first : first + len(counts)]
        if all(size and size % count == 0 for size, count in zip(sizes, counts, strict=True)):
            scales = tuple(size // count for size, count in zip(sizes, counts, strict=True))
            return _Grid(tuple(range(first, first + len(counts))), scales)
    return None


def _agreeing(made: AnyArray, wanted: AnyArray, axes: Shape) -> list[AnyArray]:
    """Return for each axis which indices agree, so that where all of them do, values do.

    Values agree where they do in all samples and channels; an index, where it does in the middle of the other axes.
    """
    if not (np.isfinite(made).all() and np.isfinite(wanted).all()):
        return [np.zeros(wanted.shape[axis], bool) for axis in axes]
    bound = _TOLERANCE * max(float(np.std(wanted, dtype=np.float64)), 1e-12)
    rest = tuple(axis for axis in range(wanted.ndim) if axis not in axes)
    agrees: AnyArray = np.asarray((np.abs(made.astype(np.float64) - wanted) <= bound).all(axis=rest))
    middle = tuple(slice(size // 2, size // 2 + 1) for size in agrees.shape)
    found: list[AnyArray] = []
    for own in range(agrees.ndim):
        core = tuple(slice(None) if axis == own else part for axis, part in enumerate(middle))
        others = tuple(axis for axis in range(agrees.ndim) if axis != own)
        found.append(np.asarray(agrees[core].all(axis=others)))
    if not agrees[np.ix_(*found)].all():
        return [np.zeros_like(one) for one in found]
    return found
