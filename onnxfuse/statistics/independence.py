"""How much each channel adds to the nuclear norm of a feature map (CHIP).

Sui et al., "CHIP: Channel independence-based pruning for compact neural networks", NeurIPS 2021, equation 4.
"""

import numpy as np

from onnxfuse.arrays import FloatArray

__all__ = ["channel_independence", "independence_work"]

# Steps of the integral over t = log x, and how far from the largest singular value it goes on either side: all that is
# left out, and the error of the trapezoidal rule (exp(-pi^2 / step)), is below 1e-10 of the norm.
_STEP, _BELOW, _ABOVE = 0.3, 28.0, 24.0


def channel_independence(maps: FloatArray) -> FloatArray:
    r"""Return :math:`||M||_* - ||M_{-c}||_*` for every row c of a map, where :math:`M_{-c}` is M with that row zeroed.

    With :math:`M = U \mathrm{diag}(s) V^T`, leaving out row c subtracts a matrix of rank one from :math:`M^T M`. By
    :math:`\mathrm{tr} \sqrt{A} = \frac{1}{\pi} \int_0^\infty \log\det(I + A / x^2)\, dx` and the determinant lemma the
    difference is

    .. math:: -\frac{1}{\pi} \int_0^\infty \log\Big(1 - \sum_k \frac{U_{ck}^2 s_k^2}{x^2 + s_k^2}\Big)\, dx

    one integral for all rows, so that no row needs singular values of its own.

    Args:
        maps: The channels of one sample, shape (C, places), float64.

    Returns:
        Shape (C,), float64, ``>= 0``.

    Example:
        >>> channel_independence(np.array([[1.0, 0.0], [0.0, 2.0]])).round(6).tolist()
        [1.0, 2.0]
    """
    channels, places = maps.shape
    if channels <= places:
        squares, u = np.linalg.eigh(maps @ maps.T)
        squares, beyond = np.maximum(squares, 0.0), np.zeros(channels)
    else:
        u, s, _ = np.linalg.svd(maps, full_matrices=False)
        # What of each unit vector lies outside of the space of the singular vectors.
        squares, beyond = np.square(s), np.maximum(1.0 - np.square(u).sum(axis=1), 0.0)
    if squares.max(initial=0.0) <= 0:
        return np.zeros(channels)
    largest = float(np.sqrt(squares.max()))
    x = largest * np.exp(np.arange(-_BELOW, _ABOVE, _STEP))
    total = np.square(x) + squares[:, None]
    # The sum in the logarithm, and one less that sum, each without a difference, so that neither loses its digits.
    taken = np.square(u) @ (squares[:, None] / total)
    rest = beyond[:, None] + np.square(u) @ (np.square(x) / total)
    logarithms = np.where(
        taken < 0.5, np.log1p(-np.minimum(taken, 0.5)), np.log(np.maximum(rest, np.finfo(float).tiny))
    )
    result: FloatArray = np.maximum(-logarithms @ x * (_STEP / np.pi), 0.0)
    return result


def independence_work(channels: int, places: int) -> int:
    """Return about how many multiplications `channel_independence` takes."""
    rank = min(channels, places)
    return channels * places * rank + 30 * rank**3 + 200 * channels * rank
