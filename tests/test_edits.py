"""Rewriting a graph: what is edited changes, everything else stays byte for byte."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import onnxfuse
from onnxfuse.graph.edits import SetAttribute, SetInput, apply_edits
from onnxfuse.graph.view import GraphView
from tests.conftest import MakeMlp

SHARED = """<ir_version: 8, opset_import: ["" : 17]>
g (float[2, 2] x) => (float[2, 2] y, float[2, 2] z)
<float[2, 2] w = {1, 2, 3, 4}>
{
  y = MatMul (x, w)
  z = MatMul (x, w)
}"""

CONSTANTS = """<ir_version: 8, opset_import: ["" : 17]>
g (float[2, 2] x) => (float[2, 2] y)
{
  w = Constant <value = float[2, 2] {1, 2, 3, 4}> ()
  h = MatMul (x, w)
  one = Constant <value_float = 1.0> ()
  y = Add (h, one)
}"""

COMPUTED = """<ir_version: 8, opset_import: ["" : 17]>
g (float[2, 2] x) => (float[2, 2] y)
<float[2, 2] w = {1, 2, 3, 4}, float[2, 2] unread = {9, 9, 9, 9}>
{
  negative = Neg (w)
  absolute = Abs (negative)
  y = MatMul (x, absolute)
}"""


def parsed(text: str) -> GraphView:
    """Read a model from ONNX's text form."""
    return GraphView(onnx.parser.parse_model(text))


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """Return the initializers by name."""
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def matrix(*values: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Make a matrix of two columns."""
    return np.array(values, np.float32).reshape(-1, 2)


def assert_same_but(model: onnx.ModelProto, original: onnx.ModelProto, **replaced: bytes) -> None:
    """Assert that two models are the same bytes, but for the weights named."""
    copy, old = onnx.ModelProto(), onnx.ModelProto()
    copy.CopyFrom(model)
    old.CopyFrom(original)
    for tensor in copy.graph.initializer:
        if tensor.name in replaced:
            assert tensor.raw_data == replaced[tensor.name]
            tensor.CopyFrom(next(t for t in old.graph.initializer if t.name == tensor.name))
    assert copy.SerializeToString(deterministic=True) == old.SerializeToString(deterministic=True)


def test_the_check_for_equal_models_can_fail() -> None:
    """The check for equal models can fail."""
    first, second = parsed(SHARED).model, parsed(SHARED).model
    assert_same_but(first, second)
    first.graph.node[0].doc_string = "changed"
    with pytest.raises(AssertionError):
        assert_same_but(first, second)
    second.graph.node[0].doc_string = "changed"
    first.graph.initializer[0].CopyFrom(numpy_helper.from_array(matrix(1, 2, 3, 5), "w"))
    with pytest.raises(AssertionError):
        assert_same_but(first, second)
    with pytest.raises(AssertionError):
        assert_same_but(first, second, w=matrix(1, 2, 3, 4).tobytes())
    assert_same_but(first, second, w=matrix(1, 2, 3, 5).tobytes())


@pytest.mark.parametrize("text", [SHARED, CONSTANTS, COMPUTED])
def test_no_edits_no_change(text: str) -> None:
    """No edits no change."""
    graph = parsed(text)
    before = graph.model.SerializeToString()
    result = apply_edits(graph, [], {})
    assert result.SerializeToString() == before
    assert result is not graph.model


def test_the_original_is_not_changed() -> None:
    """The original is not changed."""
    graph = parsed(SHARED)
    before = graph.model.SerializeToString()
    apply_edits(graph, [SetInput(0, 1, matrix(5, 6, 7, 8))], {"y": {1: 2}})
    assert graph.model.SerializeToString() == before


def test_readers_that_agree_keep_one_tensor() -> None:
    """Readers that agree keep one tensor."""
    graph = parsed(SHARED)
    value = matrix(5, 6, 7, 8)
    result = apply_edits(graph, [SetInput(0, 1, value), SetInput(1, 1, value.copy())], {})
    assert_same_but(result, graph.model, w=value.tobytes())


def test_readers_that_differ_get_tensors_of_their_own() -> None:
    """Readers that differ get tensors of their own."""
    graph = parsed(SHARED)
    result = apply_edits(graph, [SetInput(0, 1, matrix(5, 6, 7, 8)), SetInput(1, 1, matrix(1, 1, 1, 1))], {})
    assert [list(node.input) for node in result.graph.node] == [["x", "w_fused"], ["x", "w_fused_1"]]
    found = constants(result)
    assert sorted(found) == ["w_fused", "w_fused_1"]  # nobody reads w any more
    assert found["w_fused"].tolist() == [[5, 6], [7, 8]]
    assert found["w_fused_1"].tolist() == [[1, 1], [1, 1]]


def test_a_reader_that_is_not_edited_keeps_the_old_tensor() -> None:
    """A reader that is not edited keeps the old tensor."""
    graph = parsed(SHARED)
    result = apply_edits(graph, [SetInput(1, 1, matrix(5, 6, 7, 8))], {})
    assert [list(node.input) for node in result.graph.node] == [["x", "w"], ["x", "w_fused"]]
    assert constants(result)["w"].tolist() == [[1, 2], [3, 4]]


def test_a_new_name_is_free() -> None:
    """A new name is free."""
    graph = parsed(SHARED.replace("z", "w_fused"))
    result = apply_edits(graph, [SetInput(0, 1, matrix(5, 6, 7, 8))], {})
    assert list(result.graph.node[0].input) == ["x", "w_fused_1"]
    onnx.checker.check_model(result, full_check=True)


def test_a_weight_that_is_an_output_too_is_not_replaced() -> None:
    """A weight that is an output too is not replaced."""
    graph = parsed(SHARED.replace("float[2, 2] z", "float[2, 2] w").replace("z = MatMul (x, w)", ""))
    result = apply_edits(graph, [SetInput(0, 1, matrix(5, 6, 7, 8))], {})
    assert constants(result)["w"].tolist() == [[1, 2], [3, 4]]
    assert list(result.graph.node[0].input) == ["x", "w_fused"]


def test_the_tensor_of_a_constant_node_is_replaced_in_its_place() -> None:
    """The tensor of a constant node is replaced in its place."""
    graph = parsed(CONSTANTS)
    result = apply_edits(graph, [SetInput(0, 1, matrix(5, 6, 7, 8))], {})
    assert [n.op_type for n in result.graph.node] == ["Constant", "MatMul", "Constant", "Add"]
    assert numpy_helper.to_array(result.graph.node[0].attribute[0].t).tolist() == [[5, 6], [7, 8]]
    assert len(result.graph.initializer) == 0
    untouched = [result.graph.node[i].SerializeToString() for i in (1, 2, 3)]
    assert untouched == [graph.model.graph.node[i].SerializeToString() for i in (1, 2, 3)]


def test_a_constant_of_one_number_is_replaced() -> None:
    """A constant of one number is replaced."""
    graph = parsed(CONSTANTS)
    result = apply_edits(graph, [SetInput(1, 1, np.array([2, 3], np.float32))], {})
    attribute = result.graph.node[2].attribute[0]
    assert (attribute.name, numpy_helper.to_array(attribute.t).tolist()) == ("value", [2, 3])
    onnx.checker.check_model(result, full_check=True)


def test_what_loses_its_last_reader_is_dropped() -> None:
    """What loses its last reader is dropped."""
    graph = parsed(COMPUTED)
    result = apply_edits(graph, [SetInput(2, 1, matrix(5, 6, 7, 8))], {})
    assert [n.op_type for n in result.graph.node] == ["MatMul"]
    # What nobody read before stays: that it is there was the user's choice.
    assert sorted(constants(result)) == ["absolute_fused", "unread"]


@pytest.mark.parametrize(("bounds", "expected"), [("", [2, 3]), ("<start = 1>", [3]), ("<end = -1>", [2])])
def test_a_weight_is_not_kept_for_its_shape_alone(bounds: str, expected: list[int]) -> None:
    """What asks a weight for nothing but its shape goes on to get the one it had, and the old weight goes."""
    graph = parsed(f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 2] x) => (float[1, 3] y, int64[n] dims)
        <float[2, 3] w = {{1, 2, 3, 4, 5, 6}}>
        {{ y = MatMul (x, w)  dims = Shape {bounds} (w) }}""")
    fused = np.array([[7, 8, 9]], np.float32)
    result = apply_edits(graph, [SetInput(0, 1, fused)], {})
    assert {name: value.tolist() for name, value in constants(result).items()} == {"w_fused": [[7, 8, 9]]}
    feeds = {"x": np.ones((1, 1), np.float32)}
    del result.graph.input[0].type.tensor_type.shape.dim[1]
    y, dims = map(np.asarray, ReferenceEvaluator(result).run(None, feeds))
    assert (y.tolist(), dims.tolist()) == ([[7, 8, 9]], expected)


