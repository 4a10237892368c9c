"""Weights that the graph computes from stored ones alone, as weight standardisation does: they can be stored instead.

What such a computation makes of a smaller weight need not be part of what it makes of the whole, so its channels would
have to stay; once the result is stored there is nothing left to compute. Runtimes do the same as they load a file. A
weight that is merely rearranged or decoded is left alone, since it is followed to where it is stored, and so is what
would make the file larger.
"""

import logging
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import GraphProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxfuse.errors import ModelError
from onnxfuse.graph.view import GraphView, NodeView

__all__ = ["with_standing_weights_stored"]

_Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

logger = logging.getLogger(__name__)

# Smaller values are known to the analysis as what they are, however they are made.
_SMALL = 4096
_ARITHMETIC = frozenset(
    {
        "Abs",
        "Add",
        "BatchNormalization",
        "Clip",
        "Div",
        "Exp",
        "InstanceNormalization",
        "LayerNormalization",
        "Log",
        "LpNormalization",
        "MatMul",
        "Max",
        "Min",
        "Mul",
        "Neg",
        "Pow",
        "Reciprocal",
        "ReduceL1",
        "ReduceL2",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceSum",
        "ReduceSumSquare",
        "Sigmoid",
        "Softplus",
        "Sqrt",
        "Sub",
        "Tanh",
    }
)
# Followed to where the weight is stored; here they only stand between one computation and another.
_PASSING = frozenset(
    {"Cast", "Concat", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
)
_FLOATS = tuple(map(np.dtype, (np.float16, np.float32, np.float64)))
# Before this version of the file format every initializer had to be an input too.
_WITH_OWN_INITIALIZERS = 4
# ONNX's evaluator takes every normalisation of an earlier version for one in training.
_WITH_TRAINING_MODE = 14


@dataclass
class _Standing:
    """What a graph computes from stored values alone.

    Attributes:
        nodes: The nodes that do.
        keys: A number for each of their results, the same for those that are computed alike.
        sources: The stored values behind each of their results.
    """

    nodes: set[int] = field(default_factory=set)
    keys: dict[str, int] = field(default_factory=dict)
    sources: dict[str, frozenset[str]] = field(default_factory=dict)


def with_standing_weights_stored(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model in which large weights that are computed from stored ones are stored themselves.

    Args:
        model: Any model; it is not changed.

    Returns:
        The model itself if there is nothing to do.
    """
    if model.ir_version < _WITH_OWN_INITIALIZERS:
        return model
    try:
        graph = GraphView(model)
    except ModelError as error:
        # Who reads the model next says so.
        logger.debug("no weights are looked for in a damaged graph: %s", error.what)
        return model
    standing = _standing(graph)
    # Nothing large is made of what is small without taking more room.
    ends = [name for name in _ends(graph, standing) if _elements(graph, standing.sources[name]) > _SMALL]
    values = _computed(graph, standing, ends) if ends else {}
    stored = {name: values[name] for name in _that_save(graph, standing, ends, values)}
    if not stored:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _store(copy.graph, stored, standing.keys)
    _drop_unread(copy.graph, graph, standing, stored)
    return copy


def _standing(graph: GraphView) -> _Standing:
    """Find what is computed from stored values alone, by operators that are known here."""
    replaceable = {value.name for value in graph.model.graph.input}
    found = _Standing()
    numbers: dict[tuple[Any, ...], int] = {}
    for node in graph.nodes:
        reads = [name for name in node.inputs if name]
        known = all(name in found.keys or (name in graph.constants and name not in replaceable) for name in reads)
        if not reads or not known or node.captured or not _is_known(node):
            continue
        found.nodes.add(node.index)
        attributes = sorted(a.SerializeToString(deterministic=True) for a in node.proto.attribute)
        sources: frozenset[str] = frozenset().union(*(found.sources.get(name, frozenset({name})) for name in reads))
        for slot, name in enumerate(node.outputs):
            key = (slot, node.op, *attributes, *(found.keys.get(read, read) for read in node.inputs))
            found.keys[name] = numbers.setdefault(key, len(numbers))
            found.sources[name] = sources
    found.keys.pop("", None)
    return found


def _is_known(node: NodeView) -> bool:
    """Whether ONNX's evaluator computes an operator as runtimes do."""
    if node.op == "BatchNormalization" and node.version < _WITH_TRAINING_MODE:
        return False
    return not node.domain and node.op in _ARITHMETIC | _PASSING


def _ends(graph: GraphView, standing: _Standing) -> Iterator[str]:
    """Yield the results of arithmetic that what is not standing reads, at once or rearranged."""
    passed_on: set[int] = set()
    for node in reversed(graph.nodes):
        for name in node.outputs:
            readers = graph.readers.get(name, [])
            if name not in standing.keys or name in graph.outputs:
                continue
            if any(reader.node not in standing.nodes or reader.node in passed_on for reader in readers):
                if node.op in _ARITHMETIC:
                    yield name
                else:
                    passed_on.add(node.index)


def _elements(graph: GraphView, names: Iterable[str]) -> int:
    return sum(math.prod(graph.constants[name].dims) for name in names)


def _computed(graph: GraphView, standing: _Standing, ends: Sequence[str]) -> dict[str, _Array]:
    """Compute values in ONNX's evaluator; none if it can't."""
    wanted = set(ends)
    nodes: list[NodeView] = []
    for node in reversed(graph.nodes):
        if node.index in standing.nodes and wanted.intersection(node.outputs):
            nodes.append(node)
            wanted.update(node.inputs)
    feeds = {name: graph.array(name) for name in wanted if name in graph.constants}
    inputs, outputs = ([onnx.ValueInfoProto(name=name) for name in side] for side in (feeds, ends))
    body = helper.make_graph([node.proto for node in reversed(nodes)], "standing", inputs, outputs)
    try:
        results = ReferenceEvaluator(body, opsets=dict(graph.opsets)).run(list(ends), feeds)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        logger.debug("weights stay computed: %s", error)
        return {}
    return dict(zip(ends, map(np.asarray, results), strict=True))


def _that_save(
    graph: GraphView, standing: _Standing, ends: Sequence[str], values: Mapping[str, _Array]
) -> Iterator[str]:
    """Yield the large results that take no more room than the stored values that then can go."""
    kept = {name for name, readers in graph.readers.items() if any(r.node not in standing.nodes for r in readers)}
    kept.update(graph.outputs)
    alike: set[int] = set()
    for name in ends:
        value = values.get(name)
        if value is None or value.size <= _SMALL or value.dtype not in _FLOATS or not np.isfinite(value).all():
            continue
        if standing.keys[name] not in alike:
            going = standing.sources[name] - kept
            if value.nbytes > sum(graph.array(source).nbytes for source in going):
                continue
            kept |= going
            alike.add(standing.keys[name])
        yield name


def _store(graph: GraphProto, values: Mapping[str, _Array], keys: Mapping[str, int]) -> None:
    """Put values among the weights, those that are the same once."""
    first: dict[int, str] = {}
    for name, value in values.items():
        if first.setdefault(keys[name], name) == name:
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    for node in graph.node:
        node.input[:] = [first[keys[name]] if name in values else name for name in node.input]
        node.output[:] = ["" if name in values else name for name in node.output]


def _drop_unread(graph: GraphProto, before: GraphView, standing: _Standing, stored: Container[str]) -> None:
    """Take out what served to compute what is stored now."""
    gone: set[int] = set()

    def is_unread(name: str) -> bool:
        readers = before.readers.get(name, [])
        return name in stored or (name not in before.outputs and all(reader.node in gone for reader in readers))

    for node in reversed(before.nodes):
        if node.index in standing.nodes and all(is_unread(name) for name in node.outputs if name):
            gone.add(node.index)
    read = {name for index in gone for name in before.nodes[index].inputs}
    unread = {name for name in read if name in before.constants and is_unread(name)}
    positions = {before.nodes[index].position for index in gone}
    positions |= {before.constant_nodes[name] for name in unread if name in before.constant_nodes}
    nodes = [node for position, node in enumerate(graph.node) if position not in positions]
    tensors = [tensor for tensor in graph.initializer if tensor.name not in unread]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)
