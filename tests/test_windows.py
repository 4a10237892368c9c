"""Windows: what they say comes out right does, wherever they are; what is not local has none."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnxfuse
from onnxfuse.calibration.windows import Windows, find_windows
from tests.builders import AnyArray, Net, run_ort

HEAD = '<ir_version: 8, opset_import: ["" : 18]>'
SAMPLES = 3
PLACES = 75


def network(
    body: str, inputs: str = "float[n, 3, h, w] x", weights: Sequence[tuple[str, tuple[int, ...]]] = ()
) -> onnx.ModelProto:
    """Return a network that makes y, with random weights."""
    rng = np.random.default_rng(3)
    model = onnx.parser.parse_model(f"{HEAD} g ({inputs}) => (y) {{ {body} }}")
    for name, shape in weights:
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    return model


LOCAL = {
    "one convolution": network("y = Conv<pads=[1,1,1,1]>(x, w)", weights=[("w", (4, 3, 3, 3))]),
    "two, and a sum": network(
        "a = Conv<pads=[1,1,1,1]>(x, w) b = Relu(a) c = Conv<pads=[1,1,1,1]>(b, v) y = Add(c, a)",
        weights=[("w", (4, 3, 3, 3)), ("v", (4, 4, 3, 3))],
    ),
    "strides": network(
        "a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w) b = Relu(a) y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(b)",
        weights=[("w", (4, 3, 3, 3))],
    ),
    "pads on one side": network(
        "y = Conv<pads=[0,0,1,1], strides=[2,2]>(x, w)",
        weights=[("w", (4, 3, 3, 3))],
    ),
    "dilations": network("y = Conv<pads=[4,4,4,4], dilations=[4,4]>(x, w)", weights=[("w", (4, 3, 3, 3))]),
    "channels last": network(
        "a = Transpose<perm=[0,3,1,2]>(x) y = Conv<pads=[1,1,1,1], strides=[2,2]>(a, w)",
        "float[n, h, w, 3] x",
        [("w", (4, 3, 3, 3))],
    ),
    "finer in the end": network(
        "y = ConvTranspose<strides=[2,2]>(x, w)",
        weights=[("w", (3, 4, 2, 2))],
    ),
}
SHAPES = dict.fromkeys(LOCAL, (SAMPLES, 3, 48, 64)) | {"channels last": (SAMPLES, 48, 64, 3)}
NOT_LOCAL = {
    "a mean over all places": network(
        "a = Conv<pads=[1,1,1,1]>(x, w) m = GlobalAveragePool(a) y = Mul(a, m)", weights=[("w", (4, 3, 3, 3))]
    ),
    "a softmax over all places": network("a = Conv(x, w) y = Softmax<axis=3>(a)", weights=[("w", (4, 3, 1, 1))]),
}


def values(shape: tuple[int, ...]) -> AnyArray:
    """Return random numbers."""
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


def found_for(model: onnx.ModelProto, x: AnyArray, places: int = PLACES) -> tuple[Windows | None, AnyArray]:
    """Return the windows of a network, and what it makes."""

    def run(model: onnx.ModelProto, arrays: Sequence[AnyArray]) -> list[AnyArray]:
        return [run_ort(model, {"x": arrays[0]})["y"]]

    y = run(model, [x])[0]
    found = find_windows([x], [y], places, lambda *_: model, run)
    return (None if found is None else found[0]), y


@pytest.mark.parametrize("name", LOCAL)
@given(seed=st.integers(0, 2**32 - 1))
def test_what_is_said_to_come_out_right_does(name: str, seed: int) -> None:
    """A window by itself gives what the whole gives there, wherever it is; and most of it is said to."""
    x = values(SHAPES[name])
    windows, y = found_for(LOCAL[name], x)
    assert windows is not None
    assert np.prod(windows.size) * 2 <= np.prod(windows.counts)
    (window,), (target,), (mask,) = windows.draw([x], [y], np.random.default_rng(seed))
    made = run_ort(LOCAL[name], {"x": window})["y"]
    assert made.shape == target.shape
    np.testing.assert_allclose(np.where(mask, made, 0), np.where(mask, target, 0), atol=1e-4)
    assert mask.mean() >= 0.2


@pytest.mark.parametrize("name", LOCAL)
def test_every_place_comes_out_right_in_some_window(name: str) -> None:
    """Corners and borders of a sample are learnt from too."""
    windows, y = found_for(LOCAL[name], values(SHAPES[name]))
    assert windows is not None
    (axes,) = windows.right
    for axis, (first, anywhere, final) in enumerate(axes):
        scale = y.shape[2 + axis] // windows.counts[axis]
        last = windows.counts[axis] - windows.size[axis]
        masks = {at: first if at == 0 else final if at == last else anywhere for at in range(last + 1)}
        seen = {at * scale + int(index) for at, mask in masks.items() for index in np.flatnonzero(mask)}
        assert seen == set(range(y.shape[2 + axis]))


@pytest.mark.parametrize("name", NOT_LOCAL)
def test_what_is_not_local_has_no_windows(name: str) -> None:
    """Where a place depends on all others, a window says nothing."""
    assert found_for(NOT_LOCAL[name], values((SAMPLES, 3, 48, 64)))[0] is None


def test_what_tells_neighbouring_places_apart_has_no_windows() -> None:
    """Halving the places and doubling them again is the same thing two places further on, but not one."""
    body = "a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w) b = Relu(a) y = ConvTranspose<strides=[2,2]>(b, v)"
    model = network(body, weights=[("w", (4, 3, 3, 3)), ("v", (4, 4, 2, 2))])
    # All windows that were looked at, but one, start at even places.
    assert found_for(model, values((SAMPLES, 3, 48, 64)), places=48)[0] is None


def test_small_samples_have_no_windows() -> None:
    """A window has to be smaller than half of a sample."""
    model = LOCAL["one convolution"]
    assert found_for(model, values((SAMPLES, 3, 8, 8)))[0] is None
    assert found_for(model, values((SAMPLES, 3, 48, 64)), places=10_000)[0] is None


def test_the_reconstruction_learns_from_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images with many places it takes windows, and gets better on whole ones that were held back."""
    net = Net(seed=1)
    x = net.input(4, 3, 48, 48)
    y = x
    for _ in range(8):
        y = net.node("Relu", net.conv(y, 16, pads=[1] * 4))
    net.output(net.node("GlobalAveragePool", y))
    drawn: list[tuple[int, ...]] = []
    draw = Windows.draw

    def counted(windows: Windows, *told: Any) -> Any:
        drawn.append(windows.size)
        return draw(windows, *told)

    monkeypatch.setattr(Windows, "draw", counted)
    samples = {x: np.random.default_rng(0).normal(size=(128, 3, 48, 48)).astype(np.float32)}
    report = onnxfuse.compress(net.model(), calibration=samples, ratio=0.5, effort=0.02, provider="cpu").report
    assert drawn
    made = [done for done in report.reconstructions if done.steps]
    assert made
    assert all((done.error_after or 0.0) < (done.error_before or 0.0) for done in made)


def test_vectors_have_no_windows() -> None:
    """There are no places in a row of features."""
    model = network("y = MatMul(x, w)", "float[n, 64] x", [("w", (64, 8))])
    assert found_for(model, values((SAMPLES, 64)))[0] is None
