"""Least squares from sums: the weight of a linear node that fits targets best, and how much any weight misses.

A linear node computes Y = X V^T + b, its groups each for themselves. Sums over rows of X and of the targets are all
that least squares needs; they take O(D^2) memory however many rows pass. Where rows are so long that this is too much,
a few thousand of them are kept as they are, and the same fit is found from their products with each other.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np

from onnxfuse.arrays import FloatArray, finite_rows

__all__ = ["Regression", "RegressionRows", "RegressionSums"]


class Regression(Protocol):
    """A collection of rows and targets, however they are kept."""

    @property
    def count(self) -> int:
        """How many rows there are."""

    @property
    def is_sound(self) -> bool:
        """Whether there is something to go by."""

    @property
    def means(self) -> tuple[FloatArray, FloatArray]:
        """Mean row, shape (G, D), and mean target, shape (G, O); zeros where nothing shifts the outputs."""

    def add(self, x: FloatArray, y: FloatArray) -> None:
        """Add rows, shape (n, G, D), and their targets, shape (n, G, O)."""

    def merged(self, other: Self) -> Self:
        """Return both collections of rows."""

    def best_ridge(self, held: Self, prior: FloatArray, ridges: Iterable[float]) -> tuple[float, float]:
        """Return what the best of some fits misses of other rows, and its ridge."""

    def fit(self, prior: FloatArray, ridge: float) -> FloatArray:
        """Return the weight, shape (G, O, D), that fits the targets best and stays near a prior."""

    def missed(self, weight: FloatArray) -> float:
        """Return the mean square that a weight misses of the targets."""

    def variance(self) -> float:
        """Return the mean square of the targets about their mean."""


@dataclass
class RegressionSums:
    """Sums over rows and targets.

    Attributes:
        groups: G, into how many parts inputs and outputs fall.
        inputs: D, how many numbers a group reads.
        outputs: O, how many numbers a group gives.
        centred: Whether the node can shift its outputs, so that only deviations from the mean need be explained.
        count: How many rows were added.
    """

    groups: int
    inputs: int
    outputs: int
    centred: bool
    count: int = 0
    sum_x: FloatArray = field(init=False)
    sum_y: FloatArray = field(init=False)
    xx: FloatArray = field(init=False)
    xy: FloatArray = field(init=False)
    yy: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        """Start from nothing."""
        self.sum_x, self.sum_y = np.zeros((self.groups, self.inputs)), np.zeros((self.groups, self.outputs))
        self.xx = np.zeros((self.groups, self.inputs, self.inputs))
        self.xy = np.zeros((self.groups, self.inputs, self.outputs))
        self.yy = np.zeros((self.groups, self.outputs))

    def add(self, x: FloatArray, y: FloatArray) -> None:
        """Add rows, shape (n, G, D), and their targets, shape (n, G, O), of any float type; all finite ones count."""
        x, y = finite_rows(x, y)
        if len(x) == 0:
            return
        self.count += len(x)
        x, y = x.transpose(1, 0, 2), y.transpose(1, 0, 2)
        # The products of a block in the type of the data, which BLAS is fast at; their sums in float64.
        self.sum_x += x.sum(axis=1, dtype=np.float64)
        self.sum_y += y.sum(axis=1, dtype=np.float64)
        # Squares of large numbers may overflow; who asks for the sums looks whether they are finite.
        with np.errstate(over="ignore", invalid="ignore"):
            self.xx += x.transpose(0, 2, 1) @ x
            self.xy += x.transpose(0, 2, 1) @ y
        self.yy += np.square(y, dtype=np.float64).sum(axis=1)

    @property
    def is_sound(self) -> bool:
        """Whether there are rows, and no product has overflown."""
        return self.count > 0 and bool(np.isfinite(self.xy).all())

    def best_ridge(self, held: Self, prior: FloatArray, ridges: Iterable[float]) -> tuple[float, float]:
        """Return what the best of some fits misses of other rows, and its ridge."""
        ours, theirs = self.moments(), held.moments()
        return min((_missed(theirs, _fitted(ours, prior, ridge)), ridge) for ridge in ridges)

    def merged(self, other: Self) -> Self:
        """Return the sums of both collections of rows."""
        both = type(self)(self.groups, self.inputs, self.outputs, self.centred, self.count + other.count)
        for name in ("sum_x", "sum_y", "xx", "xy", "yy"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    @property
    def means(self) -> tuple[FloatArray, FloatArray]:
        """Mean row, shape (G, D), and mean target, shape (G, O); zeros where nothing shifts the outputs."""
        scale = 1.0 / self.count if self.centred and self.count else 0.0
        return self.sum_x * scale, self.sum_y * scale

    def moments(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return E[x x^T], E[x y^T] and E[y^2], about the means: (G, D, D), (G, D, O), (G, O)."""
        count = max(self.count, 1)
        x, y = self.means
        return (
            self.xx / count - x[:, :, None] * x[:, None, :],
            self.xy / count - x[:, :, None] * y[:, None, :],
            self.yy / count - y * y,
        )

    def fit(self, prior: FloatArray, ridge: float) -> FloatArray:
        r"""Return the weight that fits the targets best and stays near a prior.

        Minimises :math:`E||V x - y||^2 + \lambda ||V - V_0||^2` with :math:`\lambda` = ``ridge`` x the mean square of
        an input, for every group.

        Args:
            prior: V_0, shape (G, O, D).
            ridge: > 0, no unit.

        Returns:
            V, shape (G, O, D).
        """
        return _fitted(self.moments(), prior, ridge)

    def missed(self, weight: FloatArray) -> float:
        """Return the mean square that a weight misses of the targets, over all outputs; its shift is at its best.

        Args:
            weight: V, shape (G, O, D).
        """
        return _missed(self.moments(), weight)

    def variance(self) -> float:
        """Return the mean square of the targets about their mean, over all outputs."""
        return max(float((self.yy / max(self.count, 1) - np.square(self.means[1])).sum()), 0.0)


