"""Shapes and small constant values of every tensor, at one concrete choice of the input shapes.

The coupling analysis reasons about sizes, so symbolic dimensions are given concrete sizes first. Operators infer their
output shapes by ONNX's own inference functions, node by node; tensors that depend on constants and shapes alone (the
targets of Reshape, the paddings that exporters compute) are evaluated with ONNX's reference implementation.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from onnx import TensorProto, TypeProto, ValueInfoProto, checker, defs, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from onnxfuse.errors import OnnxFuseError
from onnxfuse.graph.bodies import cut_body, subgraphs, trip_count
from onnxfuse.graph.contributed import contributed_dims, without_activation
from onnxfuse.graph.symbols import is_expression, value_of
from onnxfuse.graph.view import DEFAULT_DOMAIN, GraphView, NodeView

__all__ = ["BodyShapes", "Shapes", "dims_at_other_sizes", "infer_dims", "infer_shapes", "shapes_at_other_sizes"]

# Which elements of an array.
_Which: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
# The size that an open dimension has instead, for its axis and its size.
_Change: TypeAlias = Callable[[int, int], int]

logger = logging.getLogger(__name__)

_SMALL = 4096
# What the reference implementation raises for an operator, version or data type that it does not know.
_EVALUATION_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# What inference raises for an operator that it does not know, and for nodes that are not as its schema says.
_INFERENCE_ERRORS = (
    checker.ValidationError,
    defs.SchemaError,
    shape_inference.InferenceError,
    RuntimeError,
    ValueError,
)
# Operators by which exporters put weights together from pieces (the gates of a recurrent layer); constants larger than
# small are followed through them too.
_ASSEMBLING = frozenset({"Concat", "Gather", "Slice", "Split"})
_READING_MATRICES = frozenset({"Gemm", "MatMul", "Transpose"})
_REARRANGING = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
# By what open sizes are multiplied and divided to see what depends on them; the last makes 1 of most.
_LARGER, _SMALLER = (2, 3), (2, 2**20)
# What is added to them where the network does not go up to a multiple.
_LONGER = (1, 2)
_NOT_STATIC = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial"})


@dataclass(frozen=True)
class Shapes:
    """What is known of every value.

    Attributes:
        dims: Shape by value name; values of unknown shape (and sequences, maps) are missing.
        types: `onnx.TensorProto` element type by value name.
        static: Values that depend on constants and input shapes only, where they are small (at most 4096 elements) or
            put together from constants.
        fixed: Those of `static` that are the same for every input shape.
        moving: For the others of `static`, which of their elements are not known to be the same for every input shape.
        read_from: For a value of `fixed` that the graph computes from shapes: the computed values whose shapes it
            reads. It stays what it is only as long as these keep theirs.
        bodies: What is known inside the bodies of If, Loop and Scan, by node index and attribute.
    """

    dims: Mapping[str, tuple[int, ...]]
    types: Mapping[str, int]
    static: Mapping[str, np.ndarray[Any, np.dtype[Any]]]
    fixed: frozenset[str]
    moving: Mapping[str, np.ndarray[Any, np.dtype[np.bool_]]]
    read_from: Mapping[str, frozenset[str]]
    bodies: Mapping[tuple[int, str], "BodyShapes"] = field(default_factory=dict)


@dataclass(frozen=True)
class BodyShapes:
    """A body as a graph of its own, with what is known inside it.

    Attributes:
        graph: The body.
        shapes: What is known inside it.
        outside: The constants that it reads from around it.
    """

    graph: GraphView
    shapes: Shapes
    outside: frozenset[str]


def infer_shapes(
    graph: GraphView,
    input_dims: Mapping[str, Sequence[int]],
    observed: Mapping[str, Sequence[int]] | None = None,
) -> Shapes:
    """Infer shapes and static values throughout the graph.

    Args:
        graph: The graph.
        input_dims: A concrete shape for every graph input.
        observed: Shapes seen at run time for values that inference can't tell, by name.

    Returns:
        Everything that could be inferred; what could not is left out, never guessed.
    """
    inference = _Inference(graph, input_dims, observed or {})
    inference.run(graph)
    inference.settle(_unmoved(graph, inference, input_dims))
    return inference.result()


def shapes_at_other_sizes(
    graph: GraphView, input_dims: Mapping[str, Sequence[int]]
) -> list[Mapping[str, tuple[int, ...]]]:
    """Return the shapes of all values at two other choices of the dimensions that the file leaves open."""
    return [infer_dims(graph, _other_dims(graph, input_dims, _grown(factor))) for factor in _LARGER]


def infer_dims(graph: GraphView, input_dims: Mapping[str, Sequence[int]]) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of all values that inference can tell, by name; what depends on numbers is not among them."""
    inference = _Inference(graph, input_dims, {})
    inference.run(graph)
    return inference.dims


