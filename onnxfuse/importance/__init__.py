"""Importances: which channels of a group are worth keeping, and how much each weighs in the transport.

Each member of `IMPORTANCES` is an `Importance`. To add one, write it in a module of its own and list it here.
"""

from onnxfuse.importance.batch_norm import bn_scale
from onnxfuse.importance.chance import chance
from onnxfuse.importance.geometric_median import geometric_median
from onnxfuse.importance.lamp import lamp
from onnxfuse.importance.magnitude import l1, l2, linf
from onnxfuse.importance.protocol import Importance
from onnxfuse.registry import Registry

__all__ = ["IMPORTANCES", "Importance"]

IMPORTANCES: Registry[Importance] = Registry("importance")
IMPORTANCES.register("l1")(l1)
IMPORTANCES.register("l2")(l2)
IMPORTANCES.register("linf")(linf)
IMPORTANCES.register("lamp")(lamp)
IMPORTANCES.register("random")(chance)
IMPORTANCES.register("bn-scale")(bn_scale)
IMPORTANCES.register("geometric-median")(geometric_median)
