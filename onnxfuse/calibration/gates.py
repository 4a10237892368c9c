"""What the gates of recurrent layers add up, which no value of the graph shows: the readers of units end in it."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from onnxfuse.arrays import FloatArray, IntArray
from onnxfuse.calibration.linear import value_readers
from onnxfuse.calibration.sums import OutputSpread
from onnxfuse.fusion.weights import WeightState
from onnxfuse.graph.view import GraphView, NodeView, Operand

__all__ = ["Gates", "gates_of"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_OPS = frozenset({"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"})
_START = 5
# Of one run so many places tell enough.
_MOST_PLACES = 4096


@dataclass(frozen=True, eq=False)
class Gates:
    """The gates of a recurrent layer: what they add up is W x + R h, of the input and of the state one step before.

    Attributes:
        inputs: The value x.
        states: The value h; its last step alone where the layer tells no other.
        reads: W, shape (D, G H, I), float64, for D directions and G gates of H units.
        recurs: R, shape (D, G H, H), float64.
        directions: For every direction whether it goes backwards.
        batch_first: Whether samples come before steps.
        bias: What is added to the gates, shape (D, 2 G H): half of it to W x, half to R h. None where there is none
            that this layer alone reads.
        forgets: How many of the last rows of R read a state of which part was forgotten before.
        has_start: Whether there is a state before the first step.
    """

    inputs: str
    states: str
    reads: FloatArray
    recurs: FloatArray
    directions: tuple[bool, ...]
    batch_first: bool
    bias: Operand | None = None
    forgets: int = 0
    has_start: bool = False

    @property
    def numbers(self) -> IntArray:
        """Return for every row of the weights which gate of which direction and unit it makes, shape (D, G H)."""
        return np.arange(self.reads.shape[0] * self.reads.shape[1]).reshape(self.reads.shape[:2])

    def add(self, spread: OutputSpread, x: AnyArray, h: AnyArray) -> None:
        """Add what the gates add up in one run, without what stays the same everywhere.

        What the state is before the first step is not asked: it counts as zero. A GRU may forget part of its state
        before it reads it, which counts as if it did not.
        """
        if h.ndim == x.ndim:
            # Nothing but the last state, which stands for all: (D, N, H), or (N, D, H).
            axis = int(self.batch_first)
            h = np.repeat(np.expand_dims(h, axis), x.shape[axis], axis)
        if self.batch_first:
            x, h = x.swapaxes(0, 1), h.transpose(1, 2, 0, 3)
        made = []
        places = x.shape[0] * x.shape[1]
        chosen = np.unique(np.linspace(0, places - 1, min(places, _MOST_PLACES)).astype(np.int64))
        for number, backwards in enumerate(self.directions):
            before = np.zeros_like(h[:, number])
            ahead, behind = slice(1, None), slice(None, -1)
            before[behind if backwards else ahead] = h[ahead if backwards else behind, number]
            read, state = (a.reshape(places, -1)[chosen].astype(np.float64) for a in (x, before))
            made.append(read @ self.reads[number].T + state @ self.recurs[number].T)
        spread.add(np.concatenate(made, axis=1))

    def shift(self, state: WeightState, missed: FloatArray, steps: int, *, recurs: bool) -> None:
        """Add to the biases what the gates miss of a mean.

        Args:
            state: The weights; changed.
            missed: Of every number that W or R reads, shape (I,) or (H,).
            steps: How many steps there are. R reads nothing in the first one if there is no state before.
            recurs: Whether it is R that reads them.
        """
        if self.bias is None:
            return
        heard = (self.recurs if recurs else self.reads) @ missed
        if recurs:
            heard *= (steps - 1 + self.has_start) / steps
            heard[:, heard.shape[1] - self.forgets :] = 0.0
        nothing = np.zeros_like(heard)
        both = np.concatenate([nothing, heard] if recurs else [heard, nothing], axis=1)
        state.replace(self.bias, state.array(self.bias) + both)


def gates_of(graph: GraphView, state: WeightState, node: NodeView) -> Gates | None:
    """Return the gates of a recurrent layer with stored weights; None for any other node.

    Args:
        graph: The network.
        state: Its weights.
        node: The node.
    """
    if node.op not in _OPS:
        return None
    weights = [graph.decoded_operand(node, slot) for slot in (1, 2)]
    states = next((name for name in node.outputs[:2] if name), "")
    if not states or any(weight is None or not weight.is_constant for weight in weights):
        return None
    reads, recurs = (state.array(weight) for weight in weights if weight is not None)
    if node.op == "DynamicQuantizeLSTM":
        reads, recurs = reads.swapaxes(1, 2), recurs.swapaxes(1, 2)
    direction = node.attributes.get("direction", b"forward")
    ways = {b"forward": (False,), b"reverse": (True,), b"bidirectional": (False, True)}[direction]
    bias = graph.operand(node, 3)
    if bias is not None and not (bias.is_constant and value_readers(graph, bias.name) == 1):
        bias = None
    forgets = 0
    if node.op == "GRU" and not node.attributes.get("linear_before_reset", 0):
        forgets = recurs.shape[2]
    first = bool(node.attributes.get("layout", 0))
    has_start = len(node.inputs) > _START and bool(node.inputs[_START])
    return Gates(node.inputs[0], states, reads, recurs, ways, first, bias, forgets, has_start)
