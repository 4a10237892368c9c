"""Sets of channels: each group of a grouped convolution, and each head, has a map of its own; and where that is wrong.

The laws of `tests.test_laws` hold for every set by itself; what is here is about which sets there are and are not.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnxfuse
from onnxfuse.arrays import IntArray, block_diagonal
from onnxfuse.calibration.judge import judge_groups
from onnxfuse.config import Provider
from onnxfuse.coupling.groups import CouplingGroup, product_partners
from onnxfuse.coupling.layout import Atom, Concat, Layout, Product
from onnxfuse.coupling.sets import places
from onnxfuse.fusion.candidates import CANDIDATES, Known
from onnxfuse.fusion.candidates.choice import best_candidate
from onnxfuse.fusion.candidates.protocol import set_by_set
from onnxfuse.fusion.mapping import map_axes
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.fusion.methods import METHODS
from onnxfuse.graph.view import GraphView
from onnxfuse.proof.samples import load_samples
from onnxfuse.statistics.channels import ObservedChannels
from onnxfuse.statistics.damage import Reading, greedy_order, judged_map, selection_damage, within_sets
from onnxfuse.statistics.features import ChannelFeatures, MemberFeatures, Role
from tests.builders import AnyArray, Net, initializers, run_ort
from tests.laws import analysis_of, assert_same_outputs, fuse, group_called, with_copies

# Where the channels of every set are ----------------------------------------------------------------------------------

GROUPS, MORE, INSIDE, OUTPUTS = Atom(3, "groups"), Atom(2, "more"), Atom(4, "inside"), Atom(2, "outputs")
FORMS: Mapping[str, tuple[tuple[Layout, ...], int, tuple[Atom, ...]]] = {
    "one axis": ((Product((GROUPS, INSIDE)),), 0, (GROUPS,)),
    "channels first": ((Product((INSIDE, OUTPUTS, GROUPS)),), 0, (GROUPS,)),
    "another axis": ((Product((GROUPS, OUTPUTS)), INSIDE, Atom(2)), 1, (GROUPS,)),
    "another axis behind": ((INSIDE, Atom(2), GROUPS), 0, (GROUPS,)),
    "beside others": ((Concat((Atom(2), Product((GROUPS, INSIDE)), OUTPUTS)),), 0, (GROUPS,)),
    "twice": ((Concat((Product((GROUPS, INSIDE)), Product((GROUPS, INSIDE)))),), 0, (GROUPS,)),
    "two on one axis": ((Product((MORE, GROUPS, INSIDE)),), 0, (MORE, GROUPS)),
    "two on two axes": ((Product((GROUPS, OUTPUTS)), Product((MORE, INSIDE))), 1, (GROUPS, MORE)),
    "two on three axes": ((GROUPS, MORE, INSIDE), 2, (MORE, GROUPS)),
}


def group_over(over: tuple[Atom, ...]) -> CouplingGroup:
    """Return a group with a set for every index of some atoms."""
    return CouplingGroup("", INSIDE.size, (), "", residual=False, unmixable="", statistic="", atom=INSIDE, over=over)


def names(layout: Layout, atom: Atom) -> list[int]:
    """Return for every index of an axis which index of an atom it belongs to, -1 for none: by counting through it."""
    if isinstance(layout, Atom):
        return list(range(layout.size)) if layout is atom else [-1] * layout.size
    if isinstance(layout, Concat):
        return [name for part in layout.parts for name in names(part, atom)]
    return [max(found) for found in product(*(names(factor, atom) for factor in layout.factors))]


@pytest.mark.parametrize("form", FORMS)
def test_places_by_counting(form: str) -> None:
    """Every number that is named after a set and a channel is in the row of that channel, and no other is."""
    layouts, axis, over = FORMS[form]
    group = group_over(over)
    found = places(layouts, axis, group, {})
    assert found.axes[-1] == axis
    wanted: dict[tuple[int, ...], list[int]] = {}
    sides = [[names(layouts[i], atom) for i in found.axes] for atom in (*over, INSIDE)]
    for place, index in enumerate(product(*(range(len(side)) for side in sides[0]))):
        told = tuple(max(side[i] for side, i in zip(sides_of, index, strict=True)) for sides_of in sides)
        if min(told) >= 0:
            wanted.setdefault(told, []).append(place)
    rows = [wanted[told] for told in product(*(range(atom.size) for atom in (*over, INSIDE)))]
    assert found.index.tolist() == rows


@given(st.integers(0, 99), st.integers(1, 4))
def test_a_map_of_sets_on_two_axes(seed: int, kept: int) -> None:
    """A map acts on the part of the weight that belongs to each convolution group as its own part says."""
    rng = np.random.default_rng(seed)
    layouts, group = FORMS["another axis"][0], group_over((GROUPS,))
    weight, maps = rng.normal(size=(6, 4, 2)), rng.normal(size=(3, kept, 4))
    old, new = places(layouts, 1, group, {}), places(layouts, 1, group, {}, kept)
    found = map_axes(weight, old.axes, old.index, new.index, block_diagonal(list(maps)))
    np.testing.assert_allclose(found, np.einsum("gkc,goct->gokt", maps, weight.reshape(3, 2, 4, 2)).reshape(6, kept, 2))


# Which sets there are -------------------------------------------------------------------------------------------------


def grouped(net: Net, groups: int = 2, channels: int = 8) -> str:
    """Start with a convolution and a grouped one called ``made``, of which the sets are asked for."""
    x = net.node("Relu", net.conv(net.input(2, 3, 4, 4, batch="N"), channels, name="first"))
    return net.node("Relu", net.conv(x, channels, group=groups, name="made"))


def end(net: Net, x: str) -> None:
    """End with a convolution that reads all channels."""
    net.output(net.conv(x, 3, name="last"))


def unfolded(net: Net, x: str, groups: int = 2) -> str:
    """Give the groups an axis of their own."""
    return net.reshape(x, 0, groups, net.channels(x) // groups, *net.dims(x)[2:])


def plain(net: Net) -> None:
    """A convolution that reads the channels of all groups."""
    end(net, grouped(net))


def grouped_twice(net: Net) -> None:
    """The next convolution has half as many groups, so each of them has channels of two sets."""
    end(net, net.node("Relu", net.conv(grouped(net, 4), 8, group=2)))


def transposed(net: Net) -> None:
    """A transposed convolution with as many groups."""
    end(net, net.node("Relu", net.conv_transpose(grouped(net), 6, group=2)))


def shuffled(net: Net) -> None:
    """The channels of the groups are interleaved."""
    x = net.node("Transpose", unfolded(net, grouped(net)), perm=[0, 2, 1, 3, 4])
    end(net, net.reshape(x, 0, 8, 4, 4))


def added(net: Net) -> None:
    """A grouped convolution in a residual block: what it reads and what it makes are the same channels."""
    x = grouped(net)
    end(net, net.node("Add", x, net.node("Tanh", net.conv(x, 8, group=2))))


def gated(net: Net) -> None:
    """Squeeze and excitation between."""
    x = grouped(net)
    gate = net.node("Relu", net.conv(net.node("GlobalAveragePool", x), 2, 1))
    end(net, net.node("Mul", x, net.node("Sigmoid", net.conv(gate, 8, 1))))


def mixed_along_groups(net: Net) -> None:
    """A matrix mixes the groups, and a residual addition says that its outputs are the same groups."""
    x = net.node("Transpose", unfolded(net, grouped(net)), perm=[0, 2, 3, 4, 1])
    x = net.node("Add", x, net.node("MatMul", x, net.weight(2, 2)))
    end(net, net.reshape(net.node("Transpose", x, perm=[0, 4, 1, 2, 3]), 0, 8, 4, 4))


def softmax_over_groups(net: Net) -> None:
    """A softmax compares the channels of one place in different groups."""
    end(net, net.reshape(net.node("Softmax", unfolded(net, grouped(net)), axis=1), 0, 8, 4, 4))


def mean_over_groups(net: Net) -> None:
    """A mean over the groups is taken from every channel."""
    x = unfolded(net, grouped(net))
    end(net, net.reshape(net.node("Sub", x, net.reduce("Mean", x, [1])), 0, 8, 4, 4))


def statistic_over_groups(net: Net) -> None:
    """A normalisation has its statistics over the groups, for each channel of a group."""
    x = net.node("Transpose", unfolded(net, grouped(net)), perm=[0, 2, 3, 4, 1])
    x = net.node("LayerNormalization", x, net.vector(2, low=0.5, high=1.5), net.vector(2))
    end(net, net.reshape(net.node("Transpose", x, perm=[0, 4, 1, 2, 3]), 0, 8, 4, 4))


def scaled_alike(net: Net) -> None:
    """A scale for each channel of a group is the same in all groups."""
    end(net, net.reshape(net.node("Mul", unfolded(net, grouped(net)), net.vector(4, 1, 1)), 0, 8, 4, 4))


HAVE: Mapping[Callable[[Net], None], int] = {
    plain: 2,
    grouped_twice: 4,
    transposed: 2,
    shuffled: 2,
    added: 2,
    gated: 2,
}
HAVE_NONE = (mixed_along_groups, softmax_over_groups, mean_over_groups, statistic_over_groups, scaled_alike)


def built(build: Callable[[Net], None]) -> Net:
    """Build a network."""
    net = Net(17, seed=5)
    build(net)
    return net


def shuffles(group: CouplingGroup, seed: int) -> ChannelMap:
    """Permute the channels of every set in a way of its own."""
    rng = np.random.default_rng(seed)
    return ChannelMap.side_by_side([ChannelMap.permutation(rng.permutation(group.channels)) for _ in range(group.sets)])


@pytest.mark.parametrize("build", HAVE)
def test_sets_that_there_are(build: Callable[[Net], None]) -> None:
    """There is a set for every group, and permuting each in a way of its own changes nothing."""
    net = built(build)
    analysis = analysis_of(net.model())
    group = group_called(analysis, "made")
    assert (group.frozen, group.sets) == ("", HAVE[build])
    want = run_ort(net.model(), net.feeds)
    for seed in range(3):
        moved = fuse(analysis, {"made": shuffles(group, seed)})
        assert_same_outputs(want, run_ort(moved.model, net.feeds))


@pytest.mark.parametrize("build", HAVE)
def test_copies_merge_in_every_set(build: Callable[[Net], None]) -> None:
    """Copies merge without error, at different places in different sets, whatever is between."""
    net, rng = built(build), np.random.default_rng(0)
    analysis = analysis_of(net.model())
    group = group_called(analysis, "made")
    kept = group.channels // 2
    pairs = [rng.permutation(np.arange(group.channels) % kept) + kept * number for number in range(group.sets)]
    labels = np.concatenate(pairs)
    model = with_copies(analysis, group, labels)
    assert model is not None
    merged = fuse(analysis_of(model), {"made": ChannelMap.clusters(labels, kept * group.sets)})
    assert_same_outputs(run_ort(model, net.feeds), run_ort(merged.model, net.feeds))


@pytest.mark.parametrize("build", HAVE_NONE)
def test_sets_that_there_are_not(build: Callable[[Net], None]) -> None:
    """Where something ties the channels of different groups, there is one map for all; others would be wrong."""
    net = built(build)
    analysis = analysis_of(net.model())
    group = group_called(analysis, "made")
    assert (group.frozen, group.sets) == ("", 1)
    want = run_ort(net.model(), net.feeds)
    alike = fuse(analysis, {"made": ChannelMap.permutation(np.array([2, 0, 3, 1]))})
    assert_same_outputs(want, run_ort(alike.model, net.feeds))
    weight = next(p for p in group.producers if p.node == "made")
    over = next(product_partners(analysis.channels.layouts[weight.operand][0]))[0]
    wrong = replace(group, over=(over,))
    others = tuple(wrong if g is group else g for g in analysis.channels.groups)
    forced = replace(analysis, channels=replace(analysis.channels, groups=others))
    # Where an operand has no groups at all, other maps can't even be said.
    with pytest.raises((AssertionError, ValueError)):
        assert_same_outputs(want, run_ort(fuse(forced, {"made": shuffles(wrong, 0)}).model, net.feeds))


def test_depthwise_convolutions_have_no_sets() -> None:
    """Where a group is one channel, the channels are the groups, with several filters each or one."""
    net = Net(17, seed=1)
    x = net.conv(net.input(1, 3, 4, 4), 6, name="first")
    end(net, net.node("Relu", net.conv(net.conv(x, 6, group=6), 12, group=6)))
    group = group_called(analysis_of(net.model()), "first")
    assert (group.channels, group.sets) == (6, 1)


def test_group_normalisation() -> None:
    """The groups of a normalisation tell sets apart too: its statistics do not depend on the order inside a group."""
    net = Net(21, seed=2)
    x = net.conv(net.input(1, 3, 4, 4), 12, name="first")
    scale, shift = net.vector(12, low=0.5, high=1.5), net.vector(12)
    end(net, net.node("GroupNormalization", x, scale, shift, num_groups=3, like=x))
    analysis = analysis_of(net.model(), feeds=net.feeds)
    group = group_called(analysis, "first")
    assert (group.channels, group.sets) == (4, 3)
    moved = fuse(analysis, {"first": shuffles(group, 0)})
    assert_same_outputs(run_ort(net.model(), net.feeds), run_ort(moved.model, net.feeds))


def test_heads_are_cut_after_what_is_in_them() -> None:
    """Every head has a map of its own for what is in it, also where heads are dropped in the same go."""
    net = Net(17, seed=4)
    x = net.input(1, 5, 6)

    def heads(name: str) -> str:
        return net.node("Transpose", net.reshape(net.matmul(x, 12, name=name), 1, 5, 3, 4), perm=[0, 2, 1, 3])

    queries, keys, values = heads("queries"), heads("keys"), heads("values")
    scores = net.node("MatMul", queries, net.node("Transpose", keys, perm=[0, 1, 3, 2]))
    y = net.node("MatMul", net.node("Softmax", scores, axis=-1), values)
    y = net.reshape(net.node("Transpose", y, perm=[0, 2, 1, 3]), 1, 5, 12)
    # The last head is not read.
    rows = net.rng.standard_normal((12, 6)) * (np.arange(12) < 8)[:, None]
    net.output(net.node("MatMul", y, net.constant(rows), name="out"))
    analysis = analysis_of(net.model())
    sizes = [group for group in analysis.channels.groups if group.sets == 3]
    assert len(sizes) == 2
    dropped = next(group for group in analysis.channels.groups if group.channels == 3)
    maps = {group.name: shuffles(group, 1) for group in sizes} | {dropped.name: ChannelMap.selection(np.arange(2), 3)}
    assert_same_outputs(run_ort(net.model(), net.feeds), run_ort(fuse(analysis, maps).model, net.feeds))
    result = onnxfuse.compress(net.model(), ratio=0.4, method="prune", provider="cpu")
    assert {g.channels_after for g in result.report.groups if g.channels_before == 4} == {2}


# What each set gains --------------------------------------------------------------------------------------------------


def copies_in_groups(seed: int) -> tuple[Net, IntArray]:
    """Return a net with a grouped convolution, and labels that pair the channels of each group in a way of its own."""
    net = Net(17, seed=seed)
    x = net.input(64, 3, 6, 6, batch="N")
    x = net.node("Relu", net.batch_norm(net.conv(x, 12, name="first")))
    x = net.node("Relu", net.batch_norm(net.conv(x, 18, group=3, name="grouped")))
    end(net, x)
    # In the first group 0 and 1 are alike, in the second 0 and 2, in the third 0 and 3.
    pairs = [[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]]
    return net, np.concatenate([np.array(labels) + 2 * number for number, labels in enumerate(pairs)])


def test_one_map_for_all_can_not_merge_them() -> None:
    """Copies at different places in different groups merge without error; with one map for all that is impossible."""
    net, labels = copies_in_groups(0)
    analysis = analysis_of(net.model())
    model = with_copies(analysis, group_called(analysis, "first"), labels)
    assert model is not None
    want, analysis = run_ort(model, net.feeds), analysis_of(model)
    assert_same_outputs(want, run_ort(fuse(analysis, {"first": ChannelMap.clusters(labels, 6)}).model, net.feeds))
    for pairs in (labels[:4], labels[4:8] - 2, labels[8:] - 4):
        alike = fuse(analysis, {"first": ChannelMap.clusters(pairs, 2)})
        with pytest.raises(AssertionError):
            assert_same_outputs(want, run_ort(alike.model, net.feeds), tolerance=0.01)


PAIRS = {
    "first": [[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]],
    "grouped": [[0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2], [2, 0, 1, 1, 2, 0]],
}


def copied(name: str, seed: int, *, readers: bool) -> tuple[onnx.ModelProto, Mapping[str, AnyArray]]:
    """Return a model with copies in every group, at different places, and feeds."""
    net, _ = copies_in_groups(seed)
    analysis, kinds = analysis_of(net.model()), max(PAIRS[name][0]) + 1
    labels = np.concatenate([np.array(pairs) + kinds * number for number, pairs in enumerate(PAIRS[name])])
    model = with_copies(analysis, group_called(analysis, name), labels, readers=readers)
    assert model is not None
    return model, net.feeds


@pytest.mark.parametrize("name", PAIRS)
def test_clusters_find_the_copies_of_every_group(name: str) -> None:
    """Folding merges copies without error, wherever they are in each group."""
    model, feeds = copied(name, 1, readers=True)
    result = onnxfuse.compress(model, ratio=0.5, only=name, method="fold", provider="cpu")
    assert_same_outputs(run_ort(model, feeds), run_ort(result.model, feeds))


@pytest.mark.parametrize("effort", [0.0, 0.2])
@pytest.mark.parametrize("name", PAIRS)
def test_readers_rebuild_the_copies_of_every_group(name: str, effort: float) -> None:
    """Where samples decide, one of each kind stays in every group, and the layers behind get what they should."""
    model, feeds = copied(name, 1, readers=False)
    result = onnxfuse.compress(
        model, ratio=0.5, only=name, calibration=dict(feeds), effort=effort, candidates=("descent",), provider="cpu"
    )
    assert result.report.refits
    assert all(refit.error_before < 2e-3 for refit in result.report.refits)
    assert_same_outputs(run_ort(model, feeds), run_ort(result.model, feeds), tolerance=0.01)


def test_nothing_goes_at_ratio_0() -> None:
    """With nothing to remove, a grouped network stays as it is, whatever the method."""
    net, _ = copies_in_groups(2)
    want = run_ort(net.model(), net.feeds)
    for method in ("auto", *METHODS):
        result = onnxfuse.compress(net.model(), ratio=0, method=method, provider="cpu", prove=False)
        assert_same_outputs(want, run_ort(result.model, net.feeds), tolerance=0.0)


@pytest.mark.parametrize("method", METHODS)
def test_every_group_is_fused_from_its_own_filters(method: str) -> None:
    """What a group of the convolution keeps is made of its own filters, and of no other group's."""
    net = Net(17, seed=6)
    x = net.conv(net.input(2, 3, 4, 4, batch="N"), 12)
    end(net, net.node("Relu", net.conv(x, 18, group=3, name="grouped", bias=False)))
    result = onnxfuse.compress(net.model(), ratio=0.5, method=method, only="grouped", provider="cpu")
    before, after = net.values["grouped_w"].reshape(3, 6, -1), initializers(result.model)["grouped_w"].reshape(3, 3, -1)
    coefficients = []
    for old, new in zip(before, after, strict=True):
        found, *_ = np.linalg.lstsq(old.T, new.T, rcond=None)
        np.testing.assert_allclose(old.T @ found, new.T, atol=1e-5)
        coefficients.append(found.round(3).tolist())
    assert len({str(found) for found in coefficients}) > 1


