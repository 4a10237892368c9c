r"""Reconstruction: fit the weights of a segment of the network together, to what the original makes there.

A refit fits one linear layer after the other. Several layers together can do more: those that make the channels which
stay can put into them what the next ones need. From front to back, every segment gets the compressed network's own
values and should make the original's:

.. math:: \min_w \sum_v \|f_v(x'; w) - y_v\|^2 / \mathrm{Var}(y_v)

over the values v in which it ends (block reconstruction: Li et al., "BRECQ", ICLR 2021, section 3.2, which does so for
quantisation). Gradients come from `onnxfuse.gradient`, steps from `onnxfuse.statistics.descent`. No labels, no loss of
the task, and nothing is trained from end to end. Some samples are held back: a segment that is no better on them keeps
its weights.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto

from onnxfuse.analysis import Analysis
from onnxfuse.arrays import FloatArray
from onnxfuse.calibration.images import MOST_VIEWS, Split, image_inputs, split_and_vary
from onnxfuse.calibration.linear import LinearNode
from onnxfuse.calibration.segments import Segment, cut_into_segments
from onnxfuse.calibration.side_by_side import Applied, SideBySide
from onnxfuse.config import CompressionConfig, Provider
from onnxfuse.coupling.layout import leaves
from onnxfuse.errors import UnsupportedGraphError
from onnxfuse.fusion.weights import WeightState
from onnxfuse.gradient.backward import Backward, build_backward
from onnxfuse.gradient.forward import with_outputs
from onnxfuse.graph.shapes import infer_shapes
from onnxfuse.graph.view import GraphView, Operand
from onnxfuse.proof.runtime import Session
from onnxfuse.proof.samples import Samples
from onnxfuse.statistics.descent import descend

__all__ = ["Reconstruction", "reconstruct_network"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]
_Arrays: TypeAlias = dict[str, FloatArray]

# How far the first steps go, in root mean squares of a weight; biases go by the size of what they shift.
_RATE = 0.02
_BIAS_SHARE = 0.1
# How many samples a step takes, and multiply-accumulates for all steps together.
_BATCH = 32
_MACS = 1e12
# A step runs a segment once forward and about twice that backward.
_PASSES = 3
_MOST_STEPS = 300
# With fewer a descent does not get anywhere.
_FEWEST_STEPS = 16
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
        nodes: The nodes whose weights were fitted.
        error_before: Share of the variance that the segment misses on held-back samples, before.
        error_after: The same for the weights that it has now.
        steps: How many steps were made; 0 where the weights stayed.
    """

    value: str
    nodes: tuple[str, ...]
    error_before: float
    error_after: float
    steps: int


def reconstruct_network(
    analysis: Analysis,
    state: WeightState,
    applied: Applied,
    samples: Samples,
    macs: int,
    config: CompressionConfig,
    progress: Callable[[int, int], None],
) -> list[Reconstruction]:
    """Fit the segments behind the first fused channels, in the order in which the network runs.

    Args:
        analysis: The original.
        state: The fused weights; changed.
        applied: The groups that were fused, with their maps.
        samples: Inputs.
        macs: What one sample costs the compressed network.
        config: How much effort to make, where to run, and the seed of the order of samples.
        progress: Called with the number of segments done, and of all.

    Returns:
        What was done to each segment.

    Raises:
        RuntimeFailedError: ONNX Runtime could not run a network.
    """
    steps = _steps(macs, config.effort)
    plain = SideBySide(analysis, state, applied, samples, config.provider)
    wanted = {linear.result: linear for linear in plain.nodes()}
    # The compressed network may have fewer nodes: what only copied constants is a constant there.
    graph = plain.present.graph
    fitted = [graph.producers[output] for output in wanted]
    segments = cut_into_segments(graph, fitted, _Wholeness(plain), lambda name: _may_end(graph, name))
    rng = np.random.default_rng(config.seed)
    views = _views(analysis, segments, samples, steps)
    split = split_and_vary(samples, image_inputs(analysis, samples), views, _BATCH, rng)
    if steps < _FEWEST_STEPS or split is None or not wanted:
        return []
    fitting = _Fitting(SideBySide(analysis, state, applied, split.samples, config.provider), split, steps, config)
    results = []
    for done, segment in enumerate(segments):
        progress(done, len(segments))
        found = fitting.fit(segment, wanted, rng)
        if found is not None:
            results.append(found)
        fitting.pass_on(segment)
    progress(len(segments), len(segments))
    return results


def _steps(macs: int, effort: float) -> int:
    """Return how many steps every segment gets."""
    return int(min(effort * _MACS / (_PASSES * _BATCH * max(macs, 1)), effort * _MOST_STEPS))


