"""The bodies of If, Loop and Scan go the same road as the model around them, each as a model of its own.

A body is cut out, gets the inputs that it has when the model around it runs, is compressed and proven by itself, and is
put back. Bodies inside bodies follow by recursion. What can't be cut out or run by itself is left as it is, and the
report says why.
"""

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto

from onnxfuse.analysis import Analysis
from onnxfuse.calibration.reconstruct import Reconstruction
from onnxfuse.calibration.refit import Refit
from onnxfuse.config import CompressionConfig
from onnxfuse.errors import ConfigError, OnnxFuseError, UnsupportedGraphError
from onnxfuse.graph.bodies import Body, cut_body, splice_body, subgraphs, trip_count
from onnxfuse.graph.cost import stored_bytes
from onnxfuse.graph.shapes import Shapes, shapes_at_other_sizes
from onnxfuse.graph.unread import drop_unread
from onnxfuse.graph.view import captured_names
from onnxfuse.planning.files import Plan, PlannedGroup
from onnxfuse.planning.widths import fits, reason_to_keep
from onnxfuse.proof.bodies import body_arrays, values_around, with_output_types
from onnxfuse.proof.random_samples import candidate_dims, synthetic_samples
from onnxfuse.proof.samples import Samples
from onnxfuse.report import CompressionReport, GroupReport, InspectReport
from onnxfuse.target import Keep, Measure, Target

__all__ = [
    "Arrays",
    "Bodies",
    "BodyResult",
    "Commands",
    "Spending",
    "compress_bodies",
    "find_bodies",
    "inspect_bodies",
    "plan_bodies",
    "spend_in_bodies",
    "with_bodies",
    "with_shared_target",
]

Arrays: TypeAlias = Mapping[str, np.ndarray[Any, np.dtype[Any]]]
# How many runs of the model around them bodies are inspected on, and compressed on.
_FEW, _MANY = 8, 128


class Commands(Protocol):
    """What is done to a body, which is a model of its own, with the inputs that it gets from the model around it."""

    def inspect(self, model: onnx.ModelProto, arrays: Arrays, config: CompressionConfig) -> InspectReport:
        """Find its coupling groups."""

    def plan(self, model: onnx.ModelProto, arrays: Arrays, config: CompressionConfig) -> Plan:
        """Decide how many channels they keep."""

    def spending(self, model: onnx.ModelProto, arrays: Arrays, config: CompressionConfig) -> "Spending":
        """Find out what it costs under any budget."""

    def compress(
        self, model: onnx.ModelProto, arrays: Arrays, config: CompressionConfig, wanted: Plan | None
    ) -> tuple[onnx.ModelProto, CompressionReport]:
        """Compress it, by a plan if there is one."""


@dataclass(frozen=True)
class Spending:
    """What a model keeps, and what it costs then, if each of its graphs keeps the same share of what it costs itself.

    Attributes:
        own: For a share: what is planned for the groups of the main graph, and what that graph costs without bodies.
        bodies: The bodies in it: their names, the nodes that they belong to, how often they run, and what they cost.
    """

    own: Callable[[float], tuple[Mapping[str, PlannedGroup], float]]
    bodies: "tuple[tuple[str, int, float, Spending], ...]" = ()

    def groups(self, share: float) -> dict[str, PlannedGroup]:
        """Return what is planned for all groups, by their full names."""
        found = dict(self.own(share)[0])
        for name, _, _, inside in self.bodies:
            found |= {f"{name}/{inner}": group for inner, group in inside.groups(share).items()}
        return found

    def cost(self, share: float, measure: Measure) -> float:
        """Return what the whole model costs.

        Of the branches of an If the one that does most counts, and a body counts as often as it runs; what is stored
        counts once.
        """
        costs: dict[int, list[float]] = {}
        for _, node, times, inside in self.bodies:
            cost = inside.cost(share, measure)
            costs.setdefault(node, []).append(times * cost if measure is Measure.MACS else cost)
        together = max if measure is Measure.MACS else sum
        return self.own(share)[1] + sum(together(found) for found in costs.values())