def dims_at_other_sizes(graph: GraphView, input_dims: Mapping[str, Sequence[int]]) -> list[dict[str, tuple[int, ...]]]:
    """Return input shapes with the open dimensions behind the first half as large, and twice; none where none is open.

    Example:
        >>> import onnx
        >>> text = '<ir_version: 8, opset_import: ["" : 17]> a (float[n, t, 6] x) => (float[n, t, 6] y) { y = Relu(x) }'
        >>> dims_at_other_sizes(GraphView(onnx.parser.parse_model(text)), {"x": (2, 8, 6)})
        [{'x': (2, 4, 6)}, {'x': (2, 16, 6)}]
    """
    known = {name: tuple(int(size) for size in dims) for name, dims in input_dims.items()}
    found: list[dict[str, tuple[int, ...]]] = []
    for change in (_shrunk(2), _grown(2)):
        other = _other_dims(graph, known, partial(_behind_the_first, change))
        if other != known and other not in found:
            found.append(other)
    return found


def _behind_the_first(change: _Change, axis: int, size: int) -> int:
    return change(axis, size) if axis else size


def _unmoved(graph: GraphView, inference: "_Inference", input_dims: Mapping[str, Sequence[int]]) -> dict[str, _Which]:
    """Return which elements of static values are computed from shapes and yet the same at other open dimensions."""
    same = {name: np.ones(value.shape, bool) for name, value in inference.static.items() if name not in inference.fixed}
    left = set(same)
    # At how many larger sizes each was found the same. A table of positions may be too short for a multiple.
    seen = dict.fromkeys(same, 0)
    for change in (*map(_grown, _LARGER), *map(_longer, _LONGER)):
        if all(seen[name] >= len(_LARGER) for name in left):
            break
        other = _Inference(graph, _other_dims(graph, input_dims, change), {})
        other.run(graph)
        for name in left & other.static.keys():
            if _are_some_the_same(same[name], inference.static[name], other.static[name]):
                seen[name] += 1
            else:
                left.remove(name)
    left = {name for name in left if seen[name] >= len(_LARGER)}
    # A table that is cut to the length, or a bound on it, moves at smaller sizes only; what these do not reach, as a
    # network of many poolings, says nothing.
    for divisor in _SMALLER:
        if not left:
            break
        other = _Inference(graph, _other_dims(graph, input_dims, _shrunk(divisor)), {})
        other.run(graph)
        left = {
            name
            for name in left
            if name not in other.static or _are_some_the_same(same[name], inference.static[name], other.static[name])
        }
    return {name: same[name] for name in left}


def _grown(factor: int) -> _Change:
    """Return what makes sizes larger: a batch by a little, others by a factor, which pooling can deal with."""
    return lambda axis, size: size + factor - 1 if axis == 0 else size * factor


def _longer(more: int) -> _Change:
    """Return what makes sizes a little larger."""
    return lambda _, size: size + more


