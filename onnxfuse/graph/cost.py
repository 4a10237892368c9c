"""Parameters and multiply-accumulates of a graph, from shapes alone: before, and predicted for any choice of widths."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from onnx import AttributeProto, GraphProto, TensorProto, helper

from onnxfuse.graph.bodies import subgraphs, trip_count
from onnxfuse.graph.contributed import turned_axes
from onnxfuse.graph.shapes import BodyShapes, Shapes
from onnxfuse.graph.view import DEFAULT_DOMAIN, GraphView, NodeView, Operand, constant_tensor

__all__ = ["Cost", "DimsOf", "measure_cost", "node_macs", "node_parameters", "stored_bytes"]

DimsOf: TypeAlias = Callable[[Operand], Sequence[int] | None]

# What is counted, by domain and operator: as which kind, and the slot of the weight.
_COUNTED: Mapping[tuple[str, str], tuple[str, int]] = {
    (DEFAULT_DOMAIN, "Conv"): ("Conv", 1),
    (DEFAULT_DOMAIN, "ConvInteger"): ("Conv", 1),
    (DEFAULT_DOMAIN, "QLinearConv"): ("Conv", 3),
    ("com.microsoft", "QLinearConv"): ("Conv", 3),
    (DEFAULT_DOMAIN, "ConvTranspose"): ("ConvTranspose", 1),
    ("com.microsoft", "FusedConv"): ("Conv", 1),
    (DEFAULT_DOMAIN, "Gemm"): ("Gemm", 1),
    ("com.microsoft", "QGemm"): ("Gemm", 3),
    (DEFAULT_DOMAIN, "MatMul"): ("MatMul", 1),
    (DEFAULT_DOMAIN, "MatMulInteger"): ("MatMul", 1),
    (DEFAULT_DOMAIN, "QLinearMatMul"): ("MatMul", 3),
    **{("com.microsoft", op): ("MatMul", 1) for op in ("MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")},
    **{("com.microsoft", op): ("FusedMatMul", 1) for op in ("FusedMatMul", "TransposeMatMul")},
    (DEFAULT_DOMAIN, "Einsum"): ("Einsum", 1),
    ("com.microsoft", "Attention"): ("Attention", 1),
    ("com.microsoft", "QAttention"): ("Attention", 1),
    **{("com.microsoft", op): ("Scores", 1) for op in ("MultiHeadAttention", "GroupQueryAttention")},
    (DEFAULT_DOMAIN, "Attention"): ("Scores", 1),
    **{(DEFAULT_DOMAIN, op): ("LSTM", 1) for op in ("LSTM", "GRU", "RNN")},
}
_NO_PARAMETER_TYPES = frozenset({TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING, TensorProto.UNDEFINED})
_BATCH_NORM_STATISTICS = (3, 4)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a network costs.

    Attributes:
        parameters: Elements of all constants that nodes read, without integers that are shapes or indices, and
            without the running mean and variance of batch normalisation, as frameworks count. A constant with several
            readers counts once while they agree on its shape.
        macs: Multiply-accumulates of one run at the shapes given: convolutions, matrix products, recurrent layers,
            attention; other operators count nothing. Of an If the branch counts that does most, of a Loop or Scan the
            body as often as it runs, once where that is not known.
    """

    parameters: int
    macs: int


def measure_cost(graph: GraphView, shapes: Shapes, dims_of: DimsOf) -> Cost:
    """Count parameters and multiply-accumulates.

    Args:
        graph: The graph.
        shapes: Its original shapes.
        dims_of: The shape of an operand now (or as planned); None where it is not known.
    """
    macs = sum(node_macs(node, graph, dims_of) for node in graph.nodes) + _macs_inside(graph, shapes)
    tensors: set[tuple[str, tuple[int, ...]]] = set()
    for node in graph.nodes:
        for operand in node_parameters(node, graph, shapes):
            tensors.add((operand.name, tuple(dims_of(operand) or shapes.dims[operand.name])))
    return Cost(sum(math.prod(dims) for _, dims in tensors) + _parameters_inside(graph), macs)


def _macs_inside(graph: GraphView, shapes: Shapes) -> int:
    """Count what bodies do: of an If the branch that does most, of a Loop or Scan its body as often as it runs."""
    found: dict[int, int] = {}
    for (index, _), body in shapes.bodies.items():
        macs = _cost_of_body(body).macs * trip_count(graph.nodes[index], shapes)
        found[index] = max(found.get(index, 0), macs)
    return sum(found.values())


def _cost_of_body(body: BodyShapes) -> Cost:
    return measure_cost(body.graph, body.shapes, lambda operand: body.shapes.dims.get(operand.name))


