"""The commands: inspect a model, plan, compress it, validate a result. Data flows one way, stage by stage."""

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnxfuse.analysis import (
    Analysis,
    analyse,
    choose_samples,
    compressible_share,
    cost_of,
    group_parameters,
    more_samples,
)
from onnxfuse.arrays import IntArray
from onnxfuse.bodies import (
    Bodies,
    compress_bodies,
    find_bodies,
    inspect_bodies,
    plan_bodies,
    with_bodies,
    with_shared_target,
)
from onnxfuse.calibration.activations import observe_activations
from onnxfuse.calibration.judge import Judgement, judge_groups
from onnxfuse.calibration.reconstruct import Reconstruction, reconstruct_network
from onnxfuse.calibration.refit import Refit, refit_network
from onnxfuse.calibration.synthetic import calibration_samples
from onnxfuse.config import DEFAULT_RATIO, CompressionConfig, Provider
from onnxfuse.errors import ConfigError, DataError, OutputError, RuntimeFailedError, UnsupportedGraphError
from onnxfuse.gradient import choose_loss
from onnxfuse.graph.files import SourceModel, check_output_path, read_model, staged, write_model
from onnxfuse.graph.view import GraphView
from onnxfuse.importance import FROM_SAMPLES
from onnxfuse.planning.files import Plan, PlannedGroup, apply_plan, read_plan
from onnxfuse.planning.widths import GroupPlan, plan_widths
from onnxfuse.proof.accuracy import measure_accuracy, split_labels
from onnxfuse.proof.checker import check_structure
from onnxfuse.proof.drift import measure_drift
from onnxfuse.proof.runtime import Session
from onnxfuse.proof.samples import Samples, load_samples
from onnxfuse.report import (
    CompressionReport,
    GroupReport,
    InspectReport,
    ModelCost,
    ValidationReport,
    metadata_of,
    versions,
)
from onnxfuse.stages import Fused, allocate_widths, edited_model, fuse_groups, prove_groups
from onnxfuse.statistics.features import ActivationFeatures
from onnxfuse.target import Target

__all__ = ["Compressed", "compress", "inspect", "plan", "validate"]

ModelSource: TypeAlias = str | os.PathLike[str] | onnx.ModelProto
DataSource: TypeAlias = str | os.PathLike[str] | Mapping[str, np.ndarray[Any, np.dtype[Any]]]
Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with the name of a stage, how many of its steps are done, and how many there are."""

# How many reasons an error message names, and how many characters of each.
_MOST_REASONS = 3
_LONGEST_REASON = 120


def _silent(_stage: str, _done: int, _total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Compressed:
    """The result of `compress`.

    Attributes:
        model: The compressed model, proven.
        report: What was done.
    """

    model: onnx.ModelProto
    report: CompressionReport

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the model; nothing is left behind if that fails.

        Raises:
            OutputError: The path can't be written.
        """
        target = check_output_path(path)
        with staged(target) as temporary:
            write_model(self.model, temporary)
        return target


def inspect(
    model: ModelSource, *, prove: bool = True, provider: Provider | str = Provider.CPU, seed: int = 0
) -> InspectReport:
    """Find the coupling groups of a model, and say why the frozen ones are frozen.

    Args:
        model: A path or a model object.
        prove: Whether to prove the coupling by permuting the channels of every group in ONNX Runtime.
        provider: Where ONNX Runtime runs it.
        seed: Seed of the inputs and permutations.

    Raises:
        ConfigError: The provider or the seed is none.
        ModelError: The model can't be read.
        ProviderError: CUDA was asked for and does not work.
    """
    source = read_model(model)
    graph = GraphView(source.model)
    config = CompressionConfig.from_options({"provider": provider, "prove": prove, "seed": seed})
    try:
        samples, problem = choose_samples(source, graph, config.provider, seed)
    except (UnsupportedGraphError, RuntimeFailedError) as error:
        samples, problem = None, error.what
    return _inspected(source, graph, samples, problem, config)