def _views(analysis: Analysis, segments: Sequence[Segment], samples: Samples, steps: int) -> int:
    """Return how many views of every image are worth having: no more than are used, or than fit into memory."""
    dims = analysis.shapes.dims
    numbers = (sum(math.prod(dims.get(name, ())) for name in (*s.inputs, *s.outputs)) for s in segments)
    largest = 4 * 2 * max(numbers, default=1) // analysis.batch
    most = min(steps * _BATCH, _MOST_BYTES // max(largest, 1))
    return max(1, min(MOST_VIEWS, most // max(samples.count, 1)))


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
    made = {output for node in segment.nodes for output in node.outputs}
    found: dict[Operand, LinearNode] = {}
    for linear in (linear for result, linear in wanted.items() if result in made):
        for operand in (linear.weight, sides.state.output_shift(linear.node)):
            if operand is not None and sides.graph.nodes[operand.node].outputs[0] in made and _is_free(sides, operand):
                found[operand] = linear
    return found


def _is_free(sides: SideBySide, operand: Operand) -> bool:
    """Whether a weight is stored as floats for one reader alone."""
    tensor = sides.graph.constants.get(operand.name)
    return tensor is not None and tensor.data_type == TensorProto.FLOAT and len(sides.graph.readers[operand.name]) == 1


@dataclass(frozen=True)
class _Unit:
    """A segment that can be run forward and backward with any weights."""

    forward: Session
    backward: Session
    plan: Backward
    fed: Mapping[str, Operand]
    inputs: Sequence[Sequence[AnyArray]]
    targets: Sequence[Sequence[AnyArray]]
    names: tuple[tuple[str, ...], tuple[str, ...]]
    variances: Sequence[float]

    def outputs(self, run: int, weights: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """Return everything that a run gives."""
        feeds = {name: values[run] for name, values in zip(self.names[0], self.inputs, strict=True)} | dict(weights)
        return dict(feeds) | self.forward.run(feeds)

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

    def gradients(self, run: int, weights: Mapping[str, AnyArray]) -> dict[str, FloatArray]:
        """Return the gradient of half the error in one run."""
        outputs = self.outputs(run, weights)
        fed = {own: outputs[name] for name, own in self.plan.values.items()}
        for name, gap, scale in self.missed(run, outputs):
            if name in self.plan.seeds:
                fed[self.plan.seeds[name]] = (gap * scale).astype(np.float32)
        results = self.backward.run(fed)
        return {name: results[own] for name, own in self.plan.results.items()}


class _Fitting:
    """Both networks on their way, segment by segment."""

    def __init__(self, sides: SideBySide, split: Split, steps: int, config: CompressionConfig) -> None:
        self.sides = sides
        self.steps = steps
        self.provider = config.provider
        self.used = range(split.used)
        self.held = range(split.used, split.samples.count // split.samples.batch)

    def fit(
        self, segment: Segment, wanted: Mapping[str, LinearNode], rng: np.random.Generator
    ) -> Reconstruction | None:
        """Fit one segment; None where there is nothing to fit, or its gradients are not known."""
        operands = _operands(self.sides, segment, wanted)
        try:
            unit = _unit(self.sides, segment, operands, self.provider) if operands else None
        except UnsupportedGraphError:
            unit = None
        if unit is None:
            return None
        state = self.sides.state
        start = {name: state.array(operand) for name, operand in unit.fed.items()}
        before = unit.error(self.held, _single(start))
        if not np.isfinite(before) or before <= _ROUNDING:
            return None
        found = self._descend(unit, start, rng)
        after = unit.error(self.held, _single(found))
        is_better = bool(np.isfinite(after)) and after < before
        if is_better:
            for name, operand in unit.fed.items():
                state.replace(operand, found[name])
                self.sides.tell(operands[operand], operand)
        nodes = tuple(dict.fromkeys(self.sides.graph.nodes[operand.node].name for operand in operands))
        after, steps = (after, self.steps) if is_better else (before, 0)
        return Reconstruction(segment.outputs[-1], nodes, before, after, steps)

    def _descend(self, unit: "_Unit", start: Mapping[str, FloatArray], rng: np.random.Generator) -> _Arrays:
        rounds = -(-self.steps // len(self.used))
        order = np.concatenate([rng.permutation(self.used) for _ in range(rounds)])
        sizes = _sizes(unit, start)
        return descend(start, sizes, lambda at, step: unit.gradients(int(order[step]), _single(at)), self.steps, _RATE)

    def pass_on(self, segment: Segment) -> None:
        """Let both networks go to the end of a segment."""
        for walk in (self.sides.original, self.sides.present):
            for name in segment.outputs:
                walk.values(name)


def _single(weights: Mapping[str, FloatArray]) -> dict[str, AnyArray]:
    """Return weights in the precision that networks compute in."""
    return {name: value.astype(np.float32) for name, value in weights.items()}


def _sizes(unit: _Unit, weights: Mapping[str, AnyArray]) -> dict[str, float]:
    """Return what counts as a unit of each weight: its root mean square; of a shift, that of the results it shifts."""
    spread = float(np.sqrt(np.mean(unit.variances)))
    found = {}
    for name, value in weights.items():
        size = float(np.sqrt(np.mean(np.square(value, dtype=np.float64))))
        found[name] = max(_BIAS_SHARE * spread, 1e-12) if value.ndim == 1 else max(size, 1e-12)
    return found


def _unit(sides: SideBySide, segment: Segment, operands: Iterable[Operand], provider: Provider) -> _Unit | None:
    """Build the networks that run a segment, and collect what goes in and what should come out."""
    inputs = [sides.present.values(name) for name in segment.inputs]
    targets = [[sides.fused_value(value, name) for value in sides.original.values(name)] for name in segment.outputs]
    if not inputs or any(t.dtype != np.float32 for target in targets for t in target):
        return None
    shapes_of = [{value.shape for value in values} for values in (*inputs, *targets)]
    if any(len(shapes) > 1 for shapes in shapes_of):
        return None
    variances = [float(np.mean([np.var(t, dtype=np.float64) for t in target])) for target in targets]
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
    plan = build_backward(graph, infer_shapes(graph, dims), list(fed))
    forward = Session(with_outputs(part, (n for n in plan.values if n in graph.producers)), provider, name="a segment")
    backward = Session(plan.model, provider, name="the gradients of a segment")
    return _Unit(forward, backward, plan, fed, inputs, targets, (segment.inputs, segment.outputs), variances)


def _state_shape(info: onnx.ValueInfoProto, dims: Sequence[int]) -> None:
    shape = info.type.tensor_type.shape
    del shape.dim[:]
    for size in dims:
        shape.dim.add(dim_value=size)
