"""Normalisation with statistics per channel: scale and shift follow the channels they belong to.

Layer normalisation computes its statistics over the channels themselves, so dropping or merging channels changes them:
its normalised axes are frozen.
"""

from collections.abc import Iterator

from onnxfuse.coupling.constraints import Constraint, Equal, Freeze, Normalises, Rule, Site, Weight
from onnxfuse.statistics.features import Role

__all__ = ["RULES"]


def batch_normalization(site: Site) -> Iterator[Constraint]:
    """BatchNormalization in inference form; its training form and per-element form (``spatial`` = 0) are frozen."""
    x, y = site.input(0), site.output()
    for axis_x, axis_y in zip(x.axes, y.axes, strict=True):
        yield Equal(axis_x, axis_y)
    training = bool(site.attribute("training_mode", 0)) or any(o is not None for o in site.outputs[1:])
    parameters = [site.input(slot) for slot in range(1, 5)]
    if training or site.attribute("spatial", 1) == 0 or not all(p.operand.is_constant for p in parameters):
        for axis in (*x.axes, *(axis for p in parameters for axis in p.axes)):
            yield Freeze(axis, f"{site.node.title} is not in inference form with constant parameters")
        return
    for parameter in parameters:
        yield Equal(parameter[0], x[1])
        yield Weight(parameter[0], Role.CARRIED)
    yield Normalises(x[1])


def instance_normalization(site: Site) -> Iterator[Constraint]:
    """InstanceNormalization: statistics per sample and channel, so channels stay independent."""
    x, y = site.input(0), site.output()
    for axis_x, axis_y in zip(x.axes, y.axes, strict=True):
        yield Equal(axis_x, axis_y)
    for slot in (1, 2):
        yield Equal(site.input(slot)[0], x[1])
        yield Weight(site.input(slot)[0], Role.CARRIED)


def layer_normalization(site: Site) -> Iterator[Constraint]:
    """LayerNormalization: the axes from ``axis`` on are frozen, those before are free."""
    x, y = site.input(0), site.output()
    first = int(site.attribute("axis", -1)) % x.rank
    for axis_x, axis_y in zip(x.axes, y.axes, strict=True):
        yield Equal(axis_x, axis_y)
    for axis in x.axes[first:]:
        yield Freeze(axis, f"the statistics of {site.node.title} run over it")
    for parameter in (site.input(1), site.optional_input(2)):
        if parameter is not None:
            yield from (Freeze(axis, f"a parameter of {site.node.title}") for axis in parameter.axes)
    for statistic in site.outputs[1:]:
        if statistic is not None:
            yield from (Equal(statistic[i], x[i]) for i in range(first))
            yield from (Freeze(axis, f"a statistic of {site.node.title}") for axis in statistic.axes[first:])


def lrn(site: Site) -> Iterator[Constraint]:
    """LRN and LpNormalization mix neighbouring or all channels: frozen."""
    x, y = site.input(0), site.output()
    for axis_x, axis_y in zip(x.axes, y.axes, strict=True):
        yield Equal(axis_x, axis_y)
    mixed = 1 if site.node.op in {"LRN", "MeanVarianceNormalization"} else int(site.attribute("axis", -1))
    yield Freeze(x[mixed], f"{site.node.title} mixes the channels")


def softmax(site: Site) -> Iterator[Constraint]:
    """Softmax, LogSoftmax, Hardmax: frozen along the axis that they normalise.

    Before version 13 they normalise over all axes from ``axis`` on, flattened.
    """
    x, y = site.input(0), site.output()
    for axis_x, axis_y in zip(x.axes, y.axes, strict=True):
        yield Equal(axis_x, axis_y)
    flattened = site.node.version < 13
    first = int(site.attribute("axis", 1 if flattened else -1)) % x.rank
    for axis in x.axes[first:] if flattened else (x[first],):
        yield Freeze(axis, f"{site.node.title} normalises over it")


RULES = (
    Rule("BatchNormalization", batch_normalization),
    Rule("InstanceNormalization", instance_normalization),
    Rule("LayerNormalization", layer_normalization, since=17),
    *(Rule(op, lrn) for op in ("LRN", "LpNormalization")),
    *(Rule(op, softmax) for op in ("Softmax", "LogSoftmax", "Hardmax")),
)
