"""A segment as networks that run it forward and backward, on whole samples or on windows of them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnxfuse.arrays import FloatArray
from onnxfuse.calibration.segments import Segment
from onnxfuse.calibration.side_by_side import SideBySide
from onnxfuse.calibration.windows import Windows, find_windows
from onnxfuse.config import Provider
from onnxfuse.errors import RuntimeFailedError
from onnxfuse.gradient.backward import Backward, build_backward
from onnxfuse.gradient.forward import with_outputs
from onnxfuse.graph.cost import measure_cost
from onnxfuse.graph.shapes import infer_shapes
from onnxfuse.graph.view import GraphView, Operand
from onnxfuse.proof.runtime import Session
from onnxfuse.proof.samples import Samples

__all__ = ["MOST_SAMPLES", "SegmentGradients", "segment_gradients"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Shape: TypeAlias = tuple[int, ...]

# A step runs a segment once forward and about twice that backward.
_PASSES = 3
# How many samples a step takes: enough for so many places, but from few to a whole run. Where even few have many more
# places, it takes windows of them.
_PLACES = 1024
_FEWEST_SAMPLES, MOST_SAMPLES = 4, 64


@dataclass(frozen=True)
class _Networks:
    """A segment and its gradients, for inputs of certain shapes.

    Attributes:
        forward: Runs the segment.
        backward: Finds the gradients.
        plan: What goes into that, and what comes out.
        macs: Multiply-accumulates of one run forward.
    """

    forward: Session
    backward: Session
    plan: Backward
    macs: int


@dataclass(frozen=True)
class SegmentGradients:
    """A segment that can be run forward and backward with any weights.

    Attributes:
        whole: Runs it on whole samples.
        networks: Run it forward and backward on what a step takes of them.
        windows: What that is; None for all places.
        fed: The weights, by the names of the inputs that take them.
        inputs: What else goes in: for every input one array for each run.
        targets: What should come out, likewise.
        names: Names of the inputs and of the outputs.
        variances: The variance of each output.
        pieces: Into how many runs each run of the samples was cut.
        together: How many runs a step takes.
    """

    whole: Session
    networks: _Networks
    windows: Windows | None
    fed: Mapping[str, Operand]
    inputs: Sequence[Sequence[AnyArray]]
    targets: Sequence[Sequence[AnyArray]]
    names: tuple[tuple[str, ...], tuple[str, ...]]
    variances: Sequence[float]
    pieces: int
    together: int

    @property
    def macs_of_step(self) -> int:
        """Multiply-accumulates of a step, forward and backward."""
        return _PASSES * self.together * max(self.networks.macs, 1)

    def is_sound(self, run: int) -> bool:
        """Whether everything that goes in and should come out is finite."""
        arrays = [values[run] for values in (*self.inputs, *self.targets)]
        return all(array.dtype.kind != "f" or bool(np.isfinite(array).all()) for array in arrays)

    def error(self, runs: Sequence[int], weights: Mapping[str, AnyArray]) -> float:
        """Return the share of the variance that is missed, over some runs of whole samples."""
        total = 0.0
        for run in runs:
            feeds = {name: values[run] for name, values in zip(self.names[0], self.inputs, strict=True)}
            outputs = self.whole.run(feeds | dict(weights))
            for name, targets, variance in zip(self.names[1], self.targets, self.variances, strict=True):
                gap = outputs[name] - targets[run]
                total += float(np.square(gap, dtype=np.float64).sum()) / (variance * gap.size)
        return total / max(len(runs), 1)

    def gradients(
        self, runs: Sequence[int], weights: Mapping[str, AnyArray], rng: np.random.Generator
    ) -> dict[str, FloatArray]:
        """Return the gradient of half the error in some runs together; in windows, where there are, that rng draws."""
        total: dict[str, FloatArray] = {}
        for run in runs:
            for name, gradient in self._gradients(run, weights, rng).items():
                total[name] = total[name] + gradient if name in total else gradient
        return total

    def _gradients(self, run: int, weights: Mapping[str, AnyArray], rng: np.random.Generator) -> dict[str, FloatArray]:
        inputs, targets = ([values[run] for values in all_values] for all_values in (self.inputs, self.targets))
        masks = [np.ones(())] * len(targets)
        if self.windows is not None:
            inputs, targets, masks = self.windows.draw(inputs, targets, rng)
        plan = self.networks.plan
        feeds = dict(zip(self.names[0], inputs, strict=True)) | dict(weights)
        outputs = feeds | self.networks.forward.run(feeds)
        fed = {own: outputs[name] for name, own in plan.values.items()}
        for name, target, mask, variance in zip(self.names[1], targets, masks, self.variances, strict=True):
            if name in plan.seeds:
                counted = target.size * float(mask.mean())
                gap = (outputs[name] - target) * np.float32(1.0 / (variance * counted))
                fed[plan.seeds[name]] = np.where(mask, gap, np.float32(0.0))
        results = self.networks.backward.run(fed)
        return {name: results[own] for name, own in plan.results.items()}


def segment_gradients(
    sides: SideBySide, segment: Segment, operands: Iterable[Operand], provider: Provider
) -> SegmentGradients | None:
    """Build the networks that run a segment, and collect what goes in and what should come out.

    Args:
        sides: Both networks, up to the segment.
        segment: The segment.
        operands: The weights that gradients are wanted of.
        provider: Where to run.

    Returns:
        None where what goes in or comes out is not of floats, or not of one shape.

    Raises:
        UnsupportedGraphError: An operator has no gradient.
    """
    inputs: list[Sequence[AnyArray]] = [sides.present.values(name) for name in segment.inputs]
    targets: list[Sequence[AnyArray]] = [
        [sides.fused_value(value, name) for value in sides.original.values(name)] for name in segment.outputs
    ]
    if not inputs or any(t.dtype != np.float32 for target in targets for t in target):
        return None
    if any(len({value.shape for value in values}) > 1 for values in (*inputs, *targets)):
        return None
    pieces, together = _pieces(sides.samples, inputs, targets)
    inputs = [_cut(values, pieces) for values in inputs]
    targets = [_cut(values, pieces) for values in targets]
    variances = [_mean_variance(target) for target in targets]
    if not all(np.isfinite(variance) and variance > 0 for variance in variances):
        return None
    fed = {f"{sides.graph.nodes[o.node].outputs[0]}<{o.slot}>": o for o in operands}
    keys = {(sides.graph.nodes[o.node].outputs[0], o.slot): name for name, o in fed.items()}
    part = sides.present.part(segment.nodes, segment.outputs, keys)
    weights = {name: sides.state.array(operand).astype(np.float32) for name, operand in fed.items()}
    building = _Building(part, (segment.inputs, segment.outputs), weights, provider)
    first_inputs, first_targets = ([values[0] for values in all_values] for all_values in (inputs, targets))
    whole = building.networks([x.shape for x in first_inputs], [y.shape for y in first_targets])
    if whole is None:
        return None
    found = building.windows(whole, first_inputs, max(_PLACES // together, 1))
    windows, networks = (None, whole) if found is None else found
    names = (segment.inputs, segment.outputs)
    return SegmentGradients(whole.forward, networks, windows, fed, inputs, targets, names, variances, pieces, together)


@dataclass(frozen=True)
class _Building:
    """What networks for a segment are built from.

    Attributes:
        part: The segment as a model, whose weights are inputs.
        names: Names of its other inputs, and of its outputs.
        weights: The weights, by name.
        provider: Where to run.
    """

    part: onnx.ModelProto
    names: tuple[tuple[str, ...], tuple[str, ...]]
    weights: Mapping[str, AnyArray]
    provider: Provider

    def networks(self, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> _Networks | None:
        """Return the networks for some shapes; None where what comes out is of other shapes."""
        part = onnx.ModelProto()
        part.CopyFrom(self.part)
        dims = dict(zip(self.names[0], inputs, strict=True))
        dims |= {name: weight.shape for name, weight in self.weights.items()}
        for info in part.graph.input:
            _state_shape(info, dims[info.name])
        graph = GraphView(part)
        shapes = infer_shapes(graph, dims)
        if any(shapes.dims.get(name, shape) != shape for name, shape in zip(self.names[1], outputs, strict=True)):
            return None
        plan = build_backward(graph, shapes, list(self.weights))
        macs = measure_cost(graph, shapes, lambda operand: shapes.dims.get(operand.name)).macs
        wanted = with_outputs(part, (name for name in plan.values if name in graph.producers))
        forward = Session(wanted, self.provider, name="a segment")
        backward = Session(plan.model, self.provider, name="the gradients of a segment")
        return _Networks(forward, backward, plan, macs)

    def windows(self, whole: _Networks, inputs: Sequence[AnyArray], places: int) -> tuple[Windows, _Networks] | None:
        """Return windows with so many places in all samples together, and the networks for them."""

        def run(networks: _Networks, values: Sequence[AnyArray]) -> list[AnyArray]:
            made = networks.forward.run(dict(zip(self.names[0], values, strict=True)) | dict(self.weights))
            return [made[name] for name in self.names[1]]

        try:
            return find_windows(inputs, run(whole, inputs), places, self.networks, run)
        except RuntimeFailedError:
            # Sizes that are stored in the network fit whole samples alone.
            return None


def _mean_variance(values: Sequence[AnyArray]) -> float:
    """Return the mean variance of the runs that are finite."""
    found = [np.var(value, dtype=np.float64) for value in values if np.isfinite(value).all()]
    return float(np.mean(found)) if found else math.nan


def _pieces(
    samples: Samples, inputs: Sequence[Sequence[AnyArray]], targets: Sequence[Sequence[AnyArray]]
) -> tuple[int, int]:
    """Return into how many pieces to cut each run, and how many pieces a step takes."""
    batch = samples.batch
    # Channels are on one axis, whichever it is; the others are samples and places.
    places = min(target[0].size // max(target[0].shape[1:], default=1) for target in targets)
    wanted = max(_FEWEST_SAMPLES, min(MOST_SAMPLES, -(-_PLACES * batch // max(places, 1))))
    if not samples.divisible or any(values[0].ndim == 0 or len(values[0]) != batch for values in (*inputs, *targets)):
        return 1, max(1, wanted // batch)
    return next(batch // size for size in range(min(batch, wanted), batch + 1) if batch % size == 0), 1


def _cut(values: Sequence[AnyArray], pieces: int) -> list[AnyArray]:
    return [piece for value in values for piece in np.split(value, pieces)] if pieces > 1 else list(values)


def _state_shape(info: onnx.ValueInfoProto, dims: Sequence[int]) -> None:
    shape = info.type.tensor_type.shape
    del shape.dim[:]
    for size in dims:
        shape.dim.add(dim_value=size)
