"""Matrices that several nodes read: the file has them once, and they stay one as long as all readers change them alike.

A head over several resolutions, a layer that is run again and again, an embedding that is the output layer too: if the
channels of each reader were groups of their own, every reader would end up with a matrix of its own, and the file could
grow. Vectors are left out, since exporters store those that merely happen to be equal once as well.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product

from onnxfuse.coupling.layout import Layout, LayoutMismatchError, Unifier, leaves
from onnxfuse.graph.view import GraphView, Operand
from onnxfuse.statistics.features import Role

__all__ = ["SharedTies", "shared_matrices"]


def shared_matrices(graph: GraphView, roles: Mapping[tuple[Operand, int], Role]) -> Iterator[list[Operand]]:
    """Find the matrices that make or read channels at several places.

    Args:
        graph: The network.
        roles: The role of every axis of a weight.

    Yields:
        All operands that are one stored matrix, in graph order.
    """
    found: dict[str, dict[Operand, None]] = {}
    for (operand, _), role in roles.items():
        if operand.is_constant and operand.name in graph.constants and role in {Role.PRODUCER, Role.CONSUMER}:
            found.setdefault(operand.name, {})[operand] = None
    for name, operands in found.items():
        if len(operands) > 1 and _is_matrix(tuple(graph.constants[name].dims)) and not _is_uniform(graph, name):
            yield sorted(operands, key=lambda operand: (operand.node, operand.slot))


def _is_matrix(dims: tuple[int, ...]) -> bool:
    return math.prod(dims) > max(dims, default=1)


def _is_uniform(graph: GraphView, name: str) -> bool:
    """Whether all entries are one number: what was never trained, and what is filled in, is not shared on purpose."""
    array = graph.array(name)
    return bool((array == array.flat[0]).all())


class SharedTies:
    """Ties that hold because matrices are shared.

    Args:
        graph: The network.
        unifier: Solves equations between layouts.
        axes: What is on each axis of every operand.
        roles: The role of every axis of a weight.
    """

    def __init__(
        self,
        graph: GraphView,
        unifier: Unifier,
        axes: Mapping[Operand, Sequence[Layout]],
        roles: Mapping[tuple[Operand, int], Role],
    ) -> None:
        """Note what is known."""
        self.graph, self.unifier, self.axes, self.roles = graph, unifier, axes, roles

    def tie(self) -> None:
        """Let all that read one stored matrix have the same channels on it, so that it stays one."""
        for first, *others in shared_matrices(self.graph, self.roles):
            for other, axis in product(others, range(len(self.axes[first]))):
                a, b = self.axes[first][axis], self.axes[other][axis]
                # Where that can't be, or would keep what could be compressed, each reader gets a matrix of its own.
                if self._is_frozen(a) is not self._is_frozen(b):
                    continue
                with suppress(LayoutMismatchError):
                    self.unifier.equate(a, b)
                    if self.roles.get((first, axis)) is not self.roles.get((other, axis)):
                        self._forbid_mixing(first, other, axis)

    def _is_frozen(self, layout: Layout) -> bool:
        return any(atom.reason for atom in leaves(self.unifier.resolve(layout)))

    def keep_before(self, norms: Mapping[int, Sequence[int]]) -> None:
        """Where different normalisations are folded into one stored matrix, only whole channels of it can go."""
        makers = {chain[-1] for chain in norms.values()}
        for first, *others in shared_matrices(self.graph, self.roles):
            for other, axis in product(others, range(len(self.axes[first]))):
                if makers & {first.node, other.node} and self.roles.get((first, axis)) is Role.PRODUCER:
                    self._forbid_mixing(first, other, axis)

    def _forbid_mixing(self, first: Operand, other: Operand, axis: int) -> None:
        titles = " and ".join(self.graph.nodes[operand.node].title for operand in (first, other))
        reason = f"{titles} share the weight {first.name!r}, and would need different means of it"
        for operand in (first, other):
            self.unifier.forbid_mixing(self.axes[operand][axis], reason)
