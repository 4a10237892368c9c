"""Few samples, useless ones and broken ones: what they are joined by, what is said of them, what is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxfuse
from onnxfuse.calibration.few import different_samples
from onnxfuse.errors import DataError
from onnxfuse.graph.view import GraphView
from onnxfuse.proof.samples import load_samples
from tests.builders import AnyArray, Net
from tests.conftest import logits_of
from tests.laws import assert_valid

OPTIONS: Mapping[str, Any] = {"prove": False, "provider": "cpu", "effort": 0}


@pytest.fixture
def images(models: Path) -> AnyArray:
    """The images that the example network is calibrated on, in another order."""
    found = np.load(models / "digits_calibration.npz")["image"]
    mixed: AnyArray = found[np.random.default_rng(0).permutation(len(found))]
    return mixed


def notes_of(report: onnxfuse.CompressionReport) -> list[str]:
    """Return the notes on few samples."""
    return [note for note in report.notes if note.startswith("few samples")]


def agreement(original: Path, made: onnxfuse.Compressed, images: AnyArray) -> float:
    """Return how often a classifier and what was made of it agree."""
    first = logits_of(original, images)
    second = logits_of(made.save(original.with_name("small.onnx")), images)
    return float((first.argmax(axis=1) == second.argmax(axis=1)).mean())


@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_a_few_images_do_no_harm(count: int, digits: Path, images: AnyArray) -> None:
    """A network that was fitted to a few images and to made-up ones knows others too; a note has the figures."""
    given = {"image": images[:count]}
    made = onnxfuse.compress(digits, target="macs=0.5", calibration=given, **OPTIONS)
    assert agreement(digits, made, images[128:]) > 0.85
    (note,) = notes_of(made.report)
    assert f"{count} different of {count}, and groups of up to 32 channels" in note
    assert "made-up images stand beside them" in note
    # How far the outputs have moved is told on what the user gave.
    assert made.report.drift.samples == count


@pytest.mark.parametrize("what", ["constant", "zero", "partly broken"])
def test_useless_images_do_no_harm(what: str, digits: Path, images: AnyArray) -> None:
    """The same image again and again is one image, and broken ones are none."""
    given = np.repeat(images[:1], 64, axis=0) * (what != "zero")
    if what == "partly broken":
        given[:60, 0, 0, 0] = np.nan
    made = onnxfuse.compress(digits, target="macs=0.5", calibration={"image": given}, **OPTIONS)
    assert agreement(digits, made, images[128:]) > 0.85
    assert "few samples: 1 different of 64" in notes_of(made.report)[0]


def test_the_fewer_the_samples_the_more_is_made_up(digits: Path, images: AnyArray) -> None:
    """Made-up images make way for the user's, and from 128 on there are none."""
    added = []
    for count in (1, 8, 64, 128):
        report = onnxfuse.compress(digits, ratio=0.3, calibration={"image": images[:count]}, **OPTIONS).report
        added += [int(note.split("; ")[1].split()[0]) for note in notes_of(report)] or [0]
    assert added == sorted(added, reverse=True)
    assert added[0] > 450
    assert added[2] > 0 == added[3]


def test_images_of_another_scale_are_left_alone(digits: Path, images: AnyArray) -> None:
    """Images on another scale than the made-up ones are not mixed with these; the note says how many are enough."""
    report = onnxfuse.compress(digits, ratio=0.3, calibration={"image": 255 * images[:4]}, **OPTIONS).report
    assert [note.split("; ")[1] for note in notes_of(report)] == ["give 128 or more"]


def test_few_images_of_a_network_that_takes_four_at_once() -> None:
    """Made-up images stand beside them there too, in runs of four."""
    net = Net(seed=1)
    x = net.input(4, 3, 32, 32)
    hidden = net.node("Relu", net.conv(x, 8))
    net.output(net.node("GlobalAveragePool", net.conv(hidden, 8)))
    samples = {x: np.random.default_rng(0).normal(size=(12, 3, 32, 32)).astype(np.float32)}
    result = onnxfuse.compress(net.model(), calibration=samples, ratio=0.5, effort=0, provider="cpu")
    assert "made-up images stand beside them" in " ".join(result.report.notes)
    assert_valid(result.model)


