"""Least squares from sums, against least squares from the rows themselves."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from onnxfuse.arrays import FloatArray
from onnxfuse.statistics.regression import RegressionRows, RegressionSums


def rows(seed: int, groups: int, inputs: int, outputs: int, count: int = 60) -> tuple[FloatArray, FloatArray]:
    """Return rows that are correlated and far from zero, and targets that depend on them, with noise."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(groups, inputs, inputs))
    x = np.einsum("ngi,gij->ngj", rng.normal(size=(count, groups, inputs)), mixing) + 3.0
    weight = rng.normal(size=(groups, outputs, inputs))
    y = np.einsum("ngd,god->ngo", x, weight) + 0.1 * rng.normal(size=(count, groups, outputs)) - 2.0
    return x, y


def sums_of(x: FloatArray, y: FloatArray, *, centred: bool) -> RegressionSums:
    """Add rows in two blocks."""
    sums = RegressionSums(x.shape[1], x.shape[2], y.shape[2], centred)
    sums.add(x[:7], y[:7])
    sums.add(x[7:], y[7:])
    return sums


sizes = st.tuples(st.integers(0, 99), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))


def direct(x: FloatArray, y: FloatArray, weight: FloatArray, *, centred: bool) -> float:
    """Return what a weight misses, row by row."""
    if centred:
        x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return float(np.square(y - np.einsum("ngd,god->ngo", x, weight)).sum() / len(x))


@given(size=sizes, centred=st.booleans())
def test_what_a_weight_misses_is_what_its_rows_say(*, size: tuple[int, int, int, int], centred: bool) -> None:
    """What a weight misses, and the variance of the targets, are what the rows say."""
    x, y = rows(*size)
    sums = sums_of(x, y, centred=centred)
    weight = np.random.default_rng(1).normal(size=(size[1], size[3], size[2]))
    assert sums.missed(weight) == pytest.approx(direct(x, y, weight, centred=centred), rel=1e-6)
    assert sums.variance() == pytest.approx(direct(x, y, np.zeros_like(weight), centred=centred), rel=1e-6)


@given(size=sizes, centred=st.booleans())
def test_without_a_ridge_the_fit_is_least_squares(*, size: tuple[int, int, int, int], centred: bool) -> None:
    """Without a ridge the fit is that of NumPy's least squares, group by group."""
    x, y = rows(*size)
    fitted = sums_of(x, y, centred=centred).fit(np.zeros((size[1], size[3], size[2])), 1e-13)
    for group in range(size[1]):
        a, b = x[:, group], y[:, group]
        if centred:
            a, b = a - a.mean(axis=0), b - b.mean(axis=0)
        wanted = np.linalg.lstsq(a, b, rcond=None)[0].T
        tried = (fitted[group], np.asarray(wanted, np.float64))
        got, best = (direct(a[:, None], b[:, None], w[None], centred=False) for w in tried)
        assert got <= best * (1 + 1e-6) + 1e-9


@given(sizes)
def test_with_a_large_ridge_the_prior_stays(size: tuple[int, int, int, int]) -> None:
    """With a large ridge the prior stays; with any ridge the fit misses no more than the prior."""
    x, y = rows(*size)
    sums = sums_of(x, y, centred=True)
    prior = np.random.default_rng(2).normal(size=(size[1], size[3], size[2]))
    np.testing.assert_allclose(sums.fit(prior, 1e12), prior, atol=1e-6)
    for ridge in (1e-6, 1e-2, 1.0):
        assert sums.missed(sums.fit(prior, ridge)) <= sums.missed(prior) * (1 + 1e-9) + 1e-12


