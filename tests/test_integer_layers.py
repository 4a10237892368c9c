"""Networks on integers: what is dropped leaves every number as it was, what is merged is exact where integers allow."""

import tempfile
import warnings
from collections.abc import Mapping
from functools import cache

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

import onnxfuse
from onnxfuse.analysis import Analysis
from onnxfuse.arrays import FloatArray, IntArray
from onnxfuse.calibration.linear import linear_nodes
from onnxfuse.calibration.observe import observe_readings
from onnxfuse.config import Provider
from onnxfuse.coupling.constraints import Encoded
from onnxfuse.coupling.groups import CouplingGroup, ParameterAxis, positions
from onnxfuse.coupling.layout import leaves
from onnxfuse.coupling.rounded import Rounding
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.fusion.quantised import integer_range
from onnxfuse.fusion.weights import WeightState
from onnxfuse.graph.view import Operand
from onnxfuse.proof.samples import load_samples
from onnxfuse.statistics.features import Role
from tests.builders import AnyArray, Net, Style, initializers, run_ort, run_ort_all
from tests.examples import Example
from tests.laws import (
    analysis_of,
    assert_only_weights_differ,
    assert_same_outputs,
    assert_valid,
    free_groups,
    fuse,
    group_called,
)
from tests.quantised_examples import QUANTISED, own, packed, typed

FREE = [example for example in QUANTISED if example.free]
# A unit of a recurrent layer is made and read by one weight at once, whose integers can't be chosen to suit both.
MERGED = [example for example in FREE if not example.exact and example.op != "DynamicQuantizeLSTM"]


def every(examples: list[Example]) -> pytest.MarkDecorator:
    """Parametrise over examples."""
    return pytest.mark.parametrize("example", examples, ids=[example.name for example in examples])


def analysis_on(example: Example, model: onnx.ModelProto | None = None) -> Analysis:
    """Analyse an example, or a model like it, by what it computes."""
    net = example.net()
    return analysis_of(net.model() if model is None else model, feeds=net.feeds)


# Dropping -------------------------------------------------------------------------------------------------------------


@every(FREE)
def test_dropping_keeps_every_number(example: Example) -> None:
    """Where channels are only dropped, weights, scales, zero points and biases are what they were, bit by bit."""
    analysis = analysis_on(example)
    kept = {g.name: np.arange(g.channels - 1, -1, -2)[::-1].astype(np.int64) for g in free_groups(analysis)}
    groups = {g.atom: g for g in free_groups(analysis)}
    fused = fuse(analysis, {n: ChannelMap.selection(k, group_called(analysis, n).channels) for n, k in kept.items()})
    before, after = initializers(analysis.source.model), initializers(fused.model)
    assert before.keys() == after.keys()
    checked = 0
    for operand, layouts in analysis.channels.layouts.items():
        if not operand.is_constant or operand.name not in before:
            continue
        expected = before[operand.name]
        for axis, layout in enumerate(layouts):
            gone = [np.empty(0, np.int64)]
            for atom in dict.fromkeys(leaves(layout)):
                if atom in groups:
                    where = positions(layout, atom, {})
                    gone.append(np.delete(where, kept[groups[atom].name], axis=0).ravel())
            expected = np.delete(expected, np.unique(np.concatenate(gone)), axis=axis)
        got = after[operand.name]
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape), operand.name
        assert got.tobytes() == expected.tobytes(), operand.name
        checked += got.shape != before[operand.name].shape
    assert checked


def zero_points(encoded: Encoded | None, values: Mapping[str, AnyArray], shape: tuple[int, ...]) -> AnyArray:
    """Return what stands for zero in every element of a weight, worked out from the file's numbers alone."""
    if encoded is None or encoded.zero is None:
        return np.zeros(shape)
    return spread(encoded, values[encoded.zero.name].astype(np.float64), shape)


