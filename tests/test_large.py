"""What is done in another way because there is much of it gives what the plain way gives."""

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import onnxfuse
from onnxfuse import arrays, matrices
from onnxfuse.analysis import analyse, choose_samples, in_runs_that_fit
from onnxfuse.calibration.judge import Judgement
from onnxfuse.config import Provider
from onnxfuse.fusion import weights
from onnxfuse.graph import edits
from onnxfuse.graph.files import read_model, write_model
from onnxfuse.graph.slim import byte_size, without_large_weights
from onnxfuse.graph.view import GraphView
from onnxfuse.proof import drift, runtime
from onnxfuse.proof.samples import load_samples
from onnxfuse.statistics.damage import Reading, greedy_order, rebuilding_map
from tests.builders import initializers
from tests.conftest import MakeMlp

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]
# Clusters by k-means depend on every bit.
METHODS = ("prune", "intra-fusion", "auto")


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything count as large, however small it is."""
    for module in (weights, arrays, edits, runtime):
        monkeypatch.setattr(module, "_LARGE", 0)
    monkeypatch.setattr(matrices, "_WORTH_A_LOOK", 0)
    monkeypatch.setattr(drift, "_PART", 7)


def compressed(models: Path, method: str) -> onnxfuse.Compressed:
    """Compress the network of the digits in one way."""
    images = np.load(models / "digits_calibration.npz")["image"][:96]
    options: dict[str, Any] = {"method": method, "provider": "cpu", "ratio": 0.4, "effort": 0}
    return onnxfuse.compress(models / "digits_bn.onnx", calibration={"image": images}, **options)


@pytest.mark.parametrize("method", METHODS)
def test_large_layers_become_what_small_ones_become(models: Path, method: str, request: pytest.FixtureRequest) -> None:
    """Every method gives the same network up to the rounding of float32, and channels that are kept bit by bit."""
    small = compressed(models, method)
    request.getfixturevalue("everything_is_large")
    large = compressed(models, method)
    one, two = initializers(small.model), initializers(large.model)
    assert one.keys() == two.keys()
    assert [n.SerializeToString() for n in small.model.graph.node] == [
        n.SerializeToString() for n in large.model.graph.node
    ]
    tolerance = {"prune": 0.0, "intra-fusion": 1e-5, "auto": 2e-3}[method]
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=0, atol=tolerance * float(np.abs(value).max(initial=0.0)))
    before, after = small.report.drift.outputs[0], large.report.drift.outputs[0]
    assert after.cosine == pytest.approx(before.cosine, abs=1e-4)
    assert after.mean_abs == pytest.approx(before.mean_abs, rel=1e-2)


def test_double_precision_stays(monkeypatch: pytest.MonkeyPatch, make_mlp: MakeMlp) -> None:
    """A network in double precision is worked on in double precision, however large it is."""
    model = make_mlp()
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor).astype(np.float64) * (1 + 1e-12)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    for info in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        info.type.tensor_type.elem_type = TensorProto.DOUBLE
    plain = onnxfuse.compress(model, method="fold", ratio=0.5, provider="cpu").model
    monkeypatch.setattr(weights, "_LARGE", 0)
    for name, value in initializers(onnxfuse.compress(model, method="fold", ratio=0.5, provider="cpu").model).items():
        np.testing.assert_array_equal(value, initializers(plain)[name])


def reading(seed: int, channels: int) -> Reading:
    """Return what a reader sees of channels that partly follow from each other."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(4 * channels, channels)) @ rng.normal(size=(channels, channels))
    moments = rows.T @ rows / len(rows) + np.eye(channels)
    return Reading(moments, np.zeros((channels, 1)), rng.normal(size=(channels, 3)))


def single(seen: Reading) -> Reading:
    """Return the same in single precision."""
    return Reading(seen.covariance.astype(np.float32), seen.means, seen.weights.astype(np.float32))


