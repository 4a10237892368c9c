"""The damage on other samples: never less than on those that chose, and near what fresh samples show."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxfuse.arrays import FloatArray, Floats
from onnxfuse.calibration.observe import observe_readings
from onnxfuse.calibration.sums import MomentSums
from onnxfuse.config import Provider
from onnxfuse.coupling.sets import Places
from onnxfuse.proof.samples import load_samples
from onnxfuse.statistics.crossing import crossed_damage
from onnxfuse.statistics.damage import Half, Reading, greedy_order, rebuilding_map, shrunk
from tests.builders import Net
from tests.laws import analysis_of, free_groups


def rows_of(rng: np.random.Generator, mixing: FloatArray, count: int) -> FloatArray:
    """Return observations of channels that follow from each other in part."""
    latent = rng.standard_normal((count, len(mixing)))
    return latent @ mixing + 0.3 * rng.standard_normal((count, mixing.shape[1])) + 0.5


def seen_in(rows: FloatArray, weights: FloatArray, *, has_shift: bool = True, count: float = 0.0) -> Reading:
    """Return what a reader sees in rows, halves included, if they are worth so many; usually each is worth one."""
    count = count or len(rows)
    covariance = shrunk(np.cov(rows.T, bias=True), count)
    mean = rows.mean(axis=0)
    about = covariance if has_shift else covariance + np.outer(mean, mean)
    first, second = (
        Half(np.cov(part.T, bias=True).astype(np.float32), part.mean(axis=0), count / 2)
        for part in (rows[::2], rows[1::2])
    )
    return Reading(about, mean[:, None], weights, has_shift, halves=(first, second))


def on(rows: FloatArray, seen: Reading, kept: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> float:
    """Return J on rows, of the input map that was fitted to what was seen."""
    away = rows - rows.mean(axis=0) * seen.has_shift
    missed = np.array(seen.weights, np.float64)
    missed[kept] -= rebuilding_map([seen], kept).T @ seen.weights
    return float(np.square(away @ missed).sum() / len(rows))


@given(seed=st.integers(0, 99), channels=st.integers(2, 24), count=st.integers(8, 200), has_shift=st.booleans())
def test_other_samples_never_lose_less(*, seed: int, channels: int, count: int, has_shift: bool) -> None:
    """Damage on other samples is nowhere below that on these, falls with every channel, and ends at nothing."""
    rng = np.random.default_rng(seed)
    rows = rows_of(rng, rng.normal(size=(3, channels)), count)
    readings = [seen_in(rows, rng.normal(size=(channels, 4)), has_shift=has_shift) for _ in range(2)]
    _, damage = greedy_order(readings)
    found = crossed_damage(readings, damage)
    assert found.shape == damage.shape
    assert (found >= damage).all()
    assert (np.diff(found) <= 0).all()
    assert found[0] == pytest.approx(damage[0])
    assert found[-1] == damage[-1]


@pytest.mark.parametrize("has_shift", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_near_what_fresh_samples_show(seed: int, *, has_shift: bool) -> None:
    """Of samples whose places are alike, what those say that chose is far below what others show; crossed it is not.

    Half as many choose and fit there, so it may be more than others show, but not much more than they show of a choice
    from so few.
    """
    rng = np.random.default_rng(seed)
    channels, copies = 60, 256
    mixing = rng.normal(size=(20, channels)) / 4
    weights = rng.normal(size=(channels, 10))

    def taken(samples: int) -> Reading:
        rows = rows_of(rng, mixing, samples)
        # The root of the number of places is guessed to count, but here all are the same.
        return seen_in(rows, weights, has_shift=has_shift, count=samples * copies**0.5)

    seen, fewer, fresh = taken(160), taken(80), rows_of(rng, mixing, 20_000)
    order, damage = greedy_order([seen])
    found = crossed_damage([seen], damage)
    for kept in (36, 48):
        shown = on(fresh, seen, np.sort(order[:kept]))
        at_worst = on(fresh, fewer, np.sort(greedy_order([fewer])[0][:kept]))
        assert damage[kept] < 0.75 * shown
        assert 0.9 * shown < found[kept] < 1.35 * at_worst


def test_many_samples_change_nothing() -> None:
    """Where both halves say the same, other samples lose no more."""
    rng = np.random.default_rng(0)
    seen = seen_in(rows_of(rng, rng.normal(size=(4, 12)), 60_000), rng.normal(size=(12, 5)))
    _, damage = greedy_order([seen])
    np.testing.assert_allclose(crossed_damage([seen], damage), damage, rtol=0.02, atol=1e-4 * damage[0])
    assert crossed_damage([replace(seen, halves=None)], damage) is damage


def test_sets_of_channels_lose_as_much_as_apart() -> None:
    """The damage of two sets that nothing ties together, of which readers hear one each, is the sum over both."""
    rng = np.random.default_rng(1)
    parts = [seen_in(rows_of(rng, rng.normal(size=(3, 10)), 40), rng.normal(size=(10, 4))) for _ in range(2)]
    zeros = np.zeros((10, 10))

    def both(first: Floats, second: Floats) -> FloatArray:
        return np.block([[first, zeros], [zeros, second]])

    halves = [
        Half(both(a.covariance, b.covariance), np.concatenate([a.mean, b.mean]), a.count)
        for a, b in zip(parts[0].halves or (), parts[1].halves or (), strict=True)
    ]
    joined = Reading(
        both(parts[0].covariance, parts[1].covariance),
        np.concatenate([p.means for p in parts]),
        np.concatenate([p.weights for p in parts]),
        sets=2,
        halves=(halves[0], halves[1]),
    )
    _, damage = greedy_order([joined], 2)
    found = crossed_damage([joined], damage[::2], 2)
    apart = sum(crossed_damage([p], greedy_order([p])[1])[5] for p in parts)
    # Shrinking goes by all channels together.
    assert found[5] == pytest.approx(apart, rel=0.3)


def test_halves_are_of_every_other_run() -> None:
    """Sums that tell halves apart say the same in all as those that don't, and of each half what its runs say."""
    rng = np.random.default_rng(2)
    runs = [rng.normal(size=(5, 6, 3)) + rng.normal(size=(6, 1)) for _ in range(4)]
    places = Places((1,), np.arange(6)[:, None])
    one, two = (MomentSums("x", places, apart) for apart in (False, True))
    for sums in (one, two):
        for run in runs:
            sums.add(run, len(run), 1.0, np.random.default_rng(0))
    assert one.halves() is None
    halves = two.halves()
    assert halves is not None
    for half, part in zip(halves, (runs[::2], runs[1::2]), strict=True):
        rows = np.concatenate([run.transpose(0, 2, 1).reshape(-1, 6) for run in part])
        np.testing.assert_allclose(half.covariance, np.cov(rows.T, bias=True), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(half.mean, rows.mean(axis=0))
        assert half.count == pytest.approx(one.independent / 2)
    np.testing.assert_allclose(one.means, two.means)
    for first, second in zip(one.estimates(centred=True), two.estimates(centred=True), strict=True):
        np.testing.assert_allclose(first, second)


def test_one_run_has_no_halves() -> None:
    """What only one run tells of is not told apart."""
    sums = MomentSums("x", Places((1,), np.arange(3)[:, None]), in_halves=True)
    sums.add(np.random.default_rng(0).normal(size=(5, 3)), 5, 1.0, np.random.default_rng(0))
    assert sums.halves() is None


def test_numbers_beyond_single_precision_have_no_halves() -> None:
    """Squares that single precision can't hold tell of no other samples, and warn of nothing."""
    sums = MomentSums("x", Places((1,), np.arange(3)[:, None]), in_halves=True)
    rng = np.random.default_rng(0)
    for _ in range(2):
        sums.add(1e25 * rng.normal(size=(5, 3)), 5, 1.0, rng)
    assert sums.is_sound
    assert sums.halves() is None


@pytest.mark.parametrize(("count", "told"), [(64, True), (2048, False)])
def test_samples_are_halved_where_they_are_few(count: int, *, told: bool) -> None:
    """A few samples for every channel say of halves what they say; many don't need to."""
    net = Net(17, seed=0)
    x = net.input(1, 8, batch="n")
    net.output(net.gemm(net.node("Relu", net.gemm(x, 32)), 4))
    model = net.model()
    rows = {x: np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)}
    analysis = analysis_of(model, feeds={x: rows[x][:1]})
    groups = free_groups(analysis)
    found = observe_readings(analysis, groups, load_samples(rows, analysis.graph), Provider.CPU, 0)
    assert [reading.halves is not None for reading in found[groups[0].name]] == [told]
