"""Target shapes that a graph puts together once and several nodes read, such as *(batch, length, heads, size)*.

The torch.export exporter computes what is alike once. If two tensors that have the same shape by chance are to lose
different numbers of channels, each node needs a target of its own.
"""

from collections.abc import Callable, Iterator, Sequence

import onnx

from onnxfuse.graph.bodies import value_names
from onnxfuse.graph.view import DEFAULT_DOMAIN, GraphView

__all__ = ["fresh_name", "own_targets", "with_own_targets"]

# Where operators take a target shape.
_SLOTS = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0}


def with_own_targets(graph: GraphView) -> onnx.ModelProto | None:
    """Return a copy of a model in which no two nodes share a target shape that is put together by a Concat.

    Args:
        graph: The model's graph; not changed.

    Returns:
        A model that computes the same, bit for bit; None where none is shared.
    """
    taken = {*value_names(graph.model.graph), *(node.name for node in graph.nodes)}
    nodes = list(own_targets(graph.model.graph.node, lambda name: fresh_name(name, taken)))
    if len(nodes) == len(graph.model.graph.node):
        return None
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def own_targets(nodes: Sequence[onnx.NodeProto], fresh: Callable[[str], str]) -> Iterator[onnx.NodeProto]:
    """Yield nodes such that no two of them share a target shape that is put together; the first one keeps it.

    Args:
        nodes: The nodes of a graph; not changed.
        fresh: Makes a name that nothing has yet out of one that something may have.
    """
    makers = {node.output[0]: node for node in nodes if node.op_type == "Concat" and node.domain == DEFAULT_DOMAIN}
    taken: set[str] = set()
    for node in nodes:
        slot = _SLOTS.get(node.op_type, len(node.input)) if node.domain == DEFAULT_DOMAIN else len(node.input)
        target = node.input[slot] if slot < len(node.input) else ""
        if target in makers and target in taken:
            own, reader = onnx.NodeProto(), onnx.NodeProto()
            own.CopyFrom(makers[target])
            own.name, own.output[0] = fresh(f"{own.name}_again"), fresh(f"{target}_again")
            reader.CopyFrom(node)
            reader.input[slot] = own.output[0]
            yield from (own, reader)
        else:
            taken.add(target)
            yield node


def fresh_name(wanted: str, taken: set[str]) -> str:
    """Return a name that is not taken, and take it.

    Example:
        >>> taken = {"shape"}
        >>> fresh_name("shape", taken), fresh_name("shape", taken)
        ('shape_1', 'shape_2')
    """
    number, name = 0, wanted
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    taken.add(name)
    return name
