"""What a network costs at any choice of widths, node by node."""

from collections.abc import Iterator, Mapping, Sequence

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
            for operand in self._read(node):
                first.setdefault(operand.name, node.index)
        return first

    def _operands(self, node: NodeView) -> list[Operand]:
        if self._measure is not Measure.MACS:
            return self._parameters(node)
        read = [self._graph.operand(node, slot) for slot in range(len(node.inputs))]
        read += self._put_together(node)
        return [operand for operand in (*read, *(Operand(o) for o in node.outputs if o)) if operand is not None]

    def _put_together(self, node: NodeView) -> list[Operand]:
        """Return the constants that a node reads and that the graph puts together from stored ones."""
        read = (Operand(name, node.index, slot) for slot, name in enumerate(node.inputs))
        return [o for o in read if o.name in self._shapes.fixed and o in self._channels.layouts]

    def _read(self, node: NodeView) -> list[Operand]:
        """Return the parameters that a node reads, those too that the graph puts together or turns over for it.

        What only does that with constants reads none: they count where the result is used.
        """
        readers = [self._graph.nodes[r.node] for name in node.outputs for r in self._graph.readers.get(name, ())]
        is_read = any(name in self._graph.outputs for name in node.outputs) or not readers
        if self._is_known(node) or (not is_read and all(self._is_known(reader) for reader in readers)):
            return []
        found = list(node_parameters(node, self._graph, self._shapes))
        for slot in range(len(node.inputs)):
            found.extend(self._behind(node, slot))
        return found

    def _is_known(self, node: NodeView) -> bool:
        return all(name in self._shapes.fixed for name in node.outputs if name)

    def _behind(self, node: NodeView, slot: int) -> Iterator[Operand]:
        """Yield the constants of floats that channels follow, of which a value is that is known but not stored."""
        name = node.inputs[slot]
        if name in self._graph.constants or name not in self._shapes.fixed:
            return
        if self._shapes.static[name].dtype.kind != "f":
            return
        operand = Operand(name, node.index, slot)
        if operand in self._channels.layouts:
            yield operand
            return
        maker = self._graph.nodes[self._graph.producers[name]]
        yield from node_parameters(maker, self._graph, self._shapes)
        for number in range(len(maker.inputs)):
            yield from self._behind(maker, number)

    def _parameters(self, node: NodeView) -> list[Operand]:
        return [operand for operand in self._read(node) if self._owned[operand.name] == node.index]

    def _dims(self, operand: Operand, widths: Mapping[Atom, int]) -> tuple[int, ...] | None:
        if operand in self._channels.layouts:
            return self._channels.dims(operand, widths)
        return self._shapes.dims.get(operand.name)

    def _cost(self, node: NodeView, widths: Mapping[Atom, int]) -> float:
        if self._measure is Measure.MACS:
            made = {operand.name: operand for operand in self._put_together(node)}
            return node_macs(node, self._graph, lambda o: self._dims(made.get(o.name, o), widths)) / self._batch
        total = 0.0
        for operand in self._parameters(node):
            size = 1.0
            for dim in self._dims(operand, widths) or ():
                size *= dim
            if self._measure is Measure.BYTES:
                size *= self._itemsize(operand.name)
            total += size
        return total

    def _itemsize(self, name: str) -> int:
        array = self._shapes.static[name] if name in self._shapes.fixed else self._graph.array(name)
        return array.dtype.itemsize
