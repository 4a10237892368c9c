r"""What is known of a value without a run, and how an operator's rule says what becomes of it.

A value has channels on one axis. They are taken as jointly Gaussian, with the same mean m and covariance S at every
place of the other axes (stationarity), and two places that are :math:`d_a` apart along the axes a have the covariance

.. math:: Cov(x_i(p), x_j(p + d)) = S_{ij} \prod_a \rho_a^{|d_a|}

a Markov chain along every axis, with the same correlations of neighbours for all channels. Such covariances are always
positive semidefinite, so no rule can make a variance negative. What it costs: after a convolution channels differ in
how fast they change from place to place, and have one common :math:`\rho` here (the mean, weighted by variance); the
zeros of paddings are taken for more of the same. On convolutional networks of random weights and inputs, variances five
layers deep are within a factor of 2 of those of samples, behind four residual blocks with paddings within a factor of 4
(`tests/test_analytic.py`). Without places, as in a network of matrix products, there is no such error, but sums of few
activations are not quite Gaussian: within a factor of 2 behind five residual blocks on six inputs.

Branches that meet again are not independent. So covariances between values are kept as well (`propagate`): every rule
says how a deviation of each of its inputs moves its output, by a *gain*, a linear map. For linear operators that is
exact. So it is for an activation of Gaussian channels: by Stein's lemma, Cov(f(x_i), u) = E[f'(x_i)] Cov(x_i, u) for
any u that is jointly Gaussian with x (Stein, "Estimation of the mean of a multivariate normal distribution", 1981).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from onnxfuse.arrays import FloatArray, IntArray
from onnxfuse.graph.view import DEFAULT_DOMAIN, NodeView
from onnxfuse.statistics.gaussian import Elementwise

__all__ = ["Gain", "Made", "Moments", "Rule", "Site", "Source", "Unknown", "scaled_rows", "tap_correlations"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Gain: TypeAlias = Callable[[FloatArray], FloatArray]
"""Turns Cov(x, u), shape (C, U), into Cov(y, u), shape (D, U), for any u."""

# Neighbours are never quite the same, and never quite opposite: so that powers of it tend to nothing.
_MOST_ALIKE, _LEAST_ALIKE = 1.0, -0.95


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Means and covariances of the channels of one value, the same at all places.

    Attributes:
        axis: Which axis has the channels, ``>= 0``.
        mean: m, shape (C,), float64.
        covariance: S, shape (C, C), float64, positive semidefinite.
        decay: The correlation of neighbours along every axis, -1 to 1; those of the first axis (samples) and of the
            channels' own have no meaning.
    """

    axis: int
    mean: FloatArray
    covariance: FloatArray
    decay: tuple[float, ...]

    @property
    def variance(self) -> FloatArray:
        """Variance of every channel, shape (C,)."""
        return np.maximum(np.diag(self.covariance), 0.0)

    @property
    def total(self) -> float:
        """Variance of all channels together."""
        return float(self.variance.sum())


