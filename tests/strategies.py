"""Random inputs for the laws: layouts of axes, and valid networks of every kind that the rules know."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto

from onnxfuse.coupling.layout import Atom, Concat, Layout, Product
from tests.builders import AnyArray, Net, Style

__all__ = ["OPSETS", "RandomNet", "coarsened", "layouts", "nets"]

T = TypeVar("T")

# From the oldest that ONNX Runtime takes to the newest that it promises to take.
OPSETS = (7, 8, 9, 10, 11, 12, 13, 14, 16, 17, 18, 20, 21, 22, 23, 24, 25, 26)


# Weights of 11 and of 8 bits are off by up to 2^-11 and 2^-8, and depth and normalisations make more of it.
ROUNDING: dict[int, float] = {
    TensorProto.DOUBLE: 1e-5,
    TensorProto.FLOAT: 1e-5,
    TensorProto.FLOAT16: 2e-2,
    TensorProto.BFLOAT16: 1e-1,
}


# Layouts ------------------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn, size: int, pool: dict[int, list[Atom]], depth: int = 3) -> Layout:
    """Draw a layout of ``size`` indices; atoms are taken from ``pool`` again and again, or added to it."""
    known = pool.setdefault(size, [])
    kinds = ["new", *(["old"] if known else [])]
    divisors = [d for d in range(2, size) if size % d == 0]
    if depth and size > 1:
        kinds += ["concat"] * 2 + (["product"] * 2 if divisors else [])
    match draw(st.sampled_from(kinds)):
        case "new":
            known.append(Atom(size, f"a{sum(map(len, pool.values()))}"))
            return known[-1]
        case "old":
            return draw(st.sampled_from(known))
        case "concat":
            cut = draw(st.integers(1, size - 1))
            return Concat((draw(layouts(cut, pool, depth - 1)), draw(layouts(size - cut, pool, depth - 1))))
        case _:
            outer = draw(st.sampled_from(divisors))
            return Product((draw(layouts(outer, pool, depth - 1)), draw(layouts(size // outer, pool, depth - 1))))


@st.composite
def coarsened(draw: st.DrawFn, layout: Layout, size_of: dict[int, int]) -> Layout:
    """Draw a layout that says less: parts of ``layout`` are replaced by atoms of their own."""
    if draw(st.integers(0, 3)) == 0:
        return Atom(size_of[id(layout)], "coarse")
    match layout:
        case Atom():
            return layout
        case Concat(parts):
            return Concat(tuple(draw(coarsened(part, size_of)) for part in parts))
        case Product(factors):
            return Product(tuple(draw(coarsened(factor, size_of)) for factor in factors))


# Networks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomNet:
    """A network to judge the package by.

    Attributes:
        model: The model.
        feeds: Inputs, at the shapes that the analysis assumes (a batch of 1 where it is open).
        larger: Inputs of a batch of 3 where it is open, else the same.
        rounding: How much outputs may change, over the largest, because changed weights are rounded in the file.
        label: What it is made of, for messages.
    """

    model: onnx.ModelProto
    feeds: dict[str, AnyArray]
    larger: dict[str, AnyArray]
    rounding: float
    label: str

    def __repr__(self) -> str:
        """Show what it is made of."""
        return f"RandomNet({self.label})"


class _Grower:
    """Grows a network block by block, each one chosen by hypothesis."""

    def __init__(self, draw: st.DrawFn, net: Net) -> None:
        self.draw = draw
        self.net = net

    def pick(self, *options: T) -> T:
        return self.draw(st.sampled_from(options))

    def chance(self) -> bool:
        return self.draw(st.booleans())

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def width(self) -> int:
        return self.number(2, 6)

    # Anywhere ------------------------------------------------------------------------------------------------

    def activation(self, x: str) -> str:
        net = self.net
        if net.dtype == TensorProto.DOUBLE:
            return net.node(self.pick("Relu", "Sigmoid", "Tanh", "Identity"), x)
        plain = ["Relu", "Sigmoid", "Tanh", "LeakyRelu", "Elu", "Selu", "Softplus", "HardSigmoid", "Abs", "Neg"]
        plain += ["Identity", "Softsign", *(["HardSwish"] if net.opset >= 14 else [])]
        plain += ["Mish"] * (net.opset >= 18) + ["Gelu"] * (net.opset >= 20)
        op = self.pick(*plain, "Clip", "Dropout", "Cast", "PRelu", "swish")
        match op:
            case "Clip":
                return net.clip(x, -1.0, 1.0)
            case "Dropout":
                return net.dropout(x)
            case "Cast":
                return net.node("Cast", x, to=net.dtype)
            case "PRelu":
                slope = (net.channels(x), *[1] * (len(net.dims(x)) - 2)) if self.chance() else (1,)
                return net.node("PRelu", x, net.vector(*slope))
            case "swish":
                return net.node("Mul", x, net.node("Sigmoid", x))
            case _:
                return net.node(op, x)

    def constant_math(self, x: str) -> str:
        """Arithmetic with a constant for every channel, or with a scalar."""
        net = self.net
        shape = (net.channels(x), *[1] * (len(net.dims(x)) - 2)) if self.chance() else ()
        op = self.pick("Add", "Sub", "Mul", "Div", *(["Max"] if net.opset >= 8 else []))
        k = net.vector(*shape, low=0.5, high=1.5)
        return net.node(op, *((k, x) if op in {"Add", "Sub", "Mul"} and self.chance() else (x, k)))

    def batch_norm(self, x: str) -> str:
        net, c = self.net, self.net.channels(x)
        kind = self.pick("random", "random", "default", "dead", "tiny", "shared")
        if kind == "shared":
            # What frameworks write for normalisations that were never trained: the same tensors again and again.
            names = [f"{word}_{c}" for word in ("ones", "zeros")]
            for name, value in zip(names, (1.0, 0.0), strict=True):
                if name not in net.values:
                    net.constant(np.full(c, value), name=name)
            ones, zeros = names
            return net.batch_norm(x, parameters=(ones, zeros, zeros, ones))
        scale = net.rng.uniform(-1.5, 1.5, c)
        variance = net.rng.uniform(0.2, 2.0, c)
        if kind == "dead":
            scale[net.rng.random(c) < 0.5] = 0
        if kind == "tiny":
            variance[0] = 1e-6
            scale[0] *= 0.01
        shift, mean = net.rng.uniform(-0.5, 0.5, (2, c))
        if kind == "default":
            scale, variance = np.ones(c), np.ones(c)
        parameters = [net.constant(v) for v in (scale, shift, mean, variance)]
        return net.batch_norm(x, parameters=parameters, epsilon=self.pick(None, 1e-3, 1e-5))

    # Images --------------------------------------------------------------------------------------------------

    def conv(self, x: str, *, keep: bool = False, width: int = 0, name: str = "") -> str:
        """A convolution of any kind; with ``keep`` its spatial size stays."""
        net = self.net
        into, space = net.channels(x), net.dims(x)[2:]
        group = self.pick(1, 1, 1, *(g for g in (2, 3) if into % g == 0), into)
        out = width or self.width()
        if group > 1:
            out = group * -(-out // group) if not width or width % group else width
            out = group if group == into and not width and self.chance() else out
        if width and out != width:
            group, out = 1, width
        options: dict[str, Any] = {}
        kernel = [self.pick(1, 3) for _ in space]
        if keep:
            options = {"pads": [k // 2 for k in kernel] * 2}
        elif min(space) >= 3:
            pad = [self.pick(0, 1) if k == 3 else 0 for k in kernel]
            options["pads"] = [*pad, *pad]
            options["strides"] = [self.pick(1, 2) for _ in space]
            options["dilations"] = [
                self.pick(1, 2) if k == 3 and s + 2 * p >= 5 else 1 for k, p, s in zip(kernel, pad, space, strict=True)
            ]
        else:
            kernel = [1 for _ in space]
            options = {"pads": [0 for _ in space] * 2}
        return net.conv(x, out, kernel, bias=self.chance(), group=group, name=name, **options)

    def layer(self, x: str) -> str:
        """A convolution with whatever usually follows one."""
        y = self.conv(x)
        y = self.batch_norm(y) if self.chance() else y
        return self.activation(y) if self.chance() else y

    def residual(self, x: str) -> str:
        net = self.net
        shortcut = x
        y = self.conv(x, keep=True)
        if self.chance():
            y = self.activation(self.batch_norm(y))
        wide = self.number(1, 2) == 2
        out = net.channels(x) + (2 if wide else 0)
        y = self.conv(y, keep=True, width=out)
        if wide and self.chance():
            shortcut = self.conv(x, keep=True, width=out)
        elif wide:
            # Option A of the ResNet paper: zeros for the channels that are new.
            rank = len(net.dims(x))
            before = self.number(0, 2)
            pads = [0] * (2 * rank)
            pads[1], pads[rank + 1] = before, 2 - before
            shortcut = net.pad(x, pads)
        y = self.batch_norm(y) if self.chance() else y
        y = net.node(self.pick("Add", "Sum", "Sub"), y, shortcut)
        return self.activation(y) if self.chance() else y

    def pre_activation(self, x: str) -> str:
        """A convolution that is read by a normalisation and by the sum after it."""
        y = self.conv(x, keep=True)
        z = self.net.node("Relu", self.batch_norm(y))
        return self.net.node("Add", y, self.conv(z, keep=True, width=self.net.channels(y)))

    def branches(self, x: str) -> str:
        net = self.net
        parts = [self.conv(x, keep=True) for _ in range(self.number(1, 2))]
        parts.append(x if self.chance() else net.node("Relu", x))
        y = net.node("Concat", *parts, axis=self.pick(1, 1 - len(net.dims(x))) if net.opset >= 11 else 1)
        return self.batch_norm(y) if self.chance() else y

    def split(self, x: str) -> str:
        net = self.net
        y = self.conv(x, keep=True, width=4)
        sizes = self.pick(None, [1, 3], [2, 2])
        a, b = net.split(y, sizes, 2)
        a = self.conv(a, keep=True) if self.chance() else self.activation(a)
        return net.node("Concat", a, b, axis=1)

    def shuffle(self, x: str) -> str:
        """ShuffleNet: channels as a matrix, transposed."""
        net = self.net
        y = self.conv(x, keep=True, width=4)
        space = net.dims(y)[2:]
        z = net.reshape(y, 0, 2, 2, *space)
        z = net.node("Transpose", z, perm=[0, 2, 1, *range(3, 3 + len(space))])
        return net.reshape(z, 0, 4 if self.chance() else -1, *space)

    def cut(self, x: str) -> str:
        net = self.net
        y = self.conv(x, keep=True, width=5)
        first, last = self.pick((0, 3), (2, 5), (1, 4), (-4, -1), (-3, 2**31 - 1))
        return net.slice(y, [first], [last], [1])

    def excitation(self, x: str) -> str:
        """Squeeze and excitation: a gate for every channel, made from all of them."""
        net = self.net
        y = self.conv(x, keep=True)
        c = net.channels(y)
        gate = net.node("Relu", net.conv(net.node("GlobalAveragePool", y), 2, 1))
        return net.node("Mul", y, net.node("Sigmoid", net.conv(gate, c, 1)))

    def channels_last(self, x: str) -> str:
        """A product over the channels, which are moved to the end for it."""
        net = self.net
        rank = len(net.dims(x))
        y = net.node("Transpose", x, perm=[0, *range(2, rank), 1])
        y = net.matmul(y, self.width(), bias=self.chance())
        y = net.node("Relu", y)
        return net.node("Transpose", y, perm=[0, rank - 1, *range(1, rank - 1)])

    def resample(self, x: str) -> str:
        net = self.net
        space = net.dims(x)[2:]
        kind = self.pick("pool", "pad", "up", "transposed")
        if kind == "pad":
            return net.pad(x, [0, 0, *[1] * len(space), 0, 0, *[0] * len(space)])
        if kind == "up" and len(space) == 2 and max(space) <= 4:
            return net.upsample(x)
        if kind == "transposed" and max(space) <= 4:
            group = 2 if net.channels(x) % 2 == 0 and self.chance() else 1
            return net.conv_transpose(x, 2 * self.number(1, 2), bias=self.chance(), group=group)
        if min(space) >= 2:
            return net.node(self.pick("MaxPool", "AveragePool"), x, kernel_shape=[2] * len(space))
        return x

    def shared(self, x: str) -> str:
        """Two convolutions with one weight."""
        net = self.net
        y = self.conv(x, keep=True, width=3)
        weight = net.weight(3, 3, *[1] * (len(net.dims(x)) - 2))
        z = net.node("Relu", net.conv(y, 3, 1, weight=weight))
        return net.conv(z, 3, 1, weight=weight, bias=False)

    def normal(self, x: str) -> str:
        net, c = self.net, self.net.channels(x)
        return net.node("InstanceNormalization", x, net.vector(c, low=0.5, high=1.5), net.vector(c))

    def image(self, x: str) -> str:
        return self.pick(
            *(self.layer, self.layer, self.residual, self.residual, self.pre_activation, self.branches, self.split),
            *(self.shuffle, self.cut, self.excitation, self.channels_last, self.resample, self.shared, self.normal),
            *(self.batch_norm, self.activation, self.constant_math),
        )(x)

    # From images to vectors -----------------------------------------------------------------------------------

    def flatten(self, x: str) -> str:
        net = self.net
        kind = self.pick("pool", "reduce", "flatten", "reshape", "computed", "squeeze", "last")
        rank = len(net.dims(x))
        if kind in {"pool", "squeeze"}:
            x = net.node(self.pick("GlobalAveragePool", "GlobalMaxPool"), x)
        if kind == "reduce":
            axes = list(range(2, rank)) if self.chance() else list(range(2 - rank, 0)) if net.opset >= 11 else None
            keep = self.number(0, 1)
            y = net.reduce(self.pick("Mean", "Max", "Sum"), x, axes or list(range(2, rank)), keepdims=keep)
            return net.node("Flatten", y) if keep else y
        if kind == "squeeze":
            return net.squeeze(x, list(range(2, rank)))
        if kind == "last":
            x = net.node("Transpose", x, perm=[0, *range(2, rank), 1])
        flat = int(np.prod(net.dims(x)[1:]))
        match self.pick("flatten", "minus one", "zero", "stated") if kind != "computed" else kind:
            case "minus one":
                return net.reshape(x, 0, -1)
            case "zero":
                return net.reshape(x, 0, flat)
            case "stated":
                return net.reshape(x, -1, flat)
            case "computed":
                batch = net.node("Gather", net.node("Shape", x), net.constant(np.array([0], np.int64)), axis=0)
                rest = net.constant(np.array([self.pick(-1, flat)], np.int64))
                target = net.node("Concat", batch, rest, axis=0)
                # Inference can't tell the result where the batch is open, the builder can: batch and the rest.
                net.types[target] = onnx.helper.make_tensor_type_proto(TensorProto.INT64, [2])
                y = net.node("Reshape", x, target)
                net.types[y] = onnx.helper.make_tensor_type_proto(net.dtype, [net.dims(x)[0], flat])
                return y
            case _:
                return net.node("Flatten", x)

    # Vectors --------------------------------------------------------------------------------------------------

    def dense(self, x: str) -> str:
        net, out = self.net, self.width()
        if self.chance():
            y = net.matmul(x, out, bias=self.chance())
        else:
            options: dict[str, Any] = {"transB": self.number(0, 1)}
            if self.chance():
                options |= {"alpha": 0.7, "beta": 1.3}
            inner = net.dims(x)[1]
            weight = net.weight(*((out, inner) if options["transB"] else (inner, out)), fan_in=inner)
            shape = self.pick((out,), (1, out), (), (1,), None)
            c = [] if shape is None else [net.vector(*shape)]
            if shape is None and net.opset < 11:
                c = [net.vector(out)]
            y = net.node("Gemm", x, weight, *c, **options)
        y = self.batch_norm(y) if self.chance() else y
        return self.activation(y)

    def dense_residual(self, x: str) -> str:
        y = self.dense(x)
        y = self.net.matmul(y, self.net.channels(x), bias=self.chance())
        return self.net.node(self.pick("Add", "Sub", "Sum"), x, y)

    def column(self, x: str) -> str:
        """A product with the constant on the left, on the transposed matrix; or a Gemm that transposes by itself."""
        net, out = self.net, self.width()
        y = net.node("Transpose", x, perm=[1, 0])
        net.turned.add(y)
        if self.chance():
            return net.gemm(y, out, transA=1, transB=self.number(0, 1))
        z = net.node("MatMul", net.weight(out, net.dims(x)[1]), y)
        y = net.node("Add", z, net.vector(out, 1))
        net.turned.update((y, z))
        return net.node("Transpose", y, perm=[1, 0])

    def vector(self, x: str) -> str:
        return self.pick(self.dense, self.dense, self.dense_residual, self.column, self.constant_math)(x)

    # Everything -----------------------------------------------------------------------------------------------

    def grow(self, blocks: int) -> None:
        net = self.net
        batch = self.pick("", "N")
        rows = 1 if batch else self.number(1, 2)
        outputs: list[str] = []
        if net.dtype == TensorProto.DOUBLE or self.number(0, 5) == 0:
            x = net.input(rows, self.width(), batch=batch)
        else:
            space = self.pick((7,), (5, 6), (4, 4), (4, 4), (3, 4, 3))
            x = net.input(rows, self.width(), *space, batch=batch)
            if self.number(0, 3) == 0:
                other = net.input(rows, self.width(), *space, batch=batch)
                x = net.node("Concat", self.conv(x, keep=True), self.conv(other, keep=True), axis=1)
            for _ in range(blocks):
                x = self.image(x)
            if self.number(0, 3) == 0:
                outputs.append(self.conv(x))
            x = self.flatten(x)
        for _ in range(self.number(1, 2)):
            x = self.vector(x)
        outputs.append(net.gemm(x, 3, name="last"))
        net.output(*outputs)


@st.composite
def nets(
    draw: st.DrawFn,
    *,
    opsets: Sequence[int] = OPSETS,
    dtypes: Sequence[int] = (TensorProto.FLOAT,),
    blocks: int = 3,
) -> RandomNet:
    """Draw a random network that ONNX Runtime runs."""
    opset = draw(st.sampled_from(opsets))
    style: Style = draw(st.sampled_from(("initializer", "initializer", "node", "input")))
    dtype = draw(st.sampled_from(dtypes))
    net = Net(opset, seed=draw(st.integers(0, 2**16)), dtype=dtype, style=style)
    kinds = [dtype, dtype]
    if dtype == TensorProto.FLOAT:
        kinds += [TensorProto.FLOAT16, TensorProto.DOUBLE, *([TensorProto.BFLOAT16] if opset >= 13 else [])]
    net.stored = draw(st.sampled_from(kinds))
    _Grower(draw, net).grow(draw(st.integers(1, blocks)))
    computed = [o for n in net.nodes for o in n.output if o not in net.values and net.dims(o)]
    if draw(st.booleans()):
        shaped = [n for n in computed if net.types[n].tensor_type.elem_type == dtype]
        net.stated = [n for n in shaped if n not in net.turned or not net.symbolic]
    larger = dict(net.feeds)
    if net.symbolic:
        larger = {n: np.concatenate([a, a[::-1] * 0.5, a + 1]).astype(a.dtype) for n, a in net.feeds.items()}
    label = f"opset {opset}, {style}, type {dtype} stored {net.stored}: {' '.join(n.op_type for n in net.nodes)}"
    return RandomNet(net.model(), dict(net.feeds), larger, ROUNDING[net.stored], label)
