"""Calibrated refit: fit every reader of fused channels anew, front to back, on samples.

After the channels were fused, each layer that reads them gets the weights with which it best reproduces, from the
compressed network's own activations, what it computed from the original's (asymmetric reconstruction: errors made
further up are made good as far as linear algebra can). Only unlabelled samples are needed. Half of them is held back:
they choose the ridge, and keep the fused weights where a fit does not improve them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnxfuse.analysis import Analysis
from onnxfuse.arrays import FloatArray, IntArray
from onnxfuse.config import Provider
from onnxfuse.coupling.groups import CouplingGroup
from onnxfuse.coupling.layout import leaves
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.fusion.rewrite import collect_edits
from onnxfuse.fusion.weights import WeightState
from onnxfuse.graph.edits import apply_edits
from onnxfuse.graph.view import DEFAULT_DOMAIN, NodeView, Operand
from onnxfuse.proof.runtime import Session
from onnxfuse.proof.samples import Samples
from onnxfuse.statistics.features import Role
from onnxfuse.statistics.grams import PairedSums, fit_reader, reading_error
from onnxfuse.statistics.patches import convolution_pads, patch_rows, place_count

__all__ = ["Refit", "refit_readers"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Applied: TypeAlias = Sequence[tuple[CouplingGroup, ChannelMap]]

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Rows to fit on: more change little once they are several times the length of a row.
_ROWS = 20_000
# Longer rows would need more than about 150 MB for each sum of products.
_LONGEST_ROW = 4_608


@dataclass(frozen=True, slots=True)
class Refit:
    """What the refit did to one node.

    Attributes:
        node: Its name.
        error_before: Share of its outputs' variance that the fused weights miss on held-back samples, mean corrected.
        error_after: The same for the weights that it has now.
        ridge: The ridge that was chosen; 0 where the fused weights stayed.
    """

    node: str
    error_before: float
    error_after: float
    ridge: float


@dataclass(frozen=True)
class _Reader:
    """A linear node whose weight can be seen as a matrix (outputs, row)."""

    node: NodeView
    weight: Operand

    def matrix(self, value: FloatArray) -> FloatArray:
        """Return the weight as a matrix, shape (O, D)."""
        if self.node.op == "Conv":
            return value.reshape(len(value), -1)
        return value if self._is_transposed else value.T

    def weight_like(self, matrix: FloatArray, value: FloatArray) -> FloatArray:
        """Turn a matrix back into the weight's own shape."""
        if self.node.op == "Conv":
            return matrix.reshape(value.shape)
        return matrix if self._is_transposed else np.ascontiguousarray(matrix.T)

    @property
    def _is_transposed(self) -> bool:
        return self.node.op == "Gemm" and bool(self.node.attributes.get("transB", 0))


def refit_readers(
    analysis: Analysis,
    state: WeightState,
    applied: Applied,
    samples: Samples,
    provider: Provider,
    seed: int,
    progress: Callable[[int, int], None],
) -> list[Refit]:
    """Fit the readers of fused channels anew, in the order in which the network runs; ``state`` is changed.

    Args:
        analysis: The original.
        state: The fused weights.
        applied: The groups that were fused, with their maps.
        samples: Inputs.
        provider: Where to run.
        seed: Seed of the choice of rows.
        progress: Called with the number of readers done, and of all.

    Returns:
        What was done to each reader.

    Raises:
        RuntimeFailedError: ONNX Runtime could not run a network.
    """
    target = WeightState(analysis.graph, analysis.shapes, analysis.channels)
    for group, channel_map in applied:
        target.fuse(group, channel_map, readers=False)
    readers = list(_readers(analysis, state, applied))
    results = []
    for done, reader in enumerate(readers):
        progress(done, len(readers))
        rng = np.random.default_rng([seed, reader.node.index])
        fit, held = _paired_sums(analysis, state, reader, samples, provider, rng)
        if fit.count and held.count:
            results.append(_refit(state, reader, reader.matrix(target.array(reader.weight)), fit, held))
    progress(len(readers), len(readers))
    return results


