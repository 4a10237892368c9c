"""Networks of every family that people deploy, in the nodes that exporters write for them; random weights, small.

The first ones are those that other tools were tried on at half of all channels, and ``peer`` is the share of the
parameters that the best of these tools removed; where every tool failed, more than 40 % are asked for. Every builder
takes a number that all widths are divided by: the network with half of every width says how much there is to remove.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from onnx import TensorProto, helper

from tests.builders import Net

__all__ = ["FAMILIES", "Family"]

Build: TypeAlias = Callable[[Net, int], None]
Block: TypeAlias = Callable[[Net, str, int, int], str]
SIDE = 16
CLASSES = 10
STEPS = 6
VOCABULARY = 60


@dataclass(frozen=True)
class Family:
    """A kind of network.

    Attributes:
        build: Writes it; all widths are divided by the second argument.
        peer: Share of the parameters that the best other tool removes at half of all channels.
        opset: Version of the operator set.
    """

    build: Build
    peer: float = 0.4
    opset: int = 17

    def net(self, divisor: int = 1) -> Net:
        """Write the network anew."""
        net = Net(self.opset, seed=11)
        self.build(net, divisor)
        return net


# Parts --------------------------------------------------------------------------------------------------------------


def image(net: Net) -> str:
    """Add an input of images."""
    return net.input(2, 3, SIDE, SIDE, batch="N")


def norm(net: Net, x: str, *, loud: float = 1.0) -> str:
    """Add a batch normalisation with numbers of its own for every channel."""
    c = net.channels(x)
    parameters = (
        net.vector(c, low=0.5 * loud, high=1.5 * loud),
        net.vector(c, low=-0.3, high=0.3),
        net.vector(c, low=-0.3, high=0.3),
        net.vector(c, low=0.5, high=1.5),
    )
    return net.batch_norm(x, parameters=parameters)


def act(net: Net, x: str, kind: str = "Relu") -> str:
    """Add an activation, spelled out where exporters spell it out."""
    match kind:
        case "":
            return x
        case "SiLU":
            return net.node("Mul", x, net.node("Sigmoid", x))
        case "GELU":
            half = net.node("Erf", net.node("Div", x, net.constant(2.0**0.5)))
            bent = net.node("Mul", x, net.node("Add", half, net.constant(1.0)))
            return net.node("Mul", bent, net.constant(0.5))
        case "Relu6":
            return net.clip(x, 0.0, 6.0)
        case _:
            return net.node(kind, x)


def conv(net: Net, x: str, width: int, kernel: int = 3, stride: int = 1, *, groups: int = 1, bias: bool = True) -> str:
    """Add a convolution that keeps the size, or divides it by the stride."""
    pads = [kernel // 2] * 4
    return net.conv(x, width, kernel, bias=bias, group=groups, strides=[stride] * 2, pads=pads)


def layer(
    net: Net, x: str, width: int, kernel: int = 3, stride: int = 1, *, groups: int = 1, kind: str = "Relu"
) -> str:
    """Add a convolution, a normalisation and an activation; quieter without, as it ends in a sum then."""
    y = norm(net, conv(net, x, width, kernel, stride, groups=groups, bias=False), loud=1.0 if kind else 0.5)
    return act(net, y, kind)


def pool(net: Net, x: str) -> str:
    """Halve the resolution."""
    return net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])


def head(net: Net, x: str) -> None:
    """End with the mean over all places and a classifier."""
    net.output(net.gemm(net.node("Flatten", net.node("GlobalAveragePool", x)), CLASSES, transB=1))


def basic(net: Net, x: str, width: int, stride: int) -> str:
    """Add a residual block, with a projection where the shape changes."""
    y = layer(net, layer(net, x, width, 3, stride), width, kind="")
    same = stride == 1 and net.channels(x) == width
    return net.node("Relu", net.node("Add", y, x if same else layer(net, x, width, 1, stride, kind="")))


def stages(net: Net, x: str, widths: Sequence[int], depth: int, block: Block) -> str:
    """Add the stages of a residual network; all but the first halve the resolution."""
    for i, width in enumerate(widths):
        for j in range(depth):
            x = block(net, x, width, 2 if i and not j else 1)
    return x


def linear(net: Net, x: str, width: int, *, bias: bool = True) -> str:
    """Add a product with a constant, as exporters write a linear layer on sequences."""
    return net.matmul(x, width, bias=bias)


# Convolutional networks ---------------------------------------------------------------------------------------------


def resnet(widths: Sequence[int], depth: int) -> Build:
    """Return a builder of residual networks."""

    def build(net: Net, s: int) -> None:
        w = [width // s for width in widths]
        head(net, stages(net, layer(net, image(net), w[0]), w, depth, basic))

    return build


def untrained(net: Net, s: int) -> None:
    """ResNet whose normalisations are as they start, so that exporters store one tensor of ones for all of them."""

    def same(x: str) -> str:
        c = net.channels(x)
        names = {word: f"{word}_{c}" for word in ("ones", "zeros")}
        for word, value in (("ones", 1.0), ("zeros", 0.0)):
            if names[word] not in net.values:
                net.constant(np.full(c, value), name=names[word])
        return net.batch_norm(x, parameters=(names["ones"], names["zeros"], names["zeros"], names["ones"]))

    def block(n: Net, x: str, width: int, stride: int) -> str:
        y = n.node("Relu", same(conv(n, x, width, 3, stride, bias=False)))
        y = same(conv(n, y, width, bias=False))
        is_same = stride == 1 and n.channels(x) == width
        return n.node("Relu", n.node("Add", y, x if is_same else same(conv(n, x, width, 1, stride, bias=False))))

    w = [16 // s, 32 // s, 64 // s]
    x = net.node("Relu", same(conv(net, image(net), w[0], bias=False)))
    head(net, stages(net, x, w, 2, block))


def vgg(net: Net, s: int) -> None:
    """VGG with normalisations, down to one place."""
    x = image(net)
    for width in (16, 32, 64, 64):
        x = pool(net, layer(net, layer(net, x, width // s), width // s))
    net.output(net.gemm(net.node("Flatten", x), CLASSES, transB=1))


def vgg_flatten(net: Net, s: int) -> None:
    """VGG whose Flatten sees 4 x 4 places."""
    x = image(net)
    for width in (16, 32):
        x = pool(net, act(net, conv(net, act(net, conv(net, x, width // s)), width // s)))
    x = net.node("Relu", net.gemm(net.node("Flatten", x), 128 // s, transB=1))
    net.output(net.gemm(x, CLASSES, transB=1))


def mlp(net: Net, s: int) -> None:
    """Three linear layers."""
    x = net.node("Flatten", image(net))
    for width in (96, 64):
        x = net.node("Relu", net.gemm(x, width // s, transB=1))
    net.output(net.gemm(x, CLASSES, transB=1))


def gate(net: Net, x: str, reduced: int, kind: str = "Sigmoid") -> str:
    """Scale every channel by what the means of all channels say."""
    y = act(net, conv(net, net.node("GlobalAveragePool", x), reduced, 1))
    return net.node("Mul", x, net.node(kind, conv(net, y, net.channels(x), 1)))


def inverted(kind: str, *, gated: bool) -> Block:
    """Return a block with a depthwise convolution between two 1 x 1 ones, and no activation at its end."""

    def block(net: Net, x: str, width: int, stride: int) -> str:
        wide = 4 * net.channels(x)
        y = layer(net, layer(net, x, wide, 1, kind=kind), wide, 3, stride, groups=wide, kind=kind)
        y = gate(net, y, wide // 4, "HardSigmoid" if kind == "HardSwish" else "Sigmoid") if gated else y
        y = layer(net, y, width, 1, kind="")
        return net.node("Add", x, y) if stride == 1 and net.channels(x) == width else y

    return block


def mobilenet(kind: str, *, gated: bool) -> Build:
    """Return a builder of networks of inverted residual blocks."""

    def build(net: Net, s: int) -> None:
        w = [16 // s, 32 // s, 64 // s]
        x = stages(net, layer(net, image(net), w[0], kind=kind), w, 2, inverted(kind, gated=gated))
        head(net, layer(net, x, 128 // s, 1, kind=kind))

    return build


def multiplied(net: Net, s: int) -> None:
    """Depthwise convolutions with two filters for every channel, and depthwise ones back up, as for segmentation."""
    x = layer(net, image(net), 16 // s)
    for stride in (1, 2):
        c = net.channels(x)
        x = layer(net, layer(net, x, 2 * c, 3, stride, groups=c), 2 * c, 1)
    c = net.channels(x)
    x = norm(net, net.conv_transpose(x, c, 4, group=c, strides=[2, 2], pads=[1] * 4))
    head(net, layer(net, net.node("Relu", x), 64 // s, 1))


def densenet(net: Net, s: int) -> None:
    """Dense blocks: normalisations before the convolutions, over all that has been put side by side."""
    growth = 12 // s
    x = conv(net, image(net), 2 * growth, bias=False)
    for stage in range(3):
        for _ in range(3):
            y = conv(net, net.node("Relu", norm(net, x)), 4 * growth, 1, bias=False)
            y = conv(net, net.node("Relu", norm(net, y)), growth, bias=False)
            x = net.node("Concat", x, y, axis=1)
        if stage < 2:
            x = conv(net, net.node("Relu", norm(net, x)), net.channels(x) // 2, 1, bias=False)
            x = net.node("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
    head(net, net.node("Relu", norm(net, x)))


def bottleneck(groups: int, *, gated: bool) -> Block:
    """Return a block around a grouped convolution."""

    def block(net: Net, x: str, width: int, stride: int) -> str:
        y = layer(net, layer(net, x, width, 1), width, 3, stride, groups=groups)
        y = gate(net, y, width // 4) if gated else y
        y = layer(net, y, width, 1, kind="")
        same = stride == 1 and net.channels(x) == width
        return net.node("Relu", net.node("Add", y, x if same else layer(net, x, width, 1, stride, kind="")))

    return block


def grouped(groups: int, widths: Sequence[int], *, gated: bool) -> Build:
    """Return a builder of ResNeXt and RegNet."""

    def build(net: Net, s: int) -> None:
        w = [width // s for width in widths]
        head(net, stages(net, layer(net, image(net), w[0]), w, 2, bottleneck(groups, gated=gated)))

    return build


def shuffled(net: Net, x: str) -> str:
    """Mix the channels of two groups, as ShuffleNet does."""
    c, height, width = net.dims(x)[1:]
    y = net.node("Transpose", net.reshape(x, 0, 2, c // 2, height, width), perm=[0, 2, 1, 3, 4])
    return net.reshape(y, 0, -1, height, width)


def shuffle_unit(net: Net, x: str, width: int, stride: int) -> str:
    """Let half of the channels pass by, or halve the resolution in two branches; then shuffle."""
    half = width // 2
    aside, y = net.split(x, None, 2) if stride == 1 else (x, x)
    if stride > 1:
        aside = layer(net, aside, net.channels(x), 3, 2, groups=net.channels(x), kind="")
        aside = layer(net, aside, half, 1)
    y = layer(net, layer(net, y, half, 1), half, 3, stride, groups=half, kind="")
    return shuffled(net, net.node("Concat", aside, layer(net, y, half, 1), axis=1))


def shufflenet(net: Net, s: int) -> None:
    """ShuffleNetV2."""
    w = [24 // s, 48 // s, 96 // s]
    x = stages(net, layer(net, image(net), w[0]), w, 3, shuffle_unit)
    head(net, layer(net, x, 128 // s, 1))


def uneven(net: Net, s: int) -> None:
    """48 and 16 of 64 channels go different ways and come together again."""
    a, b = 48 // s, 16 // s
    left, right = net.split(layer(net, image(net), a + b), [a, b], 2)
    x = net.node("Concat", layer(net, left, a), layer(net, right, b), axis=1)
    head(net, layer(net, x, 32 // s))


def double(net: Net, x: str, width: int) -> str:
    """Add two convolutions, the first with InstanceNormalization and PRelu."""
    y = conv(net, x, width)
    y = net.node("InstanceNormalization", y, net.vector(width, low=0.5, high=1.5), net.vector(width))
    y = net.node("PRelu", y, net.vector(width, 1, 1, low=0.1, high=0.4))
    return net.node("LeakyRelu", conv(net, y, width), alpha=0.1)


def unet(*ups: str) -> Build:
    """Return a builder of U-Nets, given how each of the stages comes up again."""

    def up(net: Net, x: str, width: int, how: str) -> str:
        match how:
            case "transposed":
                return net.conv_transpose(x, width, 2, strides=[2, 2])
            case "shuffle":
                return net.node("DepthToSpace", conv(net, x, 4 * width, 1), blocksize=2, mode="CRD")
            case _:
                scales = net.constant(np.array([1, 1, 2, 2], np.float32))
                more = {"coordinate_transformation_mode": "half_pixel"} if how == "linear" else {}
                return net.node("Resize", x, "", scales, mode=how, **more)

    def build(net: Net, s: int) -> None:
        widths = [8 // s * 2**i for i in range(len(ups) + 1)]
        x, seen = image(net), []
        for width in widths[:-1]:
            seen.append(double(net, x, width))
            x = pool(net, seen[-1])
        x = double(net, x, widths[-1])
        for how, aside, width in zip(ups, seen[::-1], widths[-2::-1], strict=True):
            x = double(net, net.node("Concat", up(net, x, width, how), aside, axis=1), width)
        net.output(conv(net, x, 2, 1))

    return build


def group_normalised(net: Net, x: str, *, groups: int = 4) -> str:
    """Add a group normalisation as exporters write it: instance normalisation of the groups, scale and shift."""
    c, height, width = net.dims(x)[1:]
    y = net.reshape(x, 0, groups, -1)
    y = net.node("InstanceNormalization", y, net.constant(np.ones(groups)), net.constant(np.zeros(groups)))
    y = net.reshape(y, 0, c, height, width)
    y = net.node("Mul", y, net.vector(c, 1, 1, low=0.5, high=1.5))
    return net.node("Add", y, net.vector(c, 1, 1))


def groupnorm(net: Net, s: int) -> None:
    """Residual network with group normalisations."""

    def block(n: Net, x: str, width: int, stride: int) -> str:
        y = n.node("Relu", group_normalised(n, conv(n, x, width, 3, stride)))
        y = group_normalised(n, conv(n, y, width))
        same = stride == 1 and n.channels(x) == width
        return n.node("Relu", n.node("Add", y, x if same else conv(n, x, width, 1, stride)))

    w = [16 // s, 32 // s]
    x = net.node("Relu", group_normalised(net, conv(net, image(net), w[0])))
    head(net, stages(net, x, w, 2, block))


def layer_norm(net: Net, x: str) -> str:
    """Add a layer normalisation over the last axis."""
    c = net.dims(x)[-1]
    scale, shift = net.vector(c, low=0.5, high=1.5), net.vector(c)
    return net.node("LayerNormalization", x, scale, shift, axis=-1, epsilon=1e-5)


def layer_norm_apart(net: Net, x: str, axis: int = -1) -> str:
    """Add a layer normalisation as exporters wrote it before there was an operator."""
    c = net.dims(x)[axis]
    shape = (c,) if axis == -1 else (c, 1, 1)
    centred = net.node("Sub", x, net.reduce("Mean", x, [axis]))
    variance = net.reduce("Mean", net.node("Pow", centred, net.constant(2.0)), [axis])
    root = net.node("Sqrt", net.node("Add", variance, net.constant(1e-5)))
    y = net.node("Mul", net.node("Div", centred, root), net.vector(*shape, low=0.5, high=1.5))
    return net.node("Add", y, net.vector(*shape))


def convnext(net: Net, s: int) -> None:
    """ConvNeXt: depthwise 7 x 7, layer normalisation with channels last, layer scale; the first one channels first."""

    def block(n: Net, x: str, width: int, _stride: int) -> str:
        y = n.node("Transpose", conv(n, x, width, 7, groups=width), perm=[0, 2, 3, 1])
        y = linear(n, act(n, linear(n, layer_norm(n, y), 4 * width), "GELU"), width)
        y = n.node("Mul", y, n.vector(width, low=0.5, high=1.0))
        return n.node("Add", x, n.node("Transpose", y, perm=[0, 3, 1, 2]))

    a, b = 24 // s, 48 // s
    x = net.conv(image(net), a, 4, strides=[4, 4], pads=[0] * 4)
    x = stages(net, layer_norm_apart(net, x, 1), [a], 2, block)
    x = net.conv(layer_norm_apart(net, x, 1), b, 2, strides=[2, 2], pads=[0] * 4)
    x = net.node("Flatten", net.node("GlobalAveragePool", stages(net, x, [b], 2, block)))
    net.output(net.gemm(layer_norm(net, x), CLASSES, transB=1))


def inception(net: Net, s: int) -> None:
    """Four branches side by side, twice."""

    def block(x: str, width: int) -> str:
        three = layer(net, layer(net, x, width // 2, 1), width)
        five = layer(net, layer(net, x, width // 4, 1), width // 2, 5)
        pooled = net.node("MaxPool", x, kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4)
        return net.node("Concat", layer(net, x, width, 1), three, five, layer(net, pooled, width // 2, 1), axis=1)

    a, b = 16 // s, 32 // s
    head(net, block(block(layer(net, image(net), a, stride=2), a), b))


def c2f(net: Net, s: int) -> None:
    """YOLOv8's C2f and SPPF, merged over two scales, with boxes and scores of both as one output."""

    def block(x: str, width: int) -> str:
        parts = list(net.split(layer(net, x, width, 1, kind="SiLU"), None, 2))
        for _ in range(2):
            y = layer(net, layer(net, parts[-1], width // 2, kind="SiLU"), width // 2, kind="SiLU")
            parts.append(net.node("Add", parts[-1], y))
        return layer(net, net.node("Concat", *parts, axis=1), width, 1, kind="SiLU")

    def pools(x: str) -> str:
        parts = [layer(net, x, net.channels(x) // 2, 1, kind="SiLU")]
        for _ in range(3):
            parts.append(net.node("MaxPool", parts[-1], kernel_shape=[5, 5], strides=[1, 1], pads=[2] * 4))
        return layer(net, net.node("Concat", *parts, axis=1), net.channels(x), 1, kind="SiLU")

    a, b = 16 // s, 32 // s
    fine = block(layer(net, image(net), a, stride=2, kind="SiLU"), a)
    coarse = pools(block(layer(net, fine, b, stride=2, kind="SiLU"), b))
    fine = block(net.node("Concat", net.upsample(coarse), fine, axis=1), a)
    found = []
    for x in (fine, coarse):
        y = conv(net, layer(net, x, net.channels(x), kind="SiLU"), 6, 1)
        found.append(net.reshape(y, 0, 6, -1))
    boxes, scores = net.split(net.node("Concat", *found, axis=2), [4, 2], 2)
    net.output(net.node("Concat", net.node("Softplus", boxes), net.node("Sigmoid", scores), axis=1))


def preactivation(net: Net, s: int) -> None:
    """Pre-activation ResNet: normalisation and activation before every convolution."""

    def block(n: Net, x: str, width: int, stride: int) -> str:
        y = n.node("Relu", norm(n, x))
        through = x if stride == 1 else conv(n, y, width, 1, stride, bias=False)
        y = conv(n, n.node("Relu", norm(n, conv(n, y, width, 3, stride, bias=False))), width, bias=False)
        return n.node("Add", y, through)

    w = [12 // s, 24 // s, 48 // s]
    x = stages(net, conv(net, image(net), w[0], bias=False), w, 2, block)
    head(net, net.node("Relu", norm(net, x)))


# Attention ----------------------------------------------------------------------------------------------------------


def tokens(net: Net, length: int = STEPS) -> str:
    """Add an input of token numbers."""
    x = net.input(2, length, batch="N", dtype=TensorProto.INT64)
    net.feeds[x] = net.rng.integers(0, VOCABULARY, net.dims(x))
    return x


def embed(net: Net, x: str, width: int) -> tuple[str, str]:
    """Look tokens up; return the vectors and the table."""
    table = net.vector(VOCABULARY, width, low=-1.0, high=1.0)
    return net.node("Gather", table, x), table


def heads_first(net: Net, x: str, heads: int) -> str:
    """Turn (N, T, heads x size) into (N, heads, T, size)."""
    return net.node("Transpose", net.reshape(x, 0, 0, heads, net.dims(x)[-1] // heads), perm=[0, 2, 1, 3])


def attend(net: Net, q: str, k: str, v: str, *, scale: float, mask: str = "") -> str:
    """Attend, heads first; return (N, T, heads x size)."""
    scores = net.node("MatMul", q, net.node("Transpose", k, perm=[0, 1, 3, 2]))
    scores = net.node("Mul", scores, net.constant(scale))
    scores = net.node("Add", scores, mask) if mask else scores
    y = net.node("Transpose", net.node("MatMul", net.node("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    return net.reshape(y, 0, 0, int(np.prod(net.dims(y)[2:])))


def separate(net: Net, x: str, heads: int, inner: int, *, source: str = "", mask: str = "") -> str:
    """Add attention with three products, as Hugging Face's models have it."""
    q, k, v = (
        heads_first(net, linear(net, at, inner, bias=bias), heads)
        for at, bias in ((x, True), (source or x, False), (source or x, True))
    )
    return linear(net, attend(net, q, k, v, scale=0.3, mask=mask), net.dims(x)[-1])


def fused(net: Net, x: str, heads: int, inner: int, *, bias: str = "") -> str:
    """Add attention with one product for queries, keys and values, as timm's models have it."""
    y = net.reshape(linear(net, x, 3 * inner), 0, net.dims(x)[1], 3, heads, inner // heads)
    y = net.node("Transpose", y, perm=[2, 0, 3, 1, 4])
    q, k, v = (net.node("Gather", y, net.constant(np.array(i, np.int64)), axis=0) for i in range(3))
    return linear(net, attend(net, q, k, v, scale=0.3, mask=bias), net.dims(x)[-1])


def feed_forward(net: Net, x: str) -> str:
    """Add two products with a GELU between them."""
    width = net.dims(x)[-1]
    return linear(net, act(net, linear(net, x, 4 * width), "GELU"), width)


def encoder(net: Net, x: str, attention: Callable[[str], str], normal: Callable[[Net, str], str] = layer_norm) -> str:
    """Add a transformer block, normalisation first."""
    x = net.node("Add", x, attention(normal(net, x)))
    return net.node("Add", x, feed_forward(net, normal(net, x)))


def patches(net: Net, x: str, width: int) -> str:
    """Cut an image into patches: (N, places, width)."""
    x = net.conv(x, width, 4, strides=[4, 4], pads=[0] * 4)
    return net.node("Transpose", net.reshape(x, 0, width, -1), perm=[0, 2, 1])


def vit(kind: str) -> Build:
    """Return a builder of vision transformers with a class token."""

    def build(net: Net, s: int) -> None:
        width, heads, inner = 48 // s, 4, 48 // s
        x = patches(net, image(net), width)
        batch = net.node("Gather", net.node("Shape", x), net.constant(np.array([0], np.int64)))
        target = net.node("Concat", batch, net.constant(np.array([1, 1], np.int64)), axis=0)
        token = net.node("Expand", net.vector(1, 1, width, low=-1.0, high=1.0), target)
        # What the batch is, and with it this shape, is not known to inference, node by node.
        net.types[token] = helper.make_tensor_type_proto(net.dtype, [net.dims(x)[0], 1, width])
        x = net.node("Concat", token, x, axis=1)
        x = net.node("Add", x, net.vector(1, net.dims(x)[1], width))
        make = fused if kind == "fused" else separate
        for _ in range(2):
            x = encoder(net, x, lambda y: make(net, y, heads, inner))
        x = net.node("Gather", layer_norm(net, x), net.constant(np.array(0, np.int64)), axis=1)
        net.output(net.gemm(x, CLASSES, transB=1))

    return build


def rms_norm(net: Net, x: str) -> str:
    """Add Llama's normalisation, spelled out."""
    square = net.reduce("Mean", net.node("Pow", x, net.constant(2.0)), [-1])
    root = net.node("Reciprocal", net.node("Sqrt", net.node("Add", square, net.constant(1e-6))))
    return net.node("Mul", net.vector(net.dims(x)[-1], low=0.5, high=1.5), net.node("Mul", x, root))


def swiglu(net: Net, x: str) -> str:
    """Add Llama's feed-forward part."""
    width = net.dims(x)[-1]
    gates = act(net, linear(net, x, 3 * width, bias=False), "SiLU")
    return linear(net, net.node("Mul", gates, linear(net, x, 3 * width, bias=False)), width, bias=False)


def rotate(net: Net, x: str) -> str:
    """Turn queries or keys by their position, the two halves of a head as one plane each."""
    length, size = net.dims(x)[2:]
    angles = np.outer(np.arange(length), 10000.0 ** (-np.arange(0, size, 2) / size))
    cos, sin = (net.constant(np.tile(f(angles), 2)) for f in (np.cos, np.sin))
    first, second = net.slice(x, [0], [size // 2], [3]), net.slice(x, [size // 2], [2**31 - 1], [3])
    turned = net.node("Concat", net.node("Neg", second), first, axis=3)
    return net.node("Add", net.node("Mul", x, cos), net.node("Mul", turned, sin))


def repeated(net: Net, x: str, repeats: int) -> str:
    """Give every head of keys or values to several heads of queries."""
    batch, kept, length, size = net.dims(x)
    y = net.unsqueeze(x, [2])
    y = net.node("Expand", y, net.constant(np.array([1, 1, repeats, 1, 1], np.int64)))
    net.types[y] = helper.make_tensor_type_proto(net.dtype, [batch, kept, repeats, length, size])
    return net.reshape(y, 0, kept * repeats, length, size)


def grouped_attention(net: Net, x: str, size: int, past: tuple[str, str] | None = None) -> tuple[str, str, str]:
    """Add Llama's attention: four heads of queries, two of keys and values, and what they saw before if it is given."""
    q = rotate(net, heads_first(net, linear(net, x, 4 * size, bias=False), 4))
    k = rotate(net, heads_first(net, linear(net, x, 2 * size, bias=False), 2))
    v = heads_first(net, linear(net, x, 2 * size, bias=False), 2)
    if past is not None:
        k, v = net.node("Concat", past[0], k, axis=2), net.node("Concat", past[1], v, axis=2)
    y = attend(net, q, repeated(net, k, 2), repeated(net, v, 2), scale=0.3)
    return linear(net, y, net.dims(x)[-1], bias=False), k, v


def gqa(net: Net, s: int) -> None:
    """Encoder with grouped queries, rotary positions, RMS normalisation and SwiGLU."""
    width, size = 32 // s, 8 // s
    x = linear(net, net.input(2, STEPS, 16, batch="N"), width)
    for _ in range(2):
        x = net.node("Add", x, grouped_attention(net, rms_norm(net, x), size)[0])
        x = net.node("Add", x, swiglu(net, rms_norm(net, x)))
    x = net.reduce("Mean", rms_norm(net, x), [1], keepdims=0)
    net.output(net.gemm(x, CLASSES, transB=1))


def llama_cache(net: Net, s: int) -> None:
    """Llama's step: tokens and caches in, scores and caches out, so the sizes of the heads are the graph's own."""
    width, size = 32 // s, 8
    x, _ = embed(net, tokens(net, 2), width)
    past = (net.input(2, 2, 3, size, batch="N"), net.input(2, 2, 3, size, batch="N"))
    y, keys, values = grouped_attention(net, rms_norm(net, x), size, past)
    x = net.node("Add", x, y)
    x = net.node("Add", x, swiglu(net, rms_norm(net, x)))
    net.output(linear(net, rms_norm(net, x), VOCABULARY, bias=False), keys, values)


def rolled(net: Net, x: str, shift: int) -> str:
    """Roll the two spatial axes, channels last."""
    for axis in (1, 2):
        parts = net.slice(x, [shift], [2**31 - 1], [axis]), net.slice(x, [0], [shift], [axis])
        x = net.node("Concat", *parts, axis=axis)
    return x


def windows(net: Net, x: str, heads: int, shift: int) -> str:
    """Add Swin's attention inside windows of 2 x 2, with a learned bias for every relative position."""
    height, wide, width = net.dims(x)[1:]
    y = rolled(net, x, shift) if shift else x
    y = net.reshape(y, -1, height // 2, 2, wide // 2, 2, width)
    y = net.reshape(net.node("Transpose", y, perm=[0, 1, 3, 2, 4, 5]), -1, 4, width)
    places = net.constant(net.rng.integers(0, 9, 16))
    bias = net.node("Gather", net.vector(9, heads), places)
    bias = net.unsqueeze(net.node("Transpose", net.reshape(bias, 4, 4, heads), perm=[2, 0, 1]), [0])
    y = net.reshape(fused(net, y, heads, width, bias=bias), -1, height // 2, wide // 2, 2, 2, width)
    y = net.reshape(net.node("Transpose", y, perm=[0, 1, 3, 2, 4, 5]), -1, height, wide, width)
    return rolled(net, y, -shift) if shift else y


def swin(net: Net, s: int) -> None:
    """Swin: windows cut and shifted, then every other place put side by side, and again."""
    a = 16 // s
    x = net.node("Transpose", net.conv(image(net), a, 4, strides=[4, 4], pads=[0] * 4), perm=[0, 2, 3, 1])
    x = encoder(net, x, lambda y: windows(net, y, 2, 0), layer_norm_apart)
    x = encoder(net, x, lambda y: windows(net, y, 2, 1), layer_norm_apart)
    corners = [net.slice(x, [i, j], [2**31 - 1] * 2, [1, 2], [2, 2]) for j in range(2) for i in range(2)]
    x = linear(net, layer_norm_apart(net, net.node("Concat", *corners, axis=-1)), 2 * a, bias=False)
    x = encoder(net, x, lambda y: windows(net, y, 4, 0), layer_norm_apart)
    net.output(net.gemm(net.reduce("Mean", layer_norm_apart(net, x), [1, 2], keepdims=0), CLASSES, transB=1))


def causal(net: Net) -> str:
    """Return what forbids to look ahead."""
    return net.constant(np.triu(np.full((STEPS, STEPS), -1e4), 1))


def clip(net: Net, s: int) -> None:
    """CLIP: a tower for images and one for texts, compared by cosine."""
    width, inner, common = 32 // s, 32 // s, 16 // s
    x = patches(net, image(net), width)
    x = net.node("Add", x, net.vector(net.dims(x)[1], width))
    x = encoder(net, x, lambda y: fused(net, y, 4, inner))
    x = linear(net, net.reduce("Mean", layer_norm(net, x), [1], keepdims=0), common, bias=False)
    y, _ = embed(net, tokens(net), width)
    y = net.node("Add", y, net.vector(STEPS, width))
    y = encoder(net, y, lambda z: separate(net, z, 4, inner, mask=causal(net)))
    y = net.node("Gather", layer_norm(net, y), net.constant(np.array(-1, np.int64)), axis=1)
    y = linear(net, y, common, bias=False)
    x, y = (net.node("Div", z, net.reduce("L2", z, [-1])) for z in (x, y))
    net.output(net.node("MatMul", net.node("Mul", x, net.constant(7.0)), net.node("Transpose", y, perm=[1, 0])))


def whisper(net: Net, s: int) -> None:
    """Whisper: an encoder behind 1-D convolutions, a decoder that looks at it, the embedding as the output matrix."""
    width, inner = 32 // s, 32 // s
    x = net.input(2, 12, 2 * STEPS, batch="N")
    for stride in (1, 2):
        x = act(net, net.conv(x, width, 3, strides=[stride], pads=[1, 1]), "GELU")
    x = net.node("Add", net.node("Transpose", x, perm=[0, 2, 1]), net.vector(STEPS, width))
    x = layer_norm(net, encoder(net, x, lambda y: separate(net, y, 4, inner)))
    y, table = embed(net, tokens(net), width)
    y = net.node("Add", y, net.vector(STEPS, width))
    y = net.node("Add", y, separate(net, layer_norm(net, y), 4, inner, mask=causal(net)))
    y = encoder(net, y, lambda z: separate(net, z, 4, inner, source=x))
    net.output(net.node("MatMul", layer_norm(net, y), net.node("Transpose", table, perm=[1, 0])))


# Sequences ----------------------------------------------------------------------------------------------------------


def embedding(net: Net, s: int) -> None:
    """Embedding, mean, two linear layers."""
    x, _ = embed(net, tokens(net), 32 // s)
    x = net.node("Relu", net.gemm(net.reduce("Mean", x, [1], keepdims=0), 64 // s, transB=1))
    net.output(net.gemm(x, CLASSES, transB=1))


def recurrent(op: str, gates: int, *, both: bool = False) -> Build:
    """Return a builder of networks that read features and classify the last step."""

    def build(net: Net, s: int) -> None:
        units, ways = 24 // s, 1 + both
        x = net.node("Transpose", net.input(2, STEPS, 32, batch="N"), perm=[1, 0, 2])
        weights = (net.weight(ways, gates * units, 32, fan_in=32), net.weight(ways, gates * units, units, fan_in=units))
        direction = "bidirectional" if both else "forward"
        bias = net.vector(ways, 2 * gates * units)
        y = net.many(op, [x, *weights, bias], 1, hidden_size=units, direction=direction)[0]
        y = net.reshape(net.node("Transpose", y, perm=[2, 0, 1, 3]), 0, 0, -1)
        y = net.node("Gather", y, net.constant(np.array(-1, np.int64)), axis=1)
        net.output(net.gemm(y, CLASSES, transB=1))

    return build


FAMILIES: dict[str, Family] = {
    "resnet18": Family(resnet((8, 16, 32, 64), 2), 0.75),
    "resnet20": Family(resnet((8, 16, 32), 3), 0.748),
    "resnet56": Family(resnet((8, 16, 32), 9), 0.748),
    "untrained": Family(untrained, 0.748),
    "vgg": Family(vgg, 0.75),
    "vgg_flatten": Family(vgg_flatten, 0.746),
    "mlp": Family(mlp, 0.519),
    "mobilenetv2": Family(mobilenet("Relu6", gated=False), 0.721),
    "mobilenetv2_se": Family(mobilenet("Relu", gated=True), 0.732),
    "multiplied": Family(multiplied),
    "densenet": Family(densenet, 0.741),
    "resnext": Family(grouped(4, (16, 32, 64), gated=False), 0.731),
    "shufflenetv2": Family(shufflenet, 0.67),
    "uneven": Family(uneven),
    "unet": Family(unet("transposed", "linear", "shuffle")),
    "groupnorm": Family(groupnorm, 0.732),
    "convnext": Family(convnext, 0.703),
    "vit_fused": Family(vit("fused"), 0.728),
    "vit_separate": Family(vit("separate"), 0.728),
    "gqa_swiglu": Family(gqa, 0.684),
    "embedding": Family(embedding, 0.3),
    "lstm": Family(recurrent("LSTM", 4), 0.522),
    "gru": Family(recurrent("GRU", 3), 0.496),
    "lstm_both": Family(recurrent("LSTM", 4, both=True)),
    "inception": Family(inception),
    "c2f": Family(c2f),
    "unet_transposed": Family(unet("transposed", "transposed")),
    "unet_resized": Family(unet("nearest", "linear")),
    "preactivation": Family(preactivation),
    "regnet": Family(grouped(2, (16, 32, 64), gated=True)),
    "efficientnet": Family(mobilenet("SiLU", gated=True)),
    "mobilenetv3": Family(mobilenet("HardSwish", gated=True)),
    "swin": Family(swin),
    "clip": Family(clip),
    "whisper": Family(whisper),
    "llama_cache": Family(llama_cache),
}