def stored_bytes(graph: GraphView, shapes: Shapes) -> int:
    """Return the bytes of all parameters, those in bodies too, counted as `Cost` counts them."""
    read = {operand.name for node in graph.nodes for operand in node_parameters(node, graph, shapes)}
    inside = (_held(inner, _bytes) for node in graph.nodes for _, inner in subgraphs(node))
    return sum(_bytes(graph.constants[name]) for name in read) + sum(inside)


def _bytes(tensor: TensorProto) -> int:
    return math.prod(tensor.dims) * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _elements(tensor: TensorProto) -> int:
    return math.prod(tensor.dims)


def _parameters_inside(graph: GraphView) -> int:
    """Count the constants that bodies hold; those that they read from around them count there."""
    return sum(_held(inner, _elements) for node in graph.nodes for _, inner in subgraphs(node))


def _held(inner: GraphProto, size: Callable[[TensorProto], int]) -> int:
    """Count the parameters that a body and the bodies in it hold."""
    tensors = {tensor.name: tensor for tensor in inner.initializer}
    tensors |= {n.output[0]: tensor for n in inner.node if (tensor := constant_tensor(n)) is not None}
    for node in inner.node:
        if node.op_type == "BatchNormalization":
            for slot in _BATCH_NORM_STATISTICS:
                tensors.pop(node.input[slot], None)
    total = sum(size(t) for t in tensors.values() if t.data_type not in _NO_PARAMETER_TYPES)
    return total + sum(
        _held(a.g, size) for node in inner.node for a in node.attribute if a.type == AttributeProto.GRAPH
    )


def node_parameters(node: NodeView, graph: GraphView, shapes: Shapes) -> Iterator[Operand]:
    """Yield the parameters that a node reads."""
    for slot, name in enumerate(node.inputs):
        if name not in graph.constants or shapes.types[name] in _NO_PARAMETER_TYPES:
            continue
        if node.op == "BatchNormalization" and slot in _BATCH_NORM_STATISTICS:
            continue
        yield Operand(name, node.index, slot)
    for name in node.captured:
        if name in graph.constants and shapes.types[name] not in _NO_PARAMETER_TYPES:
            yield Operand(name)


def node_macs(node: NodeView, graph: GraphView, dims_of: DimsOf) -> int:
    """Return the multiply-accumulates of one node; 0 for operators that are not counted."""
    form = _COUNTED.get((node.domain, node.op))
    if form is None:
        return 0
    kind, weight = form

    def shape(slot: int) -> Sequence[int]:
        operand = graph.operand(node, slot)
        return (operand and dims_of(operand)) or ()

    y = dims_of(Operand(node.outputs[0])) if node.outputs else None
    match kind:
        case "Conv" if y is not None and shape(weight):
            return math.prod(y) * math.prod(shape(weight)[1:])
        case "ConvTranspose" if shape(0) and shape(1):
            return math.prod(shape(0)) * math.prod(shape(1)[1:])
        case "Gemm" if y is not None and shape(0):
            return math.prod(y) * shape(0)[0 if node.attributes.get("transA", 0) else 1]
        case "MatMul" if y is not None and shape(0):
            return math.prod(y) * shape(0)[-1]
        case "LSTM" if shape(0) and shape(2):
            steps = math.prod(shape(0)[:2])
            return steps * (math.prod(shape(1)) + math.prod(shape(2)))
        case _ if y is not None and all(shape(slot) for slot in (0, 1)):
            return _macs_of_products(kind, node, [shape(slot) for slot in range(len(node.inputs))], y)
    return 0


def _macs_of_products(kind: str, node: NodeView, shapes: Sequence[Sequence[int]], y: Sequence[int]) -> int:
    """Return the multiply-accumulates of what multiplies two computed tensors, or may do so."""
    match kind:
        case "FusedMatMul":
            return math.prod(y) * shapes[0][turned_axes(node, "A", len(shapes[0]))[-1]]
        case "Einsum":
            return _einsum_macs(node, shapes)
        case "Attention":
            # What makes queries, keys and values; then scores, and the values that they weigh.
            return math.prod(shapes[0]) * shapes[1][-1] + 2 * math.prod(y) * shapes[0][-2]
        case "Scores" if len(shapes[1]) > 1:
            return (math.prod(shapes[0]) + math.prod(y)) * shapes[1][-2]
    return 0


def _einsum_macs(node: NodeView, shapes: Sequence[Sequence[int]]) -> int:
    """Return the multiply-accumulates of an Einsum as one loop over all its letters; 0 where it has an ellipsis."""
    terms = node.attributes["equation"].decode().replace(" ", "").partition("->")[0].split(",")
    if any("." in term or len(term) != len(dims) for term, dims in zip(terms, shapes, strict=True)):
        return 0
    sizes: dict[str, int] = {}
    for term, dims in zip(terms, shapes, strict=True):
        for letter, size in zip(term, dims, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return math.prod(sizes.values())
