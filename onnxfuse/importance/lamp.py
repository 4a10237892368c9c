r"""LAMP (Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021).

With :math:`u_c` the squared Euclidean norm of channel c, averaged over the group's members, the score is

.. math:: u_c / \sum_{j: u_j \ge u_c} u_j

the share of c in what would still be there if everything smaller were gone. The released code of Intra-Fusion
takes norms instead of squares and puts the scores back in place by the sorting permutation instead of its
inverse, so that they land on the wrong channels; neither is repeated here.
"""

import numpy as np

from onnxfuse.arrays import FloatArray
from onnxfuse.importance.magnitude import sum_of_squares
from onnxfuse.importance.reduction import mean_over_members
from onnxfuse.statistics.features import ChannelFeatures

__all__ = ["lamp", "lamp_scores"]


def lamp_scores(norms: FloatArray) -> FloatArray:
    """Turn squared norms into LAMP scores.

    Equal norms get equal scores: each counts in the other's denominator, as the formula says, so nothing
    depends on the order of the channels. (The paper's own pseudo-code sorts, and breaks ties by position.)

    Args:
        norms: Squared norms, shape (C,), float64, finite, ``>= 0``.

    Returns:
        Shape (C,), float64, in [0, 1], in the same order of size as ``norms``; ones where all norms are 0.

    Example:
        >>> lamp_scores(np.array([5.0, 1.0, 4.0])).tolist()
        [1.0, 0.1, 0.4444444444444444]
        >>> lamp_scores(np.array([2.0, 2.0, 0.0])).tolist()
        [0.5, 0.5, 0.0]
    """
    levels, level_of, counts = np.unique(norms, return_inverse=True, return_counts=True)
    if levels[-1] <= 0:
        return np.ones_like(norms)
    remaining = np.cumsum((levels * counts)[::-1])[::-1]
    scores: FloatArray = (levels / remaining)[level_of]
    return scores


def lamp(features: ChannelFeatures, rng: np.random.Generator, /) -> FloatArray:
    """Score by LAMP.

    Args:
        features: What is known about the group's C channels.
        rng: Not used.

    Returns:
        Shape (C,), float64, in [0, 1]; ones where every weight is 0.

    Raises:
        ModelError: A weight is not finite.
    """
    del rng
    return lamp_scores(mean_over_members(features.members, sum_of_squares))
