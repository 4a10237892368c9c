"""Small networks, at least one for every operator that has a rule, with what is to be found in each of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto

from onnxfuse.coupling.rules.elementwise import UNARY
from tests.builders import Net

__all__ = ["EXAMPLES", "Example"]

Middle: TypeAlias = Callable[[Net, str], str]
WIDTH = 6
INT64 = np.int64


@dataclass(frozen=True)
class Example:
    """A network around one operator.

    Attributes:
        op: The operator.
        label: What is special about it.
        build: Writes the network.
        free: Names of the groups that may change; no others may.
        frozen: Names of groups that may not, with a part of the reason.
        opset: Version of the operator set.
        exact: Whether copies merge, and unread channels go, without a change.
        domain: The operator's domain.
    """

    op: str
    label: str
    build: Callable[[Net], None]
    free: tuple[str, ...] = ()
    frozen: Mapping[str, str] = field(default_factory=dict)
    opset: int = 17
    exact: bool = True
    domain: str = ""

    def net(self) -> Net:
        """Write the network anew."""
        net = Net(self.opset, seed=5)
        self.build(net)
        return net

    @property
    def name(self) -> str:
        """Operator and label."""
        return f"{self.domain}{self.op}-{self.label}-{self.opset}"


def close(net: Net, x: str) -> None:
    """End a network with a layer that reads all channels of ``x``, cast if it is not made of floats."""
    if net.types[x].tensor_type.elem_type != net.dtype:
        x = net.node("Cast", x, to=net.dtype)
    rank = len(net.dims(x))
    if rank == 2:
        net.output(net.gemm(x, 2, name="after"))
    elif rank > 2:
        net.output(net.conv(x, 2, 1, name="after"))
    else:
        net.output(net.node("MatMul", x, net.weight(net.dims(x)[0], 2), name="after"))


def between(
    op: str,
    label: str,
    middle: Middle,
    *,
    frozen: str = "",
    opset: int = 17,
    dims: Sequence[int] = (2, 4, 4),
    batch: int = 1,
    exact: bool = True,
    width: int = WIDTH,
) -> Example:
    """Put something between a layer that makes six channels, called ``before``, and one that reads them."""

    def build(net: Net) -> None:
        x = net.input(batch, *dims)
        h = net.gemm(x, width, name="before") if len(dims) == 1 else net.conv(x, width, name="before")
        close(net, middle(net, h))

    free = () if frozen else ("before",)
    return Example(op, label, build, free, {"before": frozen} if frozen else {}, opset, exact)


def pair(op: str, label: str, middle: Callable[[Net, str, str], str], *, opset: int = 17, **more: Any) -> Example:
    """Let an operator join two layers, ``before`` and ``other``, into one group, or freeze it."""

    def join(net: Net, h: str) -> str:
        return middle(net, h, net.conv("x0", WIDTH, name="other"))

    return between(op, label, join, opset=opset, **more)


# Elementwise --------------------------------------------------------------------------------------------------------


def _bent(op: str, **attributes: Any) -> Middle:
    return lambda net, h: net.node(op, net.node("Sigmoid", h), **attributes)


def _mask(net: Net, h: str) -> str:
    return net.node("Greater", h, net.constant(0.0))


def _as(net: Net, h: str, kind: int) -> str:
    scaled = net.node("Mul", net.node("Sigmoid", h), net.constant(100.0))
    return net.node("Cast", scaled, to=kind)


UNARY_FORMS: dict[str, tuple[int, Middle]] = {
    "Acosh": (17, lambda net, h: net.node("Acosh", net.node("Add", net.node("Abs", h), net.constant(1.5)))),
    "BitwiseNot": (18, lambda net, h: net.node("BitwiseNot", _as(net, h, TensorProto.INT32))),
    "Cast": (17, lambda net, h: net.node("Cast", net.node("Mul", h, net.constant(9.0)), to=TensorProto.INT32)),
    "Clip": (17, lambda net, h: net.clip(h, -0.5, 0.5)),
    "Dropout": (17, lambda net, h: net.dropout(h)),
    "Gelu": (20, _bent("Gelu")),
    "HardSwish": (17, _bent("HardSwish")),
    "IsInf": (17, lambda net, h: net.node("IsInf", net.node("Div", net.constant(1.0), net.node("Relu", h)))),
    "IsNaN": (17, lambda net, h: net.node("IsNaN", net.node("Sqrt", h))),
    "Mish": (18, _bent("Mish")),
    "Not": (17, lambda net, h: net.node("Not", _mask(net, h))),
    "Relu": (17, lambda net, h: net.node("Relu", h)),
    "Sign": (17, lambda net, h: net.node("Sign", h)),
    "Ceil": (17, lambda net, h: net.node("Ceil", h)),
    "Floor": (17, lambda net, h: net.node("Floor", h)),
    "Round": (17, lambda net, h: net.node("Round", h)),
    "Swish": (24, _bent("Swish", alpha=1.5)),
    "ThresholdedRelu": (17, _bent("ThresholdedRelu", alpha=0.5)),
}


def _unary() -> list[Example]:
    found = []
    for op in UNARY:
        opset, middle = UNARY_FORMS.get(op, (17, _bent(op)))
        found.append(between(op, "plain", middle, opset=opset))
    found.append(between("Clip", "attributes", lambda net, h: net.clip(h, -0.5, 0.5), opset=7))
    found.append(between("Dropout", "attributes", lambda net, h: net.dropout(h), opset=7))

    def with_mask(net: Net, h: str) -> str:
        kept, mask = net.many("Dropout", [h], 2)
        return net.node("Where", mask, kept, net.constant(0.0))

    found.append(between("Dropout", "mask", with_mask))
    return found


def _convert(net: Net, h: str, kind: str) -> str:
    """Return channels as what an operator takes."""
    match kind:
        case "bool":
            return _mask(net, h)
        case "int":
            return _as(net, h, TensorProto.INT32)
        case "uint":
            return _as(net, h, TensorProto.UINT8)
        case "positive":
            return net.node("Sigmoid", h)
        case _:
            return h


ADDITIVE = ("Add", "Sub", "Sum")
BROADCASTING: dict[str, tuple[str, int, dict[str, Any]]] = {
    **dict.fromkeys(("And", "Or", "Xor"), ("bool", 17, {})),
    **dict.fromkeys(("BitwiseAnd", "BitwiseOr", "BitwiseXor"), ("int", 18, {})),
    "BitShift": ("uint", 17, {"direction": "RIGHT"}),
    **dict.fromkeys(("Div", "Mul", "Max", "Min", "Mean", "Add", "Sub", "Sum", "PRelu"), ("float", 17, {})),
    **dict.fromkeys(("Equal",), ("int", 17, {})),
    **dict.fromkeys(("Greater", "GreaterOrEqual", "Less", "LessOrEqual"), ("float", 17, {})),
    "Mod": ("positive", 17, {"fmod": 1}),
    "Pow": ("positive", 17, {}),
}
CONSTANTS: dict[str, Any] = {
    "bool": np.array([True, False, True, True, False, True]),
    "int": np.array([17, 3, 60, 40, 55, 99], np.int32),
    "uint": np.array([0, 1, 2, 3, 4, 5], np.uint8),
}


def _broadcasting() -> list[Example]:
    found = []
    for op, (kind, opset, attributes) in BROADCASTING.items():

        def two(net: Net, h: str, g: str, o: str = op, k: str = kind, a: dict[str, Any] = attributes) -> str:
            g = net.node("Abs", g) if o in {"PRelu", "Div", "Mod"} else g
            g = net.node("Add", g, net.constant(0.7)) if o in {"Div", "Mod"} else g
            return net.node(o, _convert(net, h, k), _convert(net, g, k), **a)

        def one(net: Net, h: str, o: str = op, k: str = kind, a: dict[str, Any] = attributes) -> str:
            value = CONSTANTS.get(k, np.linspace(0.4, 1.3, WIDTH)).reshape(WIDTH, 1, 1)
            return net.node(o, _convert(net, h, k), net.constant(value), **a)

        def scalar(net: Net, h: str, o: str = op, k: str = kind, a: dict[str, Any] = attributes) -> str:
            # One that does not make the result the same for all inputs: not And with False, nor Or with True.
            value = CONSTANTS[k][[int(o != "And")]] if k in CONSTANTS else np.array([0.7])
            return net.node(o, _convert(net, h, k), net.constant(value), **a)

        stored = "" if kind in {"float", "positive"} else "not stored as floats"
        found.append(pair(op, "two", two, opset=opset))
        found.append(between(op, "channels", one, opset=opset, frozen=stored))
        found.append(between(op, "scalar", scalar, opset=opset))
    for op in ("Add", "Sub", "Mul", "Div", "Max", "Pow"):

        def turned(net: Net, h: str, o: str = op) -> str:
            value = net.constant(np.linspace(0.4, 1.3, WIDTH).reshape(1, WIDTH, 1, 1))
            return net.node(o, value, net.node("Exp", h))

        found.append(between(op, "constant first", turned))

    def gate(net: Net, h: str) -> str:
        squeezed = net.conv(net.node("GlobalAveragePool", h), 2, 1, name="squeeze")
        return net.node("Mul", h, net.conv(squeezed, WIDTH, 1, name="excite"))

    found.append(between("Mul", "gate", gate))
    found[-1] = Example("Mul", "gate", found[-1].build, ("before", "squeeze"))
    found.append(pair("Where", "two", lambda net, h, g: net.node("Where", _mask(net, h), h, g)))

    def fill(net: Net, h: str) -> str:
        return net.node("Where", _mask(net, h), h, net.constant(np.linspace(-1, 1, WIDTH).reshape(WIDTH, 1, 1)))

    found.append(between("Where", "channels", fill))
    found.append(pair("Sum", "three", lambda net, h, g: net.node("Sum", h, g, h)))
    return found


def _experiments() -> list[Example]:
    """Operators that ONNX has given up; ONNX Runtime still runs them."""

    def bent(op: str) -> Middle:
        return lambda net, h: net.node(op, h, like=h, alpha=0.8, beta=0.3)

    def crop(net: Net, h: str) -> str:
        return net.node("Crop", h, like=_typed(net, (1, WIDTH, 2, 1)), border=[1, 2, 1, 1])

    found = [between(op, "plain", bent(op), opset=7) for op in ("Affine", "ParametricSoftplus", "ScaledTanh")]
    return [*found, between("Crop", "plain", crop, opset=7)]


def _cast_like() -> list[Example]:
    def cast(net: Net, h: str) -> str:
        return net.node("CastLike", net.node("Mul", h, net.constant(5.0)), net.constant(np.array([1, 2], np.int32)))

    return [between("CastLike", "plain", cast)]


# Convolutions and products ------------------------------------------------------------------------------------------


def _groups(net: Net, h: str) -> str:
    return net.conv(h, WIDTH, name="grouped", group=2)


def _along_space(net: Net, h: str) -> str:
    """Mix the places of a map by filters of one tap, along whose space the channels lie."""
    places = net.node("Transpose", net.reshape(h, 0, WIDTH, 16), perm=[0, 2, 1])
    hidden = net.node("Relu", net.conv(places, 5, 1, name="mix"))
    mixed = net.conv(hidden, 16, 1, name="back")
    return net.reshape(net.node("Transpose", mixed, perm=[0, 2, 1]), 0, WIDTH, 4, 4)


def _competing(net: Net, h: str) -> str:
    """Let the channels of each of three groups compete, so that there have to be as many."""
    shares = net.node("Softmax", net.reshape(h, 0, 3, 2, 4, 4), axis=2)
    return net.reshape(shares, 0, 6, 4, 4)


def _convolutions() -> list[Example]:
    def two(
        label: str, middle: Middle, free: tuple[str, ...], frozen: dict[str, str] | None = None, **more: Any
    ) -> Example:
        plain = between("Conv", label, middle, **more)
        return Example(plain.op, label, plain.build, free, frozen or {}, plain.opset)

    options: dict[str, Any] = {"strides": [2, 1], "pads": [1, 0, 0, 1], "dilations": [1, 2]}
    found = [
        two("1d", lambda n, h: n.conv(h, 4, name="inner"), ("before", "inner"), dims=(2, 7)),
        two("2d", lambda n, h: n.conv(h, 4, name="inner", **options), ("before", "inner"), dims=(2, 6, 6)),
        two("3d", lambda n, h: n.conv(h, 4, name="inner", bias=False), ("before", "inner"), dims=(2, 3, 4, 3)),
        two("groups", _groups, ("before", "grouped")),
        two(
            "whole groups",
            lambda n, h: _competing(n, n.conv(_competing(n, h), WIDTH, name="grouped", group=3)),
            ("before",),
            {"before#2": "normalises over it", "grouped": "normalises over it"},
        ),
        two(
            "whole groups, filters",
            lambda n, h: n.conv(_competing(n, h), WIDTH, name="grouped", group=3),
            ("before", "grouped"),
            {"before#2": "normalises over it"},
        ),
        two("one filter a group", lambda n, h: n.conv(h, 3, name="grouped", group=3), ("before", "before#2")),
        two("depthwise", lambda n, h: n.conv(h, WIDTH, name="deep", group=WIDTH), ("before",)),
        two("multiplier", lambda n, h: n.conv(h, 2 * WIDTH, name="deep", group=WIDTH), ("before",)),
        two("space", _along_space, ("before", "mix"), {"back": "graph output"}),
        two("auto_pad", lambda n, h: n.conv(h, 4, name="inner", auto_pad="SAME_UPPER"), ("before", "inner")),
    ]

    def dynamic(net: Net, h: str) -> str:
        kernel = net.node("Reshape", net.gemm(net.input(1, 3), 18, name="maker"), net.constant(np.array([3, 6, 1, 1])))
        return net.node("Conv", h, kernel)

    found.append(two("computed weight", dynamic, ("before",), {"maker": "fused instead"}))

    def deep_dynamic(net: Net, h: str) -> str:
        made = net.gemm(net.input(1, 3), 9 * WIDTH, name="maker")
        kernel = net.node("Reshape", made, net.constant(np.array([WIDTH, 1, 3, 3])))
        return net.node("Conv", h, kernel, group=WIDTH, pads=[1] * 4)

    found.append(two("computed depthwise weight", deep_dynamic, ("before",)))
    for group in (1, 2):
        for bias in (True, False):

            def transposed(net: Net, h: str, g: int = group, b: int = bias) -> str:
                return net.conv_transpose(h, 4, bias=bool(b), group=g, name="up", strides=[2, 2], output_padding=[1, 0])

            plain = between("ConvTranspose", f"groups {group}, bias {bias}", transposed)
            found.append(Example(plain.op, plain.label, plain.build, ("before", "up")))
    for filters in (1, 3):

        def deep(net: Net, h: str, m: int = filters) -> str:
            return net.conv_transpose(h, m * WIDTH, group=WIDTH, name="deep", strides=[2, 2])

        found.append(between("ConvTranspose", f"depthwise, {filters} filters", deep))
    plain = between("ConvTranspose", "1d", lambda n, h: n.conv_transpose(h, 4, name="up"), dims=(2, 5))
    found.append(Example(plain.op, plain.label, plain.build, ("before", "up")))
    return found


def _gemms() -> list[Example]:
    found = []
    for trans_a in (0, 1):
        for trans_b in (0, 1):
            for shape in ((4,), (1, 4), (3, 1), (1,), (), (3, 4), None):

                def build(net: Net, ta: int = trans_a, tb: int = trans_b, c: tuple[int, ...] | None = shape) -> None:
                    h = net.gemm(net.input(3, 5), WIDTH, name="before")
                    h = net.node("Transpose", h, perm=[1, 0]) if ta else h
                    weight = net.weight(*((4, WIDTH) if tb else (WIDTH, 4)), fan_in=WIDTH)
                    bias = [] if c is None else [net.vector(*c)]
                    y = net.node(*("Gemm", h, weight, *bias), name="inner", transA=ta, transB=tb, alpha=0.5, beta=2.0)
                    net.output(net.gemm(net.node("Relu", y), 2, name="after"))

                found.append(Example("Gemm", f"{trans_a}{trans_b} {shape}", build, ("before", "inner")))
    return found


def _matmuls() -> list[Example]:
    def right(net: Net) -> None:
        h = net.node("Relu", net.matmul(net.input(2, 3, 5), WIDTH, name="before"))
        net.output(net.matmul(h, 2, name="after"))

    def left(net: Net) -> None:
        h = net.node("MatMul", net.weight(WIDTH, 5), net.input(2, 5, 3), name="before")
        h = net.node("Relu", net.node("Add", h, net.vector(WIDTH, 1)))
        net.output(net.node("MatMul", net.weight(2, WIDTH), h, name="after"))

    def vector_first(net: Net) -> None:
        h = net.node("MatMul", net.input(5), net.weight(5, WIDTH), name="before")
        net.output(net.node("MatMul", net.node("Relu", h), net.weight(WIDTH, 2), name="after"))

    def vector_last(net: Net) -> None:
        h = net.node("MatMul", net.weight(WIDTH, 5), net.input(5), name="before")
        net.output(net.node("MatMul", net.weight(2, WIDTH), net.node("Relu", h), name="after"))

    def to_number(net: Net) -> None:
        h = net.node("MatMul", net.input(4, 5), net.weight(5, WIDTH), name="before")
        net.output(net.node("MatMul", h, net.weight(WIDTH), name="after"))

    def stack(net: Net) -> None:
        h = net.node("MatMul", net.input(3, 4, 5), net.weight(3, 5, WIDTH, fan_in=5), name="before")
        net.output(net.node("MatMul", net.node("Relu", h), net.weight(3, WIDTH, 2, fan_in=WIDTH), name="after"))

    def attention(net: Net) -> None:
        x = net.input(1, 4, 5)
        q, k, v = (net.matmul(x, WIDTH, name=name) for name in ("query", "key", "value"))
        scores = net.node("MatMul", q, net.node("Transpose", k, perm=[0, 2, 1]), name="scores")
        mixed = net.node("MatMul", net.node("Softmax", scores, axis=-1), v, name="mixed")
        net.output(net.matmul(mixed, 2, name="after"))

    def rearranged(net: Net) -> None:
        h = net.node("Relu", net.node("MatMul", net.input(3, 5), net.weight(5, WIDTH), name="before"))
        forms: dict[str, dict[str, Any]] = {"Identity": {}, "Transpose": {"perm": [1, 0]}}
        for op, extra in forms.items():
            stored = net.weight(4, net.dims(h)[1]) if op == "Transpose" else net.weight(net.dims(h)[1], 4)
            h = net.node("Relu", net.node("MatMul", h, net.node(op, stored, **extra), name=f"behind {op}"))
        net.output(net.gemm(h, 2, name="after"))

    return [
        Example("MatMul", "right", right, ("before",)),
        Example("MatMul", "left", left, ("before",)),
        Example("MatMul", "vector first", vector_first, ("before",)),
        Example("MatMul", "vector last", vector_last, ("before",)),
        Example("MatMul", "to a number", to_number, ("before",)),
        Example("MatMul", "stack", stack, ("before",)),
        Example("MatMul", "attention", attention, ("query", "value")),
        Example("MatMul", "rearranged weights", rearranged, ("before", "behind Identity", "behind Transpose")),
    ]


# Normalisation, pools, reductions -----------------------------------------------------------------------------------


def _normalisations() -> list[Example]:
    def normalised(op: str, size: int = WIDTH, **attributes: Any) -> Middle:
        return lambda net, h: net.node(op, h, net.vector(size, low=0.5, high=1.5), net.vector(size), **attributes)

    def layer(net: Net, h: str) -> str:
        h = net.node("Transpose", h, perm=[0, 2, 3, 1])
        h = net.node("LayerNormalization", h, net.vector(WIDTH, low=0.5, high=1.5), net.vector(WIDTH))
        return net.node("Transpose", h, perm=[0, 3, 1, 2])

    def group(net: Net, h: str) -> str:
        parameters = net.vector(WIDTH, low=0.5, high=1.5), net.vector(WIDTH)
        return net.node("GroupNormalization", h, *parameters, like=h, num_groups=2)

    def per_element(net: Net, h: str) -> str:
        params = [net.vector(WIDTH, 4, 4, low=0.5, high=1.5) for _ in range(4)]
        return net.node("BatchNormalization", h, *params, spatial=0)

    def softmax(op: str, axis: int) -> Middle:
        return lambda net, h: net.node(op, h, axis=axis)

    def grouped(net: Net, h: str) -> str:
        y = net.node("InstanceNormalization", net.reshape(h, 0, 2, -1), net.constant(np.ones(2)), net.vector(2))
        return net.reshape(y, 0, 6, 4, 4)

    def training(net: Net, h: str) -> str:
        params = [net.vector(WIDTH, low=0.5, high=1.5) for _ in range(4)]
        return net.many("BatchNormalization", [h, *params], 3, training_mode=1)[0]

    found = [
        between("BatchNormalization", "plain", lambda n, h: n.batch_norm(h, epsilon=1e-3)),
        between("BatchNormalization", "training", training, frozen="not in inference form"),
        between("BatchNormalization", "vectors", lambda n, h: n.batch_norm(h), dims=(3,), batch=4),
        between("BatchNormalization", "old", lambda n, h: n.batch_norm(h), opset=7),
        between("BatchNormalization", "per element", per_element, opset=8, frozen="not in inference form"),
        between("InstanceNormalization", "plain", normalised("InstanceNormalization")),
        between("InstanceNormalization", "over channels", grouped),
        between("LayerNormalization", "channels last", layer, exact=False),
        between(
            "LayerNormalization",
            "vectors",
            normalised("LayerNormalization"),
            dims=(3,),
            batch=4,
            exact=False,
        ),
        between("GroupNormalization", "plain", group, opset=21, exact=False),
        between(
            "MeanVarianceNormalization",
            "plain",
            lambda n, h: n.node("MeanVarianceNormalization", h, like=h, axes=[0, 2, 3]),
        ),
        between(
            "MeanVarianceNormalization",
            "channels",
            lambda n, h: n.node("MeanVarianceNormalization", h, like=h, axes=[1]),
            exact=False,
        ),
        between("LRN", "plain", lambda n, h: n.node("LRN", h, size=3), frozen="mixes the channels"),
        between("LpNormalization", "channels", lambda n, h: n.node("LpNormalization", h, axis=1), frozen="mixes"),
        between("LpNormalization", "space", lambda n, h: n.node("LpNormalization", h, axis=-1)),
        between(
            "RMSNormalization",
            "vectors",
            lambda n, h: n.node("RMSNormalization", h, n.vector(WIDTH, low=0.5, high=1.5)),
            opset=23,
            dims=(3,),
            batch=4,
            exact=False,
        ),
        between(
            "SimplifiedLayerNormalization",
            "vectors",
            lambda n, h: n.node("SimplifiedLayerNormalization", h, n.vector(WIDTH, low=0.5, high=1.5), like=h, axis=-1),
            dims=(3,),
            batch=4,
            exact=False,
        ),
    ]
    for op in ("Softmax", "LogSoftmax", "Hardmax"):
        found += [
            between(op, "channels", softmax(op, 1), frozen="normalises over it"),
            between(op, "space", softmax(op, -1)),
            between(op, "flattened", softmax(op, 2), opset=11),
            between(op, "flattened channels", softmax(op, 1), opset=11, frozen="normalises over it"),
        ]
    return found


def _pool(op: str, **attributes: Any) -> Middle:
    return lambda net, h: net.node(op, h, **attributes)


def _pools() -> list[Example]:
    def indices(net: Net, h: str) -> str:
        y, where = net.many("MaxPool", [h], 2, kernel_shape=[2, 2])
        return net.node("Add", y, net.node("Mul", net.node("Cast", where, to=net.dtype), net.constant(0.01)))

    found = [
        between(op, "plain", _pool(op, kernel_shape=[2, 3], strides=[2, 1], pads=[0, 1, 1, 0]))
        for op in ("MaxPool", "AveragePool", "LpPool")
    ]
    found += [between(op, "plain", _pool(op)) for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")]

    def along(op: str, **attributes: Any) -> Middle:
        def middle(net: Net, h: str) -> str:
            rows = net.node("Transpose", h, perm=[0, 3, 2, 1])
            return net.node("Transpose", net.node(op, rows, kernel_shape=[2, 1], **attributes), perm=[0, 3, 2, 1])

        return middle

    # As in the Funnel Transformer: positions are pooled, and a window of 1 goes along the channels.
    found += [between(op, "another axis", along(op, strides=[2, 1])) for op in ("MaxPool", "AveragePool")]
    found.append(between("MaxPool", "channels, in steps", along("MaxPool", strides=[2, 2]), frozen="a spatial axis of"))
    found.append(between("MaxPool", "indices", indices, frozen="depend on the number of channels"))
    for op in ("ArgMax", "ArgMin"):
        found.append(between(op, "space", _pool(op, axis=-1)))
        found.append(between(op, "channels", _pool(op, axis=1, keepdims=0), frozen="reduces over it"))
    return found


def _reductions() -> list[Example]:
    found = []
    for kind in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare"):

        def reduced(net: Net, h: str, axes: Sequence[int] | None, keep: int = 1, k: str = kind) -> str:
            return net.reduce(k, net.node("Sigmoid", h), axes, keepdims=keep)

        for opset in (12, 18):
            for axes, keep in (((2, 3), 0), ((-1,), 1)):
                space = partial(reduced, axes=axes, keep=keep)
                found.append(between(f"Reduce{kind}", f"space {axes} {keep}", space, opset=opset))
        mixed = "" if kind in {"Mean", "Max", "Min", "L1", "L2", "SumSquare"} else "reduces over it"
        channels, everything = partial(reduced, axes=[1]), partial(reduced, axes=None)
        found.append(between(f"Reduce{kind}", "channels", channels, frozen=mixed, exact=False))
        found.append(between(f"Reduce{kind}", "everything", everything, frozen=mixed, exact=False))
    return found


def _resizes() -> list[Example]:
    def resize(net: Net, h: str) -> str:
        return net.node("Resize", h, "", "", net.constant(np.array([1, WIDTH, 7, 3], INT64)))

    def resize_axes(net: Net, h: str) -> str:
        return net.node("Resize", h, "", "", net.constant(np.array([5, WIDTH, 7], INT64)), axes=[2, 1, 3])

    def table(net: Net, h: str) -> str:
        """Add a table that is resampled to the size of the map; it is larger than what is computed ahead."""
        sizes = net.constant(np.array([1, WIDTH, 4, 4], INT64))
        stored = net.weight(1, WIDTH, 32, 32, name="table")
        return net.node("Add", h, net.node("Resize", stored, "", "", sizes, mode="linear"))

    def moved_table(net: Net, h: str) -> str:
        """The same, with the channels last until then."""
        sizes = net.constant(np.array([1, WIDTH, 4, 4], INT64))
        stored = net.node("Transpose", net.weight(1, 32, 32, WIDTH, name="table"), perm=[0, 3, 1, 2])
        return net.node("Add", h, net.node("Resize", stored, "", "", sizes, mode="linear"))

    def resize_order(net: Net, h: str) -> str:
        sizes = net.constant(np.array([5, 4, WIDTH, 1], INT64))
        return net.node("Resize", h, "", "", sizes, axes=[2, 3, 1, 0])

    return [
        between("Upsample", "attribute", lambda n, h: n.upsample(h), opset=7),
        between("Upsample", "input", lambda n, h: n.upsample(h), opset=9),
        between("Resize", "first form", lambda n, h: n.upsample(h), opset=10),
        between("Resize", "scales", lambda n, h: n.upsample(h), opset=13),
        between("Resize", "sizes", resize),
        between("Resize", "table", table),
        between("Resize", "moved table", moved_table),
        between("Resize", "sizes of some axes", resize_axes, opset=18),
        between("Resize", "sizes in another order", resize_order, opset=18),
    ]


# Rearranging --------------------------------------------------------------------------------------------------------


def _computed_target(net: Net, h: str) -> str:
    """What exporters write for x.view(x.size(0), -1) with the sizes read one by one."""
    shape = net.node("Shape", h)
    sizes = []
    for axis in (0, 1):
        size = net.node("Gather", shape, net.constant(np.array(axis, INT64)), axis=0)
        sizes.append(net.unsqueeze(size, [0]))
    target = net.node("Concat", *sizes, net.constant(np.array([16], INT64)), axis=0)
    return net.node("Reshape", h, target, like=_typed(net, (1, WIDTH, 16)))


def _stated_target(net: Net, h: str) -> str:
    """A target of which the batch is read at run time and the rest is stated."""
    batch = net.slice(net.node("Shape", h), [0], [1], [0])
    target = net.node("Concat", batch, net.constant(np.array([WIDTH * 16], INT64)), axis=0)
    return net.node("Reshape", h, target, like=_typed(net, (1, WIDTH * 16)))


def _typed(net: Net, dims: Sequence[int]) -> str:
    """Name a type that shape inference of one node alone can't tell."""
    name = f"type{len(net.types)}"
    net.types[name] = onnx.helper.make_tensor_type_proto(net.dtype, dims)
    return name


