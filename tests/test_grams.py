"""Sums over paired rows, and the weights that are fitted from them: against NumPy on the rows themselves."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxfuse.arrays import FloatArray
from onnxfuse.statistics.grams import PairedSums, fit_reader, reading_error


@dataclass(frozen=True)
class Rows:
    """Rows before and after, a target weight on the first and a prior on the second."""

    p: FloatArray
    q: FloatArray
    target: FloatArray
    prior: FloatArray

    @property
    def sums(self) -> PairedSums:
        """All rows at once."""
        sums = PairedSums(self.p.shape[1], self.q.shape[1])
        sums.add(self.p, self.q)
        return sums

    def missed(self, weight: FloatArray) -> float:
        """Return the share of the target outputs' variance that a weight misses, from the outputs themselves."""
        wanted, got = self.p @ self.target.T, self.q @ weight.T
        variance = float(wanted.var(axis=0).sum())
        return float((wanted - got).var(axis=0).sum()) / variance


@st.composite
def paired_rows(draw: st.DrawFn) -> Rows:
    """Draw rows that depend on each other, with means that are not zero, and many more of them than columns."""
    before, outputs = draw(st.integers(2, 6)), draw(st.integers(1, 4))
    after = draw(st.integers(1, before))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    p = rng.normal(size=(draw(st.integers(30, 60)), before)) + rng.normal(size=before)
    q = p @ rng.normal(size=(before, after)) + 0.3 * rng.normal(size=(len(p), after)) + rng.normal(size=after)
    return Rows(p, q, rng.normal(size=(outputs, before)), rng.normal(size=(outputs, after)))


def assert_equal_sums(a: PairedSums, b: PairedSums) -> None:
    """Assert that two sums say the same of their rows."""
    assert a.count == b.count
    for x, y in zip((*a.means, *a.covariances()), (*b.means, *b.covariances()), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10)


def in_batches(rows: Rows, size: int) -> list[PairedSums]:
    """Sum over batches of some size, one by one."""
    batches = []
    for start in range(0, len(rows.p), size):
        part = PairedSums(rows.p.shape[1], rows.q.shape[1])
        part.add(rows.p[start : start + size], rows.q[start : start + size])
        batches.append(part)
    return batches


@settings(max_examples=50, deadline=None)
@given(rows=paired_rows(), size=st.integers(1, 70))
def test_batches_added_or_merged_are_all_rows_at_once(rows: Rows, size: int) -> None:
    """Batches, added or merged, are all rows at once."""
    added, merged = (PairedSums(rows.p.shape[1], rows.q.shape[1]) for _ in range(2))
    for start in range(0, len(rows.p), size):
        added.add(rows.p[start : start + size], rows.q[start : start + size])
    for part in in_batches(rows, size):
        merged.merge(part)
    assert_equal_sums(added, rows.sums)
    assert_equal_sums(merged, rows.sums)


