"""A Gather that takes all of a flattened value in order gives way to a Reshape; any other stays."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnxfuse
from onnxfuse.graph.in_order import with_reads_in_order_reshaped
from tests.builders import run_ort
from tests.laws import assert_same_outputs, assert_valid

FEEDS = {"x": np.random.default_rng(4).standard_normal((2, 3, 4, 4)).astype(np.float32)}


def strided(*, stride: int = 8, step: int = 1) -> onnx.ModelProto:
    """Pool a map and view it by its strides, as the torch.export exporter writes it; then a layer."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]> net (float[n, 3, 4, 4] x) => (float[n, 2, 1, 1] y)
        <int64[1] flat = {{-1}}, int64 zero = {{0}}, int64 one = {{1}}, int64 stride = {{{stride}}},
         int64[1] last = {{1}}, int64[2] behind = {{2, 3}}, int64[3] around = {{0, 2, 3}},
         int64[8] within = {{0, 1, 2, 3, 4, 5, 6, {6 + step}}}>
        {{
            h = Conv(x, w)  r = Relu(h)  pooled = GlobalAveragePool(r)
            all = Reshape(pooled, flat)
            sizes = Shape(x)  n = Gather(sizes, zero)  rows = Range(zero, n, one)  starts = Mul(rows, stride)
            column = Unsqueeze(starts, last)  column2 = Unsqueeze(column, behind)
            row = Unsqueeze(within, around)
            places = Add(column2, row)
            viewed = Gather(all, places)
            y = Conv(viewed, v)
        }}""")
    rng = np.random.default_rng(6)
    for name, dims in (("w", (8, 3, 1, 1)), ("v", (2, 8, 1, 1))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(dims).astype(np.float32), name))
    return model


def test_a_reshape_stands_for_it() -> None:
    """The outputs are the same, what made the indices is gone, and the channels are free."""
    model = strided()
    before = model.SerializeToString()
    result = with_reads_in_order_reshaped(model)
    assert [node.op_type for node in result.graph.node][-4:] == ["GlobalAveragePool", "Reshape", "Reshape", "Conv"]
    assert not {"Range", "Gather"} & {node.op_type for node in result.graph.node}
    assert_valid(result)
    assert_same_outputs(run_ort(model, FEEDS), run_ort(result, FEEDS))
    assert model.SerializeToString() == before
    (group,) = (g for g in onnxfuse.inspect(model).groups if g.channels_before == 8)
    assert group.frozen is None
    small = onnxfuse.compress(model, ratio=0.5, method="prune", provider="cpu").model
    for samples in (1, 2):
        assert run_ort(small, {"x": FEEDS["x"][:samples]})["y"].shape == (samples, 2, 1, 1)


@pytest.mark.parametrize("how", [{"stride": 0}, {"step": 0}])
def test_what_takes_another_order_stays(how: dict[str, int]) -> None:
    """Of views that repeat something the same object comes back."""
    model = strided(**how)
    assert with_reads_in_order_reshaped(model) is model
