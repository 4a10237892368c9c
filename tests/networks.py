"""The networks of the paper's CIFAR experiments in its form, Conv with a bias then BatchNormalization; random weights.

ResNet-18 has 11,178,762 parameters and VGG11-BN 9,231,114, without running means and variances, as the paper's code
counts. Weights are drawn so that activations keep a size of about 1 from layer to layer.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxfuse.arrays import FloatArray

__all__ = ["CIFAR_CLASSES", "INPUT_NAME", "resnet18", "vgg11"]

CIFAR_CLASSES = 10
INPUT_NAME = "image"
# Versions that every supported ONNX Runtime reads; the newest ones of onnx may be newer than those.
_IR_VERSION = 8
_OPSET = 17
_IMAGE_SIDE = 32
_VGG11_WIDTHS: tuple[int | str, ...] = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")
_RESNET18_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))


@dataclass
class _Builder:
    """Collects nodes and weights; every method adds one layer and returns the name of its result."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def conv(self, x: str, name: str, channels: tuple[int, int], *, kernel: int = 3, stride: int = 1) -> str:
        inputs, outputs = channels
        fan_in = inputs * kernel * kernel
        weight = self.rng.standard_normal((outputs, inputs, kernel, kernel)) * math.sqrt(2 / fan_in)
        names = [self._store(f"{name}.weight", weight), self._store(f"{name}.bias", self._small(outputs))]
        return self._add("Conv", [x, *names], name, strides=[stride] * 2, pads=[kernel // 2] * 4, group=1)

    def norm(self, x: str, name: str, channels: int) -> str:
        parameters = {
            "weight": 1 + self._small(channels),
            "bias": self._small(channels),
            "running_mean": self._small(channels),
            "running_var": self.rng.uniform(0.5, 1.5, channels),
        }
        names = [self._store(f"{name}.{key}", value) for key, value in parameters.items()]
        return self._add("BatchNormalization", [x, *names], name, epsilon=1e-5)

    def plain(self, op: str, *inputs: str, name: str, **attributes: int | list[int]) -> str:
        return self._add(op, list(inputs), name, **attributes)

    def linear(self, x: str, name: str, channels: tuple[int, int]) -> str:
        inputs, outputs = channels
        weight = self.rng.standard_normal((outputs, inputs)) / math.sqrt(inputs)
        names = [self._store(f"{name}.weight", weight), self._store(f"{name}.bias", self._small(outputs))]
        return self._add("Gemm", [x, *names], name, transB=1)

    def model(self, name: str, output: str) -> onnx.ModelProto:
        shape: list[str | int] = ["batch", 3, _IMAGE_SIDE, _IMAGE_SIDE]
        image = helper.make_tensor_value_info(INPUT_NAME, TensorProto.FLOAT, shape)
        logits = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", CIFAR_CLASSES])
        graph = helper.make_graph(self.nodes, name, [image], [logits], self.weights)
        opset = helper.make_opsetid("", _OPSET)
        return helper.make_model(graph, ir_version=_IR_VERSION, opset_imports=[opset])

    def _small(self, count: int) -> FloatArray:
        return 0.1 * self.rng.standard_normal(count)

    def _store(self, name: str, value: FloatArray) -> str:
        self.weights.append(numpy_helper.from_array(value.astype(np.float32), name))
        return name

    def _add(self, op: str, inputs: list[str], name: str, **attributes: float | list[int]) -> str:
        node = helper.make_node(op, inputs, [f"{name}.out"], name=name)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        return f"{name}.out"


def resnet18(seed: int = 0) -> onnx.ModelProto:
    """Build the CIFAR form of ResNet-18: a 3x3 stem without pooling, four stages of two basic blocks."""
    b = _Builder(np.random.default_rng(seed))
    x = b.conv(INPUT_NAME, "conv1", (3, 64))
    x = b.plain("Relu", b.norm(x, "bn1", 64), name="relu1")
    channels = 64
    for stage, (width, stride) in enumerate(_RESNET18_STAGES, start=1):
        for block in range(2):
            x = _basic_block(b, x, f"layer{stage}.{block}", (channels, width), stride if block == 0 else 1)
            channels = width
    x = b.plain("GlobalAveragePool", x, name="pool")
    x = b.plain("Flatten", x, name="flatten", axis=1)
    return b.model("resnet18", b.linear(x, "linear", (channels, CIFAR_CLASSES)))


def _basic_block(b: _Builder, x: str, name: str, channels: tuple[int, int], stride: int) -> str:
    inputs, width = channels
    y = b.conv(x, f"{name}.conv1", channels, stride=stride)
    y = b.plain("Relu", b.norm(y, f"{name}.bn1", width), name=f"{name}.relu1")
    y = b.conv(y, f"{name}.conv2", (width, width))
    y = b.norm(y, f"{name}.bn2", width)
    if stride != 1 or inputs != width:
        x = b.conv(x, f"{name}.shortcut.conv", channels, kernel=1, stride=stride)
        x = b.norm(x, f"{name}.shortcut.bn", width)
    return b.plain("Relu", b.plain("Add", y, x, name=f"{name}.add"), name=f"{name}.relu2")


def vgg11(seed: int = 0) -> onnx.ModelProto:
    """Build the CIFAR form of VGG11-BN: eight convolutions and one linear classifier."""
    b = _Builder(np.random.default_rng(seed))
    x, channels = INPUT_NAME, 3
    for i, width in enumerate(_VGG11_WIDTHS):
        if isinstance(width, str):
            x = b.plain("MaxPool", x, name=f"pool{i}", kernel_shape=[2, 2], strides=[2, 2])
            continue
        x = b.conv(x, f"conv{i}", (channels, width))
        x = b.plain("Relu", b.norm(x, f"bn{i}", width), name=f"relu{i}")
        channels = width
    x = b.plain("Flatten", x, name="flatten", axis=1)
    return b.model("vgg11_bn", b.linear(x, "classifier", (channels, CIFAR_CLASSES)))
