"""What a run did, as plain data: for people as text, for machines as JSON, in short in the model itself."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from typing import Any

import numpy as np
import onnx

from onnxfuse.analysis import Analysis, group_parameters
from onnxfuse.calibration.reconstruct import Reconstruction
from onnxfuse.calibration.refit import Refit
from onnxfuse.config import CompressionConfig, flag_of
from onnxfuse.fusion.methods import METHODS
from onnxfuse.fusion.options import FusionOptions
from onnxfuse.graph.cost import Cost
from onnxfuse.graph.files import SourceModel
from onnxfuse.planning.widths import GroupPlan
from onnxfuse.proof.drift import Drift
from onnxfuse.stages import Fused, Judgements, damage_of

__all__ = [
    "CompressionReport",
    "GroupReport",
    "InspectReport",
    "ModelCost",
    "ValidationReport",
    "frozen_reasons",
    "group_report",
    "metadata_of",
    "unused_options",
    "versions",
]


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a model file costs.

    Attributes:
        parameters: Learned numbers (see `onnxfuse.graph.cost.Cost`).
        macs: Multiply-accumulates of one sample's run at ``input_shapes``.
        bytes: Size of the file with its external data.
    """

    parameters: int
    macs: int
    bytes: int


@dataclass(frozen=True, slots=True)
class GroupReport:
    """What happened to one coupling group.

    Attributes:
        name: Name of the first node that produces its channels.
        channels_before: C.
        channels_after: K.
        frozen: Why it was kept as it is, or None if it was compressed or could have been.
        method: How its map was found; None where there is none.
        damage: Share of the variance of what its readers' results end in that may well be lost, J, summed over the
            readers and before the refit; None where no samples were looked at.
        residual: Whether an addition of computed tensors ties it.
        parameters: How many parameters follow its channels.
        nodes: Names of the nodes whose weights follow its channels, in graph order.
        statistic: Which node computes a statistic over them, which fewer channels can only approximate; None if none.
        unmixable: Why they may be dropped but not mixed; None if they may be mixed.
    """

    name: str
    channels_before: int
    channels_after: int
    frozen: str | None
    method: str | None
    damage: float | None
    residual: bool
    parameters: int
    nodes: tuple[str, ...]
    statistic: str | None = None
    unmixable: str | None = None


@dataclass(frozen=True, slots=True)
class _Report:
    """What all reports can do."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: numbers, strings, lists and dicts."""
        return asdict(self)

    def to_json(self) -> str:
        """Return the report as JSON, one object; numbers that JSON does not have are strings, such as ``"inf"``."""
        return json.dumps(_plain(self.to_dict()), indent=2, ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True, slots=True)
class InspectReport(_Report):
    """What `inspect` finds out about a model.

    Attributes:
        model: Path of the model.
        opset: Version of each operator set, by domain (``ai.onnx`` for ONNX's own).
        ir_version: Version of the file format.
        input_shapes: The concrete input shapes that sizes and MACs hold for.
        cost: What it costs.
        groups: Its coupling groups in graph order.
        compressible_share: Share of the parameters that follow the channels of a group that is not frozen, 0 to 1.
        frozen_reasons: For every reason, how many groups it freezes and how many parameters stay for it.
        notes: What else a reader should know.
        versions: Versions of the software used.
    """

    model: str
    opset: Mapping[str, int]
    ir_version: int
    input_shapes: Mapping[str, Sequence[int]]
    cost: ModelCost
    groups: tuple[GroupReport, ...]
    compressible_share: float
    frozen_reasons: Mapping[str, Mapping[str, int]]
    notes: tuple[str, ...]
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class CompressionReport(_Report):
    """What `compress` did.

    Attributes:
        model: Path of the original.
        sha256: Hash of the original file, and of the weights that lie beside it; empty for a model object.
        output: Path of the result; empty if it was not saved.
        before: What the original costs.
        after: What the result costs.
        input_shapes: The concrete input shapes that MACs hold for.
        groups: What happened to each coupling group, in graph order.
        refits: What the refit did to each reader of fused channels; empty without ``refit``.
        reconstructions: What the reconstruction did to each part of the network; empty without effort.
        drift: How far the outputs moved, on which data.
        provider: Where the proof ran: ``cpu`` or ``cuda``.
        seconds: Wall time of each stage.
        notes: What else a reader should know.
        versions: Versions of the software used.
        config: The options.
    """

    model: str
    sha256: str
    output: str
    before: ModelCost
    after: ModelCost
    input_shapes: Mapping[str, Sequence[int]]
    groups: tuple[GroupReport, ...]
    refits: tuple[Refit, ...]
    reconstructions: tuple[Reconstruction, ...]
    drift: Drift
    provider: str
    seconds: Mapping[str, float]
    notes: tuple[str, ...]
    versions: Mapping[str, str]
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ValidationReport(_Report):
    """What `validate` measured.

    Attributes:
        original: Path of the original.
        compressed: Path of the other model.
        before: What the original costs.
        after: What the other model costs.
        drift: How far the outputs moved, on which data.
        accuracy: Top-1 accuracy of both on the labels in the data, 0 to 1; None without labels.
        provider: Where it ran.
        notes: What else a reader should know.
        versions: Versions of the software used.
    """

    original: str
    compressed: str
    before: ModelCost
    after: ModelCost
    drift: Drift
    accuracy: Mapping[str, float] | None
    provider: str
    notes: tuple[str, ...]
    versions: Mapping[str, str]


