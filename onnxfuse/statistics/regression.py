"""Least squares from sums: the weight of a linear node that fits targets best, and how much any weight misses.

A linear node computes Y = X V^T + b, its groups each for themselves. Sums over rows of X and of the targets are all
that least squares needs; they take O(D^2) memory however many rows pass.
"""

from dataclasses import dataclass, field

import numpy as np

from onnxfuse.arrays import FloatArray, finite_rows

__all__ = ["RegressionSums"]


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

    def merged(self, other: "RegressionSums") -> "RegressionSums":
        """Return the sums of both collections of rows."""
        both = RegressionSums(self.groups, self.inputs, self.outputs, self.centred, self.count + other.count)
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
        xx, xy, _ = self.moments()
        scale = np.trace(xx, axis1=1, axis2=2) / self.inputs
        # Inputs that never change say nothing: any ridge gives the prior then.
        weight = ridge * np.where(scale > 0, scale, 1.0)[:, None, None]
        left = xx + weight * np.eye(self.inputs)
        solution = np.linalg.solve(left, xy + weight * prior.transpose(0, 2, 1))
        return np.ascontiguousarray(solution.transpose(0, 2, 1))

    def missed(self, weight: FloatArray) -> float:
        """Return the mean square that a weight misses of the targets, over all outputs; its shift is at its best.

        Args:
            weight: V, shape (G, O, D).
        """
        xx, xy, yy = self.moments()
        transposed = weight.transpose(0, 2, 1)
        lost = yy.sum() - 2 * float((transposed * xy).sum()) + float((transposed * (xx @ transposed)).sum())
        return max(float(lost), 0.0)

    def variance(self) -> float:
        """Return the mean square of the targets about their mean, over all outputs."""
        return max(float(self.moments()[2].sum()), 0.0)
