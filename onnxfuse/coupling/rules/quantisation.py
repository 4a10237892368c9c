"""Other number formats for the same axes: QuantizeLinear, DequantizeLinear, and weights packed into a few bits.

A scale for the whole tensor says nothing of channels. A scale per channel belongs to a quantised weight, or to one of
floats that is rounded at run time, and is computed anew with it. A scale per block of a weight follows the block: along
that axis whole blocks can go. Activations with a scale per channel or per block are frozen.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from onnxfuse.coupling.constraints import (
    AttributeSize,
    AxisRef,
    Constraint,
    Encoded,
    Equal,
    Expr,
    Freeze,
    Fresh,
    Rounded,
    Rule,
    Site,
    Statistic,
    Tensor,
    Weight,
    cat,
    prod,
)
from onnxfuse.statistics.features import Role

__all__ = ["RULES"]

_DOMAIN = "com.microsoft"
_BITS_OF_A_BYTE = 8


def quantize(site: Site) -> Iterator[Constraint]:
    """QuantizeLinear, DequantizeLinear: elementwise, with scale and zero point for the whole, per axis or per block."""
    x, y, scale = site.input(0), site.output(), site.input(1)
    for axis_x, axis_y in zip(x.axes, y.axes, strict=True):
        yield Equal(axis_x, axis_y)
    parameters = [p for p in (scale, site.optional_input(2)) if p is not None]
    yield from (Equal(axis, axis) for p in parameters for axis in p.axes)
    stored = x if site.node.op == "DequantizeLinear" else y
    zero = None if len(parameters) == 1 else parameters[1].operand
    is_rounded = site.node.op == "QuantizeLinear" and x.is_weight
    if all(size == 1 for p in parameters for size in p.dims):
        yield Encoded(stored.operand, scale.operand, zero)
        if is_rounded:
            yield Rounded(x.operand, y.operand, scale.operand, zero)
    elif not x.is_weight or not all(p.operand.is_constant for p in parameters):
        what = "per block, or per channel of an activation"
        axes = (*x.axes, *(axis for p in parameters for axis in p.axes))
        yield from (Freeze(axis, f"{site.node.title} has scales {what}") for axis in axes)
    elif site.attribute("block_size", 0):
        yield from _blocked(site, x, parameters, int(site.attribute("block_size")))
    else:
        along = int(site.attribute("axis", 1)) % x.rank
        yield from (c for p in parameters for c in (Equal(p[0], x[along]), Weight(p[0], Role.ENCODING)))
        yield Encoded(stored.operand, scale.operand, zero, (along,))
        if is_rounded:
            yield Rounded(x.operand, y.operand, scale.operand, zero, (along,))


def _blocked(site: Site, x: Tensor, parameters: list[Tensor], block: int) -> Iterator[Constraint]:
    """Scales of the weight's own rank, each for a block of consecutive indices of one axis."""
    along = int(site.attribute("axis", 1)) % x.rank
    axis, blocks = _in_blocks(x.dims[along], block, site.node.title)
    yield Equal(x[along], axis)
    for parameter in parameters:
        yield Equal(parameter[along], blocks)
        yield from (Equal(parameter[i], x[i]) for i in range(x.rank) if i != along)
        yield from (Weight(a, Role.ENCODING) for a in parameter.axes)
    zero = None if len(parameters) == 1 else parameters[1].operand
    every = tuple(range(x.rank))
    if site.node.op == "DequantizeLinear":
        yield Encoded(x.operand, parameters[0].operand, zero, every, along, block)
    else:
        y = site.output().operand
        yield Encoded(y, parameters[0].operand, zero, every, along, block)
        yield Rounded(x.operand, y, parameters[0].operand, zero, every, along, block)


