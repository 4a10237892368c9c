"""How much a reader's weights count: laws of relative damages, and the standard error of a variance."""

import numpy as np
import onnx
import pytest
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st
from onnx import numpy_helper

import onnxfuse
from onnxfuse.calibration.linear import linear_nodes
from onnxfuse.calibration.observe import reading_places
from onnxfuse.fusion.weights import WeightState
from onnxfuse.statistics.damage import Reading, greedy_order
from onnxfuse.statistics.features import Role
from onnxfuse.statistics.relative import cautious_weights, relative_weights, unseen_variances, variance_errors
from tests.builders import AnyArray, Net
from tests.examples import EXAMPLES, Example
from tests.laws import analysis_of


@given(st.integers(0, 99), st.floats(-50, 50), st.integers(20, 400))
def test_the_error_of_a_variance_follows_from_the_kurtosis(seed: int, origin: float, count: int) -> None:
    """It is the root of the kurtosis less one over the number of samples, about whatever origin powers are taken."""
    x = np.random.default_rng(seed).gamma(0.7, size=(count, 3))
    powers = np.stack([((x - origin) ** k).mean(axis=0) for k in (1, 2, 3, 4)])
    expected = np.sqrt((scipy.stats.kurtosis(x, fisher=False) - 1) / count)
    np.testing.assert_allclose(variance_errors(powers, count), expected, rtol=1e-3, atol=1e-3)


def test_the_error_of_a_variance_is_that_over_many_draws() -> None:
    """Variances of many draws of 500 numbers spread as one draw foretells."""
    rng = np.random.default_rng(0)
    x = rng.exponential(size=(4000, 500))
    spread = x.var(axis=1).std()
    one = rng.exponential(size=(10**6, 1))
    powers = np.stack([(one**k).mean(axis=0) for k in (1, 2, 3, 4)])
    assert spread == pytest.approx(float(variance_errors(powers, 500)[0]), rel=0.05)


@given(seed=st.integers(0, 99), apart=st.booleans())
def test_weights_count_relative_to_what_outputs_vary_by(*, seed: int, apart: bool) -> None:
    """J without all channels is 1: of every output where they are told apart, or of all of them together."""
    rng = np.random.default_rng(seed)
    weights, root = rng.normal(size=(6, 4)) * np.array([1.0, 3.0, 0.5, 2.0]), rng.normal(size=(6, 6))
    covariance = root @ root.T
    variances = np.diag(weights.T @ covariance @ weights).copy()
    assume(variances.min() > 0.03 * variances.mean())
    seen = relative_weights(weights, variances, np.arange(4)[None] if apart else None)
    assert Reading(covariance, np.zeros((6, 1)), seen).damage == pytest.approx(1.0, rel=1e-9)
    each = np.diag(seen.T @ covariance @ seen)
    expected = np.full(4, 0.25) if apart else variances / variances.sum()
    np.testing.assert_allclose(each, expected, rtol=1e-9)


def test_an_output_that_hardly_changes_does_not_decide() -> None:
    """Its error counts relative to three percent of the mean variance."""
    seen = relative_weights(np.eye(2), np.array([1.0, 1e-12]), np.array([[0, 1]]))
    np.testing.assert_allclose(np.square(np.diag(seen)), [0.5, 0.5 / 0.015], rtol=1e-9)
    np.testing.assert_array_equal(relative_weights(np.eye(2), np.zeros(2), np.array([[0, 1]])), np.eye(2))


def test_copies_follow_from_each_other_however_unsure_their_variance_is() -> None:
    """Without half of the channels, which are copies of the others, nothing is lost."""
    rng = np.random.default_rng(3)
    root = np.repeat(rng.normal(size=(4, 4)), 2, axis=0)
    weights = cautious_weights(rng.normal(size=(8, 3)), np.repeat([0.0, 0.5, 2.0, 1.0], 2))
    _, damage = greedy_order([Reading(root @ root.T, np.zeros((8, 1)), weights)])
    assert damage[4] < 1e-8 * damage[0]
    assert damage[3] > 1e-3 * damage[0]


def two_layers(factors: AnyArray) -> onnx.ModelProto:
    """A network of three layers, in which channels of the second are made louder and read more softly."""
    net = Net(17, seed=5)
    h = net.node("Relu", net.gemm(net.input(1, 6, batch="n"), 8, name="first"))
    h = net.node("Relu", net.gemm(h, 8, name="second"))
    net.output(net.gemm(h, 3, name="third"))
    model = net.model()
    by_name = {tensor.name: tensor for tensor in model.graph.initializer}
    second, third = ([by_name[name] for name in node.input[1:]] for node in model.graph.node[2::2])
    scales = [(tensor, factors) for tensor in second] + [(third[0], 1 / factors[:, None])]
    for tensor, scale in scales:
        value = numpy_helper.to_array(tensor) * scale
        tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), tensor.name))
    return model


