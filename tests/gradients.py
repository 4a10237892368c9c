"""Gradients by finite differences, in double precision and in ONNX's own evaluator: no part of onnxfuse takes part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxfuse.arrays import FloatArray
from tests.builders import AnyArray, Arrays

__all__ = ["LinearLoss", "assert_gradients", "in_double", "slope"]

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
# Small enough that a kink is hardly ever within reach, and large enough for 16 digits.
_STEP = 1e-5


@dataclass(frozen=True)
class LinearLoss:
    """The sum of all outputs, each entry times a random number.

    Attributes:
        weights: The random numbers, by output.
    """

    weights: Mapping[str, FloatArray]
    words: str = "a random projection"

    @classmethod
    def of(cls, outputs: Arrays, seed: int = 0) -> "LinearLoss":
        """Draw weights for outputs."""
        rng = np.random.default_rng(seed)
        return cls({n: rng.normal(size=y.shape) for n, y in outputs.items() if y.dtype.kind == "f"})

    def __call__(self, outputs: Mapping[str, AnyArray], start: int, /) -> Mapping[str, FloatArray]:
        """Return the weights."""
        del outputs, start
        return self.weights


def in_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model whose floats all have double precision."""
    double = onnx.ModelProto()
    double.CopyFrom(model)
    graph = double.graph
    del graph.value_info[:]
    for tensor in graph.initializer:
        _widen(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "value" and node.op_type in {"Constant", "ConstantOfShape"}:
                _widen(attribute.t)
            if attribute.name == "to" and attribute.i in _FLOATS:
                attribute.i = TensorProto.DOUBLE
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type in _FLOATS:
            info.type.tensor_type.elem_type = TensorProto.DOUBLE
    return double


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in _FLOATS:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


def slope(model: onnx.ModelProto, feeds: Arrays, loss: LinearLoss, name: str, value: AnyArray, way: AnyArray) -> float:
    """Return by how much a loss grows as a value moves along a direction, by central differences.

    Args:
        model: The network, in double precision.
        feeds: Its inputs.
        loss: The loss.
        name: A graph input, a constant, or a value that a node computes; the network is cut there.
        value: What it is.
        way: The direction, of the same shape.
    """
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    for node in cut.graph.node:
        for i, output in enumerate(node.output):
            if output == name:
                node.output[i] = f"{name} as it was"
    stored = [tensor for tensor in cut.graph.initializer if tensor.name == name]
    for tensor in stored:
        cut.graph.initializer.remove(tensor)
    if name not in {i.name for i in cut.graph.input}:
        cut.graph.input.append(onnx.helper.make_tensor_value_info(name, TensorProto.DOUBLE, value.shape))
    if name in loss.weights:
        # A value that is an output itself counts as it is fed.
        cut.graph.node.append(onnx.helper.make_node("Identity", [name], [f"{name} as fed"]))
    names = [f"{n} as fed" if n == name else n for n in loss.weights]
    evaluator = ReferenceEvaluator(cut)
    totals = []
    for sign in (1, -1):
        given = {n: f.astype(np.float64) if f.dtype.kind == "f" else f for n, f in feeds.items()}
        given[name] = value + sign * _STEP * way
        # Some BLAS builds raise the processor's flag for invalid values in products that have none.
        with np.errstate(invalid="ignore"):
            outputs = evaluator.run(names, given)
        totals.append(sum(float((w * np.asarray(y)).sum()) for w, y in zip(loss.weights.values(), outputs, strict=True)))
    return (totals[0] - totals[1]) / (2 * _STEP)


def assert_gradients(
    model: onnx.ModelProto, feeds: Arrays, loss: LinearLoss, values: Arrays, gradients: Arrays, names: Sequence[str]
) -> None:
    """Assert that gradients are the slopes along a random direction, for each value.

    Entries that several elements have in common are not moved: there, maxima tie and activations have their kinks.
    """
    double = in_double(model)
    rng = np.random.default_rng(2)
    for name in names:
        value, gradient = values[name].astype(np.float64), gradients[name].astype(np.float64)
        assert gradient.shape == value.shape, name
        _, inverse, counts = np.unique(value, return_inverse=True, return_counts=True)
        unique = (counts[inverse] == 1).reshape(value.shape)
        for mask in (unique, unique & (rng.random(value.shape) < 0.5)):
            way = rng.normal(size=value.shape) * mask
            expected, actual = slope(double, feeds, loss, name, value, way), float((gradient * way).sum())
            scale = float(np.abs(gradient * way).sum()) + abs(expected)
            assert abs(actual - expected) <= 1e-3 * scale + 1e-5, f"{name}: {actual} and not {expected}"
