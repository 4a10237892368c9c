"""Budgets: targets as users write them, costs of planned widths, and the choice of widths."""

import math
import re
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import onnxfuse
from onnxfuse.analysis import Analysis
from onnxfuse.config import CompressionConfig
from onnxfuse.errors import ConfigError, UnsupportedGraphError
from onnxfuse.planning.allocation import Choice, allocate, lower_hull
from onnxfuse.planning.costs import CostTable
from onnxfuse.planning.widths import allowed_widths
from onnxfuse.target import Measure, Target
from tests.builders import AnyArray, Net
from tests.laws import analysis_of


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("macs=0.5", 500.0),
        ("params=40%", 400.0),
        ("bytes=2k", 2000.0),
        ("macs=0.3M", 300_000.0),
        ("macs=300", 300.0),
        ("macs=0.0505k", 50.5),
        ("params=1234567", 1_234_567.0),
    ],
)
def test_targets_are_read_as_written(text: str, limit: float) -> None:
    """A share or an amount, with a unit; what is printed is read again."""
    target = Target.parse(text)
    assert target.limit(1000.0) == pytest.approx(limit)
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize("text", ["", "macs", "macs=", "flops=0.5", "macs=0", "macs=-1", "macs=200%", "macs=1T", "0.5"])
def test_other_targets_are_refused(text: str) -> None:
    """Anything else is refused with the forms that there are."""
    with pytest.raises(ConfigError, match="the target is") as caught:
        Target.parse(text)
    assert (caught.value.where, "macs=0.5" in (caught.value.mend or "")) == ("--target", True)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5])
def test_a_ratio_and_a_target_exclude_each_other(ratio: float) -> None:
    """A ratio and a target exclude each other, the usual ratio too if it is given."""
    with pytest.raises(ConfigError, match="both a ratio and a target"):
        CompressionConfig(ratio=ratio, target="macs=0.5")
    assert CompressionConfig(target="macs=0.5").to_dict()["ratio"] is None


@pytest.mark.parametrize("text", ["macs=1.5", "params=50", "bytes=99", "macs=300.5", "macs=1.01"])
def test_numbers_that_are_neither_a_share_nor_an_amount_are_refused(text: str) -> None:
    """Just above 1 is no share, and no network has so few; of such slips the message says what a share is."""
    with pytest.raises(ConfigError, match=f"the target is {text!r}, (which is no share|and macs are whole)") as caught:
        Target.parse(text)
    assert (caught.value.mend or "").startswith("a share is above 0 and at most 1; write macs=0.5")


@given(st.integers(1, 300), st.integers(1, 16), st.integers(1, 20), st.sampled_from([1, 2, 8]))
def test_allowed_widths_fall_from_all_to_the_least(channels: int, round_to: int, least: int, multiple: int) -> None:
    """Widths fall from C on, are multiples as asked for and not below the least; none of these is left out."""
    widths = allowed_widths(channels, CompressionConfig(round_to=round_to, min_channels=least), multiple)
    assert widths[0] == channels
    assert list(widths) == sorted(set(widths), reverse=True)
    assert all(width % round_to == width % multiple == 0 and width >= least for width in widths[1:])
    unit = math.lcm(round_to, multiple)
    assert len(widths) == 1 + sum(width >= max(least, unit) for width in range(unit, channels, unit))


@given(st.lists(st.floats(0, 10), min_size=2, max_size=9))
def test_a_hull_is_convex_and_below(values: list[float]) -> None:
    """The hull is nowhere above the damage, meets it at both ends, and is convex."""
    damage = np.array(sorted(values, reverse=True))
    widths = np.arange(len(damage))[::-1]
    hull = lower_hull(widths, damage)
    assert np.all(hull <= damage[widths] + 1e-9)
    assert (hull[0], hull[-1]) == pytest.approx((damage[-1], damage[0]))
    assert np.all(np.diff(hull, 2) >= -1e-9)


def network() -> onnx.ModelProto:
    """Two hidden layers of different cost behind each other, and a third beside them."""
    net = Net(17, seed=1)
    x = net.input(1, 3, 8, 8, batch="n")
    h = net.node("Relu", net.conv(x, 6, name="first", pads=[1, 1, 1, 1]))
    h = net.node("Relu", net.conv(h, 8, name="second", strides=[2, 2]))
    net.output(net.gemm(net.node("Flatten", h), 3, name="last", transB=1))
    return net.model()