def _inspected(
    source: SourceModel, graph: GraphView, samples: Samples | None, problem: str, config: CompressionConfig
) -> InspectReport:
    """Inspect a model on given inputs, or without any."""
    analysis = analyse(source, graph, samples)
    bodies = inspect_bodies(analysis, samples, config, _inspect_body) if samples else Bodies()
    notes = []
    if samples is None:
        notes.append(f"shapes are inferred only, the model was not run: {problem}")
    elif config.prove:
        groups_to_prove = [group for group in analysis.channels.groups if not group.frozen]
        analysis, note = prove_groups(analysis, groups_to_prove, samples, config)
        notes.append(note)
    groups = tuple(_group_report(analysis, GroupPlan(g, g.channels, g.frozen)) for g in analysis.channels.groups)
    groups += bodies.groups
    free = compressible_share(analysis) * analysis.cost.parameters + bodies.compressible
    notes.extend(bodies.notes)
    return InspectReport(
        model=source.name,
        opset={domain or "ai.onnx": version for domain, version in graph.opsets.items()},
        ir_version=source.model.ir_version,
        input_shapes=analysis.sample_dims,
        cost=ModelCost(analysis.cost.parameters, analysis.cost.macs, source.size_bytes),
        groups=groups,
        compressible_share=free / max(analysis.cost.parameters, 1),
        frozen_reasons=_frozen_reasons(groups),
        notes=tuple(note for note in notes if note),
        versions=versions(),
    )


def plan(
    model: ModelSource,
    *,
    config: CompressionConfig | None = None,
    calibration: DataSource | None = None,
    progress: Progress = _silent,
    **options: Any,
) -> Plan:
    """Decide how many channels each group keeps, and do no more: the first half of `compress`.

    Args:
        model: A path or a model object; it is never changed.
        config: All options as one object.
        calibration: Unlabelled samples, an ``.npz`` file, arrays by input name, or a folder of pictures.
        progress: Called as the work goes on.
        **options: Single options, instead of ``config``.

    Returns:
        A plan, which `compress` replays; its JSON can be edited before.

    Raises:
        OnnxFuseError: One of its subclasses, as for `compress`.
    """
    config = _config(config, options)
    prepared = _prepare(model, calibration, config, None, _Clock(progress))
    groups = {
        p.group.name: PlannedGroup(p.group.channels, p.kept, p.reason or None, _damage(prepared.judgements, p))
        for p in prepared.plans
    }
    if prepared.bodies.results:
        groups |= plan_bodies(prepared.analysis, prepared.samples, prepared.config, _inspect_body, _plan_body)
    source = prepared.analysis.source
    return Plan(source.name, source.sha256, groups, config.to_dict())


