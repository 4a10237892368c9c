"""Batch normalisation, and the faults that the paper's released code has around it (by their numbers in the notes).

Each network is judged by what it computes: channels that are copies of each other merge without a change, channels that
nobody reads go without a change, whatever the statistics are and whoever else reads the values.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxfuse
from onnxfuse.arrays import FloatArray
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.fusion.methods import METHODS
from onnxfuse.fusion.weights import WeightState
from onnxfuse.statistics.features import ChannelFeatures
from tests.builders import Net, initializers, run_ort, run_ort_all
from tests.laws import (
    analysis_of,
    assert_same_outputs,
    free_groups,
    fuse,
    group_called,
    with_copies,
    with_unread,
)

Build: TypeAlias = Callable[[Net], None]

WIDTH = 4
LABELS = np.array([0, 1, 0, 1])


def made(build: Build, *, seed: int = 0) -> Net:
    """Write a network."""
    net = Net(17, seed=seed)
    build(net)
    return net


def check_merging(net: Net, name: str = "first") -> None:
    """Merge copies by means and sums, and drop what is unread: both change nothing."""
    analysis = analysis_of(net.model())
    group = group_called(analysis, name)
    assert not group.frozen
    labels = np.resize(LABELS, group.channels)
    doubled = with_copies(analysis, group, labels)
    assert doubled is not None
    merged = fuse(analysis_of(doubled), {name: ChannelMap.clusters(labels, 2)})
    assert_same_outputs(run_ort(doubled, net.feeds), run_ort(merged.model, net.feeds))
    unread = with_unread(analysis, group, np.array([1, 2]))
    assert unread is not None
    kept = np.setdiff1d(np.arange(group.channels), [1, 2])
    pruned = fuse(analysis_of(unread), {name: ChannelMap.selection(kept, group.channels)})
    assert_same_outputs(run_ort(unread, net.feeds), run_ort(pruned.model, net.feeds))


def folded(weights: FloatArray, scale: FloatArray, variance: FloatArray, epsilon: float) -> FloatArray:
    """The paper's equation 1 with the epsilon that the operator adds; nothing where nothing is left to divide by."""
    deviation = np.sqrt(variance + epsilon)
    factor = np.divide(scale, deviation, out=np.zeros_like(scale), where=deviation > 0)
    return weights * factor[:, None]


def features_of(net: Net) -> ChannelFeatures:
    """Return what importances and costs see of the first group."""
    analysis = analysis_of(net.model())
    state = WeightState(analysis.graph, analysis.shapes, analysis.channels)
    return state.features(group_called(analysis, "first"))