def _fitted(moments: tuple[FloatArray, FloatArray, FloatArray], prior: FloatArray, ridge: float) -> FloatArray:
    """Return the weight of `RegressionSums.fit` for given moments."""
    xx, xy, _ = moments
    inputs = xx.shape[1]
    scale = np.trace(xx, axis1=1, axis2=2) / inputs
    # Inputs that never change say nothing: any ridge gives the prior then.
    weight = ridge * np.where(scale > 0, scale, 1.0)[:, None, None]
    left = xx.copy()
    left[:, np.arange(inputs), np.arange(inputs)] += weight[:, :, 0]
    solution = np.linalg.solve(left, xy + weight * prior.transpose(0, 2, 1))
    return np.ascontiguousarray(solution.transpose(0, 2, 1))


def _missed(moments: tuple[FloatArray, FloatArray, FloatArray], weight: FloatArray) -> float:
    """Return the mean square that a weight misses of targets of given moments."""
    xx, xy, yy = moments
    transposed = np.ascontiguousarray(weight.transpose(0, 2, 1))
    lost = yy.sum() - 2 * np.vdot(transposed, xy) + np.vdot(transposed, xx @ transposed)
    return max(float(lost), 0.0)


@dataclass
class RegressionRows:
    r"""Rows and targets themselves, of which there are fewer than numbers in a row; of a node without groups.

    With X the rows and Y the targets, less their means where the node can shift its outputs, the fit of
    `RegressionSums` is the same as its dual (Saunders, Gammerman and Vovk, "Ridge regression learning algorithm in dual
    variables", ICML 1998):

    .. math:: V = V_0 + (Y - X V_0^T)^T (X X^T + n \lambda I)^{-1} X

    which takes O(n^3 + n^2 D) instead of O(D^3).

    Attributes:
        centred: Whether the node can shift its outputs.
        offset: What was taken from every row, shape (D,): near their mean, so that float32 is precise enough for what
            is left of rows that vary little; 0 where nothing shifts the outputs.
        x: Shape (n, D), float32, less the offset.
        y: Shape (n, O), float64.
    """

    centred: bool
    offset: FloatArray = field(init=False)
    x: np.ndarray[Any, np.dtype[np.float32]] = field(init=False)
    y: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        """Start from nothing."""
        self.x, self.y, self.offset = np.zeros((0, 0), np.float32), np.zeros((0, 0)), np.zeros(0)

    @property
    def count(self) -> int:
        """How many rows there are."""
        return len(self.x)

    @property
    def is_sound(self) -> bool:
        """Whether there are rows; only finite ones are taken."""
        return self.count > 0

    def add(self, x: FloatArray, y: FloatArray) -> None:
        """Add rows, shape (n, 1, D), and their targets, shape (n, 1, O), of any float type; all finite ones count."""
        x, y = finite_rows(x[:, 0], y[:, 0])
        first = not self.count
        if first:
            mean = x.mean(axis=0, dtype=np.float64) if len(x) else np.zeros(x.shape[1])
            self.offset = mean if self.centred else np.zeros_like(mean)
        rows = (x - self.offset).astype(np.float32)
        self.x = rows if first else np.concatenate([self.x, rows])
        self.y = y.astype(np.float64) if first else np.concatenate([self.y, y])

    def merged(self, other: Self) -> Self:
        """Return both collections of rows."""
        both = type(self)(self.centred)
        both.offset = self.offset
        moved = (other.x + (other.offset - self.offset)).astype(np.float32)
        both.x, both.y = np.concatenate([self.x, moved]), np.concatenate([self.y, other.y])
        return both

    @property
    def means(self) -> tuple[FloatArray, FloatArray]:
        """Mean row, shape (1, D), and mean target, shape (1, O); zeros where nothing shifts the outputs."""
        return self._mean_left[None] + self.offset, self._mean_target[None]

    @property
    def _mean_left(self) -> FloatArray:
        """What rows have in the mean, beside the offset; 0 where nothing shifts the outputs."""
        mean: FloatArray = self.x.mean(axis=0, dtype=np.float64)
        return mean if self.centred else np.zeros_like(mean)

    @property
    def _mean_target(self) -> FloatArray:
        mean: FloatArray = self.y.mean(axis=0)
        return mean if self.centred else np.zeros_like(mean)

    def best_ridge(self, held: Self, prior: FloatArray, ridges: Iterable[float]) -> tuple[float, float]:
        """Return what the best of some fits misses of other rows, and its ridge; no weight is worked out for that."""
        gap, products, scale = self._gap(prior), self._products(self), self._scale()
        across, theirs = held._products(self), held._gap(prior)

        def missed(ridge: float) -> float:
            # Whichever has fewer columns is solved for: the rows that are held back, or the targets.
            if held.count < gap.shape[1]:
                found = self._dual(products, across.T, ridge * scale).T @ gap
            else:
                found = across @ self._dual(products, gap, ridge * scale)
            return float(np.square(theirs - found).sum() / held.count)

        return min((missed(ridge), ridge) for ridge in ridges)

    def fit(self, prior: FloatArray, ridge: float) -> FloatArray:
        """Return the weight that fits the targets best and stays near a prior: see `RegressionSums.fit`.

        Args:
            prior: V_0, shape (1, O, D).
            ridge: > 0, no unit.

        Returns:
            V, shape (1, O, D).
        """
        dual = self._dual(self._products(self), self._gap(prior), ridge * self._scale())
        # Every row less the mean row.
        step = dual.astype(np.float32).T @ self.x - np.outer(dual.sum(axis=0), self._mean_left)
        fitted: FloatArray = prior + step
        return fitted

    def missed(self, weight: FloatArray) -> float:
        """Return the mean square that a weight misses of the targets, over all outputs; its shift is at its best."""
        return float(np.square(self._gap(weight)).sum() / self.count)

    def variance(self) -> float:
        """Return the mean square of the targets about their mean, over all outputs."""
        return float(np.square(self.y - self._mean_target).sum() / self.count)

    def _gap(self, weight: FloatArray) -> FloatArray:
        """Return what a weight misses of every target, shape (n, O)."""
        left = self.x @ weight[0].T.astype(np.float32) - self._mean_left @ weight[0].T
        gap: FloatArray = self.y - self._mean_target - left
        return gap

    def _products(self, other: Self) -> FloatArray:
        """Return the products of these rows with others, each less its own mean, shape (n, m)."""
        products = (self.x @ other.x.T).astype(np.float64)
        ours, theirs = self._mean_left[None], other._mean_left[None]
        return products - self.x @ theirs.T - ours @ other.x.T + ours @ theirs.T

    def _scale(self) -> float:
        """Return the mean square of an input; 1 if none ever changes."""
        squares = np.square(self.x, dtype=np.float64).mean(axis=0) - np.square(self._mean_left)
        scale = float(squares.mean())
        return scale if scale > 0 else 1.0

    def _dual(self, products: FloatArray, gap: FloatArray, weight: float) -> FloatArray:
        left = products + self.count * weight * np.eye(self.count)
        return np.asarray(np.linalg.solve(left, gap), np.float64)
