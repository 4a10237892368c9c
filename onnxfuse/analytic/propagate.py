"""From the inputs of a network to its outputs: moments of every value, and what values on the way have in common."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from onnx import TensorProto

from onnxfuse.analysis import Analysis
from onnxfuse.analytic.moments import Made, Moments, Rule, Site, Source, Unknown
from onnxfuse.analytic.rules import DEFAULT_RULES
from onnxfuse.arrays import FloatArray
from onnxfuse.calibration.activation_paths import ActivationPath, PathFunction
from onnxfuse.config import Provider
from onnxfuse.coupling.layout import leaves
from onnxfuse.graph.view import NodeView, Operand
from onnxfuse.statistics.gaussian import Elementwise

__all__ = ["FirstLayer", "Propagated", "first_layer", "propagate_moments", "standard_normal"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_LINEAR = frozenset({"Conv", "Gemm", "MatMul"})
# What scales and shifts what a layer computes, with constants.
_AFFINE = frozenset({"Add", "BatchNormalization", "Div", "Mul", "Sub"})
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE})
# Channels of one value: more would take gigabytes for every pair of values.
_MOST_CHANNELS = 4096


@dataclass(frozen=True, eq=False)
class Propagated:
    """What came of it.

    Attributes:
        moments: By value: of those that were asked for, as far as they are known.
        unknown: By value: why nothing is known of it.
    """

    moments: Mapping[str, Moments]
    unknown: Mapping[str, str]


def propagate_moments(
    analysis: Analysis,
    wanted: Iterable[str] | None = None,
    *,
    given: Mapping[str, Moments] | None = None,
    rules: Sequence[Rule] = DEFAULT_RULES,
) -> Propagated:
    """Work out the moments of the values of a network.

    Inputs are independent standard normal numbers where nothing else is said. They have channels on the axis that a
    weight follows.

    Args:
        analysis: The network.
        wanted: Which values to keep; all if None.
        given: Moments of inputs.
        rules: Operator rules.
    """
    state = _State(analysis, {(rule.domain, rule.op, rule.since): rule for rule in rules})
    for name in analysis.graph.inputs:
        state.enter(name, (given or {}).get(name))
    kept: dict[str, Moments] = {}
    chosen = None if wanted is None else set(wanted)
    for node in (None, *analysis.graph.nodes):
        names = tuple(analysis.graph.inputs) if node is None else node.outputs
        if node is not None:
            state.step(node)
        kept.update({n: state.moments[n] for n in names if n in state.moments and (chosen is None or n in chosen)})
        if node is not None:
            state.forget(node.index)
    return Propagated(kept, state.unknown)


def standard_normal(analysis: Analysis, name: str) -> Moments | Unknown:
    """Return the moments of an input of independent standard normal numbers.

    Args:
        analysis: The network.
        name: The input.
    """
    dims = analysis.shapes.dims.get(name, ())
    if analysis.shapes.types.get(name) not in _FLOATS or len(dims) < 2:
        return Unknown(f"input {name!r} has no channels of floats")
    axis = _input_axis(analysis, name)
    count = dims[axis]
    if count > _MOST_CHANNELS:
        return Unknown(f"input {name!r} has more than {_MOST_CHANNELS} channels")
    return Moments(axis, np.zeros(count), np.eye(count), (0.0,) * len(dims))


@dataclass(frozen=True, eq=False)
class FirstLayer:
    """What the first layer behind an input computes, z = W x + b.

    Attributes:
        axis: Which axis of the input has its channels.
        variance: Of every z if the input has independent channels of variance 1, shape (O,).
        matrix: W, summed over taps, shape (O, C); zeros where channels of places are told apart.
        bias: b, shape (O,).
    """

    axis: int
    variance: FloatArray
    matrix: FloatArray
    bias: FloatArray


def first_layer(
    analysis: Analysis, name: str, decay: float, rules: Sequence[Rule] = DEFAULT_RULES
) -> FirstLayer | None:
    """Return the first layer with weights behind an input; None where something else comes first, or a normalisation.

    Args:
        analysis: The network.
        name: The input.
        decay: The correlation of neighbouring places.
        rules: Operator rules.
    """
    graph = analysis.graph
    found = [n for n in graph.nodes if n.op in _LINEAR and any(i not in graph.constants for i in n.inputs)]
    for node in found[:1]:
        end = node
        while (reader := graph.sole_reader(end.outputs[0])) is not None and reader.op in _AFFINE:
            if not set(reader.inputs) & set(graph.constants):
                break
            end = reader
        if end.op == "BatchNormalization":
            return None
        # What is the same everywhere tells what the taps of the layer sum to.
        apart, alike = (_layer(analysis, name, end, alike, rules) for alike in (decay, 1.0))
        if apart is not None and alike is not None:
            return FirstLayer(apart[0], apart[1].variance, alike[2], apart[1].mean)
    return None


def _layer(
    analysis: Analysis, name: str, end: NodeView, decay: float, rules: Sequence[Rule]
) -> tuple[int, Moments, FloatArray] | None:
    """Return the axis of an input, the moments of a node's result, and what both have in common."""
    state = _State(analysis, {(rule.domain, rule.op, rule.since): rule for rule in rules})
    state.enter(name, None)
    if name not in state.moments:
        return None
    plain = state.moments[name]
    axis = plain.axis
    state.enter(name, Moments(axis, plain.mean, plain.covariance, (decay,) * len(plain.decay)))
    for node in analysis.graph.nodes[: end.index + 1]:
        state.step(node)
    made = state.moments.get(end.outputs[0])
    if made is None or made.total == 0:
        return None
    return axis, made, state.cross(end.outputs[0], name)


