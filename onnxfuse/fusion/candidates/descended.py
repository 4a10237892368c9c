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
_FOLLOW = 10
# Rows for one step, at least, and for every channel.
_ROWS, _ROWS_PER_CHANNEL = 512, 2
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
    if len(views) < len(known.readings):
        return
    square = np.mean([np.square(view.rows - view.rows.mean(axis=0)).mean(axis=0) for view in views], axis=0)
    deviation = np.sqrt(square)
    size = float(np.sqrt(square.mean()))
    if not size > 0:
        return
    # Coefficients for channels of one size: a step changes what each channel adds by about as much.
    deviation = np.maximum(deviation, _STILLEST * size)
    start = known.selection * deviation
    input_map = np.zeros(start.T.shape)

    def gradients(at: Mapping[str, FloatArray], step: int) -> dict[str, FloatArray]:
        nonlocal input_map
        output = at["output"] / deviation
        if step % _FOLLOW == 0:
            moments = [view.channels.fused(output) for view in views]
            input_map = fused_input_map(known.readings, moments, output, exact=False)
        slopes = [view.slope(output, input_map, step, _SLOPE * size) for view in views]
        return {"output": np.sum(slopes, axis=0) / deviation}

    unit = float(np.sqrt(np.square(start).sum(axis=1).mean()))
    yield descend({"output": start}, {"output": unit}, gradients, _STEPS, _RATE)["output"] / deviation


def _observed(reading: Reading) -> ObservedChannels | None:
    """Return the half of a reader's channels that maps are fitted to, if it is of samples."""
    found = None if reading.channels is None else reading.channels[0]
    return found if isinstance(found, ObservedChannels) else None


class _View:
    """One reader's rows, in batches."""

    def __init__(self, reading: Reading, rng: np.random.Generator) -> None:
        channels = _observed(reading)
        assert channels is not None
        self.channels = channels
        self.rows = np.asarray(channels.rows, np.float64)
        self.strength = reading.strength
        self.order = rng.permutation(len(self.rows))
        self.whole = channels.function(self.rows)
        self.mean = self.whole.mean(axis=0) if reading.has_shift else np.zeros(self.whole.shape[1])
        self.has_shift = reading.has_shift
        self.batch = min(max(_ROWS, _ROWS_PER_CHANNEL * self.rows.shape[1]), len(self.rows))

    def slope(self, output: FloatArray, input_map: FloatArray, step: int, width: float) -> FloatArray:
        """Return the gradient of J with respect to the output map on one batch, shape (K, C)."""
        taken = self.order[(step * self.batch + np.arange(self.batch)) % len(self.order)]
        rows, function = self.rows[taken], self.channels.function
        before = rows @ output.T
        fused = function(before)
        gained = (function(before + width) - function(before - width)) / (2 * width)
        if self.has_shift:
            fused = fused - fused.mean(axis=0)
        # The error h - B h', seen through the readers and the input map.
        heard = self.strength @ input_map
        error = (self.whole[taken] - self.mean) @ heard - fused @ (input_map.T @ heard)
        if self.has_shift:
            error = error - error.mean(axis=0)
        return np.asarray(-2.0 / len(taken) * (error * gained).T @ rows)
