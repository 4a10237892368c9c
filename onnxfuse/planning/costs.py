"""What a network costs at any choice of widths, node by node."""

from collections.abc import Mapping, Sequence

from onnxfuse.coupling.groups import ChannelGraph, CouplingGroup
from onnxfuse.coupling.layout import Atom, leaves
from onnxfuse.graph.cost import node_macs, node_parameters
from onnxfuse.graph.shapes import Shapes
from onnxfuse.graph.view import GraphView, NodeView, Operand
from onnxfuse.target import Measure

__all__ = ["CostTable"]


class CostTable:
    """What a network costs at any choice of widths, node by node.

    Args:
        graph: The graph.
        shapes: Its shapes.
        channels: Its coupling.
        measure: What to count.
        batch: How many samples the shapes hold for.
    """

    def __init__(
        self, graph: GraphView, shapes: Shapes, channels: ChannelGraph, measure: Measure, batch: int = 1
    ) -> None:
        """Find for every group the nodes whose cost depends on its width."""
        self._graph, self._shapes, self._channels = graph, shapes, channels
        self._measure, self._batch = measure, batch
        self._owned = self._first_readers()
        self._touched: dict[Atom, list[NodeView]] = {}
        for node in graph.nodes:
            atoms: dict[Atom, None] = {}
            for operand in self._operands(node):
                for layout in channels.layouts.get(operand, ()):
                    atoms.update((atom, None) for atom in leaves(layout))
            for atom in atoms:
                self._touched.setdefault(atom, []).append(node)

    def total(self, widths: Mapping[Atom, int]) -> float:
        """Return the cost of the whole network once atoms have the sizes in ``widths``."""
        return sum(self._cost(node, widths) for node in self._graph.nodes)

    def saving(self, group: CouplingGroup, width: int, widths: Mapping[Atom, int]) -> float:
        """Return what the network costs less if a group goes to ``width``, the others staying at ``widths``."""
        nodes = self._touched.get(group.atom, [])
        after = {**widths, group.atom: width}
        return sum(self._cost(node, widths) for node in nodes) - sum(self._cost(node, after) for node in nodes)

    def neighbours(self, group: CouplingGroup, groups: Sequence[CouplingGroup]) -> list[int]:
        """Return the positions of the groups whose savings depend on this group's width, itself among them."""
        nodes = {node.index for node in self._touched.get(group.atom, [])}
        return [i for i, g in enumerate(groups) if any(n.index in nodes for n in self._touched.get(g.atom, []))]

    def _first_readers(self) -> dict[str, int]:
        """Count a shared constant at its first reader only."""
        first: dict[str, int] = {}
        for node in self._graph.nodes:
            for operand in node_parameters(node, self._graph, self._shapes):
                first.setdefault(operand.name, node.index)
        return first

    def _operands(self, node: NodeView) -> list[Operand]:
        if self._measure is not Measure.MACS:
            return self._parameters(node)
        read = [self._graph.operand(node, slot) for slot in range(len(node.inputs))]
        return [operand for operand in (*read, *(Operand(o) for o in node.outputs if o)) if operand is not None]

    def _parameters(self, node: NodeView) -> list[Operand]:
        read = node_parameters(node, self._graph, self._shapes)
        return [operand for operand in read if self._owned[operand.name] == node.index]

    def _dims(self, operand: Operand, widths: Mapping[Atom, int]) -> tuple[int, ...] | None:
        if operand in self._channels.layouts:
            return self._channels.dims(operand, widths)
        return self._shapes.dims.get(operand.name)

    def _cost(self, node: NodeView, widths: Mapping[Atom, int]) -> float:
        if self._measure is Measure.MACS:
            return node_macs(node, self._graph, lambda operand: self._dims(operand, widths)) / self._batch
        total = 0.0
        for operand in self._parameters(node):
            size = 1.0
            for dim in self._dims(operand, widths) or ():
                size *= dim
            if self._measure is Measure.BYTES:
                size *= self._graph.array(operand.name).dtype.itemsize
            total += size
        return total
