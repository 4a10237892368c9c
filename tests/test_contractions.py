"""Queries and keys: the sides of a product of computed tensors are told apart, and each is mixed as it should be."""

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnxfuse
from onnxfuse.analysis import Analysis
from onnxfuse.arrays import FloatArray
from onnxfuse.calibration.contraction_shares import contraction_shares
from onnxfuse.calibration.judge import judge_groups
from onnxfuse.config import Provider
from onnxfuse.coupling.groups import CouplingGroup
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.proof.samples import load_samples
from onnxfuse.statistics.bilinear import best_pair, dropping_order, pair_damage, root
from onnxfuse.statistics.damage import Reading
from tests.builders import AnyArray, Net, run_ort
from tests.laws import analysis_of, assert_same_outputs, free_groups, fuse
from tests.test_attention import FORMS, Form

MIXABLE = (
    "separate",
    "values of another size",
    "split evenly",
    "split by stated sizes",
    "gathered",
    "split from an axis",
    "heads in the batch",
    "heads in an open batch",
    "shapes computed",
    "einsum",
    "one head of keys, broadcast",
    "one head of keys, tiled",
    "shared heads",
    "a bias for each head",
    "a bias looked up",
    "MultiHeadAttention",
    "Attention of ONNX",
)
SEEDS = st.integers(0, 999)


def called(name: str) -> Form:
    """Return a form of attention."""
    return next(form for form in FORMS if form.name == name)


def contracted(analysis: Analysis) -> CouplingGroup:
    """Return the one group that queries and keys are multiplied over."""
    (group,) = [group for group in free_groups(analysis) if group.contractions]
    return group


def invertible(group: CouplingGroup, seed: int) -> ChannelMap:
    """Return a random map that loses nothing: another invertible matrix for each set."""
    rng = np.random.default_rng(seed)
    maps = []
    for _ in range(group.sets):
        output = np.eye(group.channels) + 0.4 * rng.normal(size=(group.channels, group.channels))
        maps.append(ChannelMap(output, np.linalg.inv(output), np.arange(group.channels)))
    return ChannelMap.side_by_side(maps)


@pytest.mark.parametrize("name", MIXABLE)
def test_any_change_of_basis_changes_nothing(name: str) -> None:
    """Queries by A and keys by the inverse of its transpose: scores stay what they are, in every form of attention."""
    net = called(name).net()
    analysis = analysis_of(net.model(), feeds=net.feeds)
    group = contracted(analysis)
    assert not group.unmixable
    result = fuse(analysis, {group.name: invertible(group, 1)})
    assert_same_outputs(run_ort(net.model(), net.feeds), run_ort(result.model, net.feeds), tolerance=2e-5)


def test_all_other_forms_are_only_dropped() -> None:
    """Where positions turn pairs, a norm lies between, or one weight ties the sides, nothing is mixed."""
    for form in FORMS:
        if form.name not in MIXABLE:
            net = form.net()
            groups = [g for g in free_groups(analysis_of(net.model(), feeds=net.feeds)) if g.contractions]
            assert all(g.unmixable and not g.mirrored for g in groups), form.name


def product_net(left: Callable[[Net, str], str], right: Callable[[Net, str], str]) -> Net:
    """Write a product of two things that are made of one input, over 6 channels."""
    net = Net(17, seed=2)
    x = net.input(2, 5, 4, batch="n")
    a, b = left(net, net.matmul(x, 6, name="left")), right(net, net.matmul(x, 6, name="right"))
    scores = net.node("Softmax", net.node("MatMul", a, net.node("Transpose", b, perm=[0, 2, 1])), axis=-1)
    net.output(net.matmul(net.node("MatMul", scores, net.matmul(x, 3, name="value")), 2, name="out"))
    return net


def plain(_: Net, x: str) -> str:
    """Leave a side as it is."""
    return x


