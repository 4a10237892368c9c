"""Optimal transport between channels: targets, masses, ground cost and solvers.

`TARGETS`, `MASSES` and `SOLVERS` hold the members of the `Target`, `Mass` and `Solver` protocols. To add one,
write it in a module and list it here.
"""

from onnxfuse.registry import Registry
from onnxfuse.transport.clusters import Clusters, cluster_rows
from onnxfuse.transport.cost import ground_cost
from onnxfuse.transport.masses import Mass, importance, softmax, uniform
from onnxfuse.transport.nearest import is_too_large, nearest_plan
from onnxfuse.transport.solvers import Solver, TransportResult, entropic, exact, partial, unbalanced
from onnxfuse.transport.targets import Target, Targets, gaussian_mixture, kmeans, most_important, top_channels

__all__ = [
    "MASSES",
    "SOLVERS",
    "TARGETS",
    "Clusters",
    "Mass",
    "Solver",
    "Target",
    "Targets",
    "TransportResult",
    "cluster_rows",
    "ground_cost",
    "is_too_large",
    "nearest_plan",
    "partial",
    "top_channels",
    "unbalanced",
]

TARGETS: Registry[Target] = Registry("target")
TARGETS.register("most-important")(most_important)
TARGETS.register("kmeans")(kmeans)
TARGETS.register("gaussian-mixture")(gaussian_mixture)

MASSES: Registry[Mass] = Registry("mass")
MASSES.register("uniform")(uniform)
MASSES.register("importance")(importance)
MASSES.register("softmax")(softmax)

SOLVERS: Registry[Solver] = Registry("solver")
SOLVERS.register("exact")(exact)
SOLVERS.register("entropic")(entropic)