def _reshapes() -> list[Example]:
    def shuffled(net: Net, h: str) -> str:
        h = net.reshape(h, 1, 2, 3, 4, 4)
        return net.reshape(net.node("Transpose", h, perm=[0, 2, 1, 3, 4]), 1, WIDTH, 4, 4)

    def last(net: Net, h: str) -> str:
        return net.node("Flatten", net.node("Transpose", h, perm=[0, 2, 3, 1]))

    def back(net: Net, h: str) -> str:
        h = net.node("Relu", net.gemm(net.node("Flatten", h), WIDTH * 4, name="wide"))
        return net.reshape(h, 1, WIDTH, 2, 2)

    found = [
        between("Reshape", "stated", lambda n, h: n.reshape(h, 1, WIDTH * 16)),
        between("Reshape", "zero and minus one", lambda n, h: n.reshape(h, 0, -1)),
        between("Reshape", "minus one and stated", lambda n, h: n.reshape(h, -1, WIDTH * 16)),
        between("Reshape", "channels kept", lambda n, h: n.reshape(h, 1, WIDTH, -1)),
        between("Reshape", "zeros", lambda n, h: n.reshape(h, 0, 0, 16)),
        between("Reshape", "computed", _computed_target),
        between("Reshape", "stated in a computation", _stated_target),
        between("Reshape", "to one row", lambda n, h: n.reshape(h, -1)),
        between("Flatten", "plain", lambda n, h: n.node("Flatten", h)),
        between("Flatten", "channels last", last),
        between("Flatten", "negative axis", lambda n, h: n.node("Flatten", h, axis=-3)),
        between(
            "Transpose",
            "perm",
            lambda n, h: n.node("Transpose", n.node("Transpose", h, perm=[0, 2, 3, 1]), perm=[0, 3, 2, 1]),
        ),
        between("Transpose", "default", lambda n, h: n.node("Transpose", n.node("Transpose", n.node("Relu", h)))),
        between("Size", "read", lambda n, h: n.node("Mul", h, n.node("Cast", n.node("Size", h), to=1))),
        between("Shape", "computed with", _scaled),
    ]
    plain = between("Reshape", "shuffle", shuffled)
    found.append(Example("Reshape", "shuffle", plain.build, ("before",), {}))
    plain = between("Reshape", "from a matrix", back)
    found.append(Example("Reshape", "from a matrix", plain.build, ("before", "wide"), {}))
    for opset in (11, 13):
        for axes in ((2, 3), (-1, -2)):

            def squeezed(net: Net, h: str, a: tuple[int, ...] = axes) -> str:
                return net.squeeze(net.node("GlobalAveragePool", h), a)

            found.append(between("Squeeze", f"axes {axes}", squeezed, opset=opset))
        found.append(between("Unsqueeze", "axes", lambda n, h: n.unsqueeze(h, [2, -1]), opset=opset, dims=(3,)))
        found.append(
            between(
                "Squeeze",
                "without axes",
                lambda n, h: n.unsqueeze(n.squeeze(n.node("GlobalAveragePool", h), None), [0]),
                opset=opset,
                frozen="Squeeze",
            )
        )
    return found


