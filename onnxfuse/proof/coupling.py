"""The proof of the coupling on the very model at hand: permuting a group's channels must not change the outputs.

Whatever the coupling analysis inferred, a permutation of channels, applied through the same maps and edits that fusion
uses, leaves the network's function as it was if and only if every axis that follows the channels was found. So the
channels of all groups are permuted at random, the model is run, and the outputs are compared. Groups that change them
are found by bisection; they are defects of the analysis, and freezing them makes those harmless. Where the file leaves
sizes open, that is done at two choices of them: what is cut to a length, for one, may be whole at one of the two.

Where all that is on the way of a group's channels is positively homogeneous, they are then scaled at random too, which
shows in which role each weight takes part (`onnxfuse.proof.scaling`).

Outputs can be deaf: a sigmoid that saturates, a label instead of scores. So the values just before the outputs are
watched as well, and a value counts only as far as it stands out of the rounding noise, which is measured by running the
original with ONNX Runtime's optimisations, twice, and without.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnxfuse.config import Provider
from onnxfuse.coupling.groups import ChannelGraph, CouplingGroup
from onnxfuse.coupling.layout import leaves
from onnxfuse.errors import OnnxFuseError, RuntimeFailedError
from onnxfuse.graph.view import GraphView, Operand
from onnxfuse.proof.runtime import Feeds, Session

__all__ = ["Change", "CouplingProof", "prove_coupling", "watched_values"]

logger = logging.getLogger(__name__)

Change: TypeAlias = Callable[[Sequence[CouplingGroup]], onnx.ModelProto]
"""Return the model with the channels of the given groups permuted, or scaled."""

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]
# By name, and by which run.
_Outputs: TypeAlias = dict[tuple[str, int], AnyArray]

# Relative L2 difference that reordered sums may cause, by the outputs' item size in bytes: a wrong coupling is off by
# the size of the outputs themselves, rounding by a few units in the last place for each layer.
_TOLERANCE = {2: 0.1, 4: 1e-2, 8: 1e-5}
# A value that rounding alone moves by more than this is too noisy to judge by; others are given this many times more.
_NOISIEST = 0.02
_NOISE_FACTOR = 10.0
# How many nodes before an output are watched at most.
_DEPTH = 4


@dataclass(frozen=True)
class CouplingProof:
    """What the proof found.

    Attributes:
        proven: Number of groups whose channels were permuted, and scaled where that says something, without a change.
        refuted: Why a group failed, by its name.
        note: Why no proof was possible; empty if there was one.
        largest: Largest relative L2 difference of an output over the groups that are proven together.
    """

    proven: int
    refuted: dict[str, str]
    note: str = ""
    largest: float = 0.0


def watched_values(graph: GraphView, channels: ChannelGraph) -> list[str]:
    """Return values just before the graph's outputs that keep their size and order, whatever is permuted."""
    found: dict[str, None] = {}
    layer = [name for name in graph.outputs if name in graph.producers]
    for _ in range(_DEPTH):
        makers = [graph.nodes[graph.producers[name]] for name in layer]
        layer = [name for node in makers for name in node.inputs if name in graph.producers]
        found.update((name, None) for name in layer if _keeps_order(name, channels) and name not in graph.outputs)
    return list(found)


def prove_coupling(
    model: onnx.ModelProto,
    groups: Sequence[CouplingGroup],
    changes: Mapping[str, tuple[Change, Sequence[CouplingGroup]]],
    feeds: Feeds,
    watched: Sequence[str],
    provider: Provider,
    others: Iterable[Feeds] = (),
) -> CouplingProof:
    """Permute and scale the channels of groups, run, compare, and bisect out the groups that change the outputs.

    Args:
        model: The model as it is.
        groups: The groups to prove.
        changes: What is done to channels, such as "permuting", with what does it, and the groups it is done to.
        feeds: Inputs for one run.
        watched: Values to compare besides the outputs.
        provider: Where to run.
        others: Inputs of other shapes; the first of them that the model takes are for a second run.

    Returns:
        The proof; empty of refutations if the analysis is right.
    """
    if not groups:
        return CouplingProof(0, {})
    runs, expected, again, plain = _expected(model, feeds, others, watched, provider)
    # Sums that a GPU takes in whatever order its threads end differ by rounding alone, which is allowed for.
    if any(_distance(y, again[key]) > _NOISIEST for key, y in expected.items()):
        return CouplingProof(0, {}, "its outputs differ from run to run on the same inputs")
    tolerances = {key: _tolerance(y, (plain[key], again[key])) for key, y in expected.items()}
    if not any(tolerances.values()):
        return CouplingProof(0, {}, "its outputs hardly depend on the inputs, so that they would not show a change")
    refuted: dict[str, str] = {}
    largest = 0.0
    for word, (change, concerned) in changes.items():
        trial = _Trial(word, change, runs, expected, tolerances, tuple(watched), provider)
        left = [group for group in concerned if group.name not in refuted]
        refuted |= trial.bisect(left) if left else {}
        largest = max(largest, trial.largest)
    return CouplingProof(len(groups) - len(refuted), refuted, largest=largest)


