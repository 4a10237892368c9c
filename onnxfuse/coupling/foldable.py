"""Which batch normalisations can be folded into the layers before them, exactly."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from onnxfuse.coupling.layout import Layout
from onnxfuse.graph.view import GraphView, NodeView, Operand
from onnxfuse.statistics.features import Role

__all__ = ["LINEAR", "RolesOver", "foldable_norms"]

OperandOf: TypeAlias = Callable[[NodeView, int], Operand]

LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators that a normalisation can be folded into."""


@dataclass(frozen=True)
class RolesOver:
    """Tells what the weights of a node do with some channels.

    Attributes:
        layouts: The resolved layouts of every operand.
        roles: The role of every axis of a weight.
        weights_of: Those axes, by the node that reads the weight.
    """

    layouts: Mapping[Operand, Sequence[Layout]]
    roles: Mapping[tuple[Operand, int], Role]
    weights_of: Mapping[int, Sequence[tuple[Operand, int]]]

    def __call__(self, node: NodeView, channels: Layout) -> set[Role]:
        """Return the roles that a node's weights have on axes with just these channels."""
        return {
            self.roles[operand, axis]
            for operand, axis in self.weights_of.get(node.index, ())
            if self.layouts[operand][axis] == channels
        }


def foldable_norms(
    graph: GraphView, normalising: Sequence[int], roles: RolesOver, operand_of: OperandOf
) -> dict[int, tuple[int, ...]]:
    """Find for every batch normalisation the nodes that it folds into, where that is exact.

    Args:
        graph: The network.
        normalising: The batch normalisations, by index.
        roles: What weights do with channels.
        operand_of: Gives the operand that a node reads at a slot.

    Returns:
        By normalisation the nodes between its input and the layer before it, that layer last.
    """
    found: dict[int, tuple[int, ...]] = {}
    for index in normalising:
        chain: list[int] = []
        node = graph.nodes[index]
        channels = roles.layouts[operand_of(node, 0)][1]
        value = node.inputs[0]
        while graph.sole_reader(value) is node and (maker := graph.producers.get(value)) is not None:
            node = graph.nodes[maker]
            chain.append(maker)
            if node.op in LINEAR:
                if _makes(node, roles(node, channels)):
                    found[index] = tuple(chain)
                break
            value = _input_of_bias(node, roles(node, channels), operand_of)
    return found


def _makes(node: NodeView, roles: set[Role]) -> bool:
    """Whether a linear node's weight makes just these channels, and its bias, if any, has one entry for each."""
    has_bias = len(node.inputs) > 2 and bool(node.inputs[2])
    return bool(roles & {Role.PRODUCER, Role.CARRIED}) and (Role.BIAS in roles or not has_bias)


def _input_of_bias(node: NodeView, roles: set[Role], operand_of: OperandOf) -> str:
    """Return what a node adds a constant bias over these channels to; empty if it does anything else."""
    computed = [name for slot, name in enumerate(node.inputs) if not operand_of(node, slot).is_constant]
    if node.op not in {"Add", "Sub"} or len(computed) != 1 or roles != {Role.BIAS}:
        return ""
    return computed[0]
