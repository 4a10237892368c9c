"""Samples: which arrays fit which inputs, how they are cut into runs, and what synthetic ones are like."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import onnxfuse
from onnxfuse.analysis import choose_samples
from onnxfuse.arrays import is_finite
from onnxfuse.config import Provider
from onnxfuse.errors import DataError, UnsupportedGraphError
from onnxfuse.graph.files import read_model
from onnxfuse.graph.view import GraphView
from onnxfuse.proof.random_samples import candidate_dims, feeds_at_other_sizes, synthetic_samples
from onnxfuse.proof.samples import load_samples, read_arrays

Dims = Sequence[int | str] | None


def view(*inputs: tuple[str, int, Dims]) -> GraphView:
    """Make a graph of nothing but inputs."""
    infos = [helper.make_tensor_value_info(name, kind, dims) for name, kind, dims in inputs]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name, _, _ in inputs]
    outputs = [helper.make_tensor_value_info(f"{name}_out", kind, dims) for name, kind, dims in inputs]
    return GraphView(helper.make_model(helper.make_graph(nodes, "g", infos, outputs), ir_version=8))


def numbers(*shape: int, kind: Any = np.float32) -> np.ndarray[Any, np.dtype[Any]]:
    """Make an array of 0, 1, 2 and so on."""
    return np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(kind)


F = TensorProto.FLOAT


def test_samples_are_cut_into_runs() -> None:
    """Samples are cut into runs."""
    x = numbers(6, 3)
    samples = load_samples({"x": x}, view(("x", F, ["n", 3])))
    runs = list(samples.feeds())
    assert samples.count == 6
    assert np.concatenate([run["x"] for run in runs]).tolist() == x.tolist()
    assert samples.origin == "6 samples from the arrays given"


@pytest.mark.parametrize("count", [1, 2, 7, 64, 100, 128])
def test_no_sample_is_left_out_of_an_open_batch(count: int) -> None:
    """No sample is left out of an open batch."""
    samples = load_samples({"x": numbers(count, 2)}, view(("x", F, ["n", 2])))
    runs = [run["x"] for run in samples.feeds()]
    assert all(1 <= len(run) <= 64 for run in runs)
    assert sum(map(len, runs)) == count


@pytest.mark.parametrize("count", [97, 101, 509])
def test_a_comparison_leaves_no_sample_out(count: int) -> None:
    """Samples that fill no run come last, in a smaller one, for a comparison; a calibration leaves them out."""
    x = numbers(count, 2)
    samples = load_samples({"x": x}, view(("x", F, ["n", 2])))
    assert samples.count == sum(len(run["x"]) for run in samples.feeds())
    assert samples.count > count - 8
    runs = [run["x"] for run in samples.feeds(rest=True)]
    np.testing.assert_array_equal(np.concatenate(runs), x)
    assert {len(run) for run in runs[:-1]} == {samples.batch}
    assert samples.total == count
    assert samples.origin == f"{count} samples from the arrays given"


def test_what_fills_no_stated_batch_is_left_out_of_comparisons_too() -> None:
    """A network for four samples at once can't take two."""
    samples = load_samples({"x": numbers(10, 3)}, view(("x", F, [4, 3])))
    assert [len(run["x"]) for run in samples.feeds(rest=True)] == [4, 4]
    assert samples.total == samples.count == 8


def test_a_stated_batch_is_kept() -> None:
    """A stated batch is kept."""
    samples = load_samples({"x": numbers(10, 3)}, view(("x", F, [4, 3])))
    runs = [run["x"] for run in samples.feeds()]
    assert [run.shape for run in runs] == [(4, 3), (4, 3)]
    assert samples.count == 8
    assert samples.origin == "10 samples from the arrays given, 8 of them in full batches of 4"


def test_too_few_samples_for_a_stated_batch() -> None:
    """Too few samples for a stated batch."""
    with pytest.raises(DataError, match="3 samples, but the model takes 4 at a time") as caught:
        load_samples({"x": numbers(3, 3)}, view(("x", F, [4, 3])))
    assert caught.value.mend == "give a multiple of 4 samples"


