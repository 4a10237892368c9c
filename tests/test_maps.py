"""Channel maps, the options of the methods, and the laws that every method keeps."""

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxfuse.arrays import FloatArray, IntArray
from onnxfuse.errors import ConfigError, InvariantError, RegistryError
from onnxfuse.fusion.maps import ChannelMap, OutputNorm
from onnxfuse.fusion.methods import METHODS
from onnxfuse.fusion.options import FusionOptions
from onnxfuse.importance import IMPORTANCES
from onnxfuse.matrices import Matrix, as_dense
from onnxfuse.statistics.features import ChannelFeatures, MemberFeatures, Role
from onnxfuse.transport import MASSES, TARGETS
from tests.activations import permuted_activations, seen

NORMS: list[OutputNorm] = ["sum", "mean"]
ALTERNATIVES = [
    FusionOptions(),
    *(FusionOptions(importance=name) for name in IMPORTANCES if name != "l1"),
    *(FusionOptions(transport_target=name) for name in TARGETS if name != "most-important"),
    *(FusionOptions(source_mass=name) for name in MASSES if name != "uniform"),
    *(FusionOptions(target_mass=name) for name in MASSES if name != "uniform"),
    FusionOptions(solver="entropic", regularisation=0.1),
    FusionOptions(output_norm="mean"),
    FusionOptions(normalised=False, p=2.0),
    FusionOptions(bias_in_cost=True),
]


def group(weights: FloatArray, consumed: FloatArray | None = None) -> ChannelFeatures:
    """Make a group of one producer with a bias and, if there are weights for it, one consumer."""
    scale = np.arange(1.0, len(weights) + 1)
    members = [MemberFeatures("producer", Role.PRODUCER, weights, bias=weights[:, :1] + 1, bn_scale=scale)]
    if consumed is not None:
        members.append(MemberFeatures("consumer", Role.CONSUMER, consumed))
    return ChannelFeatures(len(weights), tuple(members), seen(weights))


def permuted(features: ChannelFeatures, order: IntArray) -> ChannelFeatures:
    """Reorder the channels of a group made by `group`."""
    members = tuple(
        MemberFeatures(
            m.node,
            m.role,
            m.weights[order],
            bias=None if m.bias is None else m.bias[order],
            bn_scale=None if m.bn_scale is None else m.bn_scale[order],
        )
        for m in features.members
    )
    assert features.activations is not None
    return ChannelFeatures(features.channels, members, permuted_activations(features.activations, order))


@st.composite
def groups(draw: st.DrawFn) -> ChannelFeatures:
    """Draw groups; whole weights make copies and channels of zeros common."""
    channels = draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        return group(rng.normal(size=(channels, 9)), rng.normal(size=(channels, 4)))
    largest = draw(st.sampled_from([0, 1, 2]))
    weights = rng.integers(-largest, largest + 1, size=(channels, draw(st.integers(1, 10))))
    return group(weights.astype(float), rng.integers(-largest, largest + 1, size=(channels, 2)).astype(float))


def fuse(
    name: str, features: ChannelFeatures, kept: int, options: FusionOptions | None = None, seed: int = 0
) -> ChannelMap:
    """Find the map of a group by the name of the method, from a fresh generator."""
    return METHODS[name](features, kept, options or FusionOptions(), np.random.default_rng(seed))


def assert_equal_maps(one: ChannelMap, two: ChannelMap, *, atol: float = 0.0) -> None:
    """Assert that two maps are the same, exactly or nearly."""
    np.testing.assert_allclose(one.output, two.output, rtol=0, atol=atol)
    np.testing.assert_allclose(one.input, two.input, rtol=0, atol=atol)
    np.testing.assert_array_equal(one.anchors, two.anchors)


def _gram(matrix: Matrix) -> FloatArray:
    plain = as_dense(matrix)
    return plain.T @ plain


