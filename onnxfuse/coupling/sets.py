"""Sets of channels: where a group's channels exist once for every index of other atoms, each may have a map of its own.

The channels inside the groups of a grouped convolution are one atom, *channels of a group*, beside another, *groups*:
the same number of channels stays in every group. Which ones stay, or are merged, need not be the same, as long as
nothing ties a channel of one group to that of another. That is so if every value in which the channels occur has its
own number for every group, in its own place, and nothing computes across groups. So each index of the groups has a
*set* of channels; the axes that tell the sets apart and the one that has the channels are looked at as one axis.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias, TypeVar

import numpy as np

from onnxfuse.arrays import IntArray
from onnxfuse.coupling.groups import CouplingGroup, layout_size, positions
from onnxfuse.coupling.layout import Atom, Layout, leaves
from onnxfuse.graph.view import Operand

__all__ = ["Places", "SetFinder", "has_sets_elsewhere", "places", "sets_first"]

Layouts: TypeAlias = Sequence[Layout]
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Places:
    """Where all channels of a group are in an array.

    Attributes:
        axes: The axes that are looked at as one, row-major, the one with the channels last; often that one alone.
        index: Shape (S C, m), int64: the places of every channel on that one axis, set by set.
    """

    axes: tuple[int, ...]
    index: IntArray


def places(
    layouts: Layouts, axis: int, group: CouplingGroup, widths: Mapping[Atom, int], kept: int | None = None
) -> Places:
    """Return where the channels of a group are that lie on one axis of an array.

    Args:
        layouts: The resolved layouts of all axes of the array.
        axis: The axis.
        group: The group.
        widths: Present sizes of atoms that differ from their original ones.
        kept: How many channels each set has on this axis, if that is about to change.

    Returns:
        Axes and places; for a group of one set as `positions` has them.

    Example:
        >>> from onnxfuse.coupling.layout import Product
        >>> groups, inside = Atom(2), Atom(3)
        >>> group = CouplingGroup("", 3, (), "", False, "", "", inside, (groups,))
        >>> outputs = Product((groups, Atom(2)))
        >>> places((outputs, inside), 1, group, {}).index.tolist()
        [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]
    """
    own = {**widths, group.atom: widths.get(group.atom, group.atom.size) if kept is None else kept}
    if not group.over:
        return Places((axis,), positions(layouts[axis], group.atom, own))
    others = [i for i, layout in enumerate(layouts) if i != axis and set(group.over) & set(leaves(layout))]
    sizes = [layout_size(layouts[i], widths) for i in others]
    columns = positions(layouts[axis], group.atom, own)
    # The set of every column, by what the axis with the channels says and what the other axes do.
    labels = _labels(layouts[axis], group.over, own)[columns[0]]
    for i in reversed(others):
        labels = (_labels(layouts[i], group.over, widths)[:, None] + labels).ravel()
    outer = np.arange(int(np.prod(sizes, dtype=np.int64)), dtype=np.int64)
    # (C, columns) -> (C, outer x columns)
    whole = (outer[:, None] * layout_size(layouts[axis], own) + columns[:, None, :]).reshape(len(columns), -1)
    sets = int(np.prod([widths.get(atom, atom.size) for atom in group.over]))
    by_set = whole[:, np.argsort(labels, kind="stable")].reshape(len(columns), sets, -1)
    index = by_set.transpose(1, 0, 2).reshape(sets * len(columns), -1)
    return Places((*others, axis), index)


def has_sets_elsewhere(layouts: Layouts, axis: int, group: CouplingGroup) -> bool:
    """Whether what tells a group's sets apart is not all on the axis that has the channels."""
    return not set(group.over) <= set(leaves(layouts[axis]))


def sets_first(items: Iterable[_Item], group_of: Callable[[_Item], CouplingGroup]) -> list[_Item]:
    """Return items in an order in which no group changes before one whose sets it tells apart, stable otherwise.

    Args:
        items: Anything that is about a group each.
        group_of: Gives the group.
    """
    found = list(items)
    tellers = {atom for item in found for atom in group_of(item).over}
    return sorted(found, key=lambda item: group_of(item).atom in tellers)


