"""The three commands: inspect a model, compress it, validate a result. Data flows one way, stage by stage."""

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from onnxfuse.config import CompressionConfig, Order, Provider
from onnxfuse.coupling.groups import CouplingGroup
from onnxfuse.errors import (
    ConfigError,
    DataError,
    OnnxFuseError,
    OutputError,
    RuntimeFailedError,
    UnsupportedGraphError,
)
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.fusion.methods import METHODS
from onnxfuse.fusion.rewrite import collect_edits, new_dims
from onnxfuse.fusion.weights import WeightState
from onnxfuse.graph.edits import apply_edits
from onnxfuse.graph.files import SourceModel, check_output_path, read_model, staged, write_model
from onnxfuse.graph.view import GraphView
from onnxfuse.planning.widths import GroupPlan, plan_widths
from onnxfuse.proof.accuracy import measure_accuracy, split_labels
from onnxfuse.proof.checker import check_structure
from onnxfuse.proof.coupling import prove_coupling, watched_values
from onnxfuse.proof.drift import measure_drift
from onnxfuse.proof.runtime import Session
from onnxfuse.proof.samples import Samples, load_samples
from onnxfuse.refit import Refit, refit_readers
from onnxfuse.report import (
    CompressionReport,
    GroupReport,
    InspectReport,
    ModelCost,
    ValidationReport,
    metadata_of,
    versions,
)

__all__ = ["Compressed", "compress", "inspect", "validate"]

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
    notes = []
    try:
        samples, problem = choose_samples(source, graph, config.provider, seed)
    except (UnsupportedGraphError, RuntimeFailedError) as error:
        samples, problem = None, error.what
    analysis = analyse(source, graph, samples)
    if samples is None:
        notes.append(f"shapes are inferred only, the model was not run: {problem}")
    elif prove:
        groups_to_prove = [group for group in analysis.channels.groups if not group.frozen]
        analysis, note = _proven(analysis, groups_to_prove, samples, config)
        notes.append(note)
    groups = tuple(_group_report(analysis, group, group.channels, group.frozen) for group in analysis.channels.groups)
    return InspectReport(
        model=source.name,
        opset={domain or "ai.onnx": version for domain, version in graph.opsets.items()},
        ir_version=source.model.ir_version,
        input_shapes=analysis.sample_dims,
        cost=ModelCost(analysis.cost.parameters, analysis.cost.macs, source.size_bytes),
        groups=groups,
        compressible_share=compressible_share(analysis),
        frozen_reasons=_frozen_reasons(groups),
        notes=tuple(note for note in notes if note),
        versions=versions(),
    )