def assert_permutes(channel_map: ChannelMap, of_permuted: ChannelMap, order: IntArray) -> None:
    """Assert that two maps do the same, but for the order of the channels and of the fused channels."""
    place = np.ix_(order, order)
    for one, two in (
        (channel_map.input @ channel_map.output, of_permuted.input @ of_permuted.output),
        (channel_map.output.T @ channel_map.output, of_permuted.output.T @ of_permuted.output),
        (_gram(channel_map.carried), _gram(of_permuted.carried)),
    ):
        np.testing.assert_allclose(two, one[place], rtol=0, atol=1e-6)


def assert_merges(channel_map: ChannelMap, weights: FloatArray, consumed: FloatArray) -> None:
    """Assert that what a linear consumer computes from a producer is the same through the map."""
    through = (channel_map.input.T @ consumed).T @ (channel_map.output @ weights)
    np.testing.assert_allclose(through, consumed.T @ weights, atol=1e-12)


class TestHelpersFail:
    """Every assertion helper fails on what is wrong."""

    @pytest.mark.parametrize(
        "other",
        [
            ChannelMap(np.ones((1, 2)), np.ones((2, 1)), np.array([1])),
            ChannelMap(np.ones((1, 2)), np.zeros((2, 1)), np.array([0])),
            ChannelMap(np.zeros((1, 2)), np.ones((2, 1)), np.array([0])),
        ],
    )
    def test_equal_maps(self, other: ChannelMap) -> None:
        """Equal maps: the helper fails on what is wrong."""
        with pytest.raises(AssertionError):
            assert_equal_maps(ChannelMap(np.ones((1, 2)), np.ones((2, 1)), np.array([0])), other)

    def test_merges(self) -> None:
        """Merges: the helper fails on what is wrong."""
        weights = np.eye(2)
        assert_merges(ChannelMap.identity(2), weights, weights)
        with pytest.raises(AssertionError):
            assert_merges(ChannelMap.selection(np.array([0]), 2), weights, weights)

    def test_permutes(self) -> None:
        """Permutes: the helper fails on what is wrong."""
        order = np.array([2, 0, 1])
        one, two = ChannelMap.selection(np.array([0]), 3), ChannelMap.selection(np.array([1]), 3)
        assert_permutes(one, two, order)
        with pytest.raises(AssertionError):
            assert_permutes(one, one, order)

    def test_permutes_looks_at_every_matrix(self) -> None:
        """Permutes looks at every matrix: the helper fails on what is wrong."""
        one = ChannelMap.selection(np.array([0]), 2)
        louder = ChannelMap(2 * one.output, one.input / 2, one.anchors)
        with pytest.raises(AssertionError):
            assert_permutes(one, louder, np.array([0, 1]))


