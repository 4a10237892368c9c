"""Folding: replace each cluster of like channels by one.

Wang et al., "Forget the data and fine-tuning! Just fold the network to compress", ICLR 2025.
"""

import numpy as np

from onnxfuse.arrays import unit_rows
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.fusion.methods.protocol import check_kept
from onnxfuse.fusion.options import FusionOptions
from onnxfuse.statistics.features import ChannelFeatures
from onnxfuse.transport import cluster_rows

__all__ = ["fold"]


def fold(features: ChannelFeatures, kept: int, options: FusionOptions, rng: np.random.Generator, /) -> ChannelMap:
    """Make K k-means clusters of the channels' feature vectors; the mean of each goes out, the sum comes in.

    Exact copies always share a cluster unless there are fewer kinds of channels than clusters, and merge
    without error.

    Args:
        features: What is known about the group's C channels.
        kept: K, from 1 to C.
        options: ``normalised`` and ``bias_in_cost`` are used.
        rng: Source of the starting points.

    Returns:
        Means out, sums in, the nearest member as anchor; the identity where K = C.

    Raises:
        InvariantError: ``kept`` is not from 1 to C.
    """
    check_kept(kept, features.channels)
    if kept == features.channels:
        return ChannelMap.identity(kept)
    vectors = features.vectors(with_bias=options.bias_in_cost)
    clusters = cluster_rows(unit_rows(vectors) if options.normalised else vectors, kept, rng)
    return ChannelMap.clusters(clusters.labels, kept, clusters.anchors)
