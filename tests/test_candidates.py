"""Fused channels in place of selected ones: what paths predict, what candidates propose, and the choice among them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxfuse
from onnxfuse.analysis import Analysis
from onnxfuse.arrays import FloatArray, IntArray
from onnxfuse.calibration.activation_paths import PathFunction, activation_path
from onnxfuse.calibration.observe import observe_readings
from onnxfuse.config import CompressionConfig, Provider
from onnxfuse.coupling.groups import CouplingGroup
from onnxfuse.fusion.candidates import CANDIDATES, Known
from onnxfuse.fusion.candidates.choice import best_candidate
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.graph.files import read_model
from onnxfuse.report import GroupReport
from onnxfuse.statistics.channels import Channels, GaussianChannels, ObservedChannels
from onnxfuse.statistics.damage import Reading, greedy_order, judged_map, selection_damage
from onnxfuse.statistics.features import ChannelFeatures, MemberFeatures, Role
from onnxfuse.statistics.gaussian import Elementwise
from onnxfuse.transport import partial, unbalanced
from tests.builders import AnyArray, Net, run_ort
from tests.laws import analysis_of, free_groups, fuse
from tests.test_calibration import samples_for

MODELS = Path(__file__).parents[1] / "models"
FUNCTIONS: Mapping[str, Elementwise] = {"relu": lambda x: np.maximum(x, 0.0), "none": lambda x: x, "tanh": np.tanh}


def values_of(model: onnx.ModelProto, names: list[str], feeds: Mapping[str, AnyArray]) -> list[AnyArray]:
    """Run a model and return some of its values."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    whole.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    found = run_ort(whole, feeds)
    return [found[name] for name in names]


def read_values(analysis: Analysis, group: CouplingGroup) -> list[str]:
    """Return the first inputs of the nodes that read a group."""
    readers = {p.node for p in group.parameters if p.role is Role.CONSUMER}
    return [node.inputs[0] for node in analysis.graph.nodes if node.name in readers]


def silu_net() -> Net:
    """A network with a composite activation, a sum of two branches before one, and a clip behind a scale."""
    net = Net(17, seed=3)
    x = net.input(2, 3, 6, 6, batch="n")
    h = net.batch_norm(net.conv(x, 6, pads=[1, 1, 1, 1]))
    h = net.node("Mul", h, net.node("Sigmoid", h))
    a, b = net.conv(h, 5, kernel=1), net.batch_norm(net.conv(h, 5, kernel=1))
    h = net.clip(net.node("Mul", net.node("Add", a, b), net.constant(2.0)), 0.0, 6.0)
    h = net.node("GlobalAveragePool", net.conv(h, 7, pads=[1, 1, 1, 1]))
    net.output(net.gemm(net.node("Flatten", h), 3, transB=1))
    return net


