"""Batch normalisation, the one operator that states what it saw in training, and those over the channels."""

from collections.abc import Sequence

import numpy as np

from onnxfuse.analytic.moments import Made, Moments, Rule, Site, Unknown, scaled_rows
from onnxfuse.arrays import FloatArray

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


def layer_normalization(site: Site) -> Sequence[Made] | Unknown:
    """LayerNormalization over the channels: their mean goes, and they are divided by their deviation.

    Of many channels the deviation is nearly the same in all samples; it is taken for its root mean square.
    """
    return _over_channels(site, centred=True)


def rms_normalization(site: Site) -> Sequence[Made] | Unknown:
    """RMSNormalization over the channels: they are divided by their root mean square, likewise."""
    return _over_channels(site, centred=False)


def _over_channels(site: Site, *, centred: bool) -> Sequence[Made] | Unknown:
    x, scale, shift = site.x, site.constant(1), site.constant(2)
    rank = len(site.dims_in())
    if x.axis != rank - 1 or int(site.attribute("axis", -1)) % rank != x.axis:
        return site.unknown("its statistics are not over the channels alone")
    if scale is None or (shift is None and site.name(2)) or any(site.node.outputs[1:]):
        return site.unknown("its scale is computed, or its statistics are read")

    def away(moments: FloatArray) -> FloatArray:
        """Take the mean over the channels, which are on the first axis."""
        return moments - moments.mean(axis=0) if centred else moments

    mean, covariance = away(x.mean), away(away(x.covariance).T)
    square = float(np.square(mean).mean() + np.diag(covariance).mean())
    factor = np.broadcast_to(scale.reshape(-1), mean.shape) / np.sqrt(square + float(site.attribute("epsilon", 1e-5)))
    offset = 0.0 if shift is None else shift.reshape(-1)
    moments = Moments(x.axis, factor * mean + offset, np.outer(factor, factor) * covariance, x.decay)
    return [Made(moments, {site.name(0): lambda cross: factor[:, None] * away(cross)})]


RULES = (
    Rule("BatchNormalization", batch_normalization, restarts=True),
    Rule("LayerNormalization", layer_normalization, since=17),
    Rule("RMSNormalization", rms_normalization, since=23),
)
