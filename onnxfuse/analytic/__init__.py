"""Moments of channels in a whole network without a single run of it: means and covariances, operator by operator."""

from onnxfuse.analytic.inputs import has_plausible_inputs, input_moments, input_scale
from onnxfuse.analytic.moments import Moments, Unknown
from onnxfuse.analytic.propagate import propagate_moments
from onnxfuse.analytic.readings import analytic_readings

__all__ = [
    "Moments",
    "Unknown",
    "analytic_readings",
    "has_plausible_inputs",
    "input_moments",
    "input_scale",
    "propagate_moments",
]
