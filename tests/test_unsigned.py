"""Weights of bytes as unsigned ones: the same results, by ONNX's own reference, and nothing else changed."""

import numpy as np
import onnx
import pytest

from onnxfuse.graph.unsigned import with_unsigned_weights
from tests.builders import AnyArray, initializers, run_reference

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
# Networks on a uint8 x of shape (2, 3, 4, 4) or (2, 3), whose weights are as large as they can be.
NETWORKS = {
    "MatMulInteger": """g (uint8[2, 3] x) => (int32[2, 2] y) <int8[3, 2] w = {127, -128, 127, 3, 127, -5}>
        { y = MatMulInteger(x, w) }""",
    "MatMulInteger with zero points": """g (uint8[2, 3] x) => (int32[2, 2] y)
        <int8[3, 2] w = {127, -128, 127, 3, 127, -5}, uint8 a = {7}, int8 b = {-9}>
        { y = MatMulInteger(x, w, a, b) }""",
    "ConvInteger": """g (uint8[2, 3, 4, 4] x) => (int32[2, 1, 3, 3] y)
        <int8[1, 3, 2, 2] w = {127, 127, 127, -128, 127, 127, 1, -1, 127, 127, 127, 127}, uint8 a = {128}>
        { y = ConvInteger(x, w, a) }""",
    "QLinearMatMul": """g (uint8[2, 3] x) => (uint8[2, 2] y)
        <int8[3, 2] w = {127, -128, 127, 3, 127, -5}, float s = {0.01}, uint8 z = {3}, int8[2] b = {0, 0},
        float[2] t = {0.02, 0.03}, float o = {0.5}> { y = QLinearMatMul(x, s, z, w, t, b, o, z) }""",
    "QLinearConv": """g (uint8[2, 3, 4, 4] x) => (uint8[2, 1, 3, 3] y)
        <int8[1, 3, 2, 2] w = {127, 127, 127, -128, 127, 127, 1, -1, 127, 127, 127, 127}, float s = {0.01},
        uint8 z = {3}, int8 b = {0}, float o = {0.5}> { y = QLinearConv(x, s, z, w, s, b, o, z) }""",
    "a weight of two layers": """g (uint8[2, 3] x) => (int32[2, 2] y, int32[2, 2] v)
        <int8[3, 2] w = {127, -128, 127, 3, 127, -5}> { y = MatMulInteger(x, w) v = MatMulInteger(x, w) }""",
}
# What is not of unsigned inputs and stored signed weights stays as it is.
OTHERS = (
    "g (int8[2, 3] x) => (int32[2, 1] y) <int8[3, 1] w = {1, 2, 3}> { y = MatMulInteger(x, w) }",
    "g (uint8[2, 3] x) => (int32[2, 1] y) <uint8[3, 1] w = {1, 2, 3}> { y = MatMulInteger(x, w) }",
    "g (uint8[2, 3] x, int8[3, 1] w) => (int32[2, 1] y) { y = MatMulInteger(x, w) }",
    "g (float[2, 3] x) => (float[2, 3] y) { y = Relu(x) }",
)


def bytes_for(model: onnx.ModelProto) -> dict[str, AnyArray]:
    """Return inputs up to the largest byte."""
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    rows = np.random.default_rng(0).integers(0, 256, shape)
    rows.flat[0] = 255
    return {"x": rows.astype(np.uint8)}


@pytest.mark.parametrize("text", NETWORKS.values(), ids=NETWORKS)
def test_unsigned_weights_compute_the_same(text: str) -> None:
    """The reference finds the same to the bit; no weight that a layer reads is signed any more, and the model stays."""
    model = onnx.parser.parse_model(HEAD + text)
    before = model.SerializeToString()
    found = with_unsigned_weights(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(found, full_check=True)
    for name, wanted in run_reference(model, bytes_for(model)).items():
        np.testing.assert_array_equal(run_reference(found, bytes_for(model))[name], wanted)
    constants = initializers(found)
    read = [constants[name] for node in found.graph.node for name in node.input if name in constants]
    assert read
    assert not any(array.dtype == np.int8 for array in read)


@pytest.mark.parametrize("text", OTHERS)
def test_all_else_stays(text: str) -> None:
    """Signed inputs, unsigned or computed weights, and layers on floats need nothing."""
    model = onnx.parser.parse_model(HEAD + text)
    assert with_unsigned_weights(model) is model