def _scaled(net: Net, h: str) -> str:
    """An attention scale: the square root of a width, read at run time."""
    size = net.node("Gather", net.node("Shape", h), net.constant(np.array(1, INT64)), axis=0)
    return net.node("Div", h, net.node("Sqrt", net.node("Cast", size, to=net.dtype)))


def _pieces() -> list[Example]:
    def concat(axis: int) -> Callable[[Net, str, str], str]:
        return lambda net, h, g: net.node("Concat", h, net.node("Relu", g), h, axis=axis)

    def split(sizes: Sequence[int] | None, axis: int, parts: int = 2) -> Middle:
        def middle(net: Net, h: str) -> str:
            pieces = net.split(h, sizes, parts, axis=axis)
            return net.node("Concat", *pieces[::-1], net.node("Relu", pieces[0]), axis=1)

        return middle

    def cut(start: int, end: int, axis: int = 1, step: int | None = None) -> Middle:
        return lambda net, h: net.slice(h, [start], [end], [axis], None if step is None else [step])

    def concatenated(label: str, middle: Callable[[Net, str, str], str]) -> Example:
        plain = pair("Concat", label, middle)
        return Example("Concat", label, plain.build, ("before", "other"))

    def pieces(op: str, label: str, middle: Middle, ranges: Sequence[str], opset: int = 17) -> Example:
        plain = between(op, label, middle, opset=opset)
        return Example(op, label, plain.build, tuple(f"before:{r}" for r in ranges), {}, opset)

    def uneven(net: Net, h: str) -> str:
        parts = net.split(h, None, 4)
        return net.node("Concat", *parts[::-1], axis=1)

    def unused(net: Net, h: str) -> str:
        return net.split(h, [2, 4], 2)[1]

    return [
        concatenated("plain", concat(1)),
        concatenated("negative axis", concat(-3)),
        between("Concat", "space", lambda n, h: n.node("Concat", h, h, axis=2)),
        pieces("Split", "even", split(None, 1), ("0-3", "3-6")),
        pieces("Split", "even, old", split(None, 1), ("0-3", "3-6"), 11),
        pieces("Split", "even, counted", split(None, -3, 3), ("0-2", "2-4", "4-6"), 18),
        pieces("Split", "stated", split([2, 4], 1), ("0-2", "2-6")),
        pieces("Split", "attribute", split([2, 4], 1), ("0-2", "2-6"), 11),
        pieces("Split", "unused part", unused, ("0-2", "2-6")),
        pieces("Split", "three", split([1, 2, 3], -3, 3), ("1-3", "3-6")),
        between("Split", "uneven", uneven, opset=18, frozen="cuts it unevenly"),
        pieces("Slice", "first", cut(0, 4), ("0-4", "4-6")),
        pieces("Slice", "last", cut(2, 2**63 - 1), ("0-2", "2-6")),
        pieces("Slice", "middle, attribute", cut(2, 4), ("0-2", "2-4", "4-6"), 9),
        pieces("Slice", "negative", cut(-4, -2), ("0-2", "2-4", "4-6")),
        pieces("Slice", "negative axis", cut(-2, 99, -3), ("0-4", "4-6")),
        between("Slice", "all of it", cut(0, 2**63 - 1)),
        between("Slice", "far before", cut(-99, 99)),
        between("Slice", "steps", cut(0, 6, 1, 2)),
        between("Slice", "steps to the end", cut(1, 2**63 - 1, 1, 3)),
        between("Slice", "steps, not to the end", cut(0, 5, 1, 2), frozen="every other"),
        between("Slice", "backwards", cut(5, -99, 1, -1), frozen="every other"),
        between("Slice", "space", cut(1, 3, 2)),
        between("Slice", "without axes", lambda n, h: n.slice(h, [0, 0, 1, 0], [1, WIDTH, 3, -1], None)),
    ]


