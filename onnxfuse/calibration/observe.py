"""What the readers of every group see of its channels, on samples: second moments, streamed through ONNX Runtime."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from onnxfuse.analysis import Analysis
from onnxfuse.arrays import Floats, IntArray, row_coordinates
from onnxfuse.calibration.activation_paths import ActivationPath, PathFunction, activation_path
from onnxfuse.calibration.batches import for_samples
from onnxfuse.calibration.contraction_shares import contraction_shares
from onnxfuse.calibration.gates import Gates, gates_of
from onnxfuse.calibration.linear import LinearNode, ending_of, linear_nodes
from onnxfuse.calibration.sums import FEWEST_CHANNEL_ROWS, ChannelRows, MomentSums, OutputSpread
from onnxfuse.config import Provider
from onnxfuse.coupling.groups import CouplingGroup, ParameterAxis
from onnxfuse.coupling.layout import leaves
from onnxfuse.coupling.scales_behind import scale_behind
from onnxfuse.coupling.sets import Places, has_sets_elsewhere
from onnxfuse.coupling.sets import places as places_in
from onnxfuse.fusion.mapping import along, rows_of
from onnxfuse.fusion.weights import WeightState
from onnxfuse.gradient.forward import with_outputs
from onnxfuse.graph.view import NodeView, Operand
from onnxfuse.proof.runtime import Session
from onnxfuse.proof.samples import Samples
from onnxfuse.statistics.bilinear import root
from onnxfuse.statistics.channels import Channels
from onnxfuse.statistics.damage import Half, Reading, within_sets
from onnxfuse.statistics.features import Role
from onnxfuse.statistics.relative import cautious_weights, relative_weights, unseen_variances

__all__ = ["ReadingPlace", "channels_before", "observe_readings", "read_at", "reading_places", "stream_values"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# How many places to sum over, for every channel and in all.
_ROWS_PER_CHANNEL = 50
_FEWEST_ROWS = 40_000
# Rows of channels before their activation: for every channel, and at most.
_CHANNEL_ROWS, _MOST_CHANNEL_ROWS = 512, 8192
# How much memory the values of one run may take.
_MOST_BYTES = 2**29
# With so many independent samples for every channel all of them say the same; otherwise halves of them are told apart,
# unless channels are very many. Halves are made of so many runs at least, if there can be as many.
_PLENTY, _MOST_IN_HALVES = 32, 2048
_FEWEST_RUNS = 8


@dataclass(frozen=True)
class ReadingPlace:
    """A reader of a group, and where to look.

    Attributes:
        parameter: Which of the group's parameters it is; -1 for a contraction.
        weights: Its weights, a row for every channel; none for a contraction.
        moments: The value in which it finds the channels, and the axis.
        end: The value in which its result ends.
        axis: The axis of that value along which outputs lie.
        outputs: Along that axis, to which output each of its weights belongs: shape (S, D), int64, for S sets of
            channels; None where all outputs count by the variance that they add, as in a residual sum.
        has_shift: Whether something can make a mean good, behind the reader.
        path: What lies between the producers and the reader; None where that does not have the form of f(z).
        is_apart: Whether the reader hears the sets of the group each for itself.
        partner: The value, and the axis, whose channels a contraction multiplies these with, in place of weights.
        contraction: The index of the contraction.
        gates: The gates of the recurrent layer that reads; its result ends in what they add up. None for others.
    """

    parameter: int
    weights: Floats
    moments: tuple[str, int]
    end: str
    axis: int
    outputs: IntArray | None
    has_shift: bool
    path: ActivationPath | None
    is_apart: bool
    partner: tuple[str, int] | None = None
    contraction: int = -1
    gates: Gates | None = None


def observe_readings(
    analysis: Analysis,
    groups: Sequence[CouplingGroup],
    samples: Samples,
    provider: Provider,
    seed: int,
    *,
    is_made_up: bool = False,
) -> dict[str, tuple[Reading, ...]]:
    """Run the original on samples and sum what every reader sees.

    Args:
        analysis: The original.
        groups: The groups to observe.
        samples: Inputs.
        provider: Where to run.
        seed: Seed of the choice of places.
        is_made_up: Whether the samples were made up, so that channels may vary where these leave them still.

    Returns:
        The readings of each group by its name; none for a group that no weight reads.

    Raises:
        RuntimeFailedError: ONNX Runtime could not run the network.
    """
    places = reading_places(analysis, groups)
    moments: dict[tuple[str, str, int], MomentSums] = {}
    spreads: dict[str, OutputSpread] = {}
    rows: dict[tuple[str, str], ChannelRows] = {}
    gates: dict[str, Gates] = {}
    for group in groups:
        # What contractions alone read is not measured on other samples.
        read = {place.moments for place in places[group.name] if place.partner is None}
        for place in places[group.name]:
            for value, axis in (place.moments, place.partner or place.moments):
                where = places_in(analysis.channels.layouts[Operand(value)], axis, group, {})
                in_halves = (value, axis) in read and _say_little(analysis, value, where, samples)
                moments[group.name, value, axis] = MomentSums(value, where, in_halves)
            if place.partner is None:
                spreads[place.end] = OutputSpread(place.axis)
                if place.gates is not None:
                    gates[place.end] = place.gates
        if all(place.path is not None for place in places[group.name]):
            rows.update(
                {(group.name, p.path.before): _rows(analysis, group, p.path) for p in places[group.name] if p.path}
            )
    _run(analysis, moments, spreads, gates, rows, samples, provider, np.random.default_rng(seed))
    channels = {
        (name, place.path): taken.channels(PathFunction(analysis, place.path, provider))
        for name, found in places.items()
        for place in found
        if place.path is not None and (taken := rows.get((name, place.path.before))) is not None
    }
    products = dict.fromkeys(told.node for group in groups for told in group.contractions)
    shares = contraction_shares(analysis, products, samples, provider)
    observed = (moments, spreads, channels, shares)
    return {
        group.name: tuple(_readings(group, places[group.name], *observed, is_made_up=is_made_up)) for group in groups
    }


def reading_places(analysis: Analysis, groups: Sequence[CouplingGroup]) -> dict[str, list[ReadingPlace]]:
    """Return the readers of some groups, by the group's name.

    Args:
        analysis: The original.
        groups: The groups.
    """
    linear = {node.node.index: node for node in linear_nodes(analysis.graph, analysis.channels)}
    state = WeightState(analysis.graph, analysis.shapes, analysis.channels)
    return {group.name: list(_places(analysis, state, group, linear)) for group in groups}


def _readings(
    group: CouplingGroup,
    places: Sequence[ReadingPlace],
    moments: Mapping[tuple[str, str, int], MomentSums],
    spreads: Mapping[str, OutputSpread],
    channels: Mapping[tuple[str, ActivationPath], tuple[Channels, Channels] | None],
    shares: Mapping[int, float],
    *,
    is_made_up: bool,
) -> Iterator[Reading]:
    """Yield what every reader of a group sees; readers of one value share its covariance.

    Where one reader can't hear a channel of one set in place of one of another, none does: they share an input map.
    """
    sets = group.sets if any(place.is_apart for place in places) else 1
    estimates: dict[tuple[str, int], tuple[Floats, Floats]] = {}
    halves: dict[tuple[str, int], tuple[Half, Half] | None] = {}
    for place in places:
        for read in (place.moments, place.partner or place.moments):
            if read not in estimates and (seen := moments[group.name, *read]).is_sound:
                centred = any(other.has_shift for other in places if other.moments == read)
                halves[read] = seen.halves()
                covariance, second = seen.estimates(centred=centred)
                estimates[read] = within_sets(covariance, sets), within_sets(second, sets)
        if place.moments not in estimates or (place.partner or place.moments) not in estimates:
            continue
        covariance, second = estimates[place.moments]
        sums = moments[group.name, *place.moments]
        weights: Floats
        if place.partner is None:
            weights = row_coordinates(relative_weights(place.weights, spreads[place.end].variances, place.outputs))
            errors = sums.variance_errors
            if is_made_up:
                errors = errors + unseen_variances(np.diag(covariance))
            weights = cautious_weights(weights, errors)
        else:
            other = estimates[place.partner][1]
            weights = root(other) * shares[place.contraction] ** 0.5
            weights = row_coordinates(relative_weights(weights, (second * other).sum(axis=1), None))
        before = None if place.path is None else channels.get((group.name, place.path))
        about = covariance if place.has_shift else second
        apart = None if place.partner else halves[place.moments]
        yield Reading(about, sums.means, weights, place.has_shift, before, sets, place.parameter, apart)


def _places(
    analysis: Analysis, state: WeightState, group: CouplingGroup, linear: Mapping[int, LinearNode]
) -> Iterator[ReadingPlace]:
    members = [(i, p) for i, p in enumerate(group.parameters) if p.role in {Role.PRODUCER, Role.CONSUMER}]
    by_name = {node.name: node for node in analysis.graph.nodes}
    for (number, parameter), features in zip(members, state.features(group).members, strict=True):
        if parameter.role is not Role.CONSUMER:
            continue
        node = by_name[parameter.node]
        where = read_at(analysis, group, parameter, node)
        if where is None:
            continue
        end, outputs, has_shift = node.outputs[0], None, False
        if (made := linear.get(node.index)) is not None:
            ending = ending_of(made, analysis.graph, analysis.channels)
            # A branch that adds little to a loud sum may be cut hard, whatever it adds to each channel.
            outputs = None if ending.other else _outputs(analysis, group, parameter, made)
            end, has_shift = ending.value, state.output_shift(node) is not None
        elif (behind := scale_behind(analysis.graph, node)) is not None:
            end = behind.result
        gates = gates_of(analysis.graph, state, node)
        if gates is not None:
            end, outputs = gates.states, _gates_read(analysis, group, parameter, gates)
            has_shift = gates.bias is not None
        is_apart = has_sets_elsewhere(analysis.channels.layouts[parameter.operand], parameter.axis, group)
        # Convolutions of every kind have channels behind the samples, all other readers last.
        axis = 1 if "Conv" in node.op else -1
        path = _path(analysis, group, where[0])
        yield ReadingPlace(number, features.weights, where, end, axis, outputs, has_shift, path, is_apart, gates=gates)
    for told in group.contractions:
        end = analysis.graph.nodes[told.node].outputs[0]
        # Its scores are multiplied, set by set, and nothing makes their mean good.
        yield ReadingPlace(
            parameter=-1,
            weights=np.zeros((0, 0)),
            moments=told.plain,
            end=end,
            axis=-1,
            outputs=None,
            has_shift=False,
            path=None,
            is_apart=group.sets > 1,
            partner=told.mirrored,
            contraction=told.node,
        )


def _outputs(analysis: Analysis, group: CouplingGroup, parameter: ParameterAxis, made: LinearNode) -> IntArray | None:
    """Return which output each weight of a node belongs to, by set of channels; None where that is not plain."""
    if parameter.operand != made.weight:
        return None
    dims = tuple(analysis.graph.constants[made.weight.name].dims)
    where = places_in(analysis.channels.layouts[made.weight], parameter.axis, group, {})
    numbers = np.arange(dims[made.output_axis], dtype=np.float64)
    outputs = np.broadcast_to(along(numbers, made.output_axis, len(dims)), dims)
    if made.output_axis not in where.axes:
        where = Places(where.axes, where.index[:: group.channels])
        return rows_of(outputs, where).astype(np.int64)
    # Outputs tell the sets apart, and each channel of a set is to be read by the same ones.
    rows = rows_of(outputs, where).astype(np.int64)
    sets = rows.reshape(-1, group.channels, rows.shape[1])
    return sets[:, 0] if (sets == sets[:, :1]).all() else None


def _gates_read(analysis: Analysis, group: CouplingGroup, parameter: ParameterAxis, gates: Gates) -> IntArray:
    """Return which gate each weight of a recurrent layer belongs to, shape (1, D): the same for all channels."""
    dims = analysis.graph.constants[parameter.operand.name].dims
    where = places_in(analysis.channels.layouts[parameter.operand], parameter.axis, group, {})
    numbers = gates.numbers[:, :, None] if parameter.axis == 2 else gates.numbers[:, None, :]
    return rows_of(np.broadcast_to(numbers, tuple(dims)).astype(np.float64), where)[:1].astype(np.int64)


def _say_little(analysis: Analysis, value: str, places: Places, samples: Samples) -> bool:
    """Whether samples are so few for the channels in a value that other samples may say something else."""
    channels = len(places.index)
    per_sample = math.prod(analysis.shapes.dims[value]) // max(_entries(analysis, value, places), 1) / analysis.batch
    # As many as in `MomentSums.independent`.
    independent = samples.count * math.sqrt(max(per_sample, 1.0))
    return channels <= _MOST_IN_HALVES and independent < _PLENTY * channels


def _entries(analysis: Analysis, value: str, places: Places) -> int:
    """Return how many numbers a value has for each sample and place."""
    return math.prod(analysis.shapes.dims[value][axis] for axis in places.axes)


def _path(analysis: Analysis, group: CouplingGroup, value: str) -> ActivationPath | None:
    """Return the path to what a reader reads; None also for groups whose channels may not be mixed, or are too many."""
    if group.unmixable or group.sets * group.channels > _MOST_CHANNEL_ROWS / (2 * FEWEST_CHANNEL_ROWS):
        return None
    return activation_path(analysis, group, value)


def channels_before(analysis: Analysis, group: CouplingGroup, path: ActivationPath) -> tuple[int, Places]:
    """Return the axis of the value z that has the channels of a group, and where on it they are.

    Args:
        analysis: The original.
        group: The group.
        path: What lies between its producers and a reader.
    """
    layouts = analysis.channels.layouts[Operand(path.before)]
    axis = next(axis for axis, layout in enumerate(layouts) if group.atom in set(leaves(layout)))
    return axis, places_in(layouts, axis, group, {})


def _rows(analysis: Analysis, group: CouplingGroup, path: ActivationPath) -> ChannelRows:
    _, where = channels_before(analysis, group, path)
    return ChannelRows(path.before, where, min(_CHANNEL_ROWS * len(where.index), _MOST_CHANNEL_ROWS))


def read_at(
    analysis: Analysis, group: CouplingGroup, parameter: ParameterAxis, node: NodeView
) -> tuple[str, int] | None:
    """Return the computed value in which a node finds the channels of a group, and the axis.

    Args:
        analysis: The original.
        group: The group.
        parameter: A weight of the node that follows the channels.
        node: The node.
    """
    for name in (*node.inputs, *node.outputs):
        if not name or name == parameter.operand.name:
            continue
        for axis, layout in enumerate(analysis.channels.layouts.get(Operand(name), ())):
            if group.atom in set(leaves(layout)):
                return name, axis
    return None


def _run(
    analysis: Analysis,
    moments: Mapping[tuple[str, str, int], MomentSums],
    spreads: Mapping[str, OutputSpread],
    gates: Mapping[str, Gates],
    rows: Mapping[tuple[str, str], ChannelRows],
    samples: Samples,
    provider: Provider,
    rng: np.random.Generator,
) -> None:
    dims = analysis.shapes.dims
    names = dict.fromkeys([m.value for m in moments.values()] + [r.value for r in rows.values()] + list(spreads))
    names.update(dict.fromkeys(made.inputs for made in gates.values()))
    names.update(dict.fromkeys(name for value in list(names) for name in _parameters(analysis, value)))
    for batch, outputs in stream_values(analysis, names, samples, provider):
        for moment in moments.values():
            entries = max(_entries(analysis, moment.value, moment.places), 1)
            per_sample = math.prod(dims[moment.value]) // entries / analysis.batch
            wanted = max(_FEWEST_ROWS, _ROWS_PER_CHANNEL * len(moment.places.index))
            share = min(1.0, wanted / max(per_sample * samples.count, 1))
            moment.add(_numbers(analysis, moment.value, outputs), batch, share, rng)
        for taken in rows.values():
            taken.add(outputs[taken.value], batch, samples.count, rng)
        for name, spread in spreads.items():
            if (made := gates.get(name)) is not None:
                made.add(spread, _numbers(analysis, made.inputs, outputs), _numbers(analysis, name, outputs))
            else:
                spread.add(_numbers(analysis, name, outputs))


def _parameters(analysis: Analysis, value: str) -> Iterator[str]:
    """Yield the scale and the zero point of a value where these are computed."""
    told = analysis.channels.encodings.get(Operand(value))
    for operand in (told.scale, told.zero) if told is not None else ():
        if operand is not None and not operand.is_constant:
            yield operand.name


def _numbers(analysis: Analysis, value: str, outputs: Mapping[str, AnyArray]) -> AnyArray:
    """Return what the integers of a value stand for; floats as they are."""
    found = outputs[value]
    told = analysis.channels.encodings.get(Operand(value))
    if found.dtype.kind not in "iu" or told is None:
        return found if found.dtype.kind == "f" else found.astype(np.float32)
    scale = 1.0 if told.scale is None else _parameter(analysis, told.scale, outputs)
    zero = 0.0 if told.zero is None else _parameter(analysis, told.zero, outputs)
    numbers: AnyArray = ((found.astype(np.float32) - zero) * scale).astype(np.float32)
    return numbers


def _parameter(analysis: Analysis, operand: Operand, outputs: Mapping[str, AnyArray]) -> float:
    if operand.name in outputs:
        stored = outputs[operand.name]
    elif operand.name in analysis.graph.constants:
        stored = analysis.graph.array(operand.name)
    else:
        stored = analysis.shapes.static[operand.name]
    return float(stored.reshape(-1)[0])


def stream_values(
    analysis: Analysis, names: Iterable[str], samples: Samples, provider: Provider
) -> Iterator[tuple[int, Mapping[str, AnyArray]]]:
    """Run the original and return some of its values, in runs that fit into memory.

    Args:
        analysis: The original.
        names: The values.
        samples: Inputs.
        provider: Where to run.

    Yields:
        The number of samples, and the values, of one run after the other.

    Raises:
        RuntimeFailedError: ONNX Runtime could not run the network.
    """
    wanted = dict.fromkeys(names)
    model = for_samples(analysis.graph.model, samples)
    model = with_outputs(model, (name for name in wanted if name not in analysis.graph.inputs))
    # Intermediate values would be fused away otherwise only where they are no outputs; so optimisation may stay.
    session = Session(model, provider, name=f"the original model {analysis.source.name!r}")
    sample_bytes = sum(4 * int(np.prod(analysis.shapes.dims[n])) // analysis.batch for n in wanted)
    runs = samples.in_batches(min(_MOST_BYTES // max(sample_bytes, 1), max(samples.count // _FEWEST_RUNS, 1)))
    for feeds in runs.feeds():
        yield runs.batch, {**feeds, **session.run(feeds)}