def test_an_axis_more_than_the_input_is_one_run_each() -> None:
    """An axis more than the input is one run each."""
    x = numbers(5, 4, 3)
    samples = load_samples({"x": x}, view(("x", F, [4, 3])))
    runs = [run["x"] for run in samples.feeds()]
    assert np.stack(runs).tolist() == x.tolist()


def test_scalars() -> None:
    """Scalars."""
    graph = view(("rate", TensorProto.INT64, []), ("x", F, [1, 2]))
    samples = load_samples({"rate": numbers(3, kind=np.int64), "x": numbers(3, 2)}, graph)
    runs = list(samples.feeds())
    assert [run["rate"].shape for run in runs] == [()] * 3
    assert [run["x"].shape for run in runs] == [(1, 2)] * 3
    assert [int(run["rate"]) for run in runs] == [0, 1, 2]


def test_batched_and_other_inputs_go_one_by_one() -> None:
    """Batched and other inputs go one by one."""
    graph = view(("x", F, ["n", 3]), ("state", F, [2, 3]))
    samples = load_samples({"x": numbers(4, 3), "state": numbers(4, 2, 3)}, graph)
    runs = list(samples.feeds())
    assert [run["x"].shape for run in runs] == [(1, 3)] * 4
    assert [run["state"].shape for run in runs] == [(2, 3)] * 4


def test_inputs_that_state_different_batches() -> None:
    """Inputs that state different batches."""
    graph = view(("x", F, [2, 3]), ("y", F, [4, 3]))
    with pytest.raises(DataError, match=r"the model states different batches for its inputs: \[2, 4\]"):
        load_samples({"x": numbers(8, 3), "y": numbers(8, 3)}, graph)
    samples = load_samples({"x": numbers(8, 2, 3), "y": numbers(8, 4, 3)}, graph)
    assert [run["y"].shape for run in samples.feeds()] == [(4, 3)] * 8


def test_one_unnamed_array_is_enough_for_one_input(tmp_path: Path) -> None:
    """One unnamed array is enough for one input."""
    graph = view(("x", F, ["n", 3]))
    np.savez(tmp_path / "a.npz", numbers(4, 3))
    np.save(tmp_path / "a.npy", numbers(4, 3))
    for name in ("a.npz", "a.npy"):
        assert load_samples(tmp_path / name, graph).arrays["x"].tolist() == numbers(4, 3).tolist()
    with pytest.raises(DataError, match="there is no array called 'x'"):
        load_samples(tmp_path / "a.npz", view(("x", F, ["n", 3]), ("y", F, ["n", 3])))


def test_an_input_may_be_called_like_an_unnamed_array() -> None:
    """An input may be called like an unnamed array."""
    assert load_samples({"arr_0": numbers(2, 3)}, view(("arr_0", F, ["n", 3]))).count == 2


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16])
def test_values_of_every_float_type_are_seen_to_be_broken(kind: int) -> None:
    """Values of every float type are seen to be broken, and large ones are not taken for such."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    largest = 1e300 if kind == TensorProto.DOUBLE else 6e4
    array = np.array([0, -largest, np.nan, np.inf, -np.inf, 1]).astype(dtype)
    assert is_finite(array).tolist() == [True, True, False, False, False, True]
    assert is_finite(np.array([[3, -1]])).tolist() == [[True, True]]


def test_lists_are_arrays_too() -> None:
    """Lists are arrays too."""
    integers = view(("ids", TensorProto.INT64, ["n", 2]))
    lists: Any = {"ids": [[1, 2], [3, 4]]}
    assert load_samples(lists, integers).count == 2


@pytest.mark.parametrize(("given", "kind"), [(np.float64, F), (np.float16, F), (np.float32, TensorProto.FLOAT16)])
def test_floats_are_converted(given: Any, kind: int) -> None:
    """Floats are converted."""
    samples = load_samples({"x": numbers(2, 3, kind=given)}, view(("x", kind, ["n", 3])))
    assert samples.arrays["x"].dtype == helper.tensor_dtype_to_np_dtype(kind)


@pytest.mark.parametrize(("given", "kind"), [(np.int32, F), (np.float32, TensorProto.INT64), (np.bool_, F)])
def test_other_types_are_not_guessed(given: Any, kind: int) -> None:
    """Other types are not guessed."""
    with pytest.raises(DataError, match="'x' is of type"):
        load_samples({"x": numbers(2, 3, kind=given)}, view(("x", kind, ["n", 3])))


def test_different_numbers_of_samples() -> None:
    """Different numbers of samples."""
    graph = view(("x", F, ["n", 3]), ("y", F, ["n", 3]))
    with pytest.raises(DataError, match=r"the arrays have different numbers of samples: \{'x': 4, 'y': 5\}"):
        load_samples({"x": numbers(4, 3), "y": numbers(5, 3)}, graph)


def test_a_model_without_inputs() -> None:
    """A model without inputs."""
    text = '<ir_version: 8, opset_import: ["" : 17]> g () => (float[1] y) { y = Constant <value_floats = [1.0]> () }'
    samples = load_samples({}, GraphView(onnx.parser.parse_model(text)))
    assert list(samples.feeds()) == [{}]
    assert samples.count == 1


def test_arrays_are_read_by_name(tmp_path: Path) -> None:
    """Arrays are read by name."""
    np.savez_compressed(tmp_path / "a.npz", x=numbers(2, 3), y=numbers(2))
    assert {name: a.shape for name, a in read_arrays(tmp_path / "a.npz").items()} == {"x": (2, 3), "y": (2,)}


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that may not be read."""

    def refuse(*_arguments: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError) as caught:
        read_arrays(tmp_path / "a.npz")
    assert str(caught.value) == (
        f"the samples file can't be read: Permission denied\n  at:   {tmp_path / 'a.npz'}\n"
        "  mend: check its permissions"
    )


