"""What importances learn from samples, against ONNX Runtime and finite differences; the same through the pipeline."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxfuse
from onnxfuse.arrays import FloatArray, IntArray
from onnxfuse.calibration.activations import observe_activations
from onnxfuse.config import Provider
from onnxfuse.errors import DataError, UnsupportedGraphError
from onnxfuse.gradient.loss import CrossEntropy
from onnxfuse.importance import FROM_SAMPLES
from onnxfuse.proof.samples import Samples, load_samples
from onnxfuse.statistics.features import ActivationFeatures
from onnxfuse.statistics.independence import channel_independence
from tests.builders import Arrays, Net, run_ort_all, run_reference
from tests.conftest import Command, MakeMlp
from tests.gradients import in_double
from tests.laws import analysis_of, free_groups

LABELS = np.arange(12) % 3


def small_net(seed: int = 0, order: IntArray | None = None) -> tuple[Net, str]:
    """Two convolutions and a head, with the channels between them in any order; and where those are read."""
    net = Net(17, seed=seed)
    x = net.input(1, 2, 6, 6, batch="n")
    rng = np.random.default_rng(seed)
    order = np.arange(5) if order is None else order
    first, bias = rng.normal(size=(5, 2, 3, 3))[order], rng.normal(size=5)[order]
    second = rng.normal(size=(4, 5, 3, 3))[:, order]
    y = net.node("Conv", x, net.constant(first, name="first"), net.constant(bias), pads=[1] * 4, name="first")
    h = net.node("Relu", y)
    z = net.node("Conv", h, net.constant(second, name="second"), name="second")
    flat = net.node("Flatten", net.node("GlobalAveragePool", net.node("Relu", z)))
    head = net.constant(rng.normal(size=(4, 3)), name="head")
    net.output(net.node("MatMul", flat, head))
    return net, h


def samples_of(net: Net, count: int = 12) -> tuple[Samples, Arrays]:
    """Samples in three runs, and as arrays."""
    arrays = {"x0": np.random.default_rng(4).normal(size=(count, 2, 6, 6)).astype(np.float32)}
    return load_samples(arrays, analysis_of(net.model()).graph).in_batches(4), arrays


def observed(net: Net, importance: str, name: str = "first") -> ActivationFeatures:
    """Observe one group."""
    analysis = analysis_of(net.model(), feeds={"x0": np.zeros((2, 2, 6, 6), np.float32)})
    group = next(g for g in free_groups(analysis) if g.name == name)
    loss = CrossEntropy(LABELS)
    return observe_activations(analysis, [group], importance, samples_of(net)[0], Provider.CPU, 0, loss)[name]


def test_norms_are_those_of_what_readers_see() -> None:
    """Mean magnitude and mean square are over all samples and places of the value that the next layer reads."""
    net, h = small_net()
    value = run_ort_all(net.model(), samples_of(net)[1])[h].astype(np.float64)
    found = observed(net, "activation-l1")
    assert found.magnitude is not None
    assert found.square is not None
    np.testing.assert_allclose(found.magnitude, np.abs(value).mean(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(found.square, np.square(value).mean(axis=(0, 2, 3)), rtol=1e-5)


def test_independence_is_the_mean_over_samples() -> None:
    """Every sample has a map of its own."""
    net, h = small_net()
    value = run_ort_all(net.model(), samples_of(net)[1])[h].astype(np.float64)
    found = observed(net, "chip").independence
    assert found is not None
    np.testing.assert_allclose(found, np.mean([channel_independence(m.reshape(5, -1)) for m in value], axis=0))


def entropy(model: onnx.ModelProto, arrays: Arrays) -> float:
    """The cross entropy of a network in double precision, written down anew."""
    scores = next(iter(run_reference(model, {n: a.astype(np.float64) for n, a in arrays.items()}).values()))
    shifted = scores - scores.max(axis=1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(LABELS)), LABELS]).sum())


def slopes(model: onnx.ModelProto, arrays: Arrays, name: str) -> FloatArray:
    """The slope of the cross entropy along every single weight."""
    double = in_double(model)
    tensor = next(t for t in double.graph.initializer if t.name == name)
    weight = onnx.numpy_helper.to_array(tensor).copy()
    found = np.empty(weight.shape)
    for place in np.ndindex(weight.shape):
        totals = []
        for step in (1e-6, -1e-6):
            moved = weight.copy()
            moved[place] += step
            tensor.CopyFrom(onnx.numpy_helper.from_array(moved, name))
            totals.append(entropy(double, arrays))
        found[place] = (totals[0] - totals[1]) / 2e-6
    tensor.CopyFrom(onnx.numpy_helper.from_array(weight, name))
    return found


def test_sensitivity_is_the_sum_of_weights_times_slopes() -> None:
    """It is |w dL/dw|, summed over each channel's weights, averaged over producer and consumer."""
    net, _ = small_net()
    arrays = samples_of(net)[1]
    first, second = (np.abs(net.values[n] * slopes(net.model(), arrays, n)) for n in ("first", "second"))
    wanted = (first.sum(axis=(1, 2, 3)) + second.sum(axis=(0, 2, 3))) / 2
    found = observed(net, "taylor").sensitivity
    assert found is not None
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