@pytest.mark.parametrize(
    ("between", "free"),
    [
        (lambda net, x: net.node("Mul", x, net.constant(0.3)), True),
        (lambda net, x: net.node("Mul", x, net.node("ReduceMax", "x0", axes=[-1])), True),
        (lambda net, x: net.node("Relu", x), False),
        (lambda net, x: net.node("Add", x, net.constant(0.3)), False),
        (lambda net, x: net.node("Mul", x, net.vector(6)), False),
        (lambda net, x: net.node("Div", net.constant(1.0), net.node("Exp", x)), False),
    ],
    ids=["a factor", "a factor for each place", "an activation", "a shift", "a factor for each channel", "a quotient"],
)
def test_only_linear_maps_may_lie_between(between: Callable[[Net, str], str], *, free: bool) -> None:
    """Anything that is not one linear map for all channels alike keeps them from being mixed, on either side."""
    for net in (product_net(between, plain), product_net(plain, between)):
        group = contracted(analysis_of(net.model(), feeds=net.feeds))
        assert (not group.unmixable) is free
        assert bool(group.mirrored) is free


def test_a_side_with_itself_is_only_dropped() -> None:
    """A product of a tensor with itself has one side: a linear map would square."""
    net = Net(17, seed=2)
    x = net.matmul(net.input(2, 5, 4), 6, name="both")
    net.output(net.node("MatMul", x, net.node("Transpose", x, perm=[0, 2, 1])))
    assert contracted(analysis_of(net.model(), feeds=net.feeds)).unmixable


def reading(seed: int, channels: int) -> Reading:
    """Make up what a contraction makes of some channels."""
    rng = np.random.default_rng(seed)
    q, k = (rng.normal(size=(50, channels)) @ rng.normal(size=(channels, channels)) for _ in range(2))
    return Reading(q.T @ q / 50, q.mean(axis=0)[:, None], root(k.T @ k / 50), has_shift=False)


def lost(seen: Reading, output: FloatArray, read: FloatArray) -> float:
    """Return J of a pair of maps, by its definition."""
    gap = np.eye(len(output[0])) - read @ output
    return float(np.trace(seen.weights @ seen.weights.T @ gap @ seen.covariance @ gap.T))


@given(SEEDS, st.integers(2, 7))
def test_no_pair_of_maps_loses_less(seed: int, channels: int) -> None:
    """The best pair loses what is foretold, no other one less, and both sides have one size."""
    seen, rng = reading(seed, channels), np.random.default_rng(seed)
    damage = pair_damage([seen], 1)
    assert damage[0] == pytest.approx(seen.damage)
    for kept in range(1, channels + 1):
        output, read, _ = best_pair([seen], kept, 1)
        assert lost(seen, output, read) == pytest.approx(damage[kept], rel=1e-6, abs=1e-9 * damage[0])
        other = rng.normal(size=(kept, channels))
        inside = other @ seen.covariance @ other.T
        assert damage[kept] <= lost(seen, other, seen.covariance @ other.T @ np.linalg.inv(inside)) + 1e-9 * damage[0]
        sizes = [np.diag(output @ seen.covariance @ output.T), np.diag(read.T @ seen.strength @ read)]
        np.testing.assert_allclose(sizes[0], sizes[1], rtol=1e-5)


def test_sets_have_maps_of_their_own() -> None:
    """Of two heads each gets what is best for it, and what one lacks costs nothing there."""
    first, second = reading(1, 4), reading(2, 4)
    covariance, weights = (np.zeros((8, 8)) for _ in range(2))
    for part, seen in ((slice(4), first), (slice(4, 8), second)):
        covariance[part, part], weights[part, part] = seen.covariance, seen.weights
    both = Reading(covariance, np.zeros((8, 1)), weights, has_shift=False, sets=2)
    np.testing.assert_allclose(pair_damage([both], 2), pair_damage([first], 1) + pair_damage([second], 1))
    output, read, anchors = best_pair([both], 3, 2)
    assert (output[:3, 4:] == 0).all()
    assert (anchors < 4).tolist() == [True] * 3 + [False] * 3
    np.testing.assert_allclose(read[:4, :3], best_pair([first], 3, 1)[1])


@given(SEEDS, st.integers(2, 6))
def test_what_is_dropped_costs_what_is_foretold(seed: int, channels: int) -> None:
    """J of dropping is that of a selection, for every K; the last one to stay is the best alone."""
    seen = reading(seed, channels)
    order, damage = dropping_order([seen], 1)
    assert sorted(order.tolist()) == list(range(channels))
    for kept in range(1, channels + 1):
        chosen = np.eye(channels)[order[:kept]]
        assert damage[kept] == pytest.approx(lost(seen, chosen, chosen.T), rel=1e-6, abs=1e-9 * damage[0])
    without_one = [np.eye(channels)[list(some)] for some in combinations(range(channels), channels - 1)]
    best = min(lost(seen, chosen, chosen.T) for chosen in without_one)
    assert damage[channels - 1] == pytest.approx(max(best, 0.0), rel=1e-6, abs=1e-9 * damage[0])


