"""Output maps from clusters: a fused channel is the mean of the channels in one."""

from collections.abc import Iterator

import numpy as np

from onnxfuse.arrays import FloatArray, unit_rows
from onnxfuse.fusion.candidates.protocol import Known
from onnxfuse.fusion.candidates.transported import blends, ground_costs
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.transport import cluster_rows

__all__ = ["clusters"]


def clusters(known: Known, rng: np.random.Generator, /) -> Iterator[FloatArray]:
    """Yield means of clusters of the weights (``fold``), and of those around the selected channels, blended with them.

    Around selected channels every other one joins that which it is most like, by what it does or by its weights.

    Args:
        known: What is known about the group's C channels, and which K are selected.
        rng: Source of the starting points of k-means.
    """
    kept = len(known.selected)
    found = cluster_rows(unit_rows(known.features.vectors()), kept, rng)
    yield ChannelMap.clusters(found.labels, kept, found.anchors).output
    for cost in ground_costs(known):
        nearest = cost.argmin(axis=1)
        nearest[known.selected] = np.arange(kept)
        yield from blends(known, np.eye(kept)[nearest])
