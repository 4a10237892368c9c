"""The best output map of all where there is no activation: reduced-rank regression, in closed form."""

from collections.abc import Iterator

import numpy as np

from onnxfuse.arrays import FloatArray
from onnxfuse.fusion.candidates.protocol import Known

__all__ = ["principal"]

# Eigenvalues below this share of the largest are rounding.
_ROUNDING = 1e-10


def principal(known: Known, rng: np.random.Generator, /) -> Iterator[FloatArray]:
    r"""Yield the map onto the K directions that readers hear most of.

    With h' = A h, J is least for the leading eigenvectors U of :math:`R M R`, where R is the root of the covariance and
    M the readers' strength: :math:`A = U^T R M` (reduced-rank regression: Izenman, Journal of Multivariate Analysis,
    1975). Behind an activation it is one proposal among others. Several readers share one map: that of the mean of
    their covariances. Each row is scaled so that its largest entry is 1.

    Args:
        known: What is known about the group's C channels, and which K are selected.
        rng: Not used.
    """
    del rng
    covariance = np.mean([reading.covariance for reading in known.readings], axis=0)
    strength = np.sum([reading.strength for reading in known.readings], axis=0)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    heard, directions = np.linalg.eigh(root @ strength @ root)
    leading = directions[:, ::-1][:, : len(known.selected)]
    output = leading.T @ root @ strength
    largest = np.take_along_axis(output, np.abs(output).argmax(axis=1)[:, None], axis=1)
    if heard[-len(known.selected)] > _ROUNDING * heard[-1]:
        yield output / largest