def _expected(
    model: onnx.ModelProto, feeds: Feeds, others: Iterable[Feeds], watched: Sequence[str], provider: Provider
) -> tuple[Sequence[Feeds], _Outputs, _Outputs, _Outputs]:
    """Return the inputs of all runs, what the original gives on them twice, and once as it is written.

    No session stays in memory beside another.
    """
    observed, name = _with_outputs(model, watched), "the original model"
    session = Session(observed, provider, name=name)
    runs = [feeds, *islice((other for other in others if _takes(session, other)), 1)]
    twice = [_outputs(session, runs) for _ in range(2)]
    del session
    return runs, twice[0], twice[1], _outputs(Session(observed, Provider.CPU, optimise=False, name=name), runs)


def _takes(session: Session, feeds: Feeds) -> bool:
    """Whether a model runs on some inputs."""
    try:
        session.run(feeds)
    except RuntimeFailedError as error:
        logger.debug("no proof at other sizes: %s", error.what)
        return False
    return True


def _outputs(session: Session, runs: Sequence[Feeds]) -> _Outputs:
    """Return the numbers that a model gives in all runs."""
    return {(name, i): y for i, feeds in enumerate(runs) for name, y in _numeric(session.run(feeds)).items()}


@dataclass
class _Trial:
    """One model and its expected outputs, against which sets of groups are tried."""

    word: str
    change: Change
    runs: Sequence[Feeds]
    expected: _Outputs
    tolerances: Mapping[tuple[str, int], float]
    watched: tuple[str, ...]
    provider: Provider
    largest: float = 0.0

    def bisect(self, groups: list[CouplingGroup]) -> dict[str, str]:
        problem = self._problem(groups)
        if not problem:
            return {}
        if len(groups) == 1:
            return {groups[0].name: problem}
        middle = len(groups) // 2
        found = {**self.bisect(groups[:middle]), **self.bisect(groups[middle:])}
        # Each half may hold by itself and the whole may not; then the groups depend on each other in an unknown way.
        return found or {group.name: f"only together with other groups: {problem}" for group in groups}

    def _problem(self, groups: list[CouplingGroup]) -> str:
        try:
            model = _with_outputs(self.change(groups), self.watched)
            session = Session(model, self.provider, name=f"the model after {self.word} channels")
            outputs = _outputs(session, self.runs)
        except OnnxFuseError as error:
            return error.what
        largest = 0.0
        for (name, run), y in self.expected.items():
            z, where = outputs.get((name, run)), " at other sizes of the inputs" * (run > 0)
            if z is None or z.shape != y.shape:
                return f"{self.word} its channels changes the shape of {name!r}{where}"
            distance, tolerance = _distance(y, z), self.tolerances[name, run]
            if tolerance and not distance <= tolerance:
                return f"{self.word} its channels changes {name!r} by {distance:.2g} of its size{where}"
            largest = max(largest, distance if tolerance else 0.0)
        self.largest = max(self.largest, largest)
        return ""


def _tolerance(y: AnyArray, others: Sequence[AnyArray]) -> float:
    """Return the relative change that rounding may explain, by what other runs gave; 0 for what can't be judged by."""
    values = y.astype(np.float64)
    if y.size < 2 or not np.isfinite(values).all() or np.ptp(values) == 0:
        return 0.0
    noise = max(_distance(y, other) for other in others)
    if not noise <= _NOISIEST:
        return 0.0
    return max(_TOLERANCE.get(y.dtype.itemsize, 0.5), _NOISE_FACTOR * noise)


def _keeps_order(name: str, channels: ChannelGraph) -> bool:
    layouts = channels.layouts.get(Operand(name))
    return layouts is not None and all(a.reason or a.size == 1 for layout in layouts for a in leaves(layout))


def _with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    if not names:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copy


def _numeric(outputs: dict[str, Any]) -> dict[str, AnyArray]:
    return {name: y for name, y in outputs.items() if isinstance(y, np.ndarray) and y.dtype.kind in "fiubV"}


def _distance(y: AnyArray, z: AnyArray) -> float:
    """Relative L2 distance, against the outputs' own variation; 0 for equal outputs, NaN matching NaN."""
    a, b = np.nan_to_num(y.astype(np.float64)), np.nan_to_num(z.astype(np.float64))
    gap = float(np.linalg.norm(a - b))
    if gap == 0:
        return 0.0
    spread = float(np.linalg.norm(a - a.mean())) or float(np.linalg.norm(a)) or 1.0
    return gap / spread