@pytest.mark.parametrize("measure", list(Measure))
def test_predicted_costs_are_those_of_the_written_file(measure: Measure) -> None:
    """What a table predicts for widths is what the compressed network costs."""
    model = network()
    analysis = analysis_of(model)
    table = CostTable(analysis.graph, analysis.shapes, analysis.channels, measure, analysis.batch)
    first, second = (g for g in analysis.channels.groups if not g.frozen)
    widths = {first.atom: 3, second.atom: 4}
    made = onnxfuse.compress(model, ratio=0.5, method="prune", provider="cpu")
    attribute = {Measure.MACS: "macs", Measure.PARAMS: "parameters"}.get(measure)
    if attribute is not None:
        assert table.total({}) == getattr(made.report.before, attribute)
        assert table.total(widths) == getattr(made.report.after, attribute)
    else:
        assert table.total(widths) == 4 * made.report.after.parameters
    one_by_one = table.saving(first, 3, {}) + table.saving(second, 4, {first.atom: 3})
    assert table.total({}) - table.total(widths) == pytest.approx(one_by_one)
    assert table.neighbours(first, [first, second]) == [0, 1]


def put_together(directions: int, units: int) -> onnx.ModelProto:
    """Write a recurrent network with its gates stored in another order, so that the graph puts the weights together."""
    net = Net(17, seed=3)
    x = net.matmul(net.input(4, 2, 6), 9, name="first")

    def gates(inner: int) -> str:
        found = []
        for _ in range(directions):
            stored = net.weight(4 * units, inner, fan_in=inner)
            parts = [net.slice(stored, [i * units], [(i + 1) * units], [0]) for i in (0, 3, 1, 2)]
            found.append(net.unsqueeze(net.node("Concat", *parts, axis=0), [0]))
        return found[0] if directions == 1 else net.node("Concat", *found, axis=0)

    way = {"direction": "bidirectional"} if directions > 1 else {}
    y = net.many("LSTM", [x, gates(9), gates(units)], 3, hidden_size=units, name="recurrent", **way)[0]
    y = net.reshape(net.node("Transpose", y, perm=[0, 2, 1, 3]), 4, 2, -1)
    net.output(net.matmul(y, 3))
    return net.model()


@pytest.mark.parametrize("units", [8, 40])
@pytest.mark.parametrize("directions", [1, 2])
def test_weights_that_the_graph_puts_together_count(directions: int, units: int) -> None:
    """They cost what they have, large or small, before and at any width, and the share of them that may go is told."""
    model = put_together(directions, units)
    analysis = analysis_of(model)
    free = [group for group in analysis.channels.groups if not group.frozen]
    assert [group.name for group in free] == ["first", "recurrent"]
    made = onnxfuse.compress(model, ratio=0.5, method="prune", provider="cpu").report
    widths = {group.atom: made.groups[i].channels_after for i, group in enumerate(free)}
    for measure, name in ((Measure.MACS, "macs"), (Measure.PARAMS, "parameters")):
        table = CostTable(analysis.graph, analysis.shapes, analysis.channels, measure, analysis.batch)
        assert table.total({}) == getattr(made.before, name)
        assert table.total(widths) == getattr(made.after, name)
        one_by_one = table.saving(free[0], widths[free[0].atom], {})
        one_by_one += table.saving(free[1], widths[free[1].atom], {free[0].atom: widths[free[0].atom]})
        assert table.total({}) - table.total(widths) == pytest.approx(one_by_one)
    assert onnxfuse.inspect(model).compressible_share == pytest.approx(1.0, abs=0.01)


@given(st.integers(0, 30), st.floats(0.1, 1.0))
@example(2, 0.2578125)
def test_a_greedy_allocation_is_near_the_best_of_all(seed: int, share: float) -> None:
    """The budget holds, and no choice of widths that is cheaper does much less damage (brute force)."""
    analysis = analysis_of(network())
    table = CostTable(analysis.graph, analysis.shapes, analysis.channels, Measure.MACS, analysis.batch)
    rng = np.random.default_rng(seed)
    choices = []
    for group in (g for g in analysis.channels.groups if not g.frozen):
        steps = np.sort(rng.random(group.channels))[::-1]
        damage = np.concatenate([np.cumsum(steps[::-1])[::-1], [0.0]])
        choices.append(Choice(group, damage, tuple(range(group.channels, 0, -1))))
    limit = share * table.total({})
    widths = allocate(choices, table, limit)

    def total(chosen: tuple[int, ...]) -> float:
        return float(sum(c.damage[w] for c, w in zip(choices, chosen, strict=True)))

    everything = list(product(*(c.widths for c in choices)))
    atoms = [c.group.atom for c in choices]
    fitting = [w for w in everything if table.total(dict(zip(atoms, w, strict=True))) <= limit]
    if not fitting:
        assert list(widths.values()) == [c.widths[-1] for c in choices]
        return
    cost, lost = table.total(widths), total(tuple(widths.values()))
    assert cost <= limit
    near = [w for w in fitting if table.total(dict(zip(atoms, w, strict=True))) >= 0.99 * limit]
    # A budget is hit, if at all possible, unless that does more damage than to miss it.
    assert cost >= 0.99 * limit or all(total(w) > lost for w in near)
    best = min(map(total, fitting))
    assert total(tuple(widths.values())) <= best + max(c.damage[0] for c in choices) * 0.5 + 1e-9
    assert total(tuple(widths.values())) < inf