@pytest.mark.parametrize("name", ["silu", "digits_bn", "digits_folded", "digits_dynamo_bn"])
def test_fused_networks_compute_what_paths_predict(name: str) -> None:
    """A reader of fused channels sees f(A z), whatever A, on samples: computed by the fused network itself."""
    model = silu_net().model() if name == "silu" else read_model(MODELS / f"{name}.onnx").model
    samples = samples_for(model, 8)
    analysis = analysis_of(model)
    feeds = next(iter(samples.feeds()))
    tried = 0
    for group in free_groups(analysis):
        kept = max(1, group.channels // 2)
        output = np.random.default_rng(5).normal(size=(kept, group.channels))
        fused = fuse(analysis, {group.name: ChannelMap(output, output.T.copy(), np.arange(kept))}).model
        for value in read_values(analysis, group):
            path = activation_path(analysis, group, value)
            if path is None:
                continue
            (before,) = values_of(model, [path.before], feeds)
            (after,) = values_of(fused, [value], feeds)
            expected = PathFunction(analysis, path, Provider.CPU)(np.einsum("kc,nc...->nk...", output, before))
            np.testing.assert_allclose(after, expected, rtol=1e-3, atol=1e-4 * float(np.abs(expected).max()))
            tried += 1
    assert tried >= 3


def test_paths_that_do_not_commute_with_mixtures_are_refused() -> None:
    """No path goes through a depthwise convolution, a maximum over places, slopes per channel, or a gate."""
    net = Net(17, seed=4)
    x = net.input(2, 3, 8, 8, batch="n")
    h = net.node("Relu", net.conv(x, 4, name="before depthwise", pads=[1, 1, 1, 1]))
    h = net.conv(h, 4, name="depthwise", group=4, pads=[1, 1, 1, 1])
    h = net.conv(h, 5, name="before maximum", kernel=1)
    h = net.node("MaxPool", net.node("Relu", h), kernel_shape=[2, 2], strides=[2, 2])
    h = net.conv(h, 6, name="before slopes", kernel=1)
    h = net.conv(net.node("PRelu", h, net.vector(6, 1, 1)), 7, name="before gate", kernel=1)
    h = net.node("Mul", h, net.node("Sigmoid", net.conv(h, 7, name="gate", kernel=1)))
    net.output(net.conv(h, 3, name="last", kernel=1))
    analysis = analysis_of(net.model())
    groups = free_groups(analysis)
    assert len(groups) >= 4
    for group in groups:
        # What reads a group last reads it behind the node in question.
        assert activation_path(analysis, group, read_values(analysis, group)[-1]) is None


def test_groups_with_an_unknown_reader_are_only_selected() -> None:
    """Where one of the readers sees channels through a maximum, no reading has channels; else all have, by halves."""
    net = Net(17, seed=5)
    x = net.input(2, 3, 8, 8, batch="n")
    a = net.node("Relu", net.conv(x, 4, name="known", pads=[1, 1, 1, 1]))
    b = net.node("Relu", net.conv(a, 6, name="half known", pads=[1, 1, 1, 1]))
    c = net.conv(b, 3, name="first", kernel=1, strides=[2, 2])
    d = net.node("MaxPool", b, kernel_shape=[2, 2], strides=[2, 2])
    net.output(net.node("Add", c, net.conv(d, 3, name="second", kernel=1)))
    analysis = analysis_of(net.model())
    groups = free_groups(analysis)
    found = observe_readings(analysis, groups, samples_for(net.model(), 12), Provider.CPU, 0)
    assert all(reading.channels is not None for reading in found["known"])
    assert len(found["half known"]) == 2
    assert all(reading.channels is None for reading in found["half known"])


def known(seed: int, channels: int, kept: int, function: str = "relu", order: IntArray | None = None) -> Known:
    """Make up a group with two readers, of Gaussian channels; or of the same in another order."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(channels, channels)) + 2 * rng.normal(size=(channels, 1)) * rng.normal(size=channels)
    samples = rng.normal(size=(2000, channels)) @ mixing + rng.normal(size=channels)
    weights = [rng.normal(size=(channels, 3)) for _ in range(2)]
    order = np.arange(channels) if order is None else order
    samples, weights = samples[:, order], [w[order] for w in weights]
    h = FUNCTIONS[function](samples)
    halves: tuple[Channels, Channels] = (
        ObservedChannels(FUNCTIONS[function], samples[:1000]),
        ObservedChannels(FUNCTIONS[function], samples[1000:]),
    )
    readings = tuple(
        Reading(np.cov(h.T, bias=True), h.mean(axis=0)[:, None], w / np.sqrt(10), channels=halves) for w in weights
    )
    selected = np.sort(greedy_order(readings)[0][:kept])
    member = MemberFeatures("reader", Role.CONSUMER, np.concatenate(weights, axis=1))
    return Known(ChannelFeatures(channels, (member,)), readings, selected)


def damages(group: Known, outputs: Iterable[FloatArray]) -> list[float]:
    """Return the damage of each output map."""
    return [judged_map(group.readings, output)[0] for output in outputs]


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_laws_of_candidates(name: str, function: str) -> None:
    """What is proposed is finite and of the right shape, and a permutation of the channels changes no damage."""
    plain = known(6, 7, 4, function)
    order = np.random.default_rng(0).permutation(7)
    moved = known(6, 7, 4, function, order)
    found, again, other = (list(CANDIDATES[name](what, np.random.default_rng(1))) for what in (plain, plain, moved))
    assert found
    for output, same in zip(found, again, strict=True):
        assert output.shape == (4, 7)
        assert np.isfinite(output).all()
        np.testing.assert_array_equal(output, same)
    np.testing.assert_allclose(damages(plain, found), damages(moved, other), rtol=1e-6)


@pytest.mark.parametrize("name", CANDIDATES)
def test_dead_channels_make_no_candidate_infinite(name: str) -> None:
    """Channels that never change, and weights of zeros, make nothing infinite, and are no reason to give up."""
    zeros = np.zeros((3, 3))
    dead = ObservedChannels(FUNCTIONS["relu"], np.full((20, 3), -1.0))
    member = MemberFeatures("reader", Role.CONSUMER, np.zeros((3, 2)))
    nothing = Known(
        ChannelFeatures(3, (member,)), (Reading(zeros, zeros[:, :1], zeros, channels=(dead, dead)),), np.array([0, 2])
    )
    for output in CANDIDATES[name](nothing, np.random.default_rng(0)):
        assert np.isfinite(output).all()
    assert best_candidate(nothing, list(CANDIDATES), np.random.default_rng(0)) is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_choice_is_never_worse_than_selection(seed: int, function: str) -> None:
    """What wins has less damage than the selection, and states by how much, on rows that it was not fitted to."""
    group = known(seed, 6, 3, function)
    base, _ = judged_map(group.readings, group.selection)
    names = ["principal", "transport"]
    choice = best_candidate(group, names, np.random.default_rng(0))
    others = damages(group, (output for n in names for output in CANDIDATES[n](group, np.random.default_rng(0))))
    if choice is None:
        assert min(others) >= 0.99 * base
        return
    assert choice.gain * base == pytest.approx(min(others))
    assert judged_map(group.readings, choice.channel_map.output)[0] == pytest.approx(choice.gain * base)


@pytest.mark.parametrize("seed", range(3))
def test_principal_directions_are_the_best_where_there_is_no_activation(seed: int) -> None:
    """Without an activation nothing that keeps as few channels loses less: neither selections nor random maps."""
    group = known(seed, 6, 3, "none")
    (best,) = CANDIDATES["principal"](group, np.random.default_rng(0))
    least, _ = judged_map(group.readings, best)
    assert least <= 1.02 * judged_map(group.readings, group.selection)[0]
    for random in np.random.default_rng(seed).normal(size=(5, 3, 6)):
        assert least <= 1.02 * judged_map(group.readings, random)[0]


def test_descent_goes_downhill() -> None:
    """From the selection on, descent lowers the damage on rows that it has not seen, for most groups by a lot."""
    gains = []
    for seed in range(6):
        group = known(seed, 8, 4)
        (output,) = CANDIDATES["descent"](group, np.random.default_rng(0))
        gains.append(judged_map(group.readings, output)[0] / judged_map(group.readings, group.selection)[0])
    assert max(gains) < 1.0
    assert float(np.median(gains)) < 0.9


@pytest.mark.parametrize("function", FUNCTIONS)
def test_any_map_can_be_judged_without_samples(function: str) -> None:
    """On Gaussian channels J by analytic moments is what samples lose, for a selection and for mixtures."""
    rng = np.random.default_rng(7)
    mixing, mean = rng.normal(size=(5, 5)), rng.normal(size=5)
    samples = rng.normal(size=(400_000, 5)) @ mixing + mean
    weights = rng.normal(size=(5, 2))
    analytic = GaussianChannels(FUNCTIONS[function], mean, mixing.T @ mixing)
    reading = Reading(np.eye(5), np.zeros((5, 1)), weights, channels=(analytic, analytic))
    for output in (np.eye(5)[:3], rng.normal(size=(3, 5))):
        damage, fitted = judged_map([reading], output)
        h, fused = FUNCTIONS[function](samples), FUNCTIONS[function](samples @ output.T)
        missed = (h - h.mean(axis=0) - (fused - fused.mean(axis=0)) @ fitted.T) @ weights
        assert damage == pytest.approx(float(np.square(missed).sum(axis=1).mean()), rel=0.03)


def test_two_ways_to_the_damage_of_a_selection_agree() -> None:
    """For a selection J by moments of f(A z) is J by the covariance of h, but for the ridge."""
    group = known(8, 6, 3)
    same = []
    for reading in group.readings:
        assert reading.channels is not None
        half = reading.channels[0]
        seen = half.fused(np.eye(6))
        same.append(Reading(seen.whole, seen.mean[:, None], reading.weights, channels=(half, half)))
    least = selection_damage(same, group.selected)
    assert least * (1 - 1e-6) <= judged_map(same, group.selection)[0] <= 1.001 * least


def far_and_near() -> tuple[FloatArray, FloatArray, FloatArray]:
    """Four channels and two targets; the last channel is far from both."""
    cost = np.array([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0], [9.0, 9.0]])
    return cost, np.full(4, 0.25), np.full(2, 0.5)


def test_relaxed_plans_leave_far_channels_behind() -> None:
    """Relaxed plans send less of a channel that is far from every target than of those that are near."""
    for plan in (unbalanced(*far_and_near(), reach=1.0), partial(*far_and_near(), share=0.7)):
        assert plan.shape == (4, 2)
        assert plan.min() >= 0
        sent = plan.sum(axis=1)
        assert sent[3] < 0.1 * sent[:3].min()
    assert partial(*far_and_near(), share=0.7).sum() == pytest.approx(0.7)
    np.testing.assert_allclose(partial(*far_and_near(), share=1.0).sum(axis=0), 0.5)


def test_entropic_plans_spread_what_exact_ones_send_whole() -> None:
    """Every fused channel has a part of every channel, where exact plans send most of them to one alone."""
    group = known(9, 8, 3)
    entropic, exact = (
        list(CANDIDATES[name](group, np.random.default_rng(0))) for name in ("entropic-transport", "transport")
    )
    assert all((output > 0).all() for output in entropic)
    assert all(np.count_nonzero(output) <= 3 + 8 + 3 - 1 for output in exact)


def test_masses_are_uniform_by_importance_and_by_what_readers_hear() -> None:
    """Three masses and two ground costs make six problems, all different; a plan's means are three blends each."""
    group = known(9, 8, 3)
    found = list(CANDIDATES["transport"](group, np.random.default_rng(0)))
    assert len({output.round(9).tobytes() for output in found}) == len(found) == 2 * 3 * 3


def test_clusters_are_means_of_their_members() -> None:
    """Of k-means every channel is in one mean; around selected ones every other joins the one that it is like."""
    group = known(10, 8, 3)
    first, *blended = CANDIDATES["clusters"](group, np.random.default_rng(0))
    for output in (first, blended[2], blended[5]):
        assert (np.count_nonzero(output, axis=0) == 1).all()
        np.testing.assert_allclose(output.max(axis=1) * np.count_nonzero(output, axis=1), 1.0)
    np.testing.assert_array_equal(blended[2][:, group.selected] > 0, np.eye(3) > 0)


def test_reports_say_which_candidate_won() -> None:
    """Groups whose fused channels are better say so, with a damage below that of the selection."""
    images = np.load(MODELS / "digits_calibration.npz")["image"][:128].astype(np.float32)

    def groups(*candidates: str) -> Sequence[GroupReport]:
        options = {"ratio": 0.5, "effort": 0, "candidates": candidates, "provider": "cpu"}
        config = CompressionConfig.from_options(options)
        return onnxfuse.compress(MODELS / "digits_bn.onnx", config=config, calibration={"image": images}).report.groups

    plain, mixed = groups(), groups("descent")
    assert {g.method for g in plain if g.method} == {"least-damage"}
    won = [(a, b) for a, b in zip(plain, mixed, strict=True) if b.method == "descent"]
    assert won
    assert all(b.damage is not None and a.damage is not None and b.damage < 0.99 * a.damage for a, b in won)
