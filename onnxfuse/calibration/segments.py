"""A network cut into segments, one after the other, that can be fitted each for itself.

A cut is best where a single value goes on, one whose channels are all still there: whatever is before it can then be
asked to make just that value. So a residual block is a segment, or an inverted bottleneck. Where values keep crossing,
as in a U-Net, the cut is made where the fewest do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnxfuse.graph.view import GraphView, NodeView

__all__ = ["Segment", "cut_into_segments"]

# Linear nodes in a segment: at least so many; enough where any single value goes on; never more than so many.
_FEWEST, _ENOUGH, _MOST = 2, 4, 12


@dataclass(frozen=True)
class Segment:
    """Nodes that follow one another.

    Attributes:
        nodes: The nodes, in the order in which they run.
        inputs: Values from before that they read.
        outputs: Values that they make for nodes behind them, or as outputs of the network.
    """

    nodes: tuple[NodeView, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def cut_into_segments(
    graph: GraphView, linear: Sequence[int], is_whole: Callable[[str], bool], may_end: Callable[[str], bool]
) -> list[Segment]:
    """Cut a network into segments.

    Args:
        graph: The network.
        linear: Indices of the nodes whose weights can be fitted.
        is_whole: Whether a value has all its channels still.
        may_end: Whether a value may be what is fitted to: not if it is only scaled and shifted next.

    Returns:
        The segments, in order; together they are all nodes.
    """
    fitted = set(linear)
    crossing = _crossing(graph)
    segments: list[Segment] = []
    start, count = 0, 0
    options: list[tuple[int, int]] = []
    for node in graph.nodes:
        count += node.index in fitted
        values = crossing[node.index]
        if count >= _FEWEST and all(map(may_end, values)):
            options.append((len(values), node.index))
            is_good = len(values) == 1 and is_whole(values[0])
            narrow = [index for width, index in options if width == 1]
            end = node.index if is_good else -1
            if end < 0 and count >= _ENOUGH and narrow:
                end = narrow[-1]
            if end < 0 and count >= _MOST:
                end = min(options, key=lambda option: (option[0], -option[1]))[1]
            if end >= 0:
                segments.append(_segment(graph, start, end + 1))
                start, options = end + 1, []
                count = sum(index in fitted for index in range(start, node.index + 1))
    if start < len(graph.nodes):
        segments.append(_segment(graph, start, len(graph.nodes)))
    return segments


def _crossing(graph: GraphView) -> list[list[str]]:
    """Return for every node the values that are made up to it and read behind it."""
    last = {name: max((r.node for r in graph.readers.get(name, ())), default=-1) for name in graph.producers}
    last |= {name: len(graph.nodes) for name in graph.outputs if name in graph.producers}
    found: list[list[str]] = []
    live: list[str] = []
    for node in graph.nodes:
        live = [name for name in (*live, *(o for o in node.outputs if o)) if last[name] > node.index]
        found.append(live)
    return found


def _segment(graph: GraphView, start: int, end: int) -> Segment:
    nodes = graph.nodes[start:end]
    made = {output for node in nodes for output in node.outputs if output}
    reads = dict.fromkeys(name for node in nodes for name in (*node.inputs, *node.captured) if name)
    inputs = tuple(name for name in reads if name not in made and name not in graph.constants)
    stated = set(graph.outputs)
    outputs = tuple(
        name
        for node in nodes
        for name in node.outputs
        if name and (name in stated or any(r.node >= end for r in graph.readers.get(name, ())))
    )
    return Segment(tuple(nodes), inputs, outputs)