def _in_blocks(size: int, block: int, title: str) -> tuple[Expr, Expr]:
    """Return an axis that falls into blocks, and the axis of its blocks.

    A block that is shorter than the others is the last one and stays; a single block is for any number of indices.
    """
    if block >= size:
        return Fresh(size, "indices of one block"), Fresh(1, "one block")
    whole = Fresh(size // block, "blocks")
    inside = Fresh(block, "indices of a block", f"the blocks of {title} that share a scale are kept or go as a whole")
    if size % block == 0:
        return prod(whole, inside), whole
    rest = Fresh(size % block, "indices of the last block", f"the last block of {title} is shorter than the others")
    return cat(prod(whole, inside), rest), cat(whole, Fresh(1, "the last block", f"the last block of {title} stays"))


def dynamic_quantize(site: Site) -> Iterator[Constraint]:
    """DynamicQuantizeLinear: elementwise, with a scale from the extrema of the whole tensor."""
    x, y = site.input(0), site.output()
    for axis_x, axis_y in zip(x.axes, y.axes, strict=True):
        yield Equal(axis_x, axis_y)
        yield Statistic(axis_x, f"{site.node.title} takes its scale from the extrema over it")
    yield Encoded(y.operand, site.output(1).operand, site.output(2).operand)


def matmul_n_bits(site: Site) -> Iterator[Constraint]:
    """MatMulNBits: a weight packed into a few bits, with a scale per block of inputs; whole blocks can go."""
    a, b, scales, y = site.input(0), site.input(1), site.input(2), site.output()
    bits, block = int(site.attribute("bits", 4)), int(site.attribute("block_size"))
    blocks, zero = b.dims[1], site.optional_input(3)
    if site.optional_input(4) is not None:
        what = "an order of groups (g_idx) is not covered"
        raise ValueError(what)
    outputs = Fresh(b.dims[0], "outputs")
    columns = blocks if zero is None else _size(zero) // outputs.size
    whole, count, reason = _shared_blocks(site, blocks, columns, even=blocks * block == a.dims[-1])
    uneven = bool(reason)
    inside = Fresh(block, "indices of a block", f"the blocks of {site.node.title} are kept or go as a whole")
    yield from (Equal(x, z) for x, z in zip(a.axes[:-1], y.axes[:-1], strict=True))
    yield Equal(y[-1], outputs)
    yield Equal(b[0], outputs)
    yield Freeze(b[2], f"the bytes of a block of {site.node.title}")
    yield Weight(b[0], Role.PRODUCER)
    yield Weight(b[1], Role.CONSUMER)
    yield Equal(b[1], whole)
    yield Freeze(a[-1], reason) if uneven else Equal(a[-1], prod(whole, inside))
    yield AttributeSize("K", a[-1])
    yield from _per_block(scales, outputs, whole)
    if zero is not None:
        yield from _per_block(zero, outputs, count)
    bias = site.optional_input(5)
    if bias is not None:
        yield Equal(bias[0], outputs)
        yield Weight(bias[0], Role.BIAS)
    yield AttributeSize("N", outputs)
    yield Encoded(b.operand, scales.operand, None if zero is None else zero.operand, (0, 1), bits=bits)
    if not b.is_weight:
        yield from (Freeze(x, f"the weight of {site.node.title} is computed at run time") for x in (*a.axes, *y.axes))


def _shared_blocks(site: Site, blocks: int, columns: int, *, even: bool = True) -> tuple[Expr, Fresh, str]:
    """Return the axis of blocks whose zero points may share bytes, that of these bytes, and why both stay, if so."""
    together = _BITS_OF_A_BYTE // int(site.attribute("bits", 4)) if columns < blocks else 1
    # Zero points that share a byte can only go together.
    is_whole = even and blocks % together == 0
    reason = "" if is_whole else f"the blocks of {site.node.title} do not come out even"
    count = Fresh(columns, "blocks, or bytes of their zero points", reason)
    shared = Fresh(together, "blocks that share a byte", f"the zero points of {site.node.title} share bytes")
    return prod(count, shared) if is_whole else Fresh(blocks, "blocks", reason), count, reason


def gather_block_quantized(site: Site) -> Iterator[Constraint]:
    """GatherBlockQuantized: an embedding whose table has a few bits and a scale per block; whole blocks can go."""
    data, indices, scales, y = site.input(0), site.input(1), site.input(2), site.output()
    zero, title = site.optional_input(3), site.node.title
    picked, along = (
        int(site.attribute(name, default)) % data.rank for name, default in (("gather_axis", 0), ("quantize_axis", 1))
    )
    if picked == along or not data.operand.is_constant:
        what = "a table that is made at run time, or looked up along its blocks, is not covered"
        raise ValueError(what)
    block, places = (
        int(site.attribute("block_size", 128)),
        [i if i < picked else i + indices.rank - 1 for i in range(data.rank)],
    )
    yield Freeze(data[picked], f"{title} picks indices from it")
    for axis, source in zip(y.axes[picked : picked + indices.rank], indices.axes, strict=True):
        yield Equal(axis, source)
        yield Freeze(axis, f"the indices of {title}")
    parameters = [scales] if zero is None else [scales, zero]
    for i in (i for i in range(data.rank) if i not in {picked, along}):
        yield Equal(data[i], y[places[i]])
    for i in (i for i in range(data.rank) if i != along):
        yield from (Equal(parameter[i], data[i]) for parameter in parameters)
    yield from (Weight(axis, Role.PRODUCER) for i, axis in enumerate(data.axes) if i != picked)
    yield from (Weight(axis, Role.ENCODING) for parameter in parameters for axis in parameter.axes)
    told = Encoded(data.operand, scales.operand, None if zero is None else zero.operand, tuple(range(data.rank)), along)
    size = y.dims[places[along]]
    if size == data.dims[along] and int(site.attribute("bits", 4)) < _BITS_OF_A_BYTE:
        whole, blocks = _in_blocks(size, block, title)
        yield from (Equal(axis, whole) for axis in (data[along], y[places[along]]))
        yield from (Equal(parameter[along], blocks) for parameter in parameters)
        yield replace(told, block=block)
    else:
        yield from _packed_table(site, data[along], y[places[along]], parameters, size, block)
        yield replace(told, block=max(block * data.dims[along] // size, 1), bits=int(site.attribute("bits", 4)))


def _packed_table(
    site: Site, stored: AxisRef, looked_up: AxisRef, parameters: Sequence[Tensor], size: int, block: int
) -> Iterator[Constraint]:
    """The axis of a table along which bytes hold elements, and blocks of those share a scale."""
    title, together = site.node.title, _BITS_OF_A_BYTE // int(site.attribute("bits", 4))
    if size % block or block % together:
        yield from (Freeze(axis, f"the blocks of {title} do not come out even") for axis in (stored, looked_up))
        yield from (Freeze(parameter[-1], f"the blocks of {title}") for parameter in parameters)
        return
    blocks = size // block
    columns = parameters[1].dims[-1] if len(parameters) > 1 else blocks
    whole, count, _ = _shared_blocks(site, blocks, columns)
    kept = f"the blocks of {title} are kept or go as a whole"
    yield Equal(looked_up, prod(whole, Fresh(block, "indices of a block", kept)))
    yield Equal(stored, prod(whole, Fresh(block // together, "bytes of a block", kept)))
    yield Equal(parameters[0][-1], whole)
    if len(parameters) > 1:
        yield Equal(parameters[1][-1], count)


def _size(tensor: Tensor) -> int:
    return math.prod(tensor.dims)


def _per_block(parameter: Tensor, outputs: Expr, blocks: Expr) -> Iterator[Constraint]:
    """One number for each output and block, as a matrix or flattened."""
    if parameter.rank == 1:
        yield Equal(parameter[0], prod(outputs, blocks))
    else:
        yield Equal(parameter[0], outputs)
        yield Equal(parameter[1], blocks)
    yield from (Weight(axis, Role.ENCODING) for axis in parameter.axes)


RULES = (
    *(Rule(op, quantize, since=10) for op in ("QuantizeLinear", "DequantizeLinear")),
    Rule("DynamicQuantizeLinear", dynamic_quantize, since=11),
    *(Rule(op, quantize, domain=_DOMAIN) for op in ("QuantizeLinear", "DequantizeLinear")),
    Rule("MatMulNBits", matmul_n_bits, domain=_DOMAIN),
    Rule("GatherBlockQuantized", gather_block_quantized, domain=_DOMAIN),
)