def feeds(count: int = 64) -> dict[str, AnyArray]:
    """Samples for `network`."""
    return {"x0": np.random.default_rng(0).normal(size=(count, 3, 8, 8)).astype(np.float32)}


def choices_of(analysis: Analysis, round_to: int) -> list[Choice]:
    """Return the groups of a network that may change, with made-up convex damages."""
    rng, config = np.random.default_rng(5), CompressionConfig(round_to=round_to)
    found = []
    for group in (g for g in analysis.channels.groups if not g.frozen):
        steps = np.sort(rng.exponential(size=group.channels))[::-1] / group.channels
        damage = np.concatenate([np.cumsum(steps[::-1])[::-1], [0.0]])
        found.append(Choice(group, damage, allowed_widths(group.channels, config, group.multiple)))
    return found


@pytest.mark.parametrize("measure", list(Measure))
@pytest.mark.parametrize("round_to", [1, 8])
def test_budgets_are_hit_and_smaller_ones_never_keep_more(round_to: int, measure: Measure, digits: Path) -> None:
    """Any budget is used up but for a percent where single channels may go; costs never rise as it falls."""
    analysis = analysis_of(onnx.load(digits))
    table = CostTable(analysis.graph, analysis.shapes, analysis.channels, measure, analysis.batch)
    choices = choices_of(analysis, round_to)
    whole = table.total({})
    limits = [share * whole for share in np.arange(0.995, 0.2, -0.0125)]
    made = [allocate(choices, table, limit) for limit in limits]
    costs = [table.total(widths) for widths in made]
    assert made == [allocate(choices, table, limit) for limit in limits]
    assert costs == sorted(costs, reverse=True)
    assert all(cost <= limit for cost, limit in zip(costs, limits, strict=True))
    if round_to == 1:
        assert all(cost >= 0.99 * limit for cost, limit in zip(costs, limits, strict=True))
    assert all(widths[c.group.atom] in c.widths for widths in made for c in choices)


@pytest.mark.parametrize("channels", [200, 1024])
def test_a_wide_group_may_have_any_width(channels: int) -> None:
    """A budget for a single group is hit to the channel, however many it has."""
    net = Net(17, seed=1)
    hidden = net.node("Relu", net.gemm(net.input(1, 16, batch="n"), channels, name="wide", transB=1))
    net.output(net.gemm(hidden, 16, name="last", transB=1))
    analysis = analysis_of(net.model())
    table = CostTable(analysis.graph, analysis.shapes, analysis.channels, Measure.MACS, analysis.batch)
    choices = choices_of(analysis, 1)
    for share in (0.9, 0.5, 1 / 3, 0.1):
        widths = allocate(choices, table, share * table.total({}))
        assert widths[choices[0].group.atom] == math.floor(share * channels + 1e-9)


