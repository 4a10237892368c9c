"""Mixtures: images stay as they are, mixtures are of two of them, and what is held back stays apart."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from onnxfuse.calibration import images, mixtures, refit
from onnxfuse.calibration.mixtures import with_mixtures
from onnxfuse.graph.view import GraphView
from onnxfuse.proof.samples import load_samples
from tests.builders import AnyArray, Net
from tests.laws import analysis_of

SIDE = 12


def net_of(*dims: int, dtype: int = TensorProto.FLOAT) -> Net:
    """Return a network with one input."""
    net = Net(17, seed=1)
    x = net.input(*dims, batch="n", dtype=dtype)
    net.output(net.node("Relu", net.node("Cast", x, to=TensorProto.FLOAT)))
    return net


def pictures(count: int, dtype: Any = np.float32) -> AnyArray:
    """Return images of which each has one pixel of its own, of 200."""
    found = np.zeros((count, 1, SIDE, SIDE), dtype)
    found.reshape(count, -1)[np.arange(count), np.arange(count)] = 200
    return found


def mixed(array: AnyArray, net: Net, seed: int = 0) -> AnyArray:
    """Return samples with mixtures among them."""
    model = net.model()
    found = with_mixtures(analysis_of(model), load_samples({"x0": array}, GraphView(model)), seed)
    return found.arrays["x0"][: found.count]


@given(count=st.integers(8, SIDE * SIDE), seed=st.integers(0, 99))
def test_what_is_held_back_stays_apart(count: int, seed: int) -> None:
    """Every image is there once; mixtures that are held back are of images that are, the others of the others."""
    net = net_of(1, 1, SIDE, SIDE)
    # What does not fill a batch is left out, here as elsewhere.
    count = load_samples({"x0": pictures(count)}, GraphView(net.model())).count
    found = mixed(pictures(count), net, seed)
    assert len(found) == 2 * count
    flat = found.reshape(len(found), -1)
    np.testing.assert_allclose(flat.sum(axis=1), 200, rtol=1e-5)
    made_of = [np.flatnonzero(row) for row in flat]
    assert all(len(parts) in {1, 2} for parts in made_of)
    where = {int(parts[0]): place for place, parts in reversed(list(enumerate(made_of))) if len(parts) == 1}
    assert set(where) == set(range(count))
    last = 2 * (count - count // images.HELD_BACK)
    for place, parts in enumerate(made_of):
        if len(parts) == 2:
            assert 40 <= flat[place, parts[0]] <= 160 + 1e-3
            for part in parts:
                own = where[int(part)]
                assert (own >= last) == (place >= last)
                sides = [n % refit.HELD_BACK == refit.HELD_BACK - 1 for n in (own, place)]
                assert sides[0] == sides[1]


def test_mixtures_are_not_of_the_same_pair_twice() -> None:
    """There is no image that only some mixtures hang on."""
    found = mixed(pictures(128), net_of(1, 1, SIDE, SIDE))
    times = np.count_nonzero(found.reshape(256, -1), axis=0)[:128]
    assert times.min() >= 2
    assert times.max() <= 4


def test_bytes_stay_bytes() -> None:
    """Pixels that are integers are rounded."""
    found = mixed(pictures(64, np.uint8), net_of(1, 1, SIDE, SIDE, dtype=TensorProto.UINT8))
    assert found.dtype == np.uint8
    sums = found.reshape(128, -1).astype(int).sum(axis=1)
    assert np.abs(sums - 200).max() <= 1


def test_very_many_images_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are enough, mixtures only take time."""
    monkeypatch.setattr(mixtures, "_MOST", 96)
    net = net_of(1, 1, SIDE, SIDE)
    assert len(mixed(pictures(64), net)) == 64
    monkeypatch.setattr(mixtures, "_MOST", 192)
    assert len(mixed(pictures(128), net)) == 192
    np.testing.assert_array_equal(mixed(pictures(64), net)[:56], pictures(64)[:56])


def test_very_large_images_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixtures take no more memory than is allowed for them."""
    net = net_of(1, 1, SIDE, SIDE)
    monkeypatch.setattr(mixtures, "_MOST_BYTES", 2 * 4 * SIDE * SIDE * 64)
    assert len(mixed(pictures(64), net)) == 64
    monkeypatch.setattr(mixtures, "_MOST_BYTES", 2 * 4 * SIDE * SIDE * 128)
    assert len(mixed(pictures(64), net)) == 128


def test_features_are_not_mixed() -> None:
    """Half of one customer and half of another is none."""
    rows = np.random.default_rng(0).normal(size=(64, 7)).astype(np.float32)
    np.testing.assert_array_equal(mixed(rows, net_of(1, 7)), rows)
