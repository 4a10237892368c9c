"""Layers that compute on integers, ONNX's and ONNX Runtime's: they couple channels as the layers on floats do.

What they add is how integers stand for numbers: every tensor has a scale and a zero point in slots of its own, weights
may have one per output, and the scale of an integer bias is that of the product.
"""

from collections.abc import Callable, Iterator

from onnxfuse.coupling.constraints import (
    AxisRef,
    Constraint,
    Encoded,
    EncodedBias,
    Equal,
    Freeze,
    Rule,
    Site,
    Statistic,
    Tensor,
    Weight,
)
from onnxfuse.coupling.rules.attention import packed_attention, packed_heads
from onnxfuse.coupling.rules.convolution import channels_first, convolution
from onnxfuse.coupling.rules.elementwise import broadcast, summed, unary
from onnxfuse.coupling.rules.linear import full_product, product
from onnxfuse.coupling.rules.pooling import pooled
from onnxfuse.coupling.rules.recurrent import recurrent_layer
from onnxfuse.coupling.rules.shape import concatenated
from onnxfuse.statistics.features import Role

__all__ = ["RULES"]

_DOMAIN = "com.microsoft"


def qlinear_conv(site: Site) -> Iterator[Constraint]:
    """QLinearConv: Conv on integers, with a scale for the whole weight or for every filter."""
    x, w, bias, y = site.input(0), site.input(3), site.optional_input(8), site.output()
    yield from convolution(site, channels_first(site, x), w, bias, channels_first(site, y))
    yield from _encoded(site, x, 1, 2)
    yield from _encoded(site, w, 4, 5, w[0])
    yield from _encoded(site, y, 6, 7)
    if bias is not None:
        yield EncodedBias(bias.operand, site.input(1).operand, w.operand)


def conv_integer(site: Site) -> Iterator[Constraint]:
    """ConvInteger: Conv on integers; channels are only dropped where the scale that nodes behind apply is not found."""
    x, w = site.input(0), site.input(1)
    yield from convolution(site, x.axes, w, None, site.output().axes)
    yield from _encoded(site, x, -1, 2)
    yield from _encoded(site, w, -1, 3, w[0])


def qlinear_matmul(site: Site) -> Iterator[Constraint]:
    """QLinearMatMul: MatMul on integers, with a scale for the whole weight, or for every column (on the left, row)."""
    a, b = site.input(0), site.input(3)
    yield from product(site, a, b)
    yield from _encoded_factors(site, a, b, (1, 2), (4, 5))
    yield from _encoded(site, site.output(), 6, 7)


def matmul_integer(site: Site) -> Iterator[Constraint]:
    """MatMulInteger: MatMul on integers; channels are only dropped where the scale applied behind is not found."""
    a, b = site.input(0), site.input(1)
    yield from product(site, a, b)
    yield from _encoded_factors(site, a, b, (-1, 2), (-1, 3))


def matmul_integer_to_float(site: Site) -> Iterator[Constraint]:
    """MatMulIntegerToFloat: MatMul on integers with a result and a bias of floats."""
    a, b = site.input(0), site.input(1)
    yield from product(site, a, b)
    yield from _encoded_factors(site, a, b, (2, 4), (3, 5))
    yield from _float_bias(site, site.optional_input(6))


def dynamic_quantize_matmul(site: Site) -> Iterator[Constraint]:
    """DynamicQuantizeMatMul: MatMul with a quantised weight and an input that it quantises by its extrema."""
    a, b = site.input(0), site.input(1)
    yield from product(site, a, b)
    yield from _encoded(site, b, 2, 3, b[-1])
    yield from _float_bias(site, site.optional_input(4))
    yield from (Statistic(axis, f"{site.node.title} takes its scale from the extrema over it") for axis in a.axes)


def qgemm(site: Site) -> Iterator[Constraint]:
    """QGemm: Gemm on integers, with a scale for the whole weight or for every column."""
    a, b, c = site.input(0), site.input(3), site.optional_input(6)
    yield from full_product(site, a, b, c)
    yield from _encoded(site, a, 1, 2)
    yield from _encoded(site, b, 4, 5, b[0 if site.attribute("transB", 0) else 1])
    if site.optional_input(7) is not None:
        yield from _encoded(site, site.output(), 7, 8)
    if c is not None:
        yield EncodedBias(c.operand, site.input(1).operand, b.operand, float(site.attribute("alpha", 1.0)))


