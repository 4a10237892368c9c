"""Pruning: keep the most important channels, drop the rest (paper, algorithm 1: its baseline)."""

import numpy as np

from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.fusion.methods.protocol import check_kept
from onnxfuse.fusion.options import FusionOptions
from onnxfuse.importance import IMPORTANCES
from onnxfuse.statistics.features import ChannelFeatures
from onnxfuse.transport import top_channels

__all__ = ["prune"]


def prune(features: ChannelFeatures, kept: int, options: FusionOptions, rng: np.random.Generator, /) -> ChannelMap:
    """Keep the K most important channels in their order; among equals, those of lower index.

    Args:
        features: What is known about the group's C channels.
        kept: K, from 1 to C.
        options: ``importance`` is used.
        rng: Source of randomness, for random importances.

    Returns:
        A selection; the identity where K = C.

    Raises:
        InvariantError: ``kept`` is not from 1 to C.
        ModelError: A weight is not finite.
    """
    check_kept(kept, features.channels)
    if kept == features.channels:
        return ChannelMap.identity(kept)
    scores = IMPORTANCES[options.importance](features, rng)
    return ChannelMap.selection(top_channels(scores, kept), features.channels)