def test_a_weight_with_another_reader_stays_beside_its_shape() -> None:
    """Where the old weight stays anyway, who asks for its shape does so as before."""
    graph = parsed("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 2] x) => (float[2, 2] y, float[2, 2] z, int64[2] dims)
        <float[2, 2] w = {1, 2, 3, 4}>
        { y = MatMul (x, w)  z = MatMul (x, w)  dims = Shape (w) }""")
    result = apply_edits(graph, [SetInput(0, 1, matrix(5, 6, 7, 8))], {})
    assert set(constants(result)) == {"w", "w_fused"}
    assert [node.op_type for node in result.graph.node] == ["MatMul", "MatMul", "Shape"]


@pytest.mark.parametrize("name", ["digits_bn", "digits_folded", "digits_dynamo", "digits_dynamo_bn"])
def test_what_is_written_has_the_weights_that_were_counted(models: Path, name: str) -> None:
    """However a network was exported, nothing of what was fused stays in the file beside its successor."""
    files = (models / f"{one}.onnx" for one in ("digits_bn", name))
    plain, result = (onnxfuse.compress(file, method="prune", scope="hidden", ratio=0.25) for file in files)
    assert result.report.after.parameters < 0.8 * result.report.before.parameters
    shapes = [sorted(v.shape for v in constants(m).values() if v.ndim > 1) for m in (plain.model, result.model)]
    assert shapes[0] == shapes[1]


def test_attributes_are_set() -> None:
    """Attributes are set."""
    text = SHARED.replace("z = MatMul (x, w)", "z = Softmax <axis = 0> (x)")
    graph = parsed(text)
    result = apply_edits(graph, [SetAttribute(1, "axis", 1), SetAttribute(0, "extra", [1, 2])], {})
    assert helper.get_attribute_value(result.graph.node[1].attribute[0]) == 1
    assert helper.get_attribute_value(result.graph.node[0].attribute[0]) == [1, 2]


def test_a_left_out_input_can_be_given() -> None:
    """A left out input can be given."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y) <float[1, 1, 1, 1] w = {2}> { y = Conv (x, w) }"""
    graph = parsed(text)
    result = apply_edits(graph, [SetInput(0, 2, np.array([3], np.float32))], {})
    assert list(result.graph.node[0].input)[:2] == ["x", "w"]
    assert constants(result)[result.graph.node[0].input[2]].tolist() == [3]
    onnx.checker.check_model(result, full_check=True)


DTYPES = {"FLOAT": TensorProto.FLOAT, "FLOAT16": TensorProto.FLOAT16, "BFLOAT16": TensorProto.BFLOAT16}
DTYPES["DOUBLE"] = TensorProto.DOUBLE


@pytest.mark.parametrize("name", DTYPES)
def test_data_types_stay(make_mlp: MakeMlp, name: str) -> None:
    """Data types stay."""
    graph = GraphView(make_mlp(DTYPES[name]))
    value = graph.array("a")[:, :3].copy()
    shared = graph.array("b")[:3].copy()
    result = apply_edits(graph, [SetInput(0, 1, value), SetInput(2, 1, shared)], {})
    assert [t.data_type for t in result.graph.initializer] == [DTYPES[name]] * 2
    assert constants(result)["a"].tobytes() == value.tobytes()
    assert constants(result)["b"].shape == (3, 4)


@pytest.mark.parametrize("name", DTYPES)
def test_data_types_stay_when_a_weight_is_no_longer_shared(name: str) -> None:
    """Data types stay when a weight is no longer shared."""
    kind = helper.tensor_dtype_to_np_dtype(DTYPES[name])
    model = parsed(SHARED).model
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(matrix(1, 2, 3, 4).astype(kind), "w"))
    graph = GraphView(model)
    result = apply_edits(graph, [SetInput(0, 1, matrix(5, 6, 7, 8).astype(kind))], {})
    assert {t.name: t.data_type for t in result.graph.initializer} == {"w": DTYPES[name], "w_fused": DTYPES[name]}


