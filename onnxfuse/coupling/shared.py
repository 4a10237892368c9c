"""Matrices that several nodes read: the file has them once, and they stay one as long as all readers change them alike.

A head over several resolutions, a layer that is run again and again, an embedding that is the output layer too: if the
channels of each reader were groups of their own, every reader would end up with a matrix of its own, and the file could
grow. Vectors are left out, since exporters store those that merely happen to be equal once as well.
"""

import math
from collections.abc import Iterator, Mapping

from onnxfuse.graph.view import GraphView, Operand
from onnxfuse.statistics.features import Role

__all__ = ["shared_matrices"]


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
