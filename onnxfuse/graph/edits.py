"""Rewriting a graph: a list of edits goes in, a new model comes out, everything else stays as it was.

This is the only module that touches onnx-graphsurgeon. Its import and export lose what they do not model (metadata
of nodes and graph, producer fields, initializers that are also inputs, names seen from subgraphs), so only what was
edited is taken from its result, and the rest from the original, byte for byte.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from onnxfuse.errors import InvariantError
from onnxfuse.graph.slim import without_large_weights
from onnxfuse.graph.view import DEFAULT_DOMAIN, GraphView, NodeView

__all__ = ["Edit", "SetAttribute", "SetInput", "apply_edits"]

logger = logging.getLogger(__name__)

# Before this IR version every initializer has to be listed among the graph's inputs.
_CONSTANTS_ARE_NO_INPUTS = 4
_NARROW_TYPES = frozenset({"int4", "uint4"})
# Constants of so many bytes are not given to onnx-graphsurgeon, which keeps several copies.
_LARGE = 2**20

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class SetInput:
    """Node ``node`` (index into `GraphView.nodes`) reads the constant ``value`` at ``slot``.

    Whether the stored tensor is replaced, or a copy is made because another reader keeps the old one, is decided when
    all edits are known.
    """

    node: int
    slot: int
    value: AnyArray


@dataclass(frozen=True, eq=False)
class SetAttribute:
    """Node ``node`` has ``value`` (a number or a list of integers) as its attribute ``name``."""

    node: int
    name: str
    value: int | float | list[int]


Edit: TypeAlias = SetInput | SetAttribute


def apply_edits(graph: GraphView, edits: Sequence[Edit], sizes: Mapping[str, Mapping[int, int]]) -> onnx.ModelProto:
    """Return a new model with the edits applied.

    Args:
        graph: The original, which is not changed.
        edits: At most one edit for every input slot and every attribute.
        sizes: New sizes of the axes of intermediate values that change, by name and axis. What the file states of other
            axes stays, right or wrong: exporters leave sizes of their example there.

    Returns:
        The new model; with no edits a copy of the original.
    """
    model, empty = without_large_weights(graph.model, _LARGE)
    if edits:
        with _quiet():
            surgeon = gs.import_onnx(model)
            rewriter = _Rewriter(graph, surgeon)
            for edit in edits:
                if isinstance(edit, SetAttribute):
                    rewriter.set_attribute(edit)
            rewriter.set_inputs([edit for edit in edits if isinstance(edit, SetInput)])
            exported = gs.export_onnx(surgeon)
        _graft(model, exported, rewriter)
        _state_shapes(model, graph, rewriter.released)
        _drop_unused(model, graph, rewriter.released)
        empty -= rewriter.edited_constants
    for tensor in model.graph.initializer:
        if tensor.name in empty:
            tensor.CopyFrom(graph.constants[tensor.name])
    if not graph.is_sorted:
        _sort_nodes(model, graph)
    _update_value_info(model, sizes)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnx-graphsurgeon's own log off the terminal; what matters is raised."""
    severity = G_LOGGER.severity
    G_LOGGER.severity = G_LOGGER.ERROR
    try:
        yield
    finally:
        G_LOGGER.severity = severity