@dataclass(frozen=True)
class BodyResult:
    """What became of one body.

    Attributes:
        body: The body as it was.
        model: What it has become; None if it was left as it is.
        groups: Its coupling groups, and those of the bodies inside it, named after node and branch.
        refits: What a refit did inside it.
        reconstructions: What a reconstruction did inside it.
        compressible: How many of its parameters follow the channels of a group that is not frozen.
        notes: What else a reader should know.
    """

    body: Body
    model: onnx.ModelProto | None
    groups: tuple[GroupReport, ...]
    refits: tuple[Refit, ...] = ()
    reconstructions: tuple[Reconstruction, ...] = ()
    compressible: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bodies:
    """The bodies of a model that have coupling groups.

    Attributes:
        results: What became of each.
        left: Why others were left as they are.
        may_change: Whether a group in them has been compressed, or may be where they are still to be.
    """

    results: tuple[BodyResult, ...] = ()
    left: tuple[str, ...] = ()
    may_change: bool = False

    @property
    def groups(self) -> tuple[GroupReport, ...]:
        """All their groups."""
        return tuple(group for result in self.results for group in result.groups)

    @property
    def refits(self) -> tuple[Refit, ...]:
        """What refits did inside them."""
        return tuple(refit for result in self.results for refit in result.refits)

    @property
    def reconstructions(self) -> tuple[Reconstruction, ...]:
        """What reconstructions did inside them."""
        return tuple(found for result in self.results for found in result.reconstructions)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know of them."""
        return (*self.left, *(note for result in self.results for note in result.notes))

    @property
    def compressible(self) -> float:
        """How many of their parameters follow the channels of a group that is not frozen."""
        return sum(result.compressible for result in self.results)


def inspect_bodies(analysis: Analysis, samples: Samples, config: CompressionConfig, commands: Commands) -> Bodies:
    """Find the coupling groups in the bodies of a model.

    Args:
        analysis: The model around them.
        samples: Inputs that it runs with.
        config: The options.
        commands: What to do with a body.
    """
    left: list[str] = []
    found = [
        _inspected(body, commands.inspect(body.model, arrays, config))
        for body, arrays in _cut_bodies(analysis, samples, config, _FEW, left)
    ]
    return Bodies(tuple(result for result in found if result.groups), tuple(left))


def find_bodies(
    analysis: Analysis, samples: Samples, config: CompressionConfig, wanted: Plan | None, commands: Commands
) -> Bodies:
    """Find the groups in the bodies of a model, without a proof, and which of them the options leave out.

    Args:
        analysis: The model around them.
        samples: Inputs that it runs with.
        config: The options.
        wanted: A plan to follow; None to go by the options.
        commands: What to do with a body.
    """
    found = inspect_bodies(analysis, samples, replace(config, prove=False), commands)
    planned = tuple(_planned(result, config) for result in found.results)
    groups = [group for result in planned for group in result.groups]
    if wanted is None:
        return Bodies(planned, found.left, any(group.frozen is None for group in groups))
    kept = {name: group.keep for name, group in wanted.groups.items()}
    return Bodies(planned, found.left, any(kept.get(g.name, g.channels_before) < g.channels_before for g in groups))


def plan_bodies(
    analysis: Analysis, samples: Samples, config: CompressionConfig, commands: Commands
) -> dict[str, PlannedGroup]:
    """Return what is planned for the groups in the bodies of a model, by their full names.

    Args:
        analysis: The model around them.
        samples: Inputs that it runs with.
        config: The options.
        commands: What to do with a body.
    """
    groups: dict[str, PlannedGroup] = {}
    for body, arrays in _cut_bodies(analysis, samples, config, _MANY, []):
        found = _planned(_inspected(body, commands.inspect(body.model, arrays, replace(config, prove=False))), config)
        groups |= {g.name: PlannedGroup(g.channels_before, g.channels_before, g.frozen) for g in found.groups}
        if any(group.frozen is None for group in found.groups):
            try:
                made = commands.plan(body.model, arrays, _own_config(body, found.groups, config))
            except UnsupportedGraphError:
                continue
            groups |= {f"{body.name}/{name}": group for name, group in made.groups.items()}
    return groups


def spend_in_bodies(
    analysis: Analysis, samples: Samples, config: CompressionConfig, commands: Commands
) -> Iterator[tuple[str, int, float, Spending]]:
    """Yield the bodies of a model with what they cost under any budget, as `Spending` has them.

    Args:
        analysis: The model around them.
        samples: Inputs that it runs with.
        config: The options, with a budget.
        commands: What to do with a body.
    """
    for body, arrays in _cut_bodies(analysis, samples, config, _MANY, []):
        found = _planned(_inspected(body, commands.inspect(body.model, arrays, replace(config, prove=False))), config)
        spending = commands.spending(body.model, arrays, _own_config(body, found.groups, config))
        yield body.name, body.node.index, trip_count(body.node, analysis.shapes), spending


def compress_bodies(
    analysis: Analysis,
    samples: Samples,
    config: CompressionConfig,
    wanted: Plan | None,
    commands: Commands,
) -> Bodies:
    """Compress the bodies of a model, each by itself.

    Args:
        analysis: The model around them.
        samples: Inputs that it runs with.
        config: The options; patterns for names of groups go by the full names, with node and branch.
        wanted: A plan to follow; None to go by the options.
        commands: What to do with a body.
    """
    results: list[BodyResult] = []
    left: list[str] = []
    own = config if wanted is None else replace(config, target="")
    for body, arrays in _cut_bodies(analysis, samples, config, _MANY, left):
        found = _planned(_inspected(body, commands.inspect(body.model, arrays, replace(config, prove=False))), config)
        if found.groups:
            part = None if wanted is None else wanted.inside(f"{body.name}/")
            results.append(_compressed(found, arrays, own, part, commands))
    return Bodies(tuple(results), tuple(left), any(result.model is not None for result in results))


def _compressed(
    found: BodyResult, arrays: Arrays, config: CompressionConfig, wanted: Plan | None, commands: Commands
) -> BodyResult:
    body = found.body
    asked = wanted is not None and any(group.keep < group.channels for group in wanted.groups.values())
    if all(group.frozen for group in found.groups) and not asked:
        return found
    try:
        model, report = commands.compress(body.model, arrays, _own_config(body, found.groups, config), wanted)
    except UnsupportedGraphError:
        return found
    except ConfigError as error:
        error.where = f"{error.where}, for {body.name}"
        raise
    except OnnxFuseError as error:
        return _left(found, f"{body.name} was left as it is: {error.what}")
    groups = _prefixed(body, report.groups)
    changed = any(group.channels_after < group.channels_before for group in groups)
    refits = tuple(replace(refit, node=f"{body.name}/{refit.node}") for refit in report.refits)
    rebuilt = tuple(replace(r, value=f"{body.name}/{r.value}") for r in report.reconstructions)
    said = tuple(f"in {body.name}: {note}" for note in report.notes)
    return BodyResult(body, model if changed else None, groups, refits, rebuilt, found.compressible, said)


def with_shared_target(config: CompressionConfig, analysis: Analysis, bodies: Bodies) -> CompressionConfig:
    """Return options whose budget is a share, which the main graph and every body can meet by itself."""
    target = Target.parse(config.target) if config.target else None
    if target is None or target.amount is None or not bodies.results:
        return config
    whole = {
        Measure.MACS: analysis.cost.macs,
        Measure.PARAMS: analysis.cost.parameters,
        Measure.BYTES: stored_bytes(analysis.graph, analysis.shapes),
    }[target.measure]
    return replace(config, target=str(Target(target.measure, min(1.0, target.amount / max(whole, 1)))))


def with_bodies(model: onnx.ModelProto, bodies: Bodies) -> onnx.ModelProto:
    """Return a model with what became of its bodies in their places; the same object where none has changed."""
    changed = [(result.body, result.model) for result in bodies.results if result.model is not None]
    if not changed:
        return model
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for body, new in changed:
        splice_body(whole, body, new)
    captured = {name for node in whole.graph.node for name in captured_names(node)}
    drop_unread(whole.graph, set().union(*(body.constants for body, _ in changed)), captured)
    return whole


def _cut_bodies(
    analysis: Analysis, samples: Samples, config: CompressionConfig, most: int, left: list[str]
) -> Iterator[tuple[Body, Arrays]]:
    """Yield every body of the graph with inputs that it runs with; say why others are left."""
    nodes = [(node, name) for node in analysis.graph.nodes for name, _ in subgraphs(node)]
    nodes = [(node, name) for node, name in nodes if _has_weights(analysis.shapes, node.index, name)]
    others = shapes_at_other_sizes(analysis.graph, analysis.input_dims) if nodes else []
    bodies = []
    for node, attribute in nodes:
        try:
            bodies.append(cut_body(analysis.graph, node, attribute, analysis.shapes, others))
        except OnnxFuseError as error:
            left.append(f"{node.name}/{attribute} was left as it is: {error.what}")
    for body in bodies:
        problem = ""
        for chosen in _choices(analysis, samples, config, most):
            try:
                constants = _constants(analysis, body)
                around = values_around(analysis.graph.model, [body], constants, chosen, config.provider, most)
                arrays = body_arrays(body, around, config.provider)
                yield with_output_types(body, arrays, config.provider), arrays
                break
            except OnnxFuseError as error:
                problem = problem or error.what
        else:
            left.append(f"{body.name} was left as it is: {problem}")


def _has_weights(shapes: Shapes, node: int, attribute: str) -> bool:
    """Whether a body, or one inside it, reads a matrix that is stored; True where that is not known."""
    body = shapes.bodies.get((node, attribute))
    if body is None:
        return True
    matrices = (t for t in body.graph.constants.values() if len(t.dims) > 1 and t.data_type != TensorProto.INT64)
    inner = [(n.index, name) for n in body.graph.nodes for name, _ in subgraphs(n)]
    return any(True for _ in matrices) or any(_has_weights(body.shapes, *place) for place in inner)


def _choices(analysis: Analysis, samples: Samples, config: CompressionConfig, most: int) -> Iterator[Samples]:
    """Yield the inputs at hand in small batches, and, as a branch may need others, other synthetic ones."""
    yield _in_small_batches(analysis, samples)
    for dims in candidate_dims(analysis.graph):
        yield _in_small_batches(analysis, synthetic_samples(analysis.graph, dims, config.seed, most))


def _in_small_batches(analysis: Analysis, samples: Samples) -> Samples:
    """Return the same samples, as many in one run as the analysis was made for."""
    batches = {dims[0] for dims in analysis.input_dims.values() if dims}
    batch = min(batches, default=samples.batch)
    if len(batches) != 1 or batch >= samples.batch or samples.batched != set(samples.arrays):
        return samples
    return replace(samples, batch=batch, dims={name: (batch, *dims[1:]) for name, dims in samples.dims.items()})


def _constants(analysis: Analysis, body: Body) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """Return what the node of a body reads that is stored in the model."""
    graph = analysis.graph
    return {name: graph.array(name) for name in body.node.inputs if name in graph.constants}


def _inspected(body: Body, found: InspectReport) -> BodyResult:
    compressible = found.compressible_share * found.cost.parameters
    notes = tuple(f"in {body.name}: {note}" for note in found.notes)
    return BodyResult(body, None, _prefixed(body, found.groups), compressible=compressible, notes=notes)


def _planned(found: BodyResult, config: CompressionConfig) -> BodyResult:
    """Note which groups the options leave out."""
    groups = [
        replace(g, frozen=g.frozen or reason_to_keep(g.name, config, residual=g.residual) or None) for g in found.groups
    ]
    return replace(found, groups=tuple(groups))


def _left(found: BodyResult, reason: str) -> BodyResult:
    groups = tuple(replace(group, frozen=group.frozen or reason) for group in found.groups)
    return replace(found, groups=groups)


def _prefixed(body: Body, groups: Sequence[GroupReport]) -> tuple[GroupReport, ...]:
    return tuple(
        replace(group, name=f"{body.name}/{group.name}", nodes=tuple(f"{body.name}/{node}" for node in group.nodes))
        for group in groups
    )


def _own_config(body: Body, groups: Sequence[GroupReport], config: CompressionConfig) -> CompressionConfig:
    """Return the options for a body, whose groups have shorter names there."""
    start = len(body.name) + 1

    def fitting(patterns: Sequence[str]) -> tuple[str, ...]:
        return tuple(glob.escape(group.name[start:]) for group in groups if fits(group.name, patterns))

    rules = [(Keep.parse(rule).pattern, rule.rpartition("=")[2]) for rule in config.keep]
    keep = tuple(f"{name}={number}" for pattern, number in rules for name in fitting([pattern]))
    return replace(config, keep=keep, only=fitting(config.only), skip=fitting(config.skip))