def qlinear_sum(site: Site) -> Iterator[Constraint]:
    """QLinearAdd: a sum of integers; a constant moves like a bias, two computed operands form a residual stream."""
    yield from summed(site, [site.input(0), site.input(3)])
    yield from _encoded_operands(site, (0, 3), 6)


def qlinear_broadcasting(site: Site) -> Iterator[Constraint]:
    """QLinearMul: two operands on integers, broadcast against each other."""
    yield from broadcast(site, [site.input(0), site.input(3)], Role.CARRIED)
    yield from _encoded_operands(site, (0, 3), 6)


def qlinear_where(site: Site) -> Iterator[Constraint]:
    """QLinearWhere: one of two operands, by a condition; all are broadcast against each other."""
    yield from broadcast(site, [site.input(0), site.input(1), site.input(4)], Role.CARRIED)
    yield from _encoded_operands(site, (1, 4), 7)


def qlinear_unary(site: Site) -> Iterator[Constraint]:
    """QLinearSigmoid, QLinearLeakyRelu: one tensor in, the same axes out."""
    yield from unary(site)
    yield from _encoded_operands(site, (0,), 3)


def qlinear_softmax(site: Site) -> Iterator[Constraint]:
    """QLinearSoftmax: frozen along the axis that it normalises, or from it on, as ``opset`` says."""
    x = site.input(0)
    yield from qlinear_unary(site)
    first = int(site.attribute("axis", -1)) % x.rank
    for axis in x.axes[first:] if int(site.attribute("opset")) < 13 else (x[first],):
        yield Freeze(axis, f"{site.node.title} normalises over it")


def qlinear_pool(site: Site) -> Iterator[Constraint]:
    """QLinearAveragePool, QLinearGlobalAveragePool: pools over the spatial axes, with channels first or last."""
    yield from pooled(site, channels_first(site, site.input(0)), channels_first(site, site.output()))
    yield from _encoded_operands(site, (0,), 3)


def qlinear_concat(site: Site) -> Iterator[Constraint]:
    """QLinearConcat: one after the other along ``axis``, each with a scale of its own."""
    slots = range(2, len(site.inputs), 3)
    yield from concatenated(site, [site.input(slot) for slot in slots])
    for slot in slots:
        yield from _encoded(site, site.input(slot), slot + 1, slot + 2)
    yield from _encoded(site, site.output(), 0, 1)


def qattention(site: Site) -> Iterator[Constraint]:
    """QAttention: Attention with a quantised input and weight; a cache of past keys and values keeps its heads."""
    w, past, present = site.input(1), site.optional_input(8), site.outputs[1] if len(site.outputs) > 1 else None
    yield from packed_attention(site, packed_heads(site))
    yield from _encoded(site, site.input(0), 3, 6)
    yield from _encoded(site, w, 4, 7, w[1])
    mask = site.optional_input(5)
    yield from (Freeze(axis, f"the mask of {site.node.title}") for axis in (() if mask is None else mask.axes))
    for cache in (past, present):
        if cache is not None:
            yield from (Freeze(axis, f"a cache of {site.node.title}") for axis in cache.axes)
            # It holds heads x head size of every token, so they are what they are.
            yield Freeze(site.output()[2], f"a cache of {site.node.title} holds its heads")


def dynamic_quantize_lstm(site: Site) -> Iterator[Constraint]:
    """DynamicQuantizeLSTM: LSTM with quantised weights, which are stored inputs first, and inputs that it quantises."""
    w, r = site.input(1), site.input(2)
    yield from recurrent_layer(site, (w[0], w[2], w[1]), (r[0], r[2], r[1]), r.dims[1], gates=4)
    for weight, scale_slot in ((w, 8), (r, 10)):
        parameters = (site.input(scale_slot), site.input(scale_slot + 1))
        per_output = parameters[0].rank > 1
        for parameter in parameters:
            # One for each direction, or for each direction and row of the gates.
            for axis, target in zip(parameter.axes, (weight[0], weight[2]), strict=False):
                yield Equal(axis, target)
                yield Weight(axis, Role.ENCODING)
        scale, zero = (parameter.operand for parameter in parameters)
        yield Encoded(weight.operand, scale, zero, (0, 2) if per_output else (0,))
    for axis in (w[1], r[1]):
        yield Statistic(axis, f"{site.node.title} takes a scale from the extrema over it")


