"""Small networks around every operator that computes on integers, or stores a weight as such."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper

from tests.builders import AnyArray, Net
from tests.examples import OWN, WIDTH, Example, Middle, between

__all__ = ["QUANTISED", "packed"]

X_SCALE = 0.03
Y_SCALE = 0.05
Z_SCALE = 0.07


def number(net: Net, value: float, dtype: Any = np.float32) -> str:
    """Add a scale or a zero point for a whole tensor."""
    return net.constant(np.array(value, dtype))


def typed(net: Net, dims: Sequence[int], kind: int = TensorProto.UINT8) -> str:
    """Name a type that shape inference of one node alone can't tell."""
    name = f"type{len(net.types)}"
    net.types[name] = helper.make_tensor_type_proto(kind, dims)
    return name


def quantised(net: Net, h: str, scale: float = X_SCALE, zero: int = 120) -> tuple[str, str, str]:
    """Quantise a value; return it with its scale and zero point."""
    parameters = (number(net, scale), number(net, zero, np.uint8))
    return net.node("QuantizeLinear", h, *parameters), *parameters


def floats(net: Net, y: str, scale: str, zero: str) -> str:
    """Return what a quantised value stands for."""
    return net.node("DequantizeLinear", y, scale, zero)


def result(net: Net, scale: float = Y_SCALE) -> tuple[str, str]:
    """Add scale and zero point of a result."""
    return number(net, scale), number(net, 100, np.uint8)


def stored(net: Net, *dims: int, dtype: Any = np.int8, zero: int = 0, name: str = "") -> str:
    """Add a weight of integers."""
    return net.constant((net.rng.integers(-60, 60, dims) + zero).astype(dtype), name=name)


def scales(net: Net, count: int | None) -> tuple[str, str]:
    """Add the scale and the zero point of a weight, for the whole or for every output."""
    if count is None:
        return number(net, 0.01), number(net, 0, np.int8)
    return net.vector(count, low=0.005, high=0.02), net.constant(np.zeros(count, np.int8))


def bias(net: Net, count: int) -> str:
    """Add a bias of integers."""
    return net.constant(net.rng.integers(-900, 900, count).astype(np.int32))


def own(net: Net, op: str, *inputs: str, like: str, name: str = "", **attributes: Any) -> str:
    """Add an operator of ONNX Runtime's own."""
    net.domains[OWN] = 1
    return net.node(op, *inputs, domain=OWN, like=like, name=name, **attributes)


def example(
    op: str, label: str, middle: Middle, free: tuple[str, ...] = ("before",), domain: str = "", **more: Any
) -> Example:
    """Put something between two layers on floats."""
    return replace(between(op, label, middle, **more), free=() if more.get("frozen") else free, domain=domain)


# Products -------------------------------------------------------------------------------------------------------------