def spread(encoded: Encoded | Rounding, parameter: AnyArray, shape: tuple[int, ...]) -> AnyArray:
    """Return the scale or zero point of every element of a weight."""
    if parameter.size == 1:
        return np.full(shape, parameter.ravel()[0])
    if encoded.block > 1:
        index = [np.arange(n) // (encoded.block if i == encoded.along else 1) for i, n in enumerate(shape)]
        found: AnyArray = parameter[np.ix_(*index)]
        return found
    return np.broadcast_to(parameter.reshape([n if i in encoded.axes else 1 for i, n in enumerate(shape)]), shape)


def rows_of(analysis: Analysis, group: CouplingGroup, parameter: ParameterAxis) -> IntArray:
    """Return where the channels of a group are on an axis of a weight, shape (C, m)."""
    return positions(analysis.channels.layouts[parameter.operand][parameter.axis], group.atom, {})


def silenced(analysis: Analysis, group: CouplingGroup, dropped: IntArray) -> onnx.ModelProto:
    """Make what reads some channels weigh them by zero: integers their zero point, packed ones a scale of zero."""
    values = {name: array.copy() for name, array in initializers(analysis.source.model).items()}
    told = analysis.channels.encodings
    read = {p.operand for p in group.parameters if p.role is Role.CONSUMER}
    scales_read = {told[o].scale for o in read if o in told and told[o].bits}
    for parameter in group.parameters:
        where = rows_of(analysis, group, parameter)[dropped].ravel()
        encoded, array = told.get(parameter.operand), values[parameter.operand.name]
        if parameter.operand in scales_read:
            np.moveaxis(array, parameter.axis, 0)[where] = 0
        elif parameter.role is Role.CONSUMER and (encoded is None or not encoded.bits):
            zero = np.moveaxis(zero_points(encoded, values, array.shape), parameter.axis, 0)
            np.moveaxis(array, parameter.axis, 0)[where] = zero[where]
    return with_values(analysis.source.model, values)


def with_values(model: onnx.ModelProto, values: Mapping[str, AnyArray]) -> onnx.ModelProto:
    """Return a model with other constants."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(values[tensor.name], tensor.name))
    return copy


@every([example for example in FREE if example.op != "QAttention"])
def test_what_nobody_weighs_can_go(example: Example) -> None:
    """Channels that are weighed by zero are dropped without a change; attention weighs them by each other."""
    for group in free_groups(analysis_on(example)):
        analysis = analysis_on(example)
        if group.statistic or not any(p.role is Role.CONSUMER for p in group.parameters):
            continue
        kept = np.arange(0, group.channels, 2)
        dropped = np.setdiff1d(np.arange(group.channels), kept)
        model = silenced(analysis, group_called(analysis, group.name), dropped)
        want = run_ort(model, example.net().feeds)
        pruned = fuse(analysis_on(example, model), {group.name: ChannelMap.selection(kept, group.channels)})
        assert_same_outputs(want, run_ort(pruned.model, example.net().feeds))


# Merging --------------------------------------------------------------------------------------------------------------


def mergeable(analysis: Analysis, group: CouplingGroup, labels: IntArray) -> onnx.ModelProto:
    """Make channels with equal labels copies of each other, and integers such that their sums are integers again.

    The largest integer is kept by a mean and by a sum, so that no scale has to change: what makes the channels holds
    the largest integer or the zero point, and of what reads them the members of a cluster share the largest integer.
    """
    values = {name: array.copy() for name, array in initializers(analysis.source.model).items()}
    rng = np.random.default_rng(3)
    first = np.array([np.flatnonzero(labels == label)[0] for label in labels])
    for parameter in group.parameters:
        where = rows_of(analysis, group, parameter)
        rows = np.moveaxis(values[parameter.operand.name], parameter.axis, 0)
        if parameter.role is not Role.CONSUMER:
            rows[where.ravel()] = rows[where[first].ravel()]
    for parameter in group.parameters:
        encoded = analysis.channels.encodings.get(parameter.operand)
        rounding = analysis.channels.roundings.get(parameter.operand)
        if encoded is None and rounding is None:
            continue
        where = rows_of(analysis, group, parameter)
        array = values[parameter.operand.name]
        if rounding is None:
            zero = np.moveaxis(zero_points(encoded, values, array.shape), parameter.axis, 0)
            share, factor = integer_range(array.dtype)[1] - zero, np.ones(zero.shape)
        else:
            parameters = (values[rounding.zeros[0].name].astype(np.float64), values[rounding.scales[0].name])
            spreads = (spread(rounding, p, array.shape) for p in parameters)
            offset, factor = (np.moveaxis(found, parameter.axis, 0) for found in spreads)
            zero, share = np.zeros(offset.shape), rounding.limits[1] - offset
        if parameter.role is Role.CONSUMER:
            share[where.ravel()] = shared(share[where], labels).reshape(where.size, *share.shape[1:])
        pattern = rng.choice([0.0, 1.0, 1.0], share.shape)
        pattern[where.ravel()] = pattern[where[first].ravel()]
        np.moveaxis(array, parameter.axis, 0)[...] = ((zero + share * pattern) * factor).astype(array.dtype)
    return with_values(analysis.source.model, values)


def shared(whole: FloatArray, labels: IntArray) -> FloatArray:
    """Return integers of which the members of a cluster have as many as there were; ``whole`` has shape (C, ...)."""
    sizes = np.bincount(labels)[labels].reshape(-1, *[1] * (whole.ndim - 1))
    is_first = np.array([label not in labels[:i] for i, label in enumerate(labels)]).reshape(sizes.shape)
    part = np.floor(whole / sizes)
    return np.where(is_first, whole - part * (sizes - 1), part)


@every(MERGED)
def test_copies_merge_exactly(example: Example) -> None:
    """Copies merge without error where sums and means of their integers are integers."""
    for group in free_groups(analysis_on(example)):
        analysis = analysis_on(example)
        if group.unmixable:
            continue
        labels = np.arange(group.channels) % ((group.channels + 1) // 2)
        model = mergeable(analysis, group_called(analysis, group.name), labels)
        want = run_ort(model, example.net().feeds)
        assert all(np.ptp(y) > 0 for y in want.values())
        merged = fuse(analysis_on(example, model), {group.name: ChannelMap.clusters(labels, labels.max() + 1)})
        assert_same_outputs(want, run_ort(merged.model, example.net().feeds))
        if np.array_equal(labels, np.sort(labels)):
            continue
        wrong = fuse(analysis_on(example, model), {group.name: ChannelMap.clusters(np.sort(labels), labels.max() + 1)})
        with pytest.raises(AssertionError):
            assert_same_outputs(want, run_ort(wrong.model, example.net().feeds))


# Whole networks -------------------------------------------------------------------------------------------------------

DIGITS = "models/digits_folded.onnx"
CALIBRATION = "models/digits_calibration.npz"


class _Images(CalibrationDataReader):
    """Images to choose the scales of activations by."""

    def __init__(self, name: str) -> None:
        """Take some of the calibration images."""
        images = next(iter(np.load(CALIBRATION).values())).astype(np.float32)
        self.left = iter([{name: images[i : i + 32]} for i in range(0, 128, 32)])

    def get_next(self) -> dict[str, AnyArray] | None:
        """Return the next few images."""
        return next(self.left, None)


@cache
def digits(form: str, *, per_channel: bool) -> onnx.ModelProto:
    """Quantise the example network with ONNX Runtime's own tool."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = f"{folder}/model.onnx"
        if form == "dynamic":
            quantize_dynamic(DIGITS, path, per_channel=per_channel)
        else:
            name = onnx.load(DIGITS).graph.input[0].name
            quantize_static(
                DIGITS, path, _Images(name), quant_format=QuantFormat[form], per_channel=per_channel,
                weight_type=QuantType.QInt8,
            )  # fmt: skip
        return onnx.load(path)


FORMS = [(form, per_channel) for form in ("QDQ", "QOperator", "dynamic") for per_channel in (False, True)]


def stored_types(model: onnx.ModelProto) -> dict[str, tuple[np.dtype[np.int64], int]]:
    """Return type and rank of every constant."""
    return {name: (array.dtype, array.ndim) for name, array in initializers(model).items()}


@pytest.mark.parametrize(("form", "per_channel"), FORMS)
def test_a_quantised_network_is_free_and_proven(form: str, *, per_channel: bool) -> None:
    """Every hidden channel of a quantised network is free, and may be mixed, as in the network on floats."""
    groups = onnxfuse.inspect(digits(form, per_channel=per_channel), provider="cpu").groups
    on_floats = onnxfuse.inspect(DIGITS, provider="cpu").groups
    told, expected = (
        [(g.channels_before, g.frozen is None, g.residual) for g in found] for found in (groups, on_floats)
    )
    # The tool may put the nodes into another order.
    assert sorted(told) == sorted(expected)
    assert not any(group.unmixable for group in groups)


@pytest.mark.parametrize(("form", "per_channel"), FORMS)
@pytest.mark.parametrize("method", ["prune", "intra-fusion", "auto"])
def test_a_quantised_network_is_compressed(form: str, method: str, *, per_channel: bool) -> None:
    """A quantised network gets as small as the one on floats, stays quantised, and is proven."""
    model = digits(form, per_channel=per_channel)
    calibration = CALIBRATION if method == "auto" else None
    result = onnxfuse.compress(model, method=method, ratio=0.3, calibration=calibration, provider="cpu")
    on_floats = onnxfuse.compress(DIGITS, method="prune", ratio=0.3, provider="cpu")
    assert result.report.after.macs == on_floats.report.after.macs
    assert result.report.notes == ()
    assert stored_types(result.model) == stored_types(model)
    assert_only_weights_differ(model, result.model)


@pytest.mark.parametrize(("form", "per_channel"), FORMS)
def test_readers_see_numbers_not_integers(form: str, *, per_channel: bool) -> None:
    """The power of what each reader sees is what it is in the network on floats, but for rounding."""

    def powers(model: onnx.ModelProto) -> list[float]:
        images = next(iter(np.load(CALIBRATION).values()))[:64].astype(np.float32)
        feeds = {model.graph.input[0].name: images}
        analysis = analysis_of(model, feeds=feeds)
        samples = load_samples(feeds, analysis.graph)
        readings = observe_readings(analysis, free_groups(analysis), samples, Provider.CPU, 0)
        return sorted(
            float(np.trace(reading.covariance)) + float(np.square(reading.means.mean(axis=1)).sum())
            for found in readings.values()
            for reading in found
        )

    found = powers(digits(form, per_channel=per_channel))
    expected = powers(onnx.load(DIGITS))
    np.testing.assert_allclose(found, expected, rtol=0.05)


def fitted_nodes(model: str | onnx.ModelProto) -> tuple[set[str], float]:
    """Compress a network for digits; return which of its layers were fitted, and the share of digits it knows then."""
    result = onnxfuse.compress(model, ratio=0.3, calibration=CALIBRATION, effort=0.2, provider="cpu")
    assert all(r.error_after < r.error_before for r in result.report.refits if r.ridge)
    told = onnxfuse.validate(model, result.model, data="models/digits_test.npz", provider="cpu").accuracy or {}
    return {r.node for r in result.report.refits if r.ridge}, told["compressed"]


@cache
def fitted_on_floats() -> tuple[set[str], float]:
    """Return the same of the network on floats."""
    return fitted_nodes(DIGITS)


@pytest.mark.parametrize(("form", "per_channel"), FORMS)
def test_layers_on_integers_are_fitted_anew(form: str, *, per_channel: bool) -> None:
    """With samples, every layer behind fused channels is fitted, and accuracy is that of the network on floats."""
    nodes, accuracy = fitted_nodes(digits(form, per_channel=per_channel))
    expected, on_floats = fitted_on_floats()
    assert len(nodes) == len(expected)
    # One image in a hundred may be rounded to the other side.
    assert accuracy >= on_floats - 0.01


@pytest.mark.parametrize(("form", "per_channel"), FORMS)
def test_a_fit_goes_on_with_what_is_written(form: str, *, per_channel: bool) -> None:
    """What a refit takes a changed layer's numbers to be, scales and biases included, is what the file gets."""
    model = digits(form, per_channel=per_channel)
    analysis = analysis_of(model, feeds={model.graph.input[0].name: np.zeros((1, 1, 8, 8), np.float32)})
    state = WeightState(analysis.graph, analysis.shapes, analysis.channels)
    rng = np.random.default_rng(0)
    for group in free_groups(analysis):
        labels = np.arange(group.channels) % (group.channels // 2)
        state.fuse(group, ChannelMap.clusters(labels, labels.max() + 1))
    fitted = list(linear_nodes(analysis.graph, analysis.channels))
    for linear in fitted:
        shift = state.output_shift(linear.node)
        for operand in (linear.weight, *([] if shift is None else [shift])):
            value = state.array(operand)
            state.replace(operand, value + rng.normal(size=value.shape) * value.std())
    written = dict(state.changed())
    assert len(fitted) == 9
    for linear in fitted:
        shift = state.output_shift(linear.node)
        for operand, value in state.stored(linear.node, [linear.weight, *([] if shift is None else [shift])]):
            assert value.dtype == written[operand].dtype
            np.testing.assert_array_equal(value, written[operand], err_msg=operand.name)


# Packed weights -------------------------------------------------------------------------------------------------------


@cache
def packed_mlp() -> Net:
    """Write a small MLP whose weights are packed into four bits, in blocks of 16."""
    net = Net(17, seed=9)
    h = net.input(64, 32)
    for name, (inner, outputs) in {"first": (32, 64), "second": (64, 48), "third": (48, 4)}.items():
        weight = net.rng.standard_normal((outputs, inner // 16, 16)) / np.sqrt(inner / 2)
        scale = np.abs(weight).max(axis=2) / 7
        integers = np.rint(weight / scale[:, :, None]) + 8
        inputs = [h, net.constant(packed(integers.astype(np.int64), 4), name=f"{name}_w"), net.constant(scale)]
        like = typed(net, (64, outputs), onnx.TensorProto.FLOAT)
        shape: dict[str, int] = {"K": inner, "N": outputs, "bits": 4, "block_size": 16}
        h = own(net, "MatMulNBits", *inputs, like=like, name=name, **shape)
        h = h if name == "third" else net.node("Relu", h, like=h)
    net.output(h)
    return net


@pytest.mark.parametrize("method", ["prune", "intra-fusion", "auto"])
def test_packed_weights_lose_whole_blocks(method: str) -> None:
    """Whatever the method, outputs go as whole blocks of the layer behind, and no byte that stays is changed."""
    net = packed_mlp()
    result = onnxfuse.compress(net.model(), method=method, ratio=0.5, calibration=dict(net.feeds), provider="cpu")
    assert [g.channels_after for g in result.report.groups if not g.frozen] == [2, 1]
    before, after = initializers(net.model()), initializers(result.model)
    assert after["second_w"].shape == (16, 2, 8)
    assert {row.tobytes() for row in after["second_w"].reshape(-1, 8)} < {
        row.tobytes() for row in before["second_w"].reshape(-1, 8)
    }
    assert_valid(result.model)
    (y,) = run_ort(result.model, net.feeds).values()
    assert np.ptp(y) > 0


@pytest.mark.parametrize("style", ["initializer", "node"])
@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4], ids=str)
def test_four_bits_are_written_as_such(style: Style, dtype: type[np.generic]) -> None:
    """Weights of four bits are cut wherever they are stored, and nothing else about them changes."""
    net = Net(21, seed=4, style=style)
    h = net.input(3, 5)
    weights: dict[str, AnyArray] = {}
    for name, (inner, outputs) in {"first": (5, 6), "second": (6, 3)}.items():
        weights[name] = net.rng.integers(0, 8, (inner, outputs)).astype(dtype)
        w = net.node("DequantizeLinear", net.constant(weights[name], name=name), net.vector(outputs, low=0.1), axis=1)
        h = net.node("MatMul", h, w, name=f"{name}_product")
    net.output(h)
    fused = fuse(analysis_of(net.model()), {"first_product": ChannelMap.selection(np.array([1, 2, 5]), 6)})
    stored_now = initializers(fused.model)
    assert stored_now["first"].dtype == stored_now["second"].dtype == dtype
    np.testing.assert_array_equal(stored_now["first"].astype(int), weights["first"][:, [1, 2, 5]].astype(int))
    np.testing.assert_array_equal(stored_now["second"].astype(int), weights["second"][[1, 2, 5]].astype(int))
    assert_valid(fused.model)
    assert run_ort(fused.model, net.feeds).keys() == run_ort(net.model(), net.feeds).keys()


@every([e for e in QUANTISED if e.op == "GatherBlockQuantized"])
def test_a_table_is_decoded_as_it_is_looked_up(example: Example) -> None:
    """What importances see of a table of a few bits are the numbers that the runtime finds in it."""
    net, analysis = example.net(), analysis_on(example)
    node = next(node for node in analysis.graph.nodes if node.op == "GatherBlockQuantized")
    table = WeightState(analysis.graph, analysis.shapes, analysis.channels).array(
        Operand(node.inputs[0], node.index, 0)
    )
    found = run_ort_all(net.model(), net.feeds)[node.outputs[0]]
    np.testing.assert_allclose(table.reshape(len(table), -1)[net.feeds[node.inputs[1]]], found, rtol=1e-5)
