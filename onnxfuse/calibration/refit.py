"""Calibrated refit: fit every linear node behind fused channels anew, front to back, on samples.

After the channels were fused, each linear node gets the weights with which it best reproduces, from the compressed
network's own activations, what the original computed there (asymmetric reconstruction, method of ThiNet and its
successors; He et al., "Channel pruning for accelerating very deep neural networks", ICCV 2017, equation 5). Where its
result ends in a residual addition, the target is the sum: so errors of the other branch are made good too. Only
unlabelled samples are needed. Some of them are held back: they choose the ridge, and keep the present weights where a
fit does not improve them.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from onnxfuse.analysis import Analysis
from onnxfuse.arrays import FloatArray, IntArray
from onnxfuse.calibration.linear import Ending, LinearNode, ending_of
from onnxfuse.calibration.side_by_side import SideBySide
from onnxfuse.calibration.walk import Walk
from onnxfuse.config import Provider
from onnxfuse.coupling.layout import Product
from onnxfuse.fusion.values import Applied
from onnxfuse.fusion.weights import WeightState
from onnxfuse.graph.view import Operand
from onnxfuse.proof.samples import Samples
from onnxfuse.statistics.regression import Regression, RegressionRows, RegressionSums

__all__ = ["FEWEST_ROWS_PER_INPUT", "HELD_BACK", "Refit", "refit_network"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Rows to fit on: for every number in a row, and in all.
_ROWS_PER_INPUT = 6
_FEWEST_ROWS = 12_000
# With fewer a fit says more of these samples than of the network, and only the mean is made good.
FEWEST_ROWS_PER_INPUT = 1.5
# Longer rows would need more than about 350 MB for each sum of products; a few of them are kept instead.
_LONGEST_ROW = 6_912
_MOST_LONG_ROWS = 4_096
# One sample in so many is held back.
HELD_BACK = 4
# What is on the first axis of rows: none of the channels.
_ROWS = Product(())
# Less than this share of the targets' variance is rounding: there is nothing to fit.
_ROUNDING = 1e-9
# A fit that is better by a smaller share is better by rounding.
_LEAST_GAIN = 1e-6


@dataclass(frozen=True, slots=True)
class Refit:
    """What the refit did to one node.

    Attributes:
        node: Its name.
        error_before: Share of its result's variance that the fused weights miss on held-back samples, mean corrected.
        error_after: The same for the weights that it has now.
        ridge: The ridge that was chosen; 0 where the fused weights stayed.
    """

    node: str
    error_before: float
    error_after: float
    ridge: float


def refit_network(
    analysis: Analysis,
    state: WeightState,
    applied: Applied,
    samples: Samples,
    provider: Provider,
    seed: int,
    progress: Callable[[int, int], None],
    ends: Container[str] | None = None,
) -> list[Refit]:
    """Fit the linear nodes behind fused channels anew, in the order in which the network runs.

    Args:
        analysis: The original.
        state: The fused weights; changed.
        applied: The groups that were fused, with their maps.
        samples: Inputs.
        provider: Where to run.
        seed: Seed of the choice of rows.
        progress: Called with the number of nodes done, and of all.
        ends: The values that nodes to fit have to end in; None for any.

    Returns:
        What was done to each node.

    Raises:
        RuntimeFailedError: ONNX Runtime could not run a network.
    """
    refitting = _Refitting(SideBySide(analysis, state, applied, samples, provider), ends)
    nodes = refitting.nodes()
    results = []
    for done, linear in enumerate(nodes):
        progress(done, len(nodes))
        result = refitting.refit(linear, np.random.default_rng([seed, linear.node.index]))
        if result is not None:
            results.append(result)
    progress(len(nodes), len(nodes))
    return results


class _Refitting:
    """Both networks on their way, side by side."""

    def __init__(self, sides: SideBySide, ends: Container[str] | None = None) -> None:
        self.sides = sides
        self.ends = ends
        self.analysis, self.graph, self.state = sides.analysis, sides.graph, sides.state
        self.before = WeightState(sides.graph, sides.analysis.shapes, sides.analysis.channels)
        self.original, self.present = sides.original, sides.present
        self.waiting: set[str] = set()

    def nodes(self) -> list[LinearNode]:
        """Return the nodes to fit: those behind the first change; of those with groups, if rows are not too long.

        What one matrix does at several places is not fitted: it would become several.
        """
        found = [linear for linear in self.sides.nodes() if self._is_short(linear) or self._groups(linear) == 1]
        found = [linear for linear in found if not linear.is_shared(self.graph) and self._is_wanted(linear)]
        self.waiting = {linear.result for linear in found}
        return found

    def _is_wanted(self, linear: LinearNode) -> bool:
        return self.ends is None or ending_of(linear, self.graph, self.analysis.channels).value in self.ends

    def _row_length(self, linear: LinearNode) -> int:
        return linear.row_length(self.state.array(linear.weight))

    def _collection(self, linear: LinearNode, *, centred: bool) -> Regression:
        if not self._is_short(linear):
            return RegressionRows(centred)
        groups, outputs, inputs = linear.matrices(self.state.array(linear.weight)).shape
        return RegressionSums(groups, inputs, outputs, centred)

    def _is_short(self, linear: LinearNode) -> bool:
        return self._row_length(linear) <= _LONGEST_ROW

    def _groups(self, linear: LinearNode) -> int:
        return linear.groups(self.state.array(linear.weight))

    def refit(self, linear: LinearNode, rng: np.random.Generator) -> Refit | None:
        """Fit one node; None where there is nothing to fit."""
        self.waiting.discard(linear.result)
        ending = self._ending(linear)
        weight = self.state.array(linear.weight)
        scale, shift = self._affine(linear, ending)
        has_shift = self.state.output_shift(linear.node) is not None
        present = linear.matrices(weight)
        groups, outputs, inputs = present.shape
        factor = scale.reshape(groups, outputs)
        prior = present * factor[:, :, None]
        if not self._has_same_places(linear, ending, weight):
            return None
        fit, held = (self._collection(linear, centred=has_shift) for _ in range(2))
        for x, target, samples in self._rows(linear, ending, weight, rng):
            y = (target if has_shift else target - shift.astype(target.dtype)).reshape(len(target), groups, outputs)
            is_held = samples % HELD_BACK == HELD_BACK - 1
            fit.add(x[~is_held], y[~is_held])
            held.add(x[is_held], y[is_held])
        if not (fit.is_sound and held.is_sound):
            return None
        variance, before = held.variance(), held.missed(prior)
        whole = fit.merged(held)
        fitted, after, ridge = prior, before, 0.0
        if before > _ROUNDING * variance and (
            fit.count >= FEWEST_ROWS_PER_INPUT * inputs or not self._is_short(linear)
        ):
            best, at = fit.best_ridge(held, prior, _RIDGES)
            if best < (1.0 - _LEAST_GAIN) * before:
                fitted, after, ridge = whole.fit(prior, at), best, at
                self._replace_weight(linear, weight, fitted, factor)
        has_moved = has_shift and self._shift_mean(linear, whole, fitted, scale, shift)
        if not ridge and not has_moved:
            return None
        scale_of_error = variance if variance > 0 else 1.0
        return Refit(linear.node.name, before / scale_of_error, after / scale_of_error, ridge)

    def _ending(self, linear: LinearNode) -> Ending:
        """Return where the node's result ends; not behind an addition whose other side still waits to be fitted."""
        ending = ending_of(linear, self.graph, self.analysis.channels)
        if ending.other and any(
            name in self.waiting or name == linear.result
            for node in self.present.pending(ending.other)
            for name in node.outputs
        ):
            return ending.plain
        return ending

    def _has_same_places(self, linear: LinearNode, ending: Ending, weight: FloatArray) -> bool:
        """Whether the node is applied in as many places as in the original, in every run.

        How long a voice speaks, for one, depends on values, and so may have changed.
        """
        value = linear.node.inputs[0] if linear.is_clipped else ending.value
        now = [linear.place_count(x, weight) for x in self.present.values(linear.node.inputs[0])]
        before = self.original.values(value)
        if linear.is_clipped:
            return now == [linear.place_count(x, self.before.array(linear.weight)) for x in before]
        return now == [linear.places_of(y) for y in before]

    def _affine(self, linear: LinearNode, ending: Ending) -> tuple[FloatArray, FloatArray]:
        """Return what the node's products are scaled and shifted by on their way to where they end, shape (O,) each."""
        count = linear.matrices(self.state.array(linear.weight)).shape[:2]
        scale, shift = np.ones(int(np.prod(count))), np.zeros(int(np.prod(count)))
        bias = self.sides.bias(linear)
        if bias is not None:
            shift = shift + self.state.array(bias).ravel()
        for step in ending.steps:
            factor, offset = self.state.affine(step, len(scale))
            scale, shift = scale * factor, shift * factor + offset
        return scale, shift

    def _rows(
        self, linear: LinearNode, ending: Ending, weight: FloatArray, rng: np.random.Generator
    ) -> Iterator[tuple[AnyArray, AnyArray, IntArray]]:
        """Yield for every run some rows that the node reads, what they should end as, and the sample of each."""
        ends = self._original_rows(linear, ending)
        others = self.present.values(ending.other) if ending.other else None
        reads = self._numbers(self.present, linear.node.inputs[0])
        layouts = self.analysis.channels.layouts[Operand(ending.value)]
        axis = 1 if linear.is_convolution else len(layouts) - 1
        counts = [linear.place_count(x, weight) for x in reads]
        total = sum(samples * places for samples, places in counts)
        first = 0
        length = self._row_length(linear)
        wanted = max(_FEWEST_ROWS, _ROWS_PER_INPUT * length) if length <= _LONGEST_ROW else _MOST_LONG_ROWS
        for run, x in enumerate(reads):
            samples, places = counts[run]
            chosen = _random_places(samples, places, -(-wanted * samples * places // total), rng)
            target = self.sides.fused(ends(run, chosen), (_ROWS, layouts[axis]), ending.value, (-1, axis))
            if others is not None:
                target = target - linear.outputs(others[run], chosen)
            # Rows of one sample are alike: they are held back together, unless there are too few samples.
            numbers = first + chosen[:, 0] if sum(n for n, _ in counts) >= HELD_BACK else np.arange(len(chosen))
            first += samples
            yield linear.rows(x, weight, chosen), target, numbers

    def _original_rows(self, linear: LinearNode, ending: Ending) -> Callable[[int, IntArray], AnyArray]:
        """Return what gives the rows of a run in which the node's result ended in the original, at some places."""
        if not linear.is_clipped:
            ends = self.original.values(ending.value)
            return lambda run, places: linear.outputs(ends[run], places)
        # What is clipped in the end is an activation; the products before it are worked out.
        reads = self._numbers(self.original, linear.node.inputs[0])
        weight, bias = self.before.array(linear.weight), self.sides.bias(linear)
        matrices = linear.matrices(weight).astype(np.float32)
        shift = 0.0 if bias is None else self.before.array(bias).ravel().astype(np.float32)

        def products(run: int, places: IntArray) -> AnyArray:
            made = np.einsum("ngd,god->ngo", linear.rows(reads[run], weight, places), matrices, optimize=True)
            rows: AnyArray = made.reshape(len(places), -1) + shift
            return rows

        return products

    def _numbers(self, walk: Walk, value: str) -> Sequence[AnyArray]:
        """Return what the integers of a value stand for in one of the networks; floats as they are."""
        found = walk.values(value)
        told = self.analysis.channels.encodings.get(Operand(value))
        if told is None or found[0].dtype.kind == "f":
            return found
        scales, zeros = self._parameters(walk, told.scale, 1.0), self._parameters(walk, told.zero, 0.0)
        return [
            ((x.astype(np.float32) - zero) * scale).astype(np.float32)
            for x, scale, zero in zip(found, scales, zeros, strict=True)
        ]

    def _parameters(self, walk: Walk, operand: Operand | None, default: float) -> Sequence[float]:
        """Return a scale or zero point for a whole value, in every run."""
        if operand is None:
            return [default] * walk.runs
        if operand.name in self.graph.constants:
            return [float(self.graph.array(operand.name).reshape(-1)[0])] * walk.runs
        return [float(x.reshape(-1)[0]) for x in walk.values(operand.name)]

    def _shift_mean(
        self, linear: LinearNode, sums: Regression, fitted: FloatArray, scale: FloatArray, shift: FloatArray
    ) -> bool:
        """Let the outputs have the mean that they should have; return whether that changed anything."""
        mean_x, mean_y = sums.means
        gap = (mean_y - (fitted @ mean_x[:, :, None])[:, :, 0]).ravel() - shift
        if np.abs(gap).max() <= _ROUNDING * (np.abs(mean_y).max() + np.sqrt(sums.variance())):
            return False
        operand = self.state.output_shift(linear.node)
        self.state.shift_outputs(linear.node, np.divide(gap, scale, out=np.zeros_like(gap), where=scale != 0))
        if operand is not None:
            self.sides.tell(linear, operand)
        return True

    def _replace_weight(self, linear: LinearNode, weight: FloatArray, fitted: FloatArray, factor: FloatArray) -> None:
        """Put a fitted weight into the state; outputs that are multiplied by zero behind the node stay as they are."""
        safe = np.where(factor != 0, factor, 1.0)[:, :, None]
        matrices = np.where(factor[:, :, None] != 0, fitted / safe, linear.matrices(weight))
        self.state.replace(linear.weight, linear.weight_like(matrices, weight))
        self.sides.tell(linear, linear.weight)


def _random_places(samples: int, places: int, count: int, rng: np.random.Generator) -> IntArray:
    """Return places, shape (n, 2): all of them, or some at random."""
    total = samples * places
    chosen = rng.choice(total, count, replace=False) if total > count else np.arange(total)
    return np.stack(np.divmod(chosen, places), axis=1).astype(np.int64)
