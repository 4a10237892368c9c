"""What samples may say of the channels of a group, for tests that have no network."""

from dataclasses import replace

import numpy as np

from onnxfuse.arrays import FloatArray, IntArray
from onnxfuse.statistics.damage import Reading
from onnxfuse.statistics.features import ActivationFeatures

__all__ = ["permuted_activations", "seen"]


def seen(weights: FloatArray) -> ActivationFeatures:
    """Make up statistics that tell channels of different weights apart, and are zero for weights of zeros.

    Args:
        weights: Shape (C, D).
    """
    size = np.abs(weights).mean(axis=1)
    square = np.square(weights).mean(axis=1)
    covariance = weights @ weights.T + np.eye(len(weights))
    reading = Reading(covariance, size[:, None], weights)
    return ActivationFeatures(size, square, size + square, 2 * size + square, (reading,))


def permuted_activations(features: ActivationFeatures, order: IntArray) -> ActivationFeatures:
    """Reorder the channels of statistics that are all there."""
    names = ("magnitude", "square", "sensitivity", "independence")
    readings = tuple(
        Reading(r.covariance[np.ix_(order, order)], r.means[order], r.weights[order]) for r in features.readings
    )
    return replace(features, readings=readings, **{name: getattr(features, name)[order] for name in names})
