"""What comes before the first change: the model is read, run, analysed and proven, and every group gets its width."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnxfuse.analysis import Analysis, analyse, choose_samples, more_samples, takeable
from onnxfuse.analytic import analytic_readings, has_plausible_inputs
from onnxfuse.arrays import IntArray
from onnxfuse.bodies import Bodies, Commands, Spending, find_bodies, spend_in_bodies, with_shared_target
from onnxfuse.calibration.batches import in_larger_runs
from onnxfuse.calibration.few import supplement
from onnxfuse.calibration.judge import Judgement, judge_groups, judge_readings
from onnxfuse.calibration.synthetic import calibration_samples
from onnxfuse.config import CompressionConfig, flag_of
from onnxfuse.coupling.groups import CouplingGroup
from onnxfuse.errors import ConfigError, DataError, UnsupportedGraphError
from onnxfuse.fusion.candidates import DEFAULT_CANDIDATES
from onnxfuse.graph.bodies import has_bodies
from onnxfuse.graph.cost import stored_bytes
from onnxfuse.graph.files import SourceModel, read_model
from onnxfuse.graph.view import GraphView
from onnxfuse.importance import FROM_SAMPLES
from onnxfuse.planning.costs import CostTable
from onnxfuse.planning.files import Plan, PlannedGroup, apply_plan, read_plan
from onnxfuse.planning.widths import GroupPlan, plan_widths
from onnxfuse.proof.accuracy import split_labels
from onnxfuse.proof.samples import Samples, load_samples
from onnxfuse.refusals import refuse_nothing, refuse_overflow, refuse_overwriting
from onnxfuse.stages import allocate_widths, planned_group, prove_groups, refuse_budget, unused_budget
from onnxfuse.target import Measure, Target

__all__ = [
    "Clock",
    "DataSource",
    "Given",
    "ModelSource",
    "PlanSource",
    "Prepared",
    "Progress",
    "Task",
    "prepare",
    "read_given",
    "spending_of",
]

# The share of its cost that a graph is asked to keep at least, and how exactly that is found for a budget.
_LEAST_SHARE, _SHARE_STEP = 1e-3, 1e-4

# What is said where there are no data, how many groups a note names.
_UNLIKE_DATA = "no data, and the inputs are neither images, tokens nor sounds"
_GIVE_DATA = "give --calibration for better results"
_MOST_NAMES = 3

ModelSource: TypeAlias = str | os.PathLike[str] | onnx.ModelProto
DataSource: TypeAlias = str | os.PathLike[str] | Mapping[str, np.ndarray[Any, np.dtype[Any]]]
PlanSource: TypeAlias = str | os.PathLike[str] | Plan
Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with the name of a stage, how many of its steps are done, and how many there are."""


@dataclass
class Clock:
    """Wall time of each stage, and the progress display told of it.

    Attributes:
        progress: The display.
        seconds: By stage, those that have ended.
    """

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Time a stage; gives a function to call with how many of its steps are done, and how many there are."""
        start = time.perf_counter()
        self.progress(name, 0, 1)
        yield partial(self.progress, name)
        self.progress(name, 1, 1)
        self.seconds[name] = round(time.perf_counter() - start, 4)


@dataclass(frozen=True, eq=False)
class Given:
    """What there is to run a model on.

    Attributes:
        samples: The user's, or one synthetic run where there are none, or pictures that are read once shapes are known.
        labels: The right class of every sample, shape (samples,); None where it was not given.
        folder: A folder of pictures; None if the data are no such.
    """

    samples: Samples
    labels: IntArray | None
    folder: Path | None


@dataclass(frozen=True, eq=False)
class Task:
    """What is asked for.

    Attributes:
        model: The model.
        calibration: What to run it on; None for synthetic inputs.
        config: The options.
        plan: How many channels each group keeps; None to go by the options.
        target: Where the result goes; None to keep it in memory.
        is_part: Whether it is the body of another model, whose inputs are computed there.
    """

    model: ModelSource
    calibration: DataSource | None
    config: CompressionConfig
    plan: PlanSource | None = None
    target: Path | None = None
    is_part: bool = False


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything that is known before the first weight changes.

    Attributes:
        analysis: The model with its coupling groups; those without a proof are frozen.
        plans: How many channels each group keeps.
        judgements: What the readers of a group lose, by its name; those that samples were looked at for.
        samples: What it runs on from here on.
        runs: The same to choose and fit on: several at once, where the network can be made to take them.
        labels: The right class of every sample; None where it is not known.
        config: The options, as far as they can be followed.
        bodies: The bodies of If, Loop and Scan, as they were found.
        wanted: The plan to follow; None to go by the options.
        notes: What a reader should know; some are empty.
        is_blind: Whether the samples are mere random numbers, which choose and fit nothing.
        is_made_up: Whether the samples were made up, since there are no data.
    """

    analysis: Analysis
    plans: Sequence[GroupPlan]
    judgements: Mapping[str, Judgement]
    samples: Samples
    runs: Samples
    labels: IntArray | None
    config: CompressionConfig
    bodies: Bodies
    wanted: Plan | None
    notes: tuple[str, ...]
    is_blind: bool = False
    is_made_up: bool = False

    @property
    def bodies_config(self) -> CompressionConfig:
        """The options for bodies: where samples say nothing, what is computed from them says nothing either."""
        return replace(self.config, method="intra-fusion") if self.is_blind and self.config.is_auto else self.config

    def without_readings(self) -> "Prepared":
        """Return the same without what readers see of channels, which may be larger than the model."""
        return replace(self, judgements={name: replace(j, readings=()) for name, j in self.judgements.items()})


