"""The commands: inspect a model, plan, compress it, validate a result. Data flows one way, stage by stage."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from onnxfuse.analysis import (
    analyse,
    choose_samples,
    compressible_share,
    cost_of,
    held_parameters,
    in_runs_that_fit,
    more_samples,
)
from onnxfuse.bodies import Arrays, Bodies, Spending, inspect_bodies, plan_bodies, with_bodies
from onnxfuse.calibration.reconstruct import Reconstruction
from onnxfuse.calibration.refit import Refit
from onnxfuse.calibration.synthetic import calibration_samples
from onnxfuse.changes import Changed, fit, fuse
from onnxfuse.config import CompressionConfig, Provider
from onnxfuse.errors import ConfigError, RuntimeFailedError, UnsupportedGraphError
from onnxfuse.graph.cost import Cost
from onnxfuse.graph.files import SourceModel, check_output_path, read_model, staged, write_model
from onnxfuse.graph.view import GraphView
from onnxfuse.planning.costs import CostTable
from onnxfuse.planning.files import Plan, PlannedGroup
from onnxfuse.planning.widths import GroupPlan
from onnxfuse.preparation import (
    Clock,
    DataSource,
    ModelSource,
    PlanSource,
    Prepared,
    Progress,
    Task,
    prepare,
    read_given,
    spending_of,
)
from onnxfuse.proof.accuracy import measure_accuracy
from onnxfuse.proof.checker import check_structure
from onnxfuse.proof.drift import Drift, check_at_other_sizes, measure_drift
from onnxfuse.proof.random_samples import feeds_at_other_sizes
from onnxfuse.proof.runtime import Session
from onnxfuse.proof.samples import Samples, load_samples
from onnxfuse.report import (
    CompressionReport,
    GroupReport,
    InspectReport,
    ModelCost,
    ValidationReport,
    frozen_reasons,
    group_report,
    metadata_of,
    unused_options,
    versions,
)
from onnxfuse.stages import edited_model, planned_group, prove_groups
from onnxfuse.target import Target

__all__ = ["Compressed", "compress", "inspect", "plan", "validate"]


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
    bodies = inspect_bodies(analysis, samples, config, _BodyCommands()) if samples else Bodies()
    notes = []
    if samples is None:
        notes.append(f"shapes are inferred only, the model was not run: {problem}")
    elif config.prove:
        groups_to_prove = [group for group in analysis.channels.groups if not group.frozen]
        analysis, note = prove_groups(analysis, groups_to_prove, samples, config)
        notes.append(note)
    groups = tuple(group_report(analysis, GroupPlan(g, g.channels, g.frozen)) for g in analysis.channels.groups)
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
        frozen_reasons=frozen_reasons(groups, held_parameters(analysis)),
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
    return _planned(Task(model, calibration, _config(config, options)), Clock(progress))


def _planned(task: Task, clock: Clock) -> Plan:
    """Decide how many channels each group keeps."""
    config, prepared = task.config, prepare(task, clock, _BodyCommands())
    notes = tuple(filter(None, prepared.notes))
    if prepared.wanted is not None:
        return replace(prepared.wanted, notes=notes)
    groups = {p.group.name: planned_group(prepared.judgements, p) for p in prepared.plans}
    if prepared.bodies.results:
        groups |= plan_bodies(prepared.analysis, prepared.samples, prepared.bodies_config, _BodyCommands())
    source = prepared.analysis.source
    # Without samples of the user's, the notes tell what the damages are from.
    samples = "" if task.calibration is None else prepared.samples.origin
    return Plan(source.name, source.sha256, groups, config.to_dict(), notes, samples)


def compress(
    model: ModelSource,
    output: str | os.PathLike[str] | None = None,
    *,
    config: CompressionConfig | None = None,
    calibration: DataSource | None = None,
    plan: PlanSource | None = None,
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
    return _compressed(Task(model, calibration, config, plan, target), Clock(progress))


def _compressed(task: Task, clock: Clock) -> Compressed:
    """Compress a model and prove the result."""
    prepared = prepare(task, clock, _BodyCommands())
    fusing = fuse(prepared, clock, _BodyCommands())
    prepared = prepared.without_readings()
    result = _result(prepared, fit(prepared, fusing, clock))
    if not task.is_part:
        result = replace(result, notes=(*result.notes, unused_options(prepared.config, result.groups)))
    del fusing
    return _finish(prepared, result, task.target, clock)


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
    given = read_given(sources[0], graph, data, config)
    analysis = analyse(sources[0], graph, given.samples)
    samples, note = given.samples, ""
    if given.folder is not None:
        pictures = calibration_samples(analysis, samples, config, given.folder)
        samples, note = pictures.samples, pictures.note
    elif data is None:
        samples = more_samples(analysis, samples, seed)
    sessions = [Session(s.path or s.model, config.provider, name=f"the model {s.name!r}") for s in sources]
    samples.refuse_broken()
    drift = measure_drift(sessions[0], sessions[1], samples, graph)
    accuracy = None
    if given.labels is not None:
        accuracy = {
            word: measure_accuracy(session, samples, given.labels)
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
        notes=tuple(filter(None, (note, samples.note, drift.note))),
        versions=versions(),
    )


@contextmanager
def _place(target: Path | None) -> Iterator[Path]:
    """Give a temporary path that becomes ``target`` at the end, or vanishes if there is no target."""
    if target is not None:
        with staged(target) as temporary:
            yield temporary
    else:
        with tempfile.TemporaryDirectory(prefix="onnxfuse-") as folder:
            yield Path(folder) / "model.onnx"


def _config(config: CompressionConfig | None, options: Mapping[str, Any]) -> CompressionConfig:
    if config is None:
        return CompressionConfig.from_options(options)
    if options:
        what = "options were given beside a config"
        raise ConfigError(what, where=", ".join(options), mend="put everything into the config, or nothing")
    return config


@dataclass(frozen=True)
class _Result:
    """The new model before its proof, with what is to be told of it; the weights that it was made from are gone.

    Attributes:
        model: The model.
        cost: What it costs.
        groups: What was done to each group.
        refits: What the refit did.
        reconstructions: What the reconstruction did.
        notes: What else a reader should know; some are empty.
    """

    model: onnx.ModelProto
    cost: Cost
    groups: tuple[GroupReport, ...]
    refits: tuple[Refit, ...]
    reconstructions: tuple[Reconstruction, ...]
    notes: tuple[str, ...]


def _result(prepared: Prepared, changed: Changed) -> _Result:
    """Put the new weights into a copy of the model."""
    analysis, fused, bodies = prepared.analysis, changed.fusing.fused, changed.fusing.bodies
    model, dims = edited_model(analysis, fused.state)
    model = with_bodies(model, bodies)
    cost = cost_of(model, analysis, dims)
    own = (group_report(analysis, plan, fused, prepared.judgements) for plan in prepared.plans)
    groups = (*own, *bodies.groups)
    _set_metadata(model, metadata_of(analysis.source, analysis.cost, cost, groups, prepared.config))
    return _Result(
        model,
        cost,
        groups,
        (*changed.refits, *bodies.refits),
        (*changed.reconstructions, *bodies.reconstructions),
        (*prepared.notes, changed.fusing.note, *bodies.notes),
    )


def _finish(prepared: Prepared, result: _Result, target: Path | None, clock: Clock) -> Compressed:
    """Prove the new model, write it, and report."""
    analysis, source, config = prepared.analysis, prepared.analysis.source, prepared.config
    proof = _prove(result.model, prepared, target, clock)
    report = CompressionReport(
        model=source.name,
        sha256=source.sha256,
        output="" if target is None else str(target),
        before=ModelCost(analysis.cost.parameters, analysis.cost.macs, source.size_bytes),
        after=ModelCost(result.cost.parameters, result.cost.macs, proof.size_bytes),
        input_shapes=analysis.sample_dims,
        groups=result.groups,
        refits=result.refits,
        reconstructions=result.reconstructions,
        drift=proof.drift,
        provider=proof.drift.provider,
        seconds=clock.seconds,
        notes=tuple(filter(None, (*result.notes, proof.note, proof.drift.note))),
        versions=versions(),
        config=config.to_dict(),
    )
    return Compressed(result.model, report)


@dataclass(frozen=True)
class _Proof:
    """What is known of a result once it has run.

    Attributes:
        size_bytes: Size of its file with its external data.
        drift: How far its outputs are from the original's.
        note: What else a reader should know; empty if there is nothing.
    """

    size_bytes: int
    drift: Drift
    note: str


def _prove(result: onnx.ModelProto, prepared: Prepared, target: Path | None, clock: Clock) -> _Proof:
    """Write a result, check it and run it beside the original; it is only put into its place if all is well."""
    analysis, provider = prepared.analysis, prepared.config.provider
    source = analysis.source
    with _place(target) as temporary, clock.stage("prove"):
        size = write_model(result, temporary)
        note = check_structure(temporary, source.path or source.model)
        original = Session(source.path or source.model, provider, name=f"the original model {source.name!r}")
        compressed = Session(temporary, provider, name="the compressed model")
        drift = measure_drift(original, compressed, in_runs_that_fit(analysis, prepared.samples), analysis.graph)
        others = feeds_at_other_sizes(analysis.graph, analysis.input_dims, prepared.config.seed)
        check_at_other_sizes(original, compressed, analysis.graph, others)
    return _Proof(size, drift, note)


class _BodyCommands:
    """The commands for the bodies of a model, each of which has a model and inputs of its own."""

    def inspect(self, model: onnx.ModelProto, arrays: Arrays, config: CompressionConfig) -> InspectReport:
        source = read_model(model)
        graph = GraphView(source.model)
        return _inspected(source, graph, load_samples(arrays, graph, "the model around it"), "", config)

    def plan(self, model: onnx.ModelProto, arrays: Arrays, config: CompressionConfig) -> Plan:
        return _planned(Task(model, arrays, config, is_part=True), Clock(_silent))

    def spending(self, model: onnx.ModelProto, arrays: Arrays, config: CompressionConfig) -> Spending:
        task = Task(model, arrays, config, is_part=True)
        try:
            return spending_of(prepare(task, Clock(_silent), self, shares_budget=True), self)
        except UnsupportedGraphError:
            return _fixed(task)

    def compress(
        self, model: onnx.ModelProto, arrays: Arrays, config: CompressionConfig, wanted: Plan | None
    ) -> tuple[onnx.ModelProto, CompressionReport]:
        result = _compressed(Task(model, arrays, config, wanted, is_part=True), Clock(_silent))
        return result.model, result.report


def _fixed(task: Task) -> Spending:
    """Return what a body costs in which nothing can change."""
    source = read_model(task.model)
    graph = GraphView(source.model)
    analysis = analyse(source, graph, read_given(source, graph, task.calibration, task.config).samples)
    measure = Target.parse(task.config.target or "").measure
    cost = CostTable(analysis.graph, analysis.shapes, analysis.channels, measure).total({})
    groups = {g.name: PlannedGroup(g.channels, g.channels, g.frozen or None) for g in analysis.channels.groups}
    return Spending(lambda _: (groups, cost))


def _set_metadata(model: onnx.ModelProto, entries: Mapping[str, str]) -> None:
    """Add entries to the model's metadata; those of an earlier run are replaced, all others stay."""
    kept = [(p.key, p.value) for p in model.metadata_props if p.key not in entries]
    del model.metadata_props[:]
    for key, value in (*kept, *entries.items()):
        model.metadata_props.add(key=key, value=value)
