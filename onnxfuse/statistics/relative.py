"""How much a reader's weights count: by how much its outputs vary, and how sure it is what its channels do."""

import numpy as np

from onnxfuse.arrays import FloatArray, Floats, IntArray

__all__ = ["cautious_weights", "relative_weights", "unseen_variances", "variance_errors"]

# Variances below this share of the mean one count as that: an output that hardly changes is not all that matters.
_STILLEST = 0.03
# As large a share of the mean variance of channels each one may have besides, where samples were made up.
_UNSEEN = 0.5
# Variances below this share of the largest are rounding.
_ROUNDING = 1e-12


def relative_weights(weights: Floats, variances: FloatArray, outputs: IntArray | None) -> Floats:
    r"""Divide a reader's weights so that errors of its outputs count relative to what those vary by.

    Where the reader's outputs are told apart, the damage is the mean over them of the share of each one's own variance
    that is lost. Then it does not matter how a scale is split between a layer and the one behind its activation (cross-
    layer equalisation: Nagel et al., ICCV 2019), and a network whose channels differ in size by much is judged by
    what they say. Otherwise it is the share of the variance of all of them together.

    Args:
        weights: V, shape (C, D).
        variances: Those of the outputs, shape (O,), float64, ``>= 0``.
        outputs: To which output each weight belongs, for each of S sets of channels, one after the other: shape (S, D),
            int64, in [0, O); None where all count by the variance that they add.

    Returns:
        Shape (C, D), of the same type.

    Example:
        >>> both = np.array([[1.0, 5.0]])
        >>> relative_weights(both, np.array([1.0, 25.0]), np.array([[0, 1]])).round(3).tolist()
        [[0.707, 0.707]]
        >>> relative_weights(both, np.array([1.0, 25.0]), None).round(3).tolist()
        [[0.196, 0.981]]
    """
    total = float(variances.sum())
    if not (np.isfinite(total) and total > 0):
        return weights
    if outputs is None:
        return weights / weights.dtype.type(total**0.5)
    floor = _STILLEST * total / len(variances)
    factors = (1.0 / np.sqrt(len(variances) * np.maximum(variances, floor))).astype(weights.dtype)
    sets = weights.reshape(len(outputs), -1, weights.shape[1])
    return np.asarray((sets * factors[outputs][:, None, :]).reshape(weights.shape))


def cautious_weights(weights: Floats, errors: FloatArray) -> Floats:
    """Let channels count for as much as they may well vary: what is rare in the samples may be common elsewhere.

    Copies of a channel still follow from it without any loss, which a larger variance in the covariance would hide.

    Args:
        weights: V, shape (C, D).
        errors: By how much each channel's variance may be larger than it seems, relative, shape (C,), ``>= 0``.

    Returns:
        Shape (C, D), of the same type.
    """
    factors: Floats = np.sqrt(1.0 + errors)[:, None]
    return np.asarray(weights * factors.astype(weights.dtype))


def unseen_variances(variances: FloatArray) -> FloatArray:
    """Return by how much variances may be larger than they are on samples that were made up, in those variances.

    What makes a channel loud may be on no made-up image, so all may vary by a share of what they do on the mean
    (docs/experiments.md: what made-up images leave still, photographs need). A channel that never changes has nothing
    to say, on any image.

    Args:
        variances: Shape (C,), ``>= 0``.

    Returns:
        Shape (C,), float64, ``>= 0``; 0 for channels that do not change.

    Example:
        >>> unseen_variances(np.array([1.0, 7.0, 4.0, 0.0])).round(3).tolist()
        [1.5, 0.214, 0.375, 0.0]
    """
    values = np.maximum(np.asarray(variances, np.float64), 0.0)
    mean = float(values.mean()) if len(values) else 0.0
    changes = values > _ROUNDING * float(values.max(initial=0.0))
    return np.asarray(np.divide(_UNSEEN * mean, values, out=np.zeros_like(values), where=changes))


def variance_errors(powers: FloatArray, count: float) -> FloatArray:
    r"""Return the standard error of a variance that was estimated from samples, in that variance.

    It is :math:`\sqrt{(\kappa - 1) / n}` with the kurtosis :math:`\kappa` (Kendall and Stuart, The Advanced Theory of
    Statistics, volume 1, section 10.5): large for a channel that is silent on nearly all samples, which may be much
    louder on others.

    Args:
        powers: Means of the first four powers of each of C channels, about any origin, shape (4, C), float64.
        count: How many independent samples there were, > 0.

    Returns:
        Shape (C,), float64, ``>= 0``; 0 for channels that do not change.

    Example:
        >>> x = np.array([[-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 4.0]])
        >>> variance_errors(np.stack([(x**k).mean(axis=0) for k in (1, 2, 3, 4)]), 4.0).round(3).tolist()
        [0.0, 0.577]
    """
    first, second, third, fourth = powers
    variance = np.maximum(second - first**2, 0.0)
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    changes = variance > _ROUNDING * max(float(second.max(initial=0.0)), np.finfo(float).tiny)
    square = np.where(changes, variance, 1.0) ** 2
    kurtosis = np.where(changes & np.isfinite(central), central, square) / square
    return np.asarray(np.sqrt(np.maximum(kurtosis - 1.0, 0.0) / count))