def read_given(source: SourceModel, graph: GraphView, data: DataSource | None, config: CompressionConfig) -> Given:
    """Read the data for a model, or find a synthetic run that it works with.

    Args:
        source: The model.
        graph: Its graph.
        data: An ``.npz`` file, arrays by input name, a folder of pictures, or None.
        config: Where to run, and the seed.

    Raises:
        DataError: The data can't be read or do not fit, or there are none and nothing synthetic was found either.
        RuntimeFailedError: ONNX Runtime can't run the model at all.
        UnsupportedGraphError: An input is of a type that can't be made up.
    """
    folder = _folder(data)
    origin = str(data) if isinstance(data, str | os.PathLike) else ""
    arrays, labels = split_labels(None if folder else data, graph)
    if arrays is not None:
        return Given(takeable(source, load_samples(arrays, graph, origin), config.provider), labels, folder)
    samples, problem = choose_samples(source, graph, config.provider, config.seed)
    if samples is None:
        what = f"no synthetic inputs were found that the model runs with: {problem}"
        mend = "give samples with --calibration FILE.npz (compress) or --data FILE.npz (validate)"
        raise DataError(what, where=source.name, mend=mend)
    return Given(samples, labels, folder)


def _folder(data: DataSource | None) -> Path | None:
    """Return the folder of pictures that samples are to be read from, if it is one."""
    if isinstance(data, str | os.PathLike):
        # A name that no file can have is refused where samples are read.
        with suppress(OSError):
            return Path(data) if Path(data).is_dir() else None
    return None


