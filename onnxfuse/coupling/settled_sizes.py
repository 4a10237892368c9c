"""Sizes that a network states: which of them follow when channels go, and what has to stay where one can't.

A size is an attribute, a number in a constant shape, or one that is computed from a number in the file. Where nothing
else depends on that number it is rewritten; where a computed shape can be a constant instead, it becomes one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

from onnxfuse.coupling.groups import SizeEntry
from onnxfuse.coupling.layout import Layout, LayoutMismatchError, Unifier
from onnxfuse.coupling.shape_values import Origin, ShapeTrace, SizeOf, Stated, trace_shape_values
from onnxfuse.coupling.target_shapes import Int64Array, constant_target
from onnxfuse.graph.shapes import Shapes
from onnxfuse.graph.view import GraphView, NodeView, Operand

__all__ = ["SHARED_NUMBER", "SizeSettler"]

SHARED_NUMBER = "has other uses"
"""How the reason ends for which a size stays whose number in the file states another size too."""


class SizeSettler:
    """Settles the sizes of one network, whose equations are all solved.

    Args:
        graph: The network.
        shapes: Its shapes.
        unifier: What has solved the equations; freezes more where a size can't follow.
        axes: The layouts of every operand.
        operand_of: Gives the operand that a node reads at a slot.
    """

    def __init__(
        self,
        graph: GraphView,
        shapes: Shapes,
        unifier: Unifier,
        axes: Mapping[Operand, Sequence[Layout]],
        operand_of: Callable[[NodeView, int], Operand],
    ) -> None:
        """Start with no constants for target shapes."""
        self.graph = graph
        self.shapes = shapes
        self.unifier = unifier
        self.axes = axes
        self.operand_of = operand_of
        self.targets: dict[tuple[int, int], Int64Array | None] = {}

    def settle(self, sizes: Sequence[SizeEntry]) -> tuple[list[SizeEntry], dict[tuple[int, int], Int64Array]]:
        """Decide for every stated size whether it can be rewritten; freeze what it states where it can't.

        Args:
            sizes: What nodes state, as the rules say.

        Returns:
            The sizes that follow the channels, each with the number in the file behind it; and constants that stand for
            computed target shapes, by node and slot.
        """
        trace = trace_shape_values(self.graph, self.shapes)
        self._tie_filled(sizes, trace)
        for origin, title in trace.used.items():
            if isinstance(origin, SizeOf) and origin.operand in self.axes:
                self.unifier.freeze(self.axes[origin.operand][origin.axis], f"{title} computes with its size")
        stated = {(entry.node, entry.slot, entry.index): entry for entry in sizes if not entry.attribute}
        for origin, places in trace.readers.items():
            loose = [self.graph.nodes[place[0]].title for place in places if place not in stated]
            if loose and isinstance(origin, SizeOf) and origin.operand in self.axes:
                self.unifier.freeze(self._axis(origin), f"{loose[0]} takes a bound from its size")
        settled = []
        for entry in sizes:
            if (
                entry.attribute
                or self.operand_of(self.graph.nodes[entry.node], entry.slot).is_constant
                or self._has_target(entry, trace)
            ):
                settled.append(entry)
            else:
                settled.extend(self._settle_computed(entry, trace, stated))
        return settled, {key: target for key, target in self.targets.items() if target is not None}

    def _tie_filled(self, sizes: Sequence[SizeEntry], trace: ShapeTrace) -> None:
        """Let axes of what is filled with one value follow those whose sizes are read for them, as zeros like x do."""
        for entry in sizes:
            node = self.graph.nodes[entry.node]
            size = self._made_of(entry, trace)
            if self._is_filled(node, entry) and isinstance(size, SizeOf) and size.operand in self.axes:
                # Where the two can't be one, each keeps its size.
                with suppress(LayoutMismatchError):
                    self.unifier.equate(self._axis(size), entry.layout)

    def _is_filled(self, node: NodeView, entry: SizeEntry) -> bool:
        """Whether a size is that of an axis along which all is the same: of one number, or of copies."""
        if node.domain or node.op != "Expand" or entry.index is None:
            return not node.domain and node.op == "ConstantOfShape"
        target, x = (self.shapes.dims[node.inputs[slot]] for slot in (1, 0))
        behind = target[0] - entry.index
        return behind > len(x) or x[-behind] == 1

    def _made_of(self, entry: SizeEntry, trace: ShapeTrace) -> Origin:
        """Return where a stated size that is the element of an input comes from; None if it is computed."""
        inputs = self.graph.nodes[entry.node].inputs
        table = trace.origins.get(inputs[entry.slot]) if 0 <= entry.slot < len(inputs) else None
        found: Origin = None if table is None or entry.index is None else table.ravel().tolist()[entry.index]
        return found

    def _has_target(self, entry: SizeEntry, trace: ShapeTrace) -> bool:
        """Whether the node that reads a computed target shape can get a constant instead; the constant is noted.

        What the constant copies from the input or leaves open follows by itself, however the size was computed.
        """
        key = entry.node, entry.slot
        if key not in self.targets:
            node = self.graph.nodes[entry.node]
            name, x, y = node.inputs[entry.slot], self.operand_of(node, 0), Operand(node.outputs[0])
            self.targets[key] = None
            if name in trace.origins and name in self.shapes.static:
                self.targets[key] = constant_target(
                    node,
                    trace.origins[name].ravel().tolist(),
                    self.shapes.static[name].ravel().tolist(),
                    (self.shapes.dims[x.name], self.shapes.dims[y.name]),
                    lambda i: self._equal(self.axes[x][i], self.axes[y][i]),
                )
        return self.targets[key] is not None and entry.index is not None

    def _settle_computed(
        self, entry: SizeEntry, trace: ShapeTrace, stated: Mapping[tuple[int, int, int | None], SizeEntry]
    ) -> Iterator[SizeEntry]:
        """Find the number in the file behind a computed size, if nothing else depends on it."""
        node = self.graph.nodes[entry.node]
        made_of = self._made_of(entry, trace)
        if isinstance(made_of, Stated) and made_of not in trace.used:
            yield SizeEntry(made_of.node, entry.layout, "", made_of.slot, made_of.index, entry.scale)
            others = [stated.get(place) for place in trace.readers.get(made_of, ())]
            if not all(other is not None and self._same(other, entry) for other in others):
                self.unifier.freeze(entry.layout, f"the number that {node.title} takes its size from {SHARED_NUMBER}")
            return
        # A value that shapes are computed from, such as a table of positions, has no channels: its sizes stay.
        axis = self._axis(made_of) if isinstance(made_of, SizeOf) and made_of.operand in self.axes else None
        if axis is None or not self._equal(axis, entry.layout):
            self.unifier.freeze(entry.layout, f"{node.title} takes its size from a computation")
            if axis is not None:
                self.unifier.freeze(axis, f"{node.title} takes the size of another axis from it")

    def _axis(self, size: SizeOf) -> Layout:
        return self.axes[size.operand][size.axis]

    def _same(self, left: SizeEntry, right: SizeEntry) -> bool:
        return left.scale == right.scale and self._equal(left.layout, right.layout)

    def _equal(self, left: Layout, right: Layout) -> bool:
        return self.unifier.resolve(left) == self.unifier.resolve(right)
