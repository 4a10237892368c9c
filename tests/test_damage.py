"""The damage J and what makes it small, against brute force and against samples."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxfuse.arrays import FloatArray, Floats, IntArray
from onnxfuse.statistics.channels import ObservedChannels
from onnxfuse.statistics.damage import (
    Reading,
    fused_input_map,
    greedy_order,
    lone_damage,
    rebuilding_map,
    selection_damage,
)


def reading(seed: int, channels: int, *, rank: int | None = None) -> tuple[Reading, FloatArray, FloatArray]:
    """Return a reading of Gaussian channels, with the samples and the weights that it was made from."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(rank or channels, channels))
    samples = rng.normal(size=(400, rank or channels)) @ mixing + rng.normal(size=channels)
    weights = rng.normal(size=(channels, 3))
    covariance = np.cov(samples.T, bias=True).reshape(channels, channels)
    return Reading(covariance, samples.mean(axis=0)[:, None], weights), samples, weights


def missed(samples: FloatArray, weights: FloatArray, kept: IntArray) -> float:
    """Return what the readers' outputs lose when the kept channels are all that they are predicted from."""
    outputs = (samples - samples.mean(axis=0)) @ weights
    inputs = (samples - samples.mean(axis=0))[:, kept]
    solved = np.linalg.lstsq(inputs, outputs, rcond=None)[0]
    return float(np.square(outputs - inputs @ solved).sum() / len(samples))


@given(st.integers(0, 99), st.integers(2, 6))
def test_damages_are_those_of_a_regression_on_samples(seed: int, channels: int) -> None:
    """The damage of the first K of the greedy order is what a regression on samples misses, for every K."""
    seen, samples, weights = reading(seed, channels)
    order, damage = greedy_order([seen])
    assert sorted(order.tolist()) == list(range(channels))
    for kept in range(1, channels + 1):
        wanted = missed(samples, weights, order[:kept])
        assert damage[kept] == pytest.approx(wanted, rel=1e-4, abs=1e-6 * damage[0])
        assert selection_damage([seen], order[:kept]) == pytest.approx(wanted, rel=1e-4, abs=1e-6 * damage[0])


@given(st.integers(0, 99), st.integers(2, 6))
def test_damage_falls_with_every_channel(seed: int, channels: int) -> None:
    """Damage falls with every channel that is kept, from J with none to nothing with all; readers add up."""
    readings = [reading(seed + i, channels)[0] for i in range(2)]
    _, damage = greedy_order(readings)
    assert np.all(np.diff(damage) <= 1e-9 * damage[0])
    assert damage[0] == pytest.approx(sum(r.damage for r in readings))
    assert damage[-1] <= 1e-6 * damage[0]


def test_the_first_choice_is_the_best_single_channel() -> None:
    """The first choice is the best single channel of all, and two choices are not far from the best pair."""
    for seed in range(10):
        seen, _, _ = reading(seed, 6)
        order, damage = greedy_order([seen])
        singles = [selection_damage([seen], np.array([c])) for c in range(6)]
        assert order[0] == int(np.argmin(singles))
        pairs = [selection_damage([seen], np.array(pair)) for pair in combinations(range(6), 2)]
        assert damage[2] >= min(pairs) * (1 - 1e-6)
        assert damage[2] <= 2.0 * min(pairs)


def test_copies_cost_nothing() -> None:
    """Of channels that depend linearly on fewer, those few are enough: the rest of the damage is rounding."""
    seen, _, _ = reading(3, 8, rank=3)
    _, damage = greedy_order([seen])
    assert damage[3] <= 1e-6 * damage[0]


def test_rounding_beside_a_variance_of_zero_is_no_gain() -> None:
    """What is left of a channel that never changes, by rounding, must neither be chosen early nor overflow."""
    seen, _, _ = reading(3, 5)
    covariance = seen.covariance.copy()
    covariance[2, 2] = -1e-12
    covariance[2, [0, 1, 3, 4]] = covariance[[0, 1, 3, 4], 2] = 1e-3
    order, damage = greedy_order([replace(seen, covariance=covariance, weights=1e5 * seen.weights)])
    assert order[-1] == 2
    assert np.isfinite(damage).all()


def test_dead_channels_come_last() -> None:
    """Channels that never change come last and make nothing infinite; so does a reader that reads nothing."""
    seen, _, _ = reading(4, 4)
    covariance = seen.covariance.copy()
    covariance[1], covariance[:, 1] = 0.0, 0.0
    order, damage = greedy_order([Reading(covariance, seen.means, seen.weights)])
    assert order[-1] == 1
    assert np.isfinite(damage).all()
    nothing = Reading(np.zeros((4, 4)), np.zeros((4, 1)), np.zeros((4, 4)))
    assert greedy_order([nothing])[1].tolist() == [0.0] * 5
    assert np.isfinite(rebuilding_map([nothing], np.arange(2))).all()


