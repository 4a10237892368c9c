"""Batch normalisation: the one operator that states what it saw in training."""

from collections.abc import Sequence

import numpy as np

from onnxfuse.analytic.moments import Made, Moments, Rule, Site, Unknown, scaled_rows

__all__ = ["RULES"]


def batch_normalization(site: Site) -> Sequence[Made] | Unknown:
    """BatchNormalization: the stated means and variances replace what has come so far, correlations are kept.

    Where nothing is known of its input, channels count as independent from here on.
    """
    scale, shift, mean, variance = (site.constant(slot) for slot in (1, 2, 3, 4))
    if scale is None or shift is None or mean is None or variance is None or site.attribute("training_mode", 0):
        return site.unknown("its statistics are computed")
    factor = scale / np.sqrt(variance + float(site.attribute("epsilon", 1e-5)))
    deviation = np.sqrt(np.maximum(variance, 0.0))
    x = site.known.get(site.name(0))
    if x is None:
        decay = (0.0,) * len(site.dims_in())
        return [Made(Moments(1, shift, np.diag(np.square(factor * deviation)), decay))]
    if x.axis != 1:
        return site.unknown("channels are not on axis 1")
    told = np.sqrt(x.variance)
    # A channel that never changes has no correlations to keep: it varies by itself then.
    gain = factor * np.divide(deviation, told, out=np.zeros_like(told), where=told > 0)
    covariance = np.outer(gain, gain) * x.covariance
    np.fill_diagonal(covariance, np.square(factor * deviation))
    return [Made(Moments(1, shift, covariance, x.decay), {site.name(0): scaled_rows(gain)})]


RULES = (Rule("BatchNormalization", batch_normalization, restarts=True),)