def _readers(analysis: Analysis, state: WeightState, applied: Applied) -> Iterator[_Reader]:
    """Yield the nodes whose plain, ungrouped weight reads channels that were fused."""
    fused = {group.atom for group, _ in applied}
    consuming = {p.operand: p.axis for group, _ in applied for p in group.parameters if p.role is Role.CONSUMER}
    for node in analysis.graph.nodes:
        weight = next((o for o in consuming if o.node == node.index and o.slot == 1), None)
        if weight is None or node.domain != DEFAULT_DOMAIN or state.output_shift(node) is None:
            continue
        layout = analysis.channels.layouts[weight][consuming[weight]]
        plain = {
            "Conv": int(node.attributes.get("group", 1)) == 1,
            "Gemm": not node.attributes.get("transA", 0)
            and node.attributes.get("alpha", 1.0) == 1.0
            and node.attributes.get("beta", 1.0) == 1.0,
            "MatMul": state.array(weight).ndim == 2,
        }
        rows = int(np.prod(analysis.shapes.dims[weight.name])) // max(analysis.shapes.dims[weight.name][0], 1)
        if plain.get(node.op, False) and fused & set(leaves(layout)) and rows <= _LONGEST_ROW:
            yield _Reader(node, weight)


def _refit(state: WeightState, reader: _Reader, target: FloatArray, fit: PairedSums, held: PairedSums) -> Refit:
    present = state.array(reader.weight)
    prior = reader.matrix(present)
    before = reading_error(target, prior, held)
    trials = [(reading_error(target, fit_reader(target, prior, fit, ridge), held), ridge) for ridge in _RIDGES]
    error, ridge = min(trials)
    fit.merge(held)
    matrix = prior
    if error < before:
        matrix = fit_reader(target, prior, fit, ridge)
        state.replace(reader.weight, reader.weight_like(matrix, present))
    mean_before, mean_after = fit.means
    state.shift_outputs(reader.node, target @ mean_before - matrix @ mean_after)
    return Refit(reader.node.name, before, min(error, before), ridge if error < before else 0.0)


def _paired_sums(
    analysis: Analysis,
    state: WeightState,
    reader: _Reader,
    samples: Samples,
    provider: Provider,
    rng: np.random.Generator,
) -> tuple[PairedSums, PairedSums]:
    """Run both networks up to a reader and sum over the rows that it reads; every other row is held back."""
    value = reader.node.inputs[0]
    original = Session(_ending_at(analysis.source.model, value), provider, name="the original model")
    edits = collect_edits(analysis.graph, analysis.shapes, analysis.channels, state)
    present = apply_edits(analysis.graph, edits, {})
    compressed = Session(_ending_at(present, value), provider, name="the compressed model")
    fit = held = PairedSums(0, 0)
    for feeds in samples.feeds():
        x, z = original.run(feeds)[value], compressed.run(feeds)[value]
        count = max(2, _ROWS * len(x) // max(samples.count, 1))
        p, q = _rows(reader, x, z, state, count, rng)
        if not fit.before:
            fit, held = PairedSums(p.shape[1], q.shape[1]), PairedSums(p.shape[1], q.shape[1])
        fit.add(p[::2], q[::2])
        held.add(p[1::2], q[1::2])
    return fit, held


def _rows(
    reader: _Reader, x: AnyArray, z: AnyArray, state: WeightState, count: int, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Return rows that the reader reads before and after, at the same random places."""
    if reader.node.op != "Conv":
        p, q = x.reshape(-1, x.shape[-1]), z.reshape(-1, z.shape[-1])
        chosen = rng.permutation(len(p))[:count]
        return p[chosen].astype(np.float64), q[chosen].astype(np.float64)
    attributes = reader.node.attributes
    kernel = list(state.array(reader.weight).shape[2:])
    strides = list(attributes.get("strides", [1] * len(kernel)))
    dilations = list(attributes.get("dilations", [1] * len(kernel)))
    window = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    auto_pad = attributes.get("auto_pad", b"NOTSET").decode()
    pads = convolution_pads(auto_pad, x.shape[2:], window, strides, attributes.get("pads", []))
    x, z = (np.pad(value, ((0, 0), (0, 0), *pads)) for value in (x, z))
    places = _random_places(len(x), place_count(x, kernel, strides, dilations), count, rng)
    return patch_rows(x, kernel, strides, dilations, places), patch_rows(z, kernel, strides, dilations, places)


def _random_places(samples: int, places: int, count: int, rng: np.random.Generator) -> IntArray:
    chosen = rng.permutation(samples * places)[:count] if samples * places > count else np.arange(samples * places)
    return np.stack(np.divmod(chosen, places), axis=1).astype(np.int64)


def _ending_at(model: onnx.ModelProto, value: str) -> onnx.ModelProto:
    """Return a model with one value as its only output; ONNX Runtime leaves out what is not needed for it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.append(onnx.ValueInfoProto(name=value))
    return copy