def compress(
    model: ModelSource,
    output: str | os.PathLike[str] | None = None,
    *,
    config: CompressionConfig | None = None,
    calibration: DataSource | None = None,
    plan: str | os.PathLike[str] | Plan | None = None,
    progress: Progress = _silent,
    **options: Any,
) -> Compressed:
    """Compress a model and prove the result.

    Args:
        model: A path or a model object; it is never changed.
        output: Where to write the result, after its proof; None to keep it in memory (see `Compressed.save`).
        config: All options as one object.
        calibration: Unlabelled samples, an ``.npz`` file, arrays by input name, or a folder of pictures: what is kept
            is chosen and fitted on them, and the drift is measured on them. Labels under the name ``labels`` are used
            by the importance ``taylor`` alone.
        plan: How many channels each group keeps, from `plan` or its file, instead of a ratio or a target.
        progress: Called as the work goes on.
        **options: Single options by the names of `CompressionConfig` and `FusionOptions`, instead of ``config``.

    Returns:
        The compressed model with its report.

    Raises:
        OnnxFuseError: One of its subclasses, which says what is wrong, where, and the mend; nothing is written then.
    """
    config = _config(config, options)
    target = None if output is None else check_output_path(output)
    clock = _Clock(progress)
    prepared = _prepare(model, calibration, config, plan, clock, target)
    analysis, plans, judgements = prepared.analysis, prepared.plans, prepared.judgements
    source, samples, notes = analysis.source, prepared.samples, prepared.notes
    config, bodies = prepared.config, prepared.bodies
    if bodies.results:
        with clock.stage("bodies"):
            bodies = compress_bodies(analysis, samples, config, prepared.wanted, _inspect_body, _compress_body)
            _refuse_nothing(analysis, plans, bodies, config)
    activations: Mapping[str, ActivationFeatures] = {}
    if config.fusion.importance in FROM_SAMPLES:
        with clock.stage("importance"):
            activations, note = _activations(prepared)
            notes.append(note)
    with clock.stage("fuse"):
        fused = fuse_groups(analysis, plans, judgements, activations, config, partial(progress, "fuse"))
    refits: list[Refit] = []
    if config.refits:
        with clock.stage("refit"):
            refits = refit_network(
                analysis, fused.state, fused.applied, samples, config.provider, config.seed, partial(progress, "refit")
            )
    rebuilt: list[Reconstruction] = []
    if config.refits and config.effort > 0:
        with clock.stage("reconstruct"):
            fitted, dims = edited_model(analysis, fused.state)
            macs = cost_of(fitted, analysis, dims).macs
            rebuilt = reconstruct_network(
                analysis, fused.state, fused.applied, samples, macs, config, partial(progress, "reconstruct")
            )
    result, dims = edited_model(analysis, fused.state)
    result = with_bodies(result, bodies)
    refits.extend(bodies.refits)
    notes.extend(bodies.notes)
    cost = cost_of(result, analysis, dims)
    groups = (*(_group_report(analysis, plan, fused, judgements) for plan in plans), *bodies.groups)
    _set_metadata(result, metadata_of(source, analysis.cost, cost, groups, config))
    with _place(target) as temporary, clock.stage("prove"):
        size = write_model(result, temporary)
        notes.append(check_structure(temporary, source.path or source.model))
        original = Session(source.path or source.model, config.provider, name=f"the original model {source.name!r}")
        compressed = Session(temporary, config.provider, name="the compressed model")
        drift = measure_drift(original, compressed, samples)
    report = CompressionReport(
        model=source.name,
        sha256=source.sha256,
        output="" if target is None else str(target),
        before=ModelCost(analysis.cost.parameters, analysis.cost.macs, source.size_bytes),
        after=ModelCost(cost.parameters, cost.macs, size),
        input_shapes=analysis.sample_dims,
        groups=groups,
        refits=tuple(refits),
        reconstructions=(*rebuilt, *bodies.reconstructions),
        drift=drift,
        provider=str(compressed.provider),
        seconds=clock.seconds,
        notes=tuple(note for note in notes if note),
        versions=versions(),
        config=config.to_dict(),
    )
    return Compressed(result, report)


def validate(
    original: ModelSource,
    compressed: ModelSource,
    *,
    data: DataSource | None = None,
    provider: Provider | str = Provider.AUTO,
    seed: int = 0,
) -> ValidationReport:
    """Compare two models on the same inputs.

    Args:
        original: The reference.
        compressed: The model to judge.
        data: Samples, and labels under the name ``labels`` if accuracy is to be measured; a folder of pictures; None
            for synthetic inputs.
        provider: Where ONNX Runtime runs.
        seed: Seed of synthetic inputs.

    Raises:
        OnnxFuseError: A model or the data can't be used, or the outputs are not comparable.
    """
    config = CompressionConfig.from_options({"provider": provider, "seed": seed})
    sources = [read_model(original), read_model(compressed)]
    graph = GraphView(sources[0].model)
    folder = _folder(data)
    arrays, labels = split_labels(None if folder else data, graph)
    origin = str(data) if isinstance(data, str | os.PathLike) else ""
    samples = _samples(sources[0], graph, arrays, config, origin)
    analysis = analyse(sources[0], graph, samples)
    if folder is not None:
        samples = calibration_samples(analysis, samples, config, folder).samples
    elif data is None:
        samples = more_samples(analysis, samples, seed)
    sessions = [Session(s.path or s.model, config.provider, name=f"the model {s.name!r}") for s in sources]
    drift = measure_drift(sessions[0], sessions[1], samples)
    accuracy = None
    if labels is not None:
        accuracy = {
            word: measure_accuracy(session, samples, labels)
            for word, session in zip(("original", "compressed"), sessions, strict=True)
        }
    costs = []
    for source in sources:
        cost = cost_of(source.model, analysis)
        costs.append(ModelCost(cost.parameters, cost.macs, source.size_bytes))
    return ValidationReport(
        original=sources[0].name,
        compressed=sources[1].name,
        before=costs[0],
        after=costs[1],
        drift=drift,
        accuracy=accuracy,
        provider=str(sessions[1].provider),
        versions=versions(),
    )