def _shrunk(divisor: int) -> _Change:
    """Return what makes sizes smaller, 1 at least."""
    return lambda _, size: max(1, size // divisor)


def _other_dims(
    graph: GraphView, input_dims: Mapping[str, Sequence[int]], change: _Change
) -> dict[str, tuple[int, ...]]:
    """Return input shapes with every dimension that the file leaves open changed, those of one symbol alike."""
    symbols: dict[str, int] = {}
    changed: dict[str, list[int]] = {}
    computed = []
    for name, dims in input_dims.items():
        stated = graph.inputs[name].type.tensor_type.shape.dim
        changed[name] = []
        for i, (size, dim) in enumerate(zip(dims, stated, strict=True)):
            if dim.HasField("dim_value") and dim.dim_value > 0:
                changed[name].append(int(size))
                continue
            other = change(i, int(size))
            changed[name].append(symbols.setdefault(dim.dim_param, other) if dim.dim_param else other)
            if is_expression(dim.dim_param):
                computed.append((name, i, dim.dim_param))
    for name, i, symbol in computed:
        changed[name][i] = value_of(symbol, symbols) or changed[name][i]
    return {name: tuple(sizes) for name, sizes in changed.items()}


def _are_some_the_same(
    same: _Which, a: np.ndarray[Any, np.dtype[Any]], b: np.ndarray[Any, np.dtype[Any]] | None
) -> bool:
    """Strike out of ``same`` where two arrays differ; return whether anything is left, which of other shapes is not."""
    if b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    same &= (a == b) | ((a != a) & (b != b))
    return bool(same.any()) or not same.size


class _Inference:
    """The forward pass of `infer_shapes`: one visit per node, in topological order."""

    def __init__(
        self, graph: GraphView, input_dims: Mapping[str, Sequence[int]], observed: Mapping[str, Sequence[int]]
    ) -> None:
        self.observed = observed
        self.opsets = [helper.make_operatorsetid(d, v) for d, v in graph.opsets.items()]
        self.versions = dict(graph.opsets)
        self.ir_version = graph.model.ir_version
        self.dims: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, int] = {}
        self.static: dict[str, np.ndarray[Any, np.dtype[Any]]] = {}
        self.fixed: set[str] = set()
        self.moving: dict[str, _Which] = {}
        self.read_from: dict[str, set[str]] = {}
        self.bodies: dict[tuple[int, str], BodyShapes] = {}
        self.graph = graph
        for name, tensor in graph.constants.items():
            self.dims[name] = tuple(tensor.dims)
            self.types[name] = tensor.data_type
            if math.prod(tensor.dims) <= _SMALL and tensor.data_type != TensorProto.STRING:
                self.static[name] = graph.array(name)
                self.fixed.add(name)
        for name, info in graph.inputs.items():
            if info.type.HasField("tensor_type"):
                self.dims[name] = tuple(int(d) for d in input_dims[name])
                self.types[name] = info.type.tensor_type.elem_type

    def run(self, graph: GraphView) -> None:
        """Infer everything."""
        for node in graph.nodes:
            self.visit(node)

    def settle(self, same: Mapping[str, _Which]) -> None:
        """Note which elements of static values are the same for every input shape."""
        self.fixed |= {name for name, found in same.items() if found.all()}
        self.moving = {name: ~found for name, found in same.items() if name not in self.fixed}
        # Weights that are cut at bounds which are computed from shapes, as the packed ones of an attention, are large.
        for node in self.graph.nodes:
            known = all(name in self.fixed or name in self.graph.constants for name in node.inputs if name)
            readers = {self.graph.nodes[r.node].op for name in node.outputs for r in self.graph.readers.get(name, ())}
            is_new = not any(name in self.static for name in node.outputs)
            if node.op in _ASSEMBLING and known and is_new and readers & _READING_MATRICES:
                self._evaluate(node)

    def result(self) -> Shapes:
        """Return what was inferred."""
        moving = {
            name: self.moving[name] if name in self.moving else np.ones(value.shape, bool)
            for name, value in self.static.items()
            if name not in self.fixed
        }
        read_from = {name: frozenset(self.read_from[name]) for name in self.fixed if self.read_from.get(name)}
        return Shapes(self.dims, self.types, self.static, frozenset(self.fixed), moving, read_from, self.bodies)

    def visit(self, node: NodeView) -> None:
        """Infer the outputs of one node."""
        inside = self._visit_bodies(node)
        if self._evaluate(node) or self._is_decided(node):
            return
        types = self._infer_types(node)
        for slot, name in enumerate(node.outputs):
            if not name:
                continue
            dims = _static_dims(types.get(name))
            if dims is None:
                dims = contributed_dims(node, self.dims, slot)
                if dims is not None and node.inputs[0] in self.types:
                    self.types[name] = self.types[node.inputs[0]]
            if dims is None and name in inside:
                dims, self.types[name] = inside[name]
            if dims is None and name in self.observed:
                dims = tuple(int(d) for d in self.observed[name])
            if dims is not None:
                self.dims[name] = dims
            if name in types and types[name].HasField("tensor_type"):
                self.types[name] = types[name].tensor_type.elem_type

    def _is_decided(self, node: NodeView) -> bool:
        """Whether an If takes a branch that computes from constants and shapes alone; note what that branch makes."""
        condition = self.static.get(node.inputs[0]) if node.op == "If" and not node.domain else None
        if condition is None:
            return False
        branch = self.bodies.get((node.index, "then_branch" if condition.all() else "else_branch"))
        if branch is None or not all(name in branch.shapes.static for name in branch.graph.outputs):
            return False
        read_from: set[str] = set()
        for name in (*node.inputs, *node.captured):
            if name not in self.graph.constants:
                read_from |= self.read_from.get(name, set()) if name in self.static else {name}
        for name, made in zip(node.outputs, branch.graph.outputs, strict=True):
            self.read_from[name] = read_from
            self.static[name] = branch.shapes.static[made]
            self.dims[name] = branch.shapes.dims[made]
            self.types[name] = branch.shapes.types[made]
        return True

    def _visit_bodies(self, node: NodeView) -> dict[str, tuple[tuple[int, ...], int]]:
        """Infer inside the bodies of a node; return shape and type of each output of the node that they tell."""
        results = {}
        for attribute, _ in subgraphs(node):
            try:
                body = cut_body(self.graph, node, attribute, self)
                view = GraphView(body.model)
            except OnnxFuseError as error:
                logger.debug("no shape inference in %s of %s: %s", attribute, node.title, error.what)
                continue
            dims = {name: _static_dims(info.type) or () for name, info in view.inputs.items()}
            inner = _Inference(view, dims, self.observed)
            inner.static.update((name, self.static[name]) for name in body.captured if name in self.static)
            inner.run(view)
            shapes = inner.result()
            self.bodies[node.index, attribute] = BodyShapes(view, shapes, body.constants)
            results[attribute] = [(shapes.dims.get(o), shapes.types.get(o)) for o in view.outputs]
        found = {}
        for name, told in zip(node.outputs, self._joined(node, results), strict=False):
            if told[0] is not None and told[1] is not None:
                found[name] = (told[0], told[1])
        return found

    def _joined(
        self, node: NodeView, results: Mapping[str, Sequence[tuple[tuple[int, ...] | None, int | None]]]
    ) -> Sequence[tuple[tuple[int, ...] | None, int | None]]:
        """Return what the results of bodies say of their node's outputs."""
        if node.op == "If":
            condition = self.static.get(node.inputs[0])
            if condition is not None:
                return results.get("then_branch" if condition.all() else "else_branch", ())
            if len(results) > 1:
                return [a if a == b else (None, None) for a, b in zip(*results.values(), strict=False)]
        if node.op == "Scan" and "body" in results:
            scans = int(node.attributes["num_scan_inputs"])
            states = len(node.inputs) - scans
            axes = [int(a) for a in node.attributes.get("scan_output_axes", [])]
            steps = trip_count(node, self)
            told = list(results["body"])
            for i, (dims, kind) in enumerate(told[states:]):
                if dims is not None:
                    axis = axes[i] % (len(dims) + 1) if axes else 0
                    told[states + i] = ((*dims[:axis], steps, *dims[axis:]), kind)
            return told
        return ()

    def _evaluate(self, node: NodeView) -> bool:
        """Compute the outputs of a node whose inputs are static; return whether that was possible."""
        reads = [name for name in node.inputs if name]
        if node.captured or node.op in _NOT_STATIC or node.domain != DEFAULT_DOMAIN:
            return False
        # Of some inputs only the shape or the type matters; a stand-in without memory has both.
        formal = {"Shape": 0, "Size": 0, "CastLike": 1}.get(node.op, -1)
        feeds = {}
        fixed = True
        read_from: set[str] = set()
        for slot, name in enumerate(reads):
            if slot == formal and name in self.dims and name in self.types:
                dtype = helper.tensor_dtype_to_np_dtype(self.types[name])
                feeds[name] = np.broadcast_to(np.zeros((), dtype), self.dims[name])
                if node.op != "CastLike":
                    fixed = fixed and (name in self.fixed or name in self.graph.constants)
                    read_from |= set() if name in self.graph.constants else {name}
            elif (value := self._value(node, name)) is not None:
                feeds[name] = value
                fixed = fixed and (name in self.fixed or name not in self.static)
                read_from |= self.read_from.get(name, set())
            else:
                return False
        try:
            results = self._run(node, feeds)
        except _EVALUATION_ERRORS as error:
            logger.debug("%s was not evaluated: %s", node.title, error)
            return False
        outputs = [(name, np.asarray(r)) for name, r in results.items()]
        limit = max(_SMALL, sum(v.size for v in feeds.values())) if fixed and node.op in _ASSEMBLING else _SMALL
        if any(value.size > limit for _, value in outputs):
            return False
        for name, value in outputs:
            self.static[name] = value
            self.dims[name] = value.shape
            self.types[name] = helper.np_dtype_to_tensor_dtype(value.dtype)
            self.read_from[name] = read_from
            if fixed:
                self.fixed.add(name)
        return True

    def _run(self, node: NodeView, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run one node in ONNX's evaluator, as a graph: a node by itself it would take to be of the newest version.

        Of some operators it has the newest versions only, which then have to do.
        """
        names = [name for name in node.outputs if name]
        reads, makes = ([ValueInfoProto(name=name) for name in side] for side in (feeds, names))
        graph = helper.make_graph([node.proto], "node", reads, makes)
        try:
            evaluator = ReferenceEvaluator(graph, opsets=self.versions)
        except RuntimeError as error:
            logger.debug("%s is evaluated in its newest version: %s", node.title, error)
            evaluator = ReferenceEvaluator(node.proto)
        results = evaluator.run(names, dict(feeds))
        return dict(zip(names, results, strict=True))

    def _value(self, node: NodeView, name: str) -> np.ndarray[Any, np.dtype[Any]] | None:
        """Return a value if it is known; a large constant only to a node that puts constants together."""
        if name in self.static:
            return self.static[name]
        if node.op not in _ASSEMBLING:
            return None
        if name in self.graph.constants:
            return self.graph.array(name) if self.types[name] != TensorProto.STRING else None
        maker = self.graph.producers.get(name)
        return None if maker is None else self._rearranged(self.graph.nodes[maker])

    def _rearranged(self, node: NodeView) -> np.ndarray[Any, np.dtype[Any]] | None:
        """Return a large constant that was rearranged on its way to a node that puts constants together."""
        if node.op not in _REARRANGING or node.domain != DEFAULT_DOMAIN:
            return None
        feeds = {}
        for slot, name in enumerate(node.inputs):
            value = self.static.get(name)
            if slot == 0 and name in self.graph.constants:
                value = self.graph.array(name)
            if value is None or (name not in self.graph.constants and name not in self.fixed):
                return None
            feeds[name] = value
        try:
            return np.asarray(next(iter(self._run(node, feeds).values())))
        except _EVALUATION_ERRORS as error:
            logger.debug("%s was not evaluated: %s", node.title, error)
            return None

    def _infer_types(self, node: NodeView) -> Mapping[str, TypeProto]:
        types = {name: self._type_of(name) for name in node.inputs if name in self.types}
        data = {
            name: numpy_helper.from_array(self.static[name], name)
            for name in node.inputs
            if name in self.static and self.static[name].dtype.kind in "iubf" and self.static[name].size <= _SMALL
        }
        if any(name not in types for name in node.inputs if name):
            return {}
        try:
            plain = without_activation(node)
            if plain is None:
                proto, schema = node.proto, defs.get_schema(node.op, node.version, node.domain)
            else:
                proto, schema = plain, defs.get_schema("Conv", self.versions[DEFAULT_DOMAIN], DEFAULT_DOMAIN)
            return shape_inference.infer_node_outputs(
                schema, proto, types, data, opset_imports=self.opsets, ir_version=self.ir_version
            )
        except _INFERENCE_ERRORS as error:
            logger.debug("no shape inference for %s: %s", node.title, error)
            return {}

    def _type_of(self, name: str) -> TypeProto:
        return helper.make_tensor_type_proto(self.types[name], self.dims.get(name))


def _static_dims(type_proto: TypeProto | None) -> tuple[int, ...] | None:
    if type_proto is None or not type_proto.HasField("tensor_type"):
        return None
    tensor = type_proto.tensor_type
    if not tensor.HasField("shape") or any(not d.HasField("dim_value") for d in tensor.shape.dim):
        return None
    dims = tuple(d.dim_value for d in tensor.shape.dim)
    # Of what is smaller than the kernel of a convolution, inference makes a negative size.
    return None if min(dims, default=0) < 0 else dims
