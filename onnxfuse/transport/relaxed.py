"""Transport that need not move everything: a balanced plan has to mix even the channels that should stay whole.

Unbalanced transport pays for mass that is left behind or made up; partial transport leaves a share behind for nothing.
"""

import warnings

import numpy as np
from ot.partial import partial_wasserstein
from ot.unbalanced import mm_unbalanced

from onnxfuse.arrays import FloatArray

__all__ = ["partial", "unbalanced"]


def unbalanced(cost: FloatArray, a: FloatArray, b: FloatArray, /, *, reach: float) -> FloatArray:
    """Return a plan that may miss its masses, at a price (Chizat, Peyre, Schmitzer and Vialard, 2018).

    The price is the squared distance of the marginals from the masses (Blondel, Seguy and Rolet, AISTATS 2018), solved
    by majorisation and minimisation (Chapel et al., NeurIPS 2021).

    Args:
        cost: Ground cost, shape (C, K), float64, finite, ``>= 0``.
        a: Masses of the channels, shape (C,), sum 1.
        b: Masses of the targets, shape (K,), sum 1.
        reach: How dear missed mass is, in mean ground costs, above 0.

    Returns:
        Shape (C, K), float64, ``>= 0``; channels that are far from every target keep their mass to themselves.
    """
    mean = float(cost.mean())
    scaled = cost / mean if mean > 0 else cost
    # The penalty is quadratic: in masses of the size of 1 / C, so that the price of a channel is that of `reach`.
    weight = reach * len(a)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = mm_unbalanced(a, b, scaled, weight, div="l2")
    return np.asarray(np.maximum(np.nan_to_num(plan), 0.0), np.float64)


def partial(cost: FloatArray, a: FloatArray, b: FloatArray, /, *, share: float) -> FloatArray:
    """Return the plan that moves a share of the mass at the least cost (Chapel, Alaya and Gasso, NeurIPS 2020).

    Args:
        cost: Ground cost, shape (C, K), float64, finite, ``>= 0``.
        a: Masses of the channels, shape (C,), sum 1.
        b: Masses of the targets, shape (K,), sum 1.
        share: How much of the mass moves, above 0 and at most 1.

    Returns:
        Shape (C, K), float64, ``>= 0``, sum ``share``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(partial_wasserstein(a, b, cost, m=share * min(a.sum(), b.sum())), np.float64)
