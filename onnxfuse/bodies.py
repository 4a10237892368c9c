"""The bodies of If, Loop and Scan go the same road as the model around them, each as a model of its own.

A body is cut out, gets the inputs that it has when the model around it runs, is compressed and proven by itself, and is
put back. Bodies inside bodies follow by recursion. What can't be cut out or run by itself is left as it is, and the
report says why.
"""

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto

from onnxfuse.analysis import Analysis
from onnxfuse.config import CompressionConfig
from onnxfuse.errors import OnnxFuseError, UnsupportedGraphError
from onnxfuse.graph.bodies import Body, cut_body, drop_unread, splice_body, subgraphs
from onnxfuse.graph.shapes import Shapes, shapes_at_other_sizes
from onnxfuse.proof.bodies import body_arrays, values_around, with_output_types
from onnxfuse.proof.samples import Samples, candidate_dims, synthetic_samples
from onnxfuse.refit import Refit
from onnxfuse.report import CompressionReport, GroupReport, InspectReport

__all__ = ["BodyResult", "compress_bodies", "inspect_bodies", "with_bodies"]

Arrays: TypeAlias = Mapping[str, np.ndarray[Any, np.dtype[Any]]]
Inspect: TypeAlias = Callable[[onnx.ModelProto, Arrays, CompressionConfig], InspectReport]
Compress: TypeAlias = Callable[[onnx.ModelProto, Arrays, CompressionConfig], tuple[onnx.ModelProto, CompressionReport]]


@dataclass(frozen=True)
class BodyResult:
    """What became of one body.

    Attributes:
        body: The body as it was.
        model: What it has become; None if it was left as it is.
        groups: Its coupling groups, and those of the bodies inside it, named after node and branch.
        refits: What a refit did inside it.
        compressible: How many of its parameters follow the channels of a group that is not frozen.
        notes: What else a reader should know.
    """

    body: Body
    model: onnx.ModelProto | None
    groups: tuple[GroupReport, ...]
    refits: tuple[Refit, ...] = ()
    compressible: float = 0.0
    notes: tuple[str, ...] = ()


def inspect_bodies(
    analysis: Analysis, samples: Samples, config: CompressionConfig, inspect: Inspect
) -> tuple[list[BodyResult], list[str]]:
    """Find the coupling groups in the bodies of a model.

    Args:
        analysis: The model around them.
        samples: Inputs that it runs with.
        config: The options.
        inspect: Inspects a model on given inputs.

    Returns:
        What was found, body by body, and why others were left out.
    """
    results: list[BodyResult] = []
    notes: list[str] = []
    for body, arrays in _cut_bodies(analysis, samples, config, notes):
        found = inspect(body.model, arrays, config)
        if found.groups:
            results.append(_inspected(body, found))
    return results, notes


def compress_bodies(
    analysis: Analysis, samples: Samples, config: CompressionConfig, inspect: Inspect, compress: Compress
) -> tuple[list[BodyResult], list[str]]:
    """Compress the bodies of a model, each by itself.

    Args:
        analysis: The model around them.
        samples: Inputs that it runs with.
        config: The options; patterns for names of groups go by the full names, with node and branch.
        inspect: Inspects a model on given inputs.
        compress: Compresses a model on given inputs.

    Returns:
        What became of each body, and why others were left out.
    """
    results: list[BodyResult] = []
    notes: list[str] = []
    for body, arrays in _cut_bodies(analysis, samples, config, notes):
        found = _inspected(body, inspect(body.model, arrays, replace(config, prove=False)))
        if not found.groups:
            continue
        own, reason = _own_config(body, found.groups, config)
        if own is None:
            results.append(_left(found, reason))
            continue
        try:
            model, report = compress(body.model, arrays, own)
        except UnsupportedGraphError:
            results.append(found)
            continue
        except OnnxFuseError as error:
            results.append(_left(found, f"{body.name} was left as it is: {error.what}"))
            continue
        groups = _prefixed(body, report.groups)
        changed = any(group.channels_after < group.channels_before for group in groups)
        refits = tuple(replace(refit, node=f"{body.name}/{refit.node}") for refit in report.refits)
        said = tuple(f"in {body.name}: {note}" for note in report.notes)
        results.append(BodyResult(body, model if changed else None, groups, refits, found.compressible, said))
    return results, notes