def prepare(task: Task, clock: Clock, commands: Commands, *, shares_budget: bool = False) -> Prepared:
    """Read, analyse and prove the original, and decide how many channels each group keeps.

    Args:
        task: What is asked for.
        clock: Told of every stage.
        commands: What to do with bodies.
        shares_budget: Whether it is the body of another model, whose budget is for both together.

    Raises:
        OnnxFuseError: One of its subclasses, as for `onnxfuse.compress`.
    """
    config = _with_candidates(task.config, has_data=task.calibration is not None)
    with clock.stage("load"):
        wanted = _wanted(task)
        source = read_model(task.model)
        refuse_overwriting(task.target, source.path, {"the calibration file": task.calibration, "the plan": task.plan})
        graph = GraphView(source.model)
        given = read_given(source, graph, task.calibration, config)
        if not task.is_part:
            given.samples.refuse_broken()
    notes = [given.samples.note]
    if wanted is not None and wanted.sha256 not in {"", source.sha256}:
        notes.append(f"the plan was made for another file, {wanted.model!r}, with the same groups")
    if task.config.fusion.candidates and not config.is_auto and not task.is_part:
        notes.append(f"--candidates has no effect: the method {config.method} takes none, only auto does")
    with clock.stage("couple"):
        analysis = analyse(source, graph, given.samples)
        bodies = find_bodies(analysis, given.samples, config, wanted, commands)
        config = with_shared_target(config, analysis, bodies)
        plans = _plans(analysis, bodies, config, wanted)
    if config.prove:
        with clock.stage("prove coupling"):
            analysis, note = _proven(analysis, plans, given.samples, config)
            plans = _plans(analysis, bodies, config, wanted)
            notes.append(note)
    free = [plan.group for plan in plans if not plan.reason]
    calibration, few = _with_enough(task, analysis, free, _calibration(task, analysis, given, config, clock), clock)
    samples, config = calibration.samples, calibration.config
    notes += [calibration.note, few]
    runs = calibration.runs or samples
    if calibration.runs is None and _is_calibrated(config) and not samples.divisible:
        with clock.stage("open batch"):
            runs = in_larger_runs(analysis, samples, config.provider)
    is_blind, is_made_up = calibration.is_blind, task.calibration is None
    worked_out = _worked_out(analysis, plans, config, clock) if is_blind else {}
    if is_blind and not calibration.note:
        notes.append(_told_by_moments(free, worked_out, config))
    # What no rule tells of is better cut by random numbers than not at all: a budget is to be met.
    is_observed = config.target or not is_blind
    observed = _judgements(analysis, plans, runs, config, clock, is_made_up=is_made_up) if is_observed else {}
    judgements = {**observed, **worked_out}
    if not is_made_up and not is_blind and not task.is_part:
        refuse_overflow(analysis, free, judgements, samples, config)
    found = Prepared(analysis, plans, judgements, samples, runs, given.labels, config, bodies, wanted, tuple(notes))
    found = replace(found, is_blind=is_blind, is_made_up=is_made_up)
    if config.target and not shares_budget:
        with clock.stage("allocate"):
            found = _together(found, commands) if has_bodies(graph) else _alone(found)
            refuse_nothing(analysis, found.plans, bodies, config)
    return replace(found, judgements=worked_out) if is_blind and not shares_budget else found


def _proven(
    analysis: Analysis, plans: Sequence[GroupPlan], samples: Samples, config: CompressionConfig
) -> tuple[Analysis, str]:
    """Prove the coupling of the groups that may change; return the analysis with what failed frozen, and a note."""
    changing = [plan.group for plan in plans if config.target or plan.kept < plan.group.channels]
    free = [group for group in changing if not group.frozen and group.channels > 1]
    return prove_groups(analysis, free, samples, config)


def _alone(prepared: Prepared) -> Prepared:
    """Choose the widths that a budget allows."""
    analysis, config, target = prepared.analysis, prepared.config, Target.parse(prepared.config.target)
    plans, note = allocate_widths(analysis, prepared.plans, prepared.judgements, target, config)
    return replace(prepared, plans=plans, notes=(*prepared.notes, note))


def _own_widths(prepared: Prepared, target: Target) -> list[GroupPlan]:
    """Choose widths by a budget for the main graph alone; one that meets it as it is keeps its own."""
    try:
        return allocate_widths(prepared.analysis, prepared.plans, prepared.judgements, target, prepared.config)[0]
    except UnsupportedGraphError:
        return [p if p.is_fixed else replace(p, kept=p.group.channels) for p in prepared.plans]


def spending_of(prepared: Prepared, commands: Commands) -> Spending:
    """Return what a model costs under any budget.

    Args:
        prepared: The model, prepared with a budget.
        commands: What to do with bodies.
    """
    analysis, config, bodies = prepared.analysis, prepared.config, prepared.bodies
    measure = Target.parse(config.target).measure
    table = CostTable(analysis.graph, analysis.shapes, analysis.channels, measure)

    def own(share: float) -> tuple[dict[str, PlannedGroup], float]:
        plans = _own_widths(prepared, Target(measure, share))
        groups = {p.group.name: planned_group(prepared.judgements, p) for p in plans}
        return groups, table.total({p.group.atom: p.kept for p in plans})

    inside = tuple(spend_in_bodies(analysis, prepared.samples, config, commands)) if bodies.may_change else ()
    return Spending(cache(own), inside)