class TestChannelMap:
    """Construction, checks and properties."""

    def test_identity(self) -> None:
        """Channel map: identity."""
        identity = ChannelMap.identity(4)
        np.testing.assert_array_equal(identity.output, np.eye(4))
        np.testing.assert_array_equal(identity.input, np.eye(4))
        assert identity.is_identity
        assert (identity.channels, identity.kept) == (4, 4)

    @given(data=st.data(), channels=st.integers(1, 8))
    def test_selection(self, data: st.DataObject, channels: int) -> None:
        """Channel map: selection."""
        kept = np.array(data.draw(st.permutations(range(channels))))[: data.draw(st.integers(1, channels))]
        channel_map = ChannelMap.selection(kept, channels)
        x = np.arange(float(channels))
        np.testing.assert_array_equal(channel_map.output @ x, kept)
        np.testing.assert_array_equal(channel_map.input.T @ x, kept)
        np.testing.assert_array_equal(channel_map.carried, channel_map.output)
        assert channel_map.is_selection
        assert channel_map.is_identity == np.array_equal(kept, np.arange(channels))

    @given(order=st.permutations(range(6)))
    def test_permutation_is_undone_by_its_input_map(self, order: list[int]) -> None:
        """Channel map: permutation is undone by its input map."""
        channel_map = ChannelMap.permutation(np.array(order))
        np.testing.assert_array_equal(channel_map.input @ channel_map.output, np.eye(6))

    @pytest.mark.parametrize("kept", [[0, 0], [3], [-1], []])
    def test_selection_refuses(self, kept: list[int]) -> None:
        """Channel map: selection refuses."""
        with pytest.raises(InvariantError):
            ChannelMap.selection(np.array(kept, dtype=np.int64), 3)

    def test_permutation_refuses(self) -> None:
        """Channel map: permutation refuses."""
        with pytest.raises(InvariantError):
            ChannelMap.permutation(np.array([0, 2]))

    @given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=9))
    def test_clusters_rebuild_means(self, labels: list[int]) -> None:
        """Channel map: clusters rebuild means."""
        _, dense = np.unique(labels, return_inverse=True)
        channel_map = ChannelMap.clusters(dense, int(dense.max()) + 1)
        np.testing.assert_allclose(channel_map.output.sum(axis=1), 1)
        np.testing.assert_array_equal(channel_map.input.sum(axis=1), 1)
        # What goes in and comes out again is what was put in.
        np.testing.assert_allclose(channel_map.output @ channel_map.input, np.eye(channel_map.kept), atol=1e-15)
        np.testing.assert_array_equal(dense[channel_map.anchors], np.arange(channel_map.kept))

    @pytest.mark.parametrize(
        ("labels", "kept", "anchors"),
        [([0, 0], 2, None), ([0, 2], 2, None), ([-1, 0], 1, None), ([0, 1], 2, [1, 0]), ([0, 1], 2, [0, 2])],
    )
    def test_clusters_refuse(self, labels: list[int], kept: int, anchors: list[int] | None) -> None:
        """Channel map: clusters refuse."""
        with pytest.raises(InvariantError):
            ChannelMap.clusters(np.array(labels), kept, None if anchors is None else np.array(anchors))

    @given(seed=st.integers(0, 9999), channels=st.integers(1, 8), data=st.data())
    def test_from_plan_gives_every_channel_away_in_whole(self, seed: int, channels: int, data: st.DataObject) -> None:
        """Channel map: from plan gives every channel away in whole."""
        kept = data.draw(st.integers(1, channels))
        plan = np.random.default_rng(seed).uniform(size=(channels, kept))
        plan[data.draw(st.integers(0, channels - 1))] = 0.0
        mass = (plan.sum(axis=1) > 0).astype(float)
        released = ChannelMap.from_plan(plan, np.arange(kept))
        np.testing.assert_allclose(released.output.sum(axis=0), mass)
        np.testing.assert_array_equal(released.input, released.output.T)
        mean = ChannelMap.from_plan(plan, np.arange(kept), output_norm="mean")
        np.testing.assert_allclose(mean.output.sum(axis=1), float(mass.any()))
        np.testing.assert_array_equal(mean.input, released.input)
        np.testing.assert_allclose(as_dense(mean.carried), as_dense(released.carried))

    def test_from_plan_has_the_row_sums_of_the_released_code(self) -> None:
        """Channel map: from plan has the row sums of the released code."""
        # n / m on both axes where masses are uniform.
        channel_map = ChannelMap.from_plan(np.full((6, 2), 1 / 12), np.array([0, 1]))
        np.testing.assert_allclose(channel_map.output.sum(axis=1), 3)
        np.testing.assert_allclose(channel_map.input.sum(axis=0), 3)

    @pytest.mark.parametrize("norm", NORMS)
    def test_from_plan_without_mass(self, norm: OutputNorm) -> None:
        """Channel map: from plan without mass."""
        plan = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        channel_map = ChannelMap.from_plan(plan, np.array([0, 2]), output_norm=norm)
        assert channel_map.output.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
        assert as_dense(channel_map.carried).tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
        assert not channel_map.is_selection

    @pytest.mark.parametrize(
        "plan", [np.ones(2), np.array([[np.nan], [1.0]]), np.array([[np.inf], [1.0]]), np.array([[-1.0], [2.0]])]
    )
    def test_from_plan_refuses(self, plan: FloatArray) -> None:
        """Channel map: from plan refuses."""
        with pytest.raises(InvariantError, match="transport plan"):
            ChannelMap.from_plan(plan, np.array([0]))

    @pytest.mark.parametrize(
        ("output", "rebuilt", "anchors", "match"),
        [
            (np.ones(2), np.ones((2, 1)), [0], "shape \\(K, C\\)"),
            (np.ones((3, 2)), np.ones((2, 3)), [0, 1, 1], "shape \\(K, C\\)"),
            (np.ones((0, 2)), np.ones((2, 0)), [], "shape \\(K, C\\)"),
            (np.ones((1, 2)), np.ones((1, 2)), [0], "no input map"),
            (np.array([[1.0, np.nan]]), np.ones((2, 1)), [0], "not finite"),
            (np.ones((1, 2)), np.array([[1.0], [np.inf]]), [0], "not finite"),
            (np.ones((1, 2)), np.ones((2, 1)), [0, 1], "anchors of shape"),
            (np.ones((1, 2)), np.ones((2, 1)), [2], "out of the range"),
            (np.ones((1, 2)), np.ones((2, 1)), [-1], "out of the range"),
        ],
    )
    def test_refuses(self, output: FloatArray, rebuilt: FloatArray, anchors: list[int], match: str) -> None:
        """Channel map: refuses."""
        with pytest.raises(InvariantError, match=match):
            ChannelMap(output, rebuilt, np.array(anchors, dtype=np.int64))

    def test_carried_keeps_what_is_constant(self) -> None:
        """Channel map: carried keeps what is constant."""
        channel_map = ChannelMap(np.array([[2.0, -1.0], [0.0, 0.0]]), np.ones((2, 2)), np.array([0, 1]))
        np.testing.assert_allclose(as_dense(channel_map.carried), [[2 / 3, 1 / 3], [0.0, 1.0]])

    def test_is_selection_looks_at_both_sides(self) -> None:
        """Channel map: is selection looks at both sides."""
        one = np.array([[1.0, 0.0]])
        assert ChannelMap(one, one.T, np.array([0])).is_selection
        assert not ChannelMap(one, 2 * one.T, np.array([0])).is_selection
        assert not ChannelMap(2 * one, one.T, np.array([0])).is_selection