class _Rewriter:
    """Applies edits to the graphsurgeon graph and notes what was touched."""

    def __init__(self, graph: GraphView, surgeon: gs.Graph) -> None:
        self.graph = graph
        self.surgeon = surgeon
        self.edited_nodes: set[int] = set()  # positions in the file
        self.edited_constants: set[str] = set()
        self.new_constants: set[str] = set()
        self.released: set[str] = set()  # values that lost a reader
        self.aside: dict[str, AnyArray] = {}  # constants that onnx-graphsurgeon can't export, or would copy at length
        # Looked up once: onnx-graphsurgeon goes through the whole graph for it.
        self.tensors = surgeon.tensors()
        self.names = set(self.tensors) | set(graph.constants) | set(graph.producers)

    def set_attribute(self, edit: SetAttribute) -> None:
        node = self.graph.nodes[edit.node]
        self._surgeon_node(node).attrs[edit.name] = edit.value
        self.edited_nodes.add(node.position)

    def set_inputs(self, edits: Sequence[SetInput]) -> None:
        by_value: dict[str, list[SetInput]] = {}
        for edit in edits:
            inputs = self.graph.nodes[edit.node].inputs
            name = inputs[edit.slot] if edit.slot < len(inputs) else ""
            by_value.setdefault(name, []).append(edit)
        for name, group in by_value.items():
            if name in self.graph.constants and self._all_readers_agree(name, group):
                self._replace(name, group[0].value)
            else:
                self._unshare(name, group)

    def _all_readers_agree(self, name: str, edits: Sequence[SetInput]) -> bool:
        readers = {(reader.node, reader.slot) for reader in self.graph.readers.get(name, [])}
        same = all(_equal(edit.value, edits[0].value) for edit in edits)
        return same and readers == {(e.node, e.slot) for e in edits} and name not in self.graph.outputs

    def _replace(self, name: str, value: AnyArray) -> None:
        position = self.graph.constant_nodes.get(name)
        if position is None:
            tensor = self.tensors[name]
            if not isinstance(tensor, gs.Constant):
                what = f"{name!r} is a constant in the file but not after import"
                raise InvariantError(what)
            tensor.values = self._exportable(name, value)
            self.edited_constants.add(name)
        else:
            attributes = self.surgeon.nodes[position].attrs
            attributes.clear()
            attributes["value"] = gs.Constant(name, self._exportable(name, value))
            self.edited_nodes.add(position)

    def _unshare(self, name: str, edits: Sequence[SetInput]) -> None:
        """Make a constant of its own for every distinct new value; one more than needed is never made."""
        made: list[tuple[AnyArray, gs.Constant]] = []
        for edit in edits:
            constant = next((c for value, c in made if _equal(value, edit.value)), None)
            if constant is None:
                node = self.graph.nodes[edit.node]
                new_name = self._new_name(name or f"{node.name}_{edit.slot}")
                constant = gs.Constant(new_name, self._exportable(new_name, edit.value))
                made.append((edit.value, constant))
                self.new_constants.add(constant.name)
            self._connect(edit, constant)
        if name:
            self.released.add(name)

    def _connect(self, edit: SetInput, constant: gs.Constant) -> None:
        node = self.graph.nodes[edit.node]
        inputs = self._surgeon_node(node).inputs
        while len(inputs) <= edit.slot:
            inputs.append(gs.Variable(""))
        inputs[edit.slot] = constant
        self.edited_nodes.add(node.position)

    def _exportable(self, name: str, value: AnyArray) -> AnyArray:
        """Return a value, or a stand-in for a large one or one of four bits, which takes its place after the export."""
        if value.dtype.name not in _NARROW_TYPES and value.nbytes < _LARGE:
            return value
        self.aside[name] = value
        return np.zeros(1, np.int8)

    def _surgeon_node(self, node: NodeView) -> gs.Node:
        return self.surgeon.nodes[node.position]

    def _new_name(self, stem: str) -> str:
        number = 0
        name = f"{stem}_fused"
        while name in self.names:
            number += 1
            name = f"{stem}_fused_{number}"
        self.names.add(name)
        return name


def _equal(a: AnyArray, b: AnyArray) -> bool:
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())


def _graft(model: onnx.ModelProto, exported: onnx.ModelProto, rewriter: _Rewriter) -> None:
    """Take from the export what was edited, and nothing else."""
    aside = rewriter.aside
    for position in rewriter.edited_nodes:
        _graft_node(model.graph.node[position], exported.graph.node[position], position, aside)
    stored = {tensor.name: tensor for tensor in exported.graph.initializer}
    for tensor in model.graph.initializer:
        if tensor.name in rewriter.edited_constants:
            doc = tensor.doc_string
            tensor.CopyFrom(_tensor(tensor.name, stored, aside))
            if doc:
                tensor.doc_string = doc
    for name in sorted(rewriter.new_constants):
        tensor = _tensor(name, stored, aside)
        model.graph.initializer.append(tensor)
        if model.ir_version < _CONSTANTS_ARE_NO_INPUTS:
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    for info in (*model.graph.input, *model.graph.value_info):
        if info.name in rewriter.edited_constants:
            dims = aside[info.name].shape if info.name in aside else stored[info.name].dims
            _set_sizes(info, dict(enumerate(dims)))


