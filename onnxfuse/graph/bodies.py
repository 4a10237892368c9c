"""The bodies of If, Loop and Scan: cutting one out as a model of its own, and putting what became of it back.

A body reads values from around it, computed ones and constants. Cut out, the computed ones become inputs, beside the
body's own formal inputs, and the constants become initializers. So whatever can be done with a model can be done with a
body. Its inputs and outputs are those of a graph, which never change, so the result fits where the body was.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from onnxfuse.errors import UnsupportedGraphError
from onnxfuse.graph.view import DEFAULT_DOMAIN, GraphView, NodeView

__all__ = [
    "Body",
    "Known",
    "cut_body",
    "has_bodies",
    "scan_axis",
    "splice_body",
    "subgraphs",
    "trip_count",
    "value_names",
]

# Before this version of the format every initializer has to be listed among the graph's inputs.
_CONSTANTS_ARE_NO_INPUTS = 4
# Scan of version 8 has a batch axis of its own.
_SCAN_WITHOUT_BATCH = 9

_Dims = tuple[int, ...]


class Known(Protocol):
    """What has to be known of the values around a body (see `onnxfuse.graph.shapes.Shapes`)."""

    @property
    def dims(self) -> Mapping[str, _Dims]:
        """Shape by value name."""

    @property
    def types(self) -> Mapping[str, int]:
        """`onnx.TensorProto` element type by value name."""

    @property
    def static(self) -> Mapping[str, np.ndarray[Any, np.dtype[Any]]]:
        """Values that are known before a run."""

    @property
    def fixed(self) -> "set[str] | frozenset[str]":
        """Those of `static` that are the same whatever the shapes of the inputs are."""


@dataclass(frozen=True, eq=False)
class Body:
    """A body cut out as a model.

    Attributes:
        node: The node that it belongs to.
        attribute: The node's attribute that holds it, such as ``then_branch``.
        model: The body by itself.
        formal: Names of its formal inputs, in order.
        captured: Names of the computed values that it reads from around it; they follow the formal inputs.
        constants: Names of the constants that it reads from around it, initializers of `model`.
    """

    node: NodeView
    attribute: str
    model: onnx.ModelProto
    formal: tuple[str, ...]
    captured: tuple[str, ...]
    constants: frozenset[str]

    @property
    def name(self) -> str:
        """What names inside it are prefixed with, as ``If_25/then_branch``."""
        return f"{self.node.name}/{self.attribute}"


def subgraphs(node: NodeView) -> Iterator[tuple[str, onnx.GraphProto]]:
    """Yield the bodies of a node by the attribute that holds them."""
    for attribute in node.proto.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.name, attribute.g


def cut_body(
    graph: GraphView, node: NodeView, attribute: str, known: Known, others: Sequence[Mapping[str, _Dims]] = ()
) -> Body:
    """Cut a body out as a model.

    Args:
        graph: The graph around it.
        node: The node that it belongs to.
        attribute: The attribute that holds it.
        known: Shapes and types of the values around it.
        others: Their shapes at other sizes of the dimensions that the model leaves open. Dimensions of the body's
            inputs that differ are left open too; those that move together get one symbol.

    Raises:
        UnsupportedGraphError: The shape or the type of something that it reads is not known.
    """
    inner: onnx.GraphProto = next(g for name, g in subgraphs(node) if name == attribute)
    reads = _reads(inner)
    constants = {name: t for name in reads if (t := _constant(graph, known, name)) is not None}
    captured = tuple(name for name in reads if name not in constants)
    shapes = [_formal_dims(node, inner, known.dims), *(_formal_dims(node, inner, o) for o in others)]
    shapes = [
        {**{n: d[n] for n in captured if n in d}, **s} for s, d in zip(shapes, (known.dims, *others), strict=True)
    ]
    types = {**_formal_types(node, inner, known.types), **{n: known.types[n] for n in captured if n in known.types}}
    formal = tuple(i.name for i in inner.input if i.name not in {t.name for t in inner.initializer})
    model = onnx.ModelProto(ir_version=max(graph.model.ir_version, _CONSTANTS_ARE_NO_INPUTS))
    model.opset_import.extend(graph.model.opset_import)
    model.functions.extend(graph.model.functions)
    model.graph.CopyFrom(inner)
    model.graph.name = inner.name or attribute
    del model.graph.input[:]
    for name in (*formal, *captured):
        if name not in shapes[0] or name not in types:
            what = f"the shape of {name!r}, which {attribute} of {node.title} reads, is not known"
            raise UnsupportedGraphError(what, where=node.title)
        dims = _open_dims(name, shapes, _may_change(node, inner, name, len(shapes[0][name])) if others else ())
        model.graph.input.append(helper.make_tensor_value_info(name, types[name], dims))
    model.graph.initializer.extend(constants.values())
    return Body(node, attribute, model, formal, captured, frozenset(constants))


def _formal_dims(node: NodeView, inner: onnx.GraphProto, dims: Mapping[str, _Dims]) -> dict[str, _Dims]:
    """Return the shapes of a body's formal inputs, as far as those of its node's inputs tell them."""
    names = [i.name for i in inner.input]
    if node.op == "Loop" and node.domain == DEFAULT_DOMAIN:
        found: dict[str, _Dims] = dict.fromkeys(names[:2], ())
        found.update((n, dims[x]) for n, x in zip(names[2:], node.inputs[2:], strict=False) if x in dims)
        return found
    if node.op == "Scan" and node.domain == DEFAULT_DOMAIN and node.version >= _SCAN_WITHOUT_BATCH:
        found = {}
        states = len(node.inputs) - int(node.attributes["num_scan_inputs"])
        for i, (name, x) in enumerate(zip(names, node.inputs, strict=False)):
            if x in dims:
                axis = scan_axis(node, i - states, len(dims[x])) if i >= states else -1
                found[name] = tuple(d for a, d in enumerate(dims[x]) if a != axis)
        return found
    return {}


def _formal_types(node: NodeView, inner: onnx.GraphProto, types: Mapping[str, int]) -> dict[str, int]:
    """Return the element types of a body's formal inputs: those of its node's inputs."""
    names = [i.name for i in inner.input]
    found = {n: types[x] for n, x in zip(names, node.inputs, strict=False) if x in types}
    if node.op == "Loop":
        found.update(zip(names[:2], (TensorProto.INT64, TensorProto.BOOL), strict=False))
    return found


def scan_axis(node: NodeView, index: int, rank: int) -> int:
    """Return the axis that a Scan runs along in one of its scan inputs."""
    axes = node.attributes.get("scan_input_axes", [])
    return int(axes[index]) % max(rank, 1) if index < len(axes) else 0


def has_bodies(graph: GraphView) -> bool:
    """Whether any node of a graph has a body."""
    return any(True for node in graph.nodes for _ in subgraphs(node))


def trip_count(node: NodeView, known: Known) -> int:
    """Return how often a node runs its bodies, as far as that is known: a Loop of unknown length counts once."""
    if node.op == "Scan" and node.version >= _SCAN_WITHOUT_BATCH:
        first = len(node.inputs) - int(node.attributes["num_scan_inputs"])
        dims = known.dims.get(node.inputs[first], ())
        return dims[scan_axis(node, 0, len(dims))] if dims else 1
    if node.op == "Loop" and node.inputs and node.inputs[0] in known.static:
        return int(known.static[node.inputs[0]].ravel()[0])
    return 1


def splice_body(model: onnx.ModelProto, body: Body, changed: onnx.ModelProto) -> None:
    """Put what became of a body back into its node.

    Args:
        model: The model around it, which is changed; it has the body's node, with the same outputs.
        body: The body as it was cut out.
        changed: The model that was made of `body.model`.
    """
    outputs = list(body.node.outputs)
    node = next(n for n in model.graph.node if n.op_type == body.node.op and list(n.output) == outputs)
    target: onnx.GraphProto = next(a.g for a in node.attribute if a.name == body.attribute)
    original = {t.name: t for t in body.model.graph.initializer}
    kept = [t for t in changed.graph.initializer if not _is_outside(t, body, original)]
    before = set(value_names(body.model.graph))
    taken = set(value_names(model.graph))
    fresh = {t.name: t.name for t in kept if t.name in body.constants}
    fresh |= {name: name for name in value_names(changed.graph) if name not in before and name in taken}
    renamed = {name: _new_name(name, taken) for name in fresh}
    del target.node[:], target.initializer[:], target.value_info[:]
    target.node.extend(changed.graph.node)
    target.initializer.extend(kept)
    target.value_info.extend(changed.graph.value_info)
    _rename(target, renamed)


def _constant(graph: GraphView, known: Known, name: str) -> onnx.TensorProto | None:
    """Return a constant from around a body: stored, or known to be the same whatever the inputs are."""
    tensor = onnx.TensorProto()
    if name in graph.constants:
        tensor.CopyFrom(graph.constants[name])
        tensor.name = name
        return tensor
    if name in known.fixed and name in known.static:
        tensor.CopyFrom(numpy_helper.from_array(np.array(known.static[name], order="C"), name))
        return tensor
    return None


def _reads(inner: onnx.GraphProto) -> list[str]:
    """Names that a body reads but does not make, in order of first use."""
    own = {i.name for i in inner.input} | {t.name for t in inner.initializer}
    own |= {t.values.name for t in inner.sparse_initializer} | {o for n in inner.node for o in n.output}
    found: dict[str, None] = {}
    for node in inner.node:
        names = [*node.input, *(n for a in node.attribute for g in (a.g, *a.graphs) for n in _reads(g))]
        found.update((name, None) for name in names if name and name not in own)
    found.update((o.name, None) for o in inner.output if o.name and o.name not in own)
    return list(found)


def _may_change(node: NodeView, inner: onnx.GraphProto, name: str, rank: int) -> list[int]:
    """Return the axes of a Loop's state that may change from step to step: those whose size the body leaves open."""
    stated = next((i.type.tensor_type for i in inner.input if i.name == name), None)
    if node.op != "Loop" or stated is None:
        return []
    dims = stated.shape.dim if stated.HasField("shape") else []
    return [axis for axis in range(rank) if axis >= len(dims) or not dims[axis].HasField("dim_value")]