def test_statistics_that_are_not_stored_do_not_tell_the_scale_of_pixels() -> None:
    """Some exporters make equal weights from one another by an Identity."""
    net = Net(17, seed=1)
    x = net.conv(net.input(1, 3, 16, 16, batch="n"), 8)
    scale, shift, mean, variance = (net.vector(8, low=low, high=1.0) for low in (0.5, -1.0, -1.0, 0.5))
    hidden = net.node("Relu", net.node("BatchNormalization", x, scale, shift, net.node("Identity", mean), variance))
    net.output(net.node("GlobalAveragePool", net.conv(hidden, 4)))
    result = onnxfuse.compress(net.model(), ratio=0.5, **OPTIONS)
    assert "synthetic images" in " ".join(result.report.notes)
    assert_valid(result.model)


def test_few_rows_of_features_are_told() -> None:
    """Where nothing can be made up, a note says how many rows there should be: as many as the widest group has."""
    net = Net(17, seed=1)
    hidden = net.node("Relu", net.gemm(net.input(1, 5, batch="n"), 40, name="wide", transB=1))
    net.output(net.gemm(hidden, 3, name="last", transB=1))
    rows = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    few = onnxfuse.compress(net.model(), calibration={"x0": rows[:39]}, **OPTIONS).report
    told = "few samples: 39 different of 39, and groups of up to 40 channels are chosen and fitted on them"
    assert notes_of(few) == [f"{told}; give 40 or more"]
    assert not notes_of(onnxfuse.compress(net.model(), calibration={"x0": rows}, **OPTIONS).report)
    # Who chooses by weights alone needs no samples.
    plain = onnxfuse.compress(net.model(), calibration={"x0": rows[:2]}, method="prune", **OPTIONS).report
    assert not notes_of(plain)


def test_different_samples_are_sound_and_unlike_each_other() -> None:
    """Of equal samples the first counts, and it is all inputs of a sample that are compared."""
    net = Net(17, seed=1)
    net.output(net.node("Add", net.input(1, 2, batch="n"), net.input(1, 2, batch="n")))
    first = np.array([[1, 2], [1, 2], [1, 2], [np.inf, 2], [3, 4]], np.float32)
    second = np.array([[0, 0], [0, 0], [1, 0], [0, 0], [0, np.nan]], np.float32)
    samples = load_samples({"x0": first, "x1": second}, GraphView(net.model()))
    assert different_samples(samples).tolist() == [0, 2]


@pytest.mark.parametrize("how", [{"target": "macs=0.5"}, {"ratio": 0.3}, {"ratio": 0.3, "method": "prune"}])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_of_which_none_is_sound_are_refused(
    how: Mapping[str, Any], value: float, digits: Path, images: AnyArray
) -> None:
    """The message says that the samples are broken, where, and what to do; it blames no group."""
    given = images[:8].copy()
    given[:, 0, 2, 3] = value
    with pytest.raises(DataError, match="every one of the 8 samples has values that are NaN or infinite") as caught:
        onnxfuse.compress(digits, calibration={"image": given}, **how, **OPTIONS)
    assert caught.value.where == f"'image' of sample 0, at (0, 2, 3): {value}"
    assert "prepared" in (caught.value.mend or "")
    with pytest.raises(DataError, match="every one of the 8 samples"):
        onnxfuse.validate(digits, digits, data={"image": given}, provider="cpu")


def test_samples_that_overflow_inside_are_refused(digits: Path, images: AnyArray) -> None:
    """Finite samples that overflow inside the network say nothing for a budget; the message has their size."""
    with pytest.raises(DataError, match=r"overflows, on these samples, whose largest number is 1e\+30 in 'image'"):
        onnxfuse.compress(digits, target="macs=0.5", calibration={"image": 1e30 * images}, **OPTIONS)
