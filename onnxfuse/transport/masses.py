"""Masses: how much of the whole each channel and each target stands for (paper, sections 3.2.3 and 5.3).

All of the paper's results use uniform masses on both sides (appendix A.2).
"""

from typing import Protocol

import numpy as np

from onnxfuse.arrays import FloatArray

__all__ = ["Mass", "importance", "softmax", "uniform"]


class Mass(Protocol):
    """Spreads a total mass of 1 over channels or targets."""

    def __call__(self, scores: FloatArray, /) -> FloatArray:
        """Return the mass of each.

        Args:
            scores: Importances, shape (N,), float64, finite, ``>= 0``, N >= 1.

        Returns:
            Shape (N,), float64, ``>= 0``, sum 1. Masses may be 0; what becomes of a channel without mass is
            the matter of `onnxfuse.fusion.maps.ChannelMap.from_plan`.
        """


def uniform(scores: FloatArray, /) -> FloatArray:
    """Give all the same mass.

    Args:
        scores: Shape (N,); only N is looked at.

    Returns:
        Shape (N,), float64, every entry 1 / N.
    """
    return np.full(len(scores), 1.0 / len(scores))


def importance(scores: FloatArray, /) -> FloatArray:
    """Give masses in proportion to the scores.

    A score of 0 gives a mass of 0: such a source channel takes no part in any fused channel, and such a
    target gets nothing. Scores that are all 0 give uniform masses.

    Args:
        scores: Shape (N,), float64, finite, ``>= 0``.

    Returns:
        Shape (N,), float64, ``>= 0``, sum 1.

    Example:
        >>> importance(np.array([3.0, 1.0])).tolist(), importance(np.zeros(2)).tolist()
        ([0.75, 0.25], [0.5, 0.5])
    """
    total = scores.sum()
    return scores / total if total > 0 else uniform(scores)


def softmax(scores: FloatArray, /) -> FloatArray:
    """Give masses in proportion to the exponential of the scores, which no finite score can overflow.

    Args:
        scores: Shape (N,), float64, finite.

    Returns:
        Shape (N,), float64, ``>= 0``, sum 1; above 0 unless a score is more than 700 below the largest.

    Example:
        >>> softmax(np.array([1000.0, 1000.0])).tolist()
        [0.5, 0.5]
    """
    weights = np.exp(scores - scores.max())
    masses: FloatArray = weights / weights.sum()
    return masses