# Damage over sets -----------------------------------------------------------------------------------------------------


def reading(seed: int, sets: int, size: int, *, apart: bool) -> Reading:
    """Return what a reader of some sets sees of correlated Gaussian channels."""
    rng = np.random.default_rng(seed)
    samples = rng.normal(size=(600, sets * size)) @ rng.normal(size=(sets * size, sets * size))
    covariance = within_sets(np.cov(samples.T, bias=True), sets if apart else 1)
    halves = tuple(ObservedChannels(lambda z: np.maximum(z, 0.0), half) for half in np.split(samples, 2))
    weights = rng.normal(size=(sets * size, 3))
    means = samples.mean(axis=0)[:, None]
    return Reading(covariance, means, weights, channels=(halves[0], halves[1]), sets=sets if apart else 1)


@pytest.mark.parametrize("apart", [False, True])
@given(seed=st.integers(0, 99), sets=st.integers(2, 3), size=st.integers(2, 4))
def test_every_round_keeps_one_of_each_set(seed: int, sets: int, size: int, *, apart: bool) -> None:
    """After every round each set has as many channels, and the damage is that of this selection."""
    seen = reading(seed, sets, size, apart=apart)
    order, damage = greedy_order([seen], sets)
    assert sorted(order.tolist()) == list(range(sets * size))
    for kept in range(1, size + 1):
        chosen = order[: kept * sets]
        assert np.bincount(chosen // size, minlength=sets).tolist() == [kept] * sets
        wanted = selection_damage([seen], chosen)
        assert damage[kept * sets] == pytest.approx(wanted, rel=1e-4, abs=1e-6 * damage[0])


@given(st.integers(0, 99), st.integers(2, 4))
def test_sets_apart_are_as_if_each_were_alone(seed: int, size: int) -> None:
    """Where readers hear each set apart, each keeps the channels that it would keep alone, and damages add up."""
    seen = reading(seed, 3, size, apart=True)
    order, damage = greedy_order([seen], 3)
    parts = [seen.part(slice(start, start + size)) for start in range(0, 3 * size, size)]
    alone = [greedy_order([part]) for part in parts]
    for number, (own, _) in enumerate(alone):
        inside = order[order // size == number] - number * size
        assert inside.tolist() == own.tolist()
    np.testing.assert_allclose(damage[::3], sum(lost for _, lost in alone), atol=1e-8 * damage[0])


@given(st.integers(0, 99), st.integers(2, 4))
def test_damages_of_fused_sets_add_up(seed: int, size: int) -> None:
    """Where readers hear each set apart, J of fused channels is the sum of what each set alone would lose."""
    seen, rng = reading(seed, 3, size, apart=True), np.random.default_rng(seed)
    outputs = [rng.normal(size=(size - 1, size)) for _ in range(3)]
    parts = [seen.part(slice(start, start + size)) for start in range(0, 3 * size, size)]
    alone = sum(judged_map([part], output)[0] for part, output in zip(parts, outputs, strict=True))
    # The ridge is relative to the mean of all sets, or of one.
    assert judged_map([seen], block_diagonal(outputs))[0] == pytest.approx(alone, rel=1e-2)


@pytest.mark.parametrize(("name", "apart"), [("first", True), ("grouped", False)])
def test_what_stands_in_for_what_is_lost(name: str, *, apart: bool) -> None:
    """A grouped convolution gets nothing from channels of other groups; what reads all groups may."""
    net, _ = copies_in_groups(4)
    analysis, samples = analysis_of(net.model()), load_samples(net.feeds, GraphView(net.model()))
    judgement = judge_groups(analysis, [group_called(analysis, name)], samples, Provider.CPU, 0)[name]
    found = judgement.channel_map(2)
    assert (found.kept, found.is_selection) == (6, False)
    assert np.array_equal(found.input, within_sets(found.input, 3)) == apart
    assert len(judgement.damage) == group_called(analysis, name).channels + 1


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("apart", [False, True])
def test_candidates_mix_nothing_across_sets(name: str, *, apart: bool) -> None:
    """A fused channel is made of one set; and where readers hear each set apart, it stands in for no other."""
    seen = reading(1, 3, 4, apart=apart)
    selected = np.sort(greedy_order([seen], 3)[0][:6])
    member = MemberFeatures("reader", Role.CONSUMER, seen.weights)
    known = Known(ChannelFeatures(12, (member,)), (seen,), selected, 3)
    found = list(set_by_set(CANDIDATES[name])(known, np.random.default_rng(0)))
    assert found
    for output in found:
        assert output.shape == (6, 12)
        np.testing.assert_array_equal(output, within_sets(output, 3))
        fitted = judged_map([seen], output)[1]
        across = np.abs(fitted - within_sets(fitted, 3)).max()
        assert (across == 0.0) == apart


@pytest.mark.parametrize("apart", [False, True])
def test_the_choice_keeps_to_sets(*, apart: bool) -> None:
    """What is chosen in the end mixes nothing across sets either, and loses less than the selection by its own word."""
    seen = reading(2, 3, 6, apart=apart)
    selected = np.sort(greedy_order([seen], 3)[0][:6])
    member = MemberFeatures("reader", Role.CONSUMER, seen.weights)
    known = Known(ChannelFeatures(18, (member,)), (seen,), selected, 3)
    choice = best_candidate(known, list(CANDIDATES), np.random.default_rng(0))
    assert choice is not None
    output = choice.channel_map.output
    np.testing.assert_array_equal(output, within_sets(output, 3))
    losses = [judged_map([seen], one)[0] for one in (output, known.selection)]
    assert losses[0] < losses[1]
    assert choice.gain == pytest.approx(losses[0] / losses[1], rel=0.02)
