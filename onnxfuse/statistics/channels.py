r"""What is known of channels before their activation, behind one protocol: what any output map would make of them.

Readers of a group see h = f(z). An output map A acts on what makes z, so they see h' = f(A z) afterwards; unless f is
linear, or A only selects, that is not A h, and no moments of h alone tell what a reader then loses.
"""

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxfuse.arrays import FloatArray
from onnxfuse.statistics.gaussian import Elementwise, gaussian_moments, hermite_coefficients

Rows: TypeAlias = NDArray[np.float32] | FloatArray

__all__ = ["Channels", "FusedMoments", "GaussianChannels", "ObservedChannels"]


@dataclass(frozen=True, slots=True)
class FusedMoments:
    """What channels h and fused channels h' have in common.

    Attributes:
        mean: E[h], shape (C,), float64.
        fused_mean: E[h'], shape (K,), float64.
        whole: Cov(h), shape (C, C), float64.
        cross: Cov(h, h'), shape (C, K), float64.
        inside: Cov(h'), shape (K, K), float64.
    """

    mean: FloatArray
    fused_mean: FloatArray
    whole: FloatArray
    cross: FloatArray
    inside: FloatArray

    def about_zero(self) -> "FusedMoments":
        """Return second moments about zero in place of covariances: what counts where nothing makes means good."""
        return FusedMoments(
            self.mean,
            self.fused_mean,
            self.whole + np.outer(self.mean, self.mean),
            self.cross + np.outer(self.mean, self.fused_mean),
            self.inside + np.outer(self.fused_mean, self.fused_mean),
        )


class Channels(Protocol):
    """The channels of a group as one reader sees them, before their activation."""

    def fused(self, output: FloatArray, /) -> FusedMoments:
        """Return the moments of h = f(z) and h' = f(A z).

        Args:
            output: A, shape (K, C), float64.
        """

    def means(self, output: FloatArray, /) -> tuple[FloatArray, FloatArray]:
        """Return E[h], shape (C,), and E[h'], shape (K,), float64: of `fused` the means alone."""

    def part(self, some: slice, /) -> "Channels":
        """Return some of the channels."""


@dataclass(frozen=True, slots=True)
class GaussianChannels:
    """Jointly Gaussian channels.

    Attributes:
        function: f.
        mean: E[z], shape (C,), float64.
        covariance: Cov(z), shape (C, C), float64, positive semidefinite.
    """

    function: Elementwise
    mean: FloatArray
    covariance: FloatArray

    def fused(self, output: FloatArray, /) -> FusedMoments:
        """Return the moments of h = f(z) and h' = f(A z), exact but for the end of a series.

        Args:
            output: A, shape (K, C), float64.
        """
        cross = self.covariance @ output.T
        joint = np.block([[self.covariance, cross], [cross.T, output @ cross]])
        mean, covariance = gaussian_moments(self.function, np.concatenate([self.mean, output @ self.mean]), joint)
        return _split(mean, covariance, len(self.mean))

    def means(self, output: FloatArray, /) -> tuple[FloatArray, FloatArray]:
        """Return E[h], shape (C,), and E[h'], shape (K,)."""
        mean = np.concatenate([self.mean, output @ self.mean])
        variance = np.concatenate([np.diag(self.covariance), ((output @ self.covariance) * output).sum(axis=1)])
        found = hermite_coefficients(self.function, mean, np.sqrt(np.maximum(variance, 0.0)), 1)[:, 0]
        return found[: len(self.mean)], found[len(self.mean) :]

    def part(self, some: slice, /) -> "GaussianChannels":
        """Return some of the channels."""
        return GaussianChannels(self.function, self.mean[some], self.covariance[some, some])


@dataclass(frozen=True, slots=True)
class ObservedChannels:
    """Channels of which samples are known.

    Attributes:
        function: f.
        rows: z at some places, shape (n, C), floats, finite.
    """

    function: Elementwise
    rows: Rows

    def fused(self, output: FloatArray, /) -> FusedMoments:
        """Return the moments of h = f(z) and h' = f(A z) over the rows.

        Args:
            output: A, shape (K, C), float64.
        """
        rows = np.asarray(self.rows, np.float64)
        values = np.concatenate([self.function(rows), self.function(rows @ output.T)], axis=1)
        mean = values.mean(axis=0)
        values = values - mean
        return _split(mean, values.T @ values / len(values), rows.shape[1])

    def means(self, output: FloatArray, /) -> tuple[FloatArray, FloatArray]:
        """Return E[h], shape (C,), and E[h'], shape (K,)."""
        rows = np.asarray(self.rows, np.float64)
        return self.function(rows).mean(axis=0), self.function(rows @ output.T).mean(axis=0)

    def part(self, some: slice, /) -> "ObservedChannels":
        """Return some of the channels."""
        return ObservedChannels(self.function, self.rows[:, some])


def _split(mean: FloatArray, covariance: FloatArray, channels: int) -> FusedMoments:
    whole, cross = covariance[:channels, :channels], covariance[:channels, channels:]
    return FusedMoments(mean[:channels], mean[channels:], whole, cross, covariance[channels:, channels:])