def _pads() -> list[Example]:
    def pad(pads: Sequence[int], **more: Any) -> Middle:
        return lambda net, h: net.pad(h, pads, **more)

    def shortcut(net: Net, h: str) -> str:
        short = net.pad(net.conv(h, 4, name="short"), [0, 2, 0, 0, 0, 3, 0, 0])
        return net.node("Add", short, net.conv(h, 9, name="long"))

    def chosen(net: Net, h: str) -> str:
        pads = net.constant(np.array([1, 2, 0, 1], INT64))
        return net.node("Pad", h, pads, "", net.constant(np.array([2, 1], INT64)))

    plain = between("Pad", "option A", shortcut)
    found = [
        Example("Pad", "option A", plain.build, ("before", "short", "long:0-2", "long:6-9")),
        between("Pad", "axes", chosen, opset=18),
    ]
    for opset in (9, 13):
        found += [
            between("Pad", "space", pad([0, 0, 1, 1, 0, 0, 0, 2]), opset=opset),
            between("Pad", "channels", pad([0, 1, 0, 0, 0, 2, 1, 0], value=0.0), opset=opset),
            between("Pad", "space, reflected", pad([0, 0, 1, 1, 0, 0, 0, 2], mode="reflect"), opset=opset),
            between("Pad", "space, a value", pad([0, 0, 1, 1, 0, 0, 0, 2], value=0.5), opset=opset),
            between(
                "Pad", "channels, ones", pad([0, 1, 0, 0, 0, 0, 0, 0], value=1.0), opset=opset, frozen="than zeros"
            ),
            between(
                "Pad", "channels, edge", pad([0, 1, 0, 0, 0, 0, 0, 0], mode="edge"), opset=opset, frozen="than zeros"
            ),
            between("Pad", "fewer channels", pad([0, -1, 0, 0, 0, 0, 0, 0]), opset=opset, frozen="than zeros"),
        ]
    return found