def _convolutions() -> list[Example]:
    def qlinear(*, per_channel: bool, group: int = 1, shifted: bool = True, filters: int = 4) -> Middle:
        def middle(net: Net, h: str) -> str:
            w = stored(net, filters, WIDTH // group, 3, 3)
            y = result(net)
            inputs = [*quantised(net, h), w, *scales(net, filters if per_channel else None), *y]
            inputs += [bias(net, filters)] if shifted else []
            made = net.node("QLinearConv", *inputs, name="inner", pads=[1, 1, 1, 1], group=group)
            return floats(net, made, *y)

        return middle

    def unsigned(net: Net, h: str) -> str:
        y = result(net)
        w = (stored(net, 4, WIDTH, 1, 1, dtype=np.uint8, zero=128), number(net, 0.01), number(net, 128, np.uint8))
        return floats(net, net.node("QLinearConv", *quantised(net, h), *w, *y, name="inner"), *y)

    def channels_last(net: Net, h: str) -> str:
        y = result(net)
        x, *parameters = quantised(net, h)
        x = net.node("Transpose", x, perm=[0, 2, 3, 1])
        w = (stored(net, 4, WIDTH, 1, 1), *scales(net, 4))
        like = typed(net, (1, 4, 4, 4))
        made = own(net, "QLinearConv", x, *parameters, *w, *y, like=like, name="inner", channels_last=1)
        return floats(net, net.node("Transpose", made, perm=[0, 3, 1, 2]), *y)

    def integer(net: Net, h: str) -> str:
        x, _, zero = quantised(net, h)
        w = stored(net, 4, WIDTH, 3, 3, dtype=np.uint8, zero=128)
        return net.node("ConvInteger", x, w, zero, number(net, 128, np.uint8), name="inner", pads=[1, 1, 1, 1])

    def scaled(net: Net, h: str) -> str:
        x, scale, zero = net.many("DynamicQuantizeLinear", [h], 3)
        made = net.node("ConvInteger", x, stored(net, 4, WIDTH, 1, 1), zero, number(net, 0, np.int8), name="inner")
        factor = net.node("Mul", scale, net.constant(np.array([0.01])))
        return net.node("Mul", net.node("Cast", made, to=net.dtype), factor)

    def computed_scale(net: Net, h: str) -> str:
        y = result(net)
        scale = net.node("ReduceMax", net.node("Abs", "x0"), keepdims=0)
        inputs = (*quantised(net, h), stored(net, 4, WIDTH, 1, 1), scale, number(net, 0, np.int8), *y)
        return floats(net, net.node("QLinearConv", *inputs, name="inner"), *y)

    both = ("before", "inner")
    return [
        example("QLinearConv", "tensor", qlinear(per_channel=False), both, exact=False),
        example("QLinearConv", "channels", qlinear(per_channel=True), both, exact=False),
        example("QLinearConv", "no bias", qlinear(per_channel=True, shifted=False), both, exact=False),
        example("QLinearConv", "groups", qlinear(per_channel=True, group=2), both, exact=False),
        example("QLinearConv", "depthwise", qlinear(per_channel=True, group=WIDTH, filters=WIDTH), exact=False),
        example("QLinearConv", "unsigned", unsigned, both, exact=False),
        example("QLinearConv", "channels last", channels_last, both, OWN, exact=False),
        example("QLinearConv", "computed scale", computed_scale, frozen="computed at run time"),
        example("ConvInteger", "unsigned", integer, both),
        example("ConvInteger", "scaled", scaled, both, exact=False),
    ]


def operand(net: Net, *, per_channel: bool) -> tuple[str, str, str]:
    """Add the right factor of a product, with its scale and zero point."""
    return stored(net, WIDTH, 4), *scales(net, 4 if per_channel else None)


def _rows(op: str, label: str, middle: Middle, domain: str = "", **more: Any) -> Example:
    """Put a product between two layers on floats."""
    free = more.pop("free", ("before", "inner"))
    return example(op, label, middle, free, domain, dims=(3,), batch=2, exact=False, **more)


def _products() -> list[Example]:
    def qlinear(*, per_channel: bool) -> Middle:
        def middle(net: Net, h: str) -> str:
            y = result(net)
            made = net.node(
                "QLinearMatMul", *quantised(net, h), *operand(net, per_channel=per_channel), *y, name="inner"
            )
            return floats(net, made, *y)

        return middle

    def left(net: Net) -> None:
        x = net.node("Transpose", net.gemm(net.input(3, 5), WIDTH, name="before"), perm=[1, 0])
        y = result(net)
        w = (stored(net, 4, WIDTH, dtype=np.uint8, zero=99), number(net, 0.01), number(net, 99, np.uint8))
        h = floats(net, net.node("QLinearMatMul", *w, *quantised(net, x), *y, name="inner"), *y)
        net.output(net.node("MatMul", net.weight(2, 4), h, name="after"))

    def computed(net: Net, h: str) -> str:
        y = result(net)
        other = net.gemm("x0", WIDTH, name="other")
        g = quantised(net, net.node("Transpose", other, perm=[1, 0]))
        return floats(net, net.node("QLinearMatMul", *quantised(net, h), *g, *y), *y)

    def integer(net: Net, h: str) -> str:
        x, _, zero = quantised(net, h)
        w, _, w_zero = operand(net, per_channel=True)
        return net.node("MatMulInteger", x, w, zero, w_zero, name="inner")

    def scaled(*, per_channel: bool) -> Middle:
        def middle(net: Net, h: str) -> str:
            x, scale, zero = net.many("DynamicQuantizeLinear", [h], 3)
            w, w_scale, w_zero = operand(net, per_channel=per_channel)
            made = net.node("Cast", net.node("MatMulInteger", x, w, zero, w_zero, name="inner"), to=net.dtype)
            return net.node("Mul", net.node("Mul", w_scale, scale), made)

        return middle

    return [
        _rows("QLinearMatMul", "tensor", qlinear(per_channel=False)),
        _rows("QLinearMatMul", "channels", qlinear(per_channel=True)),
        Example("QLinearMatMul", "left", left, ("before", "inner"), exact=False),
        _rows("QLinearMatMul", "computed", computed, free=("before",)),
        _rows("MatMulInteger", "channels", integer),
        _rows("MatMulInteger", "scaled", scaled(per_channel=False)),
        _rows("MatMulInteger", "scaled channels", scaled(per_channel=True)),
    ]


def _own_products() -> list[Example]:
    def to_float(*, shifted: bool) -> Middle:
        def middle(net: Net, h: str) -> str:
            x, scale, zero = quantised(net, h)
            w, w_scale, w_zero = operand(net, per_channel=True)
            inputs = (x, w, scale, w_scale, zero, w_zero, *([net.vector(4)] if shifted else []))
            like = typed(net, (2, 4), TensorProto.FLOAT)
            return own(net, "MatMulIntegerToFloat", *inputs, like=like, name="inner")

        return middle

    def dynamic(*, per_channel: bool) -> Middle:
        def middle(net: Net, h: str) -> str:
            inputs = (h, *operand(net, per_channel=per_channel), net.vector(4))
            like = typed(net, (2, 4), TensorProto.FLOAT)
            return own(net, "DynamicQuantizeMatMul", *inputs, like=like, name="inner")

        return middle

    def gemm(transposed: int, alpha: float, *, per_channel: bool, shifted: bool = True) -> Middle:
        def middle(net: Net, h: str) -> str:
            w = stored(net, 4, WIDTH) if transposed else stored(net, WIDTH, 4)
            y = result(net)
            c = bias(net, 4) if shifted else ""
            inputs = (*quantised(net, h), w, *scales(net, 4 if per_channel else None), c, *y)
            made = own(net, "QGemm", *inputs, like=typed(net, (2, 4)), name="inner", transB=transposed, alpha=alpha)
            return floats(net, made, *y)

        return middle

    def gemm_to_float(net: Net, h: str) -> str:
        inputs = (*quantised(net, h), stored(net, WIDTH, 4), *scales(net, 4), bias(net, 4))
        return own(net, "QGemm", *inputs, like=typed(net, (2, 4), TensorProto.FLOAT), name="inner")

    return [
        _rows("MatMulIntegerToFloat", "bias", to_float(shifted=True), OWN),
        _rows("MatMulIntegerToFloat", "no bias", to_float(shifted=False), OWN),
        _rows("DynamicQuantizeMatMul", "tensor", dynamic(per_channel=False), OWN),
        _rows("DynamicQuantizeMatMul", "channels", dynamic(per_channel=True), OWN),
        _rows("QGemm", "tensor", gemm(0, 1.0, per_channel=False), OWN),
        _rows("QGemm", "channels", gemm(0, 0.5, per_channel=True), OWN),
        _rows("QGemm", "transposed", gemm(1, 1.0, per_channel=True), OWN),
        _rows("QGemm", "no bias", gemm(1, 1.0, per_channel=False, shifted=False), OWN),
        _rows("QGemm", "to float", gemm_to_float, OWN),
    ]


def _attentions() -> list[Example]:
    def attention(net: Net, h: str, *, masked: bool, per_channel: bool) -> str:
        x, scale, zero = quantised(net, h)
        mask = net.constant(np.array([[1, 1, 1, 0]], np.int32)) if masked else ""
        count = 24 if per_channel else None
        w_scale, w_zero = scales(net, count)
        inputs = (x, stored(net, WIDTH, 24), net.vector(24), scale, w_scale, mask, zero, w_zero)
        like = typed(net, (1, 4, 8), TensorProto.FLOAT)
        return own(net, "QAttention", *inputs, like=like, num_heads=2, scale=0.5, name="scores")

    def build(*, masked: bool, per_channel: bool) -> Callable[[Net], None]:
        def made(net: Net) -> None:
            h = net.matmul(net.input(1, 4, 5), WIDTH, name="before")
            y = attention(net, h, masked=masked, per_channel=per_channel)
            net.output(net.matmul(y, 2, name="after"))

        return made

    def cached(net: Net) -> None:
        h = net.matmul(net.input(2, 4, 5), WIDTH, name="before")
        x, scale, zero = quantised(net, h)
        past = net.input(2, 2, 2, 3, 4)
        w_scale, w_zero = scales(net, None)
        inputs = (x, stored(net, WIDTH, 24), net.vector(24), scale, w_scale, "", zero, w_zero, past)
        net.domains[OWN] = 1
        y, present = net.many(
            "QAttention", inputs, 2, domain=OWN, like=typed(net, (2, 4, 8), TensorProto.FLOAT), num_heads=2,
            scale=0.5, unidirectional=1, name="scores",
        )  # fmt: skip
        net.types[present] = helper.make_tensor_type_proto(TensorProto.FLOAT, (2, 2, 2, 7, 4))
        net.output(net.matmul(y, 2, name="after"), present)

    free = ("before", "scores", "scores#2")
    frozen = {"scores": "a cache of"}
    return [
        Example("QAttention", "tensor", build(masked=False, per_channel=False), free, exact=False, domain=OWN),
        Example("QAttention", "channels", build(masked=False, per_channel=True), free, exact=False, domain=OWN),
        Example("QAttention", "mask", build(masked=True, per_channel=True), free, exact=False, domain=OWN),
        Example("QAttention", "cache", cached, ("before",), frozen, exact=False, domain=OWN),
    ]


def _recurrent() -> list[Example]:
    def build(directions: int, *, per_output: bool) -> Callable[[Net], None]:
        def made(net: Net) -> None:
            d, hidden = directions, 4
            x = net.matmul(net.input(3, 1, 2), WIDTH, name="before")
            form = (d, 4 * hidden) if per_output else (d,)
            zero = net.constant(np.zeros(form, np.int8))
            parameters = [net.vector(*form, low=0.005, high=0.02), zero, net.vector(*form, low=0.005, high=0.02), zero]
            weights = [stored(net, d, WIDTH, 4 * hidden), stored(net, d, hidden, 4 * hidden)]
            inputs = (x, *weights, net.vector(d, 8 * hidden), "", "", "", "", *parameters)
            direction = "bidirectional" if d == 2 else "forward"
            like = typed(net, (3, d, 1, hidden), TensorProto.FLOAT)
            y = own(
                net, "DynamicQuantizeLSTM", *inputs, like=like, name="cells", hidden_size=hidden, direction=direction
            )
            y = net.node("Transpose", y, perm=[0, 2, 1, 3])
            net.output(net.matmul(net.reshape(y, 0, 0, -1), 2, name="after"))

        return made

    free = ("before", "cells")
    return [
        Example("DynamicQuantizeLSTM", label, build(d, per_output=per_output), free, exact=False, domain=OWN, opset=14)
        for label, per_output, d in (("tensor", False, 1), ("rows", True, 1), ("both ways", True, 2))
    ]


# Element by element ---------------------------------------------------------------------------------------------------


def _own_example(op: str, label: str, middle: Middle) -> Example:
    """Put an operator of ONNX Runtime's own between two layers on floats."""
    return example(op, label, middle, ("before",), OWN)


def _elementwise() -> list[Example]:
    def pair(op: str) -> Middle:
        def middle(net: Net, h: str) -> str:
            y = result(net)
            g = quantised(net, net.conv("x0", WIDTH, name="other"), Z_SCALE)
            return floats(net, own(net, op, *quantised(net, h), *g, *y, like=typed(net, net.dims(h))), *y)

        return middle

    def constant(op: str, *, dtype: Any = np.uint8, zero: int = 120) -> Middle:
        def middle(net: Net, h: str) -> str:
            y = result(net)
            c = (stored(net, WIDTH, 1, 1, dtype=dtype, zero=zero), number(net, 0.02), number(net, zero, dtype))
            return floats(net, own(net, op, *quantised(net, h), *c, *y, like=typed(net, net.dims(h))), *y)

        return middle

    def scalar(op: str) -> Middle:
        def middle(net: Net, h: str) -> str:
            y = result(net)
            c = (net.constant(np.array([200], np.uint8)), number(net, 0.02), number(net, 120, np.uint8))
            return floats(net, own(net, op, *quantised(net, h), *c, *y, like=typed(net, net.dims(h))), *y)

        return middle

    def where(net: Net, h: str) -> str:
        y = result(net)
        mask = net.node("Greater", h, net.constant(0.0))
        g = quantised(net, net.conv("x0", WIDTH, name="other"), Z_SCALE)
        return floats(net, own(net, "QLinearWhere", mask, *quantised(net, h), *g, *y, like=typed(net, net.dims(h))), *y)

    def filled(net: Net, h: str) -> str:
        y = result(net)
        mask = net.node("Greater", h, net.constant(0.0))
        c = (stored(net, WIDTH, 1, 1, dtype=np.uint8, zero=99), number(net, 0.02), number(net, 99, np.uint8))
        return floats(net, own(net, "QLinearWhere", mask, *quantised(net, h), *c, *y, like=typed(net, net.dims(h))), *y)

    return [
        *(_own_example(op, "two", pair(op)) for op in ("QLinearAdd", "QLinearMul")),
        *(example(op, "channels", constant(op), domain=OWN, exact=False) for op in ("QLinearAdd", "QLinearMul")),
        *(_own_example(op, "scalar", scalar(op)) for op in ("QLinearAdd", "QLinearMul")),
        _own_example("QLinearWhere", "two", where),
        example("QLinearWhere", "channels", filled, domain=OWN, exact=False),
    ]


def _single_operands() -> list[Example]:
    def single(op: str, **attributes: Any) -> Middle:
        def middle(net: Net, h: str) -> str:
            y = result(net, 0.01)
            return floats(net, own(net, op, *quantised(net, h), *y, like=typed(net, net.dims(h)), **attributes), *y)

        return middle

    over = "normalises over it"
    return [
        _own_example("QLinearSigmoid", "plain", single("QLinearSigmoid")),
        _own_example("QLinearLeakyRelu", "plain", single("QLinearLeakyRelu", alpha=0.2)),
        _own_example("QLinearSoftmax", "space", single("QLinearSoftmax", axis=-1, opset=13)),
        example("QLinearSoftmax", "channels", single("QLinearSoftmax", axis=1, opset=13), domain=OWN, frozen=over),
        example("QLinearSoftmax", "flattened", single("QLinearSoftmax", axis=1, opset=11), domain=OWN, frozen=over),
        _own_example("QLinearSoftmax", "flattened space", single("QLinearSoftmax", axis=2, opset=11)),
    ]


def _pools() -> list[Example]:
    def pool(op: str, size: int, *, last: bool, **attributes: Any) -> Middle:
        def middle(net: Net, h: str) -> str:
            y = result(net)
            x, *parameters = quantised(net, h)
            like = typed(net, (1, size, size, WIDTH) if last else (1, WIDTH, size, size))
            x = net.node("Transpose", x, perm=[0, 2, 3, 1]) if last else x
            made = own(net, op, x, *parameters, *y, like=like, channels_last=int(last), **attributes)
            made = net.node("Transpose", made, perm=[0, 3, 1, 2]) if last else made
            return floats(net, made, *y)

        return middle

    def concat(axis: int, dims: Sequence[int]) -> Middle:
        def middle(net: Net, h: str) -> str:
            y = result(net)
            g = quantised(net, net.conv("x0", WIDTH, name="other"), Z_SCALE)
            parts = (*quantised(net, h), *g)
            return floats(net, own(net, "QLinearConcat", *y, *parts, like=typed(net, dims), axis=axis), *y)

        return middle

    window = {"kernel_shape": [2, 2], "strides": [2, 2]}
    return [
        *(
            example(op, "last" if last else "first", pool(op, size, last=last, **more), domain=OWN)
            for op, size, more in (("QLinearGlobalAveragePool", 1, {}), ("QLinearAveragePool", 2, window))
            for last in (False, True)
        ),
        example("QLinearConcat", "channels", concat(1, (1, 2 * WIDTH, 4, 4)), ("before", "other"), OWN),
        example("QLinearConcat", "space", concat(-1, (1, WIDTH, 4, 8)), domain=OWN),
    ]


# Stored weights -------------------------------------------------------------------------------------------------------


def packed(integers: AnyArray, bits: int) -> AnyArray:
    """Pack integers of a few bits into bytes along the last axis, the lowest first, the last byte filled with zeros."""
    many = 8 // bits
    padded = np.pad(integers, [(0, 0)] * (integers.ndim - 1) + [(0, -integers.shape[-1] % many)])
    parts = padded.reshape(*padded.shape[:-1], -1, many).astype(np.uint8)
    found: AnyArray = np.bitwise_or.reduce(parts << (bits * np.arange(many)).astype(np.uint8), axis=-1)
    return found


BLOCK = 16


def _packed_products() -> list[Example]:
    def build(bits: int, blocks: int, zero: str = "", *, flat: bool = False, shifted: bool = False) -> Middle:
        outputs = 5

        def middle(net: Net, h: str) -> str:
            inner = net.dims(h)[-1]
            w = packed(net.rng.integers(0, 2**bits, (outputs, blocks, BLOCK)), bits)
            s = net.rng.uniform(-0.02, 0.02, (outputs, blocks)).astype(np.float32) * 16 / 2**bits
            zeros = net.rng.integers(0, 2**bits, (outputs, blocks))
            z: AnyArray = packed(zeros, bits) if zero == "packed" else zeros.astype(np.float32)
            inputs = [h, net.constant(w), net.constant(s.ravel() if flat else s)]
            inputs += [net.constant(z.ravel() if flat else z) if zero else "", "", net.vector(outputs)]
            inputs = inputs if shifted else inputs[: 4 if zero else 3]
            shape: dict[str, int] = {"K": inner, "N": outputs, "bits": bits, "block_size": BLOCK}
            like = typed(net, (2, outputs), TensorProto.FLOAT)
            return own(net, "MatMulNBits", *inputs, like=like, name="inner", **shape)

        return middle

    def rows(label: str, middle: Middle, width: int, free: tuple[str, ...] = ("before", "inner")) -> Example:
        made = between("MatMulNBits", label, middle, dims=(3,), batch=2, width=width, exact=False)
        frozen = {} if "before" in free else {"before": "do not come out even"}
        return replace(made, free=free, frozen=frozen, domain=OWN)

    return [
        rows("plain", build(4, 4), 64),
        rows("flat", build(4, 4, flat=True), 64),
        rows("bias", build(4, 4, shifted=True), 64),
        rows("zero points", build(4, 4, "packed"), 64),
        rows("flat zero points", build(4, 4, "packed", flat=True), 64),
        rows("odd zero points", build(4, 3, "packed"), 48, ("inner",)),
        rows("zero points of floats", build(4, 3, "floats"), 48),
        rows("8 bits", build(8, 3, "packed"), 48),
        rows("2 bits", build(2, 4), 64),
        rows("uneven", build(4, 3), 40, ("inner",)),
    ]


def _tables() -> list[Example]:
    def build(kind: Any, blocks: int, *, zero: bool, bits: int = 4, last: int = BLOCK) -> Callable[[Net], None]:
        """A table of tokens, with elements packed into bytes where its type is that of bytes."""
        size, count = (blocks - 1) * BLOCK + last, 7
        is_packed = kind is np.uint8

        def made(net: Net) -> None:
            tokens = net.input(2, 3, dtype=TensorProto.INT64)
            low = -8 if kind is ml_dtypes.int4 else 0
            integers = net.rng.integers(low, low + 2**bits, (count, size))
            zeros = net.rng.integers(low, low + 2**bits, (count, blocks))
            table, points = (packed(n, bits) if is_packed else n.astype(kind) for n in (integers, zeros))
            scale = net.vector(count, blocks, low=0.01, high=0.03)
            inputs = (net.constant(table), tokens, scale, *([net.constant(points)] if zero else []))
            like = typed(net, (2, 3, size), TensorProto.FLOAT)
            found = own(
                net, "GatherBlockQuantized", *inputs, like=like, name="before", block_size=BLOCK, gather_axis=0,
                quantize_axis=1, bits=bits,
            )  # fmt: skip
            net.output(net.matmul(net.node("Tanh", found), 2, name="after"))

        return made

    def table(label: str, made: Callable[[Net], None], free: tuple[str, ...] = ("before",)) -> Example:
        frozen = {} if free else {"before": "do not come out even"}
        return Example("GatherBlockQuantized", label, made, free, frozen, opset=21, exact=False, domain=OWN)

    u8, i4, u4 = np.uint8, ml_dtypes.int4, ml_dtypes.uint4
    return [
        table("packed", build(u8, 4, zero=False)),
        table("packed, zero points", build(u8, 4, zero=True)),
        table("packed, odd zero points", build(u8, 3, zero=True), ()),
        table("packed, odd", build(u8, 3, zero=False)),
        table("packed, uneven", build(u8, 3, zero=False, last=8), ()),
        table("8 bits", build(u8, 3, zero=True, bits=8)),
        table("int4", build(i4, 3, zero=False)),
        table("uint4", build(u4, 3, zero=True)),
        table("int4, uneven", build(i4, 3, zero=True, last=8)),
        table("one block", build(i4, 1, zero=True, last=12)),
    ]


def _stored_weights() -> list[Example]:
    def weight(dtype: Any, axis: int, *, zero: bool, block: int = 0, own_domain: bool = False) -> Middle:
        """A product whose weight has scales along one axis."""

        def middle(net: Net, h: str) -> str:
            inner, outputs = net.dims(h)[-1], 4
            low, high = (-8, 8) if dtype is ml_dtypes.int4 else (0, 16) if dtype is ml_dtypes.uint4 else (0, 100)
            w = net.constant(net.rng.integers(low, high, (inner, outputs)).astype(dtype), name="inner_w")
            counts = [inner, outputs]
            form = [-(-n // block) if i == axis else n for i, n in enumerate(counts)] if block else [counts[axis]]
            inputs = [w, net.vector(*form, low=0.005, high=0.02)]
            if zero:
                inputs.append(net.constant(net.rng.integers(0, 8, form).astype(dtype)))
            attributes: dict[str, Any] = {"axis": axis, **({"block_size": block} if block else {})}
            if own_domain:
                like = typed(net, counts, TensorProto.FLOAT)
                made = own(net, "DequantizeLinear", *inputs, like=like, **attributes)
            else:
                made = net.node("DequantizeLinear", *inputs, **attributes)
            return net.node("MatMul", h, made, name="inner")

        return middle

    def rounded(axis: int | None, *, block: int = 0, dtype: Any = np.int8) -> Middle:
        """A product whose weight of floats is rounded on the way."""

        def middle(net: Net, h: str) -> str:
            counts = [net.dims(h)[-1], 4]
            blocks = [-(-n // block) if block and i == axis else n for i, n in enumerate(counts)]
            form = [] if axis is None else blocks if block else [counts[axis]]
            zero = net.constant(net.rng.integers(0, 4, form).astype(dtype))
            parameters = (net.vector(*form, low=0.01, high=0.02), zero)
            attributes: dict[str, Any] = {"axis": axis, **({"block_size": block} if block else {})}
            w = net.constant(net.rng.normal(size=counts) * 0.1, name="inner_w")
            made = net.node("QuantizeLinear", w, *parameters, **attributes)
            return net.node("MatMul", h, net.node("DequantizeLinear", made, *parameters, **attributes), name="inner")

        return middle

    def table(net: Net) -> None:
        tokens = net.input(2, 3, dtype=TensorProto.INT64)
        w = net.node("DequantizeLinear", stored(net, 7, WIDTH), *scales(net, WIDTH), axis=-1)
        net.output(net.matmul(net.node("Gather", w, tokens, name="before"), 2, name="after"))

    def transposed(net: Net, h: str) -> str:
        w = net.node("DequantizeLinear", stored(net, 4, net.dims(h)[-1]), *scales(net, 4), axis=0)
        return net.node("MatMul", h, net.node("Transpose", w, perm=[1, 0]), name="inner")

    def rows(label: str, middle: Middle, *, width: int = 40, opset: int = 21, **more: Any) -> Example:
        free = more.pop("free", ("before", "inner"))
        return example(
            "DequantizeLinear", label, middle, free, dims=(3,), batch=2, width=width, opset=opset, exact=False, **more
        )

    i4, u4 = ml_dtypes.int4, ml_dtypes.uint4
    return [
        rows("columns", weight(np.int8, 1, zero=False), opset=13),
        rows("columns, zero points", weight(np.uint8, 1, zero=True), opset=13),
        rows("columns, int16", weight(np.int16, 1, zero=True)),
        rows("columns, int4", weight(i4, 1, zero=False)),
        rows("columns, uint4", weight(u4, 1, zero=True)),
        rows("rows", weight(np.int8, 0, zero=False)),
        rows("transposed", transposed),
        rows("blocks, int8", weight(np.int8, 0, zero=True, block=8)),
        rows("blocks, int4", weight(i4, 0, zero=False, block=8)),
        rows("blocks, uint4", weight(u4, 0, zero=True, block=8)),
        rows("one block", weight(np.int8, 0, zero=False, block=64)),
        rows("uneven blocks", weight(i4, 0, zero=False, block=16)),
        rows("blocks of outputs", weight(i4, 1, zero=False, block=2)),
        rows("columns, own", weight(np.int8, 1, zero=False, own_domain=True), domain=OWN),
        Example("DequantizeLinear", "table", table, ("before",), exact=False),
        *(
            replace(rows(label, middle), op="QuantizeLinear")
            for label, middle in {
                "rounded": rounded(None),
                "rounded, columns": rounded(1),
                "rounded, rows": rounded(0, dtype=np.uint8),
                "rounded, blocks": rounded(0, block=8),
            }.items()
        ),
    ]


def _formats() -> list[Example]:
    def pair(net: Net, h: str) -> str:
        y = (number(net, Y_SCALE), number(net, 3, np.int8))
        made = own(net, "QuantizeLinear", h, *y, like=typed(net, net.dims(h), TensorProto.INT8))
        return own(net, "DequantizeLinear", made, *y, like=h)

    def dynamic(net: Net, h: str) -> str:
        y, scale, zero = net.many("DynamicQuantizeLinear", [h], 3)
        return floats(net, y, scale, zero)

    def normalised(net: Net, h: str) -> str:
        def parameter(low: int, high: int) -> str:
            integers = net.constant(net.rng.integers(low, high, WIDTH).astype(np.int8))
            return net.node("DequantizeLinear", integers, number(net, 0.01), number(net, 0, np.int8))

        signed = [parameter(-90, 90) for _ in range(3)]
        return net.node("BatchNormalization", h, *signed, parameter(20, 120))

    return [
        *(example(op, "own", pair, domain=OWN) for op in ("QuantizeLinear", "DequantizeLinear")),
        example("DynamicQuantizeLinear", "plain", dynamic),
        example("BatchNormalization", "decoded", normalised, exact=False),
    ]


QUANTISED: tuple[Example, ...] = (
    *_convolutions(),
    *_products(),
    *_own_products(),
    *_attentions(),
    *_recurrent(),
    *_elementwise(),
    *_single_operands(),
    *_pools(),
    *_packed_products(),
    *_tables(),
    *_stored_weights(),
    *_formats(),
)
