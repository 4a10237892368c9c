"""The drift between two models against formulas written down a second time, and what is refused."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxfuse.config import Provider
from onnxfuse.errors import DataError, ProofError
from onnxfuse.graph.view import GraphView
from onnxfuse.proof.drift import Drift, check_at_other_sizes, measure_drift
from onnxfuse.proof.random_samples import feeds_at_other_sizes
from onnxfuse.proof.runtime import Session
from onnxfuse.proof.samples import load_samples

Array = np.ndarray[Any, np.dtype[Any]]


def chosen(index: int, dims: list[int | str], kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """Make a model that returns one of its two inputs, so that any pair of outputs can be compared."""
    infos = [helper.make_tensor_value_info(name, kind, dims) for name in ("first", "second", "y")]
    nodes = [helper.make_node("Identity", [infos[index].name], ["y"])]
    graph = helper.make_graph(nodes, "chosen", infos[:2], infos[2:])
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def drift_of(y: Array, z: Array, dims: list[int | str] | None = None) -> Drift:
    """Measure the drift from y to z, whose first axis runs over samples."""
    kind = helper.np_dtype_to_tensor_dtype(y.dtype)
    models = [chosen(i, dims or ["n", *y.shape[1:]], kind) for i in (0, 1)]
    samples = load_samples({"first": y, "second": z}, GraphView(models[0]))
    original, compressed = (Session(model, Provider.CPU) for model in models)
    return measure_drift(original, compressed, samples)


def expected(y: Array, z: Array) -> tuple[float, float, float, float]:
    """The formulas, once more: largest and mean absolute difference, cosine, SQNR in dB."""
    a, b = np.float64(y).ravel(), np.float64(z).ravel()
    noise = np.mean((a - b) ** 2)
    return (
        float(np.max(np.abs(a - b))),
        float(np.mean(np.abs(a - b))),
        float(np.dot(a / np.linalg.norm(a), b / np.linalg.norm(b))),
        float(20 * np.log10(np.linalg.norm(a) / np.sqrt(a.size * noise))),
    )


def assert_drift(drift: Drift, y: Array, z: Array) -> None:
    """Assert that a measured drift is the one of the formulas, to rounding."""
    found = drift.outputs[0]
    numbers = (found.max_abs, found.mean_abs, found.cosine, found.sqnr_db)
    assert numbers == pytest.approx(expected(y, z), rel=1e-9)


@pytest.fixture
def rng() -> np.random.Generator:
    """A source of numbers."""
    return np.random.default_rng(7)


def test_the_check_of_drift_can_fail(rng: np.random.Generator) -> None:
    """The check of drift can fail."""
    y, z = rng.normal(size=(2, 5, 3)).astype(np.float32)
    drift = drift_of(y, z)
    assert_drift(drift, y, z)
    for other in (z * 1.01, z + 0.01, z[::-1]):
        with pytest.raises(AssertionError):
            assert_drift(drift, y, other)


@pytest.mark.parametrize("shape", [(5, 3), (70, 3), (97, 2, 4), (1, 1, 2, 2), (6, 10, 1, 1)])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_drift_is_that_of_the_formulas(shape: tuple[int, ...], kind: Any, rng: np.random.Generator) -> None:
    """Drift is that of the formulas."""
    y = rng.normal(size=shape).astype(kind)
    z = (y + 0.1 * rng.normal(size=shape)).astype(kind)
    drift = drift_of(y, z)
    used = drift.samples
    assert_drift(drift, y[:used], z[:used])
    assert drift.provider == "cpu"
    assert drift.outputs[0].name == "y"


def test_integers_do_not_overflow(rng: np.random.Generator) -> None:
    """Integers do not overflow."""
    y, z = rng.integers(0, 256, (2, 8, 5)).astype(np.uint8)
    assert_drift(drift_of(y, z), y, z)


@pytest.mark.parametrize("shape", [(200, 4), (200, 4, 1, 1)])
def test_top1_is_the_share_of_equal_largest_entries(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    """Top1 is the share of equal largest entries."""
    y, z = rng.normal(size=(2, *shape)).astype(np.float32)
    drift = drift_of(y, z)
    same = [
        max(range(4), key=a.__getitem__) == max(range(4), key=b.__getitem__)
        for a, b in zip(y.reshape(200, 4).tolist(), z.reshape(200, 4).tolist(), strict=True)
    ][: drift.samples]
    assert 0.1 < sum(same) / len(same) < 0.5
    assert drift.outputs[0].top1_agreement == pytest.approx(sum(same) / len(same))


@pytest.mark.parametrize("shape", [(8, 1), (8,), (8, 4, 2), (8, 4, 1), (8, 4, 2, 1)])
def test_top1_is_only_for_classes(shape: tuple[int, ...]) -> None:
    """Top1 is only for classes."""
    y = np.ones(shape, np.float32)
    assert drift_of(y, y).outputs[0].top1_agreement is None


def test_equal_outputs() -> None:
    """Equal outputs."""
    y = np.array([[1.0, 2.0]], np.float32)
    found = drift_of(y, y).outputs[0]
    assert (found.max_abs, found.mean_abs, found.sqnr_db, found.top1_agreement) == (0, 0, None, 1)
    assert found.cosine == pytest.approx(1)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0), (0, 0)])
def test_outputs_of_zeros(first: int, second: int) -> None:
    """Outputs of zeros."""
    y, z = (np.full((2, 3), value, np.float32) for value in (first, second))
    found = drift_of(y, z).outputs[0]
    assert found.max_abs == found.mean_abs == abs(first - second)
    assert found.cosine is None
    assert found.sqnr_db == (0 if second < first else None)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_new_values_that_are_not_finite_are_refused(bad: float) -> None:
    """New values that are not finite are refused."""
    y = np.ones((4, 3), np.float32)
    z = y.copy()
    z[1, :2] = bad
    with pytest.raises(ProofError) as caught:
        drift_of(y, z)
    assert str(caught.value) == (
        "the output has 2 values that are not finite, where the original's are\n  at:   output 'y'\n"
        "  mend: a lower ratio, or another method, keeps the numbers in range"
    )


def test_values_that_never_were_finite_are_left_out(rng: np.random.Generator) -> None:
    """Values that never were finite are left out."""
    y, z = rng.normal(size=(2, 6, 3)).astype(np.float32)
    y[0], z[0] = np.nan, 5
    y[1, 0], z[1, 0] = -np.inf, -np.inf
    finite = np.isfinite(y)
    drift = drift_of(y, z)
    assert_drift(drift, y[finite], z[finite])
    rows = slice(1, None)  # a row with NaN has no largest entry; one with -inf has
    top1 = float(np.mean(y[rows].argmax(axis=1) == z[rows].argmax(axis=1)))
    assert drift.outputs[0].top1_agreement == pytest.approx(top1)


def test_nothing_to_compare_is_an_error_of_the_data() -> None:
    """Nothing to compare is an error of the data."""
    y = np.full((2, 3), np.nan, np.float32)
    with pytest.raises(DataError, match="the original model's output has no finite value on these inputs"):
        drift_of(y, np.ones((2, 3), np.float32))


def test_a_new_value_that_is_not_finite_is_found_beside_an_old_one() -> None:
    """A new value that is not finite is found beside an old one."""
    y, z = np.ones((2, 2, 3), np.float32)
    y[0, 0] = z[0, 0] = np.inf
    z[1, 1] = np.inf
    with pytest.raises(ProofError, match="the output has 1 values that are not finite"):
        drift_of(y, z)


def pair(first: str, second: str) -> None:
    """Compare two models that are given as text."""
    models = [onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}') for text in (first, second)]
    samples = load_samples({"x": np.ones((2, 3), np.float32)}, GraphView(models[0]))
    original, compressed = (Session(model, Provider.CPU, name=f"model {i}") for i, model in enumerate(models))
    measure_drift(original, compressed, samples)


def test_other_names_are_refused() -> None:
    """Other names are refused."""
    with pytest.raises(ProofError) as caught:
        pair(
            "g (float[n, 3] x) => (float[n, 3] y) { y = Relu (x) }",
            "g (float[n, 3] x) => (float[n, 3] z) { z = Relu (x) }",
        )
    assert str(caught.value) == (
        "the outputs are called 'z', in the original 'y'\n  at:   model 1\n"
        "  mend: compare a model with one that was made from it"
    )


@pytest.mark.parametrize(
    ("other", "form"),
    [
        ("g (float[n, 3] x) => (float[3, n] y) { y = Transpose (x) }", "(3, 2) of float32"),
        ("g (float[n, 3] x) => (double[n, 3] y) { y = Cast <to = 11> (x) }", "(2, 3) of float64"),
        ("g (float[n, 3] x) => (seq(float[n, 3]) y) { y = SequenceConstruct (x) }", "list"),
    ],
)
def test_other_shapes_and_types_are_refused(other: str, form: str) -> None:
    """Other shapes and types are refused."""
    with pytest.raises(ProofError) as caught:
        pair("g (float[n, 3] x) => (float[n, 3] y) { y = Relu (x) }", other)
    assert str(caught.value) == (
        f"the output is {form}, in the original (2, 3) of float32\n  at:   output 'y'\n"
        "  mend: compare a model with one that was made from it"
    )


def test_a_size_that_depends_on_values_may_differ() -> None:
    """As the number of boxes that a detector finds: what is of another size is not compared, and a note says so."""
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[n, 3] x) => (int64[2, m] y, float[n, 3] z)
        { h = %s y = NonZero(h) z = Relu(x) }"""
    models = [onnx.parser.parse_model(text % maker) for maker in ("Relu(x)", "Exp(x)")]
    samples = load_samples({"x": np.array([[1, -1, 2]], np.float32)}, GraphView(models[0]))
    first, second = (Session(model, Provider.CPU) for model in models)
    drift = measure_drift(first, second, samples, GraphView(models[0]))
    assert [o.name for o in drift.outputs] == ["z"]
    assert "output 'y' depends on values, and was another one in 1 of 1 runs" in drift.note
    assert measure_drift(first, first, samples, GraphView(models[0])).note == ""
    with pytest.raises(ProofError, match="the output is"):
        measure_drift(first, second, samples)


