r"""Reconstruction: fit the weights of a segment of the network together, to what the original makes there.

A refit fits one linear layer after the other. Several layers together can do more: those that make the channels which
stay can put into them what the next ones need. From front to back, every segment gets the compressed network's own
values and should make the original's:

.. math:: \min_w \sum_v \|f_v(x'; w) - y_v\|^2 / \mathrm{Var}(y_v)

over the values v in which it ends (block reconstruction: Li et al., "BRECQ", ICLR 2021, section 3.2, which does so for
quantisation). Gradients come from `onnxfuse.gradient`, steps from `onnxfuse.statistics.descent`. No labels, no loss of
the task, and nothing is trained from end to end. Some samples are held back: a segment that is no better on them keeps
its weights. What a segment's steps change comes to layers behind it that were fitted before; so where segments end, the
layers are fitted by least squares once more afterwards (`onnxfuse.calibration.refit`).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto

from onnxfuse.analysis import Analysis
from onnxfuse.arrays import FloatArray
from onnxfuse.calibration.images import MOST_VIEWS, Split, image_inputs, split_and_vary
from onnxfuse.calibration.linear import LinearNode, value_readers
from onnxfuse.calibration.segments import Segment, cut_into_segments
from onnxfuse.calibration.side_by_side import SideBySide
from onnxfuse.config import CompressionConfig, Provider
from onnxfuse.coupling.layout import leaves
from onnxfuse.errors import UnsupportedGraphError
from onnxfuse.fusion.values import Applied
from onnxfuse.fusion.weights import WeightState
from onnxfuse.gradient.backward import Backward, build_backward
from onnxfuse.gradient.forward import with_outputs
from onnxfuse.graph.cost import measure_cost
from onnxfuse.graph.shapes import infer_shapes
from onnxfuse.graph.view import GraphView, Operand
from onnxfuse.proof.runtime import Session
from onnxfuse.proof.samples import Samples
from onnxfuse.statistics.descent import descend

__all__ = ["Reconstruction", "reconstruct_network"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# How far the first steps go, in root mean squares of a weight; biases go by the size of what they shift.
_RATE = 0.01
_BIAS_SHARE = 0.1
# Multiply-accumulates for all steps together. A step runs a segment once forward and about twice that backward.
_MACS = 1e12
_PASSES = 3
# How much of that, besides, views of the samples may take on their way through both networks.
_WALKED = 0.5
_MOST_STEPS = 600
# With fewer a descent does not get anywhere.
_FEWEST_STEPS = 16
# How many samples a step takes: enough for so many places, but from few to a whole run.
_PLACES = 1024
_FEWEST_SAMPLES, _BATCH = 4, 64
# How much memory the values between segments may take, in both networks.
_MOST_BYTES = 3 * 2**30
# Less than this share of the variance is rounding.
_ROUNDING = 1e-9
# What only scales and shifts.
_AFFINE = frozenset({"BatchNormalization", "Add", "Sub", "Mul", "Div"})


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """What the reconstruction did to one segment.

    Attributes:
        value: The value in which the segment ends (the last, if there are several).
        nodes: The nodes whose weights are fitted.
        error_before: Share of the variance that the segment misses on held-back samples, before; None where it was not
            run.
        error_after: The same for the weights that it has now.
        steps: How many steps were made; 0 where the weights stayed.
        kept: Why they stayed; empty if they did not.
    """

    value: str
    nodes: tuple[str, ...]
    error_before: float | None = None
    error_after: float | None = None
    steps: int = 0
    kept: str = ""


def reconstruct_network(
    analysis: Analysis,
    state: WeightState,
    applied: Applied,
    samples: Samples,
    config: CompressionConfig,
    progress: Callable[[int, int], None],
) -> list[Reconstruction]:
    """Fit the segments behind the first fused channels, in the order in which the network runs.

    Args:
        analysis: The original.
        state: The fused weights; changed.
        applied: The groups that were fused, with their maps.
        samples: Inputs.
        config: How much effort to make, where to run, and the seed of the order of samples.
        progress: Called with the number of segments done, and of all.

    Returns:
        What was done to each segment.

    Raises:
        RuntimeFailedError: ONNX Runtime could not run a network.
    """
    plain = SideBySide(analysis, state, applied, samples, config.provider)
    wanted = {linear.result: linear for linear in plain.nodes()}
    # The compressed network may have fewer nodes: what only copied constants is a constant there.
    graph = plain.present.graph
    linear = [graph.producers[result] for result in wanted]
    segments = cut_into_segments(graph, linear, _Wholeness(plain), lambda name: _may_end(graph, name))
    rng = np.random.default_rng(config.seed)
    views = _views(analysis, segments, samples, config.effort)
    split = split_and_vary(samples, image_inputs(analysis, samples), views, _BATCH, rng)
    fitted = sum(any(result in _made(segment) for result in wanted) for segment in segments)
    if split is None or not fitted:
        return []
    sides = SideBySide(analysis, state, applied, split.samples, config.provider)
    fitting = _Fitting(sides, split, config, config.effort * _MACS / fitted)
    results = []
    for done, segment in enumerate(segments):
        progress(done, len(segments))
        found = fitting.fit(segment, wanted, rng)
        if found is not None:
            results.append(found)
        fitting.pass_on(segment)
    progress(len(segments), len(segments))
    return results


def _views(analysis: Analysis, segments: Sequence[Segment], samples: Samples, effort: float) -> int:
    """Return how many views of every image fit into memory, and can be had for a part of the effort."""
    dims = analysis.shapes.dims
    numbers = (sum(math.prod(dims.get(name, ())) for name in (*s.inputs, *s.outputs)) for s in segments)
    bytes_of_one = 4 * 2 * max(numbers, default=1) // analysis.batch
    macs_of_one = 2 * analysis.cost.macs
    affordable = min(_MOST_BYTES / max(bytes_of_one, 1), _WALKED * effort * _MACS / max(macs_of_one, 1))
    return max(1, min(MOST_VIEWS, int(affordable // max(samples.count, 1))))


def _made(segment: Segment) -> set[str]:
    return {output for node in segment.nodes for output in node.outputs}


class _Wholeness:
    """Tells whether values have all their channels still."""

    def __init__(self, sides: SideBySide) -> None:
        self.layouts = sides.analysis.channels.layouts
        self.fused = {group.atom for group, _ in sides.applied}

    def __call__(self, name: str) -> bool:
        return not any(self.fused & set(leaves(layout)) for layout in self.layouts.get(Operand(name), ()))


def _may_end(graph: GraphView, name: str) -> bool:
    """Whether a value is not merely scaled and shifted by constants next."""
    reader = graph.sole_reader(name)
    if reader is None or reader.op not in _AFFINE:
        return True
    return not all(read == name or read in graph.constants for read in reader.inputs if read)


def _operands(sides: SideBySide, segment: Segment, wanted: Mapping[str, LinearNode]) -> dict[Operand, LinearNode]:
    """Return the weights to fit in a segment, and what shifts their results; those that others share stay."""
    made = _made(segment)
    found: dict[Operand, LinearNode] = {}
    for linear in (linear for result, linear in wanted.items() if result in made):
        for operand in (linear.weight, sides.state.output_shift(linear.node)):
            if operand is not None and sides.graph.nodes[operand.node].outputs[0] in made and _is_free(sides, operand):
                found[operand] = linear
    return found


def _is_free(sides: SideBySide, operand: Operand) -> bool:
    """Whether a weight is stored as floats, and one node alone reads its values."""
    tensor = sides.graph.constants.get(operand.name)
    is_sole = value_readers(sides.graph, operand.name) == 1
    return tensor is not None and tensor.data_type == TensorProto.FLOAT and is_sole


@dataclass(frozen=True)
class _Unit:
    """A segment that can be run forward and backward with any weights.

    Attributes:
        forward: Runs it.
        backward: Finds the gradients.
        plan: What goes into that, and what comes out.
        fed: The weights, by the names of the inputs that take them.
        inputs: What else goes in: for every input one array for each run.
        targets: What should come out, likewise.
        names: Names of the inputs and of the outputs.
        variances: The variance of each output.
        pieces: Into how many runs each run of the samples was cut.
        together: How many runs a step takes.
        macs: Multiply-accumulates of one run.
    """

    forward: Session
    backward: Session
    plan: Backward
    fed: Mapping[str, Operand]
    inputs: Sequence[Sequence[AnyArray]]
    targets: Sequence[Sequence[AnyArray]]
    names: tuple[tuple[str, ...], tuple[str, ...]]
    variances: Sequence[float]
    pieces: int
    together: int
    macs: int

    @property
    def macs_of_step(self) -> int:
        """Multiply-accumulates of a step, forward and backward."""
        return _PASSES * self.together * max(self.macs, 1)

    def outputs(self, run: int, weights: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """Return everything that a run gives."""
        feeds = {name: values[run] for name, values in zip(self.names[0], self.inputs, strict=True)} | dict(weights)
        return dict(feeds) | self.forward.run(feeds)

    def is_sound(self, run: int) -> bool:
        """Whether everything that goes in and should come out is finite."""
        arrays = [values[run] for values in (*self.inputs, *self.targets)]
        return all(array.dtype.kind != "f" or bool(np.isfinite(array).all()) for array in arrays)

    def missed(self, run: int, outputs: Mapping[str, AnyArray]) -> Iterator[tuple[str, AnyArray, float]]:
        """Yield by how much each output misses its target, and one over its variance times its size."""
        for name, target, variance in zip(self.names[1], self.targets, self.variances, strict=True):
            yield name, outputs[name] - target[run], 1.0 / (variance * target[run].size)

    def error(self, runs: Sequence[int], weights: Mapping[str, AnyArray]) -> float:
        """Return the share of the variance that is missed, over some runs."""
        total = 0.0
        for run in runs:
            total += sum(
                scale * float(np.square(gap, dtype=np.float64).sum())
                for _, gap, scale in self.missed(run, self.outputs(run, weights))
            )
        return total / max(len(runs), 1)

    def gradients(self, runs: Sequence[int], weights: Mapping[str, AnyArray]) -> dict[str, FloatArray]:
        """Return the gradient of half the error in some runs together."""
        total: dict[str, FloatArray] = {}
        for run in runs:
            for name, gradient in self._gradients(run, weights).items():
                total[name] = total[name] + gradient if name in total else gradient
        return total

    def _gradients(self, run: int, weights: Mapping[str, AnyArray]) -> dict[str, FloatArray]:
        outputs = self.outputs(run, weights)
        fed = {own: outputs[name] for name, own in self.plan.values.items()}
        for name, gap, scale in self.missed(run, outputs):
            if name in self.plan.seeds:
                fed[self.plan.seeds[name]] = (gap * scale).astype(np.float32)
        results = self.backward.run(fed)
        return {name: results[own] for name, own in self.plan.results.items()}


class _Fitting:
    """Both networks on their way, segment by segment."""

    def __init__(self, sides: SideBySide, split: Split, config: CompressionConfig, macs: float) -> None:
        self.sides = sides
        self.split = split
        self.provider = config.provider
        self.most_steps = int(config.effort * _MOST_STEPS)
        self.macs = macs

    def fit(
        self, segment: Segment, wanted: Mapping[str, LinearNode], rng: np.random.Generator
    ) -> Reconstruction | None:
        """Fit one segment; None where there is nothing to fit."""
        operands = _operands(self.sides, segment, wanted)
        if not operands or not segment.outputs:
            return None
        nodes = tuple(dict.fromkeys(self.sides.graph.nodes[operand.node].name for operand in operands))
        result = Reconstruction(segment.outputs[-1], nodes)
        try:
            unit = _unit(self.sides, segment, operands, self.provider)
        except UnsupportedGraphError as error:
            return replace(result, kept=error.what)
        if unit is None:
            return replace(result, kept="what goes in or comes out is not of floats, or not of one shape")
        steps = int(min(self.macs / unit.macs_of_step, self.most_steps))
        if steps < _FEWEST_STEPS:
            return replace(result, kept="its share of the effort is too small for it")
        return self._fitted(result, unit, operands, steps, rng)

    def _fitted(
        self,
        result: Reconstruction,
        unit: _Unit,
        operands: Mapping[Operand, LinearNode],
        steps: int,
        rng: np.random.Generator,
    ) -> Reconstruction | None:
        """Follow the gradients of a segment, and keep what is better on what was held back."""
        state = self.sides.state
        first = self.split.used * unit.pieces
        used = np.array([run for run in range(first) if unit.is_sound(run)], np.int64)
        held = [run for run in range(first, len(unit.targets[0])) if unit.is_sound(run)]
        start = {name: state.array(operand) for name, operand in unit.fed.items()}
        before = unit.error(held, _single(start))
        if not len(used) or not np.isfinite(before) or before <= _ROUNDING:
            return None
        wanted_runs = steps * unit.together
        order = np.concatenate([rng.permutation(used) for _ in range(-(-wanted_runs // len(used)))])
        turns = order[:wanted_runs].reshape(steps, unit.together)
        units = _units(unit, start)
        found = descend(start, units, lambda at, step: unit.gradients(turns[step], _single(at)), steps, _RATE)
        after = unit.error(held, _single(found))
        if not np.isfinite(after) or after >= before:
            why = "they were no better on what was held back"
            return replace(result, error_before=before, error_after=before, kept=why)
        for name, operand in unit.fed.items():
            state.replace(operand, found[name])
            self.sides.tell(operands[operand], operand)
        return replace(result, error_before=before, error_after=after, steps=steps)

    def pass_on(self, segment: Segment) -> None:
        """Let both networks go to the end of a segment."""
        inside = {node.index for node in segment.nodes}
        readers = self.sides.present.graph.readers
        for name in segment.outputs:
            # Outputs of the network that no other node reads are not kept.
            if any(reader.node not in inside for reader in readers.get(name, ())):
                self.sides.original.values(name)
                self.sides.present.values(name)


def _single(weights: Mapping[str, FloatArray]) -> dict[str, AnyArray]:
    """Return weights in the precision that networks compute in."""
    return {name: value.astype(np.float32) for name, value in weights.items()}


def _units(unit: _Unit, weights: Mapping[str, AnyArray]) -> dict[str, float]:
    """Return what counts as a unit of each weight: its root mean square; of a shift, that of the results it shifts."""
    spread = float(np.sqrt(np.mean(unit.variances)))
    found = {}
    for name, value in weights.items():
        size = float(np.sqrt(np.mean(np.square(value, dtype=np.float64))))
        found[name] = max(_BIAS_SHARE * spread, 1e-12) if value.ndim == 1 else max(size, 1e-12)
    return found


def _unit(sides: SideBySide, segment: Segment, operands: Iterable[Operand], provider: Provider) -> _Unit | None:
    """Build the networks that run a segment, and collect what goes in and what should come out."""
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
    graph = GraphView(part)
    dims = {name: values[0].shape for name, values in zip(segment.inputs, inputs, strict=True)}
    dims |= {name: sides.state.array(operand).shape for name, operand in fed.items()}
    for info in part.graph.input:
        _state_shape(info, dims[info.name])
    shapes = infer_shapes(graph, dims)
    made = {name: target[0].shape for name, target in zip(segment.outputs, targets, strict=True)}
    if any(shapes.dims.get(name, shape) != shape for name, shape in made.items()):
        return None
    plan = build_backward(graph, shapes, list(fed))
    macs = measure_cost(graph, shapes, lambda operand: shapes.dims.get(operand.name)).macs
    forward = Session(with_outputs(part, (n for n in plan.values if n in graph.producers)), provider, name="a segment")
    backward = Session(plan.model, provider, name="the gradients of a segment")
    return _Unit(
        forward,
        backward,
        plan,
        fed,
        inputs,
        targets,
        (segment.inputs, segment.outputs),
        variances,
        pieces,
        together,
        macs,
    )


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
    wanted = max(_FEWEST_SAMPLES, min(_BATCH, -(-_PLACES * batch // max(places, 1))))
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
