#!/usr/bin/env python3
"""Small networks of every family that people deploy, exported from torch: ``make_probes.py DIR [--measure]``.

Every network has random weights, distinct norm parameters and running statistics, and a fixed seed. It is exported
with the TorchScript exporter, with BatchNormalization kept and folded, and with the torch.export exporter, all with an
open batch size. With ``--measure`` onnxfuse then compresses every file at half the channels, and a table shows how much
went, beside the share that an export of the same network with half of every width lacks, and the share that the
best peer removes from such a network. What meets the smaller of the two is fine.

Needs torch and onnxscript beside onnxfuse.
"""

import argparse
import importlib
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import onnxfuse

SEED = 7
RATIO = 0.5
LEGACY_OPSET = 17
DYNAMO_OPSET = 18
REPOSITORY = Path(__file__).resolve().parent.parent
EXPORTERS = ("legacy", "legacy_bn", "dynamo")
IMAGE = (2, 3, 32, 32)
COLUMNS = ("family", "exporter", "params", "groups (free)", "removed", "half", "peer", "", "frozen", "s", "why")
MOST_REASONS = 6
LONGEST_LINE = 220
# Peers counted on networks of other widths, and an odd width does not halve.
TOLERANCE = 0.005

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """A network with inputs that it runs on.

    Attributes:
        network: A torch module.
        inputs: Its example inputs; axis 0 is the batch.
        open_axes: Further axes of open size, by position of the input: axis and name.
        random: Whether the norm parameters are made distinct.
    """

    network: Any
    inputs: tuple[Any, ...]
    open_axes: tuple[tuple[int, int, str], ...] = ()
    random: bool = True


@dataclass(frozen=True)
class Family:
    """A kind of network.

    Attributes:
        build: Makes it; given torch and the number that all widths are divided by.
        peer: Share of the parameters that the best peer removes at half the channels; 0 where none is known.
    """

    build: Callable[[Any, int], Probe]
    peer: float = 0.0


@dataclass(frozen=True)
class Row:
    """What became of one file.

    Attributes:
        family: Name of the family.
        exporter: Which exporter wrote it.
        parameters: How many it has.
        groups: How many coupling groups it has.
        free_groups: How many of them may change.
        removed: Share of the parameters removed, 0 to 1.
        half: Share that the network of half width lacks.
        peer: Share that the best peer removes; 0 where it is not known.
        frozen: Share of the parameters that follow no group that may change, 0 to 1.
        seconds: Time of `inspect` and `compress` together.
        reasons: The reasons that freeze the most parameters, with these, the graph's inputs and outputs left out.
        notes: What onnxfuse noted.
        problem: Why there is no result; empty if there is one.
    """

    family: str
    exporter: str
    parameters: int = 0
    groups: int = 0
    free_groups: int = 0
    removed: float = 0.0
    half: float = 0.0
    peer: float = 0.0
    frozen: float = 0.0
    seconds: float = 0.0
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    problem: str = ""

    @property
    def verdict(self) -> str:
        """Whether enough went, and with proof."""
        if self.problem:
            return "FAIL"
        if any("defect" in note or "not proven" in note for note in self.notes):
            return "PROOF"
        return "ok" if self.removed >= min(self.half, self.peer or 1.0) - TOLERANCE else "low"


# Parts ----------------------------------------------------------------------------------------------------------------


def net(t: Any, forward: Callable[..., Any], **parts: Any) -> Any:
    """Make a module of named parts and a forward function; torch is imported late, so it can't be a class statement."""
    module = type(forward.__qualname__.split(".")[0].title(), (t.nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        if isinstance(part, t.nn.Parameter):
            module.register_parameter(name, part)
        elif isinstance(part, t.Tensor):
            module.register_buffer(name, part)
        else:
            module.add_module(name, part)
    return module


def conv(t: Any, inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1, act: Any = None) -> Any:
    """Make Conv, BatchNorm and an activation; ReLU where none is given."""
    nn = t.nn
    layer = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU() if act is None else act)


def head(t: Any, channels: int, classes: int = 10) -> Any:
    """Make global average pooling and a classifier."""
    return t.nn.Sequential(t.nn.AdaptiveAvgPool2d(1), t.nn.Flatten(), t.nn.Linear(channels, classes))


def image(t: Any, *dims: int) -> tuple[Any, ...]:
    """Make an image batch, or another random input of the given shape."""
    return (t.randn(*(dims or IMAGE)),)


def tokens(t: Any, length: int = 12, vocabulary: int = 100) -> Any:
    """Make a batch of token numbers."""
    return t.randint(0, vocabulary, (2, length))


def residual(t: Any, *parts: Any) -> Any:
    """Add what the parts make of their input to it."""

    def forward(self: Any, x: Any) -> Any:
        return x + self.inner(x)

    return net(t, forward, inner=t.nn.Sequential(*parts))


# Convolutional networks -----------------------------------------------------------------------------------------------


def basic_block(t: Any, inputs: int, outputs: int, stride: int, inner: Any = None) -> Any:
    """Make a ResNet block with a projection where the shape changes."""
    nn = t.nn
    shortcut: Any = nn.Identity()
    if stride != 1 or inputs != outputs:
        shortcut = conv(t, inputs, outputs, 1, stride, act=nn.Identity())
    body = inner or nn.Sequential(conv(t, inputs, outputs, 3, stride), conv(t, outputs, outputs, act=nn.Identity()))

    def forward(self: Any, x: Any) -> Any:
        return self.relu(self.body(x) + self.shortcut(x))

    return net(t, forward, body=body, shortcut=shortcut, relu=nn.ReLU())


def stages(
    t: Any, widths: Sequence[int], depth: int, block: Callable[[Any, int, int, int], Any] = basic_block
) -> list[Any]:
    """Make the stages of a residual network; all but the first halve the resolution."""
    blocks = []
    before = widths[0]
    for i, width in enumerate(widths):
        for j in range(depth):
            blocks.append(block(t, before, width, 2 if i and not j else 1))
            before = width
    return blocks


def resnet(widths: Sequence[int], depth: int, *, random: bool = True) -> Callable[[Any, int], Probe]:
    """Return a builder of ResNets."""

    def build(t: Any, s: int) -> Probe:
        w = [width // s for width in widths]
        network = t.nn.Sequential(conv(t, 3, w[0]), *stages(t, w, depth), head(t, w[-1]))
        return Probe(network, image(t), random=random)

    return build


def option_a_block(t: Any, inputs: int, outputs: int, stride: int) -> Any:
    """Make a ResNet block whose shortcut drops every other pixel and adds channels of zeros."""
    nn = t.nn
    body = nn.Sequential(conv(t, inputs, outputs, 3, stride), conv(t, outputs, outputs, act=nn.Identity()))
    more = (outputs - inputs) // 2

    def forward(self: Any, x: Any) -> Any:
        y = x if stride == 1 else nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more, more))
        return self.relu(self.body(x) + y)

    return net(t, forward, body=body, relu=nn.ReLU())


