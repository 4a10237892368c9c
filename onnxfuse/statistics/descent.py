"""Gradient descent for a handful of arrays: Adam (Kingma and Ba, "Adam: a method for stochastic optimization", 2015).

Steps are relative to each array's own size, so that one rate suits all, and fade out along half a cosine.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

from onnxfuse.arrays import FloatArray

__all__ = ["descend"]

Arrays: TypeAlias = Mapping[str, FloatArray]

_MEAN_DECAY, _SQUARE_DECAY = 0.9, 0.999
_EPSILON = 1e-12


def descend(
    start: Arrays, sizes: Mapping[str, float], gradients: Callable[[Arrays, int], Arrays], steps: int, rate: float
) -> dict[str, FloatArray]:
    """Follow gradients downhill.

    Args:
        start: Where to start, float64 arrays by name; not changed.
        sizes: What counts as one unit of each array, > 0.
        gradients: Called with the arrays and the number of the step; returns the gradient of each.
        steps: How many steps.
        rate: How far the first steps go, in units.

    Returns:
        Where the steps end.

    Example:
        >>> found = descend({"x": np.array([4.0])}, {"x": 1.0}, lambda at, _: {"x": 2 * at["x"]}, 200, 0.1)
        >>> bool(abs(found["x"][0]) < 0.01)
        True
    """
    at = {name: value.astype(np.float64) for name, value in start.items()}
    averages: dict[str, _Averages] = {}
    for step in range(steps):
        found = gradients(at, step)
        pace = rate * 0.5 * (1 + np.cos(np.pi * step / steps))
        for name, gradient in found.items():
            if name not in averages:
                averages[name] = _Averages(gradient)
            at[name] = at[name] - averages[name].direction(gradient, step + 1, pace * sizes[name])
    return at


class _Averages:
    """Running means of a gradient and of its square, as precise as the gradient, in memory that is used again."""

    def __init__(self, gradient: FloatArray) -> None:
        """Start from nothing."""
        self.mean, self.square, self.spare = (np.zeros_like(gradient) for _ in range(3))

    def direction(self, gradient: FloatArray, step: int, pace: float) -> FloatArray:
        """Return the next step, to be subtracted; it is overwritten by the one after that."""
        spare = self.spare
        # The square of a gradient may be more than single precision holds: then there is no step.
        with np.errstate(over="ignore", invalid="ignore"):
            return self._direction(gradient, step, pace, spare)

    def _direction(self, gradient: FloatArray, step: int, pace: float, spare: FloatArray) -> FloatArray:
        self.mean *= _MEAN_DECAY
        self.mean += np.multiply(gradient, 1 - _MEAN_DECAY, out=spare)
        self.square *= _SQUARE_DECAY
        np.square(gradient, out=spare)
        spare *= 1 - _SQUARE_DECAY
        self.square += spare
        np.divide(self.square, 1 - _SQUARE_DECAY**step, out=spare)
        np.sqrt(spare, out=spare)
        spare += _EPSILON
        np.divide(self.mean, spare, out=spare)
        spare *= pace / (1 - _MEAN_DECAY**step)
        return spare
