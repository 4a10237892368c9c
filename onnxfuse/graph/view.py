"""A read-only view of an ONNX graph, keyed by name: what the analysis reads, whatever the file looks like.

The view hides the accidents of files: weights as initializers, as initializers that are also graph inputs, or as
``Constant`` nodes; nodes without names or with the same name twice; nodes out of topological order. It never changes
the model that it shows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnxfuse.errors import ModelError

__all__ = [
    "BIAS_SLOTS",
    "DEFAULT_DOMAIN",
    "GraphView",
    "NodeView",
    "Operand",
    "Reader",
    "captured_names",
    "constant_tensor",
]

DEFAULT_DOMAIN = ""
_DEFAULT_DOMAIN_ALIASES = ("", "ai.onnx")
# The input that a linear operator adds to its products.
BIAS_SLOTS: Mapping[str, int] = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2, "QLinearConv": 8, "QGemm": 6}
_CONSTANT_ATTRIBUTES = ("value", "value_float", "value_floats", "value_int", "value_ints")


@dataclass(frozen=True, slots=True)
class Operand:
    """One value as one node reads or writes it.

    A constant (a weight) that several nodes read is several operands, because each reader may need it cut in another
    way; any other value is one operand, whoever reads it.

    Attributes:
        name: The value's name in the graph.
        node: Index of the reading node for a constant, else -1.
        slot: Input position at that node for a constant, else -1.
    """

    name: str
    node: int = -1
    slot: int = -1

    @property
    def is_constant(self) -> bool:
        """Whether this is one reader's view of an initializer or of a ``Constant`` node's tensor."""
        return self.node >= 0


@dataclass(frozen=True, slots=True)
class Reader:
    """A place where a value is read: input ``slot`` of node ``node`` (an index into `GraphView.nodes`)."""

    node: int
    slot: int


@dataclass(frozen=True, eq=False)
class NodeView:
    """One node, with a name that is unique and its attributes as Python values.

    Attributes:
        index: Position in `GraphView.nodes` (topological order).
        position: Position in the file's node list.
        name: The node's name; made from operator and position where the file has none, or has it twice.
        op: Operator, as ``Conv``.
        domain: Operator domain, ``""`` for ONNX's own.
        version: The version of the domain's operator set that the model imports.
        inputs: Names of the inputs; ``""`` for one that is left out.
        outputs: Names of the outputs; ``""`` for one that is left out.
        captured: Names that the node's subgraphs read from around them.
        proto: The node as stored in the file; not to be changed.
    """

    index: int
    position: int
    name: str
    op: str
    domain: str
    version: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    captured: tuple[str, ...]
    proto: onnx.NodeProto = field(repr=False)

    @cached_property
    def attributes(self) -> Mapping[str, Any]:
        """The attributes by name: int, float, bytes, list, TensorProto or GraphProto, as `onnx.helper` gives them."""
        return {a.name: onnx.helper.get_attribute_value(a) for a in self.proto.attribute}

    @property
    def title(self) -> str:
        """The node as messages name it, as ``'conv1' (Conv)``."""
        op = f"{self.domain}::{self.op}" if self.domain else self.op
        return f"{self.name!r} ({op})"


class GraphView:
    """The main graph of a model, read-only.

    Args:
        model: A model with its external data loaded.

    Raises:
        ModelError: The graph has a cycle, or reads a value that nothing makes.

    Attributes:
        model: The model that is viewed.
        nodes: All nodes but ``Constant``, in topological order.
        constants: Tensors by value name: initializers and the tensors of ``Constant`` nodes.
        constant_nodes: Position in the file's node list of the ``Constant`` node behind a value.
        inputs: Graph inputs that are fed at run time (initializers that are also inputs are constants).
        outputs: Names of the graph's outputs.
        is_sorted: Whether the file's own node order is topological.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        """Read names, constants and order; weights are not converted before someone asks for them."""
        self.model = model
        graph = model.graph
        self.opsets = {_plain_domain(o.domain): o.version for o in model.opset_import}
        self.constants: dict[str, onnx.TensorProto] = {t.name: t for t in graph.initializer}
        self.constant_nodes: dict[str, int] = {}
        for position, node in enumerate(graph.node):
            tensor = constant_tensor(node)
            if tensor is not None:
                self.constants[node.output[0]] = tensor
                self.constant_nodes[node.output[0]] = position
        self.sparse_constants = {t.values.name for t in graph.sparse_initializer}
        self.inputs: dict[str, onnx.ValueInfoProto] = {i.name: i for i in graph.input if i.name not in self.constants}
        self.outputs = tuple(o.name for o in graph.output)
        self.nodes, self.is_sorted = self._ordered_nodes()
        self.producers: dict[str, int] = {o: n.index for n in self.nodes for o in n.outputs if o}
        self.readers: dict[str, list[Reader]] = {}
        for view in self.nodes:
            for slot, name in enumerate(view.inputs):
                if name:
                    self.readers.setdefault(name, []).append(Reader(view.index, slot))
            for name in view.captured:
                self.readers.setdefault(name, []).append(Reader(view.index, -1))

    def operand(self, node: NodeView, slot: int) -> Operand | None:
        """Return what ``node`` reads at ``slot``, or None where the input is left out."""
        if slot >= len(node.inputs) or not node.inputs[slot]:
            return None
        name = node.inputs[slot]
        return Operand(name, node.index, slot) if name in self.constants else Operand(name)

    def array(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """Return the constant called ``name`` as an array of its own data type (a copy or a read-only view)."""
        return numpy_helper.to_array(self.constants[name])

    def decoded_operand(self, node: NodeView, slot: int) -> Operand | None:
        """Return what a node reads at ``slot``, or the constant behind it that is decoded for this node alone.

        That constant holds integers that a DequantizeLinear decodes, or floats that a QuantizeLinear rounds before.
        """
        operand = self.operand(node, slot)
        decoding = self._made_for(operand, node, "DequantizeLinear")
        if decoding is None:
            return operand
        stored = self.operand(decoding, 0)
        rounding = self._made_for(stored, decoding, "QuantizeLinear")
        found = stored if rounding is None else self.operand(rounding, 0)
        return found if found is not None and found.is_constant else operand

    def _made_for(self, operand: Operand | None, reader: NodeView, op: str) -> NodeView | None:
        """Return the node that makes an operand, if it is of some operator and only one node reads what it makes."""
        maker = None if operand is None else self.producers.get(operand.name)
        if operand is None or maker is None or self.sole_reader(operand.name) is not reader:
            return None
        return self.nodes[maker] if self.nodes[maker].op == op else None

    def sole_reader(self, name: str) -> NodeView | None:
        """Return the node that alone reads ``name``; None if several do, or if it is a graph output."""
        readers = self.readers.get(name, [])
        if len(readers) != 1 or name in self.outputs or readers[0].slot < 0:
            return None
        return self.nodes[readers[0].node]

    def _ordered_nodes(self) -> tuple[tuple[NodeView, ...], bool]:
        protos = list(self.model.graph.node)
        names = _unique_names(protos)
        captured = [tuple(captured_names(p)) for p in protos]
        makers = {o: i for i, p in enumerate(protos) for o in p.output if o}
        known = self.constants.keys() | self.inputs.keys() | self.sparse_constants
        needs: dict[int, list[int]] = {}
        for i, proto in enumerate(protos):
            reads = [name for name in proto.input if name]
            missing = [name for name in reads if name not in makers and name not in known]
            if missing:
                what = f"node {names[i]!r} reads {missing[0]!r}, which nothing in the graph makes"
                raise ModelError(what, mend="export the model again; the file is damaged")
            needs[i] = [makers[name] for name in (*reads, *captured[i]) if name in makers]
        is_sorted = all(j < i for i, before in needs.items() for j in before)
        order: Sequence[int] = range(len(protos)) if is_sorted else _topological_order(needs)
        keep = [i for i in order if constant_tensor(protos[i]) is None]
        nodes = []
        for index, i in enumerate(keep):
            domain = _plain_domain(protos[i].domain)
            version = self.opsets.get(domain, 0)
            inputs, outputs = tuple(protos[i].input), tuple(protos[i].output)
            op = protos[i].op_type
            nodes.append(NodeView(index, i, names[i], op, domain, version, inputs, outputs, captured[i], protos[i]))
        return tuple(nodes), is_sorted


def _plain_domain(domain: str) -> str:
    return DEFAULT_DOMAIN if domain in _DEFAULT_DOMAIN_ALIASES else domain


def constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """Return the tensor of a ``Constant`` node; None for other nodes and for sparse or string constants."""
    if node.op_type != "Constant" or _plain_domain(node.domain) != DEFAULT_DOMAIN:
        return None
    for attribute in node.attribute:
        if attribute.name == "value":
            tensor: onnx.TensorProto = attribute.t
            return tensor
        if attribute.name in _CONSTANT_ATTRIBUTES:
            dtype = np.float32 if "float" in attribute.name else np.int64
            value = np.asarray(onnx.helper.get_attribute_value(attribute), dtype)
            made: onnx.TensorProto = numpy_helper.from_array(value, node.output[0])
            return made
    return None


def _unique_names(protos: Sequence[onnx.NodeProto]) -> list[str]:
    names: list[str] = []
    taken: set[str] = set()
    for i, proto in enumerate(protos):
        name = proto.name or f"{proto.op_type}_{i}"
        if name in taken:
            name = f"{name}#{i}"
        taken.add(name)
        names.append(name)
    return names


def captured_names(node: onnx.NodeProto) -> list[str]:
    """Names that the subgraphs of ``node`` read but do not make, in order of first use."""
    found: dict[str, None] = {}
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            inner = {i.name for i in graph.input} | {t.name for t in graph.initializer}
            inner |= {t.values.name for t in graph.sparse_initializer}
            inner |= {o for n in graph.node for o in n.output}
            reads = [name for n in graph.node for name in (*n.input, *captured_names(n))]
            reads += [o.name for o in graph.output]
            found.update((name, None) for name in reads if name and name not in inner)
    return list(found)


def _topological_order(needs: Mapping[int, Sequence[int]]) -> list[int]:
    sorter: TopologicalSorter[int] = TopologicalSorter(needs)
    try:
        return list(sorter.static_order())
    except CycleError as error:
        what = "the graph has a cycle"
        raise ModelError(what, mend="export the model again; ONNX graphs must be acyclic") from error