@settings(max_examples=50, deadline=None)
@given(rows=paired_rows())
def test_means_and_covariances_are_those_of_numpy(rows: Rows) -> None:
    """Means and covariances are those of NumPy."""
    before, cross, after = rows.sums.covariances()
    d = rows.p.shape[1]
    joint = np.cov(np.hstack([rows.p, rows.q]), rowvar=False, bias=True)
    np.testing.assert_allclose(before, joint[:d, :d], atol=1e-10)
    np.testing.assert_allclose(cross, joint[:d, d:], atol=1e-10)
    np.testing.assert_allclose(after, joint[d:, d:], atol=1e-10)
    for mean, values in zip(rows.sums.means, (rows.p, rows.q), strict=True):
        np.testing.assert_allclose(mean, values.mean(axis=0), atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(rows=paired_rows())
def test_without_a_ridge_the_fit_is_least_squares_on_centred_rows(rows: Rows) -> None:
    """Without a ridge, the fit is least squares on centred rows, whatever the prior."""
    wanted = rows.p @ rows.target.T
    expected = np.linalg.lstsq(rows.q - rows.q.mean(axis=0), wanted - wanted.mean(axis=0))[0].T
    fitted = fit_reader(rows.target, rows.prior, rows.sums, 1e-13)
    np.testing.assert_allclose(fitted, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(rows=paired_rows())
def test_with_a_ridge_without_end_the_fit_is_the_prior(rows: Rows) -> None:
    """With a ridge without end, the fit is the prior."""
    fitted = fit_reader(rows.target, rows.prior, rows.sums, 1e12)
    np.testing.assert_allclose(fitted, rows.prior, rtol=1e-6, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(rows=paired_rows(), ridge=st.sampled_from([1e-4, 1e-2, 1.0, 100.0]))
def test_the_fit_is_where_the_penalised_error_is_least(rows: Rows, ridge: float) -> None:
    """The fit is where the error with its penalty is least: no step away from it makes it smaller."""
    scale = ridge * float(np.cov(rows.q, rowvar=False, bias=True).trace() if rows.q.shape[1] > 1 else rows.q.var())
    scale /= rows.q.shape[1]

    def loss(weight: FloatArray) -> float:
        gap = (rows.p @ rows.target.T) - rows.q @ weight.T
        return float(gap.var(axis=0).sum() + scale * ((weight - rows.prior) ** 2).sum())

    fitted = fit_reader(rows.target, rows.prior, rows.sums, ridge)
    rng = np.random.default_rng(0)
    for size in (1e-2, 1.0):
        assert all(loss(fitted) < loss(fitted + size * rng.normal(size=fitted.shape)) for _ in range(5))


@settings(max_examples=50, deadline=None)
@given(rows=paired_rows())
def test_the_error_is_the_share_of_the_outputs_variance(rows: Rows) -> None:
    """The error is the share of the outputs' variance that is missed, computed from the outputs themselves."""
    for weight in (rows.prior, np.zeros_like(rows.prior), fit_reader(rows.target, rows.prior, rows.sums, 1e-3)):
        assert reading_error(rows.target, weight, rows.sums) == pytest.approx(rows.missed(weight), rel=1e-6, abs=1e-9)
    assert reading_error(rows.target, np.zeros_like(rows.prior), rows.sums) == pytest.approx(1.0)


@settings(max_examples=50, deadline=None)
@given(rows=paired_rows(), ridge=st.sampled_from([1e-6, 1e-3, 1e-1, 1.0, 10.0]))
def test_a_fit_is_never_worse_than_its_prior_on_its_own_rows(rows: Rows, ridge: float) -> None:
    """A fit is never worse than its prior on its own rows, and a smaller ridge never worse than a larger one."""
    prior, fitted, closer = (
        reading_error(rows.target, weight, rows.sums)
        for weight in (
            rows.prior,
            fit_reader(rows.target, rows.prior, rows.sums, ridge),
            fit_reader(rows.target, rows.prior, rows.sums, ridge / 10),
        )
    )
    assert closer <= fitted + 1e-9
    assert fitted <= prior + 1e-9


@settings(max_examples=30, deadline=None)
@given(rows=paired_rows())
def test_a_mean_makes_no_error(rows: Rows) -> None:
    """What is added to all rows alike changes neither error nor fit."""
    moved = Rows(rows.p + 5.0, rows.q - 3.0, rows.target, rows.prior)
    assert reading_error(rows.target, rows.prior, moved.sums) == pytest.approx(rows.missed(rows.prior), rel=1e-6)
    fits = [fit_reader(r.target, r.prior, r.sums, 1e-2) for r in (rows, moved)]
    np.testing.assert_allclose(fits[0], fits[1], rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(rows=paired_rows())
def test_the_same_rows_are_read_without_error(rows: Rows) -> None:
    """Where nothing was lost, the target weight is without error, and the fit finds it."""
    same = Rows(rows.p, rows.p, rows.target, np.zeros_like(rows.target))
    assert reading_error(same.target, same.target, same.sums) <= 1e-12
    np.testing.assert_allclose(fit_reader(same.target, same.prior, same.sums, 1e-12), same.target, atol=1e-6)


def test_constant_rows_have_no_error_and_keep_the_prior() -> None:
    """Rows that never change say nothing, so the prior stays, and no error can be measured."""
    rows = Rows(np.ones((5, 3)), np.ones((5, 2)), np.eye(3), np.arange(6.0).reshape(3, 2))
    assert reading_error(rows.target, rows.prior, rows.sums) == 0.0
    np.testing.assert_array_equal(fit_reader(rows.target, rows.prior, rows.sums, 1e-2), rows.prior)