def _expands() -> list[Example]:
    def to(*target: int) -> Middle:
        return lambda net, h: net.node(
            "Expand", net.node("GlobalAveragePool", h), net.constant(np.array(target, INT64))
        )

    def read(net: Net, h: str) -> str:
        target = net.node("Shape", h)
        return net.node("Expand", net.node("GlobalAveragePool", h), target, like=h)

    def filled(net: Net, h: str) -> str:
        value = onnx.numpy_helper.from_array(np.array([0.5], np.float32))
        return net.node("Add", h, net.node("ConstantOfShape", net.node("Shape", h), like=h, value=value))

    return [
        between("ConstantOfShape", "added", filled, exact=False),
        between("Expand", "stated", to(1, WIDTH, 4, 4)),
        between("Expand", "ones", to(1, 1, 3, 1)),
        between("Expand", "read", read),
    ]


def _indexing() -> list[Example]:
    def embedding(net: Net) -> None:
        tokens = net.input(2, 3, dtype=TensorProto.INT64)
        h = net.node("Gather", net.weight(7, WIDTH), tokens, name="before")
        net.output(net.matmul(h, 2, name="after"))

    def block(op: str, **attributes: Any) -> Middle:
        return lambda net, h: net.node(op, h, blocksize=2, **attributes)

    def tiled(*repeats: int) -> Middle:
        return lambda net, h: net.node("Tile", h, net.constant(np.array(repeats, INT64)))

    def picked(net: Net, h: str) -> str:
        return net.node("Gather", h, net.constant(np.array([0, 2, 4], INT64)), axis=1)

    def place(net: Net, h: str) -> str:
        return net.node("Gather", h, net.constant(np.array(1, INT64)), axis=-1)

    def parts(*indices: int, kind: type = INT64) -> Callable[[Net], None]:
        """Pick channels by stored indices, and read them by themselves and all together."""

        def build(net: Net) -> None:
            h = net.conv(net.input(1, 2, 4, 4), WIDTH, name="before")
            found = net.node("Gather", h, net.constant(np.array(indices, kind)), axis=1)
            net.output(net.conv(net.node("Sigmoid", found), 2, 1), net.conv(net.node("Tanh", h), 2, 1))

        return build

    return [
        Example("Gather", "embedding", embedding, ("before",)),
        between("Gather", "channels", picked, frozen="picks indices"),
        Example("Gather", "all", parts(0, 1, 2, 3, 4, 5), ("before",)),
        Example("Gather", "factors change places", parts(0, 3, 1, 4, 2, 5), ("before",)),
        Example("Gather", "runs change places", parts(4, 5, 0, 1, 2, 3), ("before:0-4", "before:4-6")),
        Example("Gather", "a part", parts(1, 2, 3, kind=np.int32), ("before:1-4", "before:4-6")),
        Example(
            "Gather", "a part twice, from the end", parts(-3, -2, -1, 0, 1, 2, 3, 4, 5), ("before:0-3", "before:3-6")
        ),
        between("Gather", "space", place),
        between("Tile", "space", tiled(1, 1, 2, 3)),
        between("Tile", "channels", tiled(1, 2, 1, 1)),
        between("DepthToSpace", "DCR", block("DepthToSpace"), width=8),
        between("DepthToSpace", "CRD", block("DepthToSpace", mode="CRD"), width=8),
        between("SpaceToDepth", "plain", block("SpaceToDepth")),
    ]


def _ones(net: Net, like: str, value: int = 1) -> str:
    """Return integers of that value, as many as a tensor has elements: computed, so no constant has their shape."""
    zeros = net.node("Cast", net.node("Mul", like, net.constant(0.0)), to=TensorProto.INT64)
    return net.node("Add", zeros, net.constant(np.array(value, INT64)))


def _gathers() -> list[Example]:
    def column(net: Net, h: str) -> str:
        """Pick places from axis 2, behind the batch and before the channels."""
        x = net.node("Transpose", h, perm=[0, 2, 3, 1])
        y = net.node("GatherND", x, net.constant(np.array([[[1], [3], [0]]], INT64)), batch_dims=1)
        return net.node("Transpose", y, perm=[0, 3, 1, 2])

    def channels(net: Net, h: str) -> str:
        return net.unsqueeze(net.node("GatherND", h, net.constant(np.array([[[0, 1], [0, 4]]], INT64))), [0])

    def table(net: Net) -> None:
        places = net.node("Cast", net.node("Abs", net.input(2, 3, 1)), to=TensorProto.INT64)
        h = net.node("GatherND", net.weight(7, WIDTH), places, name="before")
        net.output(net.matmul(h, 2, name="after"))

    def picked(axis: int) -> Middle:
        return lambda net, h: net.node("GatherElements", h, _ones(net, h), axis=axis)

    def picked_by_constant(net: Net, h: str) -> str:
        return net.node("GatherElements", h, net.constant(np.ones((1, WIDTH, 4, 4), INT64)), axis=3)

    return [
        between("GatherND", "places", column),
        between("GatherND", "channels", channels, frozen="picks indices"),
        Example("GatherND", "table", table, ("before",)),
        between("GatherElements", "space", picked(2)),
        between("GatherElements", "channels", picked(1), frozen="picks indices"),
        between("GatherElements", "stored", picked_by_constant, frozen="are stored"),
    ]


def _scatters() -> list[Example]:
    def rows(net: Net, h: str) -> str:
        """Overwrite places, channels last."""
        x = net.node("Transpose", h, perm=[0, 2, 3, 1])
        where = net.constant(np.array([[0, 1], [0, 3]], INT64))
        y = net.node("ScatterND", x, where, net.reshape(net.slice(x, [0], [2], [1]), 2, 4, -1))
        return net.node("Transpose", y, perm=[0, 3, 1, 2])

    def rows_of_constants(net: Net, h: str) -> str:
        x = net.node("Transpose", h, perm=[0, 2, 3, 1])
        where = net.constant(np.array([[0, 1], [0, 3]], INT64))
        y = net.node("ScatterND", x, where, net.vector(2, 4, WIDTH))
        return net.node("Transpose", y, perm=[0, 3, 1, 2])

    def some_channels(net: Net, h: str) -> str:
        where = net.constant(np.array([[0, 1], [0, 3]], INT64))
        return net.node("ScatterND", h, where, net.vector(2, 4, 4))

    def put(op: str, axis: int, **more: Any) -> Middle:
        return lambda net, h: net.node(op, h, _ones(net, h), net.node("Relu", h), axis=axis, **more)

    def put_few(net: Net, h: str) -> str:
        part = net.conv("x0", 3, name="few")
        return net.node("ScatterElements", h, _ones(net, part), part, axis=2)

    return [
        between("ScatterND", "places", rows),
        between("ScatterND", "constants", rows_of_constants),
        between("ScatterND", "channels", some_channels, frozen="writes to indices"),
        between("ScatterElements", "space", put("ScatterElements", -1)),
        between("ScatterElements", "sum", put("ScatterElements", 2, reduction="add"), opset=18),
        between("ScatterElements", "channels", put("ScatterElements", 1), frozen="writes to indices"),
        between("ScatterElements", "few channels", put_few, frozen="writes to indices"),
        between("Scatter", "space", put("Scatter", 3), opset=9),
    ]


def _selections() -> list[Example]:
    def along(op: str, axis: int, **more: Any) -> Middle:
        return lambda net, h: net.node(op, h, net.constant(np.array(axis, INT64)), **more)

    def top(axis: int) -> Middle:
        def middle(net: Net, h: str) -> str:
            values, places = net.many("TopK", [h, net.constant(np.array([3], INT64))], 2, axis=axis)
            return net.node("Add", values, net.node("Cast", places, to=net.dtype))

        return middle

    def reverse(net: Net, h: str) -> str:
        x = net.node("Transpose", h, perm=[0, 2, 1])
        x = net.node("ReverseSequence", x, net.constant(np.array([3], INT64)), time_axis=1, batch_axis=0)
        return net.node("Transpose", x, perm=[0, 2, 1])

    def selected(net: Net, h: str, axis: int | None = None) -> str:
        chosen = net.constant(np.array([True, False, True, True]))
        y = net.node("Compress", h, chosen, axis=axis)
        # How many are chosen, inference can't tell.
        dims = (3,) if axis is None else (*net.dims(h)[:axis], 3, *net.dims(h)[axis + 1 :])
        net.types[y] = onnx.helper.make_tensor_type_proto(net.dtype, dims)
        return net.reshape(y, 1, 1, 3, 1) if axis is None else y

    def classes(axis: int) -> Middle:
        def middle(net: Net, h: str) -> str:
            number = net.node("ArgMax", h, axis=3, keepdims=0)
            y = net.node(
                "OneHot", number, net.constant(np.array(4, INT64)), net.constant(np.array([0.2, 1.5])), axis=axis
            )
            net.types[y] = onnx.helper.make_tensor_type_proto(net.dtype, np.insert(net.dims(number), axis, 4).tolist())
            return net.node("Add", y, h)

        return middle

    def cropped(*axes: int) -> Middle:
        return lambda net, h: net.node("CenterCropPad", h, net.constant(np.array([3] * len(axes), INT64)), axes=axes)

    def eye(net: Net, h: str) -> str:
        return net.node("Add", h, net.node("EyeLike", h))

    return [
        between("CumSum", "space", along("CumSum", -1, reverse=1)),
        between("CumSum", "channels", along("CumSum", 1), frozen="sums along it"),
        between("CumProd", "space", along("CumProd", 2), opset=26),
        between("TopK", "space", top(2)),
        between("TopK", "channels", top(1), frozen="chooses along it"),
        between("ReverseSequence", "time", reverse, dims=(2, 5)),
        between("Trilu", "space", along("Trilu", 1, upper=0)),
        between("Trilu", "channels", along("Trilu", 1), dims=(3,), batch=2, frozen="keeps a triangle"),
        between("Compress", "space", lambda n, h: selected(n, h, 2)),
        between("Compress", "elements", selected, frozen="selects elements of all axes"),
        between("OneHot", "space", classes(3)),
        between("CenterCropPad", "space", cropped(2, 3), opset=18),
        between("CenterCropPad", "channels", cropped(1), opset=18, frozen="crops or pads it"),
        between("EyeLike", "vectors", eye, dims=(3,), batch=2, frozen="counts rows and columns"),
    ]


