r"""How large inputs are, told by the weights that read them first.

A file does not say how its inputs were scaled. But layers are made, and trained, to give numbers of order one, about
zero: so the inputs have the deviation with which the first layer's results z = W x + b have a mean variance of 1, and
the mean that makes them as small as can be, :math:`m = -(W^T W + \lambda I)^{-1} W^T b`. Features that were divided by
their deviations come out as such, and so do raw ones whose normalisation was folded into the layer: their deviations
are in its weights, and their means in its biases.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxfuse.analysis import Analysis
from onnxfuse.analytic.moments import Moments, Unknown
from onnxfuse.analytic.propagate import first_layer, standard_normal
from onnxfuse.arrays import FloatArray

__all__ = ["InputScale", "has_plausible_inputs", "input_moments", "input_scale"]

# Ridge of the mean, in mean squares of what one input does.
_RIDGE = 0.01
# The correlation of neighbouring places of an input.
NEIGHBOURS = 0.95
# How far the first layer's results may be from zero, in their deviations, for a mean of the input to be believed.
_WIDEST_GAP = 3.0


@dataclass(frozen=True, slots=True, eq=False)
class InputScale:
    """What the first layer says of an input.

    Attributes:
        axis: Which axis of the input has its channels.
        mean: Shape (C,).
        deviation: Of every number.
        gap: How far the first layer's results are from zero all the same, in root mean squares of their deviations.
    """

    axis: int
    mean: FloatArray
    deviation: float
    gap: float


def input_scale(analysis: Analysis, name: str) -> InputScale | None:
    """Return what the first layer behind an input says of it; None where none is found that reads it plainly.

    Args:
        analysis: The network.
        name: The input.
    """
    layer = first_layer(analysis, name, NEIGHBOURS)
    if layer is None:
        return None
    size = float(layer.variance.mean())
    if not size > 0:
        return None
    deviation = size**-0.5
    mean: FloatArray = np.zeros(len(layer.matrix.T), np.float64)
    if layer.matrix.any():
        square = layer.matrix.T @ layer.matrix
        square[np.diag_indices_from(square)] += _RIDGE * np.trace(square) / len(square)
        mean = -np.asarray(np.linalg.solve(square, layer.matrix.T @ layer.bias), np.float64)
    left = layer.bias + layer.matrix @ mean
    return InputScale(layer.axis, mean, deviation, float(np.sqrt(np.square(left).mean())))


def input_moments(analysis: Analysis) -> Mapping[str, Moments]:
    """Return moments of the inputs: as the first layer says, standard normal where it says nothing.

    Signals are smooth, so places next to each other are alike; a normalisation tells the rest of what it reads.

    Args:
        analysis: The network.
    """
    found = {}
    for name in analysis.graph.inputs:
        plain = standard_normal(analysis, name)
        if isinstance(plain, Unknown):
            continue
        decay = (NEIGHBOURS,) * len(plain.decay)
        scale = input_scale(analysis, name)
        mean, variance = (plain.mean, 1.0) if scale is None else (scale.mean, scale.deviation**2)
        found[name] = Moments(plain.axis, mean, variance * plain.covariance, decay)
    return found


def has_plausible_inputs(analysis: Analysis) -> bool:
    """Whether inputs are found that the first layer's biases suit, as far as that can be told.

    Args:
        analysis: The network.
    """
    scales = [input_scale(analysis, name) for name in analysis.graph.inputs]
    return all(scale is None or scale.gap < _WIDEST_GAP for scale in scales)
