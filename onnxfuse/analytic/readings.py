"""What the readers of every group see of its channels, worked out instead of observed."""

from collections.abc import Mapping, Sequence

import numpy as np

from onnxfuse.analysis import Analysis
from onnxfuse.analytic.inputs import input_moments
from onnxfuse.analytic.moments import Moments
from onnxfuse.analytic.propagate import propagate_moments
from onnxfuse.arrays import FloatArray, IntArray, row_coordinates
from onnxfuse.calibration.activation_paths import PathFunction
from onnxfuse.calibration.observe import ReadingPlace, channels_before, reading_places
from onnxfuse.config import Provider
from onnxfuse.coupling.groups import CouplingGroup
from onnxfuse.coupling.sets import places as places_in
from onnxfuse.graph.view import Operand
from onnxfuse.statistics.channels import Channels, GaussianChannels, ObservedChannels
from onnxfuse.statistics.damage import Reading, within_sets
from onnxfuse.statistics.relative import relative_weights

__all__ = ["analytic_readings"]

# Rows that are drawn for candidates to descend on, for every channel and at most.
_ROWS_PER_CHANNEL, _MOST_ROWS = 64, 4096
_FEWEST_ROWS = 1024


def analytic_readings(
    analysis: Analysis, groups: Sequence[CouplingGroup], seed: int, given: Mapping[str, Moments] | None = None
) -> dict[str, tuple[Reading, ...]]:
    """Work out what every reader sees if the inputs are Gaussian, without a run.

    Args:
        analysis: The original.
        groups: The groups.
        seed: Seed of the rows that candidates descend on.
        given: Moments of the inputs; as the first layer says where None.

    Returns:
        The readings of each group by its name; none for a group of which some reader is not known.
    """
    places = reading_places(analysis, groups)
    names = {name for found in places.values() for p in found for name in (p.moments[0], p.end)}
    names |= {p.path.before for found in places.values() for p in found if p.path is not None}
    moments = propagate_moments(analysis, names, given=input_moments(analysis) if given is None else given).moments
    rng = np.random.default_rng(seed)
    found = {}
    for group in groups:
        readings = [_reading(analysis, group, place, places[group.name], moments, rng) for place in places[group.name]]
        found[group.name] = tuple(r for r in readings if r is not None) if all(readings) else ()
    return found


def _reading(
    analysis: Analysis,
    group: CouplingGroup,
    place: ReadingPlace,
    others: Sequence[ReadingPlace],
    moments: Mapping[str, Moments],
    rng: np.random.Generator,
) -> Reading | None:
    if place.partner is not None:
        return None
    value, axis = place.moments
    where = places_in(analysis.channels.layouts[Operand(value)], axis, group, {})
    seen, end = moments.get(value), moments.get(place.end)
    if seen is None or end is None or seen.axis != axis or where.axes != (axis,) or not end.total > 0:
        return None
    sets = group.sets if any(other.is_apart for other in others) else 1
    mean, covariance = _of_channels(seen, where.index)
    about = within_sets(covariance if place.has_shift else covariance + np.outer(mean, mean), sets)
    weights = row_coordinates(relative_weights(place.weights, end.variance, place.outputs))
    channels = _channels(analysis, group, place, moments, rng)
    return Reading(about, seen.mean[where.index], weights, place.has_shift, channels, sets, place.parameter)


def _of_channels(moments: Moments, index: IntArray) -> tuple[FloatArray, FloatArray]:
    """Return mean and covariance of the channels of a group, over all places that they have on the axis.

    Args:
        moments: Of the whole axis.
        index: Shape (C, m).
    """
    means = moments.mean[index]
    mean = means.mean(axis=1)
    inside = np.mean([moments.covariance[np.ix_(column, column)] for column in index.T], axis=0)
    about = means - mean[:, None]
    return mean, inside + about @ about.T / index.shape[1]


def _channels(
    analysis: Analysis,
    group: CouplingGroup,
    place: ReadingPlace,
    moments: Mapping[str, Moments],
    rng: np.random.Generator,
) -> tuple[Channels, Channels] | None:
    """Return the channels before their activation: rows that are drawn, to fit to, and the moments, to measure by."""
    if place.path is None or place.path.before not in moments:
        return None
    before = moments[place.path.before]
    axis, where = channels_before(analysis, group, place.path)
    if before.axis != axis or where.axes != (axis,):
        return None
    mean, covariance = _of_channels(before, where.index)
    function = PathFunction(analysis, place.path, Provider.CPU)
    count = min(max(_ROWS_PER_CHANNEL * len(mean), _FEWEST_ROWS), _MOST_ROWS)
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    rows = mean + rng.standard_normal((count, len(mean))) @ root.T
    return ObservedChannels(function, rows.astype(np.float32)), GaussianChannels(function, mean, covariance)
