"""How the scores of a group's members become the score of its channels.

The released code of Intra-Fusion (``importance.py``, ``reduction="mean"``) averages over the members and
divides by the mean over the channels. So do we, for producers and consumers alike; neither it nor the paper's
text counts biases.
"""

from collections.abc import Callable, Iterable

import numpy as np

from onnxfuse.arrays import FloatArray
from onnxfuse.errors import ModelError
from onnxfuse.statistics.features import MemberFeatures

__all__ = ["mean_over_members", "over_mean"]


def mean_over_members(members: Iterable[MemberFeatures], score: Callable[[MemberFeatures], FloatArray]) -> FloatArray:
    """Average what ``score`` says of each member.

    Args:
        members: At least one member of a group of C channels.
        score: Gives one member's score per channel, shape (C,), ``>= 0``.

    Returns:
        Shape (C,), float64, finite.

    Raises:
        ModelError: A member's scores are not all finite.
    """
    rows: list[FloatArray] = []
    for member in members:
        row = score(member)
        if not np.isfinite(row).all():
            what = "a weight is NaN or infinite (or too large to be squared), so its channel can't be scored"
            raise ModelError(what, where=member.node, mend="repair the model's weights, or leave the layer out")
        rows.append(row)
    mean: FloatArray = np.mean(np.stack(rows), axis=0)
    return mean


def over_mean(scores: FloatArray) -> FloatArray:
    """Divide scores by their mean, so that scores of groups of any scale can be compared.

    Scores that are all zero (a group without any weight but 0) become ones: every channel is worth as much as
    any other, and what is made of the scores (masses, rankings) stays defined.

    Args:
        scores: Shape (C,), float64, ``>= 0``.

    Returns:
        Shape (C,), float64, ``>= 0``, mean 1.

    Example:
        >>> over_mean(np.array([1.0, 3.0])).tolist(), over_mean(np.zeros(2)).tolist()
        ([0.5, 1.5], [1.0, 1.0])
    """
    mean = scores.mean()
    return scores / mean if mean > 0 else np.ones_like(scores)
