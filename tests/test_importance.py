"""The laws of importances: every member of the registry, then what each one says."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxfuse.arrays import FloatArray, IntArray
from onnxfuse.errors import DataError, ModelError, RegistryError
from onnxfuse.importance import FROM_SAMPLES, IMPORTANCES, Importance
from onnxfuse.importance.lamp import lamp_scores
from onnxfuse.statistics.features import ActivationFeatures, ChannelFeatures, MemberFeatures, Role
from onnxfuse.statistics.independence import channel_independence
from tests.activations import permuted_activations, seen

SEEING = ["activation-l1", "activation-l2", "taylor", "chip", "damage"]
DETERMINISTIC = [name for name in IMPORTANCES if name != "random"]


def group(*weights: FloatArray, scale: FloatArray | None = None) -> ChannelFeatures:
    """Make a group of one producer and any number of consumers."""
    members = [MemberFeatures("producer", Role.PRODUCER, weights[0], bn_scale=scale)]
    members += [MemberFeatures(f"consumer {i}", Role.CONSUMER, w) for i, w in enumerate(weights[1:])]
    return ChannelFeatures(len(weights[0]), tuple(members), seen(weights[0]))


@st.composite
def groups(draw: st.DrawFn) -> ChannelFeatures:
    """Draw groups with whole weights, so that ties, copies and channels of zeros are common."""
    channels = draw(st.integers(1, 9))
    members = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    largest = draw(st.sampled_from([0, 1, 3]))
    weights = [
        rng.integers(-largest, largest + 1, size=(channels, draw(st.integers(1, 4)))).astype(float)
        for _ in range(members)
    ]
    scale = rng.normal(size=channels) if draw(st.booleans()) else None
    return group(*weights, scale=scale)


def permuted(features: ChannelFeatures, order: IntArray) -> ChannelFeatures:
    """Reorder the channels of a group."""
    members = tuple(
        MemberFeatures(m.node, m.role, m.weights[order], bn_scale=None if m.bn_scale is None else m.bn_scale[order])
        for m in features.members
    )
    assert features.activations is not None
    return ChannelFeatures(features.channels, members, permuted_activations(features.activations, order))


def score(name: str, features: ChannelFeatures, seed: int = 0) -> FloatArray:
    """Score a group by name, from a fresh generator."""
    return IMPORTANCES[name](features, np.random.default_rng(seed))


def assert_scores(scores: FloatArray, channels: int) -> None:
    """Assert what the protocol promises of any scores."""
    assert scores.shape == (channels,)
    assert scores.dtype == np.float64
    assert np.isfinite(scores).all()
    assert scores.min() >= 0


def assert_permutes(scores: FloatArray, of_permuted: FloatArray, order: FloatArray) -> None:
    """Assert that scores went where their channels went."""
    np.testing.assert_allclose(of_permuted, scores[order], rtol=1e-12)


@pytest.mark.parametrize(
    "scores",
    [np.zeros(3), np.zeros((2, 1)), np.array([1.0, np.nan]), np.array([1.0, np.inf]), np.array([1.0, -1.0])],
)
def test_assert_scores_fails(scores: FloatArray) -> None:
    """Assert scores fails."""
    with pytest.raises(AssertionError):
        assert_scores(scores, 2)


def test_assert_permutes_fails() -> None:
    """Assert permutes fails."""
    with pytest.raises(AssertionError):
        assert_permutes(np.array([1.0, 2.0]), np.array([1.0, 2.0]), np.array([1, 0]))


def test_members_are_as_documented() -> None:
    """Members are as documented."""
    assert list(IMPORTANCES) == ["l1", "l2", "linf", "lamp", "random", "bn-scale", "geometric-median", *SEEING]
    assert set(SEEING) == FROM_SAMPLES
    with pytest.raises(RegistryError, match="no importance called 'l3'"):
        IMPORTANCES["l3"]


@pytest.mark.parametrize("name", IMPORTANCES)
@given(features=groups())
def test_scores_are_finite_and_not_negative(name: str, features: ChannelFeatures) -> None:
    """Scores are finite and not negative."""
    assert_scores(score(name, features), features.channels)


@pytest.mark.parametrize("name", DETERMINISTIC)
@given(features=groups(), data=st.data())
def test_scores_permute_with_the_channels(name: str, features: ChannelFeatures, data: st.DataObject) -> None:
    """Scores permute with the channels."""
    order = np.array(data.draw(st.permutations(range(features.channels))))
    assert_permutes(score(name, features), score(name, permuted(features, order)), order)


@pytest.mark.parametrize("name", DETERMINISTIC)
@given(features=groups(), power=st.integers(-60, 60))
def test_scores_do_not_depend_on_the_scale_of_the_group(name: str, features: ChannelFeatures, power: int) -> None:
    """Scores do not depend on the scale of the group."""
    scaled = group(
        *(m.weights.astype(np.float64) * 2.0**power for m in features.members),
        scale=features.members[0].bn_scale,
    )
    # What samples say is told by other tests.
    scaled = replace(scaled, activations=features.activations)
    np.testing.assert_array_equal(score(name, scaled), score(name, features))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_group_of_zeros_scores_ones(name: str) -> None:
    """A group of zeros scores ones."""
    zeros = group(np.zeros((3, 2)), np.zeros((3, 4)), scale=np.zeros(3))
    assert score(name, zeros).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", IMPORTANCES)
def test_inputs_stay_as_they_are(name: str) -> None:
    """Inputs stay as they are."""
    weights = np.random.default_rng(0).normal(size=(4, 3))
    before = weights.copy()
    score(name, group(weights, scale=weights[:, 0]))
    np.testing.assert_array_equal(weights, before)


@pytest.mark.parametrize("name", ["l1", "l2", "linf", "lamp", "bn-scale"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(name: str, bad: float) -> None:
    """A weight that is not finite is named."""
    features = group(np.ones((2, 2)), np.array([[1.0], [bad]]))
    with pytest.raises(ModelError, match="consumer 0"):
        score(name, features)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Member means: producer and consumer count the same, whatever their sizes.
        ("l1", [(3 + 0) / 2, (1 + 4) / 2]),
        ("l2", [(5 + 0) / 2, (1 + 16) / 2]),
        ("linf", [(2 + 0) / 2, (1 + 4) / 2]),
    ],
)
def test_magnitudes(name: str, expected: list[float]) -> None:
    """Magnitudes."""
    features = group(np.array([[1.0, -2.0], [0.0, -1.0]]), np.array([[0.0], [4.0]]))
    np.testing.assert_allclose(score(name, features), np.array(expected) / np.mean(expected))


def test_biases_do_not_count() -> None:
    """Biases do not count."""
    weights = np.ones((2, 1))
    biased = MemberFeatures("conv", Role.PRODUCER, weights, bias=np.array([[5.0], [0.0]]))
    for name in DETERMINISTIC:
        features = ChannelFeatures(2, (biased,), seen(weights))
        np.testing.assert_array_equal(score(name, features), score(name, group(weights)))


def test_lamp_puts_scores_back_on_their_channels() -> None:
    """Lamp puts scores back on their channels."""
    # The order on which the released code fails.
    expected = [1.0, 1 / 15, 4 / 9, 2 / 14, 3 / 12]
    np.testing.assert_allclose(lamp_scores(np.array([5.0, 1.0, 4.0, 2.0, 3.0])), expected)


@given(norms=st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_lamp_is_its_formula(norms: list[int]) -> None:
    """Lamp is its formula."""
    u = np.array(norms, dtype=float)
    if not u.any():
        return
    expected = [x / u[u >= x].sum() for x in u]
    np.testing.assert_allclose(lamp_scores(u), expected)
    # It never changes which of two channels is the larger.
    assert np.array_equal(np.sign(np.subtract.outer(lamp_scores(u), lamp_scores(u))), np.sign(np.subtract.outer(u, u)))


def test_random_follows_the_seed() -> None:
    """Random follows the seed."""
    features = group(np.ones((50, 1)))
    np.testing.assert_array_equal(score("random", features, 7), score("random", features, 7))
    assert not np.array_equal(score("random", features, 7), score("random", features, 8))


def test_bn_scale_averages_the_scales_that_there_are() -> None:
    """Bn scale averages the scales that there are."""
    weights = np.ones((2, 1))
    members = (
        MemberFeatures("a", Role.PRODUCER, weights, bn_scale=np.array([-3.0, 1.0])),
        MemberFeatures("b", Role.PRODUCER, weights, bn_scale=np.array([1.0, 3.0])),
        MemberFeatures("c", Role.PRODUCER, np.array([[100.0], [1.0]])),
    )
    assert score("bn-scale", ChannelFeatures(2, members)).tolist() == [1.0, 1.0]
    assert score("bn-scale", ChannelFeatures(2, members[:1])).tolist() == [1.5, 0.5]


def test_bn_scale_without_scales_is_l1() -> None:
    """Bn scale without scales is l1."""
    features = group(np.array([[1.0], [3.0]]))
    np.testing.assert_array_equal(score("bn-scale", features), score("l1", features))


def test_members_satisfy_the_protocol() -> None:
    """Members satisfy the protocol."""
    for name in IMPORTANCES:
        member: Importance = IMPORTANCES[name]
        assert callable(member)
        assert member.__doc__


@given(groups())
def test_geometric_median_is_the_sum_of_distances(features: ChannelFeatures) -> None:
    """The score is the sum of Euclidean distances, pair by pair, averaged over the members."""
    distances = [
        [sum(float(np.linalg.norm(a - b)) for b in member.weights) for a in member.weights]
        for member in features.members
    ]
    mean = np.mean(distances, axis=0)
    wanted = mean / mean.mean() if mean.mean() > 1e-6 else np.ones(features.channels)
    np.testing.assert_allclose(score("geometric-median", features), wanted, atol=1e-6)


@pytest.mark.parametrize("name", SEEING)
def test_importances_from_samples_say_so_without(name: str) -> None:
    """Without what it looks at, an importance refuses and says what to do; with overflows too."""
    features = group(np.ones((3, 2)))
    for activations in (None, ActivationFeatures()):
        with pytest.raises(DataError, match="none was seen") as error:
            score(name, replace(features, activations=activations))
        assert "--calibration" in error.value.mend
    endless = np.array([1.0, np.inf, 1.0])
    with pytest.raises(DataError, match="overflow"):
        score(name, replace(features, activations=ActivationFeatures(endless, endless, endless, endless)))


def test_importances_from_samples_look_at_their_statistic() -> None:
    """Each takes one statistic, over its mean; the mean square by its root."""
    size, square, slope, norm = (np.array(v, float) for v in ([1, 3], [4, 36], [5, 5], [9, 1]))
    statistics = ActivationFeatures(size, square, slope, norm)
    features = replace(group(np.ones((2, 1))), activations=statistics)
    assert [score(name, features).tolist() for name in SEEING] == [
        [0.5, 1.5], [0.5, 1.5], [1.0, 1.0], [1.8, 0.2], [0.2, 1.8],
    ]  # fmt: skip


@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    seed=st.integers(0, 999),
    rank=st.integers(0, 7),
)
def test_channel_independence_is_its_formula(shape: tuple[int, int], seed: int, rank: int) -> None:
    """It is the difference of nuclear norms by singular values, for maps of any shape and rank."""
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    expected = []
    for channel in range(shape[0]):
        without = maps.copy()
        without[channel] = 0.0
        expected.append(np.linalg.norm(maps, "nuc") - np.linalg.norm(without, "nuc"))
    found = channel_independence(maps)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.min() >= 0