def samples(net: Net, count: int) -> dict[str, AnyArray]:
    """Return random inputs."""
    rng = np.random.default_rng(3)
    return {name: rng.normal(size=(count, *x.shape[1:])).astype(x.dtype) for name, x in net.feeds.items()}


def test_the_damage_of_scores_is_what_the_stream_loses() -> None:
    """Without all channels J is what the layer behind loses; with half of them, roughly what is foretold is lost."""
    net = product_net(plain, plain)
    feeds = samples(net, 256)
    analysis = analysis_of(net.model(), feeds=feeds)
    group = contracted(analysis)
    given_samples = load_samples(feeds, analysis.graph)
    (contraction,) = group.contractions
    share = contraction_shares(analysis, [contraction.node], given_samples, Provider.CPU)[contraction.node]
    assert share > 0
    judgement = judge_groups(analysis, [group], given_samples, Provider.CPU, 0)[group.name]
    assert judgement.damage[0] == pytest.approx(share, rel=1e-3)
    whole = fuse(analysis, {})
    for kept in (2, 4):
        fused = fuse(analysis_of(net.model(), feeds=feeds), {group.name: judgement.pair_map(kept)})
        y, z = (next(iter(run_ort(model, feeds).values())) for model in (whole.model, fused.model))
        measured = float(np.square(y - z).sum() / y.reshape(-1, 2).var(axis=0).sum() / (y.size / 2))
        assert measured < 3 * judgement.damage[kept] + 1e-9


def test_keys_that_need_few_channels_keep_few() -> None:
    """Where queries and keys meet in two directions, two channels of six are enough, whichever directions they are."""
    net = product_net(plain, plain)
    model = net.model()
    rng = np.random.default_rng(4)
    for tensor in model.graph.initializer:
        if list(tensor.dims) == [4, 6]:
            narrow = (rng.normal(size=(4, 2)) @ rng.normal(size=(2, 6))).astype(np.float32)
            tensor.raw_data = narrow.tobytes()
    for tensor in model.graph.initializer:
        if list(tensor.dims) == [6]:
            tensor.raw_data = np.zeros(6, np.float32).tobytes()
    feeds = samples(net, 256)
    result = onnxfuse.compress(model, calibration=feeds, ratio=0.66, only=["left"], refit=False, provider="cpu")
    (group,) = [group for group in result.report.groups if group.method]
    assert (group.channels_after, group.method) == (2, "least-damage")
    assert not any("defect" in note for note in result.report.notes)
    y, z = (next(iter(run_ort(m, feeds).values())) for m in (model, result.model))
    assert np.square(y - z).mean() < 1e-5 * y.var()


def test_a_product_of_integers_is_judged_too() -> None:
    """Scores that are multiplied as integers can't be switched off with a factor; their channels are dropped by J."""
    net = Net(17, seed=1)
    x = net.input(4, 5, 8, batch="n")
    scale, zero, wide = net.constant(np.float32(0.05)), net.constant(np.uint8(128)), net.constant(np.float32(0.3))
    sides = [net.matmul(x, 6, name="query"), net.node("Transpose", net.matmul(x, 6, name="key"), perm=[0, 2, 1])]
    rounded = [name for side in sides for name in (net.node("QuantizeLinear", side, scale, zero), scale, zero)]
    scores = net.node("DequantizeLinear", net.node("QLinearMatMul", *rounded, wide, zero), wide, zero)
    weighed = net.node("MatMul", net.node("Softmax", scores, axis=-1), net.matmul(x, 4, name="value"))
    net.output(net.matmul(weighed, 3, name="out"))
    result = onnxfuse.compress(
        net.model(), calibration=samples(net, 64), ratio=0.5, only=["query"], provider="cpu", effort=0
    )
    (group,) = [group for group in result.report.groups if group.method]
    assert group.unmixable
    assert group.damage is not None
    assert 0 < group.damage < 1