def group_report(
    analysis: Analysis, plan: GroupPlan, fused: Fused | None = None, judgements: Judgements | None = None
) -> GroupReport:
    """Return what is to be said of a group.

    Args:
        analysis: The model.
        plan: How many channels it keeps.
        fused: How maps were found; None where nothing was fused.
        judgements: What samples say of groups; None where none were looked at.
    """
    group, damage = plan.group, damage_of(judgements or {}, plan)
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


def frozen_reasons(groups: Sequence[GroupReport], held: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Count the groups that each reason freezes, and the parameters that stay for it.

    Args:
        groups: All groups.
        held: How many parameters stay because a group does, by its name; of those that are not here, as in bodies, all
            that follow its channels do, unless there is a single channel, which could not go.
    """
    found: dict[str, dict[str, int]] = {}
    for group in groups:
        if group.frozen:
            entry = found.setdefault(group.frozen, {"groups": 0, "parameters": 0})
            entry["groups"] += 1
            entry["parameters"] += held.get(group.name, group.parameters if group.channels_before > 1 else 0)
    return found


def unused_options(config: CompressionConfig, groups: Sequence[GroupReport]) -> str:
    """Say which options of methods were given although none that was used asks for them; empty if there are none.

    Args:
        config: The options.
        groups: What happened to each group.
    """
    usual, used = FusionOptions(), {group.method for group in groups if group.method}
    given = [f.name for f in fields(usual) if getattr(config.fusion, f.name) != getattr(usual, f.name)]
    given = [name for name in given if name != "candidates"]
    by_weights = {word for method in used for word in METHODS if method.startswith(word)}
    if not given or not used or by_weights:
        return ""
    flags = ", ".join(flag_of(name) for name in given)
    return f"{flags} had no effect: auto chose by what the readers of each group lose; give --method intra-fusion too"


def versions() -> dict[str, str]:
    """Return the versions of onnxfuse and of everything that decides its results."""
    found = {"onnxfuse": _own_version(), "python": platform.python_version(), "onnx": onnx.__version__}
    found["numpy"] = np.__version__
    for package in ("onnxruntime-gpu", "onnxruntime", "onnx-graphsurgeon", "scipy", "pot", "scikit-learn"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _own_version() -> str:
    """Return the version of onnxfuse; a checkout on the path works without being installed."""
    try:
        return metadata.version("onnxfuse")
    except metadata.PackageNotFoundError:
        return "not installed"


def metadata_of(
    source: SourceModel, before: Cost, after: Cost, groups: Sequence[GroupReport], config: CompressionConfig
) -> dict[str, str]:
    """Return the report in short, for the model's ``metadata_props``: the same for the same input, options and seed."""
    short = {
        "parameters": [before.parameters, after.parameters],
        "macs": [before.macs, after.macs],
        "method": config.method,
        **({"target": config.target} if config.target else {"ratio": config.removed}),
        "seed": config.seed,
        "source_sha256": source.sha256,
        "groups": {
            g.name: [g.channels_before, g.channels_after] for g in groups if g.channels_after < g.channels_before
        },
    }
    return {"onnxfuse.version": _own_version(), "onnxfuse.report": json.dumps(_plain(short))}


def _plain(value: object) -> object:
    """Return what JSON can hold: no types of NumPy, no infinities, no NaN."""
    match value:
        case Mapping():
            return {str(key): _plain(member) for key, member in value.items()}
        case list() | tuple():
            return [_plain(member) for member in value]
        case np.generic():
            return _plain(value.item())
        case float():
            return value if math.isfinite(value) else str(value)
        case None | bool() | int():
            return value
        case _:
            return str(value)
