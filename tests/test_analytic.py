"""Moments without a run, against ONNX Runtime on Gaussian inputs."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnxfuse
from onnxfuse.analysis import Analysis, analyse
from onnxfuse.analytic import (
    Moments,
    analytic_readings,
    has_plausible_inputs,
    input_scale,
    propagate_moments,
)
from onnxfuse.analytic.rules import DEFAULT_RULES
from onnxfuse.arrays import FloatArray
from onnxfuse.calibration.judge import judge_groups, judge_readings
from onnxfuse.config import Provider
from onnxfuse.graph.files import read_model
from onnxfuse.graph.view import GraphView
from onnxfuse.proof.samples import load_samples
from tests.builders import AnyArray, Net, run_ort, run_ort_all

Build = Callable[[Net, str], str | Sequence[str]]

SAMPLES = 20_000
# Shares of the typical size that samples may be off by.
TOLERANCE = 0.06
PLAIN, MAP, TOKENS = (2, 6), (2, 4, 7, 7), (2, 5, 6)


@dataclass(frozen=True)
class Case:
    """A small piece of a network, and what to expect of its moments.

    Attributes:
        build: Adds it to a net.
        dims: Shape of its input.
        axis: Where the input has its channels.
        tolerance: How much of the typical size the moments may be off by, besides what samples are.
        opset: The operator set that it is written in.
    """

    build: Build
    dims: tuple[int, ...]
    axis: int = 1
    tolerance: float = TOLERANCE
    opset: int = 17


def normalised(net: Net, x: str, op: str, *parts: str) -> str:
    """Add a normalisation over the channels, and a layer that reads it together with what it comes from."""
    return net.gemm(net.node("Add", x, net.node(op, x, net.vector(64, low=0.5, high=1.5), *parts)), 5)


def residual(net: Net, x: str) -> str:
    """Add a branch of two layers back to what it comes from."""
    return net.node("Add", x, net.gemm(net.node("Relu", net.gemm(x, 9)), 6))


CASES: Mapping[str, Case] = {
    "Conv": Case(lambda n, x: n.conv(x, 5, 3, pads=[0] * 4), MAP),
    "Conv, strided": Case(lambda n, x: n.conv(x, 5, 3, pads=[0] * 4, strides=[2, 2]), MAP),
    "Conv, dilated": Case(lambda n, x: n.conv(x, 5, 2, pads=[0] * 4, dilations=[2, 1]), MAP),
    "Conv, depthwise": Case(lambda n, x: n.conv(x, 8, 3, pads=[0] * 4, group=4), MAP),
    "Conv, grouped": Case(lambda n, x: n.conv(x, 6, 3, pads=[0] * 4, group=2), MAP),
    "Gemm": Case(lambda n, x: n.gemm(x, 5, transB=1, alpha=0.5), PLAIN),
    "MatMul": Case(lambda n, x: n.matmul(x, 7), TOKENS, axis=2),
    "MatMul, columns": Case(lambda n, x: n.node("MatMul", n.weight(4, 5), x), TOKENS),
    "BatchNormalization": Case(lambda n, x: n.node("Relu", stated(n, x)), MAP),
    "LayerNormalization": Case(
        lambda n, x: normalised(n, x, "LayerNormalization", n.vector(64)), (2, 64), tolerance=0.12
    ),
    "RMSNormalization": Case(lambda n, x: normalised(n, x, "RMSNormalization"), (2, 64), tolerance=0.12, opset=23),
    "LayerNormalization, of tokens": Case(
        lambda n, x: n.node("LayerNormalization", x, n.vector(64, low=0.5, high=1.5)),
        (2, 5, 64),
        axis=2,
        tolerance=0.12,
    ),
    "Relu": Case(lambda n, x: n.node("Relu", x), MAP),
    "HardSwish": Case(lambda n, x: n.node("HardSwish", x), PLAIN),
    "Sigmoid": Case(lambda n, x: n.node("Sigmoid", x), PLAIN),
    "Mul, of one source": Case(lambda n, x: n.node("Mul", x, n.node("Sigmoid", x)), MAP),
    "Sub, of one source": Case(lambda n, x: n.node("Sub", n.node("Tanh", x), n.node("Relu", x)), PLAIN),
    "PRelu": Case(lambda n, x: n.node("PRelu", x, n.constant(n.rng.uniform(-0.5, 0.5, (4, 1, 1)))), MAP),
    "Mul, constants": Case(lambda n, x: n.node("Mul", x, n.constant(n.rng.normal(size=(4, 1, 1)))), MAP),
    "Sub, constants": Case(lambda n, x: n.node("Sub", n.constant(n.rng.normal(size=6)), x), PLAIN),
    "Div, constants": Case(lambda n, x: n.node("Div", x, n.constant(n.rng.uniform(1, 2, 6))), PLAIN),
    "Add, residual": Case(residual, PLAIN),
    "Sub, residual": Case(lambda n, x: n.node("Sub", n.gemm(x, 6), x), PLAIN),
    "Sum": Case(lambda n, x: n.node("Sum", x, n.gemm(x, 6), n.gemm(x, 6)), PLAIN),
    "Mul, gate": Case(lambda n, x: n.node("Mul", n.gemm(x, 5), n.gemm(x, 5)), PLAIN),
    "Mul, with itself": Case(lambda n, x: n.node("Mul", *[n.gemm(x, 5)] * 2), PLAIN),
    "Concat": Case(lambda n, x: n.gemm(n.node("Concat", x, n.node("Relu", n.gemm(x, 5)), axis=1), 5), PLAIN),
    "AveragePool": Case(lambda n, x: n.node("AveragePool", x, kernel_shape=[3, 2], strides=[2, 2]), MAP),
    "MaxPool": Case(lambda n, x: n.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]), MAP, tolerance=0.16),
    "MaxPool, of Relu": Case(
        lambda n, x: n.node("MaxPool", n.node("Relu", x), kernel_shape=[3, 3], strides=[2, 2]), MAP, tolerance=0.16
    ),
    "GlobalAveragePool": Case(lambda n, x: n.node("GlobalAveragePool", x), MAP),
    "GlobalMaxPool": Case(lambda n, x: n.node("GlobalMaxPool", x), MAP, tolerance=0.2),
    "ReduceMean": Case(lambda n, x: n.reduce("Mean", x, [2, 3], keepdims=0), MAP),
    "Reshape": Case(lambda n, x: n.reshape(x, -1, 4, 49), MAP),
    "Flatten": Case(lambda n, x: n.node("Flatten", x), MAP, tolerance=0.12),
    "Flatten, channels last": Case(lambda n, x: n.node("Flatten", x), TOKENS, axis=2),
    "Transpose": Case(lambda n, x: n.node("Transpose", x, perm=[0, 2, 3, 1]), MAP),
    "Squeeze": Case(lambda n, x: n.squeeze(n.node("GlobalAveragePool", x), [2, 3]), MAP),
    "Unsqueeze": Case(lambda n, x: n.unsqueeze(x, [1]), PLAIN),
    "Slice": Case(lambda n, x: n.slice(x, [0, 5], [9, 1], [2, 1], [1, -2]), (2, 6, 5)),
    "Split": Case(lambda n, x: n.split(x, [2, 4], 2), PLAIN),
    "Gather": Case(lambda n, x: n.node("Gather", x, n.constant(np.array([3, 0, 0])), axis=1), PLAIN),
    "Pad": Case(lambda n, x: n.pad(x, [0, 2, 0, 1], value=0.5), PLAIN),
    "Resize": Case(lambda n, x: n.node("Relu", n.upsample(x)), MAP),
    "Identity": Case(lambda n, x: n.node("Mul", n.node("Identity", x), n.node("Sigmoid", x)), PLAIN),
    "Dropout": Case(lambda n, x: n.node("Relu", n.dropout(x)), PLAIN),
}


def stated(net: Net, x: str) -> str:
    """Add a normalisation that states what `given_moments` are."""
    moments = given_moments(net.dims(x), 1)
    parts = [net.vector(len(moments.mean), low=0.5, high=1.5), net.vector(len(moments.mean))]
    return net.batch_norm(x, parameters=(*parts, net.constant(moments.mean), net.constant(moments.variance)))


def given_moments(dims: Sequence[int], axis: int) -> Moments:
    """Return moments of an input that are those of nothing simple."""
    rng = np.random.default_rng(len(dims) + dims[axis])
    mixing = rng.normal(size=(dims[axis] + 2, dims[axis])) / np.sqrt(dims[axis])
    decay = [0.0 if i in {0, axis} else 0.6 - 0.2 * (i % 2) for i in range(len(dims))]
    return Moments(axis, 0.5 * rng.normal(size=dims[axis]), mixing.T @ mixing, tuple(decay))


def drawn(moments: Moments, dims: Sequence[int], count: int) -> AnyArray:
    """Draw samples of such an input: chains along all places."""
    values = np.random.default_rng(0).standard_normal((count, *dims[1:]))
    for axis in range(1, len(dims)):
        steps = np.arange(dims[axis])
        alike = np.power(moments.decay[axis], np.abs(steps[:, None] - steps))
        root = np.linalg.cholesky(moments.covariance if axis == moments.axis else alike)
        values = np.moveaxis(np.moveaxis(values, axis, -1) @ root.T, -1, axis)
    shape = [1] * len(dims)
    shape[moments.axis] = -1
    return (values + moments.mean.reshape(shape)).astype(np.float32)


def observed(values: AnyArray, axis: int) -> tuple[FloatArray, FloatArray]:
    """Return mean and covariance over samples and places."""
    rows = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis]).astype(np.float64)
    return rows.mean(axis=0), np.cov(rows.T, bias=True).reshape(rows.shape[1], -1)


def neighbours(values: AnyArray, axis: int, channels: int) -> float:
    """Return the correlation of neighbours along an axis, of all channels together."""
    moved = np.moveaxis(values, (axis, channels), (-2, -1)).astype(np.float64)
    moved = moved - moved.reshape(-1, moved.shape[-1]).mean(axis=0)
    return float((moved[..., 1:, :] * moved[..., :-1, :]).mean() / np.square(moved).mean())


def built(build: Build, dims: Sequence[int], *, seed: int = 0, opset: int = 17) -> onnx.ModelProto:
    """Return the model of one piece."""
    net = Net(opset, seed=seed)
    x = net.input(*dims, batch="N", name="x")
    made = build(net, x)
    net.output(*([made] if isinstance(made, str) else made))
    return net.model()


def analysed(model: onnx.ModelProto, dims: Sequence[int]) -> Analysis:
    """Analyse a model."""
    graph = GraphView(model)
    return analyse(read_model(model), graph, load_samples({"x": np.zeros(dims, np.float32)}, graph))


@pytest.mark.parametrize("name", CASES)
def test_moments_are_those_of_samples(name: str) -> None:
    """Mean, covariance and the correlation of neighbours are within the error of samples of a Gaussian input."""
    case = CASES[name]
    model = built(case.build, case.dims, opset=case.opset)
    given_x = given_moments(case.dims, case.axis)
    found = propagate_moments(analysed(model, case.dims), given={"x": given_x})
    values = run_ort_all(model, {"x": drawn(given_x, case.dims, SAMPLES)})
    assert not found.unknown
    for output in (info.name for info in model.graph.output):
        moments = found.moments[output]
        mean, covariance = observed(values[output], moments.axis)
        size = np.sqrt(np.diag(covariance)) + 1e-5
        np.testing.assert_array_less(np.abs(moments.mean - mean) / size, case.tolerance)
        np.testing.assert_array_less(np.abs(moments.covariance - covariance) / np.outer(size, size), case.tolerance)
        for axis in range(1, values[output].ndim):
            if axis != moments.axis and values[output].shape[axis] > 3:
                expected = neighbours(values[output], axis, moments.axis)
                assert moments.decay[axis] == pytest.approx(expected, abs=1.5 * case.tolerance), axis


def test_every_rule_has_a_case() -> None:
    """All but the unary functions, which share one rule that takes the function from the runtime, and Upsample."""
    ops = {rule.op for rule in DEFAULT_RULES if rule.pass_on.__name__ != "unary"} - {
        "Upsample",
        "Max",
        "Min",
        "Mean",
        "Pow",
    }
    assert ops <= {name.partition(",")[0] for name in CASES}


def affine(net: Net, x: str, seed: int, depth: int) -> str:
    """Add matrices, sums and joined branches."""
    rng = np.random.default_rng(seed)
    values = [x]
    for _ in range(depth):
        one, other = (values[rng.integers(len(values))] for _ in range(2))
        match rng.integers(4):
            case 0:
                made = net.gemm(one, 6)
            case 1:
                made = net.node("Add", one, net.gemm(other, net.channels(one)))
            case 2:
                made = net.node("Concat", one, net.gemm(other, 2), axis=1)
            case _:
                made = net.node("Sub", net.gemm(one, 6), net.gemm(other, 6))
        values.append(made)
    return net.node("Add", net.gemm(values[-1], 4), net.gemm(values[depth // 2], 4))


@given(st.integers(0, 999), st.integers(1, 7))
def test_linear_networks_are_exact(seed: int, depth: int) -> None:
    """Of y = J x + c the moments are c and J J^T, however branches part and meet."""
    model = built(lambda net, x: affine(net, x, seed, depth), PLAIN, seed=seed)
    found = propagate_moments(analysed(model, PLAIN)).moments[model.graph.output[0].name]
    unit = np.concatenate([np.zeros((1, 6)), np.eye(6)]).astype(np.float32)
    values = run_ort(model, {"x": unit})[model.graph.output[0].name].astype(np.float64)
    jacobian = (values[1:] - values[0]).T
    scale = float(np.trace(found.covariance))
    np.testing.assert_allclose(found.mean, values[0], atol=1e-4 * np.sqrt(scale))
    np.testing.assert_allclose(found.covariance, jacobian @ jacobian.T, atol=1e-4 * scale)


def plain_block(net: Net, x: str, kind: str) -> str:
    """Add a convolution and an activation."""
    return net.node(kind, net.conv(x, 8, 3, pads=[0] * 4))


def residual_block(net: Net, x: str, kind: str) -> str:
    """Add a branch of two convolutions, which keep the size, to what it comes from."""
    inside = net.node(kind, net.conv(x, 8, 3, pads=[1] * 4))
    return net.node(kind, net.node("Add", x, net.conv(inside, 8, 3, pads=[1] * 4)))


@pytest.mark.parametrize(("block", "factor"), [(plain_block, 2.0), (residual_block, 4.0)])
@pytest.mark.parametrize("kind", ["Relu", "Tanh"])
@given(seed=st.integers(0, 99))
def test_deep_networks_are_right_within_a_factor(
    block: Callable[[Net, str, str], str], factor: float, kind: str, seed: int
) -> None:
    """So is the variance of five layers without borders, and of four residual blocks with them."""
    dims = (2, 3, 14, 14)

    def build(net: Net, x: str) -> str:
        x = plain_block(net, x, kind)
        for _ in range(4):
            x = block(net, x, kind)
        return x

    model = built(build, dims, seed=seed)
    name = model.graph.output[0].name
    found = propagate_moments(analysed(model, dims)).moments[name].total
    x = np.random.default_rng(seed).standard_normal((128, *dims[1:])).astype(np.float32)
    expected = float(np.trace(observed(run_ort(model, {"x": x})[name], 1)[1]))
    assert 1 / factor < found / expected < factor


@given(st.integers(0, 99), st.integers(1, 5))
def test_activations_in_networks_without_places(seed: int, depth: int) -> None:
    """Of six inputs, matrices, activations and up to five residual sums, variances are within a factor of 2."""

    def build(net: Net, x: str) -> str:
        x = net.gemm(x, 16)
        for _ in range(depth):
            x = net.node("Add", x, net.gemm(net.node("Relu", net.gemm(x, 16)), 16))
        return x

    model = built(build, PLAIN, seed=seed)
    name = model.graph.output[0].name
    found = propagate_moments(analysed(model, PLAIN)).moments[name]
    x = np.random.default_rng(seed).standard_normal((20_000, 6)).astype(np.float32)
    _, covariance = observed(run_ort(model, {"x": x})[name], 1)
    assert 0.5 < found.total / float(np.trace(covariance)) < 2.0


def test_normalisations_state_what_they_saw() -> None:
    """Whatever the input is, what a normalisation makes has the mean and the deviation that it states."""
    model = built(lambda net, x: net.batch_norm(net.conv(x, 5, 3)), MAP)
    made = propagate_moments(analysed(model, MAP)).moments[model.graph.output[0].name]
    arrays = {t.name: onnx.numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    scale, shift, _, variance = (arrays[name] for name in model.graph.node[1].input[1:])
    np.testing.assert_allclose(made.mean, shift, atol=1e-7)
    np.testing.assert_allclose(made.variance, scale**2 * variance / (variance + 1e-5), rtol=1e-6)


def test_what_has_no_rule_says_so() -> None:
    """The reason names the node, goes with all that follows, and ends at a normalisation."""
    model = built(lambda net, x: (net.node("Relu", net.node("Softmax", net.conv(x, 5, 3), name="soft")),), MAP)
    found = propagate_moments(analysed(model, MAP))
    assert set(found.unknown) == {name for node in model.graph.node[1:] for name in node.output}
    assert all("'soft' (Softmax)" in why for why in found.unknown.values())
    model = built(lambda net, x: net.batch_norm(net.node("Softmax", x)), MAP)
    assert model.graph.output[0].name in propagate_moments(analysed(model, MAP)).moments


def test_what_is_not_finite_is_not_known() -> None:
    """The reciprocal of a Gaussian number has no variance."""
    model = built(lambda net, x: net.node("Reciprocal", x), PLAIN)
    assert "finite" in propagate_moments(analysed(model, PLAIN)).unknown[model.graph.output[0].name]


def test_only_what_is_asked_for_is_kept() -> None:
    """Moments of other values are dropped on the way."""
    model = built(lambda net, x: net.gemm(net.node("Relu", net.gemm(x, 9)), 5), PLAIN)
    first = model.graph.node[0].output[0]
    assert set(propagate_moments(analysed(model, PLAIN), [first]).moments) == {first}


def duplicated(net: Net, x: str) -> str:
    """Add a layer of which every channel has a copy, behind an activation."""
    weight = np.random.default_rng(3).normal(size=(4, 6))
    hidden = net.node("Gemm", x, net.constant(np.concatenate([weight, weight])), transB=1)
    return net.gemm(net.node("Tanh", hidden), 5)


def test_copies_are_superfluous() -> None:
    """With half of the channels left nothing is lost where the other half are copies; with fewer, something is."""
    analysis = analysed(built(duplicated, PLAIN), PLAIN)
    groups = [group for group in analysis.channels.groups if not group.frozen]
    judgement = judge_readings(groups, analytic_readings(analysis, groups, seed=0))[groups[0].name]
    assert {int(c) % 4 for c in judgement.selected(4)} == {0, 1, 2, 3}
    assert judgement.damage[4] < 1e-6 * judgement.damage[0] < judgement.damage[3]


def convolutional(net: Net, x: str) -> str:
    """Add a small network with a residual block, a pool and a Flatten."""
    x = net.node("Relu", net.conv(x, 8, 3, pads=[1] * 4))
    x = net.node("Add", x, net.conv(net.node("Relu", net.conv(x, 12, 3, pads=[1] * 4)), 8, 3, pads=[1] * 4))
    x = net.node("AveragePool", net.node("Relu", x), kernel_shape=[2, 2], strides=[2, 2])
    return net.gemm(net.node("Relu", net.gemm(net.node("Flatten", x), 20)), 5)


@pytest.mark.parametrize("seed", range(4))
def test_damage_is_that_of_samples(seed: int) -> None:
    """On Gaussian inputs, every group's damage is within a factor of 2 of what samples tell, at every width."""
    dims = (2, 3, 8, 8)
    model = built(convolutional, dims, seed=seed)
    analysis = analysed(model, dims)
    groups = [group for group in analysis.channels.groups if not group.frozen]
    assert len(groups) == 3
    white = {"x": Moments(1, np.zeros(3), np.eye(3), (0.0,) * 4)}
    told = judge_readings(groups, analytic_readings(analysis, groups, 0, white))
    samples = load_samples({"x": drawn(white["x"], dims, 2000)}, analysis.graph)
    seen = judge_groups(analysis, groups, samples, Provider.CPU, seed=0)
    assert set(told) == set(seen) == {group.name for group in groups}
    for group in groups:
        ours, theirs = (found[group.name].damage[: group.channels // 2] for found in (told, seen))
        assert (ours / theirs < 2).all()
        assert (theirs / ours < 2).all()
        assert told[group.name].knows_channels == seen[group.name].knows_channels
    assert any(judgement.knows_channels for judgement in told.values())


@pytest.mark.parametrize("size", [1.0, 40.0])
def test_the_first_layer_tells_how_large_inputs_are(size: float) -> None:
    """Raw features, whose normalisation was folded into the first layer, are found again: deviation and mean."""
    rng = np.random.default_rng(0)
    weight, mean = rng.normal(size=(64, 6)) / np.sqrt(6), size * rng.normal(size=6)

    def build(net: Net, x: str) -> str:
        hidden = net.node("Gemm", x, net.constant(weight / size), net.constant(-weight @ mean / size), transB=1)
        return net.gemm(net.node("Relu", hidden), 3)

    analysis = analysed(built(build, PLAIN), PLAIN)
    found = input_scale(analysis, "x")
    assert found is not None
    assert found.deviation == pytest.approx(size, rel=0.2)
    np.testing.assert_allclose(found.mean, mean, atol=0.05 * size)
    assert has_plausible_inputs(analysis)


def test_biases_that_no_input_explains_are_told() -> None:
    """A first layer whose results are far from zero for any input is not to be trusted with its scale."""

    def build(net: Net, x: str) -> str:
        hidden = net.node(
            "Gemm", x, net.constant(np.ones((8, 6))), net.constant(50.0 * (-1.0) ** np.arange(8)), transB=1
        )
        return net.gemm(net.node("Relu", hidden), 3)

    assert not has_plausible_inputs(analysed(built(build, PLAIN), PLAIN))


def recurrent(*, hidden: bool) -> onnx.ModelProto:
    """A recurrent layer over features, behind a perceptron or not."""
    net = Net(17, seed=4)
    x = net.input(5, 1, 8)
    if hidden:
        x = net.matmul(net.node("Relu", net.matmul(x, 12, name="first")), 6, name="second")
    width = 6 if hidden else 8
    weights = [net.weight(1, 64, size, fan_in=size) for size in (width, 16)]
    y = net.many("LSTM", [x, *weights], 3, hidden_size=16, name="recurrent")[0]
    net.output(net.matmul(net.reshape(y, 5, 1, 16), 3, name="last"))
    return net.model()


@pytest.mark.parametrize("hidden", [False, True])
def test_the_note_says_what_moments_decided(*, hidden: bool) -> None:
    """Where no rule tells moments of a group, its weights decide; the note says so of this group and no other."""
    report = onnxfuse.compress(recurrent(hidden=hidden), ratio=0.5, prove=False, provider="cpu").report
    methods = {group.name: group.method for group in report.groups if group.method}
    assert methods["recurrent"] == "intra-fusion"
    (note,) = (note for note in report.notes if note.startswith("no data"))
    alone = sorted(name for name, method in methods.items() if method == "intra-fusion")
    named = re.search(r"\(('.*?')\)", note)
    assert named is not None
    assert sorted(named[1].replace("'", "").split(", ")) == alone
    assert "by the weights alone (intra-fusion)" in note
    assert ("what is kept is chosen by moments" in note) == (len(alone) < len(methods)) == hidden


def test_the_note_names_no_group_where_moments_decide_all() -> None:
    """Of a perceptron over features all is known; a method that chooses by weights is told how much to keep by them."""
    net = Net(17, seed=4)
    net.output(net.matmul(net.node("Relu", net.matmul(net.input(1, 8, batch="n"), 12, name="first")), 3, name="last"))
    options: Mapping[str, Any] = {"prove": False, "provider": "cpu"}
    (note,) = onnxfuse.compress(net.model(), ratio=0.5, **options).report.notes
    assert "what is kept is chosen by moments" in note
    assert "intra-fusion" not in note
    note = onnxfuse.compress(net.model(), target="params=0.6", method="prune", **options).report.notes[0]
    assert "how much each group keeps is chosen by moments" in note