def test_outputs_that_are_no_numbers_are_not_compared() -> None:
    """Outputs that are no numbers are not compared."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 3] x) => (seq(float[n, 3]) s, float[n, 3] y) { s = SequenceConstruct (x) y = Relu (x) }"""
    model = onnx.parser.parse_model(text)
    samples = load_samples({"x": np.ones((2, 3), np.float32)}, GraphView(model))
    session = Session(model, Provider.CPU)
    assert [o.name for o in measure_drift(session, session, samples).outputs] == ["y"]


# Other sizes --------------------------------------------------------------------------------------------------------


def reshaped(target: list[int], *, length: int | str = "t") -> onnx.ModelProto:
    """Write a network that splits the last axis of its input, to a target shape."""
    text = f"""
        <ir_version: 8, opset_import: ["" : 17]> net (float[n, {length}, 6] x) => (float[n, t, 3, 2] y)
        <int64[4] target = {{{", ".join(map(str, target))}}}> {{ y = Reshape(x, target) }}"""
    return onnx.parser.parse_model(text)


def check(original: onnx.ModelProto, compressed: onnx.ModelProto) -> None:
    """Compare two models at other sizes than 8."""
    graph = GraphView(original)
    sessions = [Session(model, Provider.CPU) for model in (original, compressed)]
    check_at_other_sizes(sessions[0], sessions[1], graph, feeds_at_other_sizes(graph, {"x": (2, 8, 6)}, seed=0))


