"""Methods: the ways to find the map that shrinks a coupling group.

Each member of `METHODS` is a `Method`. To add one, write it in a module of its own and list it here.
"""

from onnxfuse.fusion.methods.fold import fold
from onnxfuse.fusion.methods.intra_fusion import intra_fusion
from onnxfuse.fusion.methods.protocol import Method
from onnxfuse.fusion.methods.prune import prune
from onnxfuse.registry import Registry

__all__ = ["METHODS", "Method"]

METHODS: Registry[Method] = Registry("method")
METHODS.register("intra-fusion")(intra_fusion)
METHODS.register("prune")(prune)
METHODS.register("fold")(fold)
