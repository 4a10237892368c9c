"""From a model to its coupling groups: read it, fix its input shapes, infer, solve. Shared by every command."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from onnxfuse.arrays import is_finite
from onnxfuse.config import Provider
from onnxfuse.coupling.groups import ChannelGraph, CouplingGroup, positions
from onnxfuse.coupling.layout import leaves
from onnxfuse.coupling.rules import known_rules
from onnxfuse.coupling.settled_sizes import SHARED_NUMBER
from onnxfuse.coupling.solve import solve_coupling
from onnxfuse.errors import ModelError, RuntimeFailedError, UnsupportedGraphError
from onnxfuse.graph.cost import Cost, measure_cost
from onnxfuse.graph.files import SourceModel
from onnxfuse.graph.shapes import Shapes, infer_shapes
from onnxfuse.graph.targets import with_own_targets
from onnxfuse.graph.unstacking import unstacked
from onnxfuse.graph.view import GraphView
from onnxfuse.proof.random_samples import candidate_dims, samples_like, synthetic_samples
from onnxfuse.proof.runtime import Feeds, Session
from onnxfuse.proof.sameness import computes_the_same
from onnxfuse.proof.samples import Samples
from onnxfuse.proof.values import value_hints

__all__ = [
    "Analysis",
    "analyse",
    "choose_samples",
    "compressible_share",
    "cost_of",
    "enough_samples",
    "group_parameters",
    "held_parameters",
    "in_runs_that_fit",
    "more_samples",
    "takeable",
]

# The batch that shapes are inferred at where the model leaves it open.
_BATCH = 2
# How many samples show whether a model that does not take any number of them takes each.
_TRIED = 8
# How much memory the values of one run may take if none was given back before its end.
_MOST_RUN_BYTES = 2**30
# Synthetic samples of the proof: about two seconds of one core's work, so that large models are proven on fewer.
_SYNTHETIC_MACS = 20_000_000_000
_MOST_SYNTHETIC = 32

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Analysis:
    """A model with all that was inferred about it.

    Attributes:
        source: The model.
        graph: Its graph, with stacked projections cut apart (see `analyse`).
        shapes: Shapes at the smallest batch that tells the batch axis from others.
        input_dims: The input shapes that they hold for.
        channels: Its coupling groups.
        cost: What it costs for one sample.
        batch: How many samples the shapes hold for, where the model leaves the batch open.
    """

    source: SourceModel
    graph: GraphView
    shapes: Shapes
    input_dims: Mapping[str, tuple[int, ...]]
    channels: ChannelGraph
    cost: Cost
    batch: int = 1

    @property
    def sample_dims(self) -> dict[str, tuple[int, ...]]:
        """The input shapes of one sample's run."""
        is_open = _open_batches(self.graph)
        return {name: (1, *d[1:]) if self.batch > 1 and name in is_open else d for name, d in self.input_dims.items()}


def choose_samples(source: SourceModel, graph: GraphView, provider: Provider, seed: int) -> tuple[Samples | None, str]:
    """Find input shapes that the model runs with.

    Returns:
        One synthetic run, or None and the reason if the model runs with no choice that was tried.
    """
    session = Session(source.path or source.model, provider, name=f"the original model {source.name!r}")
    problem = ""
    decides = any(value_hints(graph, name).compared for name in graph.inputs)
    # Inputs that take every branch come first; a size that all of them run with may not be among those tried.
    for compared, dims in product((True, False) if decides else (False,), candidate_dims(graph)):
        # Two samples at once where the model allows it: with a batch of 1, Reshape could not be told from Squeeze.
        for count in (_BATCH, 1):
            try:
                samples = synthetic_samples(graph, dims, seed, count, compared=compared)
                for feeds in samples.feeds():
                    session.run(feeds)
            except RuntimeFailedError as error:
                problem = problem or error.what
                continue
            else:
                more = synthetic_samples(graph, dims, seed, _BATCH + 1, compared=compared)
                if count > 1 and _takes(session, more):
                    return samples, ""
                # The number of samples may be at fault, or a length that some rows of tokens are too long for.
                more = synthetic_samples(graph, dims, seed, _TRIED, compared=compared, batch=samples.batch)
                if _takes(session, more, all_runs=True):
                    return _in_runs_of(samples, count), ""
    return None, problem or "every choice of its symbolic dimensions makes inputs of over 256 MB"