def _tensor(name: str, stored: Mapping[str, onnx.TensorProto], aside: Mapping[str, AnyArray]) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(aside[name], name) if name in aside else stored[name]


def _graft_node(target: onnx.NodeProto, source: onnx.NodeProto, position: int, aside: Mapping[str, AnyArray]) -> None:
    if source.op_type != target.op_type or list(source.output) != list(target.output):
        what = f"node {position} changed its place on export"
        raise InvariantError(what)
    del target.input[:]
    target.input.extend(source.input)
    del target.attribute[:]
    target.attribute.extend(source.attribute)
    if target.op_type == "Constant" and target.output[0] in aside:
        target.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(aside[target.output[0]], target.output[0]))


def _state_shapes(model: onnx.ModelProto, graph: GraphView, released: set[str]) -> None:
    """Let nodes state the shape of a constant that nothing else reads any more, so that it need not stay for that."""
    for name in released & set(graph.constants):
        readers = [node for node in model.graph.node if name in node.input]
        if all(node.op_type == "Shape" and node.domain == DEFAULT_DOMAIN for node in readers):
            for node in readers:
                bounds = {a.name: a.i for a in node.attribute}
                dims = graph.constants[name].dims[bounds.get("start", 0) : bounds.get("end")]
                del node.input[:], node.attribute[:]
                node.op_type = "Constant"
                node.attribute.append(onnx.helper.make_attribute("value", _int64s(node.output[0], dims)))


def _int64s(name: str, numbers: Sequence[int]) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.array(numbers, np.int64), name)


def _drop_unused(model: onnx.ModelProto, graph: GraphView, released: set[str]) -> None:
    """Remove the constants, and the nodes that computed them, that lost their last reader through the edits."""
    nodes = model.graph.node
    readers = Counter(name for node in nodes for name in node.input)
    readers.update(output.name for output in model.graph.output)
    readers.update(name for view in graph.nodes for name in view.captured)
    makers = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    pending, unread, gone = set(released), set[str](), set[int]()
    while pending:
        name = pending.pop()
        if readers[name]:
            continue
        unread.add(name)
        maker = makers.get(name)
        if maker is None or maker in gone or any(readers[output] for output in nodes[maker].output if output):
            continue
        gone.add(maker)
        readers.subtract(nodes[maker].input)
        pending.update(value for value in nodes[maker].input if value)
    for i in sorted(gone, reverse=True):
        del nodes[i]
    for stored in (model.graph.initializer, model.graph.input):
        for i in range(len(stored) - 1, -1, -1):
            if stored[i].name in unread:
                del stored[i]


def _sort_nodes(model: onnx.ModelProto, graph: GraphView) -> None:
    """Put the nodes in topological order, which the format demands even where runtimes do not."""
    constants = [n for n in model.graph.node if n.output and n.output[0] in graph.constant_nodes]
    by_output = {_first_output(n.output): n for n in model.graph.node}
    ordered = [name for view in graph.nodes if (name := _first_output(view.outputs)) in by_output]
    nodes = [*constants, *(by_output[name] for name in ordered)]
    copies = []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copies.append(copy)
    if len(copies) != len(model.graph.node):
        what = "sorting lost a node"
        raise InvariantError(what)
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _first_output(outputs: Iterable[str]) -> str:
    """The first output that is not left out; no two nodes share it."""
    return next((name for name in outputs if name), "")


def _update_value_info(model: onnx.ModelProto, sizes: Mapping[str, Mapping[int, int]]) -> None:
    for info in model.graph.value_info:
        if info.name in sizes:
            _set_sizes(info, sizes[info.name])


def _set_sizes(info: onnx.ValueInfoProto, sizes: Mapping[int, int]) -> None:
    """Write the sizes of some axes into a stated shape; symbolic dimensions stay symbolic."""
    if not info.type.HasField("tensor_type") or not info.type.tensor_type.HasField("shape"):
        return
    for axis, stated in enumerate(info.type.tensor_type.shape.dim):
        if axis in sizes and stated.HasField("dim_value"):
            stated.dim_value = int(sizes[axis])
