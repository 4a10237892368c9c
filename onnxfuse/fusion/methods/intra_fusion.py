"""Intra-Fusion: transport all channels to the few that stay (paper, algorithm 2, as its code does it)."""

import numpy as np

from onnxfuse.arrays import FloatArray, Floats
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.fusion.methods.protocol import check_kept
from onnxfuse.fusion.options import FusionOptions
from onnxfuse.importance import IMPORTANCES
from onnxfuse.matrices import Matrix
from onnxfuse.statistics.features import ChannelFeatures
from onnxfuse.transport import MASSES, SOLVERS, TARGETS, ground_cost, is_too_large, nearest_plan
from onnxfuse.transport.nearest import SHARP

__all__ = ["intra_fusion"]


def intra_fusion(
    features: ChannelFeatures, kept: int, options: FusionOptions, rng: np.random.Generator, /
) -> ChannelMap:
    """Fuse channels by an optimal transport plan.

    Importance gives the targets; a ground cost between feature vectors and masses on both sides give the plan;
    the plan gives the map. Copies that the plan sends to the same target merge to their *sum* on both sides with
    ``output_norm="sum"`` (as released: it doubles what two copies say), and without error with ``"mean"``. But
    copies need not meet: those of an important channel are all among the targets themselves. Where there are too many
    channels for the whole problem, each is transported to near targets only (`onnxfuse.transport.nearest`).

    Args:
        features: What is known about the group's C channels.
        kept: K, from 1 to C.
        options: All of them are used.
        rng: Source of randomness, for random importances and centroids.

    Returns:
        The map from C to K channels; the identity where K = C.

    Raises:
        InvariantError: ``kept`` is not from 1 to C.
        ModelError: A weight is not finite.
        SolverError: The transport could not be solved.
    """
    check_kept(kept, features.channels)
    if kept == features.channels:
        return ChannelMap.identity(kept)
    scores = IMPORTANCES[options.importance](features, rng)
    vectors = features.vectors(with_bias=options.bias_in_cost)
    targets = TARGETS[options.transport_target](vectors, scores, kept, rng)
    a = MASSES[options.source_mass](scores)
    b = MASSES[options.target_mass](targets.scores)
    plan = _plan(vectors, targets.vectors, a, b, options)
    return ChannelMap.from_plan(plan, targets.anchors, output_norm=options.output_norm)


def _plan(vectors: Floats, targets: Floats, a: FloatArray, b: FloatArray, options: FusionOptions) -> Matrix:
    """Return the plan between channels and targets of given masses: a sparse one where there are too many."""
    if is_too_large(len(vectors), len(targets), vectors.shape[1]):
        return nearest_plan(
            vectors,
            targets,
            a,
            b,
            p=options.p,
            normalised=options.normalised,
            regularisation=SHARP if options.solver == "exact" else options.regularisation,
        )
    cost = ground_cost(vectors, targets, p=options.p, normalised=options.normalised)
    return SOLVERS[options.solver](cost, a, b, regularisation=options.regularisation).plan
