"""The laws of the whole package on random networks, and the proof that the assertions can fail."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

import onnxfuse
from onnxfuse.arrays import IntArray
from onnxfuse.errors import UnsupportedGraphError
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.fusion.methods import METHODS
from tests.builders import AnyArray, Net, initializers, run_ort, run_ort_all, run_reference
from tests.laws import (
    Fused,
    analysis_of,
    assert_only_weights_differ,
    assert_predicted,
    assert_same_bytes,
    assert_same_outputs,
    assert_same_shapes,
    assert_same_weights,
    assert_valid,
    free_groups,
    fuse,
    group_called,
    macs_of_run,
    with_copies,
    with_unread,
)
from tests.strategies import OPSETS, RandomNet, nets


def laws(examples: int) -> settings:
    """Return settings for so many networks; drawing one takes a while."""
    return settings(deadline=None, max_examples=examples, suppress_health_check=[HealthCheck.too_slow])


SEEDS = st.integers(0, 2**32 - 1)


class Size(NamedTuple):
    """A group that may change: how many channels each of its sets has, and how many sets there are."""

    name: str
    channels: int
    sets: int

    def each(self, find: Callable[[int], ChannelMap]) -> ChannelMap:
        """Return a map of all sets: of what is found for so many channels, one after the other."""
        return ChannelMap.side_by_side([find(self.channels) for _ in range(self.sets)])

    def labels(self, find: Callable[[int], IntArray], kept: int) -> IntArray:
        """Return labels from 0 to ``kept`` for the channels of each set, made different in different sets."""
        return np.concatenate([find(self.channels) + number * kept for number in range(self.sets)])


def permutations(groups: list[Size], seed: int) -> dict[str, ChannelMap]:
    """Make a random permutation for every set of every group."""
    rng = np.random.default_rng(seed)
    return {g.name: g.each(lambda channels: ChannelMap.permutation(rng.permutation(channels))) for g in groups}


def sizes(model: onnx.ModelProto, *, exact: bool = False) -> list[Size]:
    """Return every group that may change; ``exact`` leaves out those with statistics over them."""
    groups = free_groups(analysis_of(model))
    return [Size(g.name, g.channels, g.sets) for g in groups if not exact or not (g.unmixable or g.statistic)]


def halves(model: onnx.ModelProto, seed: int) -> Fused:
    """Keep a random half of every set of every group."""
    rng = np.random.default_rng(seed)

    def half(channels: int) -> ChannelMap:
        return ChannelMap.selection(np.sort(rng.permutation(channels)[: max(1, channels // 2)]), channels)

    return fuse(analysis_of(model), {g.name: g.each(half) for g in sizes(model)})


def chain(opset: int = 17) -> Net:
    """Make a small network: two convolutions with a normalisation, flattened, and a Gemm."""
    net = Net(opset, seed=3)
    x = net.conv(net.input(1, 2, 4, 4, batch="N"), 4, name="first")
    x = net.node("Relu", net.batch_norm(x, name="norm"), name="bend")
    x = net.node("Flatten", net.conv(x, 3, name="second"), name="flat")
    net.output(net.gemm(x, 2, name="last"))
    return net


class TestPermutation:
    """A permutation of channels changes nothing."""

    @laws(25)
    @given(nets(), SEEDS)
    def test_every_group_alone(self, net: RandomNet, seed: int) -> None:
        """The channels of one group after the other are permuted."""
        want = run_ort(net.model, net.larger)
        for size in sizes(net.model):
            fused = fuse(analysis_of(net.model), permutations([size], seed))
            assert_same_outputs(want, run_ort(fused.model, net.larger))

    @laws(30)
    @given(nets(), SEEDS)
    def test_all_groups(self, net: RandomNet, seed: int) -> None:
        """The channels of all groups are permuted; every shape stays, and the rewritten model is valid."""
        fused = fuse(analysis_of(net.model), permutations(sizes(net.model), seed))
        assert_same_outputs(run_ort(net.model, net.larger), run_ort(fused.model, net.larger))
        assert_same_shapes(run_ort_all(net.model, net.larger), run_ort_all(fused.model, net.larger))
        assert_valid(fused.model)

    @laws(25)
    @given(nets(dtypes=(TensorProto.FLOAT16, TensorProto.DOUBLE)), SEEDS)
    def test_other_types(self, net: RandomNet, seed: int) -> None:
        """The same in half and in double precision."""
        fused = fuse(analysis_of(net.model), permutations(sizes(net.model), seed))
        assert_same_outputs(run_ort(net.model, net.larger), run_ort(fused.model, net.larger))

    @pytest.mark.parametrize("opset", OPSETS)
    def test_every_operator_set(self, opset: int) -> None:
        """The same for every version that ONNX Runtime takes."""

        @laws(4)
        @given(nets(opsets=(opset,)), SEEDS)
        def check(net: RandomNet, seed: int) -> None:
            fused = fuse(analysis_of(net.model), permutations(sizes(net.model), seed))
            assert_same_outputs(run_ort(net.model, net.larger), run_ort(fused.model, net.larger, optimise=True))

        check()

    @laws(15)
    # The evaluator's GlobalMaxPool drops axes that ONNX keeps, so networks with one say nothing.
    @given(nets(opsets=(17, 21), blocks=2).filter(lambda net: "GlobalMaxPool" not in net.label), SEEDS)
    def test_reference(self, net: RandomNet, seed: int) -> None:
        """The same in ONNX's own implementation, which shares nothing with ONNX Runtime."""
        fused = fuse(analysis_of(net.model), permutations(sizes(net.model), seed))
        want = run_reference(net.model, net.feeds)
        assert_same_outputs(want, run_reference(fused.model, net.feeds))
        assert_same_outputs(want, run_ort(fused.model, net.feeds), tolerance=1e-3)