# How integers stand for numbers ---------------------------------------------------------------------------------------


def _encoded(
    site: Site, tensor: Tensor, scale_slot: int, zero_slot: int, outputs: AxisRef | None = None
) -> Iterator[Constraint]:
    """Say how a tensor is encoded; a weight may have a scale for each index of an axis.

    Args:
        site: The node.
        tensor: What is encoded.
        scale_slot: The input that holds its scale; -1 if there is none.
        zero_slot: The input that holds its zero point.
        outputs: The axis that a vector of scales runs along; None where there may be none.
    """
    scale = site.input(scale_slot) if scale_slot >= 0 else None
    zero = site.optional_input(zero_slot)
    parameters = [p for p in (scale, zero) if p is not None]
    yield from (Equal(axis, axis) for p in parameters for axis in p.axes)
    axes: tuple[int, ...] = ()
    for parameter in parameters:
        if max(parameter.dims, default=1) == 1:
            continue
        if outputs is None or parameter.rank != 1 or not tensor.is_weight:
            what = f"{site.node.title} has a scale or zero point for each index of an activation"
            yield from (Freeze(axis, what) for axis in (*tensor.axes, *parameter.axes))
            continue
        axes = (outputs.axis,)
        yield Equal(parameter[0], outputs)
        yield Weight(parameter[0], Role.ENCODING)
    scale_operand, zero_operand = (None if parameter is None else parameter.operand for parameter in (scale, zero))
    yield Encoded(tensor.operand, scale_operand, zero_operand, axes)


def _encoded_factors(
    site: Site, a: Tensor, b: Tensor, slots_a: tuple[int, int], slots_b: tuple[int, int]
) -> Iterator[Constraint]:
    """Say how the factors of a product are encoded: on the left by rows, on the right by columns."""
    yield from _encoded(site, a, *slots_a, a[-2] if a.rank == 2 else None)
    yield from _encoded(site, b, *slots_b, b[-1] if b.rank == 2 else None)


def _encoded_operands(site: Site, slots: tuple[int, ...], output: int) -> Iterator[Constraint]:
    """Say how operands are encoded, each followed by its scale and zero point, and the output."""
    for slot in slots:
        yield from _encoded(site, site.input(slot), slot + 1, slot + 2)
    yield from _encoded(site, site.output(), output, output + 1)


def _float_bias(site: Site, bias: Tensor | None) -> Iterator[Constraint]:
    if bias is not None:
        yield Equal(bias[0], site.output()[-1])
        yield Weight(bias[0], Role.BIAS)


def _contrib(op: str, infer: Callable[[Site], Iterator[Constraint]]) -> Rule:
    return Rule(op, infer, domain=_DOMAIN)


RULES = (
    Rule("QLinearConv", qlinear_conv, since=10),
    Rule("ConvInteger", conv_integer, since=10),
    Rule("QLinearMatMul", qlinear_matmul, since=10),
    Rule("MatMulInteger", matmul_integer, since=10),
    _contrib("QLinearConv", qlinear_conv),
    _contrib("QGemm", qgemm),
    _contrib("DynamicQuantizeMatMul", dynamic_quantize_matmul),
    _contrib("MatMulIntegerToFloat", matmul_integer_to_float),
    _contrib("QLinearAdd", qlinear_sum),
    _contrib("QLinearMul", qlinear_broadcasting),
    _contrib("QLinearWhere", qlinear_where),
    *(_contrib(op, qlinear_unary) for op in ("QLinearSigmoid", "QLinearLeakyRelu")),
    _contrib("QLinearSoftmax", qlinear_softmax),
    *(_contrib(op, qlinear_pool) for op in ("QLinearAveragePool", "QLinearGlobalAveragePool")),
    _contrib("QLinearConcat", qlinear_concat),
    _contrib("QAttention", qattention),
    _contrib("DynamicQuantizeLSTM", dynamic_quantize_lstm),
)
