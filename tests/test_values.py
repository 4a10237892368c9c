"""Synthetic inputs: indices over a whole table, numbers that decide comparisons, batches of states."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxfuse.analysis import choose_samples, more_samples
from onnxfuse.config import Provider
from onnxfuse.graph.files import read_model
from onnxfuse.graph.view import GraphView
from onnxfuse.proof.random_samples import candidate_dims, synthetic_samples
from onnxfuse.proof.values import ValueHints, needed_sizes, value_hints
from tests.laws import analysis_of

RATE = 16_000
INT = TensorProto.INT64


def lookup_model(rows: int, *, behind: bool = False, axis: int = 0) -> onnx.ModelProto:
    """A table that is looked up with an input, straight or behind operators that pass it on."""
    shape = (rows, 3) if axis == 0 else (3, rows)
    table = numpy_helper.from_array(np.ones(shape, np.float32), "table")
    moved = numpy_helper.from_array(np.array([-1], np.int64), "flat")
    nodes = [
        helper.make_node("Cast", ["ids"], ["wide"], to=INT),
        helper.make_node("Reshape", ["wide", "flat"], ["moved"]),
        helper.make_node("Gather", ["table", "moved" if behind else "ids"], ["y"], axis=axis),
    ]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT32, ["batch", 40])]
    graph = helper.make_graph(nodes, "net", inputs, [onnx.ValueInfoProto(name="y")], [table, moved])
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def compared_model(op: str, *, length: int | str = 8, kernel: int = 5) -> onnx.ModelProto:
    """An If that takes one branch for one sample rate; the branches need inputs of different length."""
    rate = numpy_helper.from_array(np.array([RATE], np.int64), "rate")

    def branch(name: str, size: int) -> onnx.GraphProto:
        weight = numpy_helper.from_array(np.ones((2, 1, size), np.float32), f"{name}_w")
        node = helper.make_node("Conv", ["x", f"{name}_w"], [name])
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [out], [weight])

    branches = {"then_branch": branch("a", kernel), "else_branch": branch("b", 3)}
    node = helper.make_node("If", ["yes"], ["y"], name="choose")
    node.attribute.extend(helper.make_attribute(name, graph) for name, graph in branches.items())
    nodes = [
        helper.make_node("Reshape", ["sr", "one"], ["flat"]),
        helper.make_node(op, ["flat", "rate"], ["yes"]),
        node,
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, length]),
        helper.make_tensor_value_info("sr", INT, []),
    ]
    one = numpy_helper.from_array(np.array([1], np.int64), "one")
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "net", inputs, outputs, [rate, one])
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_indices_are_drawn_from_the_whole_table(axis: int, *, behind: bool) -> None:
    """Indices are drawn from the whole table that they look up, and never beyond it."""
    graph = GraphView(lookup_model(7, behind=behind, axis=axis))
    assert value_hints(graph, "ids") == ValueHints(below=7)
    drawn = synthetic_samples(graph, {"ids": (1, 40)}, 0, 8).arrays["ids"]
    assert set(drawn.ravel().tolist()) == set(range(7))
    assert drawn.dtype == np.int32


def test_a_table_of_one_row_is_looked_up_at_zero() -> None:
    """Where there is only one index, that is drawn."""
    graph = GraphView(lookup_model(1))
    assert not synthetic_samples(graph, {"ids": (1, 40)}, 0, 8).arrays["ids"].any()


@pytest.mark.parametrize(
    ("op", "numbers"), [("Equal", (RATE,)), ("Greater", (RATE - 1, RATE + 1)), ("Less", (RATE - 1, RATE + 1))]
)
def test_numbers_that_decide_comparisons_are_drawn(op: str, numbers: tuple[int, ...]) -> None:
    """Numbers that decide comparisons are drawn in turn with random ones, so that every branch is run."""
    source = read_model(compared_model(op))
    graph = GraphView(source.model)
    assert value_hints(graph, "sr").compared == tuple(map(float, numbers))
    samples, _ = choose_samples(source, graph, Provider.CPU, 0)
    assert samples is not None
    assert samples.compared
    many = more_samples(analysis_of(source.model), samples, 0)
    drawn = many.arrays["sr"].tolist()
    assert set(numbers) < set(drawn)
    assert {value for value in drawn if value not in numbers} <= {0, 1}


def test_a_size_is_chosen_that_every_branch_runs_with() -> None:
    """Of the sizes tried, the first that both branches run with is taken: 64 would do for one of them."""
    source = read_model(compared_model("Equal", length="samples", kernel=100))
    samples, _ = choose_samples(source, GraphView(source.model), Provider.CPU, 0)
    assert samples is not None
    assert {feeds["sr"].item() == RATE for feeds in samples.feeds()} == {True, False}
    assert samples.dims["x"] == (1, 1, 224)


def test_a_model_is_run_without_those_numbers_where_none_fits() -> None:
    """A branch that never runs does not keep the model from being run on the other one."""
    model = compared_model("Equal", length=4)
    source = read_model(model)
    samples, _ = choose_samples(source, GraphView(source.model), Provider.CPU, 0)
    assert samples is not None
    assert not samples.compared
    assert RATE not in samples.arrays["sr"]


def test_a_state_may_have_its_batch_second() -> None:
    """An unnamed dimension behind a stated one is tried as a batch, too: layers x batch x hidden size."""
    nodes = [helper.make_node("Identity", ["state"], ["y"]), helper.make_node("Identity", ["x"], ["z"])]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None]),
        helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, None, 5]),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "z")]
    model = helper.make_model(helper.make_graph(nodes, "net", inputs, outputs), ir_version=8)
    choices = list(candidate_dims(GraphView(model)))
    assert {"x": (1, 64), "state": (2, 1, 5)} in choices
    assert choices[0] == {"x": (1, 64), "state": (2, 64, 5)}
    assert len({str(choice) for choice in choices}) == len(choices)


def weighted_model(op: str, weight: tuple[int, ...], rank: int, **attributes: Any) -> onnx.ModelProto:
    """A node with a constant weight, behind one that subtracts a constant, on an input of open shape."""
    nodes = [
        helper.make_node("Sub", ["x", "mean"], ["moved"]),
        helper.make_node(op, ["moved", "w", *(["r"] if op == "LSTM" else [])], ["y"], **attributes),
    ]
    arrays = {"w": np.ones(weight, np.float32), "mean": np.ones((), np.float32)}
    if op == "LSTM":
        arrays["r"] = np.ones((weight[0], weight[1], weight[1] // 4), np.float32)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * rank)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "net", inputs, outputs, stored)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize(
    ("op", "weight", "rank", "attributes", "expected"),
    [
        ("Conv", (4, 3, 3, 3), 4, {}, (1, 3, 64, 64)),
        ("Conv", (4, 3, 3, 3), 4, {"group": 2}, (1, 6, 64, 64)),
        ("Conv", (4, 3, 300), 3, {}, (1, 3, 512)),
        ("Conv", (4, 3, 3000), 3, {}, (1, 3, 4096)),
        ("ConvTranspose", (5, 4, 2, 2), 4, {}, (1, 5, 64, 64)),
        ("Gemm", (13, 7), 2, {}, (1, 13)),
        ("Gemm", (7, 13), 2, {"transB": 1}, (1, 13)),
        ("Gemm", (13, 7), 2, {"transA": 1}, (13, 64)),
        ("MatMul", (13, 7), 3, {}, (1, 64, 13)),
        ("LSTM", (1, 32, 13), 3, {"hidden_size": 8}, (1, 64, 13)),
    ],
)
def test_sizes_that_weights_demand_are_taken(
    op: str, weight: tuple[int, ...], rank: int, attributes: dict[str, int], expected: tuple[int, ...]
) -> None:
    """Sizes that weights demand are read off them; long signals are tried where one dimension alone is open."""
    source = read_model(weighted_model(op, weight, rank, **attributes))
    samples, problem = choose_samples(source, GraphView(source.model), Provider.CPU, 0)
    assert samples is not None, problem
    assert samples.dims["x"][1:] == expected[1:]
    assert {"x": expected} in candidate_dims(GraphView(source.model))


def test_images_are_never_tried_at_the_length_of_signals() -> None:
    """Two open dimensions at once are only tried at sizes that run in little memory."""
    graph = GraphView(weighted_model("Conv", (4, 3, 3, 3), 4))
    assert max(choice["x"][2] for choice in candidate_dims(graph)) == 512


def test_sizes_are_not_read_through_what_changes_axes() -> None:
    """Behind an operator that moves axes nothing is known of the input's."""
    model = weighted_model("Conv", (4, 3, 3, 3), 4)
    model.graph.node[0].CopyFrom(helper.make_node("Transpose", ["x"], ["moved"], perm=[0, 3, 1, 2]))
    assert needed_sizes(GraphView(model), "x") == {}
