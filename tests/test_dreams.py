"""Made-up images that are moved towards classes: they get there, stay images, and other networks are left alone."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxfuse
from onnxfuse.analysis import Analysis, choose_samples
from onnxfuse.calibration.dreams import dream
from onnxfuse.calibration.images import image_inputs
from onnxfuse.calibration.synthetic import calibration_samples
from onnxfuse.config import CompressionConfig, Provider
from onnxfuse.proof.samples import Samples
from tests.builders import AnyArray, Net, run_ort
from tests.conftest import QUICK
from tests.laws import analysis_of

DIGITS = onnx.load(Path(__file__).resolve().parent.parent / "models" / "digits_bn.onnx")
PLENTY = 1e15


def leaves(model: onnx.ModelProto) -> tuple[Analysis, Samples]:
    """Made-up images for a network that nothing was done to."""
    analysis = analysis_of(model)
    found, _ = choose_samples(analysis.source, analysis.graph, Provider.CPU, 0)
    assert found is not None
    return analysis, calibration_samples(analysis, found, CompressionConfig(provider=Provider.CPU, effort=0)).samples


def moved(analysis: Analysis, samples: Samples, macs: float = PLENTY, seed: int = 0) -> Samples | None:
    """Move them."""
    return dream(analysis, samples, image_inputs(analysis, samples), Provider.CPU, seed, macs)


def certainty(model: onnx.ModelProto, images: AnyArray) -> tuple[float, float]:
    """Return the mean likelihood of what a classifier finds, and the entropy of its answers, as a share of the most."""
    z = next(iter(run_ort(model, {model.graph.input[0].name: images}).values())).astype(np.float64)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    shares = np.bincount(p.argmax(axis=1), minlength=p.shape[1]) / len(p)
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum() / np.log(p.shape[1])
    return float(p.max(axis=1).mean()), float(entropy)


@cache
def digits() -> tuple[Analysis, Samples, Samples]:
    """The example network, with its images before and after."""
    analysis, before = leaves(DIGITS)
    after = moved(analysis, before)
    assert after is not None
    return analysis, before, after


def test_images_are_found_in_all_classes() -> None:
    """The network finds in them, with more certainty than before, each class about as often as any other."""
    _, before, after = digits()
    (old,), (new,) = before.arrays.values(), after.arrays.values()
    changed = (old != new).any(axis=(1, 2, 3))
    # The network finds so many classes in the images as they were.
    effective = 10 ** certainty(DIGITS, old)[1]
    assert changed.sum() == pytest.approx((1 - effective / 10) * len(old), abs=16)
    old, new = old[changed], new[changed]
    sure_before, even_before = certainty(DIGITS, old)
    sure_after, even_after = certainty(DIGITS, new)
    assert sure_after > sure_before
    assert even_after > max(even_before, 0.95)


def test_images_stay_near_and_in_range() -> None:
    """They are moved by less than they vary, and no pixel leaves the range that there was."""
    _, before, after = digits()
    (old,), (new,) = before.arrays.values(), after.arrays.values()
    assert new.dtype == old.dtype
    assert new.shape == old.shape
    assert old.min() <= new.min() < new.max() <= old.max()
    assert 0.05 * old.std() < (new - old).std() < old.std()
    # Those that are held back are like the others.
    changed = (old != new).any(axis=(1, 2, 3))
    parts = (changed[3::4], changed[: len(old) // 2], changed[len(old) // 2 :])
    assert all(abs(part.mean() - changed.mean()) < 0.15 for part in parts)


def test_a_budget_moves_the_first_images() -> None:
    """With less to spend fewer images are moved, in whole runs; with nothing, none."""
    analysis, before, _ = digits()
    assert before.batch == 64
    for count, expected in ((40, 40), (100, 100), (1, 1)):
        some = moved(analysis, before, macs=2 * 16 * (count + 0.5) * analysis.cost.macs)
        assert some is not None
        (old,), (new,) = before.arrays.values(), some.arrays.values()
        assert (old != new).any(axis=(1, 2, 3)).sum() == expected
    assert moved(analysis, before, macs=0.0) is None


def test_seeds_decide() -> None:
    """The same seed makes the same images, another one others."""
    analysis, before, _ = digits()
    few = replace(before, arrays={name: array[:64] for name, array in before.arrays.items()})
    first, again, other = (moved(analysis, few, seed=seed) for seed in (1, 1, 2))
    assert first is not None
    assert again is not None
    assert other is not None
    name = next(iter(few.arrays))
    np.testing.assert_array_equal(first.arrays[name], again.arrays[name])
    assert (first.arrays[name] != other.arrays[name]).any()


@pytest.mark.parametrize("kind", [onnx.TensorProto.UINT8, onnx.TensorProto.INT8])
def test_pixels_of_integers_are_moved_by_what_they_become(kind: int) -> None:
    """Where pixels are integers, gradients are taken behind the first Cast, and pixels stay integers."""
    net = Net(17, seed=8)
    x = net.input(1, 16, 16, 3, batch="n", dtype=kind)
    h = net.node("Mul", net.node("Cast", x, to=onnx.TensorProto.FLOAT), net.constant(np.float32(1 / 64)))
    h = net.node("Relu", net.conv(net.node("Transpose", h, perm=[0, 3, 1, 2]), 8, name="first", strides=[2, 2]))
    net.output(net.gemm(net.node("Flatten", h), 6, name="last", transB=1))
    model = net.model()
    analysis, before = leaves(model)
    after = moved(analysis, before)
    assert after is not None
    (old,), (new,) = before.arrays.values(), after.arrays.values()
    assert new.dtype == old.dtype
    assert certainty(model, new)[1] > certainty(model, old)[1]


def test_what_is_no_classifier_of_images_dreams_nothing() -> None:
    """A network that makes images of images, and one that looks at no images, have no classes."""
    net = Net(17, seed=9)
    net.output(net.conv(net.node("Relu", net.conv(net.input(1, 3, 16, 16, batch="n"), 8, name="a")), 3, name="b"))
    analysis, before = leaves(net.model())
    assert moved(analysis, before) is None
    flat = Net(17, seed=9)
    flat.output(flat.gemm(flat.node("Relu", flat.gemm(flat.input(2, 5, batch="n"), 8, name="a")), 3, name="b"))
    plain = analysis_of(flat.model())
    found, _ = choose_samples(plain.source, plain.graph, Provider.CPU, 0)
    assert found is not None
    assert moved(plain, found) is None


def test_reports_say_what_the_images_are() -> None:
    """A run without data says that its images were moved; without effort they are not."""
    for effort, is_moved in ((QUICK, True), (0.0, False)):
        made = onnxfuse.compress(DIGITS, target="macs=0.5", effort=effort, prove=False, provider="cpu")
        assert any("dead leaves" in note for note in made.report.notes)
        assert any("towards random classes" in note for note in made.report.notes) == is_moved


def test_runs_that_do_not_fit_into_memory_are_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less memory makes smaller runs, which may leave a few images as they are."""
    analysis, before, _ = digits()
    few = replace(before, arrays={name: array[:106] for name, array in before.arrays.items()}, batch=53)
    monkeypatch.setattr("onnxfuse.gradient.stream._MOST_BYTES", 2**20)
    after = moved(analysis, few)
    assert after is not None
    (old,), (new,) = few.arrays.values(), after.arrays.values()
    assert new.shape == old.shape
    monkeypatch.undo()
    whole = moved(analysis, few)
    assert whole is not None
    less, most = ((old != array).any(axis=(1, 2, 3)).sum() for array in (new, whole.arrays[next(iter(few.arrays))]))
    assert 0.75 * most <= less <= most
