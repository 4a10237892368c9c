"""From fused weights to edits: new constants, and every number in the file that states a size which has changed."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from onnxfuse.coupling.groups import ChannelGraph, SizeEntry, layout_size
from onnxfuse.fusion.weights import WeightState
from onnxfuse.graph.edits import Edit, SetAttribute, SetInput
from onnxfuse.graph.shapes import Shapes
from onnxfuse.graph.view import GraphView, Operand

__all__ = ["collect_edits", "new_dims", "new_sizes"]


def collect_edits(graph: GraphView, shapes: Shapes, channels: ChannelGraph, state: WeightState) -> list[Edit]:
    """Return the edits that turn the original graph into the compressed one; none if nothing was fused."""
    edits: list[Edit] = [SetInput(o.node, o.slot, value) for o, value in state.changed()]
    changed = [e for e in channels.sizes if layout_size(e.layout, state.widths) != layout_size(e.layout, {})]
    edits.extend(_attribute_edits(graph, [e for e in changed if e.attribute], state))
    edits.extend(
        SetAttribute(e.node, e.attribute, e.value)
        for e in channels.defaults
        if layout_size(e.layout, state.widths) != layout_size(e.layout, {})
    )
    edits.extend(_constant_edits(graph, shapes, channels, [e for e in changed if not e.attribute], state))
    edits.extend(_index_edits(graph, channels, state))
    told = {(edit.node, edit.slot) for edit in edits if isinstance(edit, SetInput)}
    edits.extend(e for e in _settled_values(graph, shapes, channels, state) if (e.node, e.slot) not in told)
    return edits


def _index_edits(graph: GraphView, channels: ChannelGraph, state: WeightState) -> Iterator[Edit]:
    """Count anew the positions of what a node picks, where they have moved."""
    for entry in channels.indices:
        values = entry.values(state.widths)
        if not np.array_equal(values, entry.values({})):
            stored = graph.array(graph.nodes[entry.node].inputs[entry.slot])
            yield SetInput(entry.node, entry.slot, values.astype(stored.dtype))


def _settled_values(graph: GraphView, shapes: Shapes, channels: ChannelGraph, state: WeightState) -> Iterator[SetInput]:
    """Write down what the graph computes from shapes that have changed, as it was before they did.

    A scale of attention scores that is computed from the width, for one, belongs to the network as it was trained. A
    weight that nodes go on to rearrange is written down where it comes to the first of them: its last form may have
    fewer channels.
    """
    dims = new_dims(channels, state)
    rearranged = {name for name in shapes.fixed if Operand(name) in channels.layouts}
    settled = shapes.fixed - rearranged
    moved = {n for n, sources in shapes.read_from.items() if n in settled and any(source in dims for source in sources)}
    for node in graph.nodes if moved else ():
        if not all(name in settled for name in node.outputs if name):
            for slot, name in enumerate(node.inputs):
                if name in moved:
                    yield SetInput(node.index, slot, shapes.static[name])


def new_dims(channels: ChannelGraph, state: WeightState) -> Mapping[str, tuple[int, ...]]:
    """Return the new shapes of the computed values whose shape has changed, by name."""
    found = {}
    for operand in channels.layouts:
        dims = channels.dims(operand, state.widths)
        if not operand.is_constant and dims != channels.dims(operand, {}):
            found[operand.name] = dims
    return found


def new_sizes(channels: ChannelGraph, state: WeightState) -> Mapping[str, Mapping[int, int]]:
    """Return the new sizes of those axes of computed values whose size has changed, by name and axis."""
    found = {}
    for name, dims in new_dims(channels, state).items():
        old = channels.dims(Operand(name), {})
        found[name] = {axis: size for axis, size in enumerate(dims) if size != old[axis]}
    return found


def _attribute_edits(graph: GraphView, entries: list[SizeEntry], state: WeightState) -> Iterator[Edit]:
    values: dict[tuple[int, str], int | list[int]] = {}
    for entry in entries:
        key = entry.node, entry.attribute
        size = entry.scale * layout_size(entry.layout, state.widths)
        if entry.index is None:
            values[key] = size
            continue
        stated = values.get(key, [int(i) for i in np.atleast_1d(graph.nodes[entry.node].attributes[entry.attribute])])
        if isinstance(stated, list):
            stated[entry.index] = size
            values[key] = stated
    yield from (SetAttribute(node, name, value) for (node, name), value in values.items())


def _constant_edits(
    graph: GraphView, shapes: Shapes, channels: ChannelGraph, entries: list[SizeEntry], state: WeightState
) -> Iterator[Edit]:
    values: dict[tuple[int, int], np.ndarray[Any, np.dtype[Any]]] = {}
    for entry in entries:
        key = entry.node, entry.slot
        if key not in values:
            name = graph.nodes[entry.node].inputs[entry.slot]
            stored = graph.array(name) if name in graph.constants else shapes.static[name]
            values[key] = np.array(channels.targets.get(key, stored))
        if key not in channels.targets or values[key].flat[entry.index or 0] > 1:
            values[key].flat[entry.index or 0] = entry.scale * layout_size(entry.layout, state.widths)
    for (node, slot), value in values.items():
        yield SetInput(node, slot, value)
        if (node, slot) in channels.targets and graph.nodes[node].attributes.get("allowzero", 0):
            # The constant uses 0 for "copy"; no size of the target is 0.
            yield SetAttribute(node, "allowzero", 0)