def _labels(layout: Layout, over: Sequence[Atom], widths: Mapping[Atom, int]) -> IntArray:
    """Return for every index of an axis what it adds to the number of the set; sets are numbered row-major."""
    labels = np.zeros(layout_size(layout, widths), np.int64)
    inside, step = set(leaves(layout)), 1
    for atom in reversed(over):
        if atom in inside:
            for number, where in enumerate(positions(layout, atom, widths)):
                labels[where] += step * number
        step *= widths.get(atom, atom.size)
    return labels


class SetFinder:
    """Finds the atoms that tell sets of channels apart.

    Args:
        layouts: The resolved layouts of every operand.
        apart: Atoms of which it was said that what is computed for one index depends on no other.
    """

    def __init__(self, layouts: Mapping[Operand, Layouts], apart: Iterable[Atom]) -> None:
        """Note which atoms may tell sets apart, and where all atoms are."""
        self._layouts = layouts
        self._fit: frozenset[Atom] = frozenset()
        told = [atom for atom in apart if _may_tell(atom)]
        if not told:
            return
        self._atoms = {operand: frozenset(chain(*map(leaves, axes))) for operand, axes in layouts.items()}
        self._holders: dict[Atom, list[Operand]] = {}
        for operand, atoms in self._atoms.items():
            for atom in atoms:
                self._holders.setdefault(atom, []).append(operand)
        self._fit = frozenset(atom for atom in told if atom in self._holders and self._has_one_axis(atom))

    def _has_one_axis(self, atom: Atom) -> bool:
        """Whether an atom is on one axis of every operand; a matrix with two may mix its indices."""
        return all(
            sum(atom in set(leaves(layout)) for layout in self._layouts[operand]) == 1
            for operand in self._holders[atom]
        )

    def over(self, atom: Atom) -> tuple[Atom, ...]:
        """Return the atoms that tell apart the sets of channels that ``atom`` stands for, in the order of the graph."""
        if not self._fit or atom.parallel:
            return ()
        holders, common = self._holders.get(atom, []), self._fit - {atom}
        for operand in holders:
            common &= self._atoms[operand]
            if not common:
                return ()
        order = dict.fromkeys(a for operand in holders for layout in self._layouts[operand] for a in leaves(layout))
        found = tuple(a for a in order if a in common and all(self._tells(a, atom, self._layouts[o]) for o in holders))
        return found if all(self._is_even(found, atom, operand) for operand in holders) else ()

    @staticmethod
    def _tells(teller: Atom, atom: Atom, layouts: Layouts) -> bool:
        """Whether every number that belongs to a channel belongs to one index of ``teller`` too, in one operand."""
        place = next(i for i, layout in enumerate(layouts) if teller in set(leaves(layout)))
        told = np.zeros(layout_size(layouts[place], {}), np.int64)
        np.add.at(told, positions(layouts[place], teller, {}).ravel(), 1)
        for axis, layout in enumerate(layouts):
            if atom in set(leaves(layout)):
                seen = told[positions(layout, atom, {}).ravel()] if axis == place else told
                if not (seen == 1).all():
                    return False
        return True

    def _is_even(self, over: Sequence[Atom], atom: Atom, operand: Operand) -> bool:
        """Whether each set has as many numbers for a channel, and all channels of a set lie alike."""
        layouts = self._layouts[operand]
        axes = [i for i, layout in enumerate(layouts) if atom in set(leaves(layout))]
        if len(axes) > 1 and not operand.is_constant:
            return False
        sets = int(np.prod([a.size for a in over]))
        for axis in axes:
            columns = _labels(layouts[axis], over, {})[positions(layouts[axis], atom, {})]
            others = (_labels(layouts[i], over, {}) for i in range(len(layouts)) if i != axis)
            labels = columns[0]
            for other in others:
                values, repeats = np.unique(other, return_counts=True)
                labels = (values[:, None] + labels).ravel()
                if len(set(repeats.tolist())) > 1:
                    return False
            counts = np.bincount(labels, minlength=sets)
            if not (columns == columns[0]).all() or len(counts) != sets or len(set(counts.tolist())) > 1:
                return False
        return True


def _may_tell(atom: Atom) -> bool:
    """Whether nothing speaks against that an atom tells sets apart."""
    return atom.size > 1 and not (atom.entangled or atom.statistic) and bool(atom.reason or atom.parallel)
