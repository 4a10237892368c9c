"""Weights stored as integers: encoded and decoded, and networks with QuantizeLinear and DequantizeLinear throughout."""

from functools import cache

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import onnxfuse
from onnxfuse import Compressed
from onnxfuse.arrays import FloatArray
from onnxfuse.fusion.quantised import Encoding, decode, encode, fitting_encoding, integer_range, pack, unpack
from tests.builders import AnyArray, Net, initializers, run_ort
from tests.laws import assert_only_weights_differ, assert_valid
from tests.quantised_examples import packed

TYPES = [np.dtype(t) for t in (np.int8, np.uint8, np.int16, np.uint16, np.int32)]
SMALL = [t for t in TYPES if t.itemsize < 4]


@st.composite
def encodings(draw: st.DrawFn, *, symmetric: bool = False) -> tuple[FloatArray, Encoding, np.dtype[np.int64]]:
    """Draw values of rank 1 to 3, an encoding for the whole or along an axis, and a type of integers."""
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=4))
    dtype = draw(st.sampled_from(SMALL))
    axis = draw(st.integers(0, len(shape) - 1))
    form = () if draw(st.booleans()) else (shape[axis],)
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    bounds = np.iinfo(dtype)
    zero = np.zeros(form) if symmetric else rng.integers(bounds.min, bounds.max, form, endpoint=True).astype(np.float64)
    scale = rng.uniform(1e-3, 1.0, form).astype(np.float32).astype(np.float64)
    values = rng.normal(size=shape) * draw(st.sampled_from([1e-3, 1.0, 1e3]))
    return values, Encoding(np.asarray(scale), np.asarray(zero), (axis,)), dtype


@settings(max_examples=100, deadline=None)
@given(drawn=encodings(), seed=st.integers(0, 99))
def test_every_integer_survives_being_decoded_and_encoded(
    drawn: tuple[FloatArray, Encoding, np.dtype[np.int64]], seed: int
) -> None:
    """Every integer survives being decoded and encoded."""
    values, encoding, dtype = drawn
    bounds = np.iinfo(dtype)
    stored = np.random.default_rng(seed).integers(bounds.min, bounds.max, values.shape, endpoint=True)
    np.testing.assert_array_equal(
        encode(decode(stored.astype(np.float64), encoding), encoding, integer_range(dtype)), stored
    )


@settings(max_examples=100, deadline=None)
@given(drawn=encodings())
def test_the_error_is_half_a_step_inside_the_range(drawn: tuple[FloatArray, Encoding, np.dtype[np.int64]]) -> None:
    """Inside the range the error is at most half a scale; outside, the nearest end is taken."""
    values, encoding, dtype = drawn
    bounds = np.iinfo(dtype)
    scale = np.broadcast_to(encoding.spread(encoding.scale, values.shape), values.shape)
    zero = encoding.spread(encoding.zero_point, values.shape)
    low, high = (np.broadcast_to((end - zero) * scale, values.shape) for end in (bounds.min, bounds.max))
    stored = encode(values, encoding, integer_range(dtype))
    assert np.array_equal(stored, stored.astype(dtype))
    error = np.abs(decode(stored, encoding) - np.clip(values, low, high))
    assert (error <= scale * (0.5 + 1e-9)).all()


@settings(max_examples=100, deadline=None)
@given(drawn=encodings(symmetric=True))
def test_a_fitting_encoding_covers_all_values_and_no_more(
    drawn: tuple[FloatArray, Encoding, np.dtype[np.int64]],
) -> None:
    """A fitting symmetric encoding represents all values that its type can, and its largest integer is used."""
    values, old, dtype = drawn
    values = np.abs(values) if dtype.kind == "u" else values
    fitted = fitting_encoding(values, old, integer_range(dtype))
    assert (fitted.axes, fitted.scale.shape) == (old.axes, old.scale.shape)
    np.testing.assert_array_equal(fitted.zero_point, old.zero_point)
    np.testing.assert_array_equal(fitted.scale.astype(np.float32).astype(np.float64), fitted.scale)
    scale = np.broadcast_to(fitted.spread(fitted.scale, values.shape), values.shape)
    stored = encode(values, fitted, integer_range(dtype))
    assert (np.abs(decode(stored, fitted) - values) <= scale * (0.5 + 1e-2)).all()
    rest = tuple(i for i in range(values.ndim) if old.scale.size == 1 or i not in old.axes)
    np.testing.assert_array_equal(np.abs(stored).max(axis=rest), np.iinfo(dtype).max)


