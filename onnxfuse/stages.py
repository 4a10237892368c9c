"""The stages of a compression between the analysis and the proof, each a function of what the one before it found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NoReturn, TypeAlias

import numpy as np
import onnx

from onnxfuse.analysis import Analysis, enough_samples
from onnxfuse.calibration.judge import Judgement
from onnxfuse.calibration.means import MeanShifts
from onnxfuse.config import CompressionConfig, Order
from onnxfuse.coupling.groups import CouplingGroup
from onnxfuse.coupling.layout import Atom
from onnxfuse.coupling.sets import sets_first
from onnxfuse.errors import OnnxFuseError, UnsupportedGraphError
from onnxfuse.fusion.candidates import Known
from onnxfuse.fusion.candidates.choice import best_candidate
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.fusion.methods import METHODS
from onnxfuse.fusion.rewrite import collect_edits, new_dims, new_sizes
from onnxfuse.fusion.weights import WeightState
from onnxfuse.graph.edits import apply_edits
from onnxfuse.graph.view import GraphView
from onnxfuse.planning.allocation import Choice, allocate
from onnxfuse.planning.costs import CostTable
from onnxfuse.planning.files import PlannedGroup
from onnxfuse.planning.nearest import NEAR_ENOUGH
from onnxfuse.planning.widths import GroupPlan, allowed_widths
from onnxfuse.proof.coupling import prove_coupling, watched_values
from onnxfuse.proof.random_samples import feeds_at_other_sizes
from onnxfuse.proof.samples import Samples
from onnxfuse.proof.scaling import scalable_groups
from onnxfuse.statistics.features import ActivationFeatures, ChannelFeatures
from onnxfuse.target import Target
from onnxfuse.transport import is_too_large

__all__ = [
    "Fused",
    "Judgements",
    "allocate_widths",
    "damage_of",
    "edited_model",
    "fuse_groups",
    "planned_group",
    "prove_groups",
    "refuse_budget",
    "unused_budget",
]

Judgements: TypeAlias = Mapping[str, Judgement]
FindMap: TypeAlias = Callable[[CouplingGroup, np.random.Generator], ChannelMap]


def prove_groups(
    analysis: Analysis, groups: Sequence[CouplingGroup], samples: Samples, config: CompressionConfig
) -> tuple[Analysis, str]:
    """Prove the coupling of some groups on the model itself.

    Returns:
        The analysis with the groups that failed frozen, and what a reader should know; empty if all is well.
    """

    def cycle(channels: int, rng: np.random.Generator) -> ChannelMap:
        # One random cycle moves every channel; a random permutation of a few may move none.
        order = rng.permutation(channels)
        return ChannelMap.permutation(np.roll(order, 1)[np.argsort(order)])

    def permutation(group: CouplingGroup, rng: np.random.Generator) -> ChannelMap:
        return ChannelMap.side_by_side([cycle(group.channels, rng) for _ in range(group.sets)])

    def scaling(group: CouplingGroup, rng: np.random.Generator) -> ChannelMap:
        # Powers of two, so that nothing is rounded, whatever the weights are stored in.
        return ChannelMap.scaling(2.0 ** rng.choice([-1, 1], group.sets * group.channels))

    def change(chosen: Sequence[CouplingGroup], find_map: FindMap) -> onnx.ModelProto:
        state = WeightState(analysis.graph, analysis.shapes, analysis.channels)
        rng = np.random.default_rng(config.seed)
        for group in sets_first(chosen, lambda group: group):
            state.fuse(group, find_map(group, rng))
        edits = collect_edits(analysis.graph, analysis.shapes, analysis.channels, state)
        return apply_edits(analysis.graph, edits, {})

    changes = {
        "permuting": (partial(change, find_map=permutation), groups),
        "scaling": (partial(change, find_map=scaling), scalable_groups(analysis.graph, analysis.channels, groups)),
    }
    watched = watched_values(analysis.graph, analysis.channels)
    few = samples.in_batches(enough_samples(analysis))
    feeds = few.sound_feeds()
    others = feeds_at_other_sizes(analysis.graph, analysis.input_dims, config.seed)
    proof = prove_coupling(analysis.graph.model, groups, changes, feeds, watched, config.provider, others)
    if proof.note:
        return analysis, f"the coupling was not proven on this model: {proof.note}"
    if not proof.refuted:
        return analysis, ""
    reasons = {name: f"the proof on this model failed: {problem}" for name, problem in proof.refuted.items()}
    frozen = tuple(replace(g, frozen=reasons.get(g.name, g.frozen)) for g in analysis.channels.groups)
    names = ", ".join(proof.refuted)
    note = f"a defect of onnxfuse, made harmless; please report it with the model: no proof for {names}"
    return replace(analysis, channels=replace(analysis.channels, groups=frozen)), note


def allocate_widths(
    analysis: Analysis, plans: Sequence[GroupPlan], judgements: Judgements, target: Target, config: CompressionConfig
) -> tuple[list[GroupPlan], str]:
    """Choose the widths that a budget allows; groups that nothing is known of keep theirs.

    Returns:
        The plans with these widths, and what a reader should know: that the budget can't be met, or not nearly used up;
        or nothing.

    Raises:
        UnsupportedGraphError: The network meets the budget as it is.
    """
    table = CostTable(analysis.graph, analysis.shapes, analysis.channels, target.measure, analysis.batch)
    total = table.total({})
    limit = target.limit(total)
    choices = [
        Choice(
            plan.group,
            judgements[plan.group.name].damage,
            allowed_widths(plan.group.channels, config, plan.group.multiple),
        )
        for plan in plans
        if plan.group.name in judgements and not plan.reason and not plan.is_fixed
    ]
    fixed = {plan.group.atom: plan.kept for plan in plans if plan.is_fixed}
    if total <= limit and not fixed:
        refuse_budget(target, total)
    widths = {**allocate(choices, table, limit, fixed), **fixed}
    cost, note = table.total(widths), ""
    if cost > limit:
        note = f"the target {target} can't be met: {cost:,.0f} {target.measure} of {total:,.0f} are the least"
    elif wider := [choice for choice in choices if widths[choice.group.atom] < choice.widths[0]]:
        multiple = f" in multiples of {config.round_to}" if config.round_to > 1 else ""
        price, name = min((_next_price(choice, table, widths), choice.group.name) for choice in wider)
        why = f"no widths{multiple} come nearer without half as much damage again; the next step of {name!r} alone is "
        why += f"{price:,.0f}"
        note = unused_budget(target, limit, cost, why)
    return [replace(plan, kept=widths.get(plan.group.atom, plan.group.channels)) for plan in plans], note


def _next_price(choice: Choice, table: CostTable, widths: Mapping[Atom, int]) -> float:
    """Return what the next width of a group costs more."""
    wider = choice.widths[choice.widths.index(widths[choice.group.atom]) - 1]
    return -table.saving(choice.group, wider, widths)


def unused_budget(target: Target, limit: float, cost: float, why: str) -> str:
    """Say that a budget is missed from below, and why; empty if it is used up but for a percent.

    Args:
        target: The budget.
        limit: What the network may cost.
        cost: What it costs.
        why: Why nothing is nearer.
    """
    if cost >= NEAR_ENOUGH * limit:
        return ""
    used = f"{cost:,.0f} {target.measure} of the {limit:,.0f} that it allows ({100 * cost / limit:.1f} %)"
    return f"the target {target} is met with {used}: {why}"


def damage_of(judgements: Judgements, plan: GroupPlan) -> float | None:
    """Return the relative damage J of the width that is planned for a group; None where no samples were looked at."""
    found = judgements.get(plan.group.name)
    return None if found is None else float(found.damage[plan.kept])


def refuse_budget(target: Target, total: float) -> NoReturn:
    """Refuse a budget that a network meets as it is.

    Raises:
        UnsupportedGraphError: Always.
    """
    what = f"there is nothing to do: the network has {total:,.0f} {target.measure}, and the target allows as many"
    raise UnsupportedGraphError(what, where=f"--target {target}", mend="give a smaller target")


def planned_group(judgements: Judgements, plan: GroupPlan) -> PlannedGroup:
    """Return a group as plan files have it."""
    return PlannedGroup(plan.group.channels, plan.kept, plan.reason or None, damage_of(judgements, plan))


@dataclass(frozen=True, eq=False)
class Fused:
    """The fused weights.

    Attributes:
        state: All of them.
        applied: The map that each group was fused with, in that order.
        methods: How each map was found, by the group's name.
        gains: By how much less the damage is than that of selected channels, where other ones have won: a factor.
    """

    state: WeightState
    applied: Sequence[tuple[CouplingGroup, ChannelMap]]
    methods: Mapping[str, str]
    gains: Mapping[str, float] = field(default_factory=dict)


def fuse_groups(
    analysis: Analysis,
    plans: Sequence[GroupPlan],
    judgements: Judgements,
    activations: Mapping[str, ActivationFeatures],
    config: CompressionConfig,
    progress: Callable[[int, int], None],
) -> Fused:
    """Fuse the groups one after the other, each on the weights that the groups before it have left.

    Args:
        analysis: The original.
        plans: How many channels each group keeps.
        judgements: What samples say of groups; with the method ``auto``, these decide.
        activations: What samples say of channels, by group, for importances that want to know.
        config: All options.
        progress: Called with the number of groups done, and of all.

    Raises:
        OnnxFuseError: A map could not be found; it says for which group.
    """
    applied: list[tuple[CouplingGroup, ChannelMap]] = []
    methods, gains = {}, {}
    state = WeightState(analysis.graph, analysis.shapes, analysis.channels)
    shifts = MeanShifts(analysis, state, applied)
    work = sorted((p for p in plans if p.kept < p.group.channels), key=lambda p: _last_producer(p.group))
    if config.order is Order.BACKWARD:
        work.reverse()
    work = sets_first(work, lambda p: p.group)
    for done, plan in enumerate(work):
        progress(done, len(work))
        rng = np.random.default_rng([config.seed, plans.index(plan)])
        try:
            methods[plan.group.name], channel_map, gains[plan.group.name] = _find_map(
                state, plan, judgements, activations.get(plan.group.name), config, rng
            )
            if config.is_auto and (judgement := judgements.get(plan.group.name)) is not None:
                shifts.apply(plan.group, judgement.readings, channel_map)
            state.fuse(plan.group, channel_map)
        except OnnxFuseError as error:
            error.where = error.where or f"group {plan.group.name!r}"
            raise
        applied.append((plan.group, channel_map))
    return Fused(state, applied, methods, gains)


def _find_map(
    state: WeightState,
    plan: GroupPlan,
    judgements: Judgements,
    activations: ActivationFeatures | None,
    config: CompressionConfig,
    rng: np.random.Generator,
) -> tuple[str, ChannelMap, float]:
    """Return a map, the name of what found it, and its damage in that of the selection."""
    if config.is_auto and plan.group.name in judgements:
        judgement = judgements[plan.group.name]
        if plan.group.unmixable:
            return "least-damage", judgement.selection(plan.kept), 1.0
        if plan.group.mirrored:
            return "least-damage", judgement.pair_map(plan.kept), 1.0
        choice = None
        if judgement.knows_channels:
            selected = judgement.selected(plan.kept)
            known = Known(state.features(plan.group), judgement.readings, selected, judgement.sets)
            choice = best_candidate(known, config.fusion.candidates or (), rng)
        if choice is not None:
            return choice.name, choice.channel_map, choice.gain
        return "least-damage", judgement.channel_map(plan.kept), 1.0
    name = "intra-fusion" if config.is_auto else config.method
    # Of heads, one of each cluster stays as it is, and is read for all of them: what their queries look for can't be
    # mixed, but what like heads say is the same.
    keeps_one = name == "fold" and plan.group.atom.parallel and bool(plan.group.unmixable)
    if (plan.group.unmixable and not keeps_one) or (plan.group.mirrored and name == "intra-fusion"):
        # Channels that may not be mixed are dropped instead, by the same importance; so are those of a product of two
        # sides, since sums of channels on both would be four times what two copies say.
        name = "prune"
    features = replace(state.features(plan.group), activations=activations).sets(plan.group.sets)
    maps = [METHODS[name](one, plan.kept, config.fusion, rng) for one in features]
    if keeps_one:
        maps = [found.of_anchors() for found in maps]
    return _told(name, features[0], plan.kept), ChannelMap.side_by_side(maps), 1.0


def _told(name: str, features: ChannelFeatures, kept: int) -> str:
    """Return what a report calls a method: it says where the group is too large for the plain one."""
    dimensions = sum(member.weights.shape[1] for member in features.members)
    if name == "intra-fusion" and kept < features.channels and is_too_large(features.channels, kept, dimensions):
        return f"{name}, nearest targets"
    return name


def _last_producer(group: CouplingGroup) -> int:
    return max(parameter.operand.node for parameter in group.producers)


def edited_model(analysis: Analysis, state: WeightState) -> tuple[onnx.ModelProto, Mapping[str, tuple[int, ...]]]:
    """Return the new model, and the shapes of its computed values."""
    edits = collect_edits(analysis.graph, analysis.shapes, analysis.channels, state)
    known = {**analysis.shapes.dims, **new_dims(analysis.channels, state)}
    if not edits:
        # As it was read, however its graph is written for the analysis.
        return apply_edits(GraphView(analysis.source.model), [], {}), known
    return apply_edits(analysis.graph, edits, new_sizes(analysis.channels, state)), known