# Synthetic samples ---------------------------------------------------------------------------------------------------


def test_synthetic_samples_follow_the_seed_and_the_types() -> None:
    """Synthetic samples follow the seed and the types."""
    graph = view(
        ("f", F, ["n", 3]), ("b", TensorProto.BOOL, ["n", 50]), ("i", TensorProto.INT64, ["n", 50]),
        ("u", TensorProto.UINT8, ["n", 500]), ("h", TensorProto.FLOAT16, ["n", 3]),
    )  # fmt: skip
    dims = next(candidate_dims(graph))
    first, again, other = (synthetic_samples(graph, dims, seed, 8) for seed in (0, 0, 1))
    assert all(np.array_equal(first.arrays[name], again.arrays[name]) for name in graph.inputs)
    assert not np.array_equal(first.arrays["f"], other.arrays["f"])
    assert {name: str(a.dtype) for name, a in first.arrays.items()} == {
        "f": "float32", "b": "bool", "i": "int64", "u": "uint8", "h": "float16",
    }  # fmt: skip
    assert set(np.unique(first.arrays["i"])) == {0, 1}
    assert set(np.unique(first.arrays["b"])) == {False, True}
    assert first.arrays["u"].max() > 250
    assert first.origin == "8 synthetic samples (random numbers, seed 0)"


def test_strings_need_samples_of_the_user() -> None:
    """Strings need samples of the user."""
    graph = view(("words", TensorProto.STRING, ["n"]))
    with pytest.raises(UnsupportedGraphError, match="input 'words' takes strings") as caught:
        synthetic_samples(graph, next(candidate_dims(graph)), 0, 1)
    assert caught.value.mend == "give samples with --calibration or --data"


def test_inputs_that_are_no_tensors() -> None:
    """Inputs that are no tensors."""
    graph = view(("x", F, [2]))
    graph.inputs["x"].type.CopyFrom(helper.make_sequence_type_proto(helper.make_tensor_type_proto(F, [2])))
    with pytest.raises(UnsupportedGraphError, match="input 'x' is not a tensor but a sequence_type"):
        next(candidate_dims(graph))


def test_symbolic_sizes_are_tried_in_turn() -> None:
    """Symbolic sizes are tried in turn."""
    choices = list(candidate_dims(view(("x", F, ["n", 3, "h", "w"]))))
    assert choices[0] == {"x": (1, 3, 64, 64)}
    assert {dims["x"][2:] for dims in choices} >= {(32, 32), (224, 224), (1, 1)}
    assert list(candidate_dims(view(("x", F, ["n", 3])))) == [{"x": (1, 3)}]