@pytest.mark.parametrize("importance", sorted(FROM_SAMPLES))
def test_what_is_seen_permutes_with_the_channels(importance: str) -> None:
    """Channels in another order have the same statistics, in that order."""
    order = np.array([3, 0, 4, 1, 2])
    plain, moved = observed(small_net()[0], importance), observed(small_net(order=order)[0], importance)
    for name in ("magnitude", "square", "sensitivity", "independence"):
        expected, actual = getattr(plain, name), getattr(moved, name)
        assert (expected is None) == (actual is None)
        if expected is not None:
            np.testing.assert_allclose(actual, expected[order], rtol=1e-4)
    for expected, actual in zip(plain.readings, moved.readings, strict=True):
        np.testing.assert_allclose(actual.covariance, expected.covariance[np.ix_(order, order)], rtol=1e-3, atol=1e-5)


def test_channels_that_no_weight_reads_are_seen_where_they_are_made() -> None:
    """Channels that end in a pool have norms all the same, and their mean square for a damage."""
    net = Net(17, seed=3)
    x = net.input(1, 2, 6, 6, batch="n")
    h = net.conv(x, 5, name="first")
    net.output(net.node("ReduceMean", h, axes=[1, 2, 3], keepdims=0))
    analysis = analysis_of(net.model(), feeds={"x0": np.zeros((2, 2, 6, 6), np.float32)})
    group = next(g for g in analysis.channels.groups if g.name == "first")
    samples, arrays = samples_of(net)
    value = run_ort_all(net.model(), arrays)[h]
    found = observe_activations(analysis, [group], "damage", samples, Provider.CPU, 0)["first"]
    assert found.readings == ()
    assert found.square is not None
    np.testing.assert_allclose(found.square, np.square(value).mean(axis=(0, 2, 3)), rtol=1e-4)


def test_nothing_is_run_for_no_groups() -> None:
    """Where no group is to be scored, there is nothing to observe."""
    analysis = analysis_of(small_net()[0].model())
    assert observe_activations(analysis, [], "chip", samples_of(small_net()[0])[0], Provider.CPU, 0) == {}


