"""Weights of floats that the graph rounds and decodes again, as training for quantisation leaves them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnxfuse
from onnxfuse.fusion.maps import ChannelMap
from tests.builders import AnyArray, Net, initializers, run_ort, run_ort_all
from tests.laws import Fused, analysis_of, assert_only_weights_differ, assert_same_outputs, assert_valid, fuse

LAYERS = ("first", "second", "third")
# The weight of the second layer is too large to count as a constant that its makers may be forgotten of.
WIDTHS = (24, 24, 3)


@dataclass(frozen=True)
class Form:
    """How an exporter writes a weight.

    Attributes:
        per_channel: Whether every output channel has a scale.
        zero: Its zero point.
        dtype: The type of the integers.
        narrow: Whether a Clip leaves out the least integer.
        turned: Whether the weight is stored the other way round: not at all, before it is rounded, or behind that.
        outliers: Whether the scale is too small for some of the weights.
        bias: How the bias is written: as floats, as integers with the scale of the product, or rounded too.
    """

    per_channel: bool = True
    zero: int = 0
    dtype: Any = np.int8
    narrow: bool = False
    turned: str = ""
    outliers: bool = False
    bias: str = "floats"


FORMS = {
    "channels": Form(),
    "tensor": Form(per_channel=False),
    "zero point": Form(per_channel=False, zero=117, dtype=np.uint8),
    "zero points": Form(zero=131, dtype=np.uint8, outliers=True),
    "narrow": Form(narrow=True),
    "turned before": Form(turned="before"),
    "turned between": Form(turned="between", narrow=True),
    "turned behind": Form(turned="behind"),
    "outliers": Form(outliers=True),
    "outliers, narrow": Form(outliers=True, narrow=True, per_channel=False),
    "bias of integers": Form(bias="integers"),
    "rounded bias": Form(bias="rounded"),
}
FORM = pytest.mark.parametrize("label", FORMS)
X_SCALE = 0.04


def weight(net: Net, name: str, dims: tuple[int, ...], form: Form) -> tuple[str, AnyArray]:
    """Add a weight as an exporter writes it; return its value and its scale."""
    w = net.rng.normal(size=dims) * np.sqrt(2 / np.prod(dims[1:]))
    reach = min(form.zero - np.iinfo(form.dtype).min, np.iinfo(form.dtype).max - form.zero)
    largest = np.abs(w).max(axis=tuple(range(1, len(dims))) if form.per_channel else None)
    scale = (largest / reach * (0.6 if form.outliers else 1.0)).astype(np.float32)
    zero = np.full(scale.shape, form.zero, form.dtype)
    order = [1, 0, *range(2, len(dims))]
    value = net.constant(w.transpose(order) if form.turned else w, name=f"{name}_w")
    parameters = (net.constant(scale, name=f"{name}_scale"), net.constant(zero, name=f"{name}_zero"))
    if form.turned == "before":
        value = net.node("Transpose", value, perm=order)
    axis = 1 if form.turned in {"between", "behind"} else 0
    value = net.node("QuantizeLinear", value, *parameters, axis=axis)
    if form.narrow:
        value = net.node("Clip", value, net.constant(np.array(-127, np.int8)), net.constant(np.array(127, np.int8)))
    if form.turned == "between":
        value, axis = net.node("Transpose", value, perm=order), 0
    value = net.node("DequantizeLinear", value, *parameters, axis=axis)
    return net.node("Transpose", value, perm=order) if form.turned == "behind" else value, scale


def bias(net: Net, name: str, count: int, w_scale: AnyArray, form: Form) -> str:
    """Add a bias."""
    values = net.rng.uniform(-0.5, 0.5, count)
    match form.bias:
        case "integers":
            scale = np.broadcast_to(np.float32(X_SCALE) * w_scale, count)
            integers = net.constant(np.rint(values / scale).astype(np.int32), name=f"{name}_b")
            return net.node("DequantizeLinear", integers, net.constant(scale, name=f"{name}_b_scale"), axis=0)
        case "rounded":
            parameters = (net.constant(np.float32(0.5 / 127)), net.constant(np.array(0, np.int8)))
            rounded = net.node("QuantizeLinear", net.constant(values, name=f"{name}_b"), *parameters)
            return net.node("DequantizeLinear", rounded, *parameters)
        case _:
            return net.constant(values, name=f"{name}_b")


def rounded_input(net: Net, x: str) -> str:
    """Round an activation."""
    parameters = (net.constant(np.float32(X_SCALE)), net.constant(np.array(0, np.int8)))
    return net.node("DequantizeLinear", net.node("QuantizeLinear", x, *parameters), *parameters)


@cache
def network(label: str) -> Net:
    """Write a network of two convolutions and a product with rounded weights."""
    net, form = Net(13, seed=11), FORMS[label]
    x = net.input(2, 3, 5, 5)
    for name, width in zip(LAYERS[:2], WIDTHS[:2], strict=True):
        w, scale = weight(net, name, (width, net.channels(x), 3, 3), form)
        b = bias(net, name, width, scale, form)
        x = net.node("Relu", net.node("Conv", rounded_input(net, x), w, b, name=name, pads=[1, 1, 1, 1]))
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    w, scale = weight(net, "third", (WIDTHS[2], WIDTHS[1]), form)
    b = bias(net, "third", WIDTHS[2], scale, form)
    net.output(net.node("Gemm", rounded_input(net, x), w, b, name="third", transB=1))
    return net


def layer_inputs(model: onnx.ModelProto, feeds: Mapping[str, AnyArray]) -> dict[str, tuple[AnyArray, AnyArray]]:
    """Return weight and bias of every layer as it computes with them."""
    seen = {**run_ort_all(model, feeds), **initializers(model)}
    return {n.name: (seen[n.input[1]], seen[n.input[2]]) for n in model.graph.node if n.name in LAYERS}


def baked(label: str) -> onnx.ModelProto:
    """Return the network with weights and biases stored as what its layers compute with."""
    model = network(label).model()
    found = layer_inputs(model, network(label).feeds)
    for node in model.graph.node:
        for slot, value in enumerate(found.get(node.name, ()), start=1):
            node.input[slot] = f"{node.name}_baked{slot}"
            model.graph.initializer.append(numpy_helper.from_array(value, node.input[slot]))
    return model


def both(label: str, maps: Mapping[str, ChannelMap]) -> tuple[Fused, Fused]:
    """Apply maps to the network and to its baked form."""
    return fuse(analysis_of(network(label).model()), maps), fuse(analysis_of(baked(label)), maps)


@FORM
def test_every_hidden_group_is_free_and_proven(label: str) -> None:
    """Hidden channels are free and may be mixed, and the proof by permutation has nothing to say."""
    report = onnxfuse.inspect(network(label).model(), provider="cpu")
    found = [(g.name, g.channels_before, bool(g.frozen), g.unmixable or "") for g in report.groups]
    assert found == [("first", 24, False, ""), ("second", 24, False, ""), ("third", 3, True, "")]
    assert report.notes == ()


@FORM
def test_dropped_channels_leave_the_others_as_they_were(label: str) -> None:
    """Dropping channels does, to the last bit, what it does to the network whose weights are rounded for good."""
    rng = np.random.default_rng(4)
    kept = {name: np.sort(rng.permutation(24)[:9]) for name in LAYERS[:2]}
    ours, theirs = both(label, {name: ChannelMap.selection(index, 24) for name, index in kept.items()})
    feeds = network(label).feeds
    want = layer_inputs(theirs.model, feeds)
    for name, found in layer_inputs(ours.model, feeds).items():
        for a, b in zip(found, want[name], strict=True):
            np.testing.assert_array_equal(a, b)
    assert_same_outputs(run_ort(theirs.model, feeds), run_ort(ours.model, feeds), tolerance=0)
    assert_only_weights_differ(network(label).model(), ours.model)
    assert_valid(ours.model)


@FORM
def test_permuted_channels_change_nothing(label: str) -> None:
    """A permutation of all channels changes nothing."""
    rng = np.random.default_rng(5)
    ours, _ = both(label, {name: ChannelMap.permutation(rng.permutation(24)) for name in LAYERS[:2]})
    net = network(label)
    assert_same_outputs(run_ort(net.model(), net.feeds), run_ort(ours.model, net.feeds))


@FORM
def test_mixed_channels_are_neither_clipped_nor_coarse(label: str) -> None:
    """Mixed channels are those of the network whose weights are rounded for good, to half a step of a scale that fits.

    What a layer computes with was rounded with the old scale, whose half a step a mean keeps at most, a sum of all at
    most as often as it has terms.
    """
    net, form = network(label), FORMS[label]
    labels = np.arange(24) % 8
    ours, theirs = both(label, {name: ChannelMap.clusters(labels, 8) for name in LAYERS[:2]})
    want, before = layer_inputs(theirs.model, net.feeds), initializers(net.model())
    limits = np.iinfo(form.dtype)
    reach = min(form.zero - limits.min, limits.max - form.zero)
    for name, (found, shift) in layer_inputs(ours.model, net.feeds).items():
        rest = tuple(range(1, found.ndim)) if form.per_channel else None
        largest = np.abs(want[name][0]).max(axis=rest, keepdims=True)
        terms = 1 if name == "first" else 3
        step = largest / reach / 2 + terms * before[f"{name}_scale"].max() / 2
        assert (np.abs(found - want[name][0]) <= 1.02 * step).all()
        assert (np.abs(found).max(axis=rest) >= 0.9 * largest.ravel()).all()
        assert np.abs(shift - want[name][1]).max() <= 0.01
    stored = initializers(ours.model)
    if form.bias == "integers":
        for name in LAYERS:
            np.testing.assert_array_equal(stored[f"{name}_b_scale"], np.float32(X_SCALE) * stored[f"{name}_scale"])
    assert_valid(ours.model)


@pytest.mark.parametrize("method", ["auto", "fold"])
@pytest.mark.parametrize("label", ["channels", "tensor", "bias of integers", "rounded bias"])
def test_compression_says_nearly_the_same(label: str, method: str) -> None:
    """Copies go without much of a change by any method, refit and reconstruction on samples included."""
    model = network(label).model()
    for tensor in model.graph.initializer:
        if tensor.name.startswith(("first_", "second_")) and tensor.dims and "24" in str(tensor.dims[0]):
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.repeat(array[::2], 2, axis=0), tensor.name))
    samples = {"x0": np.random.default_rng(0).normal(size=(64, 3, 5, 5)).astype(np.float32)}
    result = onnxfuse.compress(
        model, method=method, ratio=0.5, provider="cpu", calibration=samples if method == "auto" else None
    )
    assert [g.channels_after for g in result.report.groups] == [12, 12, 3]
    y, z = (next(iter(run_ort(m, network(label).feeds).values())) for m in (model, result.model))
    assert np.linalg.norm(y - z) <= 0.1 * np.linalg.norm(y - y.mean())


def test_a_layer_is_fitted_behind_its_rounding() -> None:
    """The refit on samples changes the floats that are rounded, with their scale, so that what is left fits better."""
    net = network("channels")
    samples = {"x0": np.random.default_rng(0).normal(size=(96, 3, 5, 5)).astype(np.float32)}
    feeds = {"x0": np.random.default_rng(1).normal(size=(2, 3, 5, 5)).astype(np.float32)}
    (want,) = run_ort(net.model(), feeds).values()
    gaps = []
    for refit in (False, True):
        made = onnxfuse.compress(
            net.model(), method="prune", ratio=0.6, calibration=samples, provider="cpu", effort=0, refit=refit
        )
        (y,) = run_ort(made.model, feeds).values()
        gaps.append(float(np.linalg.norm(y - want)))
    assert gaps[1] < 0.8 * gaps[0]


ODD = {
    "another scale": "has another scale or zero point",
    "another axis": "has scales along another axis",
    "few bits": "its integers have few bits",
    "result": "graph output",
}


@pytest.mark.parametrize("case", ODD)
def test_odd_forms_are_not_mixed(case: str) -> None:
    """Where integers are not just decoded with the same scale, channels are not mixed, for a reason that names it."""
    net = Net(21, seed=3)
    x = net.conv(net.input(1, 3, 5, 5), 6, name="before")
    kind = ml_dtypes.int4 if case == "few bits" else np.int8
    scale, zero = net.vector(6, low=0.01, high=0.02), net.constant(np.zeros(6, kind))
    q = net.node("QuantizeLinear", net.constant(net.rng.normal(size=(6, 6, 1, 1))), scale, zero, axis=0)
    other = net.vector(6, low=0.01, high=0.02) if case == "another scale" else scale
    w = net.node("DequantizeLinear", q, other, zero, axis=1 if case == "another axis" else 0)
    y = net.conv(net.node("Conv", x, w, name="inner"), 2, name="after")
    net.output(y, *([net.node("Cast", q, to=net.dtype)] if case == "result" else []))
    before = next(g for g in analysis_of(net.model()).channels.groups if g.name == "before")
    assert ODD[case] in (before.frozen or before.unmixable)