class TestFusionOptions:
    """Defaults and refusals."""

    def test_defaults_are_those_of_the_released_code(self) -> None:
        """Fusion options: defaults are those of the released code."""
        assert FusionOptions() == FusionOptions(
            importance="l1",
            transport_target="most-important",
            source_mass="uniform",
            target_mass="uniform",
            p=1.0,
            normalised=True,
            bias_in_cost=False,
            solver="exact",
            regularisation=0.05,
            output_norm="sum",
        )

    @pytest.mark.parametrize(
        ("bad", "flag", "mend"),
        [
            ({"importance": "l3"}, "--importance", "lamp"),
            ({"transport_target": "nearest"}, "--transport-target", "most-important"),
            ({"source_mass": "radical"}, "--source-mass", "uniform"),
            ({"target_mass": "radical"}, "--target-mass", "uniform"),
            ({"solver": "exakt"}, "--solver", "did you mean 'exact'"),
            ({"p": 0.5}, "--p", "from 1 on"),
            ({"p": float("nan")}, "--p", "from 1 on"),
            ({"regularisation": 0.0}, "--regularisation", "above 0"),
            ({"regularisation": float("inf")}, "--regularisation", "above 0"),
            ({"output_norm": "max"}, "--output-norm", "sum, mean"),
        ],
    )
    def test_refuse_what_is_not_known(self, bad: dict[str, Any], flag: str, mend: str) -> None:
        """Fusion options: refuse what is not known."""
        with pytest.raises(ConfigError) as error:
            FusionOptions(**bad)
        assert error.value.where == flag
        assert mend in error.value.mend

    def test_are_frozen(self) -> None:
        """Fusion options: are frozen."""
        with pytest.raises(FrozenInstanceError):
            FusionOptions().__setattr__("p", 2.0)


