"""The output map that gradient descent on J finds, from the selection on."""

from collections.abc import Iterator, Mapping

import numpy as np

from onnxfuse.arrays import FloatArray
from onnxfuse.fusion.candidates.protocol import Known
from onnxfuse.statistics.channels import ObservedChannels
from onnxfuse.statistics.damage import Reading, fused_input_map
from onnxfuse.statistics.descent import descend

__all__ = ["descent"]

_STEPS, _RATE = 100, 0.02
# The input map follows once in so many steps.
_FOLLOW = 20
# Rows for one step; for the input map, at least and for every channel.
_ROWS, _MAP_ROWS, _MAP_ROWS_PER_CHANNEL = 512, 2048, 4
# More would take minutes.
_MOST_CHANNELS = 1024
# Coefficients of channels that hardly change are not to grow without bound: the least deviation, in root mean squares.
_STILLEST = 0.1
# By how much an argument is moved to see the slope of an activation, in deviations of all.
_SLOPE = 1e-3


def descent(known: Known, rng: np.random.Generator, /) -> Iterator[FloatArray]:
    """Yield where gradient descent on J ends.

    J is that of the first half of the rows, so that the other half tells whether the descent has led anywhere. With the
    best input map, the gradient is that for a fixed one (envelope theorem), so that map follows in steps of its own.

    Args:
        known: What is known about the group's C channels, and which K are selected.
        rng: Source of the order of rows.
    """
    views = [_View(reading, rng) for reading in known.readings if _observed(reading) is not None]
    if len(views) < len(known.readings) or known.features.channels > _MOST_CHANNELS:
        return
    square = np.mean([np.square(view.rows - view.rows.mean(axis=0)).mean(axis=0) for view in views], axis=0)
    deviation = np.sqrt(square)
    size = float(np.sqrt(square.mean()))
    if not size > 0:
        return
    # Coefficients for channels of one size: a step changes what each channel adds by about as much.
    deviation = np.maximum(deviation, _STILLEST * size)
    start = known.selection * deviation

    def gradients(at: Mapping[str, FloatArray], step: int) -> dict[str, FloatArray]:
        output = at["output"] / deviation
        if step % _FOLLOW == 0:
            moments = [view.few.fused(output) for view in views]
            input_map = fused_input_map(known.readings, moments, output, exact=False)
            for view in views:
                view.follow(input_map)
        slopes = [view.slope(output, step, _SLOPE * size) for view in views]
        return {"output": np.sum(slopes, axis=0) / deviation}

    unit = float(np.sqrt(np.square(start).sum(axis=1).mean()))
    yield descend({"output": start}, {"output": unit}, gradients, _STEPS, _RATE)["output"] / deviation


def _observed(reading: Reading) -> ObservedChannels | None:
    """Return the half of a reader's channels that maps are fitted to, if it is of samples."""
    found = None if reading.channels is None else reading.channels[0]
    return found if isinstance(found, ObservedChannels) else None


class _View:
    """One reader's rows, in batches; in single precision, as steps are small and many."""

    def __init__(self, reading: Reading, rng: np.random.Generator) -> None:
        channels = _observed(reading)
        assert channels is not None
        self.function, self.strength, self.has_shift = channels.function, reading.strength, reading.has_shift
        self.rows = np.asarray(channels.rows[rng.permutation(len(channels.rows))], np.float32)
        whole = self.function(np.asarray(self.rows, np.float64))
        self.whole = (whole - whole.mean(axis=0) if reading.has_shift else whole).astype(np.float32)
        self.few = ObservedChannels(self.function, self.rows[: max(_MAP_ROWS, _MAP_ROWS_PER_CHANNEL * whole.shape[1])])
        self.batch = min(_ROWS, len(self.rows))
        self.follow(np.zeros((whole.shape[1], 1)))

    def follow(self, input_map: FloatArray) -> None:
        """Take another input map B, shape (C, K)."""
        heard = self.strength @ input_map
        self.heard, self.answered = heard.astype(np.float32), (input_map.T @ heard).astype(np.float32)

    def slope(self, output: FloatArray, step: int, width: float) -> FloatArray:
        """Return the gradient of J with respect to the output map on one batch, shape (K, C)."""
        taken = (step * self.batch + np.arange(self.batch)) % len(self.rows)
        rows = self.rows[taken]
        before = np.asarray(rows @ output.T.astype(np.float32), np.float64)
        fused = self.function(before).astype(np.float32)
        gained = (self.function(before + width) - self.function(before - width)) / (2 * width)
        if self.has_shift:
            fused = fused - fused.mean(axis=0)
        # The error h - B h', heard by the readers and through B.
        error = self.whole[taken] @ self.heard - fused @ self.answered
        if self.has_shift:
            error = error - error.mean(axis=0)
        return np.asarray(-2.0 / len(taken) * ((error * gained).astype(np.float32).T @ rows), np.float64)