@given(seed=st.integers(0, 999), channels=st.integers(2, 40))
def test_statistics_in_single_precision_say_the_same(seed: int, channels: int) -> None:
    """The damage of every number of channels, up to rounding, and how those that go are rebuilt."""
    seen = reading(seed, channels)
    order, damage = greedy_order([seen])
    _, found = greedy_order([single(seen)])
    np.testing.assert_allclose(found, damage, rtol=1e-3, atol=1e-4 * damage[0])
    kept = np.sort(order[: max(1, channels // 2)])
    exact = rebuilding_map([seen], kept)
    np.testing.assert_allclose(rebuilding_map([single(seen)], kept), exact, rtol=0, atol=1e-2 * np.abs(exact).max())


def test_what_memory_held_before_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The triangle that is not kept is never worked with: no warning, whatever bits are there."""

    def unclean(like: Any, *_: Any) -> Any:
        return np.full(like.shape, 0x7FA00000, np.uint32).view(np.float32)

    seen = single(reading(1, 1100))
    expected = greedy_order([seen])
    monkeypatch.setattr(np, "empty_like", unclean)
    for ours, theirs in zip(greedy_order([seen]), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_judgement_of_large_statistics_keeps_its_selection_sparse() -> None:
    """A map that drops channels is sparse on the side that makes them; the other side rebuilds."""
    seen = reading(0, 300)
    judgement = Judgement((seen,), *greedy_order([seen]))
    found = judgement.channel_map(250)
    assert not isinstance(found.making, np.ndarray)
    np.testing.assert_array_equal(found.output, np.eye(300)[np.sort(judgement.order[:250])])
    np.testing.assert_array_equal(found.input[found.anchors], np.eye(250))


def test_copies_without_weights_have_everything_else(make_mlp: MakeMlp) -> None:
    """Names, types, dimensions, and what is written about a model; the model itself keeps its weights."""
    model = make_mlp()
    model.doc_string, model.producer_name = "what it is", "who made it"
    model.graph.doc_string = "its graph"
    model.metadata_props.add(key="some", value="thing")
    whole = model.SerializeToString(deterministic=True)
    slim, empty = without_large_weights(model, 0)
    assert model.SerializeToString(deterministic=True) == whole
    assert empty == {tensor.name for tensor in model.graph.initializer}
    assert not any(tensor.raw_data or tensor.float_data for tensor in slim.graph.initializer)
    for tensor, original in zip(slim.graph.initializer, model.graph.initializer, strict=True):
        tensor.CopyFrom(original)
    assert slim.SerializeToString(deterministic=True) == whole
    assert without_large_weights(model, 2**20) == (model, set())


@pytest.mark.parametrize("elements", [0, 3, 2**18 - 1, 2**18, 2**20, 2**21 + 1])
def test_the_size_of_a_message_is_never_told_too_small(make_mlp: MakeMlp, elements: int) -> None:
    """However its weights are written; too large by some bytes for each large weight."""
    model = make_mlp()
    model.graph.initializer.append(numpy_helper.from_array(np.ones(elements, np.float32), "raw"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(elements, np.int8), "bytes"))
    model.graph.initializer.append(helper.make_tensor("as floats", TensorProto.FLOAT, [elements], [1.0] * elements))
    exact = len(model.SerializeToString())
    assert exact <= byte_size(model) <= exact + 64


def test_models_are_written_apart_and_read_again(make_mlp: MakeMlp, tmp_path: Path) -> None:
    """However the file has its numbers, and whatever else is in it."""
    model = make_mlp()
    model.graph.initializer.append(helper.make_tensor("as floats", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(["some"], object), "words"))
    write_model(model, tmp_path / "m.onnx", largest=0)
    assert (tmp_path / "m.onnx.data").is_file()
    found = onnx.load(tmp_path / "m.onnx")
    np.testing.assert_equal(initializers(found), initializers(model))
    assert [n.SerializeToString() for n in found.graph.node] == [n.SerializeToString() for n in model.graph.node]


def test_runs_are_cut_where_their_values_are_large(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All samples are run all the same, in their order."""
    source = read_model(models / "digits_bn.onnx")
    graph = GraphView(source.model)
    first, _ = choose_samples(source, graph, Provider.CPU, 0)
    analysis = analyse(source, graph, first)
    samples = load_samples({"image": np.load(models / "digits_calibration.npz")["image"][:64]}, graph)
    assert in_runs_that_fit(analysis, samples).batch == samples.batch == 64
    values = sum(4 * int(np.prod(analysis.shapes.dims[o])) for n in graph.nodes for o in n.outputs) // analysis.batch
    monkeypatch.setattr("onnxfuse.analysis._MOST_RUN_BYTES", 20 * values)
    cut = in_runs_that_fit(analysis, samples)
    assert cut.batch == 16
    runs: list[AnyArray] = [feeds["image"] for feeds in cut.feeds()]
    np.testing.assert_array_equal(np.concatenate(runs), samples.arrays["image"])