@given(st.integers(0, 99), st.integers(2, 6))
def test_the_best_input_map_raises_no_damage(seed: int, channels: int) -> None:
    """The best input map loses no more than dropping does, and rebuilds kept channels exactly."""
    seen, _, _ = reading(seed, channels)
    kept = max(1, channels // 2)
    output = np.eye(channels)[:kept]
    found = rebuilding_map([seen], np.arange(kept))
    np.testing.assert_array_equal(found[:kept], np.eye(kept))

    def lost(matrix: Floats) -> float:
        gap = np.eye(channels) - matrix @ output
        return float(np.trace(gap @ seen.covariance @ gap.T @ seen.weights @ seen.weights.T))

    assert lost(found) <= lost(output.T) * (1 + 1e-9)


@given(st.integers(0, 99), st.integers(2, 6))
def test_the_damage_of_one_channel_is_that_of_keeping_the_others(seed: int, channels: int) -> None:
    """For each channel, and for several readers, it is J with all others kept."""
    readings = [reading(seed + i, channels)[0] for i in range(2)]
    wanted = [selection_damage(readings, np.delete(np.arange(channels), c)) for c in range(channels)]
    np.testing.assert_allclose(lone_damage(readings), wanted, rtol=1e-4, atol=1e-6 * sum(r.damage for r in readings))


def test_copies_and_dead_channels_do_no_damage() -> None:
    """A channel that another one is a multiple of, and one that never changes, can go for nothing."""
    whole, _, _ = reading(1, 4)
    taken = np.array([0, 1, 2, 0])
    covariance = whole.covariance[np.ix_(taken, taken)]
    covariance[2] = covariance[:, 2] = 0.0
    found = lone_damage([Reading(covariance, whole.means, whole.weights)])
    assert found[1] > 1e-3
    np.testing.assert_allclose(found[[0, 2, 3]], 0.0, atol=1e-7)


def stepwise(readings: Sequence[Reading]) -> tuple[list[int], list[float]]:
    """Choose channel after channel with every matrix worked out anew by least squares."""
    order: list[int] = []
    damage = [sum(r.damage for r in readings)]
    while len(order) < len(readings[0].covariance):
        others = [c for c in range(len(readings[0].covariance)) if c not in order]
        damages = [selection_damage(readings, np.array([*order, c])) for c in others]
        order.append(others[int(np.argmin(damages))])
        damage.append(min(damages))
    return order, damage


@pytest.mark.parametrize("shared", [False, True])
def test_blocks_choose_what_single_steps_choose(monkeypatch: pytest.MonkeyPatch, *, shared: bool) -> None:
    """Neither blocks of choices, nor strips, nor matrices that shrink change any choice, or what is left."""
    monkeypatch.setattr("onnxfuse.statistics.damage._BLOCK", 3)
    monkeypatch.setattr("onnxfuse.arrays._STRIP", 5)
    for seed in range(4):
        readings = [reading(seed + i, 24)[0] for i in range(2)]
        if shared:
            readings[1] = Reading(readings[0].covariance, readings[0].means, readings[1].weights)
        order, damage = greedy_order(readings)
        wanted_order, wanted = stepwise(readings)
        assert order.tolist() == wanted_order
        np.testing.assert_allclose(damage, wanted, rtol=1e-6, atol=1e-9 * wanted[0])


def test_large_groups_keep_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """With hundreds of channels that nearly follow from each other the curve is what least squares says."""
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(900, 80)) @ rng.normal(size=(80, 400)) + 1e-3 * rng.normal(size=(900, 400))
    samples *= np.exp(2 * rng.normal(size=400))
    covariance = np.cov(samples.T, bias=True)
    seen = Reading(covariance, np.zeros((400, 1)), rng.normal(size=(400, 30)))
    monkeypatch.setattr("onnxfuse.arrays._STRIP", 150)
    order, damage = greedy_order([seen])
    assert sorted(order.tolist()) == list(range(400))
    for kept in (1, 60, 128, 129, 250, 399):
        wanted = selection_damage([seen], order[:kept])
        assert damage[kept] == pytest.approx(wanted, rel=1e-3, abs=1e-8 * damage[0])


def test_weights_with_the_same_products_are_the_same_reader() -> None:
    """Only products of the weights count, not in how many columns they are given."""
    seen, _, _ = reading(5, 6)
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 9)))[0][:3]
    order, damage = greedy_order([seen])
    other = greedy_order([Reading(seen.covariance, seen.means, seen.weights @ turned)])
    assert order.tolist() == other[0].tolist()
    np.testing.assert_allclose(damage, other[1], rtol=1e-6, atol=1e-9 * damage[0])


@given(st.integers(0, 99), st.integers(3, 6))
def test_the_input_map_solves_the_normal_equations(seed: int, channels: int) -> None:
    """Kept and mixed channels alike: B (A S A^T + ridge) = S A^T, but for channels that are kept as they are."""
    seen, samples, _ = reading(seed, channels)
    linear = ObservedChannels(lambda z: z, samples)
    mixing = np.random.default_rng(seed).random((2, channels))
    for output in (np.eye(channels)[1:], np.vstack([np.eye(channels)[:1], mixing])):
        found = fused_input_map([seen], [linear.fused(output)], output)
        inside = output @ seen.covariance @ output.T
        ridge = 1e-4 * np.trace(inside) / len(inside) * np.eye(len(inside))
        wanted = np.linalg.solve(inside + ridge, output @ seen.covariance).T
        whole = [(c, k) for k, row in enumerate(output) for c in [int(row.argmax())] if np.count_nonzero(row) == 1]
        for c, k in whole:
            wanted[c] = np.eye(len(output))[k]
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
        if np.count_nonzero(output) == len(output):
            np.testing.assert_allclose(rebuilding_map([seen], np.arange(1, channels)), wanted, rtol=1e-6, atol=1e-6)