def _together(prepared: Prepared, commands: Commands) -> Prepared:
    """Choose widths in a model and its bodies such that all of it meets the budget."""
    spending, analysis, bodies = spending_of(prepared, commands), prepared.analysis, prepared.bodies
    target = Target.parse(prepared.config.target)
    before = spending.cost(1.0, target.measure)
    whole = {
        Measure.MACS: analysis.cost.macs,
        Measure.PARAMS: analysis.cost.parameters,
        Measure.BYTES: stored_bytes(analysis.graph, analysis.shapes),
    }[target.measure]
    # What no graph accounts for by itself, such as a body that can't be cut out, less what several do.
    rest = whole - before
    limit = target.limit(whole) - rest
    if before <= limit and not any(plan.is_fixed for plan in prepared.plans):
        refuse_budget(target, whole)
    low, high, note = _LEAST_SHARE, 1.0, ""
    least = spending.cost(low, target.measure)
    if least > limit:
        note = f"the target {target} can't be met: {least + rest:,.0f} {target.measure} of {whole:,.0f} are the least"
        high = low
    while high - low > _SHARE_STEP:
        middle = (low + high) / 2
        low, high = (middle, high) if spending.cost(middle, target.measure) <= limit else (low, middle)
    if not note:
        why = "every graph in the file keeps the same share, and none comes nearer"
        note = unused_budget(target, limit + rest, spending.cost(low, target.measure) + rest, why)
    source, inside = analysis.source, [group.name for group in bodies.groups]
    wanted = Plan(source.name, source.sha256, spending.groups(low), prepared.config.to_dict())
    plans = apply_plan(wanted.without(inside), prepared.plans)
    return replace(prepared, plans=plans, wanted=wanted, notes=(*prepared.notes, note))


def _wanted(task: Task) -> Plan | None:
    """Read the plan, if there is one, and refuse options beside it that say something else of widths.

    The body of another model gets its part of the plan beside the options that this was made with.
    """
    if task.plan is None:
        return None
    config, usual = task.config, CompressionConfig()
    names = ("ratio", "target", "keep", "min_channels", "round_to")
    given = [name for name in names if getattr(config, name) != getattr(usual, name)]
    if given and not task.is_part:
        what = "a plan is given beside other options that say how many channels stay"
        mend = "leave one or the other out; widths can be edited in the plan, or made anew by the command plan"
        raise ConfigError(what, where=", ".join(["--plan", *(flag_of(name) for name in given)]), mend=mend)
    return read_plan(task.plan)


def _plans(analysis: Analysis, bodies: Bodies, config: CompressionConfig, wanted: Plan | None) -> list[GroupPlan]:
    """Plan the widths, and refuse a run that would change nothing."""
    inside = [group.name for group in bodies.groups]
    plans = plan_widths(analysis.channels.groups, config, inside)
    if wanted is not None:
        plans = apply_plan(wanted.without(inside), plans)
    refuse_nothing(analysis, plans, bodies, config)
    return plans


def _is_calibrated(config: CompressionConfig) -> bool:
    """Whether anything is chosen or fitted on samples."""
    return config.is_auto or config.refits or bool(config.target) or config.fusion.importance in FROM_SAMPLES


@dataclass(frozen=True, eq=False)
class _Calibration:
    """Samples to choose and fit on.

    Attributes:
        samples: The samples.
        config: The options, as far as the samples are good for them.
        note: What a reader should know; empty if there is nothing.
        runs: The samples, several at once if the network can be made to take them; None where that is not known yet.
        is_blind: Whether they are mere random numbers, so that moments are worked out instead of observed.
    """

    samples: Samples
    config: CompressionConfig
    note: str = ""
    runs: Samples | None = None
    is_blind: bool = False


def _calibration(task: Task, analysis: Analysis, given: Given, config: CompressionConfig, clock: Clock) -> _Calibration:
    """Return the user's samples, or make some up."""
    if given.folder is not None:
        with clock.stage("read pictures"):
            pictures = calibration_samples(analysis, given.samples, config, given.folder)
            return _Calibration(pictures.samples, config, pictures.note)
    if task.calibration is None:
        with clock.stage("synthesise"):
            return _made_up(analysis, given.samples, config)
    return _Calibration(given.samples, config)


def _with_enough(
    task: Task, analysis: Analysis, free: Sequence[CouplingGroup], found: _Calibration, clock: Clock
) -> tuple[_Calibration, str]:
    """Return what the user gave, with images made up beside it where it is too little to choose and fit on; a note."""
    config = found.config
    if task.calibration is None or task.is_part or not (config.is_auto or config.refits or config.target):
        return found, ""
    # An importance may go by labels, which nobody has for what is made up.
    if config.fusion.importance in FROM_SAMPLES:
        return found, ""
    with clock.stage("count samples"):
        more = supplement(analysis, free, found.samples, config)
    return replace(found, runs=more.runs or found.runs), more.note


