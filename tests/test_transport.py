"""Ground cost, targets, masses and solvers: their laws, and agreement with references that are slower and simpler."""

import itertools
import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from onnxfuse.arrays import FloatArray, project_rows, unit_rows
from onnxfuse.errors import InvariantError, SolverError
from onnxfuse.fusion.methods.intra_fusion import intra_fusion
from onnxfuse.fusion.options import FusionOptions
from onnxfuse.statistics.features import ChannelFeatures, MemberFeatures, Role
from onnxfuse.transport import (
    MASSES,
    SOLVERS,
    TARGETS,
    Clusters,
    Targets,
    TransportResult,
    cluster_rows,
    ground_cost,
    nearest_plan,
    solvers,
    top_channels,
)
from onnxfuse.transport.clusters import _fill_empty, compact_rows, distinct_rows
from onnxfuse.transport.nearest import SHARP

NORMS = [1.0, 1.5, 2.0, 3.0, np.inf]


def generator(seed: int = 0) -> np.random.Generator:
    """Return a fresh generator."""
    return np.random.default_rng(seed)


@st.composite
def rows(draw: st.DrawFn, most: int = 8) -> FloatArray:
    """Draw feature vectors; whole numbers make copies and rows of zeros common, and D may be above or below C."""
    shape = draw(st.integers(1, most)), draw(st.integers(1, 12))
    rng = generator(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        return rng.normal(size=shape)
    largest = draw(st.sampled_from([0, 1, 2]))
    return rng.integers(-largest, largest + 1, size=shape).astype(float)


@st.composite
def problems(draw: st.DrawFn, *, zeros: bool = True) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Draw a cost, source masses and target masses."""
    c, k = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    rng = generator(draw(st.integers(0, 2**32)))
    a, b = rng.uniform(0.1, 1.0, size=c), rng.uniform(0.1, 1.0, size=k)
    if zeros and draw(st.booleans()):
        a[1::2] = 0.0
        b[1::3] = 0.0
    return rng.uniform(0.0, 3.0, size=(c, k)), a / a.sum(), b / b.sum()


def solve(name: str, cost: FloatArray, a: FloatArray, b: FloatArray, regularisation: float = 0.05) -> TransportResult:
    """Solve a problem by the name of the solver."""
    return SOLVERS[name](cost, a, b, regularisation=regularisation)


def uniform_masses(cost: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return masses that are the same for all."""
    c, k = cost.shape
    return np.full(c, 1 / c), np.full(k, 1 / k)


def assert_plan(result: TransportResult, cost: FloatArray, a: FloatArray, b: FloatArray) -> None:
    """Assert that a result is a plan between the masses, and says the truth about itself."""
    assert result.plan.shape == cost.shape
    assert result.plan.min() >= 0
    np.testing.assert_allclose(result.plan.sum(axis=1), a, atol=1e-7)
    np.testing.assert_allclose(result.plan.sum(axis=0), b, atol=1e-7)
    assert result.cost == pytest.approx(np.sum(result.plan * cost))
    assert result.marginal_error <= 1e-7


def assert_targets(targets: Targets, vectors: FloatArray, scores: FloatArray, kept: int) -> None:
    """Assert what the protocol promises of any targets."""
    assert targets.vectors.shape == (kept, vectors.shape[1])
    assert np.isfinite(targets.vectors).all()
    assert targets.scores.shape == (kept,)
    assert targets.scores.min() >= 0
    assert targets.scores.sum() <= scores.sum() * (1 + 1e-9)
    assert targets.anchors.dtype == np.int64
    assert targets.anchors.shape == (kept,)
    assert np.all(np.diff(targets.anchors) > 0)
    assert 0 <= targets.anchors[0] <= targets.anchors[-1] < len(vectors)


def assert_clusters(clusters: Clusters, vectors: FloatArray, count: int) -> None:
    """Assert that clusters are not empty, hold their anchors, and have their means as centroids."""
    assert np.array_equal(np.unique(clusters.labels), np.arange(count))
    assert np.array_equal(clusters.labels[clusters.anchors], np.arange(count))
    assert np.all(np.diff(clusters.anchors) > 0)
    means = [vectors[clusters.labels == k].mean(axis=0) for k in range(count)]
    np.testing.assert_allclose(clusters.centroids, means, atol=1e-12)


class TestHelpersFail:
    """Every assertion helper fails on what is wrong."""

    good = TransportResult(np.array([[0.5, 0.0], [0.0, 0.5]]), 1.0, 0.0)
    cost = np.ones((2, 2))
    half = np.array([0.5, 0.5])

    @pytest.mark.parametrize(
        "bad",
        [
            TransportResult(np.full((2, 1), 0.5), 1.0, 0.0),
            TransportResult(np.array([[0.75, -0.25], [-0.25, 0.75]]), 1.0, 0.0),
            TransportResult(np.array([[0.5, 0.5], [0.0, 0.0]]), 1.0, 0.0),
            TransportResult(np.array([[0.5, 0.0], [0.5, 0.0]]), 1.0, 0.0),
            TransportResult(np.full((2, 2), np.nan), 1.0, 0.0),
            TransportResult(good.plan, 2.0, 0.0),
            TransportResult(good.plan, 1.0, 0.1),
        ],
    )
    def test_plan(self, bad: TransportResult) -> None:
        """Plan: the helper fails on what is wrong."""
        assert_plan(self.good, self.cost, self.half, self.half)
        with pytest.raises(AssertionError):
            assert_plan(bad, self.cost, self.half, self.half)

    @pytest.mark.parametrize(
        ("vectors", "scores", "anchors"),
        [
            (np.zeros((2, 2)), np.ones(2), [0, 1]),
            (np.full((2, 1), np.nan), np.ones(2), [0, 1]),
            (np.zeros((2, 1)), np.ones(3), [0, 1]),
            (np.zeros((2, 1)), np.array([1.0, -1.0]), [0, 1]),
            (np.zeros((2, 1)), np.array([3.0, 1.0]), [0, 1]),
            (np.zeros((2, 1)), np.ones(2), [0]),
            (np.zeros((2, 1)), np.ones(2), [1, 1]),
            (np.zeros((2, 1)), np.ones(2), [0, 3]),
        ],
    )
    def test_targets(self, vectors: FloatArray, scores: FloatArray, anchors: list[int]) -> None:
        """Targets: the helper fails on what is wrong."""
        ones = np.ones((3, 1)), np.ones(3), 2
        assert_targets(Targets(np.zeros((2, 1)), np.ones(2), np.array([0, 1])), *ones)
        with pytest.raises(AssertionError):
            assert_targets(Targets(vectors, scores, np.array(anchors)), *ones)

    @pytest.mark.parametrize(
        ("labels", "centroids", "anchors"),
        [
            ([0, 0, 0], [1.0, 1.0], [0, 1]),
            ([0, 0, 1], [0.5, 2.0], [2, 0]),
            ([0, 0, 1], [0.0, 2.0], [0, 2]),
        ],
    )
    def test_clusters(self, labels: list[int], centroids: list[float], anchors: list[int]) -> None:
        """Clusters: the helper fails on what is wrong."""
        x = np.array([[0.0], [1.0], [2.0]])
        good = Clusters(np.array([0, 0, 1]), np.array([[0.5], [2.0]]), np.array([0, 2]))
        assert_clusters(good, x, 2)
        with pytest.raises(AssertionError):
            assert_clusters(Clusters(np.array(labels), np.array(centroids)[:, None], np.array(anchors)), x, 2)


class TestGroundCost:
    """Distances of rows."""

    @pytest.mark.parametrize("p", NORMS)
    @pytest.mark.parametrize("normalised", [True, False])
    @given(x=rows(), data=st.data())
    def test_is_the_p_norm(self, *, p: float, normalised: bool, x: FloatArray, data: st.DataObject) -> None:
        """Ground cost: is the p norm."""
        y = x[: data.draw(st.integers(1, len(x)))][::-1]
        u, v = (unit_rows(x), unit_rows(y)) if normalised else (x, y)
        expected = [[np.linalg.norm(r - s, ord=p) for s in v] for r in u]
        np.testing.assert_allclose(ground_cost(x, y, p=p, normalised=normalised), expected, atol=1e-12)

    @pytest.mark.parametrize("p", NORMS)
    def test_of_equal_rows_is_exactly_zero(self, p: float) -> None:
        """Ground cost: of equal rows is exactly zero."""
        x = generator().normal(size=(40, 37)) * 1e-3
        assert np.all(np.diag(ground_cost(x, x.copy(), p=p, normalised=True)) == 0)

    def test_of_dead_channels_is_finite(self) -> None:
        """Ground cost: of dead channels is finite."""
        x = np.array([[0.0, 0.0], [3.0, 4.0]])
        assert ground_cost(x, x, p=1.0, normalised=True).tolist() == [[0.0, 1.4], [1.4, 0.0]]

    def test_of_proportional_rows_is_zero_where_normalised(self) -> None:
        """Ground cost: of proportional rows is zero where normalised."""
        x = np.array([[1.0, 2.0, 3.0]])
        np.testing.assert_allclose(ground_cost(x, 5 * x, p=1.0, normalised=True), 0, atol=1e-15)
        assert ground_cost(x, 5 * x, p=1.0, normalised=False).tolist() == [[24.0]]

    def test_does_not_depend_on_the_number_of_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ground cost: does not depend on the number of threads."""
        x = generator().normal(size=(70, 33))
        costs = []
        for count in (None, 1, 3, 64):
            monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
            costs.append(ground_cost(x, x[:9], p=1.0, normalised=True))
        for cost in costs[1:]:
            np.testing.assert_array_equal(cost, costs[0])

    @pytest.mark.parametrize("p", [0.5, 0.0, -1.0, float("nan")])
    def test_refuses_what_is_no_norm(self, p: float) -> None:
        """Ground cost: refuses what is no norm."""
        with pytest.raises(InvariantError, match="order of the norm"):
            ground_cost(np.ones((2, 2)), np.ones((1, 2)), p=p, normalised=True)

    def test_refuses_different_features(self) -> None:
        """Ground cost: refuses different features."""
        with pytest.raises(InvariantError, match="2 features and targets have 3"):
            ground_cost(np.ones((2, 2)), np.ones((1, 3)), p=1.0, normalised=True)


class TestClusters:
    """K-means without empty clusters."""

    @settings(deadline=None, max_examples=60)
    @given(x=rows(), data=st.data())
    def test_are_a_partition(self, x: FloatArray, data: st.DataObject) -> None:
        """Clusters: are a partition."""
        count = data.draw(st.integers(1, len(x)))
        assert_clusters(cluster_rows(x, count, generator()), x, count)

    @settings(deadline=None, max_examples=60)
    @given(x=rows(), data=st.data())
    def test_copies_stay_together_where_clusters_are_scarce(self, x: FloatArray, data: st.DataObject) -> None:
        """Clusters: copies stay together where clusters are scarce."""
        kinds = distinct_rows(x)
        count = data.draw(st.integers(1, len(kinds.first)))
        labels = cluster_rows(x, count, generator()).labels
        for kind in range(len(kinds.first)):
            assert len(np.unique(labels[kinds.kind == kind])) == 1

    @settings(deadline=None, max_examples=40)
    @given(seed=st.integers(0, 1000), data=st.data())
    def test_permute_with_the_channels(self, seed: int, data: st.DataObject) -> None:
        """Clusters: permute with the channels."""
        x = generator(seed).normal(size=(9, 4))
        order = np.array(data.draw(st.permutations(range(9))))
        labels = cluster_rows(x, 4, generator()).labels
        moved = cluster_rows(x[order], 4, generator()).labels
        together = np.equal.outer(labels, labels)
        np.testing.assert_array_equal(np.equal.outer(moved, moved), together[np.ix_(order, order)])

    def test_find_what_is_plain_to_see(self) -> None:
        """Clusters: find what is plain to see."""
        centres = generator(1).normal(size=(5, 300)) * 10
        labels = generator(2).integers(5, size=40)
        labels[:5] = np.arange(5)
        x = centres[labels] + generator(3).normal(size=(40, 300)) * 0.01
        found = cluster_rows(x, 5, generator()).labels
        np.testing.assert_array_equal(np.equal.outer(found, found), np.equal.outer(labels, labels))

    def test_of_nearly_equal_rows_are_not_empty(self) -> None:
        """Clusters: of nearly equal rows are not empty."""
        x = 1.0 + np.arange(8.0)[:, None] * np.spacing(1.0)
        assert len(np.unique(cluster_rows(x, 7, generator()).labels)) == 7

    @pytest.mark.parametrize("scale", [1e-200, 1e-30, 1.0, 1e30])
    def test_do_not_depend_on_scale(self, scale: float) -> None:
        """Clusters: do not depend on scale."""
        x = np.array([[0.0], [10.0], [1.0], [11.0]]) * scale
        assert cluster_rows(x, 2, generator()).labels.tolist() == [0, 1, 0, 1]

    def test_fill_empty_moves_the_worst_off(self) -> None:
        """Clusters: fill empty moves the worst off."""
        x = np.array([[0.0], [1.0], [7.0], [30.0]])
        assert _fill_empty(x, np.array([0, 0, 0, 2]), 4).tolist() in ([1, 0, 3, 2], [0, 3, 1, 2], [3, 0, 1, 2])
        # A cluster of one gives nothing away, however far it is from the others.
        assert _fill_empty(x, np.array([0, 0, 1, 2]), 3).tolist() == [0, 0, 1, 2]

    @given(seed=st.integers(0, 9999))
    def test_of_two_have_the_first_as_anchor(self, seed: int) -> None:
        """Clusters: of two have the first as anchor, whatever rounding makes of their equal distances."""
        x = generator(seed).normal(size=(2, 5))
        assert cluster_rows(x, 1, generator()).anchors.tolist() == [0]

    def test_refuse_a_number_that_is_out_of_range(self) -> None:
        """Clusters: refuse a number that is out of range."""
        for count in (0, 3):
            with pytest.raises(InvariantError, match=f"2 channels can't make {count} clusters"):
                cluster_rows(np.ones((2, 1)), count, generator())

    @given(x=rows())
    def test_compact_rows_keeps_ratios_of_distances(self, x: FloatArray) -> None:
        """Clusters: compact rows keeps ratios of distances."""
        compact = compact_rows(x)
        assert compact.shape == (len(x), min(x.shape))
        before = ground_cost(x, x, p=2.0, normalised=False)
        after = ground_cost(compact, compact, p=2.0, normalised=False)
        assert np.abs(compact).max() in (0.0, 1.0)
        np.testing.assert_allclose(after * before.max(), before * after.max(), atol=1e-12)

    def test_distinct_rows_knows_signed_zeros_as_equal(self) -> None:
        """Clusters: distinct rows knows signed zeros as equal."""
        assert len(distinct_rows(np.array([[0.0], [-0.0]])).first) == 1

    @given(x=rows())
    def test_distinct_rows_tells_every_row(self, x: FloatArray) -> None:
        """Clusters: distinct rows tells every row."""
        kinds = distinct_rows(x)
        np.testing.assert_array_equal(x[kinds.first][kinds.kind], x)
        np.testing.assert_array_equal(kinds.counts, np.bincount(kinds.kind))
        assert len(np.unique(x, axis=0)) == len(kinds.first)


class TestTargets:
    """Every member of the registry, then what each one says."""

    @pytest.mark.parametrize("name", TARGETS)
    @settings(deadline=None, max_examples=60)
    @given(x=rows(), data=st.data())
    def test_are_as_promised(self, name: str, x: FloatArray, data: st.DataObject) -> None:
        """Targets: are as promised."""
        kept = data.draw(st.integers(1, len(x)))
        scores = np.abs(x).sum(axis=1)
        assert_targets(TARGETS[name](x, scores, kept, generator()), x, scores, kept)

    @pytest.mark.parametrize("name", TARGETS)
    def test_follow_the_seed(self, name: str) -> None:
        """Targets: follow the seed."""
        x = generator().normal(size=(30, 50))
        one, two = (TARGETS[name](x, np.ones(30), 11, generator(5)) for _ in range(2))
        np.testing.assert_array_equal(one.vectors, two.vectors)
        np.testing.assert_array_equal(one.anchors, two.anchors)

    @pytest.mark.parametrize("name", TARGETS)
    def test_refuse_a_number_that_is_out_of_range(self, name: str) -> None:
        """Targets: refuse a number that is out of range."""
        for kept in (0, 4):
            with pytest.raises(InvariantError):
                TARGETS[name](np.ones((3, 2)), np.ones(3), kept, generator())

    @pytest.mark.parametrize("name", ["kmeans", "gaussian-mixture"])
    @settings(deadline=None, max_examples=40)
    @given(x=rows(), data=st.data())
    def test_centroids_keep_all_importance(self, name: str, x: FloatArray, data: st.DataObject) -> None:
        """Targets: centroids keep all importance."""
        scores = np.arange(1.0, len(x) + 1)
        targets = TARGETS[name](x, scores, data.draw(st.integers(1, len(x))), generator())
        assert targets.scores.sum() == pytest.approx(scores.sum())

    @pytest.mark.parametrize("name", ["kmeans", "gaussian-mixture"])
    @pytest.mark.parametrize("scale", [1e-4, 1.0])
    def test_centroids_of_plain_clusters_are_their_means(self, name: str, scale: float) -> None:
        """Targets: centroids of plain clusters are their means."""
        labels = np.array([0, 1, 2, 0, 1, 2, 0])
        x = (generator().normal(size=(3, 50))[labels] + generator(1).normal(size=(7, 50)) * 0.01) * scale
        targets = TARGETS[name](x, np.ones(7), 3, generator())
        means = [x[labels == k].mean(axis=0) for k in range(3)]
        np.testing.assert_allclose(targets.vectors, np.array(means)[labels[targets.anchors]], rtol=1e-6)
        np.testing.assert_allclose(targets.scores, np.array([3, 2, 2])[labels[targets.anchors]])

    def test_top_channels_breaks_ties_by_index(self) -> None:
        """Targets: top channels breaks ties by index."""
        assert top_channels(np.array([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 3]

    def test_most_important_are_channels_themselves(self) -> None:
        """Targets: most important are channels themselves."""
        x = generator().normal(size=(5, 3))
        targets = TARGETS["most-important"](x, np.array([3.0, 1.0, 5.0, 2.0, 4.0]), 3, generator())
        assert targets.anchors.tolist() == [0, 2, 4]
        assert targets.scores.tolist() == [3.0, 5.0, 4.0]
        np.testing.assert_array_equal(targets.vectors, x[[0, 2, 4]])


class TestMasses:
    """Every member of the registry, then what each one says."""

    @pytest.mark.parametrize("name", MASSES)
    @given(scores=st.lists(st.floats(0, 1e6), min_size=1, max_size=9))
    def test_sum_to_one(self, name: str, scores: list[float]) -> None:
        """Masses: sum to one."""
        mass = MASSES[name](np.array(scores))
        assert mass.shape == (len(scores),)
        assert mass.min() >= 0
        assert mass.sum() == pytest.approx(1.0)

    def test_say_what_they_are_called(self) -> None:
        """Masses: say what they are called."""
        scores = np.array([0.0, np.log(3.0)])
        assert MASSES["uniform"](scores).tolist() == [0.5, 0.5]
        assert MASSES["importance"](scores).tolist() == [0.0, 1.0]
        np.testing.assert_allclose(MASSES["softmax"](scores), [0.25, 0.75])


class TestSolvers:
    """Every member of the registry, then the exact one against references, then the entropic one against it."""

    @pytest.mark.parametrize("name", SOLVERS)
    @settings(deadline=None)
    @given(problem=problems())
    def test_give_plans(self, name: str, problem: tuple[FloatArray, FloatArray, FloatArray]) -> None:
        """Solvers: give plans."""
        assert_plan(solve(name, *problem), *problem)

    @pytest.mark.parametrize("name", SOLVERS)
    @settings(deadline=None, max_examples=40)
    @given(problem=problems(), data=st.data())
    def test_permute_with_the_channels(
        self, name: str, problem: tuple[FloatArray, FloatArray, FloatArray], data: st.DataObject
    ) -> None:
        """Solvers: permute with the channels."""
        cost, a, b = problem
        order = np.array(data.draw(st.permutations(range(len(a)))))
        plan = solve(name, cost, a, b).plan
        np.testing.assert_allclose(solve(name, cost[order], a[order], b).plan, plan[order], atol=1e-7)

    @pytest.mark.parametrize("name", SOLVERS)
    def test_take_a_cost_of_zeros(self, name: str) -> None:
        """Solvers: take a cost of zeros."""
        cost = np.zeros((3, 2))
        a, b = uniform_masses(cost)
        assert_plan(solve(name, cost, a, b), cost, a, b)

    @given(problem=problems(), seed=st.integers(0, 99))
    def test_exact_costs_no_more_than_any_plan(
        self, problem: tuple[FloatArray, FloatArray, FloatArray], seed: int
    ) -> None:
        """Solvers: exact costs no more than any plan."""
        cost, a, b = problem
        best = solve("exact", cost, a, b).cost
        assert best <= np.sum(np.outer(a, b) * cost) + 1e-12
        # Fill targets in random orders (the north-west corner rule): corners of the set of plans.
        rng = generator(seed)
        left, wanted, plan = a.copy(), b.copy(), np.zeros_like(cost)
        for c, k in itertools.product(rng.permutation(len(a)), rng.permutation(len(b))):
            plan[c, k] = min(left[c], wanted[k])
            left[c] -= plan[c, k]
            wanted[k] -= plan[c, k]
        np.testing.assert_allclose(plan.sum(axis=1), a, atol=1e-12)
        assert best <= np.sum(plan * cost) + 1e-12

    @given(seed=st.integers(0, 9999), size=st.integers(1, 12))
    def test_exact_is_the_assignment_where_masses_are_equal(self, seed: int, size: int) -> None:
        """Solvers: exact is the assignment where masses are equal."""
        cost = generator(seed).uniform(size=(size, size))
        result = solve("exact", cost, *uniform_masses(cost))
        rows_, columns = linear_sum_assignment(cost)
        expected = np.zeros_like(cost)
        expected[rows_, columns] = 1 / size
        np.testing.assert_allclose(result.plan, expected, atol=1e-12)

    @settings(deadline=None)
    @given(seed=st.integers(0, 9999), size=st.integers(1, 5))
    def test_exact_is_the_best_of_all_assignments(self, seed: int, size: int) -> None:
        """Solvers: exact is the best of all assignments."""
        cost = generator(seed).integers(0, 4, size=(size, size)).astype(float)
        best = min(sum(cost[c, k] for c, k in enumerate(order)) for order in itertools.permutations(range(size)))
        assert solve("exact", cost, *uniform_masses(cost)).cost == pytest.approx(best / size)

    @given(problem=problems())
    def test_exact_is_sparse(self, problem: tuple[FloatArray, FloatArray, FloatArray]) -> None:
        """Solvers: exact is sparse."""
        plan = solve("exact", *problem).plan
        assert np.count_nonzero(plan) <= sum(plan.shape) - 1

    @settings(deadline=None, max_examples=30)
    @given(problem=problems())
    def test_entropic_approaches_exact(self, problem: tuple[FloatArray, FloatArray, FloatArray]) -> None:
        """Solvers: entropic approaches exact."""
        exact = solve("exact", *problem).cost
        excess = [solve("entropic", *problem, r).cost - exact for r in (1.0, 0.2, 0.02)]
        scale = problem[0].mean()
        assert excess == sorted(excess, reverse=True) or max(excess) < 1e-6 * scale
        # The excess is at most the regularisation times the entropy that a plan can have.
        assert -1e-7 <= excess[-1] <= 0.02 * scale * 3 * np.log(64)

    def test_entropic_approaches_the_product_of_masses(self) -> None:
        """Solvers: entropic approaches the product of masses."""
        cost, a, b = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([0.3, 0.7]), np.array([0.6, 0.4])
        np.testing.assert_allclose(solve("entropic", cost, a, b, 1e6).plan, np.outer(a, b), atol=1e-6)

    def test_entropic_does_not_depend_on_the_scale_of_the_cost(self) -> None:
        """Solvers: entropic does not depend on the scale of the cost."""
        cost = generator().uniform(size=(6, 4))
        a, b = uniform_masses(cost)
        plan = solve("entropic", cost, a, b).plan
        np.testing.assert_allclose(solve("entropic", 1e-9 * cost, a, b).plan, plan, rtol=1e-6)

    def test_entropic_overflows_in_silence(self) -> None:
        """Solvers: entropic overflows in silence."""
        cost = 1.0 + 5 * np.eye(4)
        a, b = uniform_masses(cost)
        assert_plan(solve("entropic", cost, a, b, 1e-3), cost, a, b)

    def test_entropic_says_that_it_did_not_converge(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Solvers: entropic says that it did not converge."""
        monkeypatch.setattr(solvers, "_MOST_ITERATIONS", 1)
        cost = generator().uniform(size=(6, 4))
        with pytest.raises(SolverError, match="misplaces a mass of") as error:
            solve("entropic", cost, *uniform_masses(cost), 0.001)
        assert "--regularisation" in error.value.mend

    @pytest.mark.parametrize("regularisation", [0.0, -1.0, float("nan"), float("inf")])
    def test_entropic_refuses_a_regularisation_out_of_range(self, regularisation: float) -> None:
        """Solvers: entropic refuses a regularisation out of range."""
        with pytest.raises(InvariantError, match="regularisation"):
            solve("entropic", np.ones((1, 1)), np.ones(1), np.ones(1), regularisation)

    def test_exact_says_that_it_failed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Solvers: exact says that it failed."""
        monkeypatch.setattr(solvers, "_MOST_PIVOTS", 1)
        cost = generator().uniform(size=(40, 30))
        with pytest.raises(SolverError, match="network simplex failed"):
            solve("exact", cost, *uniform_masses(cost))

    @pytest.mark.parametrize("name", SOLVERS)
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_refuse_a_cost_that_is_not_finite(self, name: str, bad: float) -> None:
        """Solvers: refuse a cost that is not finite."""
        with pytest.raises(SolverError, match="not finite"):
            solve(name, np.array([[bad]]), np.ones(1), np.ones(1))

    @pytest.mark.parametrize("name", SOLVERS)
    @pytest.mark.parametrize(
        ("shape", "a", "b"),
        [
            ((2, 1), [1.0], [1.0]),
            ((0, 0), [], []),
            ((2, 1), [1.5, -0.5], [1.0]),
            ((2, 1), [0.5, 0.6], [1.0]),
            ((2, 1), [0.5, np.nan], [1.0]),
            ((2, 1), [0.5, 0.5], [2.0]),
        ],
    )
    def test_refuse_what_is_no_problem(self, name: str, shape: tuple[int, int], a: list[float], b: list[float]) -> None:
        """Solvers: refuse what is no problem."""
        with pytest.raises(InvariantError):
            solve(name, np.ones(shape), np.array(a), np.array(b))


def test_members_are_as_documented() -> None:
    """Members are as documented."""
    assert list(TARGETS) == ["most-important", "kmeans", "gaussian-mixture"]
    assert list(MASSES) == ["uniform", "importance", "softmax"]
    assert list(SOLVERS) == ["exact", "entropic"]


class TestNearest:
    """Transport among near targets only."""

    @given(st.integers(0, 99), st.integers(2, 60), st.sampled_from([1.0, 2.0, math.inf]))
    def test_masses_arrive_whole(self, seed: int, channels: int, p: float) -> None:
        """Whatever the masses, zeros among them, the plan has exactly those."""
        rng = generator(seed)
        kept = max(1, channels // 3)
        x = rng.normal(size=(channels, 5))
        a, b = rng.random(channels) * (rng.random(channels) < 0.8) + 1e-9, rng.random(kept) + 1e-9
        a, b = a / a.sum(), b / b.sum()
        plan = nearest_plan(x, x[:kept], a, b, p=p, normalised=False, regularisation=0.05)
        assert plan.min() >= 0
        np.testing.assert_allclose(plan.sum(axis=1), a, atol=1e-9)
        np.testing.assert_allclose(plan.sum(axis=0), b, atol=1e-9)

    def test_it_costs_little_more_than_the_exact_plan(self) -> None:
        """Points in clusters, long rows that are projected: within a tenth of the least cost, and few entries."""
        rng = generator(1)
        centres = rng.normal(size=(30, 600))
        x = centres[rng.integers(0, 30, 240)] + 0.2 * rng.normal(size=(240, 600))
        a, b = np.full(240, 1 / 240), np.full(60, 1 / 60)
        cost = ground_cost(x, x[:60], p=1.0, normalised=True)
        plan = nearest_plan(x, x[:60], a, b, p=1.0, normalised=True, regularisation=SHARP)
        least = SOLVERS["exact"](cost, a, b, regularisation=1.0).cost
        assert least <= (plan * cost).sum() <= 1.1 * least
        assert plan.count_nonzero() <= 18 * 240 + 60

    def test_large_groups_take_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From the bound on, intra-fusion is by near targets, and stays a map whose columns of A sum to 1."""
        monkeypatch.setattr("onnxfuse.transport.nearest._MOST_PAIRS", 100)
        rng = generator(2)
        features = ChannelFeatures(40, (MemberFeatures("node", Role.PRODUCER, rng.normal(size=(40, 7))),))
        small = intra_fusion(features, 2, FusionOptions(), rng)
        large = intra_fusion(features, 20, FusionOptions(), rng)
        assert np.count_nonzero(small.output) <= 41
        np.testing.assert_allclose(large.output.sum(axis=0), 1.0, atol=1e-9)

    def test_projections_keep_distances(self) -> None:
        """Distances of rows in few dimensions are those in many, up to a few percent, and the same each time."""
        x = generator(3).normal(size=(50, 3000))
        short = project_rows(x)
        assert short.shape == (50, 256)
        np.testing.assert_array_equal(short, project_rows(x))
        gaps = np.linalg.norm(short[:, None] - short, axis=2)[np.triu_indices(50, 1)]
        wanted = np.linalg.norm(x[:, None] - x, axis=2)[np.triu_indices(50, 1)]
        assert np.abs(gaps / wanted - 1).max() < 0.25
        assert np.abs(gaps / wanted - 1).mean() < 0.06

    def test_kmeans_of_long_rows_is_hardly_worse_on_a_projection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The squares within clusters are at most a tenth more, and centroids are means of the rows themselves."""
        x = generator(4).normal(size=(300, 500)) + 2 * generator(5).normal(size=(20, 500))[np.arange(300) % 20]

        def squares() -> float:
            found = cluster_rows(x, 60, generator(6))
            np.testing.assert_allclose(found.centroids[0], x[found.labels == 0].mean(axis=0), atol=1e-9)
            return float(np.square(x - found.centroids[found.labels]).sum())

        whole = squares()
        monkeypatch.setattr("onnxfuse.transport.clusters._MOST_WORK", 0)
        assert squares() <= 1.1 * whole
