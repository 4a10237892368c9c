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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from onnx import TensorProto

from onnxfuse.analysis import Analysis
from onnxfuse.arrays import FloatArray
from onnxfuse.calibration.images import MOST_VIEWS, Split, image_inputs, split_and_vary
from onnxfuse.calibration.linear import LinearNode, value_readers
from onnxfuse.calibration.refit import FEWEST_ROWS_PER_INPUT
from onnxfuse.calibration.segment_gradients import MOST_SAMPLES, SegmentGradients, segment_gradients
from onnxfuse.calibration.segments import Segment, cut_into_segments
from onnxfuse.calibration.side_by_side import SideBySide
from onnxfuse.config import CompressionConfig
from onnxfuse.coupling.layout import leaves
from onnxfuse.errors import UnsupportedGraphError
from onnxfuse.fusion.values import Applied
from onnxfuse.fusion.weights import WeightState
from onnxfuse.graph.view import Operand
from onnxfuse.proof.samples import Samples
from onnxfuse.statistics.descent import descend

__all__ = ["Reconstruction", "best_on_the_way", "reconstruct_network"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# How far the first steps go, in root mean squares of a weight; biases go by the size of what they shift.
_RATE = 0.01
_BIAS_SHARE = 0.1
# How far to go from where they start to where they end: what is held back tells.
_SHARES = (0.25, 0.5, 0.75, 1.0)
# Multiply-accumulates for all steps together: on samples, and on what was made up, which does not say as much.
_MACS, _MACS_MADE_UP = 4e12, 1e12
# How much of that, besides, views of the samples may take on their way through both networks.
_WALKED = 0.5
_MOST_STEPS = 1200
# With fewer a descent does not get anywhere.
_FEWEST_STEPS = 16
# How much memory the values between segments may take, in both networks.
_MOST_BYTES = 3 * 2**30
# Less than this share of the variance is rounding.
_ROUNDING = 1e-9
# With so many axes channels are on the second or on the last one; with more on the second, with fewer on the last.
_EITHER = 3
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
    *,
    is_made_up: bool = False,
) -> list[Reconstruction]:
    """Fit the segments behind the first fused channels, in the order in which the network runs.

    Args:
        analysis: The original.
        state: The fused weights; changed.
        applied: The groups that were fused, with their maps.
        samples: Inputs.
        config: How much effort to make, where to run, and the seed of the order of samples.
        progress: Called with the number of segments done, and of all.
        is_made_up: Whether the inputs were made up, so that less effort is worth it.

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
    may_end = _Ends(plain)
    segments = cut_into_segments(graph, linear, _Wholeness(plain), may_end)
    rng = np.random.default_rng(config.seed)
    macs = config.effort * (_MACS_MADE_UP if is_made_up else _MACS)
    views = _views(analysis, segments, samples, macs)
    split = split_and_vary(samples, image_inputs(analysis, samples), views, MOST_SAMPLES, rng)
    # Only the last may end where samples are too few: it stays as the refit has left it.
    closed = [segment for segment in segments if not all(map(may_end.has_samples, segment.outputs))]
    left = [_left(segment, wanted) for segment in closed if _made(segment) & wanted.keys()]
    fitted = sum(bool(_made(segment) & wanted.keys()) for segment in segments) - len(left)
    if split is None or not fitted:
        return left
    sides = SideBySide(analysis, state, applied, split.samples, config.provider)
    fitting = _Fitting(sides, split, samples.count, config, _Budget(macs, fitted))
    results = []
    for done, segment in enumerate(segments):
        progress(done, len(segments))
        found = None if segment in closed else fitting.fit(segment, wanted, rng)
        if found is not None:
            results.append(found)
        fitting.pass_on(segment)
    progress(len(segments), len(segments))
    return results + left


def _left(segment: Segment, wanted: Mapping[str, LinearNode]) -> Reconstruction:
    """Return what is said of a segment that no steps are made for, since it ends in too many channels."""
    made = _made(segment)
    nodes = tuple(linear.node.name for result, linear in wanted.items() if result in made)
    return Reconstruction(
        segment.outputs[-1], nodes, kept="there are too few samples for the channels in which it ends"
    )


def _views(analysis: Analysis, segments: Sequence[Segment], samples: Samples, macs: float) -> int:
    """Return how many views of every image fit into memory, and can be had for a part of all that may be worked out."""
    dims = analysis.shapes.dims
    numbers = (sum(math.prod(dims.get(name, ())) for name in (*s.inputs, *s.outputs)) for s in segments)
    bytes_of_one = 4 * 2 * max(numbers, default=1) // analysis.batch
    macs_of_one = 2 * analysis.cost.macs
    affordable = min(_MOST_BYTES / max(bytes_of_one, 1), _WALKED * macs / max(macs_of_one, 1))
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


class _Ends:
    """Tells at which values a segment may end.

    Not where they are merely scaled and shifted by constants next, and not where samples are too few for so many
    channels: classes, for one, of which the samples show some alone. What is fitted to these forgets the others.
    """

    def __init__(self, sides: SideBySide) -> None:
        self.graph = sides.present.graph
        self.dims = sides.analysis.shapes.dims
        self.share = sides.samples.count / sides.analysis.batch

    def has_samples(self, name: str) -> bool:
        """Whether there are enough samples for the channels of a value."""
        dims = self.dims.get(name, ())
        if len(dims) <= 1:
            # Sizes, for one: no samples are on any axis.
            return True
        return self.share * math.prod(dims) >= FEWEST_ROWS_PER_INPUT * _channels(dims) ** 2

    def __call__(self, name: str) -> bool:
        if not self.has_samples(name):
            return False
        reader = self.graph.sole_reader(name)
        if reader is None or reader.op not in _AFFINE:
            return True
        return not all(read == name or read in self.graph.constants for read in reader.inputs if read)


def _channels(dims: Sequence[int]) -> int:
    """Return how many channels a value of some shape has, at least."""
    return min(dims[1:]) if len(dims) == _EITHER else dims[1 if len(dims) > _EITHER else -1]


def _operands(
    sides: SideBySide, segment: Segment, wanted: Mapping[str, LinearNode], samples: int
) -> dict[Operand, LinearNode]:
    """Return the weights to fit in a segment, and what shifts their results; those that others share stay.

    A layer stays too that would be fitted on fewer rows than a refit needs: it would learn them by heart.
    """
    made = _made(segment)
    found: dict[Operand, LinearNode] = {}
    for linear in (linear for result, linear in wanted.items() if result in made):
        row_length = linear.row_length(sides.state.array(linear.weight))
        if samples * _places(sides, linear) < FEWEST_ROWS_PER_INPUT * row_length:
            continue
        for operand in (linear.weight, sides.state.output_shift(linear.node)):
            if operand is not None and sides.graph.nodes[operand.node].outputs[0] in made and _is_free(sides, operand):
                found[operand] = linear
    return found


def _places(sides: SideBySide, linear: LinearNode) -> float:
    """Return in how many places a layer is applied for each sample; no bound where that is not known."""
    dims = sides.analysis.shapes.dims.get(linear.result)
    if not dims:
        return math.inf
    channels = dims[1 if linear.is_convolution else -1]
    return math.prod(dims) / max(channels * sides.analysis.batch, 1)


def _is_free(sides: SideBySide, operand: Operand) -> bool:
    """Whether a weight is stored as floats, and one node alone reads its values."""
    tensor = sides.graph.constants.get(operand.name)
    is_sole = value_readers(sides.graph, operand.name) == 1
    return tensor is not None and tensor.data_type == TensorProto.FLOAT and is_sole


@dataclass
class _Budget:
    """What steps may take.

    Attributes:
        macs: Multiply-accumulates that are left.
        segments: How many segments there are still to fit.
    """

    macs: float
    segments: int

    def share(self) -> float:
        """Return what the next segment may take; what it leaves goes to those behind it."""
        return self.macs / max(self.segments, 1)


class _Fitting:
    """Both networks on their way, segment by segment."""

    def __init__(
        self, sides: SideBySide, split: Split, samples: int, config: CompressionConfig, budget: _Budget
    ) -> None:
        self.sides = sides
        self.split = split
        self.samples = samples
        self.provider = config.provider
        self.most_steps = int(config.effort * _MOST_STEPS)
        self.budget = budget

    def fit(
        self, segment: Segment, wanted: Mapping[str, LinearNode], rng: np.random.Generator
    ) -> Reconstruction | None:
        """Fit one segment; None where there is nothing to fit."""
        share = self.budget.share()
        self.budget.segments -= bool(_made(segment) & wanted.keys())
        operands = _operands(self.sides, segment, wanted, self.samples)
        if not operands or not segment.outputs:
            return None
        nodes = tuple(dict.fromkeys(self.sides.graph.nodes[operand.node].name for operand in operands))
        result = Reconstruction(segment.outputs[-1], nodes)
        try:
            unit = segment_gradients(self.sides, segment, operands, self.provider)
        except UnsupportedGraphError as error:
            return replace(result, kept=error.what)
        if unit is None:
            return replace(result, kept="what goes in or comes out is not of floats, or not of one shape")
        steps = int(min(share / unit.macs_of_step, self.most_steps))
        if steps < _FEWEST_STEPS:
            return replace(result, kept="its share of the effort is too small for it")
        return self._fitted(result, unit, operands, steps, rng)

    def _fitted(
        self,
        result: Reconstruction,
        unit: SegmentGradients,
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
        self.budget.macs -= steps * unit.macs_of_step
        wanted_runs = steps * unit.together
        order = np.concatenate([rng.permutation(used) for _ in range(-(-wanted_runs // len(used)))])
        turns = order[:wanted_runs].reshape(steps, unit.together)
        units = _units(unit, start)
        end = descend(start, units, lambda at, step: unit.gradients(turns[step], _single(at), rng), steps, _RATE)
        found, after = best_on_the_way(start, end, lambda at: unit.error(held, _single(at)))
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


def best_on_the_way(
    start: Mapping[str, FloatArray], end: Mapping[str, FloatArray], error: Callable[[Mapping[str, FloatArray]], float]
) -> tuple[Mapping[str, FloatArray], float]:
    """Return what has the least error on the way from the first to the last weights, the last among it; and that error.

    Steps that go on learn the samples by heart; part of the way is then better on others.
    """
    options = [{name: start[name] + share * (end[name] - start[name]) for name in end} for share in _SHARES]
    errors = [error(option) for option in options]
    best = int(np.argmin(np.nan_to_num(errors, nan=np.inf)))
    return options[best], errors[best]


def _single(weights: Mapping[str, FloatArray]) -> dict[str, AnyArray]:
    """Return weights in the precision that networks compute in."""
    return {name: value.astype(np.float32) for name, value in weights.items()}


def _units(unit: SegmentGradients, weights: Mapping[str, AnyArray]) -> dict[str, float]:
    """Return what counts as a unit of each weight: its root mean square; of a shift, that of the results it shifts."""
    spread = float(np.sqrt(np.mean(unit.variances)))
    found = {}
    for name, value in weights.items():
        size = float(np.sqrt(np.mean(np.square(value, dtype=np.float64))))
        found[name] = max(_BIAS_SHARE * spread, 1e-12) if value.ndim == 1 else max(size, 1e-12)
    return found
