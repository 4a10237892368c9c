"""Taking out of a graph what nothing reads any more."""

from collections import Counter
from collections.abc import Iterable

from onnx import GraphProto

__all__ = ["drop_unread"]


def drop_unread(graph: GraphProto, released: Iterable[str], captured: Iterable[str]) -> None:
    """Remove constants, and the nodes that computed them, that have lost their last reader.

    Args:
        graph: The graph; changed.
        released: Values that lost a reader.
        captured: Values that bodies of nodes read from around them.
    """
    left = Counter(name for node in graph.node for name in node.input)
    left.update(info.name for info in graph.output)
    left.update(captured)
    makers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    pending, unread, idle = set(released), set[str](), set[int]()
    while pending:
        name = pending.pop()
        if left[name]:
            continue
        unread.add(name)
        maker = makers.get(name, -1)
        if maker >= 0 and maker not in idle and not any(left[made] for made in graph.node[maker].output if made):
            idle.add(maker)
            read = [value for value in graph.node[maker].input if value]
            left.subtract(read)
            pending.update(read)
    for i in sorted(idle, reverse=True):
        del graph.node[i]
    for i in [i for i, tensor in enumerate(graph.initializer) if tensor.name in unread][::-1]:
        del graph.initializer[i]
    for i in [i for i, info in enumerate(graph.input) if info.name in unread][::-1]:
        del graph.input[i]
