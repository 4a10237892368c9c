"""How much each channel adds to the nuclear norm of a feature map (CHIP).

Sui et al., "CHIP: Channel independence-based pruning for compact neural networks", NeurIPS 2021, equation 4.
"""

import numpy as np

from onnxfuse.arrays import FloatArray

__all__ = ["channel_independence"]

# How many numbers the matrices of one step may have.
_MOST_NUMBERS = 2**24


def channel_independence(maps: FloatArray) -> FloatArray:
    r"""Return :math:`||M||_* - ||M_{-c}||_*` for every row c of a map, where :math:`M_{-c}` is M with that row zeroed.

    Singular values are roots of eigenvalues of the smaller of :math:`M M^T`, in which a zeroed row is one that is left
    out, and :math:`M^T M`, from which it subtracts a matrix of rank one.

    Args:
        maps: The channels of one sample, shape (C, places), float64.

    Returns:
        Shape (C,), float64, ``>= 0``.

    Example:
        >>> channel_independence(np.array([[1.0, 0.0], [0.0, 2.0]])).round(6).tolist()
        [1.0, 2.0]
    """
    channels, places = maps.shape
    by_rows = channels <= places
    gram = maps @ maps.T if by_rows else maps.T @ maps
    whole = _nuclear_norm(gram[None])[0]
    result = np.empty(channels)
    step = max(1, _MOST_NUMBERS // max(gram.size, 1))
    for start in range(0, channels, step):
        chosen = np.arange(start, min(start + step, channels))
        if by_rows:
            others = np.array([np.delete(np.arange(channels), c) for c in chosen], np.int64).reshape(len(chosen), -1)
            left = gram[others[:, :, None], others[:, None, :]]
        else:
            left = gram - maps[chosen, :, None] * maps[chosen, None, :]
        result[chosen] = whole - _nuclear_norm(left)
    return np.maximum(result, 0.0)


def _nuclear_norm(grams: FloatArray) -> FloatArray:
    """Return the sums of the roots of the eigenvalues, shape (n,), of matrices of shape (n, r, r)."""
    norms: FloatArray = np.sqrt(np.maximum(np.linalg.eigvalsh(grams), 0.0)).sum(axis=-1)
    return norms