def test_a_budget_that_is_missed_is_told(digits: Path) -> None:
    """Where only multiples are allowed that come near no budget, a note says what is used and why."""
    options: dict[str, Any] = {"prove": False, "provider": "cpu", "effort": 0, "refit": False}
    hit = onnxfuse.compress(digits, target="params=20k", **options).report
    assert 19_800 <= hit.after.parameters <= 20_000
    assert not [note for note in hit.notes if note.startswith("the target")]
    missed = onnxfuse.compress(digits, target="params=0.95", round_to=8, scope="hidden", **options).report
    (note,) = (note for note in missed.notes if note.startswith("the target"))
    assert missed.after.parameters < 0.99 * 0.95 * missed.before.parameters
    told = re.match(
        r"the target params=0\.95 is met with ([0-9,]+) params of the ([0-9,]+) that it allows \(([0-9.]+) %\)", note
    )
    assert told is not None
    used, allowed = (int(number.replace(",", "")) for number in told.groups()[:2])
    assert (used // 1000, allowed // 1000) == (33, 36)
    assert used < 0.99 * allowed
    assert float(told[3]) == pytest.approx(100 * used / allowed, abs=0.06)
    assert "no widths in multiples of 8 come nearer" in note
    named = onnxfuse.compress(digits, target="macs=0.99", keep="/block?/*=4", **options).report
    assert not [note for note in named.notes if note.startswith("the target")]


@pytest.mark.parametrize(("channels", "round_to"), [(24, 8), (16, 4), (3, 1), (2, 1), (5, 1)])
@pytest.mark.parametrize("share", [0.34, 0.5, 0.9])
def test_a_group_with_few_widths_gets_the_widest_that_a_budget_allows(
    channels: int, round_to: int, share: float
) -> None:
    """Where a network has hardly any widths to choose from, the widest one within the budget is taken."""
    net = Net(17, seed=1)
    hidden = net.node("Relu", net.gemm(net.input(1, 6, batch="n"), channels, name="wide", transB=1))
    net.output(net.gemm(hidden, 3, name="last", transB=1))
    analysis = analysis_of(net.model())
    table = CostTable(analysis.graph, analysis.shapes, analysis.channels, Measure.MACS, analysis.batch)
    (choice,) = choices_of(analysis, round_to)
    widths = allocate([choice], table, share * table.total({}))
    within = [width for width in choice.widths if width <= share * channels]
    assert widths[choice.group.atom] == max(within, default=choice.widths[-1])


def test_a_budget_may_take_what_the_usual_ratio_would_not() -> None:
    """Of 16 channels 8 may stay in multiples of 8, though the usual ratio's 11 would be rounded to all of them."""
    net = Net(17, seed=1)
    hidden = net.node("Relu", net.gemm(net.input(1, 6, batch="n"), 16, name="wide", transB=1))
    net.output(net.gemm(hidden, 3, name="last", transB=1))
    options: dict[str, Any] = {"target": "macs=0.5", "prove": False, "provider": "cpu", "effort": 0}
    wishes: list[dict[str, Any]] = [{"round_to": 8}, {"min_channels": 8}, {"round_to": 4, "min_channels": 7}]
    for least in wishes:
        report = onnxfuse.compress(net.model(), **least, **options).report
        assert {g.name: g.channels_after for g in report.groups}["wide"] == 8
    with pytest.raises(UnsupportedGraphError) as caught:
        onnxfuse.compress(net.model(), round_to=16, **options)
    assert str(caught.value.mend).endswith("lower --round-to, which is 16")


def test_a_smaller_budget_keeps_less() -> None:
    """Cost falls with the budget and is within it; a multiple is kept where it is asked for."""
    made = [
        onnxfuse.compress(network(), target=f"macs={share}", calibration=feeds(), prove=False, provider="cpu")
        for share in (0.8, 0.5, 0.3)
    ]
    costs = [m.report.after.macs / m.report.before.macs for m in made]
    assert costs == sorted(costs, reverse=True)
    assert all(0 < cost <= share for cost, share in zip(costs, (0.8, 0.5, 0.3), strict=True))
    rounded = onnxfuse.compress(
        network(), target="macs=0.6", round_to=2, calibration=feeds(), prove=False, provider="cpu"
    )
    assert all(g.channels_after % 2 == 0 for g in rounded.report.groups if not g.frozen)


@pytest.mark.parametrize("target", ["macs=300M", "macs=1", "params=100%", "bytes=1G"])
def test_a_target_that_is_met_already(digits: Path, target: str) -> None:
    """A target that is met already leaves nothing to do, and the message says that rather than blame the groups."""
    with pytest.raises(UnsupportedGraphError) as caught:
        onnxfuse.compress(digits, target=target, method="prune", prove=False, provider="cpu")
    assert re.match(r"there is nothing to do: the network has [\d,]+ (macs|params|bytes), and the", caught.value.what)
    assert caught.value.mend == "give a smaller target"


def test_a_target_that_is_met_already_does_not_forbid_other_wishes(digits: Path) -> None:
    """A target that is met already does not forbid widths that are asked for by name."""
    options: dict[str, Any] = {"method": "prune", "prove": False, "provider": "cpu"}
    report = onnxfuse.compress(digits, target="macs=300M", keep="/block1/*=12", **options).report
    assert {g.name for g in report.groups if g.channels_after < g.channels_before} == {"/block1/conv1/Conv"}


def test_a_target_out_of_reach_is_said_to_be_missed(digits: Path) -> None:
    """A target out of reach gives the least that there is, and a note; one within reach gives no note."""
    options: dict[str, Any] = {"method": "prune", "prove": False, "provider": "cpu"}
    missed = onnxfuse.compress(digits, target="macs=0.0001", **options).report
    assert [n for n in missed.notes if n.startswith("the target macs=0.0001 can't be met: ")]
    assert all(g.channels_after == 1 for g in missed.groups if not g.frozen)
    met = onnxfuse.compress(digits, target="macs=0.5", **options).report
    assert met.after.macs <= 0.5 * met.before.macs
    assert not [n for n in met.notes if "can't be met" in n]