def test_sums_of_two_collections_are_those_of_all_rows() -> None:
    """Merged sums are those of all rows together."""
    x, y = rows(0, 2, 3, 2)
    halves = [sums_of(x[part], y[part], centred=True) for part in (slice(0, 30), slice(30, None))]
    merged, whole = halves[0].merged(halves[1]), sums_of(x, y, centred=True)
    for ours, theirs in zip(merged.moments(), whole.moments(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-9)
    assert merged.count == whole.count == 60


def test_inputs_that_never_change_give_the_prior() -> None:
    """Inputs that are always zero say nothing: the prior stays, and nothing is infinite."""
    sums = sums_of(np.zeros((20, 1, 3)), np.ones((20, 1, 2)), centred=True)
    prior = np.arange(6.0).reshape(1, 2, 3)
    np.testing.assert_array_equal(sums.fit(prior, 1e-3), prior)
    assert sums.missed(prior) == 0.0
    empty = RegressionSums(1, 3, 2, centred=True)
    empty.add(np.zeros((0, 1, 3)), np.zeros((0, 1, 2)))
    assert (empty.count, empty.variance()) == (0, 0.0)


@given(
    size=st.tuples(st.integers(0, 99), st.just(1), st.integers(1, 90), st.integers(1, 4)),
    centred=st.booleans(),
    ridge=st.sampled_from([1e-3, 0.1, 10.0]),
)
@example(size=(7, 1, 1, 1), centred=True, ridge=1e-3).via("an input that hardly varies, far from zero")
def test_rows_and_sums_give_the_same_fit(*, size: tuple[int, int, int, int], centred: bool, ridge: float) -> None:
    """The dual of the regression is the regression, with fewer rows than numbers in a row and with more."""
    seed, groups, inputs, outputs = size
    x, y = rows(seed, groups, inputs, outputs)
    x = x.astype(np.float32).astype(np.float64)
    prior = np.random.default_rng(seed).normal(size=(1, outputs, inputs))
    sums, parts = sums_of(x[:40], y[:40], centred=centred), RegressionRows(centred)
    held, held_parts = sums_of(x[40:], y[40:], centred=centred), RegressionRows(centred)
    parts.add(x[:11], y[:11])
    parts.add(x[11:40], y[11:40])
    held_parts.add(x[40:], y[40:])
    size_of_y = np.abs(y).max()
    np.testing.assert_allclose(parts.fit(prior, ridge), sums.fit(prior, ridge), rtol=1e-3, atol=1e-3)
    assert parts.variance() == pytest.approx(sums.variance(), rel=1e-6)
    assert parts.missed(prior) == pytest.approx(sums.missed(prior), rel=1e-3, abs=1e-6 * size_of_y)
    wanted = held.missed(sums.fit(prior, ridge))
    assert parts.best_ridge(held_parts, prior, [ridge])[0] == pytest.approx(wanted, rel=1e-2, abs=1e-6 * size_of_y)
    both = parts.merged(held_parts)
    for ours, theirs in zip(both.means, sums.merged(held).means, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6 * size_of_y)
    assert both.count == len(x)


def test_the_best_ridge_is_the_one_that_misses_least_of_other_rows() -> None:
    """Of several ridges, rows and sums choose the same, and it is neither the first nor the last."""
    x, y = rows(1, 1, 50, 3)
    x, y = x.astype(np.float32).astype(np.float64), y + np.random.default_rng(0).normal(size=y.shape) * 20
    ridges = [1e-6, 1e-4, 1e-2, 1e-1, 1.0, 1e3]
    prior = np.zeros((1, 3, 50))
    parts, held = RegressionRows(centred=True), RegressionRows(centred=True)
    parts.add(x[:40], y[:40])
    held.add(x[40:], y[40:])
    wanted = sums_of(x[:40], y[:40], centred=True).best_ridge(sums_of(x[40:], y[40:], centred=True), prior, ridges)
    found = parts.best_ridge(held, prior, ridges)
    assert found[1] == wanted[1]
    assert found[0] == pytest.approx(wanted[0], rel=1e-2)
    assert found[0] == pytest.approx(held.missed(parts.fit(prior, found[1])), rel=1e-3)


@given(seed=st.integers(0, 99), held_back=st.sampled_from([3, 30]))
def test_what_a_ridge_misses_does_not_depend_on_the_system_that_is_solved(seed: int, held_back: int) -> None:
    """For fewer rows held back than there are targets, and for more, it is what the fit itself misses."""
    x, y = rows(seed, 1, 12, 8)
    prior = np.random.default_rng(seed).normal(size=(1, 8, 12))
    parts, held = RegressionRows(centred=True), RegressionRows(centred=True)
    parts.add(x[held_back:], y[held_back:])
    held.add(x[:held_back], y[:held_back])
    for ridge in (1e-2, 1.0):
        found, _ = parts.best_ridge(held, prior, [ridge])
        assert found == pytest.approx(held.missed(parts.fit(prior, ridge)), rel=1e-3)