@dataclass
class _State:
    """What is known at one node: moments of the values that are still read, and covariances of pairs of them."""

    analysis: Analysis
    rules: Mapping[tuple[str, str, int], Rule]
    moments: dict[str, Moments] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    pairs: dict[tuple[str, str], FloatArray] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Find the last node that reads each value, or one that is a function of it number by number."""
        graph = self.analysis.graph
        for node in reversed(graph.nodes):
            after = max((self.last.get(name, -1) for name in node.outputs), default=-1)
            follows = len(node.outputs) == 1 and node.op not in {"Conv", "Gemm", "MatMul", "BatchNormalization"}
            for name in (n for n in node.inputs if n and n not in graph.constants):
                self.last[name] = max(self.last.get(name, -1), node.index, after if follows else -1)

    def enter(self, name: str, given: Moments | None) -> None:
        """Take a graph input."""
        found = standard_normal(self.analysis, name) if given is None else given
        if isinstance(found, Unknown):
            self.unknown[name] = found.why
        else:
            self._put(name, Made(found))

    def step(self, node: NodeView) -> None:
        """Follow one node."""
        found = self._found(node)
        if isinstance(found, Unknown):
            self.unknown.update({name: found.why for name in node.outputs if name})
            return
        for name, made in zip(node.outputs, found, strict=False):
            if not name:
                continue
            if not all(np.isfinite(a).all() for a in (made.moments.mean, made.moments.covariance)):
                self.unknown[name] = f"{node.title}: its moments are not finite"
                continue
            self._put(name, made)

    def forget(self, index: int) -> None:
        """Drop what is read no more behind a node."""
        gone = {name for name in self.moments if self.last.get(name, -1) <= index}
        for name in gone:
            del self.moments[name], self.sources[name]
        self.pairs = {pair: value for pair, value in self.pairs.items() if not gone & set(pair)}

    def _found(self, node: NodeView) -> Sequence[Made] | Unknown:
        rule = _rule(self.rules, node)
        if rule is None:
            return Unknown(f"{node.title}: there is no rule")
        constants, dims = self.analysis.graph.constants, self.analysis.shapes.dims
        computed = [name for name in node.inputs if name and name not in constants]
        missing = [n for n in computed if n not in self.moments and n not in self.analysis.shapes.static]
        if missing and not rule.restarts:
            return Unknown(self.unknown.get(missing[0], f"{node.title}: nothing is known of {missing[0]!r}"))
        if not any(name in self.moments for name in computed) and not rule.restarts:
            return Unknown(f"{node.title}: its inputs are constants")
        if any(name not in dims for name in (*computed, *(n for n in node.outputs if n))):
            return Unknown(f"{node.title}: a shape is not known")
        known = {name: self.moments[name] for name in computed if name in self.moments}
        site = Site(node, dims, self._constant, known, self.sources, self.cross, self._function)
        # What overflows is looked for afterwards.
        with np.errstate(all="ignore"):
            return rule.pass_on(site)

    def _constant(self, name: str) -> AnyArray | None:
        if name in self.analysis.graph.constants:
            return self.analysis.graph.array(name)
        return self.analysis.shapes.static.get(name)

    def _function(self, before: str, after: str, nodes: tuple[NodeView, ...]) -> Elementwise:
        return PathFunction(self.analysis, ActivationPath(before, after, nodes), Provider.CPU)

    def cross(self, left: str, right: str) -> FloatArray:
        """Return the covariance of two values that are still known."""
        if left == right:
            return self.moments[left].covariance
        if (left, right) in self.pairs:
            return self.pairs[left, right]
        if (right, left) in self.pairs:
            return self.pairs[right, left].T
        return np.zeros((len(self.moments[left].mean), len(self.moments[right].mean)))

    def _put(self, name: str, made: Made) -> None:
        """Take what a rule has made of a value, and what it has in common with all others."""
        moments = made.moments
        if len(moments.mean) > _MOST_CHANNELS:
            self.unknown[name] = f"{name!r} has more than {_MOST_CHANNELS} channels"
            return
        for other in self.moments:
            parts = [gain(self.cross(one, other)) for one, gain in made.gains.items() if self._share(one, other)]
            if parts:
                self.pairs[name, other] = np.sum(parts, axis=0)
        self.moments[name] = moments
        self.sources[name] = made.source or Source(name, moments)

    def _share(self, left: str, right: str) -> bool:
        """Whether two values have anything in common; what is gone has nothing."""
        if left not in self.moments:
            return False
        return left == right or (left, right) in self.pairs or (right, left) in self.pairs


def _rule(rules: Mapping[tuple[str, str, int], Rule], node: NodeView) -> Rule | None:
    versions = [s for d, op, s in rules if (d, op) == (node.domain, node.op) and s <= max(node.version, 1)]
    return rules[node.domain, node.op, max(versions)] if versions else None


def _input_axis(analysis: Analysis, name: str) -> int:
    """Return the axis of an input that a weight follows; the first behind the samples where none does."""
    layouts = analysis.channels.layouts
    weights = {a for operand, axes in layouts.items() if operand.is_constant for axis in axes for a in leaves(axis)}
    own = layouts.get(Operand(name), ())
    found = [axis for axis in range(1, len(own)) if set(leaves(own[axis])) & weights]
    # A lone channel in front of places is followed by nothing.
    return found[0] if found else 1
