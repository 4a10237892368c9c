"""Candidates for the output map of a group whose readers were observed: what proposes them, and the choice by J.

Each member of `CANDIDATES` is a `Candidate`. To add one, write it in a module of its own and list it here.
"""

from onnxfuse.fusion.candidates.clustered import clusters
from onnxfuse.fusion.candidates.descended import descent
from onnxfuse.fusion.candidates.principal import principal
from onnxfuse.fusion.candidates.protocol import Candidate, Known
from onnxfuse.fusion.candidates.transported import (
    balanced_transport,
    entropic_transport,
    partial_transport,
    unbalanced_transport,
)
from onnxfuse.registry import Registry

__all__ = ["CANDIDATES", "DEFAULT_CANDIDATES", "Candidate", "Known"]

CANDIDATES: Registry[Candidate] = Registry("candidate")
CANDIDATES.register("descent")(descent)
CANDIDATES.register("principal")(principal)
CANDIDATES.register("transport")(balanced_transport)
CANDIDATES.register("entropic-transport")(entropic_transport)
CANDIDATES.register("unbalanced-transport")(unbalanced_transport)
CANDIDATES.register("partial-transport")(partial_transport)
CANDIDATES.register("clusters")(clusters)

# What pays where nothing else is said: docs/experiments.md has the figures.
DEFAULT_CANDIDATES = ("descent", "principal")