def _samplings() -> list[Example]:
    def grid(net: Net, h: str) -> str:
        return net.node("GridSample", h, net.constant(net.rng.uniform(-1, 1, (1, 3, 3, 2))), align_corners=1)

    def boxes(net: Net, h: str) -> str:
        corners = net.constant(np.array([[0.0, 0, 2, 3], [1, 1, 3, 3]]))
        numbers = net.constant(np.array([0, 0], INT64))
        return net.node("RoiAlign", h, corners, numbers, output_height=2, output_width=2, mode="avg")

    def old_boxes(net: Net, h: str) -> str:
        corners = net.constant(np.array([[0, 0.0, 0, 2, 3], [0, 1, 1, 3, 3]]))
        return net.node("MaxRoiPool", h, corners, pooled_shape=[2, 2])

    def unpool(net: Net, h: str) -> str:
        y, places = net.many("MaxPool", [h], 2, kernel_shape=[2, 2], strides=[2, 2])
        return net.node("MaxUnpool", y, places, kernel_shape=[2, 2], strides=[2, 2])

    def folded(net: Net, h: str) -> str:
        """Put blocks of 2 x 2 together: the channels are those of the picture times four."""
        sizes = (net.constant(np.array([d, d], INT64)) for d in (4, 2))
        y = net.node("Col2Im", net.reshape(h, 0, 8, 4), *sizes, strides=[2, 2])
        # Inference does not work out how many channels are left.
        net.types[y] = onnx.helper.make_tensor_type_proto(net.dtype, [1, 2, 4, 4])
        return y

    def spectrum(axis: int, opset: int) -> Middle:
        def middle(net: Net, h: str) -> str:
            x = net.unsqueeze(h, [3])
            more: list[str] = [] if opset < 20 else ["", net.constant(np.array(axis, INT64))]
            return net.node("DFT", x, *more, axis=axis if opset < 20 else None)

        return middle

    return [
        between("GridSample", "plain", grid),
        between("RoiAlign", "plain", boxes),
        between("MaxRoiPool", "plain", old_boxes),
        between("MaxUnpool", "plain", unpool, frozen="depend"),
        between("Col2Im", "plain", folded, opset=18, width=8, dims=(2, 2, 2)),
        between("DFT", "time", spectrum(2, 17), dims=(2, 4)),
        between("DFT", "input", spectrum(-2, 20), dims=(2, 4), opset=20),
        between("DFT", "channels", spectrum(1, 17), dims=(2, 4), frozen="transforms it"),
    ]


def _deformable() -> list[Example]:
    def moved(groups: int, offsets: int) -> Middle:
        def middle(net: Net, h: str) -> str:
            offset = net.conv("x0", 18 * offsets, name="offset")
            mask = net.node("Sigmoid", net.conv("x0", 9 * offsets, name="mask"))
            weight = net.weight(4, WIDTH // groups, 3, 3, name="inner_w")
            inputs = (h, weight, offset, net.vector(4), mask)
            more: dict[str, Any] = {"group": groups, "offset_group": offsets, "kernel_shape": [3, 3], "pads": [1] * 4}
            return net.node("DeformConv", *inputs, name="inner", **more)

        return middle

    def deformable(groups: int, offsets: int) -> Example:
        plain = between("DeformConv", f"groups {groups}, offsets {offsets}", moved(groups, offsets), opset=19)
        frozen = {"offset": "offsets of", "mask": "offsets of"}
        if offsets > 1:
            frozen = {
                "before#2": "groups of 'inner' (DeformConv) are kept",
                "offset": "offsets of",
                "mask": "offsets of",
            }
        return Example("DeformConv", plain.label, plain.build, ("before", "inner"), frozen, 19)

    def whole() -> Example:
        """Where the channels of an offset group have to stay, whole groups go, with their offsets."""

        def middle(net: Net, h: str) -> str:
            return moved(1, 3)(net, _competing(net, h))

        plain = between("DeformConv", "whole offset groups", middle, opset=19)
        frozen = {"before#2": "normalises over it", "offset": "offsets of", "mask": "offsets of"}
        return Example("DeformConv", plain.label, plain.build, ("before", "inner"), frozen, 19)

    return [*(deformable(*counts) for counts in ((1, 1), (1, 2), (2, 1), (2, 2))), whole()]


def _without_passage() -> list[Example]:
    """Operators that nothing passes through: what they touch is frozen, and says so."""

    def mixed(op: str, *inputs: Any, **attributes: Any) -> Middle:
        """Put what an operator makes of the channels beside them."""

        def middle(net: Net, h: str) -> str:
            y = net.node(op, h, *(net.constant(np.array(i)) for i in inputs), like=h, **attributes)
            total = net.node("ReduceSum", net.node("Cast", y, to=net.dtype), keepdims=0)
            return net.node("Add", h, total)

        return middle

    def nms(net: Net, h: str) -> str:
        scores = net.reshape(h, 1, WIDTH, -1)
        boxes = net.constant(net.rng.uniform(0, 1, (1, 16, 4)))
        limits = (net.constant(np.array([2], INT64)), net.constant(np.array([0.5], np.float32)))
        y = net.node("NonMaxSuppression", boxes, scores, *limits, like="x0")
        return net.node("Add", h, net.node("ReduceSum", net.node("Cast", y, to=net.dtype), keepdims=0))

    def counted(net: Net, h: str) -> str:
        """Count up to what is known at run time only, though it is always three."""
        last = net.node("ReduceMax", net.node("Mul", h, net.constant(0.0)), keepdims=0)
        last = net.node("Add", last, net.constant(3.0))
        y = net.node("Range", net.constant(0.0), last, net.constant(1.0), like="x0")
        return net.node("Add", h, net.node("ReduceSum", y, keepdims=0))

    reason = "depends on all of it"

    def noise(op: str) -> Middle:
        return lambda net, h: net.node("Add", h, net.node(op, shape=[WIDTH, 1, 1], seed=1.0))

    def frames(net: Net, h: str) -> str:
        x = net.reshape(h, WIDTH, 8, 1)
        y = net.node("STFT", x, net.constant(np.array(2, INT64)), net.vector(4), like="x0")
        return net.node("Add", h, net.node("ReduceSum", y, keepdims=0))

    return [
        between("NonZero", "plain", mixed("NonZero"), frozen=reason),
        between("Unique", "plain", mixed("Unique"), frozen=reason),
        between("NonMaxSuppression", "plain", nms, frozen=reason),
        between("Bernoulli", "plain", mixed("Bernoulli", seed=1.0), frozen=reason),
        between("RandomNormalLike", "plain", mixed("RandomNormalLike", seed=1.0), frozen=reason),
        between("RandomUniformLike", "plain", mixed("RandomUniformLike", seed=1.0), frozen=reason),
        between("Det", "plain", mixed("Det"), frozen=reason),
        between("Range", "plain", counted),
        between("Multinomial", "plain", mixed("Multinomial", seed=1.0), frozen=reason, dims=(3,), batch=2),
        between("STFT", "plain", frames, frozen=reason, dims=(2, 8)),
        *(between(op, "plain", noise(op), frozen=reason) for op in ("RandomNormal", "RandomUniform")),
    ]


def _einsums() -> list[Example]:
    def einsum(net: Net, equation: str, *inputs: str, name: str = "") -> str:
        return net.node("Einsum", *inputs, equation=equation, name=name)

    def products(net: Net) -> None:
        h = einsum(net, "btc, cd -> btd", net.input(1, 3, 5), net.weight(5, WIDTH), name="before")
        net.output(einsum(net, "btd,od->bto", net.node("Relu", h), net.weight(2, WIDTH), name="after"))

    def scores(net: Net) -> None:
        x = net.input(1, 3, 5)
        q, k = (net.matmul(x, WIDTH, name=name) for name in ("before", "other"))
        net.output(einsum(net, "bid,bjd->bij", q, k))

    def scaled(net: Net) -> None:
        h = net.matmul(net.input(1, 3, 5), WIDTH, name="before")
        net.output(net.matmul(einsum(net, "btd,d->btd", h, net.vector(WIDTH, low=0.5, high=1.5)), 2, name="after"))

    def spread(net: Net) -> None:
        """Products whose other axes have no letter, one of them repeated."""
        h = einsum(net, "...c,cd->...d", net.input(2, 1, 3, 5), net.weight(5, WIDTH), name="before")
        h = einsum(net, "...d,...d->...d", net.node("Relu", h), net.vector(1, 4, 3, WIDTH, low=0.5, high=1.5))
        net.output(einsum(net, "od, ...d -> ...o", net.weight(2, WIDTH), h, name="after"))

    def implicit(net: Net) -> None:
        """Outputs that are left out: what occurs once, in the order of the alphabet."""
        h = einsum(net, "ac,cd", net.input(3, 5), net.weight(5, WIDTH), name="before")
        h = einsum(net, "zd", net.node("Relu", h))
        net.output(einsum(net, "da,do", h, net.weight(WIDTH, 2), name="after"))

    def diagonal(net: Net, h: str) -> str:
        return net.node("Einsum", h, net.constant(np.ones((WIDTH, WIDTH))), equation="nchw,cc->nchw")

    def summed(net: Net, h: str) -> str:
        return net.node("Einsum", h, equation="nchw->nhw")

    return [
        Example("Einsum", "products", products, ("before",), opset=17),
        Example("Einsum", "scores", scores, ("before",)),
        Example("Einsum", "scaled", scaled, ("before",)),
        Example("Einsum", "ellipsis", spread, ("before",)),
        Example("Einsum", "implicit", implicit, ("before",)),
        between("Einsum", "diagonal", diagonal, frozen="repeats a letter"),
        between("Einsum", "summed", summed, frozen="sums over it"),
    ]


def _recurrent() -> list[Example]:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}
    found = []
    for op, count in gates.items():
        for both in (False, True):

            def build(net: Net, o: str = op, g: int = count, two: int = both) -> None:
                d, h = 1 + two, 4
                x = net.matmul(net.input(3, 1, 2), WIDTH, name="before")
                weights = [
                    net.weight(d, g * h, WIDTH, fan_in=WIDTH),
                    net.weight(d, g * h, h, fan_in=h),
                    net.vector(d, 2 * g * h),
                ]
                if two:
                    weights += [
                        "",
                        net.vector(d, 1, h),
                        *([net.vector(d, 1, h), net.vector(d, 3 * h)] if g == 4 else []),
                    ]
                direction = "bidirectional" if two else "forward"
                y = net.many(o, [x, *weights], 2, name="cells", hidden_size=h, direction=direction)[0]
                y = net.node("Transpose", y, perm=[0, 2, 1, 3])
                net.output(net.matmul(net.reshape(y, 0, 0, -1), 2, name="after"))

            found.append(Example(op, "both ways" if both else "forward", build, ("before", "cells"), opset=14))
    return found