def test_an_initializer_that_is_an_input_stays_one() -> None:
    """An initializer that is an input stays one."""
    graph = parsed(SHARED)
    graph.model.ir_version = 3
    graph.model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 2]))
    old = GraphView(graph.model)
    value = np.ones((2, 1), np.float32)
    same = apply_edits(old, [SetInput(0, 1, value), SetInput(1, 1, value)], {})
    assert [i.name for i in same.graph.input] == ["x", "w"]
    assert [d.dim_value for d in same.graph.input[1].type.tensor_type.shape.dim] == [2, 1]
    other = apply_edits(old, [SetInput(0, 1, value)], {})
    assert [i.name for i in other.graph.input] == ["x", "w", "w_fused"]
    assert [d.dim_value for d in other.graph.input[1].type.tensor_type.shape.dim] == [2, 2]
    assert [d.dim_value for d in other.graph.input[2].type.tensor_type.shape.dim] == [2, 1]


def decorated(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put something into every field that a rewriter likes to lose."""
    model.producer_name, model.producer_version, model.domain, model.model_version = "trainer", "1.2", "org.test", 7
    model.doc_string = "a model"
    model.metadata_props.add(key="author", value="somebody")
    model.graph.doc_string = "a graph"
    model.graph.metadata_props.add(key="graph", value="kept")
    for i, node in enumerate(model.graph.node):
        node.doc_string = f"node {i}"
        node.metadata_props.add(key="namespace", value=f"layer{i}")
    for tensor in model.graph.initializer:
        tensor.doc_string = f"weight {tensor.name}"
    note = model.graph.quantization_annotation.add(tensor_name="h")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="a")
    model.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["n", 6]))
    model.graph.value_info.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, ["n", 6]))
    model.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, [8, 6]))
    return model


def test_everything_around_the_weights_stays(make_mlp: MakeMlp) -> None:
    """Everything around the weights stays."""
    graph = GraphView(decorated(make_mlp()))
    a, b = graph.array("a") + 1, graph.array("b") * 2
    result = apply_edits(graph, [SetInput(0, 1, a), SetInput(2, 1, b)], {})
    # The weights' own notes stay as well, though the tensors are new.
    assert [t.doc_string for t in result.graph.initializer] == ["weight a", "weight b"]
    assert_same_but(result, graph.model, a=a.tobytes(), b=b.tobytes())


def stated(model: onnx.ModelProto) -> Mapping[str, list[int | str]]:
    """Return the shapes that a model states for values on the way."""
    return {
        info.name: [d.dim_value or d.dim_param for d in info.type.tensor_type.shape.dim]
        for info in model.graph.value_info
    }


def test_stated_shapes_are_kept_or_updated(make_mlp: MakeMlp) -> None:
    """Stated shapes are kept or updated."""
    graph = GraphView(decorated(make_mlp()))
    edits = [SetInput(0, 1, graph.array("a")[:, :3].copy()), SetInput(2, 1, graph.array("b")[:3].copy())]
    result = apply_edits(graph, edits, {"h": {1: 3}, "r": {1: 3}})
    assert stated(result) == {"h": ["n", 3], "r": ["n", 3], "a": [8, 3]}
    onnx.checker.check_model(result, full_check=True)


def test_only_sizes_that_change_are_stated_anew(make_mlp: MakeMlp) -> None:
    """What an exporter states wrongly of an axis that does not change stays, beside the size of one that does."""
    original = make_mlp()
    for name, size in (("h", 7), ("r", 7)):
        original.graph.value_info.append(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, 6]))
    result = onnxfuse.compress(original, ratio=0.5).model
    assert stated(result) == {"h": [7, 3], "r": [7, 3]}


def test_a_whole_compression_keeps_everything_around_the_weights(make_mlp: MakeMlp) -> None:
    """A whole compression keeps everything around the weights."""
    original = decorated(make_mlp())
    result = onnxfuse.compress(original, ratio=0.5).model
    assert stated(result) == {"h": ["n", 3], "r": ["n", 3], "a": [8, 3]}
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string", "ir_version"):
        assert getattr(result, field) == getattr(original, field)
    assert {p.key: p.value for p in result.metadata_props}["author"] == "somebody"
    assert result.graph.metadata_props == original.graph.metadata_props
    assert result.graph.quantization_annotation == original.graph.quantization_annotation
    assert result.graph.node == original.graph.node
    assert result.graph.input == original.graph.input
    assert result.graph.output == original.graph.output
    assert result.opset_import == original.opset_import


def test_ratio_zero_changes_only_the_metadata(digits: Path) -> None:
    """Ratio zero changes only the metadata."""
    original = onnx.load(digits)
    result = onnxfuse.compress(digits, ratio=0).model
    kept = [p for p in result.metadata_props if not p.key.startswith("onnxfuse.")]
    assert len(result.metadata_props) == len(kept) + 2
    del result.metadata_props[:]
    result.metadata_props.extend(kept)
    assert result.SerializeToString() == original.SerializeToString()


def test_unsorted_nodes_are_sorted(make_mlp: MakeMlp) -> None:
    """Unsorted nodes are sorted."""
    model = make_mlp()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    graph = GraphView(model)
    assert not graph.is_sorted
    result = apply_edits(graph, [], {})
    assert [n.name for n in result.graph.node] == ["first", "relu", "second"]
    onnx.checker.check_model(result, full_check=True)
    edited = apply_edits(graph, [SetInput(0, 1, graph.array("a") + 1)], {})
    assert [n.name for n in edited.graph.node] == ["first", "relu", "second"]
    assert constants(edited)["a"].tobytes() == (graph.array("a") + 1).tobytes()


def test_unsorted_nodes_that_leave_their_first_output_out_are_sorted() -> None:
    """Unsorted nodes that leave their first output out are sorted."""
    w, r = np.ones((1, 12, 2), np.float32), np.ones((1, 12, 3), np.float32)
    nodes = [
        helper.make_node("Identity", ["second"], ["last"], name="last"),
        helper.make_node("LSTM", ["first", "r", "r"], ["", "second"], name="second", hidden_size=3),
        helper.make_node("LSTM", ["x", "w", "r"], ["", "first"], name="first", hidden_size=3),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 2])
    y = helper.make_tensor_value_info("last", TensorProto.FLOAT, [1, 1, 3])
    stored = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(r, "r")]
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    result = apply_edits(GraphView(model), [], {})
    assert [n.name for n in result.graph.node] == ["first", "second", "last"]


def test_external_data_is_read_and_written_inside(make_mlp: MakeMlp, tmp_path: Path) -> None:
    """External data is read and written inside."""
    model = make_mlp()
    path = tmp_path / "outside.onnx"
    # Saving moves the weights out of the model that is saved.
    onnx.save_model(make_mlp(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    outside = onnxfuse.compress(path, tmp_path / "small.onnx", ratio=0.5)
    inside = onnxfuse.compress(model, ratio=0.5)
    assert [t.raw_data for t in outside.model.graph.initializer] == [t.raw_data for t in inside.model.graph.initializer]
    assert outside.report.before.bytes == sum(len(data) for data in before.values())
    assert {file.name for file in tmp_path.iterdir()} == {"outside.onnx", "weights.bin", "small.onnx"}
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())
    onnx.checker.check_model(str(tmp_path / "small.onnx"), full_check=True)


def searches(layers: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Replace every weight of a chain of layers; count how often the whole graph is gone through."""
    calls: list[int] = []
    search = gs.Graph.tensors

    def counted(graph: Any, *given: Any, **named: Any) -> Any:
        calls.append(1)
        return search(graph, *given, **named)

    names = ["x", *(f"h{i}" for i in range(layers))]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(layers)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in (names[0], names[-1])]
    weights = [numpy_helper.from_array(matrix(1, 2, 3, 4), f"w{i}") for i in range(layers)]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], weights))
    graph = GraphView(model)
    with monkeypatch.context() as patch:
        patch.setattr(gs.Graph, "tensors", counted)
        changed = apply_edits(graph, [SetInput(i, 1, matrix(5, 6, 7, 8)) for i in range(layers)], {})
    assert all((value == matrix(5, 6, 7, 8)).all() for value in constants(changed).values())
    return len(calls)


def test_the_graph_is_not_searched_for_every_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    """How often the whole graph is gone through does not grow with the edits, so time grows with the nodes only."""
    assert searches(3, monkeypatch) == searches(12, monkeypatch) > 0
