"""QuantizeLinear and DequantizeLinear: the same axes in another number format.

A scale for the whole tensor says nothing of channels. A scale per channel belongs to a quantised weight, and is
computed anew with it; activations with a scale per channel, and scales per block, are frozen.
"""

from collections.abc import Iterator

from onnxfuse.coupling.constraints import Constraint, Equal, Freeze, Rule, Site, Weight
from onnxfuse.statistics.features import Role

__all__ = ["RULES"]


def quantize(site: Site) -> Iterator[Constraint]:
    """QuantizeLinear, DequantizeLinear: elementwise, with scale and zero point for the whole, per axis or per block."""
    x, y = site.input(0), site.output()
    for axis_x, axis_y in zip(x.axes, y.axes, strict=True):
        yield Equal(axis_x, axis_y)
    for slot in (1, 2):
        parameter = site.optional_input(slot)
        if parameter is None:
            continue
        yield from (Equal(axis, axis) for axis in parameter.axes)
        if all(size == 1 for size in parameter.dims):
            continue
        along = int(site.attribute("axis", 1)) % x.rank
        is_per_axis = parameter.rank == 1 and not site.attribute("block_size", 0)
        if (
            is_per_axis
            and site.node.op == "DequantizeLinear"
            and x.operand.is_constant
            and parameter.operand.is_constant
        ):
            yield Equal(parameter[0], x[along])
            yield Weight(parameter[0], Role.ENCODING)
        else:
            what = "per block, or per channel of an activation"
            yield from (Freeze(axis, f"{site.node.title} has scales {what}") for axis in (*x.axes, *parameter.axes))


RULES = tuple(Rule(op, quantize, since=10) for op in ("QuantizeLinear", "DequantizeLinear"))