def _in_runs_of(samples: Samples, count: int) -> Samples:
    """Return samples of which just so many go into a run, where any number could go by what the model states."""
    return samples.in_whole_runs(count) if samples.divisible and samples.total % count == 0 else samples


def takeable(source: SourceModel, samples: Samples, provider: Provider) -> Samples:
    """Return samples in runs that the model takes: it may state that its batch is open, and compute with one alone."""
    if not samples.divisible or samples.total < 2:
        return samples
    session = Session(source.path or source.model, provider, name=f"the original model {source.name!r}")
    if _takes(session, samples.in_batches(_BATCH + 1)):
        return samples
    for count in (1, _BATCH):
        if _takes(session, fewer := _in_runs_of(samples, count)):
            return fewer
    return samples


def _takes(session: Session, samples: Samples, *, all_runs: bool = False) -> bool:
    """Whether a model runs with some samples: those of the first run, or all."""
    try:
        for feeds in islice(samples.feeds(), None if all_runs else 1):
            session.run(feeds)
    except RuntimeFailedError as error:
        logger.debug("it does not run with %d samples at once: %s", samples.batch, error.what)
        return False
    return True


def more_samples(analysis: Analysis, samples: Samples, seed: int) -> Samples:
    """Make more synthetic samples of the same shape: as many as a few seconds of work allow, at most 32."""
    return samples_like(analysis.graph, samples, seed, enough_samples(analysis))


