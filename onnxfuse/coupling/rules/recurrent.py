"""LSTM, GRU and RNN: one hidden size H for all gates and directions.

The weights stack the gates: W (D, gates x H, I), R (D, gates x H, H), B (D, 2 gates x H), P (D, 3 x H). A hidden unit
is one index of H in every gate, so the gates are a fixed outer factor and the units the atom that can shrink.
"""

from collections.abc import Iterator, Sequence

from onnxfuse.coupling.constraints import (
    AttributeSize,
    AxisRef,
    Constraint,
    Equal,
    Freeze,
    Fresh,
    Rule,
    Site,
    Weight,
    prod,
)
from onnxfuse.statistics.features import Role

__all__ = ["RULES", "recurrent_layer"]

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_PEEPHOLES = 3
_SEQUENCE_LENGTHS = 4


def recurrent(site: Site) -> Iterator[Constraint]:
    """LSTM, GRU, RNN in every direction; both layouts."""
    w, r = site.input(1), site.input(2)
    yield from recurrent_layer(site, w.axes, r.axes, r.dims[2], _GATES[site.node.op])


def recurrent_layer(
    site: Site, w: Sequence[AxisRef], r: Sequence[AxisRef], size: int, gates: int
) -> Iterator[Constraint]:
    """A recurrent layer, whatever the order of its weights' axes.

    Args:
        site: The node.
        w: The axes of the weight that reads the input: directions, gates x units, inputs.
        r: The axes of the one that reads the hidden state: directions, gates x units, units.
        size: The number of units.
        gates: The number of gates.
    """
    x, y = site.input(0), site.outputs
    units = Fresh(size, "hidden units")
    stacked = prod(_count(gates, "gates"), units)
    yield Equal(w[1], stacked)
    yield Equal(r[1], stacked)
    yield Equal(r[2], units)
    yield Equal(x[2], w[2])
    yield AttributeSize("hidden_size", units)
    yield Weight(w[1], Role.PRODUCER)
    yield Weight(w[2], Role.CONSUMER)
    yield Weight(r[1], Role.PRODUCER)
    yield Weight(r[2], Role.CONSUMER)
    bias = site.optional_input(3)
    if bias is not None:
        yield Equal(bias[1], prod(_count(2 * gates, "biases of the gates"), units))
        yield Weight(bias[1], Role.BIAS)
    for slot in (5, 6):
        state = site.optional_input(slot)
        if state is not None:
            yield Equal(state[2], units)
            if state.is_weight:
                yield Weight(state[2], Role.BIAS)
            yield from (Freeze(axis, f"directions and batch of {site.node.title}") for axis in state.axes[:2])
    peepholes = site.optional_input(7)
    if peepholes is not None:
        yield Equal(peepholes[1], prod(_count(_PEEPHOLES, "peepholes"), units))
        yield Weight(peepholes[1], Role.CARRIED)
    for output in y:
        if output is not None:
            yield Equal(output[-1], units)
            yield from (Freeze(axis, f"time, directions and batch of {site.node.title}") for axis in output.axes[:-1])
    fixed = [*x.axes[:2], w[0], r[0], *([bias[0]] if bias else []), *([peepholes[0]] if peepholes else [])]
    lengths = site.optional_input(_SEQUENCE_LENGTHS)
    fixed += lengths.axes if lengths is not None else ()
    yield from (Freeze(axis, f"time, directions and batch of {site.node.title}") for axis in fixed)
    if not (site.input(1).is_weight and site.input(2).is_weight and (bias is None or bias.is_weight)):
        for axis in (x[2], w[1], r[2]):
            yield Freeze(axis, f"the weights of {site.node.title} are computed at run time")


def _count(size: int, label: str) -> Fresh:
    return Fresh(size, label, f"the number of {label} is given by the operator")


RULES = tuple(Rule(op, recurrent) for op in _GATES)
