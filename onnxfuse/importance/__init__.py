"""Importances: which channels of a group are worth keeping, and how much each weighs in the transport.

Each member of `IMPORTANCES` is an `Importance`. To add one, write it in a module of its own and list it here; one that
looks at activations goes into `FROM_SAMPLES` too.
"""

from onnxfuse.importance.activation import activation_l1, activation_l2, chip, damage, taylor
from onnxfuse.importance.batch_norm import bn_scale
from onnxfuse.importance.chance import chance
from onnxfuse.importance.geometric_median import geometric_median
from onnxfuse.importance.lamp import lamp
from onnxfuse.importance.magnitude import l1, l2, linf
from onnxfuse.importance.protocol import Importance
from onnxfuse.registry import Registry

__all__ = ["FROM_SAMPLES", "IMPORTANCES", "Importance"]

IMPORTANCES: Registry[Importance] = Registry("importance")
IMPORTANCES.register("l1")(l1)
IMPORTANCES.register("l2")(l2)
IMPORTANCES.register("linf")(linf)
IMPORTANCES.register("lamp")(lamp)
IMPORTANCES.register("random")(chance)
IMPORTANCES.register("bn-scale")(bn_scale)
IMPORTANCES.register("geometric-median")(geometric_median)
IMPORTANCES.register("activation-l1")(activation_l1)
IMPORTANCES.register("activation-l2")(activation_l2)
IMPORTANCES.register("taylor")(taylor)
IMPORTANCES.register("chip")(chip)
IMPORTANCES.register("damage")(damage)

FROM_SAMPLES = frozenset({"activation-l1", "activation-l2", "taylor", "chip", "damage"})
"""Those that look at `ChannelFeatures.activations`, so that a run has to observe these first."""