def compress(
    model: ModelSource,
    output: str | os.PathLike[str] | None = None,
    *,
    config: CompressionConfig | None = None,
    calibration: DataSource | None = None,
    progress: Progress = _silent,
    **options: Any,
) -> Compressed:
    """Compress a model and prove the result.

    Args:
        model: A path or a model object; it is never changed.
        output: Where to write the result, after its proof; None to keep it in memory (see `Compressed.save`).
        config: All options as one object.
        calibration: Samples to measure the drift on: an ``.npz`` file or arrays, by input name.
        progress: Called as the work goes on.
        **options: Single options by the names of `CompressionConfig` and `FusionOptions`, instead of ``config``.

    Returns:
        The compressed model with its report.

    Raises:
        OnnxFuseError: One of its subclasses, which says what is wrong, where, and the mend; nothing is written then.
    """
    if config is None:
        config = CompressionConfig.from_options(options)
    elif options:
        what = "options were given beside a config"
        raise ConfigError(what, where=", ".join(options), mend="put everything into the config, or nothing")
    target = None if output is None else check_output_path(output)
    clock = _Clock(progress)
    with clock.stage("load"):
        source = read_model(model)
        _refuse_overwriting(source, target)
        graph = GraphView(source.model)
        samples = _samples(source, graph, calibration, config)
    with clock.stage("couple"):
        analysis = analyse(source, graph, samples)
        if calibration is None:
            samples = more_samples(analysis, samples, config.seed)
        plans = plan_widths(analysis.channels.groups, config)
        _refuse_nothing(analysis, plans, config)
    notes = []
    if config.prove:
        with clock.stage("prove coupling"):
            changing = [plan.group for plan in plans if plan.kept < plan.group.channels]
            analysis, note = _proven(analysis, changing, samples, config)
            plans = plan_widths(analysis.channels.groups, config)
            _refuse_nothing(analysis, plans, config)
            notes.append(note)
    with clock.stage("fuse"):
        state, applied = _fuse_groups(analysis, plans, config, progress)
    refits: list[Refit] = []
    if config.refit:
        with clock.stage("refit"):
            refits = refit_readers(
                analysis, state, applied, samples, config.provider, config.seed, partial(progress, "refit")
            )
    result, dims = _edited_model(analysis, state)
    cost = cost_of(result, analysis, dims)
    _set_metadata(result, metadata_of(source, analysis.cost, cost, plans, config))
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
        groups=tuple(_group_report(analysis, plan.group, plan.kept, plan.reason) for plan in plans),
        refits=tuple(refits),
        drift=drift,
        provider=str(compressed.provider),
        seconds=clock.seconds,
        notes=tuple(note for note in notes if note),
        versions=versions(),
        config={**config.to_dict(), "method_used": config.method_name},
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
        data: Samples, and labels under the name ``labels`` if accuracy is to be measured; None for synthetic inputs.
        provider: Where ONNX Runtime runs.
        seed: Seed of synthetic inputs.

    Raises:
        OnnxFuseError: A model or the data can't be used, or the outputs are not comparable.
    """
    config = CompressionConfig.from_options({"provider": provider, "seed": seed})
    sources = [read_model(original), read_model(compressed)]
    graph = GraphView(sources[0].model)
    arrays, labels = split_labels(data, graph)
    origin = str(data) if isinstance(data, str | os.PathLike) else ""
    samples = _samples(sources[0], graph, arrays, config, origin)
    analysis = analyse(sources[0], graph, samples)
    if data is None:
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


def _refuse_overwriting(source: SourceModel, target: Path | None) -> None:
    if target is not None and source.path is not None and target.exists() and target.samefile(source.path):
        what = "the output is the input file, which onnxfuse never changes"
        raise OutputError(what, where=str(target), mend="choose another output path")


def _refuse_nothing(analysis: Analysis, plans: Sequence[GroupPlan], config: CompressionConfig) -> None:
    """Refuse a run that would change nothing although it was asked to."""
    if config.ratio == 0 or any(plan.kept < plan.group.channels for plan in plans):
        return
    if not plans:
        what = "there is nothing to compress: no Conv, Gemm or MatMul with constant weights makes channels"
        raise UnsupportedGraphError(what, where=analysis.source.name, mend="onnxfuse compresses neural networks")
    reasons = Counter(plan.reason or "it can't have fewer channels" for plan in plans).most_common(_MOST_REASONS)
    total = f"of {len(plans)} groups" if len(plans) > 1 else "of 1 group"
    what = "nothing can be compressed as asked: "
    what += "; ".join(f"{_shortened(reason)} ({count} {total})" for reason, count in reasons)
    mend = "`onnxfuse inspect` lists every group with its reason; widen --scope, --only or --skip if they exclude it"
    raise UnsupportedGraphError(what, where=analysis.source.name, mend=mend)


def _shortened(text: str) -> str:
    """Cut the middle out of a long text: exporters join the names of many layers into one."""
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON // 2]}...{text[-_LONGEST_REASON // 3 :]}"


def _proven(
    analysis: Analysis, groups: Sequence[CouplingGroup], samples: Samples, config: CompressionConfig
) -> tuple[Analysis, str]:
    """Prove the coupling of some groups on the model itself.

    Returns:
        The analysis with the groups that failed frozen, and what a reader should know; empty if all is well.
    """

    def permute(chosen: Sequence[CouplingGroup]) -> onnx.ModelProto:
        state = WeightState(analysis.graph, analysis.shapes, analysis.channels)
        rng = np.random.default_rng(config.seed)
        for group in chosen:
            # One random cycle moves every channel; a random permutation of a few may move none.
            order = rng.permutation(group.channels)
            state.fuse(group, ChannelMap.permutation(np.roll(order, 1)[np.argsort(order)]))
        edits = collect_edits(analysis.graph, analysis.shapes, analysis.channels, state)
        return apply_edits(analysis.graph, edits, {})

    watched = watched_values(analysis.graph, analysis.channels)
    feeds = next(samples.feeds())
    proof = prove_coupling(analysis.source.model, groups, permute, feeds, watched, config.provider)
    if proof.note:
        return analysis, f"the coupling was not proven on this model: {proof.note}"
    if not proof.refuted:
        return analysis, ""
    reasons = {name: f"the proof on this model failed: {problem}" for name, problem in proof.refuted.items()}
    frozen = tuple(replace(g, frozen=reasons.get(g.name, g.frozen)) for g in analysis.channels.groups)
    names = ", ".join(proof.refuted)
    note = f"a defect of onnxfuse, made harmless; please report it with the model: no proof for {names}"
    return replace(analysis, channels=replace(analysis.channels, groups=frozen)), note


def _fuse_groups(
    analysis: Analysis, plans: Sequence[GroupPlan], config: CompressionConfig, progress: Progress
) -> tuple[WeightState, list[tuple[CouplingGroup, ChannelMap]]]:
    """Fuse the groups one after the other, each on the weights that the groups before it have left.

    Returns:
        The fused weights, and the map that each group was fused with.
    """
    applied = []
    state = WeightState(analysis.graph, analysis.shapes, analysis.channels)
    method = METHODS[config.method_name]
    work = sorted((p for p in plans if p.kept < p.group.channels), key=lambda p: _last_producer(p.group))
    if config.order is Order.BACKWARD:
        work.reverse()
    for done, plan in enumerate(work):
        progress("fuse", done, len(work))
        rng = np.random.default_rng([config.seed, plans.index(plan)])
        # Channels that may not be mixed are dropped instead, by the same importance.
        find_map = METHODS["prune"] if plan.group.unmixable else method
        try:
            channel_map = find_map(state.features(plan.group), plan.kept, config.fusion, rng)
            state.fuse(plan.group, channel_map)
        except OnnxFuseError as error:
            error.where = error.where or f"group {plan.group.name!r}"
            raise
        applied.append((plan.group, channel_map))
    return state, applied


def _edited_model(analysis: Analysis, state: WeightState) -> tuple[onnx.ModelProto, Mapping[str, tuple[int, ...]]]:
    """Return the new model, and the shapes of its computed values."""
    edits = collect_edits(analysis.graph, analysis.shapes, analysis.channels, state)
    dims = new_dims(analysis.channels, state)
    known = {**analysis.shapes.dims, **dims}
    return apply_edits(analysis.graph, edits, dims), known


def _last_producer(group: CouplingGroup) -> int:
    return max(parameter.operand.node for parameter in group.producers)


def _set_metadata(model: onnx.ModelProto, entries: Mapping[str, str]) -> None:
    """Add entries to the model's metadata; those of an earlier run are replaced, all others stay."""
    kept = [(p.key, p.value) for p in model.metadata_props if p.key not in entries]
    del model.metadata_props[:]
    for key, value in (*kept, *entries.items()):
        model.metadata_props.add(key=key, value=value)


def _group_report(analysis: Analysis, group: CouplingGroup, kept: int, reason: str) -> GroupReport:
    return GroupReport(
        name=group.name,
        channels_before=group.channels,
        channels_after=kept,
        frozen=reason or None,
        residual=group.residual,
        parameters=group_parameters(analysis, group),
        nodes=tuple(dict.fromkeys(parameter.node for parameter in group.parameters)),
    )


def _frozen_reasons(groups: Sequence[GroupReport]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for group in groups:
        if group.frozen:
            entry = found.setdefault(group.frozen, {"groups": 0, "parameters": 0})
            entry["groups"] += 1
            entry["parameters"] += group.parameters
    return found