@dataclass
class _Clock:
    """Wall time of each stage, and the progress display told of it."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self.progress(name, 0, 1)
        yield
        self.progress(name, 1, 1)
        self.seconds[name] = round(time.perf_counter() - start, 4)


@contextmanager
def _place(target: Path | None) -> Iterator[Path]:
    """Give a temporary path that becomes ``target`` at the end, or vanishes if there is no target."""
    if target is not None:
        with staged(target) as temporary:
            yield temporary
    else:
        with tempfile.TemporaryDirectory(prefix="onnxfuse-") as folder:
            yield Path(folder) / "model.onnx"


def _samples(
    source: SourceModel, graph: GraphView, data: DataSource | None, config: CompressionConfig, origin: str = ""
) -> Samples:
    if data is not None:
        return load_samples(data, graph, origin)
    samples, problem = choose_samples(source, graph, config.provider, config.seed)
    if samples is None:
        what = f"no synthetic inputs were found that the model runs with: {problem}"
        mend = "give samples with --calibration FILE.npz (compress) or --data FILE.npz (validate)"
        raise DataError(what, where=source.name, mend=mend)
    return samples


def _config(config: CompressionConfig | None, options: Mapping[str, Any]) -> CompressionConfig:
    if config is None:
        return CompressionConfig.from_options(options)
    if options:
        what = "options were given beside a config"
        raise ConfigError(what, where=", ".join(options), mend="put everything into the config, or nothing")
    return config


@dataclass(frozen=True, eq=False)
class _Prepared:
    """Everything that is known before the first weight changes."""

    analysis: Analysis
    plans: Sequence[GroupPlan]
    judgements: Mapping[str, Judgement]
    samples: Samples
    labels: IntArray | None
    config: CompressionConfig
    bodies: Bodies
    wanted: Plan | None
    notes: list[str]


def _prepare(
    model: ModelSource,
    calibration: DataSource | None,
    config: CompressionConfig,
    plan: str | os.PathLike[str] | Plan | None,
    clock: "_Clock",
    target: Path | None = None,
) -> _Prepared:
    """Read, analyse and prove the original, and decide how many channels each group keeps."""
    with clock.stage("load"):
        wanted = _wanted(plan, config)
        source = read_model(model)
        _refuse_overwriting(source, target)
        graph = GraphView(source.model)
        folder = _folder(calibration)
        origin = str(calibration) if isinstance(calibration, str | os.PathLike) else ""
        arrays, labels = split_labels(None if folder else calibration, graph)
        samples = _samples(source, graph, arrays, config, origin)
    notes = []
    if samples.broken:
        broken = f"{samples.broken} of the {samples.count} samples have values that are NaN or infinite"
        notes.append(f"{broken}; what these reach is not counted")
    if wanted is not None and wanted.sha256 != source.sha256:
        notes.append(f"the plan was made for another file, {wanted.model!r}, with the same groups")
    with clock.stage("couple"):
        analysis = analyse(source, graph, samples)
        bodies = find_bodies(analysis, samples, config, wanted, _inspect_body)
        config = with_shared_target(config, analysis, bodies)
        plans = _plans(analysis, bodies, config, wanted)
    if config.prove:
        with clock.stage("prove coupling"):
            changing = [plan.group for plan in plans if config.target or plan.kept < plan.group.channels]
            free = [group for group in changing if not group.frozen and group.channels > 1]
            analysis, note = prove_groups(analysis, free, samples, config)
            plans = _plans(analysis, bodies, config, wanted)
            notes.append(note)
    if folder is not None:
        with clock.stage("read pictures"):
            samples = calibration_samples(analysis, samples, config, folder).samples
    elif calibration is None:
        with clock.stage("synthesise"):
            samples, config, note = _made_up(analysis, samples, config)
            notes.append(note)
    judgements: Mapping[str, Judgement] = {}
    if config.is_auto or config.target:
        with clock.stage("observe"):
            free = [plan.group for plan in plans if not plan.reason]
            judgements = judge_groups(analysis, free, samples, config.provider, config.seed)
    if config.target:
        with clock.stage("allocate"):
            plans, note = allocate_widths(analysis, plans, judgements, Target.parse(config.target), config)
            notes.append(note)
            _refuse_nothing(analysis, plans, bodies, config)
    return _Prepared(analysis, plans, judgements, samples, labels, config, bodies, wanted, notes)


def _folder(calibration: DataSource | None) -> Path | None:
    """Return the folder of pictures that samples are to be read from, if it is one."""
    if isinstance(calibration, str | os.PathLike):
        # A name that no file can have is refused where samples are read.
        with suppress(OSError):
            return Path(calibration) if Path(calibration).is_dir() else None
    return None


def _wanted(plan: str | os.PathLike[str] | Plan | None, config: CompressionConfig) -> Plan | None:
    if plan is None:
        return None
    if config.target or config.ratio != DEFAULT_RATIO:
        what = "a plan is given beside a ratio or a target, and each decides how much goes"
        raise ConfigError(what, where="--plan", mend="leave the others out")
    return read_plan(plan)


def _plans(analysis: Analysis, bodies: Bodies, config: CompressionConfig, wanted: Plan | None) -> list[GroupPlan]:
    """Plan the widths, and refuse a run that would change nothing."""
    inside = [group.name for group in bodies.groups]
    plans = plan_widths(analysis.channels.groups, config, inside)
    if wanted is not None:
        plans = apply_plan(wanted.without(inside), plans)
    _refuse_nothing(analysis, plans, bodies, config)
    return plans


def _damage(judgements: Mapping[str, Judgement], plan: GroupPlan) -> float | None:
    found = judgements.get(plan.group.name)
    return None if found is None else float(found.damage[plan.kept])


def _made_up(analysis: Analysis, samples: Samples, config: CompressionConfig) -> tuple[Samples, CompressionConfig, str]:
    """Return samples for a run without data, the config for what they are good for, and what a reader should know."""
    from_samples = config.fusion.importance in FROM_SAMPLES
    if not (config.is_auto or config.refits or config.target or from_samples):
        return more_samples(analysis, samples, config.seed), config, ""
    synthetic = calibration_samples(analysis, samples, config)
    if synthetic.is_like_data:
        return synthetic.samples, config, f"no data: chosen and fitted on {synthetic.samples.origin}"
    if from_samples:
        what = (
            f"there are no samples for the importance {config.fusion.importance!r}, and the inputs are neither images "
        )
        what += "nor tokens that could be made up"
        mend = "give samples with --calibration, or choose an importance that looks at weights alone, such as l1"
        raise DataError(what, where="--importance", mend=mend)
    note = "no data, and the inputs are neither images nor tokens: random numbers say little of what real ones do, so "
    if config.is_auto:
        config = replace(config, method="intra-fusion", refit=False)
        note += "the weights alone decide (intra-fusion); "
    return synthetic.samples, config, f"{note}give --calibration for better results"


def _activations(prepared: _Prepared) -> tuple[Mapping[str, ActivationFeatures], str]:
    """Observe what the importance wants to know of the groups whose map it decides; say what a reader should know."""
    config, samples, analysis = prepared.config, prepared.samples, prepared.analysis
    shrinking = [plan.group for plan in prepared.plans if plan.kept < plan.group.channels]
    groups = [group for group in shrinking if not (config.is_auto and group.name in prepared.judgements)]
    name, loss, note = config.fusion.importance, None, ""
    if groups and name == "taylor":
        loss = choose_loss(analysis.graph, samples, config.provider, prepared.labels)
        note = f"the importance taylor goes by the gradient of {loss.words}"
    return observe_activations(analysis, groups, name, samples, config.provider, config.seed, loss), note


def _refuse_overwriting(source: SourceModel, target: Path | None) -> None:
    if target is not None and source.path is not None and target.exists() and target.samefile(source.path):
        what = "the output is the input file, which onnxfuse never changes"
        raise OutputError(what, where=str(target), mend="choose another output path")


def _inspect_body(
    model: onnx.ModelProto, arrays: Mapping[str, np.ndarray[Any, np.dtype[Any]]], config: CompressionConfig
) -> InspectReport:
    source = read_model(model)
    graph = GraphView(source.model)
    return _inspected(source, graph, load_samples(arrays, graph, "the model around it"), "", config)


def _plan_body(
    model: onnx.ModelProto, arrays: Mapping[str, np.ndarray[Any, np.dtype[Any]]], config: CompressionConfig
) -> Plan:
    return plan(model, config=config, calibration=arrays)


def _compress_body(
    model: onnx.ModelProto,
    arrays: Mapping[str, np.ndarray[Any, np.dtype[Any]]],
    config: CompressionConfig,
    wanted: Plan | None,
) -> tuple[onnx.ModelProto, CompressionReport]:
    result = compress(model, config=config, calibration=arrays, plan=wanted)
    return result.model, result.report


def _refuse_nothing(analysis: Analysis, plans: Sequence[GroupPlan], bodies: Bodies, config: CompressionConfig) -> None:
    """Refuse a run that would change nothing, in the model or in its bodies, although it was asked to."""
    if config.ratio == 0 or bodies.may_change or any(plan.kept < plan.group.channels for plan in plans):
        return
    told = [*(plan.reason for plan in plans), *(group.frozen for group in bodies.groups), *bodies.left]
    fed = _fed_weight(analysis.graph)
    if not told and fed:
        what = f"there is nothing to compress: weights such as {fed!r} are not stored but given as graph inputs"
        raise UnsupportedGraphError(what, where=analysis.source.name, mend="store the weights in the model")
    if not told:
        what = "there is nothing to compress: no Conv, Gemm or MatMul with constant weights makes channels"
        raise UnsupportedGraphError(what, where=analysis.source.name, mend="onnxfuse compresses neural networks")
    reasons = Counter(reason or "it can't have fewer channels" for reason in told).most_common(_MOST_REASONS)
    total = f"of {len(told)} groups" if len(told) > 1 else "of 1 group"
    total += " and bodies" if bodies.left else ""
    what = "nothing can be compressed as asked: "
    what += "; ".join(f"{_shortened(reason)} ({count} {total})" for reason, count in reasons)
    mend = "`onnxfuse inspect` lists every group with its reason; widen --scope, --only or --skip if they exclude it"
    raise UnsupportedGraphError(what, where=analysis.source.name, mend=mend)


def _fed_weight(graph: GraphView) -> str:
    """Return a graph input that a linear operator reads as its weight; empty if there is none."""
    for node in graph.nodes:
        if node.op in {"Conv", "ConvInteger", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger"}:
            name = node.inputs[1]
            dims = graph.inputs[name].type.tensor_type.shape.dim if name in graph.inputs else []
            if len(dims) > 1 and all(dim.dim_value > 0 for dim in dims):
                return name
    return ""


def _shortened(text: str) -> str:
    """Cut the middle out of a long text: exporters join the names of many layers into one."""
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON // 2]}...{text[-_LONGEST_REASON // 3 :]}"


def _set_metadata(model: onnx.ModelProto, entries: Mapping[str, str]) -> None:
    """Add entries to the model's metadata; those of an earlier run are replaced, all others stay."""
    kept = [(p.key, p.value) for p in model.metadata_props if p.key not in entries]
    del model.metadata_props[:]
    for key, value in (*kept, *entries.items()):
        model.metadata_props.add(key=key, value=value)


def _group_report(
    analysis: Analysis, plan: GroupPlan, fused: Fused | None = None, judgements: Mapping[str, Judgement] | None = None
) -> GroupReport:
    group, damage = plan.group, _damage(judgements or {}, plan)
    gain = fused.gains.get(group.name, 1.0) if fused else 1.0
    return GroupReport(
        name=group.name,
        channels_before=group.channels,
        channels_after=plan.kept,
        frozen=plan.reason or None,
        method=fused.methods.get(group.name) if fused else None,
        damage=None if damage is None else gain * damage,
        residual=group.residual,
        parameters=group_parameters(analysis, group),
        nodes=tuple(dict.fromkeys(parameter.node for parameter in group.parameters)),
        statistic=group.statistic or None,
        unmixable=group.unmixable or None,
    )


def _frozen_reasons(groups: Sequence[GroupReport]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for group in groups:
        if group.frozen:
            entry = found.setdefault(group.frozen, {"groups": 0, "parameters": 0})
            entry["groups"] += 1
            entry["parameters"] += group.parameters
    return found
