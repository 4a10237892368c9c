"""Products of two computed tensors, such as queries and keys: which channels are on which side, and may they be mixed.

Scores :math:`q^T k` stay the same if queries become A q and keys :math:`B^T k` with :math:`A^T B^T = I`; with fewer
channels B rebuilds queries as :math:`B A q`, as it does for a weight that reads them. So the channels of a contraction
may be fused like any others, provided that each side is made by weights of its own and that nothing but linear maps,
alike for all channels, lies in between. The analysis as it is can't tell the sides apart: the contraction makes them
one. Hence the graph is solved a second time without that, and each side has channels of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from onnxfuse.arrays import BoolArray
from onnxfuse.coupling.constraints import AxisRef
from onnxfuse.coupling.groups import ChannelGraph, Contraction, CouplingGroup, layout_size, positions
from onnxfuse.coupling.layout import Atom, Layout, leaves
from onnxfuse.coupling.sets import places
from onnxfuse.graph.view import DEFAULT_DOMAIN, GraphView, NodeView, Operand
from onnxfuse.statistics.features import Role

__all__ = ["with_sides"]

Nodes: TypeAlias = Mapping[int, tuple[AxisRef, AxisRef]]
"""Contractions by node, each with the axes of the two tensors that have what it sums over."""

# These move numbers, and know nothing of what they are.
_MOVES = frozenset(
    {
        *("Dropout", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Shape", "Slice", "Split", "Squeeze"),
        *("Tile", "Transpose", "Unsqueeze"),
    }
)
_SUMS = frozenset({"Add", "Sub", "Sum"})
_FACTORS = frozenset({"Mul", "Div"})


def with_sides(
    graph: GraphView, found: ChannelGraph, untied: ChannelGraph, contractions: Mapping[Atom, Nodes]
) -> ChannelGraph:
    """Note what channels are contracted, and let them be mixed where the two sides can be told apart.

    Args:
        graph: The network.
        found: Its coupling groups.
        untied: The same without what contractions tie.
        contractions: What is contracted at which nodes, by the atom of a group that can't be mixed.

    Returns:
        The groups with their `CouplingGroup.contractions`; some of them without a reason not to be mixed any more.
    """
    apart = _Apart(graph, found, untied, contractions)
    return replace(found, groups=tuple(apart.told(group) for group in found.groups))


class _Apart:
    """Both solutions, and questions about them."""

    def __init__(
        self, graph: GraphView, found: ChannelGraph, untied: ChannelGraph, contractions: Mapping[Atom, Nodes]
    ) -> None:
        self.graph, self.found, self.untied, self.contractions = graph, found, untied, contractions
        self.groups = {group.atom: group for group in untied.groups}
        # By atom: where the first solution has it, and which nodes read it in the second one.
        self.operands: dict[Atom, list[Operand]] = {}
        for operand, layouts in found.layouts.items():
            for atom in dict.fromkeys(atom for layout in layouts for atom in leaves(layout)):
                self.operands.setdefault(atom, []).append(operand)
        self.readers: dict[Atom, dict[int, NodeView]] = {}
        for node in graph.nodes:
            for atom in set().union(*(self._atoms(Operand(name)) for name in node.inputs)):
                self.readers.setdefault(atom, {})[node.index] = node

    def told(self, group: CouplingGroup) -> CouplingGroup:
        """Return a group with its contractions; one that may be mixed if its channels may be."""
        nodes = self.contractions.get(group.atom, {})
        if not nodes:
            return group
        sides = self._sides(group, nodes)
        contractions = tuple(self._contraction(node, axes, sides) for node, axes in nodes.items())
        mirrored = self._mirrored(group, sides) if self._is_mixable(group, sides, nodes) else None
        if mirrored is None:
            return replace(group, contractions=contractions)
        return replace(group, unmixable="", contractions=contractions, mirrored=mirrored)

    def _is_mixable(self, group: CouplingGroup, sides: Mapping[Atom, bool], nodes: Nodes) -> bool:
        """Whether nothing but the contractions speaks against mixing the channels of each side."""
        is_made = all(p.role in {Role.PRODUCER, Role.BIAS} for p in group.parameters)
        readers = {index: node for atom in sides for index, node in self.readers.get(atom, {}).items()}
        return (
            bool(sides)
            and is_made
            and all(self._is_free(atom, group) for atom in sides)
            and all(self._is_linear(node, sides, nodes) for node in readers.values())
        )

    @staticmethod
    def _layout(channels: ChannelGraph, axis: AxisRef) -> Layout:
        return channels.layouts[axis.operand][axis.axis]

    def _sides(self, group: CouplingGroup, nodes: Nodes) -> dict[Atom, bool]:
        """Return the atoms that the group falls into, and whether each is mirrored; none if these are not two sides."""
        links: dict[Atom, set[Atom]] = {}
        for axes in nodes.values():
            left, right = (self._atom_at(group, axis) for axis in axes)
            if left is None or right is None or left is right:
                return {}
            links.setdefault(left, set()).add(right)
            links.setdefault(right, set()).add(left)
        sides: dict[Atom, bool] = {}
        for plain, _ in nodes.values():
            start = self._atom_at(group, plain)
            waiting = [] if start is None or start in sides else [(start, False)]
            while waiting:
                atom, is_mirrored = waiting.pop()
                if sides.setdefault(atom, is_mirrored) is not is_mirrored:
                    return {}
                waiting.extend((other, not is_mirrored) for other in links[atom] if other not in sides)
        is_even = all(sides[atom] is not sides[other] for atom in links for other in links[atom])
        return sides if is_even else {}

    def _atom_at(self, group: CouplingGroup, axis: AxisRef) -> Atom | None:
        """Return the atom that stands for the group's channels on an axis in the second solution."""
        where = positions(self._layout(self.found, axis), group.atom, {})
        layout = self._layout(self.untied, axis)
        for atom in dict.fromkeys(leaves(layout)):
            if atom.size == group.channels and np.array_equal(positions(layout, atom, {}), where):
                return atom
        return None

    def _is_free(self, atom: Atom, group: CouplingGroup) -> bool:
        """Whether an atom is one of channels that may be mixed, as far as all other nodes are concerned."""
        own = self.groups.get(atom)
        return (
            own is not None
            and not (own.frozen or own.unmixable or own.statistic)
            and {(p.operand, p.axis) for p in own.parameters} <= {(p.operand, p.axis) for p in group.parameters}
        )

    def _is_linear(self, node: NodeView, sides: Mapping[Atom, bool], nodes: Nodes) -> bool:
        """Whether a node that reads channels of the sides treats them all alike, and linearly."""
        touched = [bool(self._atoms(Operand(name)) & set(sides)) for name in node.inputs]
        if node.index in nodes:
            return True
        if node.domain != DEFAULT_DOMAIN or node.captured:
            return False
        if node.op in _SUMS:
            return all(
                own or bool(self._atoms(Operand(name, node.index, slot)) & set(sides))
                for slot, (name, own) in enumerate(zip(node.inputs, touched, strict=True))
            )
        if node.op in _FACTORS:
            constants = [self._atoms(Operand(name, node.index, slot)) for slot, name in enumerate(node.inputs)]
            scales = not any(atoms & set(sides) for atoms in constants)
            return scales and sum(touched) == 1 and (touched[0] or node.op == "Mul")
        return node.op in _MOVES and touched[0]

    def _atoms(self, operand: Operand) -> set[Atom]:
        return {atom for layout in self.untied.layouts.get(operand, ()) for atom in leaves(layout)}

    def _mirrored(
        self, group: CouplingGroup, sides: Mapping[Atom, bool]
    ) -> dict[tuple[Operand, int], BoolArray] | None:
        """Return for every axis with the group's channels which places are mirrored; None where that is odd."""
        found: dict[tuple[Operand, int], BoolArray] = {}
        for operand in self.operands[group.atom]:
            layouts = self.found.layouts[operand]
            for axis, layout in enumerate(layouts):
                if group.atom not in set(leaves(layout)):
                    continue
                columns = self._columns(group, operand, layouts, axis, sides)
                if columns is None:
                    return None
                found[operand, axis] = columns
        return found

    def _columns(
        self,
        group: CouplingGroup,
        operand: Operand,
        layouts: Sequence[Layout],
        axis: int,
        sides: Mapping[Atom, bool],
    ) -> BoolArray | None:
        index = places(layouts, axis, group, {}).index % layout_size(layouts[axis], {})
        told = {side: self._covered(operand, axis, sides, mirrored=side) for side in (False, True)}
        on = {side: np.isin(index, list(covered)) for side, covered in told.items()}
        is_told = bool((on[False] ^ on[True]).all()) and bool((on[True] == on[True][0]).all())
        return on[True][0] if is_told else None

    def _covered(self, operand: Operand, axis: int, sides: Mapping[Atom, bool], *, mirrored: bool) -> Iterator[int]:
        """Yield the places on an axis that belong to one side."""
        layout = self.untied.layouts[operand][axis]
        for atom, side in sides.items():
            if side is mirrored and atom in set(leaves(layout)):
                yield from positions(layout, atom, {}).ravel().tolist()

    def _contraction(self, node: int, axes: tuple[AxisRef, AxisRef], sides: Mapping[Atom, bool]) -> Contraction:
        ends = [(axis.operand.name, axis.axis) for axis in axes]
        if any(sides.get(atom, False) for atom in leaves(self._layout(self.untied, axes[0]))):
            ends.reverse()
        return Contraction(node, ends[0], ends[1])