def resnet_option_a(t: Any, s: int) -> Probe:
    """CIFAR ResNet-20 with parameter-free shortcuts."""
    w = [16 // s, 32 // s, 64 // s]
    return Probe(t.nn.Sequential(conv(t, 3, w[0]), *stages(t, w, 3, option_a_block), head(t, w[-1])), image(t))


def vgg(t: Any, s: int) -> Probe:
    """VGG with BatchNorm down to 1x1."""
    layers: list[Any] = []
    before = 3
    for width, depth in ((16, 2), (32, 2), (64, 3), (128, 3), (128, 3)):
        for _ in range(depth):
            layers.append(conv(t, before, width // s))
            before = width // s
        layers.append(t.nn.MaxPool2d(2))
    return Probe(t.nn.Sequential(*layers, t.nn.Flatten(), t.nn.Linear(before, 10)), image(t))


def vgg_flatten(t: Any, s: int) -> Probe:
    """VGG whose Flatten sees 4x4 positions."""
    nn = t.nn
    layers: list[Any] = []
    before = 3
    for width in (32, 64, 64):
        layers += [conv(t, before, width // s), conv(t, width // s, width // s), nn.MaxPool2d(2)]
        before = width // s
    classifier = (nn.Flatten(), nn.Linear(before * 16, 256 // s), nn.ReLU(), nn.Dropout(), nn.Linear(256 // s, 10))
    return Probe(nn.Sequential(*layers, *classifier), image(t))


def mlp(t: Any, s: int) -> Probe:
    """Three linear layers."""
    nn = t.nn
    a, b = 512 // s, 256 // s
    layers = (nn.Flatten(), nn.Linear(3072, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 10))
    return Probe(nn.Sequential(*layers), image(t))


def squeeze_excite(t: Any, channels: int, reduced: int, gate: Any = None) -> Any:
    """Make a gate per channel from the mean over the positions."""
    nn = t.nn
    parts = (nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, reduced, 1), nn.ReLU(), nn.Conv2d(reduced, channels, 1))

    def forward(self: Any, x: Any) -> Any:
        return x * self.gate(x)

    return net(t, forward, gate=nn.Sequential(*parts, gate or nn.Sigmoid()))


def inverted_block(t: Any, inputs: int, outputs: int, stride: int, *, gate: bool = False, act: str = "ReLU6") -> Any:
    """Make an inverted residual block with a depthwise convolution and a linear bottleneck."""
    nn = t.nn
    wide = inputs * 4
    activation = getattr(nn, act)
    gates = (squeeze_excite(t, wide, max(wide // 4, 1)),) if gate else ()
    parts = (
        conv(t, inputs, wide, 1, act=activation()),
        conv(t, wide, wide, 3, stride, groups=wide, act=activation()),
        *gates,
        conv(t, wide, outputs, 1, act=nn.Identity()),
    )
    return residual(t, *parts) if stride == 1 and inputs == outputs else nn.Sequential(*parts)


def mobilenet(*, gate: bool, act: str = "ReLU6") -> Callable[[Any, int], Probe]:
    """Return a builder of networks of inverted residual blocks."""

    def build(t: Any, s: int) -> Probe:
        def block(t: Any, inputs: int, outputs: int, stride: int) -> Any:
            return inverted_block(t, inputs, outputs, stride, gate=gate, act=act)

        w = [16 // s, 32 // s, 64 // s]
        activation = getattr(t.nn, act)
        tail = (conv(t, w[-1], 256 // s, 1, act=activation()), head(t, 256 // s))
        return Probe(t.nn.Sequential(conv(t, 3, w[0], act=activation()), *stages(t, w, 2, block), *tail), image(t))

    return build


def densenet(t: Any, s: int) -> Probe:
    """Dense blocks with BatchNorm before the convolution and over the concatenation."""
    nn = t.nn
    growth = 16 // s

    def dense(inputs: int) -> Any:
        def forward(self: Any, x: Any) -> Any:
            return t.cat([x, self.layers(x)], 1)

        wide = 4 * growth
        layers = (
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.Conv2d(wide, growth, 3, padding=1, bias=False),
        )
        return net(t, forward, layers=nn.Sequential(*layers))

    width = 2 * growth
    layers: list[Any] = [nn.Conv2d(3, width, 3, padding=1, bias=False)]
    for i in range(3):
        for _ in range(4):
            layers.append(dense(width))
            width += growth
        if i < 2:
            half = width // 2
            layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, half, 1, bias=False), nn.AvgPool2d(2)]
            width = half
    return Probe(nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU(), head(t, width)), image(t))


def bottleneck(groups: int, *, gate: bool = False) -> Callable[[Any, int, int, int], Any]:
    """Return a maker of blocks with grouped convolutions."""

    def block(t: Any, inputs: int, outputs: int, stride: int) -> Any:
        gates = (squeeze_excite(t, outputs, outputs // 4),) if gate else ()
        parts = (
            conv(t, inputs, outputs, 1),
            conv(t, outputs, outputs, 3, stride, groups=groups),
            *gates,
            conv(t, outputs, outputs, 1, act=t.nn.Identity()),
        )
        return basic_block(t, inputs, outputs, stride, t.nn.Sequential(*parts))

    return block


def resnext(t: Any, s: int) -> Probe:
    """ResNeXt: bottlenecks with 8 groups."""
    w = [32 // s, 64 // s, 128 // s]
    return Probe(t.nn.Sequential(conv(t, 3, w[0]), *stages(t, w, 2, bottleneck(8)), head(t, w[-1])), image(t))


def regnet(t: Any, s: int) -> Probe:
    """RegNetY: groups and gates."""
    w = [32 // s, 64 // s, 160 // s]
    block = bottleneck(4, gate=True)
    return Probe(t.nn.Sequential(conv(t, 3, w[0]), *stages(t, w, 2, block), head(t, w[-1])), image(t))


def shuffle(t: Any, x: Any, groups: int = 2) -> Any:
    """Mix the channels of groups, as ShuffleNet does."""
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width)
    return t.transpose(x, 1, 2).reshape(batch, channels, height, width)


def shuffle_unit(t: Any, inputs: int, outputs: int, stride: int) -> Any:
    """Make a ShuffleNetV2 unit: half of the channels pass by, or both branches halve the resolution."""
    half = outputs // 2
    nothing = t.nn.Identity
    enter = inputs // 2 if stride == 1 else inputs
    main = t.nn.Sequential(
        conv(t, enter, half, 1), conv(t, half, half, 3, stride, half, nothing()), conv(t, half, half, 1)
    )
    if stride == 1:

        def forward(self: Any, x: Any) -> Any:
            a, b = x.chunk(2, dim=1)
            return shuffle(t, t.cat([a, self.main(b)], 1))

        return net(t, forward, main=main)

    def forward_down(self: Any, x: Any) -> Any:
        return shuffle(t, t.cat([self.side(x), self.main(x)], 1))

    side = t.nn.Sequential(conv(t, enter, enter, 3, 2, enter, nothing()), conv(t, enter, half, 1))
    return net(t, forward_down, main=main, side=side)


def shufflenet(t: Any, s: int) -> Probe:
    """ShuffleNetV2: chunk, concatenation, shuffle."""
    w = [32 // s, 64 // s, 128 // s]
    tail = (conv(t, w[-1], 256 // s, 1), head(t, 256 // s))
    return Probe(t.nn.Sequential(conv(t, 3, w[0]), *stages(t, w, 3, shuffle_unit), *tail), image(t))


def uneven_split(t: Any, s: int) -> Probe:
    """64 channels split into 48 and 16, treated apart and put together again."""
    a, b = 48 // s, 16 // s

    def forward(self: Any, x: Any) -> Any:
        x, y = t.split(self.stem(x), [a, b], dim=1)
        return self.head(self.join(t.cat([self.left(x), self.right(y)], 1)))

    parts = {
        "stem": conv(t, 3, a + b),
        "left": conv(t, a, a),
        "right": conv(t, b, b),
        "join": conv(t, a + b, 64 // s),
        "head": head(t, 64 // s),
    }
    return Probe(net(t, forward, **parts), image(t))


def unet(t: Any, s: int) -> Probe:
    """U-Net with InstanceNorm, PReLU, and three ways up: ConvTranspose, Resize, PixelShuffle."""
    nn = t.nn
    a, b, c, d = 16 // s, 32 // s, 64 // s, 128 // s

    def double(inputs: int, outputs: int) -> Any:
        first = (nn.Conv2d(inputs, outputs, 3, padding=1), nn.InstanceNorm2d(outputs, affine=True), nn.PReLU(outputs))
        return nn.Sequential(*first, nn.Conv2d(outputs, outputs, 3, padding=1), nn.LeakyReLU(0.1))

    def forward(self: Any, x: Any) -> Any:
        first = self.down1(x)
        second = self.down2(self.pool(first))
        third = self.down3(self.pool(second))
        x = self.bottom(self.pool(third))
        x = self.up3(t.cat([self.transposed(x), third], 1))
        x = nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = self.up2(t.cat([x, second], 1))
        x = self.up1(t.cat([self.shuffle(self.widen(x)), first], 1))
        return self.out(x)

    parts = {
        "pool": nn.MaxPool2d(2),
        "down1": double(3, a),
        "down2": double(a, b),
        "down3": double(b, c),
        "bottom": double(c, d),
        "transposed": nn.ConvTranspose2d(d, c, 2, stride=2),
        "up3": double(2 * c, c),
        "up2": double(c + b, b),
        "widen": nn.Conv2d(b, 4 * a, 1),
        "shuffle": nn.PixelShuffle(2),
        "up1": double(2 * a, a),
        "out": nn.Conv2d(a, 2, 1),
    }
    return Probe(net(t, forward, **parts), image(t))


def groupnorm(t: Any, s: int) -> Probe:
    """Residual network with GroupNorm."""
    nn = t.nn

    def layer(inputs: int, outputs: int, stride: int = 1) -> Any:
        kernel = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return nn.Sequential(kernel, nn.GroupNorm(4, outputs), nn.ReLU())

    a, b = 32 // s, 64 // s
    layers = (layer(3, a), residual(t, layer(a, a), layer(a, a)), layer(a, b, 2), residual(t, layer(b, b), layer(b, b)))
    return Probe(nn.Sequential(*layers, head(t, b)), image(t))


def convnext(t: Any, s: int) -> Probe:
    """ConvNeXt: depthwise 7x7, LayerNorm in NHWC, layer scale; LayerNorm over channels by hand between stages."""
    nn = t.nn

    def block(width: int) -> Any:
        def forward(self: Any, x: Any) -> Any:
            y = self.depthwise(x).permute(0, 2, 3, 1)
            y = self.shrink(self.act(self.widen(self.norm(y)))) * self.gamma
            return x + y.permute(0, 3, 1, 2)

        parts = {
            "depthwise": nn.Conv2d(width, width, 7, padding=3, groups=width),
            "norm": nn.LayerNorm(width, eps=1e-6),
            "widen": nn.Linear(width, 4 * width),
            "act": nn.GELU(),
            "shrink": nn.Linear(4 * width, width),
            "gamma": nn.Parameter(t.rand(width)),
        }
        return net(t, forward, **parts)

    def channel_norm(width: int) -> Any:
        def forward(self: Any, x: Any) -> Any:
            u = x.mean(1, keepdim=True)
            v = (x - u).pow(2).mean(1, keepdim=True)
            x = (x - u) / t.sqrt(v + 1e-6)
            return self.weight[:, None, None] * x + self.bias[:, None, None]

        return net(t, forward, weight=nn.Parameter(t.rand(width)), bias=nn.Parameter(t.rand(width)))

    a, b = 32 // s, 64 // s
    layers = (
        *(nn.Conv2d(3, a, 4, stride=4), channel_norm(a), block(a), block(a)),
        *(channel_norm(a), nn.Conv2d(a, b, 2, stride=2), block(b), block(b)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(b), nn.Linear(b, 10)),
    )
    return Probe(nn.Sequential(*layers), image(t))


def inception(t: Any, s: int) -> Probe:
    """Inception blocks: four branches side by side."""
    nn = t.nn

    def block(inputs: int, width: int) -> Any:
        def forward(self: Any, x: Any) -> Any:
            return t.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)

        parts = {
            "one": conv(t, inputs, width, 1),
            "three": nn.Sequential(conv(t, inputs, width // 2, 1), conv(t, width // 2, width)),
            "five": nn.Sequential(conv(t, inputs, width // 4, 1), conv(t, width // 4, width // 2, 5)),
            "pool": nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(t, inputs, width // 2, 1)),
        }
        return net(t, forward, **parts)

    a, b = 32 // s, 64 // s
    return Probe(nn.Sequential(conv(t, 3, a, stride=2), block(a, a), block(3 * a, b), head(t, 3 * b)), image(t))


def c2f(t: Any, s: int) -> Probe:
    """YOLOv8's C2f, SPPF and a small detection head with two scales."""
    nn = t.nn

    def block(inputs: int, outputs: int) -> Any:
        half = outputs // 2

        def forward(self: Any, x: Any) -> Any:
            parts = list(self.enter(x).chunk(2, 1))
            for inner in self.inner:
                parts.append(inner(parts[-1]))
            return self.leave(t.cat(parts, 1))

        inner = [residual(t, conv(t, half, half, act=nn.SiLU()), conv(t, half, half, act=nn.SiLU())) for _ in range(2)]
        enter, leave = conv(t, inputs, outputs, 1, act=nn.SiLU()), conv(t, 4 * half, outputs, 1, act=nn.SiLU())
        return net(t, forward, enter=enter, leave=leave, inner=nn.ModuleList(inner))

    def pools(width: int) -> Any:
        def forward(self: Any, x: Any) -> Any:
            x = self.enter(x)
            y = self.pool(x)
            z = self.pool(y)
            return self.leave(t.cat([x, y, z, self.pool(z)], 1))

        half = width // 2
        enter, leave = conv(t, width, half, 1, act=nn.SiLU()), conv(t, 4 * half, width, 1, act=nn.SiLU())
        return net(t, forward, enter=enter, leave=leave, pool=nn.MaxPool2d(5, 1, 2))

    a, b = 32 // s, 64 // s

    def forward(self: Any, x: Any) -> Any:
        fine = self.stage1(self.stem(x))
        coarse = self.stage2(fine)
        up = nn.functional.interpolate(coarse, scale_factor=2.0, mode="nearest")
        fine = self.merge(t.cat([up, fine], 1))
        found = [self.out1(fine), self.out2(coarse)]
        flat = t.cat([y.view(y.shape[0], 12, -1) for y in found], 2)
        boxes, scores = flat.split((4, 8), 1)
        return t.cat([boxes.exp(), scores.sigmoid()], 1)

    parts = {
        "stem": conv(t, 3, a, stride=2, act=nn.SiLU()),
        "stage1": block(a, a),
        "stage2": nn.Sequential(conv(t, a, b, stride=2, act=nn.SiLU()), block(b, b), pools(b)),
        "merge": block(a + b, a),
        "out1": nn.Sequential(conv(t, a, a, act=nn.SiLU()), nn.Conv2d(a, 12, 1)),
        "out2": nn.Sequential(conv(t, b, b, act=nn.SiLU()), nn.Conv2d(b, 12, 1)),
    }
    return Probe(net(t, forward, **parts), image(t))


def preactivation(t: Any, s: int) -> Probe:
    """Pre-activation ResNet: BatchNorm and ReLU before every convolution."""
    nn = t.nn

    def block(t: Any, inputs: int, outputs: int, stride: int) -> Any:
        shortcut: Any = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

        def forward(self: Any, x: Any) -> Any:
            y = self.relu(self.norm1(x))
            through = self.shortcut(y) if stride != 1 else x
            return self.conv2(self.relu(self.norm2(self.conv1(y)))) + through

        parts = {
            "relu": nn.ReLU(),
            "norm1": nn.BatchNorm2d(inputs),
            "conv1": nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            "norm2": nn.BatchNorm2d(outputs),
            "conv2": nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            "shortcut": shortcut,
        }
        return net(t, forward, **parts)

    w = [16 // s, 32 // s, 64 // s]
    stem = nn.Conv2d(3, w[0], 3, padding=1, bias=False)
    return Probe(
        nn.Sequential(stem, *stages(t, w, 2, block), nn.BatchNorm2d(w[-1]), nn.ReLU(), head(t, w[-1])), image(t)
    )


def audio(t: Any, s: int) -> Probe:
    """Dilated 1-D convolutions with gates, as in WaveNet and TCNs."""
    nn = t.nn
    width = 64 // s

    def block(dilation: int) -> Any:
        def forward(self: Any, x: Any) -> Any:
            y = self.norm(self.wide(nn.functional.pad(x, (2 * dilation, 0))))
            a, b = y.chunk(2, dim=1)
            return x + self.out(t.tanh(a) * t.sigmoid(b))

        parts = {
            "wide": nn.Conv1d(width, 2 * width, 3, dilation=dilation),
            "norm": nn.BatchNorm1d(2 * width),
            "out": nn.Conv1d(width, width, 1),
        }
        return net(t, forward, **parts)

    layers = (nn.Conv1d(1, width, 9, stride=4, padding=4), nn.ReLU(), block(1), block(2), block(4))
    tail = (nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 10))
    return Probe(nn.Sequential(*layers, *tail), image(t, 2, 1, 256))


def volumes(t: Any, s: int) -> Probe:
    """3-D convolutions."""
    nn = t.nn
    a, b = 16 // s, 32 // s

    def layer(inputs: int, outputs: int, stride: int = 1) -> Any:
        kernel = nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return nn.Sequential(kernel, nn.BatchNorm3d(outputs), nn.ReLU())

    layers = (layer(1, a), nn.MaxPool3d(2), residual(t, layer(a, a)), layer(a, b, 2), residual(t, layer(b, b)))
    tail = (nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(b, 5))
    return Probe(nn.Sequential(*layers, *tail), image(t, 2, 1, 8, 16, 16))


def norm_places(t: Any, s: int) -> Probe:
    """BatchNorm before the first Conv, after Concat, after pooling, and BatchNorm1d after Linear."""
    nn = t.nn
    a = 32 // s

    def forward(self: Any, x: Any) -> Any:
        x = self.norm0(x)
        x = self.norm1(t.cat([self.one(x), self.three(x)], 1))
        x = self.norm2(self.pool(self.inner(nn.functional.relu(x))))
        return self.head(x)

    classifier = (nn.Flatten(), nn.Linear(a * 64, 64 // s), nn.BatchNorm1d(64 // s), nn.ReLU(), nn.Linear(64 // s, 10))
    parts = {
        "norm0": nn.BatchNorm2d(3),
        "one": nn.Conv2d(3, a, 1),
        "three": nn.Conv2d(3, a, 3, padding=1),
        "norm1": nn.BatchNorm2d(2 * a),
        "inner": nn.Conv2d(2 * a, a, 3, padding=1),
        "pool": nn.AvgPool2d(4),
        "norm2": nn.BatchNorm2d(a),
        "head": nn.Sequential(*classifier),
    }
    return Probe(net(t, forward, **parts), image(t))


def activations(t: Any, s: int) -> Probe:
    """Activations written out: GELU by erf and by tanh, SiLU, HardSwish, Mish, Swish with a learned slope, PReLU."""
    nn = t.nn
    f = nn.functional
    width = 64 // s

    def forward(self: Any, x: Any) -> Any:
        x = self.convs[0](x)
        x = x * 0.5 * (1.0 + t.erf(x / 2.0**0.5))
        x = self.convs[1](x)
        x = 0.5 * x * (1.0 + t.tanh(0.7978845608 * (x + 0.044715 * t.pow(x, 3))))
        x = self.convs[2](x)
        x = x * t.sigmoid(x)
        x = self.convs[3](x)
        x = x * f.relu6(x + 3.0) / 6.0
        x = self.convs[4](x)
        x = x * t.tanh(f.softplus(x))
        x = self.prelu(self.convs[5](x))
        x = x * t.sigmoid(self.beta[None, :, None, None] * x)
        x = self.shared(self.convs[6](x))
        x = t.where(x > 0, x, 0.1 * x).clamp(min=-1.0, max=4.0)
        return self.head(t.maximum(x, self.floor[None, :, None, None]))

    parts = {
        "convs": nn.ModuleList([conv(t, 3 if i == 0 else width, width, act=nn.Identity()) for i in range(7)]),
        "prelu": nn.PReLU(width),
        "shared": nn.PReLU(),
        "beta": nn.Parameter(t.rand(width)),
        "floor": nn.Parameter(-t.rand(width)),
        "head": head(t, width),
    }
    return Probe(net(t, forward, **parts), image(t))


# Attention ------------------------------------------------------------------------------------------------------------


def attend(t: Any, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
    """Scaled dot-product attention written out; heads on axis 1."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    return t.softmax(scores, dim=-1) @ v


def feed_forward(t: Any, width: int, wide: int) -> Any:
    """Make LayerNorm, Linear, GELU, Linear."""
    nn = t.nn
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))


def fused_attention(t: Any, width: int, heads: int, size: int, *, native: bool = False) -> Any:
    """Make timm's attention: one Linear for queries, keys and values."""
    nn = t.nn

    def forward(self: Any, x: Any) -> Any:
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, length, 3, heads, size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v) if native else attend(t, q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, length, heads * size))

    inner = heads * size
    return net(t, forward, norm=nn.LayerNorm(width), qkv=nn.Linear(width, 3 * inner), out=nn.Linear(inner, width))


def split_heads(x: Any, heads: int) -> Any:
    """Put the heads on axis 1, as Hugging Face does."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def separate_attention(t: Any, width: int, heads: int, size: int, *, cross: int = 0, native: bool = False) -> Any:
    """Make Hugging Face's attention: a Linear each for queries, keys and values; keys from elsewhere where asked."""
    nn = t.nn

    def forward(self: Any, x: Any, context: Any = None, mask: Any = None) -> Any:
        x = self.norm(x)
        source = x if context is None else context
        q, k, v = split_heads(self.q(x), heads), split_heads(self.k(source), heads), split_heads(self.v(source), heads)
        native_attention = nn.functional.scaled_dot_product_attention
        y = native_attention(q, k, v, attn_mask=mask) if native else attend(t, q, k, v, mask)
        return self.out(y.transpose(1, 2).contiguous().view(x.shape[0], x.shape[1], heads * size))

    inner = heads * size
    parts = {
        "norm": nn.LayerNorm(width),
        "q": nn.Linear(width, inner),
        "k": nn.Linear(cross or width, inner, bias=False),
        "v": nn.Linear(cross or width, inner),
        "out": nn.Linear(inner, width),
    }
    return net(t, forward, **parts)


def vit(kind: str, *, native: bool = False) -> Callable[[Any, int], Probe]:
    """Return a builder of vision transformers."""

    def build(t: Any, s: int) -> Probe:
        nn = t.nn
        width, heads, size = 64 // s, 4, 16 // s
        make = fused_attention if kind == "fused" else separate_attention

        def forward(self: Any, x: Any) -> Any:
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = t.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
            x = self.norm(self.blocks(x))
            return self.head(x[:, 0])

        blocks: list[Any] = []
        for _ in range(2):
            blocks += [
                residual(t, make(t, width, heads, size, native=native)),
                residual(t, feed_forward(t, width, 4 * width)),
            ]
        parts = {
            "patches": nn.Conv2d(3, width, 8, stride=8),
            "token": nn.Parameter(t.randn(1, 1, width)),
            "places": nn.Parameter(t.randn(1, 17, width)),
            "blocks": nn.Sequential(*blocks),
            "norm": nn.LayerNorm(width),
            "head": nn.Linear(width, 10),
        }
        return Probe(net(t, forward, **parts), image(t))

    return build


def torch_encoder(t: Any, s: int) -> Probe:
    """A stack of torch's own TransformerEncoderLayer with MultiheadAttention, norm first."""
    nn = t.nn
    width = 64 // s

    def forward(self: Any, x: Any) -> Any:
        for layer in self.layers:
            y = layer.norm1(x)
            x = x + layer.self_attn(y, y, y, need_weights=False)[0]
            x = x + layer.linear2(nn.functional.relu(layer.linear1(layer.norm2(x))))
        return self.head(x.mean(1))

    layers = [nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, norm_first=True) for _ in range(2)]
    enter_forward = net(t, forward, layers=nn.ModuleList(layers), head=nn.Linear(width, 10))
    return Probe(nn.Sequential(nn.Linear(32, width), enter_forward), image(t, 2, 12, 32))


def rms_norm(t: Any, width: int) -> Any:
    """Make Llama's RMSNorm, written out."""

    def forward(self: Any, x: Any) -> Any:
        return self.weight * (x * t.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    return net(t, forward, weight=t.nn.Parameter(t.rand(width) + 0.5))


def rotate(t: Any, x: Any, cos: Any, sin: Any) -> Any:
    """Rotary position embedding by halves, as Hugging Face does."""
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + t.cat([-b, a], -1) * sin


def swiglu(t: Any, width: int, wide: int) -> Any:
    """Make Llama's feed-forward part."""
    nn = t.nn

    def forward(self: Any, x: Any) -> Any:
        x = self.norm(x)
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    linear = {"gate": (width, wide), "up": (width, wide), "down": (wide, width)}
    parts = {name: nn.Linear(*shape, bias=False) for name, shape in linear.items()}
    return net(t, forward, norm=rms_norm(t, width), **parts)


def grouped_attention(t: Any, width: int, heads: int, kept: int, size: int) -> Any:
    """Make Llama's attention: grouped queries, rotary positions, and a cache where one is given."""
    nn = t.nn

    def forward(self: Any, x: Any, cos: Any, sin: Any, past: Any = None) -> Any:
        batch, length, _ = x.shape
        x = self.norm(x)
        q = rotate(t, self.q(x).view(batch, length, heads, size).transpose(1, 2), cos, sin)
        k = rotate(t, self.k(x).view(batch, length, kept, size).transpose(1, 2), cos, sin)
        v = self.v(x).view(batch, length, kept, size).transpose(1, 2)
        if past is not None:
            k, v = t.cat([past[0], k], 2), t.cat([past[1], v], 2)
        present = (k, v)
        repeats = heads // kept
        total = k.shape[2]
        k, v = (
            y[:, :, None].expand(batch, kept, repeats, total, size).reshape(batch, heads, total, size) for y in (k, v)
        )
        y = attend(t, q, k, v).transpose(1, 2).reshape(batch, length, heads * size)
        return self.out(y), present

    linear = {"q": (width, heads * size), "k": (width, kept * size), "v": (width, kept * size)}
    parts = {name: nn.Linear(*shape, bias=False) for name, shape in linear.items()}
    return net(t, forward, norm=rms_norm(t, width), out=nn.Linear(heads * size, width, bias=False), **parts)


def rotary_tables(t: Any, length: int, size: int) -> tuple[Any, Any]:
    """Make cosines and sines of rotary positions: (length, size)."""
    angles = t.outer(t.arange(length).float(), 10000.0 ** (-t.arange(0, size, 2).float() / size))
    angles = t.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def gqa(t: Any, s: int) -> Probe:
    """Encoder with grouped queries, SwiGLU, RMSNorm and rotary positions."""
    nn = t.nn
    width, heads, kept, size = 64 // s, 4, 2, 16 // s
    cos, sin = rotary_tables(t, 12, size)

    def forward(self: Any, x: Any) -> Any:
        x = self.enter(x)
        for attention, inner in zip(self.attention, self.inner, strict=True):
            x = x + attention(x, self.cos, self.sin)[0]
            x = x + inner(x)
        return self.head(self.norm(x).mean(1))

    parts = {
        "enter": nn.Linear(32, width),
        "attention": nn.ModuleList([grouped_attention(t, width, heads, kept, size) for _ in range(2)]),
        "inner": nn.ModuleList([swiglu(t, width, 3 * width) for _ in range(2)]),
        "norm": rms_norm(t, width),
        "head": nn.Linear(width, 10),
        "cos": cos,
        "sin": sin,
    }
    return Probe(net(t, forward, **parts), image(t, 2, 12, 32))


def llama_cache(t: Any, s: int) -> Probe:
    """Llama decoder step: tokens and caches in, scores and caches out. The caches' sizes are the graph's own."""
    nn = t.nn
    width, heads, kept, size = 64 // s, 4, 2, 16
    cos, sin = rotary_tables(t, 32, size)

    def forward(self: Any, ids: Any, key: Any, value: Any) -> Any:
        x = self.embed(ids)
        begin, length = key.shape[2], ids.shape[1]
        cosines, sines = self.cos[begin : begin + length], self.sin[begin : begin + length]
        y, present = self.attention(x, cosines, sines, (key, value))
        x = x + y
        x = x + self.inner(x)
        return self.head(self.norm(x)), *present

    parts = {
        "embed": nn.Embedding(200, width),
        "attention": grouped_attention(t, width, heads, kept, size),
        "inner": swiglu(t, width, 3 * width),
        "norm": rms_norm(t, width),
        "head": nn.Linear(width, 200, bias=False),
        "cos": cos,
        "sin": sin,
    }
    past = (2, kept, 5, size)
    inputs = (tokens(t, 2, 200), t.randn(*past), t.randn(*past))
    return Probe(net(t, forward, **parts), inputs, ((1, 2, "past"), (2, 2, "past")))


def window_attention(t: Any, width: int, heads: int, size: int, shift: int, side: int = 4) -> Any:
    """Make Swin's attention inside windows, which a roll shifts, with a learned bias per relative position."""
    nn = t.nn
    inner = heads * size
    square = side * side

    def forward(self: Any, x: Any) -> Any:
        batch, height, wide, _ = x.shape
        x = self.norm(x)
        if shift:
            x = t.roll(x, shifts=(-shift, -shift), dims=(1, 2))
        x = x.view(batch, height // side, side, wide // side, side, width).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, square, width)
        qkv = self.qkv(x).reshape(x.shape[0], square, 3, heads, size).permute(2, 0, 3, 1, 4)
        bias = self.table[self.places].view(square, square, heads).permute(2, 0, 1)
        y = attend(t, qkv[0], qkv[1], qkv[2], bias).transpose(1, 2).reshape(x.shape[0], square, inner)
        y = self.out(y).view(batch, height // side, wide // side, side, side, width)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, wide, width)
        return t.roll(y, shifts=(shift, shift), dims=(1, 2)) if shift else y

    parts = {
        "norm": nn.LayerNorm(width),
        "qkv": nn.Linear(width, 3 * inner),
        "out": nn.Linear(inner, width),
        "table": nn.Parameter(t.randn((2 * side - 1) ** 2, heads)),
        "places": t.randint(0, (2 * side - 1) ** 2, (square * square,)),
    }
    return net(t, forward, **parts)


def patch_merging(t: Any, width: int) -> Any:
    """Make Swin's halving of the resolution: every other pixel by slices, put together, projected."""
    nn = t.nn

    def forward(self: Any, x: Any) -> Any:
        parts = [x[:, i::2, j::2, :] for j in range(2) for i in range(2)]
        return self.out(self.norm(t.cat(parts, -1)))

    return net(t, forward, norm=nn.LayerNorm(4 * width), out=nn.Linear(4 * width, 2 * width, bias=False))


def swin(t: Any, s: int) -> Probe:
    """Swin: windows cut by reshape and permute, shifted by roll, relative position bias, patch merging."""
    nn = t.nn

    def nhwc(self: Any, x: Any) -> Any:
        return self.conv(x).permute(0, 2, 3, 1)

    def pooled(self: Any, x: Any) -> Any:
        return self.head(self.norm(x).mean((1, 2)))

    def block(width: int, heads: int, shift: int) -> tuple[Any, Any]:
        attention = window_attention(t, width, heads, width // heads, shift)
        return residual(t, attention), residual(t, feed_forward(t, width, 4 * width))

    a = 32 // s
    blocks = (*block(a, 2, 0), *block(a, 2, 2), patch_merging(t, a), *block(2 * a, 4, 0))
    first = net(t, nhwc, conv=nn.Conv2d(3, a, 4, stride=4))
    last = net(t, pooled, norm=nn.LayerNorm(2 * a), head=nn.Linear(2 * a, 10))
    return Probe(nn.Sequential(first, *blocks, last), image(t))


def clip(t: Any, s: int) -> Probe:
    """CLIP: an image tower and a text tower with a causal mask, compared by cosine."""
    nn = t.nn
    width = 64 // s
    embedding = 32 // s

    def forward(self: Any, image: Any, text: Any) -> Any:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = self.project_image(self.norm_image(self.tower_image(x + self.places_image)).mean(1))
        y = self.embed(text) + self.places_text
        for attention, inner in zip(self.attention, self.inner, strict=True):
            y = y + attention(y, None, self.mask)
            y = y + inner(y)
        y = self.project_text(self.norm_text(y)[:, -1])
        x = x / x.norm(dim=-1, keepdim=True)
        y = y / y.norm(dim=-1, keepdim=True)
        return self.scale.exp() * x @ y.t()

    def blocks() -> Iterator[Any]:
        for _ in range(2):
            yield residual(t, fused_attention(t, width, 4, 16 // s))
            yield residual(t, feed_forward(t, width, 4 * width))

    parts = {
        "patches": nn.Conv2d(3, width, 8, stride=8),
        "places_image": nn.Parameter(t.randn(16, width)),
        "tower_image": nn.Sequential(*blocks()),
        "norm_image": nn.LayerNorm(width),
        "project_image": nn.Linear(width, embedding, bias=False),
        "embed": nn.Embedding(100, width),
        "places_text": nn.Parameter(t.randn(12, width)),
        "attention": nn.ModuleList([separate_attention(t, width, 4, 16 // s) for _ in range(2)]),
        "inner": nn.ModuleList([feed_forward(t, width, 4 * width) for _ in range(2)]),
        "mask": t.full((12, 12), -1e4).triu(1),
        "norm_text": nn.LayerNorm(width),
        "project_text": nn.Linear(width, embedding, bias=False),
        "scale": nn.Parameter(t.tensor(0.5)),
    }
    return Probe(net(t, forward, **parts), (*image(t), tokens(t)))


def whisper(t: Any, s: int) -> Probe:
    """Whisper: 1-D convolutions and an encoder, a decoder with cross attention, the embedding tied to the output."""
    nn = t.nn
    width = 64 // s

    def attention(cross: int = 0) -> Any:
        return separate_attention(t, width, 4, 16 // s, cross=cross)

    def forward(self: Any, sound: Any, ids: Any) -> Any:
        f = nn.functional
        x = f.gelu(self.conv2(f.gelu(self.conv1(sound)))).transpose(1, 2) + self.places
        x = x + self.encode(x)
        x = self.norm_sound(x + self.encode_inner(x))
        y = self.embed(ids) + self.places_text[: ids.shape[1]]
        y = y + self.own(y, None, self.mask)
        y = y + self.cross(y, x)
        y = self.norm_text(y + self.inner(y))
        return y @ self.embed.weight.t()

    parts = {
        "conv1": nn.Conv1d(20, width, 3, padding=1),
        "conv2": nn.Conv1d(width, width, 3, stride=2, padding=1),
        "places": nn.Parameter(t.randn(20, width)),
        "encode": attention(),
        "encode_inner": feed_forward(t, width, 4 * width),
        "norm_sound": nn.LayerNorm(width),
        "embed": nn.Embedding(100, width),
        "places_text": nn.Parameter(t.randn(12, width)),
        "own": attention(),
        "cross": attention(cross=width),
        "inner": feed_forward(t, width, 4 * width),
        "norm_text": nn.LayerNorm(width),
        "mask": t.full((12, 12), -1e4).triu(1),
    }
    return Probe(net(t, forward, **parts), (t.randn(2, 20, 40), tokens(t)))


# Text and sequences ---------------------------------------------------------------------------------------------------


def embedding_mlp(t: Any, s: int) -> Probe:
    """Embedding, mean, two linear layers."""
    nn = t.nn

    def forward(self: Any, ids: Any) -> Any:
        return self.layers(self.embed(ids).mean(1))

    layers = nn.Sequential(nn.Linear(64 // s, 128 // s), nn.ReLU(), nn.Linear(128 // s, 10))
    return Probe(net(t, forward, embed=nn.Embedding(500, 64 // s), layers=layers), (tokens(t),))


def tied_embedding(t: Any, s: int) -> Probe:
    """Language model whose embedding is its output matrix too."""
    nn = t.nn
    width = 64 // s

    def forward(self: Any, ids: Any) -> Any:
        x = self.embed(ids)
        x = x + self.inner(x)
        return nn.functional.linear(self.norm(x), self.embed.weight)

    parts = {
        "embed": nn.Embedding(300, width),
        "inner": feed_forward(t, width, 4 * width),
        "norm": nn.LayerNorm(width),
    }
    return Probe(net(t, forward, **parts), (tokens(t),))


def recurrent(kind: str, *, both: bool = False, layers: int = 1) -> Callable[[Any, int], Probe]:
    """Return a builder of recurrent networks that read features and classify the last step."""

    def build(t: Any, s: int) -> Probe:
        nn = t.nn
        inputs, units = 128, 48 // s
        cell = getattr(nn, kind)(inputs, units, num_layers=layers, batch_first=True, bidirectional=both)

        def forward(self: Any, x: Any) -> Any:
            return self.head(self.cell(x)[0][:, -1])

        return Probe(net(t, forward, cell=cell, head=nn.Linear(units * (1 + both), 10)), image(t, 2, 12, inputs))

    return build


def text_lstm(t: Any, s: int) -> Probe:
    """Embedding, bidirectional LSTM of two layers, LSTM reading both directions, maximum over time."""
    nn = t.nn

    def forward(self: Any, ids: Any) -> Any:
        return self.head(self.second(self.first(self.embed(ids))[0])[0].amax(1))

    parts = {
        "embed": nn.Embedding(200, 32 // s),
        "first": nn.LSTM(32 // s, 32 // s, num_layers=2, batch_first=True, bidirectional=True),
        "second": nn.LSTM(64 // s, 32 // s, batch_first=True),
        "head": nn.Linear(32 // s, 5),
    }
    return Probe(net(t, forward, **parts), (tokens(t, 12, 200),))


FAMILIES: dict[str, Family] = {
    "resnet18": Family(resnet((16, 32, 64, 128), 2), 0.75),
    "resnet20": Family(resnet((16, 32, 64), 3), 0.748),
    "resnet56": Family(resnet((16, 32, 64), 9), 0.748),
    "resnet20_default_bn": Family(resnet((16, 32, 64), 3, random=False), 0.748),
    "resnet20_option_a": Family(resnet_option_a, 0.74),
    "vgg_bn": Family(vgg, 0.706),
    "vgg_flatten": Family(vgg_flatten, 0.746),
    "mlp": Family(mlp, 0.519),
    "mobilenetv2": Family(mobilenet(gate=False), 0.721),
    "mobilenetv2_se": Family(mobilenet(gate=True), 0.732),
    "densenet": Family(densenet, 0.741),
    "resnext": Family(resnext, 0.731),
    "shufflenetv2": Family(shufflenet, 0.67),
    "uneven_split": Family(uneven_split, 0.4),
    "unet": Family(unet, 0.4),
    "groupnorm": Family(groupnorm, 0.732),
    "convnext": Family(convnext, 0.703),
    "vit_fused": Family(vit("fused"), 0.728),
    "vit_separate": Family(vit("separate"), 0.728),
    "vit_fused_sdpa": Family(vit("fused", native=True)),
    "vit_separate_sdpa": Family(vit("separate", native=True)),
    "torch_encoder": Family(torch_encoder),
    "gqa_swiglu_rope": Family(gqa, 0.684),
    "embedding_mlp": Family(embedding_mlp, 0.3),
    "lstm": Family(recurrent("LSTM"), 0.522),
    "gru": Family(recurrent("GRU"), 0.496),
    "rnn": Family(recurrent("RNN")),
    "lstm_both": Family(recurrent("LSTM", both=True, layers=2)),
    "gru_both": Family(recurrent("GRU", both=True)),
    "text_lstm": Family(text_lstm),
    "inception": Family(inception),
    "c2f": Family(c2f),
    "preactivation": Family(preactivation),
    "regnet": Family(regnet),
    "efficientnet": Family(mobilenet(gate=True, act="SiLU")),
    "mobilenetv3": Family(mobilenet(gate=True, act="Hardswish")),
    "swin": Family(swin),
    "clip": Family(clip),
    "whisper": Family(whisper),
    "llama_cache": Family(llama_cache),
    "tied_embedding": Family(tied_embedding),
    "audio_1d": Family(audio),
    "volumes_3d": Family(volumes),
    "norm_places": Family(norm_places),
    "activations": Family(activations),
}


# Export ---------------------------------------------------------------------------------------------------------------


def randomise(t: Any, network: Any) -> None:
    """Give norm layers distinct parameters and statistics, and every other vector distinct entries."""
    with t.no_grad():
        for module in network.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                is_scale = name.rsplit(".")[-1] == "weight"
                parameter.uniform_(0.5, 1.5) if is_scale else parameter.normal_(0, 0.2)


def build(t: Any, family: Family, divisor: int = 1) -> Probe:
    """Make a network with its fixed seed, ready for export."""
    t.manual_seed(SEED)
    probe = family.build(t, divisor)
    if probe.random:
        randomise(t, probe.network)
    probe.network.eval()
    return probe


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters: warnings, their progress on standard output, and their log."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    saved = sys.stdout
    with warnings.catch_warnings(), Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        warnings.simplefilter("ignore")
        sys.stdout = nowhere
        try:
            yield
        finally:
            sys.stdout = saved


def export(t: Any, probe: Probe, exporter: str, path: Path) -> None:
    """Write one network with one exporter."""
    names = [f"input{i}" for i in range(len(probe.inputs))]
    axes: list[dict[int, str]] = [{0: "batch"} for _ in names]
    for place, axis, name in probe.open_axes:
        axes[place][axis] = name
    options: dict[str, Any] = {"input_names": names}
    if exporter == "dynamo":
        sizes: dict[str, Any] = {"batch": t.export.Dim("batch")}
        sizes |= {name: t.export.Dim(name) for _, _, name in probe.open_axes}
        shapes = [{axis: sizes[name] for axis, name in entry.items()} for entry in axes]
        options |= {"dynamo": True, "opset_version": DYNAMO_OPSET, "external_data": False, "verbose": False}
        options["dynamic_shapes"] = tuple(shapes)
    else:
        options |= {"dynamo": False, "opset_version": LEGACY_OPSET}
        options["dynamic_axes"] = dict(zip(names, axes, strict=True))
    if exporter == "legacy_bn":
        # In mode EVAL this exporter always fuses Conv and BatchNormalization; PRESERVE keeps the nodes, in inference
        # form because the network itself is in evaluation mode.
        options |= {"training": t.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
    with quiet():
        t.onnx.export(probe.network, probe.inputs, str(path), **options)


# Measure --------------------------------------------------------------------------------------------------------------


def half_share(t: Any, family: str) -> float:
    """Return the share of its parameters that a network lacks in torch once it has half of every width."""
    full, half = (sum(p.numel() for p in build(t, FAMILIES[family], s).network.parameters()) for s in (1, 2))
    return 1.0 - float(half / full)


def measure(path: Path, half: Path, family: str, exporter: str, share: float) -> Row:
    """Inspect and compress one file.

    Args:
        path: The file.
        half: The same network with half of every width, by the same exporter.
        family: Name of the family.
        exporter: Which exporter wrote both.
        share: What `half_share` says. Exporters keep two copies of some weights, but of small ones only one, so the
            smaller share of the two is the one to reach.
    """
    start = time.perf_counter()
    row = Row(family, exporter, peer=FAMILIES[family].peer)
    try:
        found = onnxfuse.inspect(path)
        small = onnxfuse.inspect(half, prove=False).cost.parameters
        row = replace(
            row,
            parameters=found.cost.parameters,
            groups=len(found.groups),
            free_groups=sum(group.frozen is None for group in found.groups),
            half=min(share, 1 - small / max(found.cost.parameters, 1)),
            frozen=1 - found.compressible_share,
            reasons=top_reasons(found),
            notes=found.notes,
        )
        report = onnxfuse.compress(path, ratio=RATIO, method="prune", provider="cpu").report
        removed = 1 - report.after.parameters / max(report.before.parameters, 1)
        row = replace(row, removed=removed, notes=tuple(dict.fromkeys((*found.notes, *report.notes))))
    except onnxfuse.OnnxFuseError as error:
        row = replace(row, problem=f"{type(error).__name__}: {error.what}")
    except Exception as error:
        # A bug of onnxfuse, which is what this looks for: it has its row, and the others follow.
        logger.exception("%s, %s", family, exporter)
        row = replace(row, problem=f"BUG {type(error).__name__}: {error}")
    return replace(row, seconds=time.perf_counter() - start)


def top_reasons(report: onnxfuse.InspectReport) -> tuple[str, ...]:
    """Return the reasons that freeze the most parameters, without those that freeze what could not change anyway."""
    counts = Counter({reason: entry["parameters"] for reason, entry in report.frozen_reasons.items()})
    inner = [(r, n) for r, n in counts.most_common() if not r.startswith(("graph input", "graph output", "it has one"))]
    return tuple(f"{reason} ({count:,})" for reason, count in inner[:MOST_REASONS])


def cells(row: Row) -> tuple[str, ...]:
    """Return what a row of the table says, column by column."""
    text = row.problem or "; ".join(n for n in row.notes if "proof" in n or "proven" in n)
    return (
        row.family,
        row.exporter,
        f"{row.parameters:,}",
        f"{row.groups} ({row.free_groups})",
        f"{row.removed:.3f}",
        f"{row.half:.3f}",
        f"{row.peer:.3f}" if row.peer else "",
        row.verdict,
        f"{row.frozen:.3f}",
        f"{row.seconds:.1f}",
        text or (row.reasons[0] if row.reasons else ""),
    )


def show(rows: Sequence[Row]) -> Table:
    """Return a table for a terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(COLUMNS):
        table.add_column(
            name, justify="left" if i < 2 or i == len(COLUMNS) - 1 else "right", no_wrap=i < len(COLUMNS) - 1
        )
    for row in rows:
        table.add_row(*cells(row))
    return table


def written(t: Any, family: str, exporter: str, folder: Path, *, divisor: int = 1, keep: bool = False) -> Path:
    """Export one network into a folder, and return the path."""
    path = folder / f"{family}.{exporter}.onnx"
    if not (keep and path.exists()):
        export(t, build(t, FAMILIES[family], divisor), exporter, path)
    return path


def run(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Export the families asked for, and measure them if asked to."""
    t: Any = importlib.import_module("torch")
    t.set_num_threads(1)
    halves = folder / "half"
    if options.measure:
        halves.mkdir(exist_ok=True)
    rows = []
    for family, exporter in product(options.family or FAMILIES, options.exporter or EXPORTERS):
        try:
            path = written(t, family, exporter, folder, keep=options.keep)
            half = written(t, family, exporter, halves, divisor=2, keep=options.keep) if options.measure else path
        except Exception as error:
            # An exporter that can't write a network is no reason to go without the other files.
            logger.exception("%s, %s", family, exporter)
            rows.append(Row(family, exporter, problem=f"EXPORT {type(error).__name__}: {str(error).strip()[:80]}"))
            continue
        if options.measure:
            rows.append(measure(path, half, family, exporter, half_share(t, family)))
            sys.stderr.write("  ".join(cells(rows[-1]))[:LONGEST_LINE] + "\n")
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where the files go (default: a new temporary folder)")
    parser.add_argument("--measure", action="store_true", help="compress every file, and show what came of it")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only this one; may be given several times")
    parser.add_argument("--exporter", action="append", choices=EXPORTERS, help="only this one")
    parser.add_argument("--keep", action="store_true", help="do not export files that are there already")
    parser.add_argument("--json", type=Path, help="write the measurements, with all top reasons, to this file")
    options = parser.parse_args(arguments)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="onnxfuse-probes-"))
    if folder.resolve().is_relative_to(REPOSITORY):
        sys.stderr.write(f"{folder} is inside the repository, which generated files do not belong in\n")
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    rows = run(options, folder)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    if options.measure:
        console = Console(width=None if sys.stdout.isatty() else 220)
        console.print(show(rows))
    sys.stdout.write(f"{len(list(folder.glob('*.onnx')))} files in {folder}\n")
    return int(any(row.verdict != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
