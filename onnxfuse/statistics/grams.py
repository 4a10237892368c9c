"""Sums from which a linear node is fitted anew: means and products of the rows that it reads, before and after.

Rows P of the original and P' of the compressed network, read in the same places, are all that least squares needs. The
sums are kept in float64 and take O(D^2) memory, however many rows pass.
"""

from dataclasses import dataclass, field

import numpy as np

from onnxfuse.arrays import FloatArray

__all__ = ["PairedSums", "fit_reader", "reading_error"]


@dataclass
class PairedSums:
    """Sums over paired rows.

    Attributes:
        before: D, the length of the original's rows.
        after: D', the length of the compressed network's rows.
    """

    before: int
    after: int
    count: int = 0
    sum_before: FloatArray = field(init=False)
    sum_after: FloatArray = field(init=False)
    before_before: FloatArray = field(init=False)
    before_after: FloatArray = field(init=False)
    after_after: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        """Start from nothing."""
        self.sum_before, self.sum_after = np.zeros(self.before), np.zeros(self.after)
        self.before_before = np.zeros((self.before, self.before))
        self.before_after = np.zeros((self.before, self.after))
        self.after_after = np.zeros((self.after, self.after))

    def add(self, p: FloatArray, q: FloatArray) -> None:
        """Add rows of the original, shape (n, D), and the rows at the same places after, shape (n, D')."""
        self.count += len(p)
        self.sum_before += p.sum(axis=0)
        self.sum_after += q.sum(axis=0)
        self.before_before += p.T @ p
        self.before_after += p.T @ q
        self.after_after += q.T @ q

    def merge(self, other: "PairedSums") -> None:
        """Add the sums of another collection of rows of the same lengths."""
        self.count += other.count
        self.sum_before += other.sum_before
        self.sum_after += other.sum_after
        self.before_before += other.before_before
        self.before_after += other.before_after
        self.after_after += other.after_after

    @property
    def means(self) -> tuple[FloatArray, FloatArray]:
        """Mean rows before and after."""
        count = max(self.count, 1)
        return self.sum_before / count, self.sum_after / count

    def covariances(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return Cov(P, P), Cov(P, P') and Cov(P', P')."""
        count = max(self.count, 1)
        m, n = self.means
        return (
            self.before_before / count - np.outer(m, m),
            self.before_after / count - np.outer(m, n),
            self.after_after / count - np.outer(n, n),
        )


def fit_reader(target: FloatArray, prior: FloatArray, sums: PairedSums, ridge: float) -> FloatArray:
    r"""Fit the weight of a linear node that reads P' so that it gives what a target weight gives on P.

    Minimises :math:`\sum ||V p' - W p||^2 + \lambda ||V - V_0||^2` over centred rows, with the ridge
    :math:`\lambda` = ``ridge`` x the mean variance of P'. (Asymmetric reconstruction as in method.md section 2: the
    original's outputs from the compressed network's inputs; with V_0 the weight that the channel map gives.)

    Args:
        target: W, shape (O, D).
        prior: V_0, shape (O, D').
        sums: Sums over paired rows.
        ridge: Weight of the prior, > 0, no unit.

    Returns:
        V, shape (O, D').
    """
    _, cross, after = sums.covariances()
    variance = float(np.trace(after)) / max(len(after), 1)
    # Rows that never change say nothing: any ridge gives the prior then.
    weight = ridge * (variance if variance > 0 else 1.0)
    left = after + weight * np.eye(len(after))
    right = target @ cross + weight * prior
    return np.asarray(np.linalg.solve(left, right.T).T, np.float64)


def reading_error(target: FloatArray, weight: FloatArray, sums: PairedSums) -> float:
    """Return the share of the target outputs' variance that a weight on P' misses, its mean corrected; 0 is perfect."""
    before, cross, after = sums.covariances()
    variance = float(np.einsum("od,de,oe->", target, before, target, optimize=True))
    missed = (
        variance
        - 2 * float(np.einsum("od,de,oe->", target, cross, weight, optimize=True))
        + float(np.einsum("od,de,oe->", weight, after, weight, optimize=True))
    )
    return max(missed, 0.0) / variance if variance > 0 else 0.0
