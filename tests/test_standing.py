"""Weights that are computed from stored ones alone are stored; what is rearranged, replaceable or would grow is not."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnxfuse
from onnxfuse.graph.standing import with_standing_weights_stored
from tests.builders import run_ort
from tests.laws import assert_same_outputs, assert_valid

FEEDS = {"x": np.random.default_rng(4).standard_normal((2, 48, 5, 5)).astype(np.float32)}
# As exporters write weight standardisation: a normalisation with statistics of its own over the flattened filters.
STANDARDISED = """
    f = Reshape(w, flat)
    n, m1, v1 = BatchNormalization <training_mode = 1, epsilon = 0.001> (f, gain, none, mean, variance)
    s = Reshape(n, filters)
"""
# As weight normalisation is written: the filters over their length.
NORMALISED = """
    square = Mul(w, w)  sum = ReduceSum(square, along)  length = Sqrt(sum)  s0 = Div(w, length)  s = Mul(s0, scale)
"""


def network(weight: str, layers: str = "a = Conv(x, s)  b = Relu(a)  y = Conv(b, v)") -> onnx.ModelProto:
    """Make two layers, the first with a weight that is computed."""
    rng = np.random.default_rng(6)
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]> net (float[n, 48, 5, 5] x) => (float[n, 3, 5, 5] y)
        <int64[3] flat = {{1, 96, -1}}, int64[4] filters = {{96, 48, 1, 1}}, int64[1] along = {{1}}>
        {{ {weight} {layers} }}""")
    arrays = {
        "w": rng.standard_normal((96, 48, 1, 1)),
        "v": rng.standard_normal((3, 96, 1, 1)),
        "gain": rng.uniform(0.5, 1.5, 96),
        "scale": rng.uniform(0.5, 1.5, (96, 1, 1, 1)),
        "none": np.zeros(96),
        "mean": np.zeros(96),
        "variance": np.ones(96),
    }
    model.graph.initializer.extend(numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items())
    return model


def kinds(model: onnx.ModelProto) -> list[str]:
    """Return the operators."""
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("weight", [STANDARDISED, NORMALISED])
def test_the_weight_is_stored(weight: str) -> None:
    """Nothing is left of the computation, the outputs are the same, and the channels are free."""
    model = network(weight)
    before = model.SerializeToString()
    result = with_standing_weights_stored(model)
    assert set(kinds(result)) <= {"Reshape", "Conv", "Relu"}
    assert "w" not in {t.name for t in result.graph.initializer}
    assert_valid(result)
    assert_same_outputs(run_ort(model, FEEDS), run_ort(result, FEEDS))
    assert model.SerializeToString() == before
    (group,) = (g for g in onnxfuse.inspect(model).groups if g.channels_before == 96)
    assert group.frozen is None
    compressed = onnxfuse.compress(model, ratio=0.5, method="prune", provider="cpu")
    assert compressed.report.after.parameters < 0.6 * (96 * 48 + 3 * 96)


def test_two_layers_that_compute_it_alike_share_it() -> None:
    """A layer that is applied twice has its weight once."""
    again = """
        f2 = Reshape(w, flat)
        n2, m2, v2 = BatchNormalization <training_mode = 1, epsilon = 0.001> (f2, gain, none, mean, variance)
        s2 = Reshape(n2, filters)
    """
    layers = "a = Conv(x, s)  c = Neg(x)  d = Conv(c, s2)  e = Tanh(d)  b = Add(a, e)  y = Conv(b, v)"
    model = network(STANDARDISED + again, layers)
    result = with_standing_weights_stored(model)
    assert "BatchNormalization" not in kinds(result)
    assert sum(len(t.dims) == 3 and t.data_type == onnx.TensorProto.FLOAT for t in result.graph.initializer) == 1
    assert_same_outputs(run_ort(model, FEEDS), run_ort(result, FEEDS))


def test_what_stays() -> None:
    """What is only rearranged, may be replaced by a caller, or is read in another way too."""
    rearranged = network("s1 = Transpose <perm = [0, 1, 3, 2]> (w)  s = Identity(s1)")
    replaceable = network(NORMALISED)
    replaceable.graph.input.append(helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [96, 48, 1, 1]))
    read_elsewhere = network(NORMALISED, "a = Conv(x, s)  b = Relu(a)  c = Conv(x, w)  d = Add(b, c)  y = Conv(d, v)")
    growing = network("s1 = Add(column, row)  s = Reshape(s1, filters)")
    for name, dims in (("column", (96, 1)), ("row", (1, 48))):
        growing.graph.initializer.append(numpy_helper.from_array(np.ones(dims, np.float32), name))
    for model in (rearranged, replaceable, read_elsewhere, growing):
        assert with_standing_weights_stored(model) is model