def with_bodies(model: onnx.ModelProto, results: Sequence[BodyResult]) -> onnx.ModelProto:
    """Return a model with what became of its bodies in their places; the same object where none has changed."""
    changed = [(result.body, result.model) for result in results if result.model is not None]
    if not changed:
        return model
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for body, new in changed:
        splice_body(whole, body, new)
    drop_unread(whole, frozenset().union(*(body.constants for body, _ in changed)))
    return whole


def _cut_bodies(
    analysis: Analysis, samples: Samples, config: CompressionConfig, notes: list[str]
) -> Iterator[tuple[Body, Arrays]]:
    """Yield every body of the graph with inputs that it runs with; note why others are left out."""
    nodes = [(node, name) for node in analysis.graph.nodes for name, _ in subgraphs(node)]
    nodes = [(node, name) for node, name in nodes if _has_weights(analysis.shapes, node.index, name)]
    others = shapes_at_other_sizes(analysis.graph, analysis.input_dims) if nodes else []
    bodies = []
    for node, attribute in nodes:
        try:
            bodies.append(cut_body(analysis.graph, node, attribute, analysis.shapes, others))
        except OnnxFuseError as error:
            notes.append(f"{node.name}/{attribute} was left as it is: {error.what}")
    for body in bodies:
        problem = ""
        for chosen in _choices(analysis, samples, config):
            try:
                around = values_around(
                    analysis.source.model, [body], _constants(analysis, body), chosen, config.provider
                )
                arrays = body_arrays(body, around, config.provider)
                yield with_output_types(body, arrays, config.provider), arrays
                break
            except OnnxFuseError as error:
                problem = problem or error.what
        else:
            notes.append(f"{body.name} was left as it is: {problem}")


def _has_weights(shapes: Shapes, node: int, attribute: str) -> bool:
    """Whether a body, or one inside it, reads a matrix that is stored; True where that is not known."""
    body = shapes.bodies.get((node, attribute))
    if body is None:
        return True
    matrices = (t for t in body.graph.constants.values() if len(t.dims) > 1 and t.data_type != TensorProto.INT64)
    inner = [(n.index, name) for n in body.graph.nodes for name, _ in subgraphs(n)]
    return any(True for _ in matrices) or any(_has_weights(body.shapes, *place) for place in inner)


def _choices(analysis: Analysis, samples: Samples, config: CompressionConfig) -> Iterator[Samples]:
    """Yield the inputs at hand in small batches, and, as a branch may need others, other synthetic ones."""
    small = samples.batch > analysis.batch and samples.batched == set(samples.arrays)
    yield replace(samples, batch=analysis.batch, dims=analysis.input_dims) if small else samples
    for dims in candidate_dims(analysis.graph):
        yield synthetic_samples(analysis.graph, dims, config.seed, analysis.batch)


def _constants(analysis: Analysis, body: Body) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """Return what the node of a body reads that is stored in the model."""
    graph = analysis.graph
    return {name: graph.array(name) for name in body.node.inputs if name in graph.constants}


def _inspected(body: Body, found: InspectReport) -> BodyResult:
    compressible = found.compressible_share * found.cost.parameters
    notes = tuple(f"in {body.name}: {note}" for note in found.notes)
    return BodyResult(body, None, _prefixed(body, found.groups), (), compressible, notes)


def _left(found: BodyResult, reason: str) -> BodyResult:
    groups = tuple(replace(group, frozen=group.frozen or reason) for group in found.groups)
    return replace(found, groups=groups)


def _prefixed(body: Body, groups: Sequence[GroupReport]) -> tuple[GroupReport, ...]:
    return tuple(
        replace(group, name=f"{body.name}/{group.name}", nodes=tuple(f"{body.name}/{node}" for node in group.nodes))
        for group in groups
    )


def _own_config(
    body: Body, groups: Sequence[GroupReport], config: CompressionConfig
) -> tuple[CompressionConfig | None, str]:
    """Return the options for a body, its groups named as it knows them; None and the reason if it is to be left."""
    start = len(body.name) + 1
    chosen = {
        patterns: tuple(glob.escape(group.name[start:]) for group in groups if _fits(group.name, patterns))
        for patterns in (config.only, config.skip)
    }
    if config.only and not chosen[config.only]:
        return None, "it fits no pattern of --only"
    return replace(config, only=chosen[config.only], skip=chosen[config.skip]), ""


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)