def _quantised() -> list[Example]:
    def activations(net: Net, h: str) -> str:
        scale, zero = net.constant(0.02), net.constant(np.array(3, np.int8))
        return net.node("DequantizeLinear", net.node("QuantizeLinear", h, scale, zero), scale, zero)

    def per_channel(net: Net, h: str) -> str:
        scale, zero = net.vector(WIDTH, low=0.01, high=0.02), net.constant(np.zeros(WIDTH, np.int8))
        y = net.node("QuantizeLinear", h, scale, zero, axis=1)
        return net.node("DequantizeLinear", y, scale, zero, axis=1)

    return [
        between("QuantizeLinear", "whole", activations),
        between("DequantizeLinear", "whole", activations),
        between("QuantizeLinear", "per channel", per_channel, frozen="scales per block, or per channel"),
        between("DequantizeLinear", "per channel", per_channel, frozen="scales per block, or per channel"),
    ]


# ONNX Runtime's own operators ------------------------------------------------------------------------------------


def _own(net: Net, op: str, *inputs: str, like: str, name: str = "", **attributes: Any) -> str:
    net.domains[OWN] = 1
    return net.node(op, *inputs, domain=OWN, like=like, name=name, **attributes)


def _activations_of_its_own() -> list[Example]:
    def plain(op: str) -> Middle:
        return lambda net, h: _own(net, op, h, like=h)

    def biased(op: str) -> Middle:
        return lambda net, h: _own(net, op, h, net.vector(WIDTH), like=h)

    found = [between(op, "own", plain(op)) for op in ("Gelu", "QuickGelu", "FastGelu", "ScaledSiLU")]
    found += [between(op, "bias", biased(op), dims=(3,), batch=2) for op in ("BiasGelu", "FastGelu")]
    return found


def _layers_of_its_own() -> list[Example]:
    def fused_conv(net: Net, h: str) -> str:
        inputs = (h, net.weight(WIDTH, WIDTH, 1, 1), net.vector(WIDTH), h)
        return _own(net, "FusedConv", *inputs, like=h, activation="Relu")

    def fused_gemm(net: Net, h: str) -> str:
        inputs = (h, net.weight(WIDTH, WIDTH), net.vector(WIDTH))
        return _own(net, "FusedGemm", *inputs, like=h, activation="Relu", transB=1, name="inner")

    def matmul(op: str) -> Middle:
        def middle(net: Net, h: str) -> str:
            stored = net.weight(WIDTH, WIDTH)
            return _own(net, op, h, stored, like=h, transB=1, alpha=0.5, name="inner")

        return middle

    def skip(net: Net, h: str) -> str:
        names = [net.vector(WIDTH, low=0.5, high=1.5), net.vector(WIDTH), net.vector(WIDTH)]
        skipped = net.matmul("x0", WIDTH, name="other")
        return _own(net, "SkipLayerNormalization", h, skipped, *names, like=h)

    def skip_simple(net: Net, h: str) -> str:
        skipped = net.matmul("x0", WIDTH, name="other")
        parameters = (net.vector(WIDTH, low=0.5, high=1.5), net.vector(WIDTH))
        return _own(net, "SkipSimplifiedLayerNormalization", h, skipped, *parameters, like=h)

    def sequence(op: str, middle: Middle, **more: Any) -> Example:
        def build(net: Net) -> None:
            h = net.matmul(net.input(1, 4, 5), WIDTH, name="before")
            net.output(net.matmul(middle(net, h), 2, name="after"))

        return Example(op, "own", build, ("before",), exact=False, **more)

    def rows(op: str, label: str, middle: Middle, free: tuple[str, ...]) -> Example:
        return Example(op, label, between(op, label, middle, dims=(3,), batch=2).build, free)

    return [
        between("FusedConv", "sum", fused_conv),
        rows("FusedGemm", "own", fused_gemm, ("before", "inner")),
        rows("FusedMatMul", "own", matmul("FusedMatMul"), ("before", "inner")),
        rows("TransposeMatMul", "own", matmul("TransposeMatMul"), ("before", "inner")),
        sequence("SkipLayerNormalization", skip),
        sequence("SkipSimplifiedLayerNormalization", skip_simple),
    ]


def _turned(trans_a: int, trans_b: int, net: Net) -> None:
    """Multiply queries and keys, the first axis of which is exchanged with the heads, as attention does."""
    x = net.input(4, 2, 5)
    made = [net.reshape(net.matmul(x, 6, name=name), 4, 2, 2, 3) for name in ("queries", "keys")]
    # (positions, batch, heads, size), or the matrix in it transposed.
    queries = net.node("Transpose", made[0], perm=[3, 1, 2, 0]) if trans_a else made[0]
    keys = made[1] if trans_b else net.node("Transpose", made[1], perm=[3, 1, 2, 0])
    like = _typed(net, (2, 2, 4, 4))
    flags: dict[str, Any] = {"transBatchA": 1, "transBatchB": 1, "transA": trans_a, "transB": trans_b}
    scores = _own(net, "FusedMatMul", queries, keys, like=like, alpha=0.5, **flags)
    values = net.reshape(net.matmul(x, 6, name="values"), 4, 2, 2, 3)
    y = net.node("MatMul", scores, net.node("Transpose", values, perm=[1, 2, 0, 3]))
    y = net.reshape(net.node("Transpose", y, perm=[2, 0, 1, 3]), 4, 2, 6)
    net.output(net.matmul(y, 2, name="after"))


def _turned_products() -> list[Example]:
    free = ("queries", "queries#2", "values")
    return [
        Example("FusedMatMul", f"turned {a} {b}", partial(_turned, a, b), free, exact=False)
        for a in (0, 1)
        for b in (0, 1)
    ]


def _projected(net: Net, width: int, *names: str) -> list[str]:
    """Make values of that width from one input of 4 positions, a layer for each name."""
    x = net.input(1, 4, 5)
    return [net.matmul(x, width, name=name, bias=False) for name in names]


def _tables(net: Net, pairs: int, rows: int = 6) -> tuple[str, str]:
    """Add tables of cosines and sines for rotary positions."""
    angles = net.rng.uniform(0, 3, (rows, pairs))
    return net.constant(np.cos(angles)), net.constant(np.sin(angles))