def _open_dims(name: str, shapes: Sequence[Mapping[str, _Dims]], changing: Sequence[int]) -> list[int | str]:
    """Return a shape in which the dimensions that move with the model's inputs, or by themselves, are symbols."""
    first = shapes[0][name]
    rows = [s.get(name, ()) for s in shapes]
    dims: list[int | str] = []
    for axis, size in enumerate(first):
        sizes = [row[axis] if len(row) == len(first) else None for row in rows]
        if None in sizes or axis in changing:
            dims.append(f"{name}_{axis}")
        elif len(set(sizes)) > 1:
            dims.append("size_" + "_".join(map(str, sizes)))
        else:
            dims.append(size)
    return dims


def _is_outside(tensor: onnx.TensorProto, body: Body, original: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a body may go on reading a constant from around it, as it has not changed."""
    return tensor.name in body.constants and tensor == original[tensor.name]


def value_names(graph: onnx.GraphProto) -> Iterator[str]:
    """All names of values in a graph and in the bodies inside it."""
    yield from (i.name for i in graph.input)
    yield from (t.name for t in graph.initializer)
    yield from (t.values.name for t in graph.sparse_initializer)
    for node in graph.node:
        yield from node.output
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from value_names(inner)


def _new_name(stem: str, taken: set[str]) -> str:
    number = 0
    name = f"{stem}_fused"
    while name in taken:
        number += 1
        name = f"{stem}_fused_{number}"
    taken.add(name)
    return name


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for info in graph.value_info:
        info.name = names.get(info.name, info.name)
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)
        for i, name in enumerate(node.output):
            node.output[i] = names.get(name, name)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename(inner, names)
