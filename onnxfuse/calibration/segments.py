"""A network cut into segments, one after the other, that can be fitted each for itself.

Long segments leave their layers free to find together what the next ones need; short ones are asked for more of what
the original computes, and learn less of the samples by heart (docs/experiments.md). A cut is best where a single value
goes on, one whose channels are all still there: whatever is before it can then be asked to make just that value. So a
segment is two or three residual blocks or inverted bottlenecks, or about as many layers where there are none. Where
values keep crossing, as in a U-Net, the cut is made where the fewest do.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from onnxfuse.graph.view import GraphView, NodeView

__all__ = ["Segment", "cut_into_segments"]

# Linear nodes in a segment: from so many on it ends where a single whole value goes on.
_ENOUGH = 6
# With more than so many and no such value, it ends at a single value that is as near as possible to that.
_PLENTY, _FEWEST = 8, 4
# With so many and no single value at all, it ends where the fewest values cross.
_MOST = 12
# What gives other numbers every time.
_RANDOM = ("Random", "Bernoulli", "Multinomial", "Dropout")


@dataclass(frozen=True)
class Segment:
    """Nodes that follow one another, with what computes from constants alone what they read.

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
        may_end: Whether a value may be what is fitted to. The last segment ends where the network does all the same.

    Returns:
        The segments, in order; together they are all nodes. One that computes from constants alone is in every segment
        that reads what it makes: exporters put copies of constants in front of all else.
    """
    standing = _standing(graph)
    fitted, crossing = set(linear), _crossing(graph, standing)
    segments: list[Segment] = []
    start = 0
    while start < len(graph.nodes):
        count = 0
        options: list[_Cut] = []
        chosen = None
        for node in graph.nodes[start:]:
            count += node.index in fitted
            values = crossing[node.index]
            if count and all(map(may_end, values)):
                options.append(_Cut(node.index + 1, count, len(values), all(map(is_whole, values))))
            chosen = _chosen(options, count)
            if chosen is not None:
                break
        if chosen is None or chosen.stop > max(fitted, default=0):
            chosen = _halfway(options, count) or chosen
        stop = len(graph.nodes) if chosen is None else chosen.stop
        segments.append(_segment(graph, start, stop, standing))
        start = stop
    return segments


@dataclass(frozen=True)
class _Cut:
    """Where a segment could end: before which node, with how many linear nodes, and at how many values."""

    stop: int
    linear: int
    width: int
    is_whole: bool

    @property
    def is_good(self) -> bool:
        """Whether a single whole value goes on there."""
        return self.width <= 1 and self.is_whole


def _chosen(options: Sequence[_Cut], count: int) -> _Cut | None:
    """Return where to cut, now that there are so many linear nodes, or None to go on."""
    good = [cut for cut in options if cut.is_good]
    if good and good[-1].linear >= _ENOUGH:
        return good[-1]
    if count > _PLENTY and (narrow := _narrow(options)):
        return min(narrow, key=lambda cut: abs(cut.linear - _ENOUGH))
    if count >= _MOST and options:
        return min(options, key=lambda cut: (cut.width, not cut.is_whole, -cut.stop))
    return None


def _halfway(options: Sequence[_Cut], count: int) -> _Cut | None:
    """Return where to cut what is left, or None if that is short enough for one segment."""
    narrow = [cut for cut in _narrow(options) if cut.linear < count]
    return min(narrow, key=lambda cut: abs(2 * cut.linear - count)) if narrow and count >= _PLENTY else None


def _narrow(options: Sequence[_Cut]) -> list[_Cut]:
    return [cut for cut in options if cut.width <= 1 and cut.linear >= _FEWEST]


def _standing(graph: GraphView) -> set[int]:
    """Return the nodes that compute from constants alone."""
    known = set(graph.constants)
    found = set()
    for node in graph.nodes:
        reads = [name for name in (*node.inputs, *node.captured) if name]
        if reads and known.issuperset(reads) and not node.op.startswith(_RANDOM):
            found.add(node.index)
            known.update(node.outputs)
    return found


def _crossing(graph: GraphView, standing: Container[int]) -> list[list[str]]:
    """Return for every node the values that are made up to it and read behind it."""
    last = {name: max((r.node for r in graph.readers.get(name, ())), default=-1) for name in graph.producers}
    last |= {name: len(graph.nodes) for name in graph.outputs if name in graph.producers}
    found: list[list[str]] = []
    live: list[str] = []
    for node in graph.nodes:
        made = [] if node.index in standing else [name for name in node.outputs if name]
        live = [name for name in (*live, *made) if last[name] > node.index]
        found.append(live)
    return found


def _segment(graph: GraphView, start: int, end: int, standing: Container[int]) -> Segment:
    own = [node for node in graph.nodes[start:end] if node.index not in standing]
    nodes = {node.index: node for node in own}
    waiting = list(own)
    while waiting:
        for name in (*(node := waiting.pop()).inputs, *node.captured):
            maker = graph.producers.get(name, -1)
            if maker in standing and maker not in nodes:
                nodes[maker] = graph.nodes[maker]
                waiting.append(graph.nodes[maker])
    ordered = [nodes[index] for index in sorted(nodes)]
    made = {output for node in ordered for output in node.outputs if output}
    reads = dict.fromkeys(name for node in ordered for name in (*node.inputs, *node.captured) if name)
    inputs = tuple(name for name in reads if name not in made and name not in graph.constants)
    stated = set(graph.outputs)
    outputs = tuple(
        name
        for node in own
        for name in node.outputs
        if name and (name in stated or any(r.node >= end for r in graph.readers.get(name, ())))
    )
    return Segment(tuple(ordered), inputs, outputs)
