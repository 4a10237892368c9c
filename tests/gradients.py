"""Gradients by finite differences, in ONNX's own evaluator or in ONNX Runtime: no part of onnxfuse takes part."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnxfuse.arrays import FloatArray
from tests.builders import AnyArray, Arrays, run_ort, run_reference

__all__ = ["LinearLoss", "assert_gradients", "in_double", "slope"]

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
# In double precision, a step that hardly ever reaches a kink; in single precision, one that is not all rounding.
_STEPS = {True: 1e-2, False: 1e-7}
_TOLERANCES = {True: 1e-2, False: 1e-3}


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
        return cls({n: np.asarray(rng.normal(size=y.shape)) for n, y in outputs.items() if y.dtype.kind == "f"})

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


def slope(
    model: onnx.ModelProto,
    feeds: Arrays,
    loss: LinearLoss,
    name: str,
    value: AnyArray,
    way: AnyArray,
    *,
    single: bool = False,
) -> float:
    """Return by how much a loss grows as a value moves along a direction, by central differences.

    Args:
        model: The network.
        feeds: Its inputs.
        loss: The loss.
        name: A graph input, a constant, or a value that a node computes; the network is cut there.
        value: What it is.
        way: The direction, of the same shape.
        single: Whether to run it as it is in ONNX Runtime, instead of in double precision in ONNX's own evaluator.
    """
    cut, names = _cut(model if single else in_double(model), name, loss)
    kind = np.dtype(np.float32) if single else np.dtype(np.float64)
    totals = []
    for sign in (1, -1):
        given = {n: f.astype(kind) if f.dtype.kind == "f" else f for n, f in feeds.items()}
        given[name] = (value + sign * _STEPS[single] * way).astype(kind)
        # Some BLAS builds raise the processor's flag for invalid values in products that have none.
        with np.errstate(invalid="ignore"):
            outputs = run_ort(cut, given) if single else run_reference(cut, given)
        weights = zip(names, loss.weights.values(), strict=True)
        totals.append(sum(float((w * outputs[n].astype(np.float64)).sum()) for n, w in weights))
    return (totals[0] - totals[1]) / (2 * _STEPS[single])


def _cut(model: onnx.ModelProto, name: str, loss: LinearLoss) -> tuple[onnx.ModelProto, list[str]]:
    """Return a network that takes a value as an input, and what its outputs are called now."""
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    kind = next(i.type.tensor_type.elem_type for i in cut.graph.input)
    for node in cut.graph.node:
        for i, output in enumerate(node.output):
            if output == name:
                node.output[i] = f"{name} as it was"
    for tensor in [tensor for tensor in cut.graph.initializer if tensor.name == name]:
        cut.graph.initializer.remove(tensor)
    if name not in {i.name for i in cut.graph.input}:
        cut.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
    if name in loss.weights:
        # A value that is an output itself counts as it is fed.
        cut.graph.node.append(onnx.helper.make_node("Identity", [name], [f"{name} as fed"]))
    names = [f"{n} as fed" if n == name else n for n in loss.weights]
    del cut.graph.output[:], cut.graph.value_info[:]
    cut.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    return cut, names


def assert_gradients(
    model: onnx.ModelProto,
    feeds: Arrays,
    loss: LinearLoss,
    values: Arrays,
    gradients: Arrays,
    *,
    single: bool = False,
) -> None:
    """Assert that gradients are the slopes along random directions, for each value.

    Entries that several elements have in common, and whole numbers, are not moved: there, maxima tie, activations have
    their kinks and casts their steps.
    """
    rng = np.random.default_rng(2)
    for name, found in gradients.items():
        value, gradient = values[name].astype(np.float64), found.astype(np.float64)
        assert gradient.shape == value.shape, name
        _, inverse, counts = np.unique(value, return_inverse=True, return_counts=True)
        free = (counts[inverse] == 1).reshape(value.shape) & (value != np.round(value))
        for mask in (free, free & (rng.random(value.shape) < 0.5)):
            way = rng.normal(size=value.shape) * mask
            expected = slope(model, feeds, loss, name, value, way, single=single)
            actual = float((gradient * way).sum())
            scale = float(np.abs(gradient * way).sum()) + abs(expected)
            bound = _TOLERANCES[single] * (scale + 1e-2)
            assert abs(actual - expected) <= bound, f"{name}: {actual} and not {expected}"