class TestCopies:
    """Copies merge into one channel without error: producers' mean, consumers' sum."""

    @laws(30)
    @given(nets(), SEEDS)
    def test_clusters(self, net: RandomNet, seed: int) -> None:
        """Channels are made copies of each other, and then merged."""
        rng = np.random.default_rng(seed)
        for size in sizes(net.model, exact=True):
            analysis = analysis_of(net.model)
            kept = (size.channels + 1) // 2

            def kinds(channels: int, kept: int = kept) -> IntArray:
                return rng.permutation(np.concatenate([np.arange(kept), rng.integers(0, kept, channels - kept)]))

            labels = size.labels(kinds, kept)
            doubled = with_copies(analysis, group_called(analysis, size.name), labels)
            if doubled is None:
                continue
            merged = fuse(analysis_of(doubled), {size.name: ChannelMap.clusters(labels, kept * size.sets)})
            want = run_ort(doubled, net.larger)
            assert_same_outputs(want, run_ort(merged.model, net.larger), tolerance=net.rounding)

    @laws(25)
    @given(nets(), SEEDS)
    def test_all_at_once(self, net: RandomNet, seed: int) -> None:
        """Copies in every group, merged in one go."""
        rng = np.random.default_rng(seed)
        model, maps = net.model, {}
        for size in sizes(net.model, exact=True):
            analysis, kept = analysis_of(model), (size.channels + 1) // 2
            labels = size.labels(lambda channels: rng.permutation(np.arange(channels) // 2), kept)
            doubled = with_copies(analysis, group_called(analysis, size.name), labels)
            if doubled is not None:
                model, maps[size.name] = doubled, ChannelMap.clusters(labels, kept * size.sets)
        # Copies of one group need not survive those of the next where they share a weight: keep to what is true.
        maps = {name: m for name, m in maps.items() if _holds(model, name, m)}
        merged = fuse(analysis_of(model), maps)
        assert_same_outputs(run_ort(model, net.larger), run_ort(merged.model, net.larger), tolerance=net.rounding)

    @laws(30)
    @given(nets(), SEEDS)
    def test_unread_channels(self, net: RandomNet, seed: int) -> None:
        """Channels that no consumer weighs are dropped, and nothing changes."""
        rng = np.random.default_rng(seed)
        for size in sizes(net.model, exact=True):
            analysis = analysis_of(net.model)
            kept = size.each(lambda c: ChannelMap.selection(np.sort(rng.permutation(c)[: (c + 1) // 2]), c))
            unread = np.setdiff1d(np.arange(kept.channels), kept.anchors)
            model = with_unread(analysis, group_called(analysis, size.name), unread)
            if model is None:
                continue
            pruned = fuse(analysis_of(model), {size.name: kept})
            assert_same_outputs(run_ort(model, net.larger), run_ort(pruned.model, net.larger))


def _holds(model: onnx.ModelProto, name: str, channel_map: ChannelMap) -> bool:
    """Whether the channels that a map merges are still copies."""
    analysis = analysis_of(model)
    labels = channel_map.input.argmax(axis=1)
    again = with_copies(analysis, group_called(analysis, name), labels)
    return again is not None and again.SerializeToString() == model.SerializeToString()


class TestPredictions:
    """What is predicted from layouts is what the written model has."""

    @laws(30)
    @given(nets(), SEEDS)
    def test_shapes_and_cost(self, net: RandomNet, seed: int) -> None:
        """Shapes, weights' shapes and multiply-accumulates, with half of the channels gone."""
        fused = halves(net.model, seed)
        assert_predicted(fused, net.feeds)
        assert_valid(fused.model)
        assert_only_weights_differ(net.model, fused.model)
        assert_same_shapes(run_ort(net.model, net.larger), run_ort(fused.model, net.larger))

    @laws(25)
    @given(nets())
    def test_cost_before(self, net: RandomNet) -> None:
        """The cost of the original is that of its run."""
        assert analysis_of(net.model).cost.macs == macs_of_run(net.model, net.feeds)

    @laws(25)
    @given(nets(), SEEDS)
    def test_interface(self, net: RandomNet, seed: int) -> None:
        """Graph inputs and outputs are never resized, however small the groups get."""
        analysis = analysis_of(net.model)
        ones = {name: ChannelMap.selection(np.array([seed % c]), c) for name, c, _ in sizes(net.model)}
        fused = fuse(analysis, ones)
        assert_same_shapes(run_ort(net.model, net.larger), run_ort(fused.model, net.larger))
        assert_predicted(fused, net.feeds)


class TestCompress:
    """`onnxfuse.compress` on random networks."""

    @laws(25)
    @given(nets())
    def test_ratio_zero(self, net: RandomNet) -> None:
        """Ratio 0 changes no bit of any weight, and nothing else but the metadata."""
        result = onnxfuse.compress(net.model, ratio=0.0, provider="cpu")
        assert_same_weights(net.model, result.model)
        assert_same_bytes(net.model, result.model)
        assert any(p.key.startswith("onnxfuse") for p in result.model.metadata_props)

    @pytest.mark.parametrize("method", sorted(METHODS))
    def test_half(self, method: str) -> None:
        """At ratio 0.5 with every method the result is valid, runs, has the same interface and no NaN."""

        @laws(20)
        @given(nets(dtypes=(TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.FLOAT16)))
        def check(net: RandomNet) -> None:
            before = net.model.SerializeToString(deterministic=True)
            try:
                result = onnxfuse.compress(net.model, ratio=0.5, method=method, provider="cpu")
            except UnsupportedGraphError:
                assert all(size.channels == 1 for size in sizes(net.model))
                return
            assert_valid(result.model)
            assert_only_weights_differ(net.model, result.model)
            want = run_ort(net.model, net.larger, optimise=True)
            got = run_ort(result.model, net.larger, optimise=True)
            assert_same_shapes(want, got)
            assert all(np.isfinite(value).all() for value in got.values())
            assert net.model.SerializeToString(deterministic=True) == before

        check()

    @laws(10)
    @given(net=nets(), seed=st.integers(0, 9))
    def test_deterministic(self, net: RandomNet, seed: int) -> None:
        """The same seed gives the same bytes."""
        if not sizes(net.model):
            return
        one, two = (
            onnxfuse.compress(net.model, ratio=0.4, method="fold", seed=seed, provider="cpu").model for _ in range(2)
        )
        assert one.SerializeToString(deterministic=True) == two.SerializeToString(deterministic=True)

    def test_file_is_untouched(self, tmp_path: Path) -> None:
        """The input file keeps its bytes, and the output file holds what is returned."""
        path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
        onnx.save(chain().model(), path)
        before = path.read_bytes()
        result = onnxfuse.compress(path, out, ratio=0.5, provider="cpu")
        assert path.read_bytes() == before
        assert onnx.load(out) == result.model
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx", "out.onnx"]

    def test_open_batch_stays_open(self) -> None:
        """A symbolic axis of inputs and outputs keeps its name."""
        model = onnxfuse.compress(chain().model(), ratio=0.5, provider="cpu").model
        for value in (*model.graph.input, *model.graph.output):
            assert value.type.tensor_type.shape.dim[0].dim_param == "N"

    @pytest.mark.parametrize("method", sorted(METHODS))
    def test_dead_channels(self, method: str) -> None:
        """Channels of zeros, everywhere or in part, never make a NaN."""
        for dead in ([0, 2], [0, 1, 2, 3]):
            net = chain()
            for name in ("first_w", "k1"):
                net.values[name][dead] = 0
            model = net.model()
            for tensor in model.graph.initializer:
                tensor.CopyFrom(numpy_helper.from_array(net.values[tensor.name], tensor.name))
            result = onnxfuse.compress(model, ratio=0.5, method=method, provider="cpu")
            assert all(np.isfinite(v).all() for v in initializers(result.model).values())
            assert all(np.isfinite(v).all() for v in run_ort(result.model, net.feeds).values())


def _swap_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Permute the filters of the first convolution and nothing else: what a wrong coupling would do."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name == "first_w":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[[1, 0, 2, 3]], tensor.name))
    return copy


def _changed(change: Callable[[onnx.ModelProto], Any]) -> onnx.ModelProto:
    model = chain().model()
    change(model)
    return model


FRAME_CHANGES: dict[str, Callable[[onnx.ModelProto], Any]] = {
    "ir_version": lambda m: setattr(m, "ir_version", 9),
    "opset": lambda m: setattr(m.opset_import[0], "version", 16),
    "producer": lambda m: setattr(m, "producer_name", "somebody else"),
    "documentation": lambda m: setattr(m.graph, "doc_string", ""),
    "metadata": lambda m: m.metadata_props.pop(),
    "input name": lambda m: setattr(m.graph.input[0], "name", "y"),
    "batch": lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "M"),
    "output": lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 5),
    "node name": lambda m: setattr(m.graph.node[0], "name", "other"),
    "node documentation": lambda m: setattr(m.graph.node[0], "doc_string", ""),
    "missing node": lambda m: m.graph.node.pop(),
    "missing attribute": lambda m: m.graph.node[0].attribute.pop(),
    "other input": lambda m: m.graph.node[2].input.__setitem__(0, "x0"),
}


class TestHelpersFail:
    """Every assertion helper fails on what is wrong."""

    @pytest.mark.parametrize(
        "wrong",
        [
            {"y": np.array([1.0, 50.001], np.float32)},
            {"y": np.array([1.0, np.nan], np.float32)},
            {"y": np.array([[1.0, 50.0]], np.float32)},
            {"y": np.array([1.0, 50.0])},
            {"z": np.array([1.0, 50.0], np.float32)},
            {},
        ],
    )
    def test_same_outputs(self, wrong: dict[str, AnyArray]) -> None:
        """A value, a NaN, a shape, a type, a name, and a missing output."""
        right = {"y": np.array([1.0, 50.0], np.float32)}
        assert_same_outputs(right, {"y": np.array([1.0, 50.0001], np.float32)})
        with pytest.raises(AssertionError):
            assert_same_outputs(right, wrong)

    def test_same_outputs_of_integers(self) -> None:
        """Integers are equal or not."""
        with pytest.raises(AssertionError):
            assert_same_outputs({"y": np.array([1, 10**6])}, {"y": np.array([1, 10**6 + 1])})

    def test_same_outputs_of_tiny_values(self) -> None:
        """Outputs of zeros are no excuse."""
        with pytest.raises(AssertionError):
            assert_same_outputs({"y": np.zeros(2, np.float32)}, {"y": np.full(2, 1e-6, np.float32)})

    def test_permutation_law(self) -> None:
        """A convolution that is permuted alone changes the outputs by far more than is allowed."""
        net = chain()
        with pytest.raises(AssertionError):
            assert_same_outputs(run_ort(net.model(), net.feeds), run_ort(_swap_weights(net.model()), net.feeds))

    def test_copies_law(self) -> None:
        """Channels that are no copies do not merge, and `with_copies` is what makes them copies."""
        net = chain()
        analysis, labels = analysis_of(net.model()), np.array([0, 1, 0, 1])
        merge = {"first": ChannelMap.clusters(labels, 2)}
        doubled = with_copies(analysis, group_called(analysis, "first"), labels)
        assert doubled is not None
        merged = fuse(analysis_of(doubled), merge)
        assert_same_outputs(run_ort(doubled, net.feeds), run_ort(merged.model, net.feeds))
        with pytest.raises(AssertionError):
            assert_same_outputs(run_ort(net.model(), net.feeds), run_ort(fuse(analysis, merge).model, net.feeds))

    def test_unread_law(self) -> None:
        """Dropping channels that are read changes the outputs; the others are what `with_unread` makes."""
        net = chain()
        analysis, kept = analysis_of(net.model()), np.array([0, 2])
        prune = {"first": ChannelMap.selection(kept, 4)}
        unread = with_unread(analysis, group_called(analysis, "first"), np.array([1, 3]))
        assert unread is not None
        pruned = fuse(analysis_of(unread), prune)
        assert_same_outputs(run_ort(unread, net.feeds), run_ort(pruned.model, net.feeds))
        with pytest.raises(AssertionError):
            assert_same_outputs(run_ort(net.model(), net.feeds), run_ort(fuse(analysis, prune).model, net.feeds))

    @pytest.mark.parametrize("wrong", [{"y": np.zeros(3)}, {"z": np.zeros(2)}, {}])
    def test_same_shapes(self, wrong: dict[str, AnyArray]) -> None:
        """Another shape, another name, nothing."""
        assert_same_shapes({"y": np.zeros(2)}, {"y": np.ones(2)})
        with pytest.raises(AssertionError):
            assert_same_shapes({"y": np.zeros(2)}, wrong)

    @pytest.mark.parametrize("value", [np.float32(-0.0), np.float64(0.0), np.zeros(1, np.float32)])
    def test_same_weights(self, value: AnyArray) -> None:
        """A sign of zero, a type, a shape."""

        def model(zero: AnyArray) -> onnx.ModelProto:
            made = chain().model()
            made.graph.initializer.append(numpy_helper.from_array(np.asarray(zero), "zero"))
            return made

        right = model(np.asarray(np.float32(0.0)))
        assert_same_weights(right, model(np.asarray(np.float32(0.0))))
        with pytest.raises(AssertionError):
            assert_same_weights(right, model(value))
        with pytest.raises(AssertionError):
            assert_same_weights(right, chain().model())

    @pytest.mark.parametrize("change", FRAME_CHANGES)
    def test_same_bytes_and_frame(self, change: str) -> None:
        """Whatever is changed outside of the weights."""
        with pytest.raises(AssertionError):
            assert_same_bytes(chain().model(), _changed(FRAME_CHANGES[change]))
        with pytest.raises((AssertionError, ValueError)):
            assert_only_weights_differ(chain().model(), _changed(FRAME_CHANGES[change]))

    def test_own_metadata_is_allowed(self) -> None:
        """Entries that onnxfuse adds are no difference; those of others are."""

        def add(key: str) -> onnx.ModelProto:
            return _changed(lambda m: m.metadata_props.add(key=key, value="1"))

        for check in (assert_same_bytes, assert_only_weights_differ):
            check(chain().model(), add("onnxfuse.ratio"))
            with pytest.raises(AssertionError):
                check(chain().model(), add("other"))

    def test_weights_may_differ(self) -> None:
        """Other weights are another model, in the same frame."""
        assert_only_weights_differ(chain().model(), _swap_weights(chain().model()))
        with pytest.raises(AssertionError):
            assert_same_bytes(chain().model(), _swap_weights(chain().model()))
        with pytest.raises(AssertionError):
            assert_same_weights(chain().model(), _swap_weights(chain().model()))

    def test_valid(self) -> None:
        """A model that the checker rejects, and one whose stated shape is wrong."""
        assert_valid(chain().model())
        for change in ("missing node", "output"):
            with pytest.raises(AssertionError):
                assert_valid(_changed(FRAME_CHANGES[change]))

    def test_predicted(self) -> None:
        """Widths that are not those of the written model, in shapes and in weights alone."""
        net = chain()
        fused = halves(net.model(), 0)
        assert_predicted(fused, net.feeds)
        for atom in list(fused.state.widths):
            wrong = {**fused.state.widths, atom: fused.state.widths[atom] + 1}
            right, fused.state.widths = fused.state.widths, wrong
            with pytest.raises(AssertionError):
                assert_predicted(fused, net.feeds)
            fused.state.widths = right

    def test_predicted_cost(self) -> None:
        """A model that computes something else than what was analysed costs something else."""
        net = chain()
        fused = fuse(analysis_of(net.model()), {})
        net.output(net.gemm(net.outputs[0], 2))
        with pytest.raises(AssertionError):
            assert_predicted(Fused(fused.analysis, fused.state, net.model()), net.feeds)

    def test_macs_of_run(self) -> None:
        """The count by hand: two convolutions of 3 x 3 on 4 x 4 places, and a product."""
        net = chain()
        assert macs_of_run(net.model(), net.feeds) == 16 * 9 * (4 * 2 + 3 * 4) + 48 * 2


def test_labels_are_copies() -> None:
    """`with_copies` makes all of producer, bias and normalisation equal, and leaves consumers alone."""
    net = chain()
    analysis = analysis_of(net.model())
    labels = np.array([0, 0, 1, 1])
    doubled = with_copies(analysis, group_called(analysis, "first"), labels)
    assert doubled is not None
    values = initializers(doubled)
    for name in next(list(n.input[1:]) for n in doubled.graph.node if n.name == "norm"):
        assert values[name][0] == values[name][1]
        assert values[name][2] == values[name][3]
    np.testing.assert_array_equal(values["second_w"], net.values["second_w"])