def test_dimensions_of_the_batch_s_name_are_batches_too() -> None:
    """Dimensions of the batch's name are batches too."""
    graph = view(("x", F, ["batch", "length"]), ("state", F, [2, "batch", 128]), ("other", F, [3, "length"]))
    assert next(candidate_dims(graph)) == {"x": (1, 64), "state": (2, 1, 128), "other": (3, 64)}
    square = view(("x", F, ["n", "n"]))
    assert list(candidate_dims(square)) == [{"x": (1, 1)}]


def decoder(total: str, length: int | str = "length") -> onnx.ModelProto:
    """Make a model that adds a mask to what it reads now behind what it has read before."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[batch, {length}, 4] x, float[batch, past, 4] before, float[batch, mask] m)
            => (float[batch, all, 4] y)
        <int64[1] last = {{2}}>
        {{ all = Concat <axis = 1> (before, x)  column = Unsqueeze(m, last)  y = Add(all, column) }}
    """)
    model.graph.input[2].type.tensor_type.shape.dim[1].dim_param = total
    return model


def test_a_size_that_the_file_computes_from_others_holds() -> None:
    """As for the attention mask of a decoder with a cache, in the first choice already, and at other sizes."""
    graph = GraphView(decoder("past + length"))
    first = {"x": (1, 64, 4), "before": (1, 64, 4), "m": (1, 128)}
    assert next(candidate_dims(graph)) == first
    assert [feeds["m"].shape for feeds in feeds_at_other_sizes(graph, first, 0)] == [(1, 64), (1, 256)]
    one = GraphView(decoder("past + 1", length=1))
    first = {"x": (1, 1, 4), "before": (1, 64, 4), "m": (1, 65)}
    assert next(candidate_dims(one)) == first
    assert [feeds["m"].shape for feeds in feeds_at_other_sizes(one, first, 0)] == [(1, 33), (1, 129)]


@pytest.mark.parametrize("length", ["length", 1])
def test_a_size_that_is_the_sum_of_others_is_found(length: int | str) -> None:
    """Where a name says nothing, what the model runs with does."""
    model = decoder("total", length)
    samples, problem = choose_samples(read_model(model), GraphView(model), Provider.CPU, 0)
    assert samples is not None, problem
    dims = samples.dims
    assert dims["m"][1] == dims["x"][1] + dims["before"][1]


@pytest.mark.parametrize("positions", [58, 61, 63])
def test_a_length_that_some_rows_alone_fit_is_not_chosen(positions: int) -> None:
    """RoBERTa counts tokens but not padding: rows of random tokens need now more positions, now less."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]> net (int64[n, t] ids) => (float[n, t, 2] y)
        <int64 zero = {0}, int64 one = {1}>
        { h = Gather(words, ids)  real = Greater(ids, zero)  number = Cast <to = 7> (real)  at = CumSum(number, one)
          p = Gather(table, at)  x = Add(h, p)  a = MatMul(x, w)  r = Relu(a)  y = MatMul(r, v) }
    """)
    for name, dims in {"words": (20, 4), "table": (positions, 4), "w": (4, 8), "v": (8, 2)}.items():
        model.graph.initializer.append(helper.make_tensor(name, F, dims, np.ones(dims).ravel()))
    result = onnxfuse.compress(model, ratio=0.5, method="prune", prove=False, provider="cpu")
    assert result.report.input_shapes == {"ids": (1, 32)}


def huge_model() -> onnx.ModelProto:
    """Make a model whose input is too large to be made up."""
    x = helper.make_tensor_value_info("x", F, [1, 2**20, 128])
    y = helper.make_tensor_value_info("y", F, [1, 2**20, 128])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def test_inputs_of_absurd_size_are_not_made_up() -> None:
    """Inputs of absurd size are not made up."""
    assert list(candidate_dims(GraphView(huge_model()))) == []
    with pytest.raises(DataError, match="every choice of its symbolic dimensions makes inputs of over 256 MB"):
        onnxfuse.compress(huge_model())
    report = onnxfuse.inspect(huge_model())
    assert report.input_shapes == {"x": (1, 2**20, 128)}
    assert report.notes[0].startswith("shapes are inferred only, the model was not run: every choice")
