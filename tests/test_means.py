"""The mean that a fusion takes is given back behind every reader, whatever reads the channels, and without a refit."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings

import onnxfuse
from onnxfuse.arrays import FloatArray
from onnxfuse.calibration.means import missed_means
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.statistics.channels import GaussianChannels, ObservedChannels
from onnxfuse.statistics.damage import Reading
from onnxfuse.statistics.patches import patch_rows, taps_in_sight
from tests.builders import AnyArray, Net, run_ort
from tests.test_patches import Case, cases

_SAMPLES = 24


def read_by_gemm(net: Net, x: str) -> str:
    """Write a Gemm behind hidden channels."""
    return net.gemm(net.node("Relu", net.gemm(x, 12)), 5)


def read_by_matmul(net: Net, x: str) -> str:
    """Write a product without a bias of its own, at several places, and an Add behind it."""
    return net.matmul(net.node("Sigmoid", net.matmul(x, 12)), 5)


def read_by_conv(net: Net, x: str) -> str:
    """Write a convolution that sees much of its borders."""
    return net.conv(net.node("Relu", net.conv(x, 12, 1)), 5, 3, pads=[2, 1, 0, 2], strides=[2, 1], dilations=[1, 2])


def read_by_groups(net: Net, x: str) -> str:
    """Write a convolution with groups, as its inputs have them."""
    return net.conv(net.node("Relu", net.conv(x, 12, 1)), 6, 3, group=2, pads=[1, 1, 1, 1])


def read_before_norm(net: Net, x: str) -> str:
    """Write a convolution without a bias whose normalisation shifts its outputs."""
    return net.batch_norm(net.conv(net.node("Relu", net.conv(x, 12, 1)), 5, 3, bias=False))


def read_by_gates(net: Net, x: str) -> str:
    """Write a recurrent layer of one step, whose activation leaves its gates as they are."""
    hidden = net.unsqueeze(net.node("Relu", net.gemm(x, 12)), [0])
    weights = net.weight(1, 5, 12, fan_in=12), net.weight(1, 5, 5), net.vector(1, 10)
    plain: dict[str, Any] = {"activations": ["Affine"], "activation_alpha": [1.0], "activation_beta": [0.0]}
    return net.node("RNN", hidden, *weights, name="cells", hidden_size=5, **plain)


def read_twice(net: Net, x: str) -> str:
    """Write two readers, of which nothing can shift the second."""
    hidden = net.node("Softplus", net.gemm(x, 12))
    return net.node("Mul", net.gemm(hidden, 5), net.node("Tanh", net.gemm(hidden, 5, bias=False)))


_VECTORS, _TOKENS, _IMAGES = (_SAMPLES, 8), (_SAMPLES, 7, 8), (_SAMPLES, 4, 6, 5)
_READERS: Mapping[str, tuple[Callable[[Net, str], str], tuple[int, ...]]] = {
    "gemm": (read_by_gemm, _VECTORS),
    "matmul": (read_by_matmul, _TOKENS),
    "conv": (read_by_conv, _IMAGES),
    "groups": (read_by_groups, _IMAGES),
    "norm": (read_before_norm, _IMAGES),
    "gates": (read_by_gates, _VECTORS),
}


def built(write: Callable[[Net, str], str], dims: tuple[int, ...]) -> Net:
    """Write a network with an open batch; its inputs are far from zero, so that means matter."""
    net = Net(17, seed=3)
    net.output(write(net, net.input(*dims, batch="n")))
    for name, value in net.feeds.items():
        # Images are the same everywhere, so that what differs at their borders is the zeros around them alone.
        even = value.mean(axis=(2, 3), keepdims=True) * 5 if value.ndim == 4 else value
        net.feeds[name] = np.broadcast_to(even + 1.5, value.shape).astype(np.float32)
    return net


def means(model: onnx.ModelProto, feeds: Mapping[str, AnyArray]) -> FloatArray:
    """Return the mean of every output channel."""
    y = next(iter(run_ort(model, feeds).values())).astype(np.float64)
    axis = 1 if y.ndim == 4 else -1
    return np.asarray(np.moveaxis(y, axis, -1).reshape(-1, y.shape[axis]).mean(axis=0))


@pytest.mark.parametrize("name", _READERS)
def test_outputs_keep_their_means(name: str) -> None:
    """Without a refit too; at borders, in groups, and where a normalisation shifts."""
    net = built(*_READERS[name])
    model = net.model()
    result = onnxfuse.compress(
        model, calibration=net.feeds, ratio=0.5, refit=False, candidates=(), prove=False, provider="cpu"
    )
    (group,) = [group for group in result.report.groups if group.method]
    assert group.damage is not None
    assert group.damage > 1e-3
    (spread,) = (value.std() for value in run_ort(model, net.feeds).values())
    np.testing.assert_allclose(means(result.model, net.feeds), means(model, net.feeds), rtol=0, atol=1e-4 * spread)


def test_what_nothing_shifts_is_rebuilt_about_zero() -> None:
    """A reader without a bias loses little of the mean, and a reader beside it that has one loses nothing."""
    net = built(read_twice, _VECTORS)
    model = net.model()
    result = onnxfuse.compress(
        model, calibration=net.feeds, ratio=0.5, refit=False, candidates=(), prove=False, provider="cpu"
    )
    y, z = (next(iter(run_ort(m, net.feeds).values())) for m in (model, result.model))
    assert np.square(y - z).mean() < 0.1 * y.var()


@pytest.mark.parametrize("calibrated", [True, False], ids=["samples", "moments"])
@pytest.mark.parametrize("refit", [True, False], ids=["refit", "plain"])
def test_channels_that_never_change_go_for_nothing(*, calibrated: bool, refit: bool) -> None:
    """They are constants for whatever reads them, with samples and without, with a refit and without."""
    net = Net(17, seed=5)
    x = net.input(40, 8, batch="n")
    weight = net.rng.normal(size=(12, 8)) / 3
    weight[6:] = 0.0
    bias = np.concatenate([net.rng.normal(size=6), 4 + net.rng.normal(size=6)])
    hidden = net.node("Gemm", x, net.constant(weight), net.constant(bias), transB=1)
    net.output(net.gemm(net.node("Sigmoid", hidden), 3))
    model = net.model()
    data = net.feeds if calibrated else None
    result = onnxfuse.compress(model, calibration=data, ratio=0.5, refit=refit, prove=False, provider="cpu")
    y, z = (next(iter(run_ort(m, net.feeds).values())) for m in (model, result.model))
    np.testing.assert_allclose(z, y, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_taps_in_sight_are_counted(case: Case) -> None:
    """The share of each tap is what a map of ones, with zeros around it, has at that tap on average."""
    padded = case.padded(np.ones((1, 1, *case.sizes)))
    places = case.places(padded)[: len(case.places(padded)) // case.samples]
    rows = patch_rows(padded, case.kernel, case.strides, case.dilations, places)
    count = len(case.sizes)
    pads = list(zip(case.pads[:count], case.pads[count:], strict=True))
    found = taps_in_sight(case.sizes, pads, case.kernel, case.strides, case.dilations)
    np.testing.assert_allclose(found, rows.mean(axis=0), atol=1e-12)


def test_means_of_mixtures_follow_the_activation() -> None:
    """Mixed before a ReLU, channels have the mean of the ReLU of the mixture, by moments as on samples."""
    rng = np.random.default_rng(2)
    mixing, mean = rng.normal(size=(3, 3)), rng.normal(size=3)
    rows = rng.normal(size=(200_000, 3)) @ mixing + mean
    output = rng.normal(size=(2, 3))
    channel_map = ChannelMap(output, rng.normal(size=(3, 2)), np.array([0, 1]))

    def relu(z: FloatArray) -> FloatArray:
        return np.maximum(z, 0.0)

    missed = relu(rows).mean(axis=0) - channel_map.input @ relu(rows @ output.T).mean(axis=0)
    for channels in (ObservedChannels(relu, rows), GaussianChannels(relu, mean, mixing.T @ mixing)):
        seen = Reading(np.eye(3), np.zeros((3, 2)), np.eye(3), channels=(channels, channels))
        np.testing.assert_allclose(missed_means(seen, channel_map), np.stack([missed] * 2, axis=1), atol=0.02)
