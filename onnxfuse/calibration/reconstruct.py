r"""Reconstruction: fit the weights of a segment of the network together, to what the original makes there.

A refit fits one linear layer after the other. Several layers together can do more: those that make the channels which
stay can put into them what the next ones need. From front to back, every segment gets the compressed network's own
values and should make the original's:

.. math:: \min_w \sum_v \|f_v(x'; w) - y_v\|^2 / \mathrm{Var}(y_v)

over the values v in which it ends (block reconstruction: Li et al., "BRECQ", ICLR 2021, section 3.2, which does so for
quantisation). Gradients come from `onnxfuse.gradient`, steps from `onnxfuse.calibration.descent`. No labels, no loss of
the task, and nothing is trained from end to end. Some samples are held back: a segment that is no better on them keeps
its weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnxfuse.analysis import Analysis
from onnxfuse.arrays import FloatArray
from onnxfuse.calibration.descent import descend
from onnxfuse.calibration.segments import Segment, cut_into_segments
from onnxfuse.calibration.side_by_side import Applied, SideBySide
from onnxfuse.config import Provider
from onnxfuse.coupling.layout import leaves
from onnxfuse.errors import UnsupportedGraphError
from onnxfuse.fusion.weights import WeightState
from onnxfuse.gradient.backward import Backward, build_backward
from onnxfuse.gradient.forward import with_outputs
from onnxfuse.graph.shapes import infer_shapes
from onnxfuse.graph.view import GraphView, Operand
from onnxfuse.proof.runtime import Session
from onnxfuse.proof.samples import Samples

__all__ = ["Reconstruction", "reconstruct_network"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# How far the first steps go, in root mean squares of a weight; biases go by the size of what they shift.
_RATE = 0.01
_BIAS_SHARE = 0.1
# One run in so many is held back.
_HELD_BACK = 8
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
    provider: Provider,
    steps: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> list[Reconstruction]:
    """Fit the segments behind the first fused channels, in the order in which the network runs.

    Args:
        analysis: The original.
        state: The fused weights; changed.
        applied: The groups that were fused, with their maps.
        samples: Inputs, in runs of the size that a step takes; at least two runs.
        provider: Where to run.
        steps: How many steps for every segment.
        seed: Seed of the order of runs.
        progress: Called with the number of segments done, and of all.

    Returns:
        What was done to each segment.

    Raises:
        RuntimeFailedError: ONNX Runtime could not run a network.
    """
    sides = SideBySide(analysis, state, applied, samples, provider)
    wanted = {linear.node.index: linear.weight for linear in sides.nodes()}
    segments = cut_into_segments(sides.graph, list(wanted), _Wholeness(sides), lambda name: _may_end(sides.graph, name))
    results = []
    for done, segment in enumerate(segments):
        progress(done, len(segments))
        operands = _operands(sides, segment, wanted)
        found = (
            _fit(sides, segment, operands, provider, steps, np.random.default_rng([seed, done])) if operands else None
        )
        if found is not None:
            results.append(found)
        for walk in (sides.original, sides.present):
            for name in segment.outputs:
                walk.values(name)
    progress(len(segments), len(segments))
    return results


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


def _operands(sides: SideBySide, segment: Segment, wanted: Mapping[int, Operand]) -> list[Operand]:
    """Return the weights to fit in a segment, and what shifts their results; those that others share stay."""
    found: dict[Operand, None] = {}
    for node in segment.nodes:
        if node.index in wanted:
            found[wanted[node.index]] = None
            shift = sides.state.output_shift(node)
            if shift is not None:
                found[shift] = None
    inside = {node.index for node in segment.nodes}
    return [
        operand
        for operand in found
        if operand.node in inside
        and len(sides.graph.readers[operand.name]) == 1
        and sides.state.stored(operand).dtype == np.float32
    ]


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


def _fit(
    sides: SideBySide,
    segment: Segment,
    operands: Sequence[Operand],
    provider: Provider,
    steps: int,
    rng: np.random.Generator,
) -> Reconstruction | None:
    """Fit one segment; None where there is nothing to fit, or its gradients are not known."""
    try:
        unit = _unit(sides, segment, operands, provider)
    except UnsupportedGraphError:
        return None
    if unit is None:
        return None
    runs = len(unit.inputs[0])
    held = [run for run in range(runs) if run % _HELD_BACK == _HELD_BACK - 1] or [runs - 1]
    used = [run for run in range(runs) if run not in held]
    start = {name: sides.state.array(operand) for name, operand in unit.fed.items()}
    stored = {name: sides.state.stored(operand) for name, operand in unit.fed.items()}
    before = unit.error(held, stored)
    if not used or not np.isfinite(before) or before <= _ROUNDING:
        return None
    order = np.concatenate([rng.permutation(used) for _ in range(-(-steps // len(used)))])
    found = descend(
        start,
        _sizes(unit, stored),
        lambda at, step: unit.gradients(
            int(order[step]), {name: value.astype(np.float32) for name, value in at.items()}
        ),
        steps,
        _RATE,
    )
    after = unit.error(held, {name: value.astype(np.float32) for name, value in found.items()})
    is_better = np.isfinite(after) and after < before
    if is_better:
        for name, operand in unit.fed.items():
            sides.state.replace(operand, found[name])
            sides.tell(operand)
    nodes = tuple(dict.fromkeys(sides.graph.nodes[operand.node].name for operand in operands))
    return Reconstruction(segment.outputs[-1], nodes, before, after if is_better else before, steps if is_better else 0)


def _sizes(unit: _Unit, weights: Mapping[str, AnyArray]) -> dict[str, float]:
    """Return what counts as a unit of each weight: its root mean square; of a shift, that of the results it shifts."""
    spread = float(np.sqrt(np.mean(unit.variances)))
    found = {}
    for name, value in weights.items():
        size = float(np.sqrt(np.mean(np.square(value, dtype=np.float64))))
        found[name] = max(_BIAS_SHARE * spread, 1e-12) if value.ndim == 1 else max(size, 1e-12)
    return found


def _unit(sides: SideBySide, segment: Segment, operands: Sequence[Operand], provider: Provider) -> _Unit | None:
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
    nodes = [sides.present.graph.nodes[sides.present.graph.producers[n.outputs[0]]] for n in segment.nodes]
    part = sides.present.part(nodes, segment.outputs, keys)
    graph = GraphView(part)
    dims = {name: values[0].shape for name, values in zip(segment.inputs, inputs, strict=True)}
    dims |= {name: sides.state.stored(operand).shape for name, operand in fed.items()}
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