def test_damages_do_not_depend_on_how_a_scale_is_split() -> None:
    """Of a channel behind a ReLU it does not matter whether it is loud, or what reads it is."""
    factors = 2.0 ** np.arange(-2, 6)[[0, 3, 1, 2, 0, 2, 1, 3]]
    feeds = {two_layers(np.ones(8)).graph.input[0].name: np.random.default_rng(1).normal(size=(300, 6))}
    feeds = {name: x.astype(np.float32) for name, x in feeds.items()}
    planned = [
        onnxfuse.plan(two_layers(f), ratio=0.5, calibration=feeds, provider="cpu", prove=False)
        for f in (np.ones(8), factors)
    ]
    plain, split = ([g.damage for g in plan.groups.values() if g.damage is not None] for plan in planned)
    assert len(plain) == 2
    assert split == pytest.approx(plain, rel=1e-3)


LINEAR = [example for example in EXAMPLES if example.free and example.op in {"Conv", "Gemm", "MatMul"}]


@pytest.mark.parametrize("example", LINEAR, ids=lambda example: example.name)
def test_outputs_are_those_that_weights_belong_to(example: Example) -> None:
    """With one output's filter doubled, the numbers of that output change and no others."""
    analysis = analysis_of(example.net().model())
    linear = {node.node.index: node for node in linear_nodes(analysis.graph, analysis.channels)}
    groups = [group for group in analysis.channels.groups if not group.frozen]
    for group in groups:
        for place in reading_places(analysis, [group])[group.name]:
            if place.outputs is None:
                continue
            operand = group.parameters[place.parameter].operand
            node = linear[operand.node]
            state = WeightState(analysis.graph, analysis.shapes, analysis.channels)
            weight = state.array(operand)
            output = weight.shape[node.output_axis] // 2
            doubled = np.moveaxis(weight.copy(), node.output_axis, 0)
            doubled[output] *= 2
            state.replace(operand, np.moveaxis(doubled, 0, node.output_axis))
            members = [i for i, p in enumerate(group.parameters) if p.role in {Role.PRODUCER, Role.CONSUMER}]
            after = state.features(group).members[members.index(place.parameter)].weights
            channels = len(after) // len(place.outputs)
            expected = np.repeat(place.outputs == output, channels, axis=0) & (place.weights != 0)
            np.testing.assert_array_equal(after != place.weights, expected)


def test_outputs_are_told_apart_where_no_residual_sum_follows() -> None:
    """A layer before an activation has its outputs told apart, in groups too; one that ends in a residual sum not."""
    net = Net(17, seed=5)
    x = net.node("Relu", net.conv(net.input(1, 3, 6, 6, batch="n"), 8, name="stem"))
    h = net.node("Relu", net.conv(x, 8, name="grouped", group=2))
    h = net.node("Relu", net.conv(h, 12, name="inner"))
    h = net.node("Relu", net.node("Add", net.conv(h, 8, name="last"), x))
    net.output(net.gemm(net.node("Flatten", net.node("GlobalAveragePool", h)), 5, name="head", transB=1))
    analysis = analysis_of(net.model())
    groups = [group for group in analysis.channels.groups if not group.frozen]
    places = [place for found in reading_places(analysis, groups).values() for place in found]
    told = {place.end: place.outputs is not None for place in places}
    ends = {node.name: node.outputs[0] for node in analysis.graph.nodes}
    add = next(node.outputs[0] for node in analysis.graph.nodes if node.op == "Add")
    assert {name: told[ends[name]] for name in ("grouped", "inner", "head")} == dict.fromkeys(
        ("grouped", "inner", "head"), True
    )
    assert not told[add]


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=9),
    st.floats(1e-6, 1e6),
)
def test_every_channel_that_changes_may_vary_by_as_much_more(variances: list[float], scale: float) -> None:
    """Whatever the scale, all variances that are not zero grow by half of the mean one; the others stay."""
    values = scale * np.array(variances)
    more = values * unseen_variances(values)
    np.testing.assert_allclose(more, np.where(values > 0, 0.5 * values.mean(), 0.0), rtol=1e-9)
