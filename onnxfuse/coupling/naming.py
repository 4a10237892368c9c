"""What coupling groups are called."""

from collections.abc import Callable, Mapping, Sequence

from onnxfuse.arrays import IntArray
from onnxfuse.coupling.groups import ParameterAxis
from onnxfuse.coupling.layout import Atom
from onnxfuse.statistics.features import Role

__all__ = ["group_names", "producer_of"]


def group_names(
    channels: Sequence[Atom],
    members: Mapping[Atom, Sequence[ParameterAxis]],
    positions_of: Callable[[ParameterAxis, Atom], IntArray],
) -> dict[Atom, str]:
    """Name atoms after the node that makes them, with their range where it makes several, all names different.

    Factors of one axis, such as channels and positions after a Flatten, have one range: those that may change are
    named first, the others are numbered.

    Args:
        channels: The atoms, in order.
        members: Where each occurs.
        positions_of: Gives the indices of an axis that belong to an atom.
    """
    ranges: dict[str, dict[Atom, str]] = {}
    for atom in channels:
        first = producer_of(members[atom]) or members[atom][0]
        where = positions_of(first, atom)
        ranges.setdefault(_name(members[atom]), {})[atom] = f":{where.min()}-{where.max() + 1}"
    names: dict[Atom, str] = {}
    taken: dict[str, int] = {}
    for name, parts in ranges.items():
        several = len(set(parts.values())) > 1
        for atom in sorted(parts, key=lambda atom: bool(atom.reason)):
            full = name + parts[atom] * several
            taken[full] = taken.get(full, 0) + 1
            names[atom] = full if taken[full] == 1 else f"{full}#{taken[full]}"
    return names


def producer_of(axes: Sequence[ParameterAxis]) -> ParameterAxis | None:
    """Return the first axis on which channels are made; None if none makes them."""
    return next((p for p in axes if p.role is Role.PRODUCER), None)


def _name(axes: Sequence[ParameterAxis]) -> str:
    first = producer_of(axes)
    return "" if first is None else first.node