@pytest.mark.parametrize(
    ("target", "problem"),
    [([0, 0, 3, 2], ""), ([0, 8, 3, 2], "the compressed model does not"), ([-1, 8, 3, 2], "is \\(1, 8, 3, 2\\)")],
)
def test_a_size_that_was_open_is_found(target: list[int], problem: str) -> None:
    """A size that the original leaves open and the compressed model states shows, whether that fails or not."""
    original = reshaped([0, 0, 3, 2])
    if not problem:
        check(original, reshaped(target))
        return
    with pytest.raises(ProofError, match=problem) as caught:
        check(original, reshaped(target))
    assert "(2, 4, 6)" in str(caught.value)


def test_sizes_that_the_original_does_not_take_say_nothing() -> None:
    """Where the original runs at no other size, or states all of them, there is nothing to compare."""
    for original in (reshaped([0, 8, 3, 2]), reshaped([0, 0, 3, 2], length=8)):
        check(original, reshaped([0, 8, 3, 2]))


def test_how_much_a_model_finds_may_differ() -> None:
    """Shapes that depend on what is in the inputs are not compared."""
    text = """
        <ir_version: 8, opset_import: ["" : 17]> net (float[n, t, 6] x) => (int64[3, k] y)
        <float least = {NUMBER}> { large = Greater(x, least)  y = NonZero(large) }"""
    few, many = (onnx.parser.parse_model(text.replace("NUMBER", number)) for number in ("9.0", "-9.0"))
    check(few, many)