@settings(max_examples=60, deadline=None)
@given(drawn=encodings())
def test_a_fitting_encoding_with_a_zero_point_covers_all_values(
    drawn: tuple[FloatArray, Encoding, np.dtype[np.int64]],
) -> None:
    """With a zero point inside the range, every value of either sign is represented to half a scale."""
    values, old, dtype = drawn
    middle = np.full_like(old.zero_point, np.iinfo(dtype).max // 3)
    fitted = fitting_encoding(values, Encoding(old.scale, middle, old.axes), integer_range(dtype))
    scale = np.broadcast_to(fitted.spread(fitted.scale, values.shape), values.shape)
    error = np.abs(decode(encode(values, fitted, integer_range(dtype)), fitted) - values)
    assert (error <= scale * (0.5 + 1e-2)).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("form", [(), (3,)])
def test_zeros_stay_zeros(dtype: np.dtype[np.int64], form: tuple[int, ...]) -> None:
    """Values that are all zero keep a scale that is above zero, and stay zero."""
    old = Encoding(np.full(form, 0.5), np.zeros(form), (0,))
    fitted = fitting_encoding(np.zeros((3, 2)), old, integer_range(dtype))
    assert (fitted.scale > 0).all()
    assert np.isfinite(fitted.scale).all()
    np.testing.assert_array_equal(decode(encode(np.zeros((3, 2)), fitted, integer_range(dtype)), fitted), 0.0)


def test_a_row_of_zeros_does_not_disturb_the_others() -> None:
    """A row of zeros between others has a scale above zero, and theirs are as without it."""
    values = np.array([[1.0, -2.0], [0.0, 0.0], [3.0, 0.5]])
    old = Encoding(np.full(3, 0.1), np.zeros(3), (0,))
    fitted = fitting_encoding(values, old, integer_range(np.dtype(np.int8)))
    alone = fitting_encoding(
        values[[0, 2]], Encoding(np.full(2, 0.1), np.zeros(2), (0,)), integer_range(np.dtype(np.int8))
    )
    np.testing.assert_array_equal(fitted.scale[[0, 2]], alone.scale)
    assert fitted.scale[1] > 0


@settings(max_examples=100, deadline=None)
@given(shape=hnp.array_shapes(min_dims=1, max_dims=3, max_side=7), block=st.integers(1, 5), data=st.data())
def test_blocks_share_a_scale(shape: tuple[int, ...], block: int, data: st.DataObject) -> None:
    """Every index has the scale of the block that it is in, and extrema are those of the block."""
    along = data.draw(st.integers(0, len(shape) - 1))
    counts = tuple(-(-n // block) if i == along else n for i, n in enumerate(shape))
    rng = np.random.default_rng(len(shape) + block)
    scale, values = rng.uniform(0.1, 1.0, counts), rng.normal(size=shape)
    encoding = Encoding(scale, np.zeros(()), tuple(range(len(shape))), along, block)
    spread, (low, high) = np.broadcast_to(encoding.spread(scale, shape), shape), encoding.extrema(values)
    for index in np.ndindex(shape):
        of_block = tuple(i // block if axis == along else i for axis, i in enumerate(index))
        assert spread[index] == scale[of_block]
        assert low[of_block] <= values[index] <= high[of_block]
    inside = np.isin(np.concatenate([low, high], axis=None), [0.0, *values.ravel()])
    assert inside.all()


@settings(max_examples=100, deadline=None)
@given(
    shape=hnp.array_shapes(min_dims=1, max_dims=3, max_side=5),
    bits=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 99),
)
def test_packed_integers_come_back(shape: tuple[int, ...], bits: int, seed: int) -> None:
    """Unpacking finds what was packed, the lowest bits first, and packing it again gives the same bytes."""
    integers = np.random.default_rng(seed).integers(0, 2**bits, shape)
    stored = packed(integers, bits)
    found = unpack(stored, bits)
    np.testing.assert_array_equal(found[..., : shape[-1]], integers)
    np.testing.assert_array_equal(found[..., shape[-1] :], 0)
    np.testing.assert_array_equal(pack(found, bits), stored)


@pytest.mark.parametrize("dtype", [*TYPES, np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.uint4)], ids=str)
def test_the_range_of_a_type(dtype: np.dtype[np.int64]) -> None:
    """Both ends of the range are integers of the type, and the next ones beyond are not."""
    low, high = integer_range(dtype)
    ends = np.array([low, high, low - 1, high + 1]).astype(dtype).astype(np.int64)
    np.testing.assert_array_equal(ends == [low, high, low - 1, high + 1], [True, True, False, False])


def test_a_scale_is_rounded_as_it_is_stored() -> None:
    """A scale that is stored in half precision is one, so that integers are chosen for what the file says."""
    values = np.random.default_rng(0).normal(size=(3, 5))
    old = Encoding(np.full(3, 0.1), np.zeros(3), (0,))
    fitted = fitting_encoding(values, old, (-128, 127), np.float16)
    np.testing.assert_array_equal(fitted.scale.astype(np.float16).astype(np.float64), fitted.scale)
    assert (np.abs(decode(encode(values, fitted, (-128, 127)), fitted) - values) <= 0.6 * fitted.scale[:, None]).all()


# Networks -----------------------------------------------------------------------------------------------------------

LAYERS = ("first", "second", "third")
X_SCALES = (0.02, 0.03, 0.05)


def quantised_conv(net: Net, x: str, channels: int, name: str, x_scale: float) -> str:
    """Add a quantised input and a convolution of it, int8 by output channel with an int32 bias."""
    scale = net.constant(x_scale, name=f"{name}_x_scale")
    zero = net.constant(np.array(128, np.uint8))
    x = net.node("DequantizeLinear", net.node("QuantizeLinear", x, scale, zero), scale, zero)
    weight = net.rng.normal(size=(channels, net.channels(x), 3, 3)) / np.sqrt(9 * net.channels(x) / 2)
    w_scale = (np.abs(weight).max(axis=(1, 2, 3)) / 127).astype(np.float32)
    stored = np.rint(weight / w_scale[:, None, None, None]).astype(np.int8)
    b_scale = np.float32(x_scale) * w_scale
    bias = np.rint(net.rng.uniform(-0.5, 0.5, channels) / b_scale).astype(np.int32)
    w = net.node(
        "DequantizeLinear",
        net.constant(stored, name=f"{name}_w"),
        net.constant(w_scale, name=f"{name}_w_scale"),
        net.constant(np.zeros(channels, np.int8), name=f"{name}_w_zero"),
        axis=0,
    )
    b_inputs = (net.constant(bias, name=f"{name}_b"), net.constant(b_scale, name=f"{name}_b_scale"))
    b = net.node("DequantizeLinear", *b_inputs, axis=0)
    return net.node("Conv", x, w, b, name=name, pads=[1, 1, 1, 1])


@cache
def network() -> Net:
    """Write a network of three quantised convolutions, the first two with an activation."""
    net = Net(13, seed=7)
    x = net.input(1, 3, 6, 6)
    for name, channels, scale in zip(LAYERS, (8, 6, 2), X_SCALES, strict=True):
        x = quantised_conv(net, x, channels, name, scale)
        x = x if name == LAYERS[-1] else net.node("Relu", x)
    net.output(x)
    return net


@cache
def made(method: str, ratio: float) -> Compressed:
    """Compress the network."""
    return onnxfuse.compress(network().model(), method=method, ratio=ratio, provider="cpu")


def test_every_hidden_group_is_free_and_proven() -> None:
    """Every hidden group is free, and the proof by permutation has nothing to say."""
    report = onnxfuse.inspect(network().model())
    assert [(g.channels_before, bool(g.frozen)) for g in report.groups] == [(8, False), (6, False), (2, True)]
    assert report.notes == ()


def test_pruning_keeps_integers_bit_for_bit() -> None:
    """Pruning keeps integers and scales of the channels that stay bit for bit, in their order."""
    before, after = initializers(network().model()), initializers(made("prune", 0.5).model)
    assert before.keys() == after.keys()
    kept: list[AnyArray] = [np.arange(3)]
    for name in LAYERS:
        scales, left = before[f"{name}_w_scale"], after[f"{name}_w_scale"]
        assert len(set(scales.tolist())) == len(scales)
        kept.append(np.flatnonzero(np.isin(scales, left)))
        expected = {
            f"{name}_w": before[f"{name}_w"][kept[-1]][:, kept[-2]],
            **{n: before[n][kept[-1]] for n in (f"{name}_w_scale", f"{name}_w_zero", f"{name}_b", f"{name}_b_scale")},
            f"{name}_x_scale": before[f"{name}_x_scale"],
        }
        for key, value in expected.items():
            assert (after[key].dtype, after[key].shape) == (value.dtype, value.shape), key
            assert after[key].tobytes() == value.tobytes(), key
    assert [len(k) for k in kept] == [3, 4, 3, 2]


@pytest.mark.parametrize("method", ["intra-fusion", "fold", "prune"])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_the_scale_of_a_bias_is_that_of_the_product(method: str, ratio: float) -> None:
    """The scale of every bias is that of its input times that of its weight, in float32, as runtimes take it to be."""
    after = initializers(made(method, ratio).model)
    for name in LAYERS:
        product = after[f"{name}_x_scale"] * after[f"{name}_w_scale"]
        assert after[f"{name}_b_scale"].dtype == product.dtype == np.float32
        np.testing.assert_array_equal(after[f"{name}_b_scale"], product)


@pytest.mark.parametrize("method", ["intra-fusion", "fold"])
def test_mixed_channels_use_the_whole_range(method: str) -> None:
    """Once channels are mixed, each one's largest integer is the largest there is, so that no precision is lost."""
    before, after = initializers(network().model()), initializers(made(method, 0.5).model)
    for name in LAYERS:
        assert after[f"{name}_w"].dtype == np.int8
        np.testing.assert_array_equal(np.abs(after[f"{name}_w"].astype(int)).max(axis=(1, 2, 3)), 127)
        assert after[f"{name}_w_zero"].tobytes() == bytes(len(after[f"{name}_w"]))
        np.testing.assert_array_equal(after[f"{name}_x_scale"], before[f"{name}_x_scale"])


@pytest.mark.parametrize("method", ["intra-fusion", "fold", "prune"])
def test_the_result_runs_in_integers_as_it_does_in_floats(method: str) -> None:
    """The result is a valid model that says the same with the runtime's integer kernels as node by node."""
    net, result = network(), made(method, 0.5)
    assert_valid(result.model)
    assert_only_weights_differ(net.model(), result.model)
    (y,) = run_ort(result.model, net.feeds).values()
    (z,) = run_ort(result.model, net.feeds, optimise=True).values()
    assert np.isfinite(y).all()
    assert np.ptp(y) > 0
    # One step of an activation may be rounded either way.
    assert np.abs(y - z).max() <= 0.1 * np.ptp(y)
    (original,) = run_ort(net.model(), net.feeds).values()
    assert y.shape == original.shape


def test_copies_fold_to_what_they_were() -> None:
    """Output channels that are copies fold into one without a change beyond a step of the last rounding."""
    model: onnx.ModelProto = network().model()
    for tensor in model.graph.initializer:
        if tensor.name.startswith("first_") and tensor.dims:
            array = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.repeat(array[::2], 2, axis=0), tensor.name))
    result = onnxfuse.compress(model, method="fold", ratio=0.5, only="first", provider="cpu")
    assert [g.channels_after for g in result.report.groups] == [4, 6, 2]
    y, z = (next(iter(run_ort(m, network().feeds).values())) for m in (model, result.model))
    # The second layer's weights are sums of two now, rounded to 1 / 127 of the largest.
    assert np.linalg.norm(y - z) <= 0.05 * np.linalg.norm(y - y.mean())
