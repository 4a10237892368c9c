"""Products of bytes that don't overflow, for processors on which those of unsigned and signed ones do.

Without VNNI instructions ONNX Runtime adds two products of an unsigned and a signed byte in 16 bits, and what is more
than these hold is cut off: in another way for every order of channels, so that a proof fails that holds. Products of
unsigned bytes alone are exact. So weights of int8 become uint8: 128 is added to them, and to their zero points.
"""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnxfuse.graph.view import GraphView, NodeView

__all__ = ["with_unsigned_weights"]

# Where integer layers have the zero point of their input (None if they make it), their weight and its zero point.
_SLOTS: dict[str, tuple[int | None, int, int]] = {
    "ConvInteger": (2, 1, 3),
    "DynamicQuantizeMatMul": (None, 1, 3),
    "MatMulInteger": (2, 1, 3),
    "MatMulIntegerToFloat": (4, 1, 5),
    "QAttention": (6, 1, 7),
    "QGemm": (2, 3, 5),
    "QLinearConv": (2, 3, 5),
    "QLinearMatMul": (2, 3, 5),
}
_SHIFT = 128


def with_unsigned_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model that computes the same with weights of uint8 where unsigned inputs meet stored ones of int8.

    Args:
        model: The model; not changed, and returned itself where there is nothing to do.

    Example:
        >>> text = '''<ir_version: 8, opset_import: ["" : 17]>
        ...    g (uint8[1, 1] x) => (int32[1, 1] y) <int8[1, 1] w = {-3}> { y = MatMulInteger(x, w) }'''
        >>> found = with_unsigned_weights(onnx.parser.parse_model(text))
        >>> [numpy_helper.to_array(tensor).item() for tensor in found.graph.initializer[1:]]
        [125, 128]
    """
    if not any(node.op_type in _SLOTS for node in model.graph.node):
        return model
    graph = GraphView(model)
    found = onnx.ModelProto()
    found.CopyFrom(model)
    made: set[str] = set()
    for node in _mixed(graph):
        _, weight, zero = _SLOTS[node.op]
        inputs = found.graph.node[node.position].input
        inputs.extend([""] * (zero + 1 - len(inputs)))
        for slot in (weight, zero):
            name = inputs[slot]
            shifted = f"{name}<unsigned>" if name else "zero<unsigned>"
            if shifted not in made:
                array = graph.array(name).astype(np.int16) if name else np.zeros((), np.int16)
                found.graph.initializer.append(numpy_helper.from_array((array + _SHIFT).astype(np.uint8), shifted))
                made.add(shifted)
            inputs[slot] = shifted
    return found if made else model


def _mixed(graph: GraphView) -> Iterator[NodeView]:
    """Yield the integer layers whose inputs are unsigned, and whose weights are stored as int8."""
    for node in graph.nodes:
        if node.op not in _SLOTS:
            continue
        given, weight, zero = _SLOTS[node.op]
        zeros = [node.inputs[zero]] if len(node.inputs) > zero and node.inputs[zero] else []
        stored = [node.inputs[weight], *zeros]
        if not all(name in graph.constants and graph.constants[name].data_type == TensorProto.INT8 for name in stored):
            continue
        if (
            given is None
            or _is_unsigned(graph, node.inputs[0])
            or (len(node.inputs) > given and _is_unsigned(graph, node.inputs[given]))
        ):
            yield node


def _is_unsigned(graph: GraphView, name: str) -> bool:
    """Whether a value is known to be of uint8."""
    if name in graph.constants:
        return bool(graph.constants[name].data_type == TensorProto.UINT8)
    if name in graph.inputs:
        return bool(graph.inputs[name].type.tensor_type.elem_type == TensorProto.UINT8)
    made = graph.producers.get(name)
    if made is None or graph.nodes[made].op != "DynamicQuantizeLinear":
        return False
    return name != graph.nodes[made].outputs[1]