@dataclass(frozen=True, slots=True)
class Unknown:
    """There is no rule, or none for this case.

    Attributes:
        why: The reason, which names the node.
    """

    why: str


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A value as a function of every number of another one.

    Attributes:
        name: The other value, z.
        moments: Its moments.
        nodes: The nodes between, in order; none for the value itself.
    """

    name: str
    moments: Moments
    nodes: tuple[NodeView, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """What a rule says of one output.

    Attributes:
        moments: Its moments.
        gains: By input: how the input moves it; inputs that are left out count as independent of it.
        source: What it is an elementwise function of, if not of itself.
    """

    moments: Moments
    gains: Mapping[str, Gain] = field(default_factory=dict)
    source: Source | None = None


@dataclass(frozen=True, eq=False)
class Site:
    """One node as its rule sees it.

    Attributes:
        node: The node.
        dims: Shape of every value by name.
        constants: Gives the constant of a name, of the numbers that it was stored as; None for a computed value.
        known: Moments of those inputs that have them.
        sources: What each of these is an elementwise function of.
        cross: Gives Cov(x, y) of two inputs by their names, shape (C, D).
        function: Gives f for nodes that lead from one value to another, number by number.
    """

    node: NodeView
    dims: Mapping[str, tuple[int, ...]]
    constants: Callable[[str], AnyArray | None]
    known: Mapping[str, Moments]
    sources: Mapping[str, Source]
    cross: Callable[[str, str], FloatArray]
    function: Callable[[str, str, tuple[NodeView, ...]], Elementwise]

    @property
    def x(self) -> Moments:
        """Moments of the first input; it must have them."""
        return self.known[self.name(0)]

    def name(self, slot: int) -> str:
        """Return the name of an input; empty if it is left out."""
        return self.node.inputs[slot] if slot < len(self.node.inputs) else ""

    def constant(self, slot: int) -> FloatArray | None:
        """Return an input that is a constant of floats or integers, float64; None if it is left out or computed."""
        name = self.name(slot)
        found = self.constants(name) if name else None
        return None if found is None or found.dtype.kind not in "fiu" else found.astype(np.float64)

    def dims_in(self, slot: int = 0) -> tuple[int, ...]:
        """Return the shape of an input."""
        return self.dims[self.name(slot)]

    def dims_out(self, slot: int = 0) -> tuple[int, ...]:
        """Return the shape of an output."""
        return self.dims[self.node.outputs[slot]]

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or the default."""
        return self.node.attributes.get(name, default)

    def listed(self, name: str, slot: int) -> list[int] | None:
        """Return whole numbers that are an attribute or, in later versions, an input; None if left out or computed."""
        if name in self.node.attributes:
            return [int(i) for i in np.atleast_1d(self.node.attributes[name])]
        found = self.constant(slot)
        return None if found is None else [int(i) for i in found.reshape(-1)]

    def unknown(self, why: str) -> Unknown:
        """Say that nothing is known of the outputs, and why."""
        return Unknown(f"{self.node.title}: {why}")


@dataclass(frozen=True, slots=True)
class Rule:
    """How moments pass through one operator.

    Attributes:
        op: Operator name.
        pass_on: The rule itself; asked only if every computed input has moments, unless ``restarts``.
        since: First version of the operator set that it holds for; it holds until a rule with a later one.
        domain: Operator domain.
        restarts: Whether it can say something though nothing is known of its inputs.
    """

    op: str
    pass_on: Callable[[Site], Sequence[Made] | Unknown]
    since: int = 1
    domain: str = DEFAULT_DOMAIN
    restarts: bool = False


def scaled_rows(factors: FloatArray) -> Gain:
    """Return the gain of an operator that multiplies every channel by a factor of its own."""
    return lambda cross: factors[:, None] * cross


def clipped(decay: float) -> float:
    """Return a correlation of neighbours within its bounds; 0 for one of nothing."""
    return float(np.clip(decay, _LEAST_ALIKE, _MOST_ALIKE)) if np.isfinite(decay) else 0.0


def tap_correlations(decay: Sequence[float], offsets: Sequence[IntArray], shift: Sequence[int]) -> FloatArray:
    """Return how places of one window and of another, some steps further on, are correlated.

    Args:
        decay: Correlation of neighbours along each axis.
        offsets: Where the window reads along each axis.
        shift: How much further the other window is along each axis.

    Returns:
        Shape (taps, taps), taps row-major.

    Example:
        >>> tap_correlations([0.5], [np.array([0, 1])], [0]).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    found: FloatArray = np.ones((1, 1))
    for rho, at, step in zip(decay, offsets, shift, strict=True):
        gaps = np.abs(at[:, None] - at[None, :] - step).astype(np.int64)
        found = np.kron(found, np.power(float(rho), gaps))
    return found