@pytest.mark.parametrize("method", ["prune", "intra-fusion", "fold"])
@pytest.mark.parametrize("importance", sorted(FROM_SAMPLES))
def test_every_importance_works_with_every_method(models: Path, importance: str, method: str) -> None:
    """With samples, the result has the widths that were asked for, and is proven."""
    images = np.load(models / "digits_calibration.npz")["image"][:64]
    made = onnxfuse.compress(
        models / "digits_bn.onnx",
        calibration={"image": images},
        method=method,
        importance=importance,
        ratio=0.5,
        prove=False,
        provider="cpu",
    )
    assert all(g.channels_after == g.channels_before // 2 for g in made.report.groups if not g.frozen)
    assert made.report.config["importance"] == importance
    assert any("cross entropy" in note for note in made.report.notes) == (importance == "taylor")


@pytest.mark.parametrize("importance", sorted(FROM_SAMPLES))
def test_a_dead_channel_goes_first(importance: str) -> None:
    """A channel that is never on is dropped by every importance, though its weights are the largest."""
    net, _ = small_net(seed=2)
    for name, value in net.values.items():
        if value.shape == (5,):
            value[3] = -1e3
            tensor = next(t for t in net.initializers if t.name == name)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))
    made = onnxfuse.compress(
        net.model(),
        calibration=samples_of(net)[1],
        method="prune",
        importance=importance,
        keep="first=4",
        only="first",
        provider="cpu",
    )
    assert made.report.drift.outputs[0].max_abs < 1e-4


def test_labels_are_taken_where_there_are_any(models: Path) -> None:
    """Labels in the calibration file decide what taylor takes the gradient of, and are no input."""
    test = dict(np.load(models / "digits_test.npz"))
    options: dict[str, Any] = {"method": "prune", "importance": "taylor", "prove": False, "provider": "cpu"}
    key = next(name for name in test if name != "labels")
    data = {key: test[key][:64], "labels": test["labels"][:64]}
    made = onnxfuse.compress(models / "digits_bn.onnx", calibration=data, **options)
    assert "the importance taylor goes by the gradient of cross entropy with the labels" in made.report.notes


def test_without_data_images_are_made_up(models: Path) -> None:
    """Without samples, made-up images stand in, and the report says so."""
    made = onnxfuse.compress(
        models / "digits_folded.onnx", method="prune", importance="activation-l2", prove=False, provider="cpu"
    )
    assert any("dead leaves" in note for note in made.report.notes)


@pytest.mark.parametrize("importance", sorted(FROM_SAMPLES))
def test_without_samples_that_mean_something_it_is_refused(make_mlp: MakeMlp, importance: str) -> None:
    """Random numbers tell nothing of activations: the complaint says how to go on."""
    with pytest.raises(DataError, match="no samples for the importance") as error:
        onnxfuse.compress(make_mlp(), method="prune", importance=importance, provider="cpu")
    assert error.value.where == "--importance"
    assert "--calibration" in error.value.mend


def test_an_operator_without_a_gradient_is_named() -> None:
    """Taylor can't go through it, and says which node; other importances can."""
    net = Net(17, seed=3)
    x = net.input(1, 2, 6, 6, batch="n")
    h = net.node("Atan", net.conv(x, 6, name="first"), name="odd")
    net.output(net.gemm(net.node("Flatten", net.conv(h, 3, name="last")), 3))
    options: dict[str, Any] = {"method": "prune", "ratio": 0.5, "provider": "cpu", "calibration": samples_of(net)[1]}
    with pytest.raises(UnsupportedGraphError, match="'odd'"):
        onnxfuse.compress(net.model(), importance="taylor", **options)
    assert onnxfuse.compress(net.model(), importance="damage", **options).report.after.parameters > 0


def test_the_command_line_says_what_is_missing(cli: Command, make_mlp: MakeMlp, tmp_path: Path) -> None:
    """The exit code is that of data that does not fit."""
    onnx.save(make_mlp(), tmp_path / "mlp.onnx")
    words = ["compress", tmp_path / "mlp.onnx", "-o", tmp_path / "small.onnx", "--importance", "chip"]
    outcome = cli(*words, "--method", "prune")
    assert outcome.code == DataError.exit_code
    assert "--calibration" in outcome.err
    assert not (tmp_path / "small.onnx").exists()
