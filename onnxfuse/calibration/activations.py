"""What importances want to know of the channels of groups, from samples: norms, independence, gradients, damage."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from onnxfuse.analysis import Analysis
from onnxfuse.arrays import FloatArray, join_axes
from onnxfuse.calibration.batches import for_samples
from onnxfuse.calibration.observe import observe_readings, read_at, stream_values
from onnxfuse.config import Provider
from onnxfuse.coupling.groups import CouplingGroup, ParameterAxis
from onnxfuse.coupling.sets import Places, places
from onnxfuse.fusion.mapping import rows_of
from onnxfuse.fusion.weights import WeightState
from onnxfuse.gradient import Loss, stream_gradients
from onnxfuse.graph.view import GraphView, Operand
from onnxfuse.proof.samples import Samples
from onnxfuse.statistics.features import ActivationFeatures, Role
from onnxfuse.statistics.independence import channel_independence, independence_work

__all__ = ["observe_activations"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# How many multiplications the nuclear norms of one group may take, and on how many samples at least.
_INDEPENDENCE_WORK, _FEWEST_MAPS = 10_000_000_000, 4


def observe_activations(
    analysis: Analysis,
    groups: Sequence[CouplingGroup],
    importance: str,
    samples: Samples,
    provider: Provider,
    seed: int,
    loss: Loss | None = None,
) -> Mapping[str, ActivationFeatures]:
    """Run the original on samples and return what an importance wants to know.

    Args:
        analysis: The original.
        groups: The groups to observe.
        importance: Its name.
        samples: Inputs.
        provider: Where to run.
        seed: Seed of the choice of places.
        loss: What ``taylor`` takes gradients of; None for the loss that suits the network.

    Returns:
        By the name of each group whose values could be found.

    Raises:
        RuntimeFailedError: ONNX Runtime could not run the network.
        UnsupportedGraphError: An operator has no gradient, and the importance needs it.
    """
    if not groups:
        return {}
    if importance == "taylor":
        return _sensitivities(analysis, groups, samples, provider, loss)
    found = _norms(analysis, groups, samples, provider, independence=importance == "chip")
    if importance == "damage":
        readings = observe_readings(analysis, groups, samples, provider, seed)
        for group in groups:
            square = found[group.name].square if group.name in found else None
            found[group.name] = ActivationFeatures(square=square, readings=readings.get(group.name, ()))
    return found


@dataclass
class _Norms:
    """Sums over samples and places of one group's channels in one value."""

    places: Places
    independence: bool
    count: int = 0
    maps: int = 0
    magnitude: FloatArray = field(init=False)
    square: FloatArray = field(init=False)
    nuclear: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        self.magnitude, self.square, self.nuclear = (np.zeros(len(self.places.index)) for _ in range(3))

    def add(self, array: AnyArray, samples: int) -> None:
        # (..., C, ...) -> (C, places in the axis, rest)
        moved = join_axes(array, self.places.axes)[self.places.index].astype(np.float64)
        rows = moved.reshape(len(moved), -1)
        self.count += rows.shape[1]
        self.magnitude += np.abs(rows).sum(axis=1)
        self.square += np.square(rows).sum(axis=1)
        if not self.independence:
            return
        batched = 0 not in self.places.axes and len(array) == samples
        for one in np.moveaxis(moved, 2, 0) if batched else moved[None]:
            matrix = one.reshape(len(moved), -1)
            if self.maps < max(_FEWEST_MAPS, _INDEPENDENCE_WORK // independence_work(*matrix.shape)):
                self.maps += 1
                self.nuclear += channel_independence(matrix)


def _norms(
    analysis: Analysis, groups: Sequence[CouplingGroup], samples: Samples, provider: Provider, *, independence: bool
) -> dict[str, ActivationFeatures]:
    norms: dict[str, dict[tuple[str, int], _Norms]] = {}
    for group in groups:
        for value, axis in _places(analysis, group):
            where = places(analysis.channels.layouts[Operand(value)], axis, group, {})
            norms.setdefault(group.name, {})[value, axis] = _Norms(where, independence)
    names = [value for found in norms.values() for value, _ in found]
    for batch, values in stream_values(analysis, names, samples, provider):
        for found in norms.values():
            for (value, _), norm in found.items():
                norm.add(values[value], batch)
    return {
        name: ActivationFeatures(
            magnitude=_mean([norm.magnitude / max(norm.count, 1) for norm in found.values()]),
            square=_mean([norm.square / max(norm.count, 1) for norm in found.values()]),
            independence=_mean([norm.nuclear / max(norm.maps, 1) for norm in found.values()]) if independence else None,
        )
        for name, found in norms.items()
    }


def _mean(rows: Sequence[FloatArray]) -> FloatArray:
    mean: FloatArray = np.mean(np.stack(rows), axis=0)
    return mean


def _places(analysis: Analysis, group: CouplingGroup) -> Iterator[tuple[str, int]]:
    """Yield where readers see the channels; where none does by a weight, where producers make them."""
    by_name = {node.name: node for node in analysis.graph.nodes}
    for role in (Role.CONSUMER, Role.PRODUCER):
        found = [
            read_at(analysis, group, parameter, by_name[parameter.node])
            for parameter in group.parameters
            if parameter.role is role
        ]
        if any(found):
            yield from dict.fromkeys(place for place in found if place)
            return


def _sensitivities(
    analysis: Analysis, groups: Sequence[CouplingGroup], samples: Samples, provider: Provider, loss: Loss | None
) -> dict[str, ActivationFeatures]:
    """Sum |w dL/dw| over the weights of each channel, for the mean of the members; L is summed over all samples."""
    members = {
        group.name: [p for p in group.parameters if p.role in {Role.PRODUCER, Role.CONSUMER}] for group in groups
    }
    names = dict.fromkeys(_differentiable(analysis, p.operand) for found in members.values() for p in found)
    totals: dict[str, FloatArray] = {}
    graph = GraphView(for_samples(analysis.graph.model, samples))
    for run in stream_gradients(graph, samples, list(names), loss, provider):
        for name, gradient in run.gradients.items():
            totals[name] = totals.get(name, 0.0) + gradient.astype(np.float64)
    state = WeightState(analysis.graph, analysis.shapes, analysis.channels)

    def sensitivity(parameter: ParameterAxis, group: CouplingGroup) -> FloatArray:
        product = np.abs(state.array(parameter.operand) * totals[_differentiable(analysis, parameter.operand)])
        where = places(analysis.channels.layouts[parameter.operand], parameter.axis, group, {})
        scores: FloatArray = rows_of(product, where).sum(axis=1)
        return scores

    return {
        group.name: ActivationFeatures(sensitivity=_mean([sensitivity(p, group) for p in members[group.name]]))
        for group in groups
        if members[group.name]
    }


def _differentiable(analysis: Analysis, operand: Operand) -> str:
    """Return the weight, or, where it is stored as whole numbers, what the node that reads it makes of them."""
    tensor = analysis.graph.constants.get(operand.name)
    is_stored = tensor is not None and analysis.graph.nodes[operand.node].op == "DequantizeLinear"
    return analysis.graph.nodes[operand.node].outputs[0] if is_stored else operand.name