def enough_samples(analysis: Analysis) -> int:
    """Return how many samples a proof is run on: as many as a few seconds of work allow, at most 32."""
    return min(max(_SYNTHETIC_MACS // max(analysis.cost.macs, 1), 1), _MOST_SYNTHETIC)


def in_runs_that_fit(analysis: Analysis, samples: Samples) -> Samples:
    """Return the same samples in runs whose values are not larger than a gigabyte, if the model takes any number."""
    names = {name for node in analysis.graph.nodes for name in node.outputs if name in analysis.shapes.dims}
    sample_bytes = sum(4 * math.prod(analysis.shapes.dims[name]) for name in names) // analysis.batch
    return samples.in_batches(_MOST_RUN_BYTES // max(sample_bytes, 1))


def analyse(source: SourceModel, graph: GraphView, samples: Samples | None) -> Analysis:
    """Infer shapes and coupling of a model.

    Its graph is as in the file, but for stacked projections, which are cut apart (`onnxfuse.graph.unstacking`), and for
    target shapes that would have to be several at once (`onnxfuse.graph.targets`).

    Args:
        source: The model.
        graph: Its graph.
        samples: Inputs that it runs with; None to go by the stated shapes alone.
    """
    dims, batch = _small_dims(graph, samples) if samples else (next(candidate_dims(graph, most=math.inf)), 1)
    shapes, observed = infer_shapes(graph, dims), None
    unknown = [o for node in graph.nodes for o in node.outputs if o and o not in shapes.dims]
    if unknown and samples:
        observed = _observe(source, unknown, dims, samples)
        shapes = infer_shapes(graph, dims, observed)
    small = _small_run(dims, samples) if samples else None
    other = unstacked(graph, shapes, dims)
    if other is not None and _is_the_same(source, graph, other, small):
        graph = GraphView(other)
        shapes = infer_shapes(graph, dims, observed)
    channels = solve_coupling(graph, shapes, known_rules())
    is_shared = any(SHARED_NUMBER in group.frozen for group in channels.groups)
    other = with_own_targets(graph) if is_shared else None
    if other is not None and _is_the_same(source, graph, other, small):
        graph = GraphView(other)
        shapes = infer_shapes(graph, dims, observed)
        channels = solve_coupling(graph, shapes, known_rules())
    channels = _without_broken(graph, channels)
    cost = measure_cost(graph, shapes, lambda operand: shapes.dims.get(operand.name))
    return Analysis(source, graph, shapes, dims, channels, Cost(cost.parameters, cost.macs // batch), batch)


def _is_the_same(source: SourceModel, graph: GraphView, other: onnx.ModelProto, feeds: Feeds | None) -> bool:
    """Whether a model computes the same written in another way; where there are no samples, nothing rests on it yet."""
    return feeds is None or computes_the_same(source.name, graph.model, other, feeds)


def _small_run(dims: Mapping[str, Sequence[int]], samples: Samples) -> Feeds:
    """Return inputs of some shapes, cut out of the first samples."""
    feeds = next(samples.feeds())
    return {name: array[tuple(slice(d) for d in dims[name])] for name, array in feeds.items()}


def cost_of(model: onnx.ModelProto, original: Analysis, known: Mapping[str, Sequence[int]] | None = None) -> Cost:
    """Return what one sample's run of a model costs.

    Args:
        model: The model.
        original: The analysis of a model with the same inputs.
        known: Shapes of computed values that inference may not be able to tell, at the batch of ``original``.
    """
    graph = GraphView(model)
    shapes = infer_shapes(graph, original.input_dims, known)
    cost = measure_cost(graph, shapes, lambda operand: shapes.dims.get(operand.name))
    return Cost(cost.parameters, cost.macs // original.batch)


def group_parameters(analysis: Analysis, group: CouplingGroup) -> int:
    """Return how many parameters follow the channels of a group (some may follow another group as well)."""
    total = 0
    counted: set[tuple[str, int]] = set()
    for parameter in group.parameters:
        name = parameter.operand.name
        if (name, parameter.axis) in counted:
            continue
        counted.add((name, parameter.axis))
        layout = analysis.channels.layouts[parameter.operand][parameter.axis]
        dims = analysis.shapes.dims[name]
        share = positions(layout, group.atom, {}).size / max(dims[parameter.axis], 1)
        total += round(share * float(np.prod(dims, dtype=np.float64)))
    return total


def held_parameters(analysis: Analysis) -> dict[str, int]:
    """Return how many parameters stay because a frozen group does, by its name; none is counted twice for one reason.

    What another group that may change has on the same axis goes with that, as the channels of each head do, or of each
    group of a normalisation, whose number stays.
    """
    free = {group.atom for group in analysis.channels.groups if not group.frozen}
    claimed: dict[tuple[str, str], np.ndarray[Any, np.dtype[np.bool_]]] = {}
    held = {}
    for group in (group for group in analysis.channels.groups if group.frozen):
        held[group.name] = 0
        # Where there is a single channel none could go, so that it stays costs no parameters.
        for parameter in group.parameters if group.channels > 1 else ():
            name = parameter.operand.name
            layout = analysis.channels.layouts[parameter.operand][parameter.axis]
            ours = np.zeros(analysis.shapes.dims[name][parameter.axis], bool)
            ours[positions(layout, group.atom, {}).ravel()] = True
            for atom in free.intersection(leaves(layout)):
                ours[positions(layout, atom, {}).ravel()] = False
            seen = claimed.setdefault((group.frozen, name), np.zeros(analysis.shapes.dims[name], bool))
            rows = np.moveaxis(seen, parameter.axis, 0)
            held[group.name] += int((~rows[ours]).sum())
            rows[ours] = True
    return held


def compressible_share(analysis: Analysis) -> float:
    """Return the share of the parameters that follow the channels of some group that is not frozen, 0 to 1."""
    free: dict[str, np.ndarray[Any, np.dtype[np.bool_]]] = {}
    for group in analysis.channels.groups:
        for parameter in () if group.frozen else group.parameters:
            name = parameter.operand.name
            layout = analysis.channels.layouts[parameter.operand][parameter.axis]
            dims = analysis.shapes.dims[name]
            touched = free.setdefault(name, np.zeros(dims, bool))
            np.moveaxis(touched, parameter.axis, 0)[positions(layout, group.atom, {}).ravel()] = True
    statistics = {n.inputs[slot] for n in analysis.graph.nodes if n.op == "BatchNormalization" for slot in (3, 4)}
    total = sum(int(t.sum()) for name, t in free.items() if name in analysis.graph.constants and name not in statistics)
    return (total + _put_together(analysis, free)) / max(analysis.cost.parameters, 1)


def _put_together(analysis: Analysis, free: Mapping[str, np.ndarray[Any, np.dtype[np.bool_]]]) -> int:
    """Count the parameters of which the graph puts weights together, as exporters do for recurrent layers."""
    graph = analysis.graph
    counted = {name for name in free if name in graph.constants}
    total = 0
    for name in (name for name in free if name not in graph.constants):
        sources = _sources(graph, name) - counted
        counted |= sources
        total += min(int(free[name].sum()), sum(math.prod(graph.constants[source].dims) for source in sources))
    return total


def _sources(graph: GraphView, name: str) -> set[str]:
    """Return the constants of floats that a value is made of."""
    found: set[str] = set()
    names, seen = [name], {name}
    while names:
        name = names.pop()
        if name in graph.constants and graph.constants[name].data_type in _FLOATS:
            found.add(name)
        node = graph.producers.get(name)
        for read in graph.nodes[node].inputs if node is not None else ():
            if read and read not in seen:
                seen.add(read)
                names.append(read)
    return found


def _without_broken(graph: GraphView, channels: ChannelGraph) -> ChannelGraph:
    """Freeze the groups with weights that are NaN or infinite, or make such: no mean of these means anything."""
    used = _weight_names(graph, channels)
    broken = {n: "has values that are NaN or infinite" for n in used if not is_finite(graph.array(n)).all()}
    broken |= dict.fromkeys(_negative_variances(graph) & used, "is a variance, and has negative values")
    groups = []
    for group in channels.groups:
        names = [p.operand.name for p in group.parameters if p.operand.name in broken]
        reason = f"weight {names[0]!r} {broken[names[0]]}" if names else ""
        groups.append(replace(group, frozen=group.frozen or reason) if reason else group)
    return replace(channels, groups=tuple(groups))


def _negative_variances(graph: GraphView) -> set[str]:
    """Return the variances of batch normalisations of which there is no root."""
    norms = [n for n in graph.nodes if n.op == "BatchNormalization" and n.inputs[4:]]
    return {
        n.inputs[4]
        for n in norms
        if n.inputs[4] in graph.constants
        and (graph.array(n.inputs[4]).astype(np.float64) + float(n.attributes.get("epsilon", 1e-5)) < 0).any()
    }


def _weight_names(graph: GraphView, channels: ChannelGraph) -> set[str]:
    """The constants that groups which are not frozen would change."""
    free = (p.operand.name for group in channels.groups if not group.frozen for p in group.parameters)
    return {name for name in free if name in graph.constants}


def _open_batches(graph: GraphView) -> set[str]:
    """Return the inputs whose first dimension the file leaves open."""
    found = set()
    for name, info in graph.inputs.items():
        stated = info.type.tensor_type.shape.dim
        if stated and not (stated[0].HasField("dim_value") and stated[0].dim_value > 0):
            found.add(name)
    return found


def _small_dims(graph: GraphView, samples: Samples) -> tuple[dict[str, tuple[int, ...]], int]:
    """Return the input shapes of a small run, and its batch; an open batch is made as small as is instructive."""
    is_open = _open_batches(graph) & samples.batched
    batch = min(samples.batch, _BATCH) if is_open == set(samples.arrays) else 1
    return {name: (batch, *dims[1:]) if name in is_open else dims for name, dims in samples.dims.items()}, batch


def _observe(
    source: SourceModel,
    unknown: Sequence[str],
    dims: Mapping[str, Sequence[int]],
    samples: Samples,
) -> dict[str, tuple[int, ...]]:
    """Run the model once with the values of unknown shape as extra outputs, and read their shapes."""
    model = onnx.ModelProto()
    model.CopyFrom(source.model)
    stated = {o.name for o in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in unknown if name not in stated)
    single = _small_run(dims, samples)
    try:
        session = Session(model, Provider.CPU, optimise=False, name=f"the original model {source.name!r}")
        results = session.run(single)
    except (RuntimeFailedError, ModelError, UnsupportedGraphError) as error:
        logger.debug("shapes could not be observed: %s", error.what)
        return {}
    return {n: r.shape for n, r in results.items() if isinstance(r, np.ndarray) and n in set(unknown)}