class TestMethods:
    """The laws that every member of the registry keeps, with every option."""

    def test_members_are_as_documented(self) -> None:
        """Methods: members are as documented."""
        assert list(METHODS) == ["intra-fusion", "prune", "fold"]
        with pytest.raises(RegistryError, match="no method called 'drop'"):
            METHODS["drop"]

    @pytest.mark.parametrize("name", METHODS)
    @pytest.mark.parametrize("options", ALTERNATIVES)
    @settings(deadline=None, max_examples=15)
    @given(features=groups(), data=st.data())
    def test_maps_have_the_shape_and_are_finite(
        self, name: str, options: FusionOptions, features: ChannelFeatures, data: st.DataObject
    ) -> None:
        """Methods: maps have the shape and are finite."""
        kept = data.draw(st.integers(1, features.channels))
        channel_map = fuse(name, features, kept, options)
        assert (channel_map.kept, channel_map.channels) == (kept, features.channels)
        assert np.all(np.diff(channel_map.anchors) > 0)
        np.testing.assert_allclose(channel_map.carried.sum(axis=1), 1)

    @pytest.mark.parametrize("name", METHODS)
    @pytest.mark.parametrize("options", ALTERNATIVES)
    @given(features=groups())
    def test_keeping_all_is_exactly_the_identity(
        self, name: str, options: FusionOptions, features: ChannelFeatures
    ) -> None:
        """Methods: keeping all is exactly the identity."""
        assert fuse(name, features, features.channels, options).is_identity

    @pytest.mark.parametrize("name", METHODS)
    @pytest.mark.parametrize("options", ALTERNATIVES)
    def test_the_same_seed_gives_the_same_map(self, name: str, options: FusionOptions) -> None:
        """Methods: the same seed gives the same map."""
        features = group(np.random.default_rng(1).normal(size=(20, 30)))
        assert_equal_maps(fuse(name, features, 8, options), fuse(name, features, 8, options))

    @pytest.mark.parametrize("name", METHODS)
    @pytest.mark.parametrize("options", [o for o in ALTERNATIVES if o.importance != "random"])
    @settings(deadline=None, max_examples=15)
    @given(seed=st.integers(0, 9999), kept=st.integers(1, 8), order=st.permutations(range(8)))
    def test_a_permutation_permutes_the_map(
        self, name: str, options: FusionOptions, seed: int, kept: int, order: list[int]
    ) -> None:
        """Methods: a permutation permutes the map."""
        rng = np.random.default_rng(seed)
        features = group(rng.normal(size=(8, 20)), rng.normal(size=(8, 5)))
        moved = fuse(name, permuted(features, np.array(order)), kept, options)
        assert_permutes(fuse(name, features, kept, options), moved, np.array(order))

    @pytest.mark.parametrize("name", METHODS)
    @pytest.mark.parametrize("options", ALTERNATIVES)
    def test_dead_channels_make_no_nan(self, name: str, options: FusionOptions) -> None:
        """Methods: dead channels make no nan."""
        weights = np.random.default_rng(2).normal(size=(6, 4))
        weights[[1, 4]] = 0.0
        for x in (weights, np.zeros((6, 4))):
            assert np.isfinite(fuse(name, group(x), 3, options).output).all()

    @pytest.mark.parametrize("name", METHODS)
    def test_refuse_a_number_that_is_out_of_range(self, name: str) -> None:
        """Methods: refuse a number that is out of range."""
        for kept in (0, 4):
            with pytest.raises(InvariantError, match=f"{kept} of 3 channels"):
                fuse(name, group(np.ones((3, 2))), kept)

    def test_prune_keeps_the_most_important_in_order(self) -> None:
        """Methods: prune keeps the most important in order."""
        features = group(np.array([[1.0], [4.0], [2.0], [3.0]]))
        channel_map = fuse("prune", features, 2)
        assert channel_map.anchors.tolist() == [1, 3]
        assert channel_map.is_selection

    @settings(deadline=None)
    @given(seed=st.integers(0, 9999), copies=st.lists(st.integers(1, 4), min_size=1, max_size=5))
    def test_fold_merges_copies_without_error(self, seed: int, copies: list[int]) -> None:
        """Methods: fold merges copies without error."""
        rng = np.random.default_rng(seed)
        kinds = rng.permutation(np.repeat(np.arange(len(copies)), copies))
        weights, consumed = rng.normal(size=(len(copies), 6))[kinds], rng.normal(size=(len(kinds), 3))
        # Only the producers are copies: what reads them may differ.
        channel_map = fuse("fold", group(weights), len(copies))
        assert_merges(channel_map, weights, consumed)

    def test_fold_compares_directions_where_normalised(self) -> None:
        """Methods: fold compares directions where normalised."""
        weights = np.array([[1.0, 0.0], [9.0, 0.0], [0.0, 1.0], [0.0, 9.0]])
        by_direction = fuse("fold", group(weights), 2)
        assert by_direction.input.argmax(axis=1).tolist() == [0, 0, 1, 1]
        by_value = fuse("fold", group(weights), 3, FusionOptions(normalised=False))
        assert by_value.input.argmax(axis=1).tolist() == [0, 1, 0, 2]

    def test_intra_fusion_sums_copies_as_released_and_averages_them_on_request(self) -> None:
        """Methods: intra fusion sums copies as released and averages them on request."""
        rng = np.random.default_rng(3)
        # Signs only, so that all channels are equally important and the first of each pair is the target.
        signs = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=float)
        weights, consumed = np.tile(signs, (2, 1)), np.tile(rng.choice([-1.0, 1.0], size=(4, 3)), (2, 1))
        features = group(weights, consumed)
        released = fuse("intra-fusion", features, 4)
        through = (released.input.T @ consumed).T @ (released.output @ weights)
        np.testing.assert_allclose(through, 2 * consumed.T @ weights)
        mean = fuse("intra-fusion", features, 4, FusionOptions(output_norm="mean"))
        assert_merges(mean, weights, consumed)

    def test_intra_fusion_gives_a_target_its_own_channel_first(self) -> None:
        """Methods: intra fusion gives a target its own channel first."""
        # Six channels to three: each target takes in twice the mass of a channel, so itself in whole and others.
        features = group(np.random.default_rng(4).normal(size=(6, 40)))
        channel_map = fuse("intra-fusion", features, 3)
        np.testing.assert_allclose(channel_map.output[np.arange(3), channel_map.anchors], 1)
        np.testing.assert_allclose(channel_map.output.sum(axis=1), 2)
        np.testing.assert_allclose(channel_map.output.sum(axis=0), 1)

    def test_bias_in_cost_matters_only_where_asked(self) -> None:
        """Methods: bias in cost matters only where asked."""
        weights = np.ones((4, 2)) * np.array([[1.0], [1.01], [1.02], [1.03]])
        producer = MemberFeatures("conv", Role.PRODUCER, weights, bias=np.array([[0.0], [5.0], [0.0], [5.0]]))
        features = ChannelFeatures(4, (producer,))
        told = fuse("fold", features, 2, FusionOptions(bias_in_cost=True))
        assert told.input.argmax(axis=1).tolist() == [0, 1, 0, 1]
        blind = fuse("fold", features, 2, FusionOptions(normalised=False))
        assert blind.input.argmax(axis=1).tolist() == [0, 0, 1, 1]
