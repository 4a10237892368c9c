"""From solved equations to coupling groups: what is to stay is frozen, and each atom that weights make is a group."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from onnx import TensorProto

from onnxfuse.arrays import IntArray
from onnxfuse.coupling.groups import CouplingGroup, ParameterAxis, positions, product_partners
from onnxfuse.coupling.layout import Atom, Layout, Unifier, leaves
from onnxfuse.coupling.naming import group_names, producer_of
from onnxfuse.graph.shapes import Shapes
from onnxfuse.graph.view import GraphView, Operand
from onnxfuse.statistics.features import Role

__all__ = ["COARSE_TYPES", "STORED_TYPES", "WEIGHT_TYPES", "Proposal"]

WEIGHT_TYPES = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
"""What weights of floats may be stored as."""
STORED_TYPES = frozenset(
    {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32}
)
"""What a quantised weight may be stored as, with its zero point and its bias."""
COARSE_TYPES = frozenset({TensorProto.INT4, TensorProto.UINT4})
"""Too coarse for means and sums of channels, which would be rounded to one of sixteen steps again."""


class Proposal:
    """The groups of a graph whose equations are solved.

    Args:
        graph: The graph.
        shapes: Its shapes.
        unifier: Resolves layouts; atoms that have to stay are frozen in it.
        axes: What is on each axis of every operand.
        weights: The role of every axis of a weight.
        users: The name of the node that computes with each weight.
        stored: The constants that are stored as integers, or say how such are.
        spare: Layouts that are only dropped where nothing beside them can change, each with the axes that it is on.
    """

    def __init__(
        self,
        graph: GraphView,
        shapes: Shapes,
        unifier: Unifier,
        axes: Mapping[Operand, Sequence[Layout]],
        weights: Mapping[tuple[Operand, int], Role],
        users: Mapping[Operand, str],
        stored: Collection[Operand],
        spare: Sequence[tuple[Layout, Sequence[Layout]]],
    ) -> None:
        """Note what is known."""
        self.graph, self.shapes, self.unifier, self.axes = graph, shapes, unifier, axes
        self.weights, self.users, self.stored, self.spare = weights, users, stored, spare

    def groups(self) -> Iterator[CouplingGroup]:
        """Freeze what has to stay, and yield the groups in graph order."""
        members: dict[Atom, list[ParameterAxis]] = {}
        for (operand, axis), role in sorted(self.weights.items(), key=lambda item: (item[0][0].node, item[0][0].slot)):
            if not operand.is_constant:
                continue
            name = self.users[operand]
            for atom in dict.fromkeys(leaves(self.unifier.resolve(self.axes[operand][axis]))):
                members.setdefault(atom, []).append(ParameterAxis(operand, name, axis, role))
        self._freeze_unroled()
        self._freeze_odd_types()
        self._settle_spare()
        self._freeze_products(members)
        order = sorted(members, key=lambda atom: self._first(members[atom], atom))
        channels = [a for a in order if producer_of(members[a]) is not None and not a.structural]
        # What is left out: nothing makes them but the graph's inputs, or they are gates or groups, not channels.
        names = group_names(channels, members, self._positions)
        for atom in channels:
            reason = atom.reason or ("it has one channel" if atom.size == 1 else "")
            axes = tuple(members[atom])
            yield CouplingGroup(
                names[atom],
                atom.size,
                axes,
                reason,
                atom.residual,
                atom.unmixable,
                atom.statistic,
                atom,
                multiple=atom.multiple,
            )

    def _positions(self, parameter: ParameterAxis, atom: Atom) -> IntArray:
        return positions(self.unifier.resolve(self.axes[parameter.operand][parameter.axis]), atom, {})

    def _first(self, axes: Sequence[ParameterAxis], atom: Atom) -> tuple[int, int]:
        first = producer_of(axes) or axes[0]
        where = self._positions(first, atom)
        return first.operand.node, int(where.min()) if where.size else 0

    def _freeze_unroled(self) -> None:
        """Freeze atoms on an axis of a constant that no rule gave a role: nobody would resize it."""
        for operand, axes in self.axes.items():
            value = self.shapes.static.get(operand.name)
            if not operand.is_constant:
                continue
            if value is not None and value.dtype.kind in "iub" and operand not in self.stored:
                continue
            title = self.graph.nodes[operand.node].title
            for axis, layout in enumerate(axes):
                if (operand, axis) not in self.weights:
                    self.unifier.freeze(
                        layout, f"{title} reads the constant {operand.name!r} in a way that has no rule"
                    )

    def _freeze_odd_types(self) -> None:
        """Freeze what is stored in a type that weights can't be averaged in (integers, 8-bit floats)."""
        for operand, axis in self.weights:
            kinds = WEIGHT_TYPES | STORED_TYPES | COARSE_TYPES if operand in self.stored else WEIGHT_TYPES
            if operand.is_constant and self.shapes.types.get(operand.name) not in kinds:
                reason = f"{self.graph.nodes[operand.node].title} reads {operand.name!r}, which is not stored as floats"
                self.unifier.freeze(self.axes[operand][axis], reason)

    def _settle_spare(self) -> None:
        """Let go of what is spare where it is on an axis beside nothing that may change; freeze it elsewhere."""
        needed: set[Atom] = set()
        for told, axes in self.spare:
            for axis in axes:
                layout = self.unifier.resolve(axis)
                pairs = product_partners(layout)
                held = {atom for pair in pairs for atom in pair if any(self._may_change(other) for other in pair)}
                needed.update(a for a in leaves(self.unifier.resolve(told)) if a not in held)
        for atom in dict.fromkeys(a for told in self.unifier.spare for a in leaves(self.unifier.resolve(told))):
            if atom in needed and not atom.reason:
                self.unifier.mark_parallel(atom, atom.spare)
            else:
                self.unifier.freeze(atom, atom.spare, apart=True)

    @staticmethod
    def _may_change(atom: Atom) -> bool:
        return atom.size > 1 and not (atom.reason or atom.spare)

    def _title(self, operand: Operand) -> str:
        """Return what to call the node that reads a constant, or makes any other value."""
        node = operand.node if operand.is_constant else self.graph.producers.get(operand.name, -1)
        return repr(operand.name) if node < 0 else self.graph.nodes[node].title

    def _freeze_products(self, members: Mapping[Atom, Sequence[ParameterAxis]]) -> None:
        """Where two channel atoms multiply on one axis, free the larger one and keep the other.

        Halving both would take three quarters of the axis. Heads are units of their own beside what each of them has.
        """
        for operand, axes in self.axes.items():
            for axis, layout in enumerate(axes):
                if self.weights.get((operand, axis)) is Role.ENCODING:
                    # Scales of outputs x blocks in one row: no map multiplies them.
                    continue
                for a, b in product_partners(self.unifier.resolve(layout)):
                    if a.reason or b.reason or a.size == 1 or b.size == 1:
                        continue
                    if a is not b and (a.parallel or b.parallel):
                        continue
                    if a is b:
                        self.unifier.freeze(a, f"{self._title(operand)} has it times itself on one axis")
                    elif producer_of(members.get(a, ())) and producer_of(members.get(b, ())):
                        kept, other = (a, b) if a.size < b.size else (b, a)
                        reason = f"{self._title(operand)} has it times {other.size} channels, which are fused instead"
                        self.unifier.freeze(kept, reason, apart=True)
