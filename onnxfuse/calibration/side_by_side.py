"""The original and the compressed network on the same samples, side by side, from front to back."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from onnxfuse.analysis import Analysis
from onnxfuse.calibration.batches import for_samples
from onnxfuse.calibration.linear import LinearNode, linear_nodes
from onnxfuse.calibration.walk import Walk
from onnxfuse.config import Provider
from onnxfuse.coupling.layout import Layout, leaves
from onnxfuse.coupling.sets import has_sets_elsewhere
from onnxfuse.fusion.rewrite import collect_edits
from onnxfuse.fusion.values import Applied, fused_values
from onnxfuse.fusion.weights import WeightState
from onnxfuse.graph.edits import apply_edits
from onnxfuse.graph.view import BIAS_SLOTS, Operand
from onnxfuse.proof.samples import Samples

__all__ = ["SideBySide"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class SideBySide:
    """Both networks on samples; what changes in the compressed one is written into the weights too.

    Args:
        analysis: The original.
        state: The fused weights.
        applied: The groups that were fused, with their maps.
        samples: Inputs.
        provider: Where to run.

    Attributes:
        original: The original network.
        present: The compressed network, with the weights that it has by now.
        samples: The samples.
    """

    def __init__(
        self, analysis: Analysis, state: WeightState, applied: Applied, samples: Samples, provider: Provider
    ) -> None:
        """Start both before their first node."""
        self.analysis = analysis
        self.graph = analysis.graph
        self.state = state
        self.applied = applied
        self.samples = samples
        original = for_samples(analysis.graph.model, samples)
        self.original = Walk(original, samples, provider, "the original model")
        edits = collect_edits(analysis.graph, analysis.shapes, analysis.channels, state)
        compressed = apply_edits(analysis.graph, edits, {})
        self.present = Walk(for_samples(compressed, samples), samples, provider, "the compressed model")

    def nodes(self) -> Iterator[LinearNode]:
        """Yield the nodes to fit: those behind the first change that have the form of a regression."""
        changed: set[str] = set()
        readers = {p.operand.node for group, _ in self.applied for p in group.parameters}
        linear = {node.node.index: node for node in linear_nodes(self.graph, self.analysis.channels)}
        for node in self.graph.nodes:
            is_behind = any(name in changed for name in (*node.inputs, *node.captured))
            if is_behind or node.index in readers:
                changed.update(node.outputs)
            if is_behind and node.index in linear and self._is_plain(linear[node.index]):
                yield linear[node.index]

    def _is_plain(self, linear: LinearNode) -> bool:
        """Whether the channels lie on the one axis where the node's algebra has them."""
        data = self.analysis.channels.layouts.get(Operand(linear.node.inputs[0]), ())
        result = self.analysis.channels.layouts.get(Operand(linear.result), ())
        if not data or not result or not all(self._is_on_one_axis(linear, layouts) for layouts in (data, result)):
            return False
        bias = self.bias(linear)
        is_known = bias is None or bias.name in self.graph.constants or bias.name in self.analysis.shapes.static
        return is_known and self.state.array(linear.weight).size > 0

    def _is_on_one_axis(self, linear: LinearNode, layouts: Sequence[Layout]) -> bool:
        axis = (1 if linear.is_convolution else -1) % len(layouts)
        here, elsewhere = (
            set(leaves(layouts[axis])),
            {a for x in (*layouts[:axis], *layouts[axis + 1 :]) for a in leaves(x)},
        )
        return all(
            group.atom not in elsewhere and (group.atom not in here or not has_sets_elsewhere(layouts, axis, group))
            for group, _ in self.applied
        )

    def bias(self, linear: LinearNode) -> Operand | None:
        """Return the bias of a linear node: a constant, integers behind it, or what is put together from constants."""
        slot = BIAS_SLOTS.get(linear.node.op, len(linear.node.inputs))
        bias = self.graph.decoded_operand(linear.node, slot)
        return bias if bias is None or bias.is_constant else Operand(bias.name, linear.node.index, slot)

    def fused(self, values: AnyArray, layouts: Sequence[Layout], name: str, axes: Sequence[int]) -> AnyArray:
        """Return what numbers of a value should be in the compressed network, given the original's.

        Args:
            values: Any shape.
            layouts: What is on each axis.
            name: The value.
            axes: Which of its axes each one is; -1 for one that has no channels.
        """
        return fused_values(values, layouts, name, axes, self.applied)

    def fused_value(self, value: AnyArray, name: str) -> AnyArray:
        """Return what a whole value should be in the compressed network, given the original's."""
        layouts = self.analysis.channels.layouts.get(Operand(name))
        return value if layouts is None else self.fused(value, layouts, name, range(value.ndim))

    def tell(self, linear: LinearNode, operand: Operand) -> None:
        """Let the compressed network go on with a changed constant of a linear node, or of one behind it."""
        # The integers of a bias depend on the scale of the weight, and that on all of the weight.
        for changed, value in self.state.stored(linear.node, dict.fromkeys((linear.weight, operand))):
            self.present.set_constant(self.graph.nodes[changed.node].outputs[0], changed.slot, value)