class TestFaults:
    """What goes wrong in the released code."""

    @pytest.mark.parametrize("epsilon", [None, 1e-3, 1e-7])
    @pytest.mark.parametrize("variance", [1e-2, 1e-4, 1e-6, 1e-12, 0.0])
    def test_fault_2_epsilon(self, variance: float, epsilon: float | None) -> None:
        """Folding adds the epsilon that the operator adds: small variances make no error, none makes no infinity."""

        def build(net: Net) -> None:
            h = net.conv(net.input(1, 2, 4, 4), WIDTH, name="first")
            variances = net.constant(np.array([1.0, variance, 0.5, variance]))
            scales = net.vector(WIDTH, low=0.01, high=0.02)
            h = net.batch_norm(h, parameters=(scales, net.vector(WIDTH), net.vector(WIDTH), variances), epsilon=epsilon)
            net.output(net.conv(net.node("Relu", h), 3))

        net = made(build)
        check_merging(net)
        (producer,) = [m for m in features_of(net).members if m.bn_scale is not None]
        names = next(list(n.input) for n in net.nodes if n.op_type == "BatchNormalization")
        scale, stored = (net.values[names[slot]].astype(np.float64) for slot in (1, 4))
        rows = net.values["first_w"].astype(np.float64).reshape(WIDTH, -1)
        want = folded(rows, scale, stored, 1e-5 if epsilon is None else epsilon)
        np.testing.assert_allclose(producer.weights, want, rtol=1e-6)
        assert np.isfinite(producer.weights).all()

    @pytest.mark.parametrize("method", sorted(METHODS))
    @pytest.mark.parametrize("dead", [[1], [0, 2], [0, 1, 2, 3]])
    def test_fault_3_zero_channels(self, dead: list[int], method: str) -> None:
        """Channels of zeros make no NaN, neither in weights nor in outputs."""

        def build(net: Net) -> None:
            weight = net.rng.standard_normal((WIDTH, 2, 3, 3))
            weight[dead] = 0
            bias = net.rng.standard_normal(WIDTH)
            bias[dead] = 0
            x = net.input(1, 2, 4, 4)
            h = net.node("Conv", x, net.constant(weight), net.constant(bias), name="first")
            after = net.rng.standard_normal((3, WIDTH, 1, 1))
            after[:, dead] = 0
            net.output(net.node("Conv", net.node("Relu", h), net.constant(after)))

        net = made(build)
        result = onnxfuse.compress(net.model(), ratio=0.5, method=method, provider="cpu")
        assert all(np.isfinite(value).all() for value in initializers(result.model).values())
        assert all(np.isfinite(value).all() for value in run_ort(result.model, net.feeds).values())

    def test_fault_4a_pre_activation(self) -> None:
        """A convolution that is read by a normalisation and by a skip is not folded into."""

        def build(net: Net) -> None:
            h = net.conv(net.input(1, 2, 4, 4), WIDTH, name="first")
            y = net.node("Relu", net.batch_norm(h))
            net.output(net.conv(net.node("Add", h, net.conv(y, WIDTH, name="second")), 3))

        check_merging(made(build))

    def test_fault_4b_norm_before_another_width(self) -> None:
        """A normalisation that a convolution of another width follows directly, as in MobileNetV2."""

        def build(net: Net) -> None:
            h = net.batch_norm(net.conv(net.input(1, 2, 4, 4), WIDTH, name="first"))
            net.output(net.conv(net.batch_norm(net.conv(h, 7, 1, name="second")), 3))

        for name in ("first", "second"):
            check_merging(made(build), name)

    @pytest.mark.parametrize(
        "kind", ["Gemm", "Gemm, transposed", "Gemm, scalar bias", "MatMul", "MatMul, bias", "Conv 1-D"]
    )
    def test_fault_4c_vectors(self, kind: str) -> None:
        """Normalisation after layers that are no 2-D convolutions."""

        def build(net: Net) -> None:
            if kind == "Conv 1-D":
                h = net.batch_norm(net.conv(net.input(1, 2, 5), WIDTH, name="first"))
                net.output(net.conv(net.node("Relu", h), 3))
                return
            x = net.input(3, 5)
            match kind:
                case "Gemm":
                    h = net.gemm(x, WIDTH, name="first", alpha=0.5, beta=2.0)
                case "Gemm, transposed":
                    h = net.gemm(x, WIDTH, name="first", transB=1)
                case "Gemm, scalar bias":
                    h = net.node("Gemm", x, net.weight(5, WIDTH), net.vector(1), name="first")
                case _:
                    h = net.matmul(x, WIDTH, name="first", bias="bias" in kind)
            net.output(net.gemm(net.node("Relu", net.batch_norm(h)), 2))

        check_merging(made(build))

    def test_fault_4d_norm_without_a_reader(self) -> None:
        """A normalisation whose result nobody reads does no harm."""

        def build(net: Net) -> None:
            h = net.conv(net.input(1, 2, 4, 4), WIDTH, name="first")
            net.batch_norm(h, name="unread")
            net.output(net.conv(net.node("Relu", h), 3))

        check_merging(made(build))
        onnxfuse.compress(made(build).model(), ratio=0.5, provider="cpu")

    @pytest.mark.parametrize("method", sorted(METHODS))
    def test_fault_6_flatten_and_groups(self, method: str) -> None:
        """A flattened image of more than one place, and grouped convolutions, are fused like all others."""

        def build(net: Net) -> None:
            h = net.conv(net.input(1, 2, 4, 4), WIDTH, name="first")
            h = net.node("Relu", net.conv(h, 8, name="grouped", group=2))
            net.output(net.gemm(net.node("Flatten", h), 3))

        net = made(build)
        for name in ("first", "grouped"):
            analysis = analysis_of(net.model())
            group = group_called(analysis, name)
            labels = np.arange(group.channels) // 2
            doubled = with_copies(analysis, group, labels)
            assert doubled is not None
            merged = fuse(analysis_of(doubled), {name: ChannelMap.clusters(labels, group.channels // 2)})
            assert_same_outputs(run_ort(doubled, net.feeds), run_ort(merged.model, net.feeds))
        result = onnxfuse.compress(net.model(), ratio=0.5, method=method, provider="cpu")
        assert result.report.after.parameters < result.report.before.parameters
        assert all(np.isfinite(value).all() for value in run_ort(result.model, net.feeds).values())

    def test_fault_7_transposed_bias(self) -> None:
        """A transposed convolution with a bias is fused with its bias."""

        def build(net: Net) -> None:
            h = net.conv_transpose(net.input(1, 2, 4, 4), WIDTH, name="first")
            net.output(net.conv(net.node("Relu", h), 3))

        net = made(build)
        check_merging(net)
        members = features_of(net).members
        assert [m.bias is not None for m in members if m.role == "producer"] == [True]


class TestNormalisation:
    """Normalisation in every place."""

    @pytest.mark.parametrize(
        "build",
        [
            lambda net: net.output(net.conv(net.batch_norm(_first(net), name="a"), 3)),
            lambda net: net.output(net.conv(net.batch_norm(net.node("Relu", _first(net))), 3)),
            lambda net: net.output(net.conv(net.batch_norm(net.batch_norm(_first(net))), 3)),
            lambda net: net.output(net.conv(net.batch_norm(net.conv(_first(net), WIDTH, group=WIDTH)), 3)),
            lambda net: net.output(net.conv(net.batch_norm(net.node("Concat", _first(net), "x0", axis=1)), 3)),
            lambda net: net.output(net.conv(net.batch_norm(net.node("Sub", _first(net), _per_channel(net))), 3)),
            lambda net: net.output(net.conv(net.batch_norm(net.node("Sub", _per_channel(net), _first(net))), 3)),
            lambda net: net.output(net.conv(net.batch_norm(net.node("Mul", _first(net), _per_channel(net))), 3)),
            lambda net: net.output(net.conv(net.batch_norm(net.node("MaxPool", _first(net), kernel_shape=[2, 2])), 3)),
            lambda net: net.output(net.conv(net.slice(net.batch_norm(_first(net, 8)), [0], [4], [1]), 3)),
        ],
        ids=["plain", "after relu", "twice", "depthwise", "concat", "sub", "const sub", "mul", "pool", "slice"],
    )
    def test_copies(self, build: Build) -> None:
        """Copies merge, unread channels go."""
        net = made(build)
        for group in free_groups(analysis_of(net.model())):
            check_merging(net, group.name)

    @settings(deadline=None, max_examples=25)
    @given(
        st.integers(0, 2**16), st.lists(st.sampled_from([0.0, 1e-30, -1.0, 1.0, 1e4]), min_size=WIDTH, max_size=WIDTH)
    )
    def test_any_scale(self, seed: int, scales: list[float]) -> None:
        """Scales of zero, tiny, negative and huge ones, side by side."""

        def build(net: Net) -> None:
            h = net.conv(net.input(1, 2, 4, 4), WIDTH, name="first")
            scale = net.constant(np.array(scales))
            others = [net.vector(WIDTH), net.vector(WIDTH), net.vector(WIDTH, low=0.5, high=2.0)]
            net.output(net.conv(net.node("Relu", net.batch_norm(h, parameters=(scale, *others))), 3))

        check_merging(made(build, seed=seed))

    @settings(deadline=None, max_examples=25)
    @given(seed=st.integers(0, 2**16), dead=st.booleans())
    def test_any_map(self, *, seed: int, dead: bool) -> None:
        """Whatever the output map A, layer and normalisation together make A times what they made before."""

        def build(net: Net) -> None:
            h = net.conv(net.input(1, 2, 4, 4), WIDTH, name="first")
            scale = net.rng.uniform(-1.5, 1.5, WIDTH)
            scale[1] *= not dead
            parameters = [net.constant(scale), net.vector(WIDTH), net.vector(WIDTH), net.vector(WIDTH, low=0.1, high=2)]
            net.stated = [net.batch_norm(h, name="norm", parameters=parameters)]
            net.output(net.conv(net.node("Relu", net.stated[0]), 3))

        net = made(build, seed=seed)
        rng = np.random.default_rng(seed)
        output = rng.standard_normal((2, WIDTH))
        some = ChannelMap(output, rng.standard_normal((WIDTH, 2)), np.array([0, 2]))
        fused = fuse(analysis_of(net.model()), {"first": some})
        (value,) = net.stated
        before, after = (run_ort_all(m, net.feeds)[value] for m in (net.model(), fused.model))
        want = np.einsum("kc,nchw->nkhw", output, before.astype(np.float64)).astype(np.float32)
        assert_same_outputs({value: want}, {value: after})

    def test_shared_parameters(self) -> None:
        """Two normalisations that share their vectors part when one is fused, and stay together if both are."""

        def build(net: Net) -> None:
            ones, zeros = net.constant(np.ones(WIDTH), name="ones"), net.constant(np.zeros(WIDTH), name="zeros")
            shared = (ones, zeros, zeros, ones)
            h = net.batch_norm(net.conv(net.input(1, 2, 4, 4), WIDTH, name="first"), parameters=shared)
            h = net.batch_norm(net.conv(net.node("Relu", h), WIDTH, name="second"), parameters=shared)
            net.output(net.conv(net.node("Relu", h), 3))

        net = made(build)
        check_merging(net)
        halves = ChannelMap.selection(np.array([0, 2]), WIDTH)
        both = fuse(analysis_of(net.model()), {"first": halves, "second": halves}).model
        one = fuse(analysis_of(net.model()), {"first": halves}).model
        assert [k for k in initializers(both) if "ones" in k or "zeros" in k] == ["ones", "zeros"]
        assert {v.shape for k, v in initializers(one).items() if "ones" in k} == {(2,), (4,)}

    def test_other_channels_keep_their_values(self) -> None:
        """Fusing one part of a convolution's channels leaves the rest of its normalisation as it was."""

        def build(net: Net) -> None:
            h = net.batch_norm(net.conv(net.input(1, 2, 4, 4), 8, name="first"), name="norm")
            a, b = net.split(h, [4, 4], 2)
            net.output(net.conv(a, 2), net.conv(b, 2))

        net = made(build)
        fused = fuse(analysis_of(net.model()), {"first:0-4": ChannelMap.clusters(LABELS, 2)})
        names = next(list(n.input) for n in fused.model.graph.node if n.name == "norm")
        old = next(list(n.input) for n in net.nodes if n.name == "norm")
        after = initializers(fused.model)
        for slot in range(1, 5):
            np.testing.assert_allclose(after[names[slot]][2:], net.values[old[slot]][4:], rtol=1e-6)
        second = [fused.model.graph.output[1].name]
        want = {n: v for n, v in run_ort(net.model(), net.feeds).items() if n in second}
        got = {n: v for n, v in run_ort(fused.model, net.feeds).items() if n in second}
        assert_same_outputs(want, got)

    def test_computed_constant_input(self) -> None:
        """A normalisation of a constant that is too large to be computed beforehand is no obstacle."""

        def build(net: Net) -> None:
            large = net.constant(net.rng.standard_normal((1, WIDTH, 40, 40)))
            h = net.node("Add", net.conv(net.input(1, 2, 40, 40), WIDTH, name="first"), net.batch_norm(large))
            net.output(net.conv(h, 3))

        analysis = analysis_of(made(build).model())
        assert group_called(analysis, "first").frozen or free_groups(analysis)


def _first(net: Net, width: int = WIDTH) -> str:
    return net.conv(net.input(1, 2, 4, 4), width, name="first")


def _per_channel(net: Net) -> str:
    return net.vector(WIDTH, 1, 1, low=0.5, high=1.5)


def test_check_merging_can_fail() -> None:
    """The check fails where copies are merged to something else: here the statistics of a layer normalisation."""

    def build(net: Net) -> None:
        h = net.conv(net.input(1, 2, 4, 4), WIDTH, name="first")
        h = net.node("Transpose", h, perm=[0, 2, 3, 1])
        h = net.node("LayerNormalization", h, net.vector(WIDTH, low=0.5, high=1.5), net.vector(WIDTH))
        net.output(net.matmul(h, 2))

    net = made(build)
    assert not group_called(analysis_of(net.model()), "first").frozen
    with pytest.raises(AssertionError):
        check_merging(net)


def test_a_negative_variance_freezes_its_channels() -> None:
    """A variance without a root makes NaN in ONNX Runtime; its channels are kept, with a reason, the others go on."""
    net = Net()
    x = net.conv(net.input(4, 3, 6, 6), 8, name="first")
    vectors = [net.vector(8), net.vector(8), net.vector(8), net.constant(np.linspace(-1.0, 1.0, 8), name="variance")]
    x = net.node("Relu", net.batch_norm(x, parameters=vectors))
    net.output(net.conv(net.conv(x, 8, name="second"), 2, name="last"))
    groups = {g.name: g.frozen for g in onnxfuse.inspect(net.model()).groups}
    assert groups["first"] == "weight 'variance' is a variance, and has negative values"
    assert groups["second"] is None