def _with_candidates(config: CompressionConfig, *, has_data: bool) -> CompressionConfig:
    """Return the options with what proposes fused channels, where nothing was said about it."""
    if config.fusion.candidates is not None:
        return config
    names = () if has_data and config.refits and config.effort > 0 else DEFAULT_CANDIDATES
    return replace(config, fusion=replace(config.fusion, candidates=names))


def _made_up(analysis: Analysis, samples: Samples, config: CompressionConfig) -> _Calibration:
    """Return samples for a run without data."""
    if not _is_calibrated(config):
        return _Calibration(more_samples(analysis, samples, config.seed), config)
    synthetic = calibration_samples(analysis, samples, config)
    if synthetic.is_like_data:
        note = f"no data: chosen and fitted on {synthetic.samples.origin}"
        return _Calibration(synthetic.samples, config, note, synthetic.runs)
    if config.fusion.importance in FROM_SAMPLES:
        what = (
            f"there are no samples for the importance {config.fusion.importance!r}, and the inputs are neither images, "
        )
        what += "tokens nor sounds that could be made up"
        mend = "give samples with --calibration, or choose an importance that looks at weights alone, such as l1"
        raise DataError(what, where="--importance", mend=mend)
    if not has_plausible_inputs(analysis):
        if config.is_auto:
            config = replace(config, method="intra-fusion", refit=False)
        told = "what inputs the first layer expects can't be told from it, so the weights alone decide (intra-fusion)"
        note = f"{_UNLIKE_DATA}: {told}; {_GIVE_DATA}"
        return _Calibration(synthetic.samples, config, note, is_blind=bool(config.target))
    # What the moments are good for is told once they are worked out.
    return _Calibration(synthetic.samples, replace(config, refit=False) if config.is_auto else config, is_blind=True)


def _told_by_moments(free: Sequence[CouplingGroup], known: Mapping[str, Judgement], config: CompressionConfig) -> str:
    """Say what moments decide where there are no data, and what they can't: some operators have no rule."""
    what = "what is kept is chosen" if config.is_auto else "how much each group keeps is chosen"
    if not (config.is_auto or config.target):
        return f"{_UNLIKE_DATA}: layers are fitted on random numbers; {_GIVE_DATA}"
    told = f"{what} by moments worked out for random numbers as large as the first layer expects"
    unknown = [group.name for group in free if group.name not in known and group.channels > 1]
    if unknown:
        others = "by random numbers" if not config.is_auto else "by the weights alone (intra-fusion)"
        others += ", how many channels by random numbers" if config.is_auto and config.target else ""
        named = ", ".join(map(repr, unknown[:_MOST_NAMES])) + (" and others" if len(unknown) > _MOST_NAMES else "")
        told = f"{told}, except for {len(unknown)} of {len(free)} groups ({named}), of which no rule tells moments: "
        told = told if len(unknown) < len(free) else f"no rule tells moments of any group ({named}), so {what} "
        told += others
    return f"{_UNLIKE_DATA}: {told}; {_GIVE_DATA}"


def _worked_out(
    analysis: Analysis, plans: Sequence[GroupPlan], config: CompressionConfig, clock: Clock
) -> Mapping[str, Judgement]:
    """Work out what the readers of each group lose, where anything is chosen by that and rules tell it."""
    if not (config.is_auto or config.target):
        return {}
    with clock.stage("work out"):
        free = [plan.group for plan in plans if not plan.reason]
        return judge_readings(free, analytic_readings(analysis, free, config.seed))


def _judgements(
    analysis: Analysis,
    plans: Sequence[GroupPlan],
    samples: Samples,
    config: CompressionConfig,
    clock: Clock,
    *,
    is_made_up: bool,
) -> Mapping[str, Judgement]:
    """Observe what the readers of each group lose, where anything is chosen by that."""
    if not (config.is_auto or config.target):
        return {}
    with clock.stage("observe"):
        free = [plan.group for plan in plans if not plan.reason]
        return judge_groups(analysis, free, samples, config.provider, config.seed, is_made_up=is_made_up)