def _rearranged_by_its_own() -> list[Example]:
    def plain(op: str, *dims: int, **attributes: Any) -> Callable[..., Middle]:
        """Return an operator that takes the channels and constants, and has a result of that shape."""

        def with_constants(*constants: Any) -> Middle:
            def middle(net: Net, h: str) -> str:
                given = (net.constant(np.asarray(c)) for c in constants)
                return _own(net, op, h, *given, like=_typed(net, dims or net.dims(h)), **attributes)

            return middle

        return with_constants

    def embedding(net: Net) -> None:
        words = net.input(1, 4, dtype=TensorProto.INT32)
        segments = net.input(1, 4, dtype=TensorProto.INT32)
        tables = (net.vector(7, WIDTH), net.vector(5, WIDTH), net.vector(2, WIDTH))
        inputs = (words, segments, *tables, net.vector(WIDTH, low=0.5, high=1.5), net.vector(WIDTH))
        net.domains[OWN] = 1
        made = {"like": _typed(net, (1, 4, WIDTH)), "name": "before", "domain": OWN}
        h, count = net.many("EmbedLayerNormalization", inputs, 2, **made)
        net.types[count] = onnx.helper.make_tensor_type_proto(TensorProto.INT32, [1])
        net.output(net.matmul(h, 2, name="after"))

    def expanded(net: Net, h: str) -> str:
        y = plain("ExpandDims", 1, 1, WIDTH, 4, 4)(np.array(1, np.int32))(net, h)
        return net.squeeze(y, [1])

    def banned(net: Net, h: str) -> str:
        tokens = net.constant(np.array([[1, 2, 1], [0, 3, 3]], INT64))
        return _own(net, "NGramRepeatBlock", tokens, h, like=h, ngram_size=2)

    def unique(net: Net, h: str) -> str:
        net.domains[OWN] = 1
        flat = net.reshape(h, -1)
        y = net.many("Unique", [flat], 3, domain=OWN, like=flat)[0]
        return net.node("Add", h, net.node("ReduceSum", y, keepdims=0))

    boxes = np.array([[0.0, 0.0, 0.7, 0.9], [0.1, 0.1, 0.8, 0.6]])
    grid = np.linspace(-1, 1, 18).reshape(1, 3, 3, 2)
    rows = plain("GatherND", 1, 4, 4)(np.array([[0, 1]], INT64))
    crop = (boxes, np.array([0, 0], np.int32), np.array([3, 2], np.int32))
    return [
        Example("EmbedLayerNormalization", "own", embedding, ("before",), exact=False),
        between("ExpandDims", "own", expanded),
        between("Pad", "own", plain("Pad", 1, WIDTH, 6, 5)(np.array([0, 0, 1, 0, 0, 0, 1, 1], INT64))),
        between("GatherND", "own", lambda n, h: n.unsqueeze(rows(n, h), [0]), frozen="picks indices"),
        between("Trilu", "own", plain("Trilu")()),
        between("GridSample", "own", plain("GridSample", 1, WIDTH, 3, 3)(grid)),
        between("CropAndResize", "own", plain("CropAndResize", 2, WIDTH, 3, 2)(*crop)),
        between("Inverse", "own", plain("Inverse")()),
        between("Unique", "own", unique, frozen="depends on all of it"),
        between("NGramRepeatBlock", "own", banned, dims=(3,), batch=2, frozen="depends on all of it"),
    ]


def _attentions() -> list[Example]:
    def attention(net: Net) -> None:
        h = net.matmul(net.input(1, 4, 5), WIDTH, name="before")
        inputs = (h, net.weight(WIDTH, 3 * 8, fan_in=WIDTH), net.vector(3 * 8))
        y = _own(net, "Attention", *inputs, like=_typed(net, (1, 4, 8)), num_heads=2, scale=0.5, name="scores")
        net.output(net.matmul(y, 2, name="after"))

    def uneven(net: Net) -> None:
        h = net.matmul(net.input(1, 4, 5), WIDTH, name="before")
        mask = net.constant(np.array([[1, 1, 1, 0]], np.int32))
        bias = net.vector(1, 3, 4, 4)
        inputs = (h, net.weight(WIDTH, 12 + 12 + 15, fan_in=WIDTH), net.vector(39), mask, "", bias)
        sizes, like = [12, 12, 15], _typed(net, (1, 4, 15))
        y = _own(net, "Attention", *inputs, like=like, num_heads=3, qkv_hidden_sizes=sizes, name="scores")
        net.output(net.matmul(y, 2, name="after"))

    def heads(net: Net) -> None:
        q, k, v = _projected(net, 8, "query", "key", "value")
        y = _own(net, "MultiHeadAttention", q, k, v, net.vector(24), like=q, num_heads=2, scale=0.5, name="scores")
        net.output(net.matmul(y, 2, name="after"))

    def unscaled(net: Net) -> None:
        q, k, v = _projected(net, 8, "query", "key", "value")
        mask, bias = net.constant(np.array([[1, 1, 0, 1]], np.int32)), net.vector(1, 2, 4, 4)
        y = _own(net, "MultiHeadAttention", q, k, v, "", mask, bias, like=q, num_heads=2, name="scores")
        net.output(net.matmul(y, 2, name="after"))

    def grouped(net: Net) -> None:
        (q,) = _projected(net, 128, "query")
        k, v = (net.matmul("x0", 64, name=name) for name in ("key", "value"))
        cos, sin = _tables(net, 16)
        lengths = [net.constant(np.array([3], np.int32)), net.constant(np.array(4, np.int32))]
        inputs = (q, k, v, "", "", *lengths, cos, sin)
        numbers: dict[str, Any] = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1}
        net.output(net.matmul(_own(net, "GroupQueryAttention", *inputs, like=q, name="scores", **numbers), 2))

    def all_in_one(net: Net, size: int = 24) -> None:
        (qkv,) = _projected(net, size * (6 + 2 + 2), "before")
        lengths = [net.constant(np.array([3], np.int32)), net.constant(np.array(4, np.int32))]
        like = _typed(net, (1, 4, 6 * size))
        inputs = (qkv, "", "", "", "", *lengths)
        y = _own(net, "GroupQueryAttention", *inputs, like=like, num_heads=6, kv_num_heads=2, name="scores")
        net.output(net.matmul(y, 2, name="after"))

    def rotary(net: Net, **more: Any) -> None:
        places = net.constant(np.array([[0, 1, 2, 3]], INT64))
        pairs = more.get("rotary_embedding_dim", 8) // 2
        cos, sin = _tables(net, pairs)
        q, k = _projected(net, 16, "query", "key")
        q, k = (_own(net, "RotaryEmbedding", x, places, cos, sin, like=q, **more) for x in (q, k))
        v = net.matmul("x0", 16, name="value")
        net.output(net.matmul(_own(net, "MultiHeadAttention", q, k, v, like=q, num_heads=2, name="scores"), 2))

    turned, parts = ("query", "query#2", "value"), ("query:0-16", "query:0-12", "query:4-16", "value")
    return [
        Example("Attention", "own", attention, ("before", "scores", "scores#2")),
        Example("Attention", "uneven", uneven, ("before", "scores:0-39", "scores:0-24", "scores:24-39")),
        Example("MultiHeadAttention", "own", heads, ("query", "query#2", "value")),
        Example("MultiHeadAttention", "unscaled", unscaled, ("query", "query#2", "value")),
        Example("GroupQueryAttention", "rotary", grouped, ("query", "query#2", "query#3")),
        Example("GroupQueryAttention", "packed", all_in_one, ("before:0-240", "before:0-144", "before:0-240#2")),
        Example("RotaryEmbedding", "halves", rotary, turned),
        Example("RotaryEmbedding", "interleaved", partial(rotary, interleaved=1), turned),
        Example("RotaryEmbedding", "part", partial(rotary, rotary_embedding_dim=4, num_heads=2), parts),
    ]


def _standard_attentions() -> list[Example]:
    def flat(net: Net) -> None:
        q, k = _projected(net, 16, "query", "key")
        mask = net.vector(1, 4, 4, 4)
        v = net.matmul("x0", 24, name="value")
        like = _typed(net, (1, 4, 24))
        y = net.node("Attention", q, k, v, mask, like=like, q_num_heads=4, kv_num_heads=4, name="scores")
        net.output(net.matmul(y, 2, name="after"))

    def apart(net: Net) -> None:
        (q,) = _projected(net, 24, "query")
        k, v = (net.matmul("x0", 12, name=name) for name in ("key", "value"))
        q, k, v = (net.node("Transpose", net.reshape(x, 1, 4, -1, 4), perm=[0, 2, 1, 3]) for x in (q, k, v))
        cos, sin = (net.constant(net.values[name][None, :4]) for name in _tables(net, 2))
        q, k = (net.node("RotaryEmbedding", x, cos, sin, like=x) for x in (q, k))
        y = net.node("Transpose", net.node("Attention", q, k, v, like=q, name="scores"), perm=[0, 2, 1, 3])
        net.output(net.matmul(net.reshape(y, 1, 4, 24), 2, name="after"))

    def rotary(net: Net) -> None:
        places = net.constant(np.array([[0, 1, 2, 3]], INT64))
        q, k = _projected(net, 24, "query", "key")
        numbers: dict[str, Any] = {"num_heads": 3, "rotary_embedding_dim": 6, "interleaved": 1}
        q, k = (net.node("RotaryEmbedding", x, *_tables(net, 3), places, like=x, **numbers) for x in (q, k))
        v = net.matmul("x0", 12, name="value")
        y = net.node("Attention", q, k, v, like=v, q_num_heads=3, kv_num_heads=3, scale=0.4)
        net.output(net.matmul(y, 2, name="after"))

    found = [
        Example("Attention", "flat", flat, ("query", "query#2", "value")),
        Example("Attention", "apart", apart, ("query", "query#2", "query#3", "value")),
        Example("RotaryEmbedding", "part", rotary, ("query:0-24", "query:0-22", "query:6-24", "value")),
    ]
    return [replace(example, opset=23) for example in found]


OWN = "com.microsoft"
_OF_ITS_OWN = (
    *_activations_of_its_own(),
    *_layers_of_its_own(),
    *_turned_products(),
    *_rearranged_by_its_own(),
    *_attentions(),
)

EXAMPLES: tuple[Example, ...] = (
    *_unary(),
    *_broadcasting(),
    *_cast_like(),
    *_experiments(),
    *_convolutions(),
    *_gemms(),
    *_matmuls(),
    *_normalisations(),
    *_pools(),
    *_reductions(),
    *_resizes(),
    *_reshapes(),
    *_pieces(),
    *_pads(),
    *_expands(),
    *_indexing(),
    *_gathers(),
    *_scatters(),
    *_samplings(),
    *_deformable(),
    *_without_passage(),
    *_selections(),
    *_einsums(),
    *_recurrent(),
    *_quantised(),
    *_standard_attentions(),
    *(replace(example, domain=OWN) for example in _OF_ITS_OWN),
)
