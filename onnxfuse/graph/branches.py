"""An If whose condition is stored in the file always takes the same branch: the branch's nodes can stand for it.

What is left is one graph, in which channels are coupled across what was the edge of a body. Where the condition follows
from the shapes of inputs, other inputs may take the other branch, so such an If stays as it is.
"""

from collections.abc import Iterator, Mapping

import onnx
from onnx import AttributeProto, GraphProto, NodeProto, helper, numpy_helper

__all__ = ["without_decided_ifs"]


def without_decided_ifs(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model in which the nodes of a branch stand for every If that is decided in the file.

    Args:
        model: Any model; it is not changed.

    Returns:
        The model itself if there is nothing to do.
    """
    if not any(_decided(model.graph)):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    # A branch may hold another If that is decided.
    while found := next(_decided(copy.graph), None):
        _replace(copy.graph, *found)
    return copy


def _decided(graph: GraphProto) -> Iterator[tuple[int, AttributeProto]]:
    """Yield the position of each If at the top whose condition the file stores, with the branch that it takes."""
    given = {value.name for value in graph.input}
    stored = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in given}
    for position, node in enumerate(graph.node):
        if node.domain:
            continue
        if node.op_type == "Constant":
            stored.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
        elif node.op_type == "If" and node.input[0] in stored:
            holds = bool(numpy_helper.to_array(stored[node.input[0]]).item())
            word = "then_branch" if holds else "else_branch"
            yield from ((position, a) for a in node.attribute if a.name == word and not a.g.sparse_initializer)


def _replace(graph: GraphProto, position: int, taken: AttributeProto) -> None:
    """Put the nodes of a branch where its If is, under names that nothing else has."""
    node, branch = graph.node[position], taken.g
    made = [name for inner in branch.node for name in inner.output if name]
    prefix = _unused_prefix(graph, node.output[0])
    names = {name: f"{prefix}{name}" for name in (*made, *(tensor.name for tensor in branch.initializer))}
    outside = []
    for inner, outer in zip(branch.output, node.output, strict=True):
        if inner.name in made and names[inner.name] not in node.output:
            names[inner.name] = outer
        elif outer:
            outside.append((inner.name, outer))
    inside = []
    for step in branch.node:
        copy = NodeProto()
        copy.CopyFrom(step)
        _rename(copy, names)
        # The name that groups have in a body that stays.
        copy.name = copy.name and f"{node.name or prefix}/{taken.name}/{copy.name}"
        inside.append(copy)
    inside += [helper.make_node("Identity", [names.get(inner, inner)], [outer]) for inner, outer in outside]
    for tensor in branch.initializer:
        moved = graph.initializer.add()
        moved.CopyFrom(tensor)
        moved.name = names[tensor.name]
    nodes = [*graph.node[:position], *inside, *graph.node[position + 1 :]]
    del graph.node[:]
    graph.node.extend(nodes)


def _unused_prefix(graph: GraphProto, word: str) -> str:
    used = {name for node in graph.node for name in (*node.input, *node.output)}
    used.update((*(tensor.name for tensor in graph.initializer), *(value.name for value in graph.input)))
    while any(name.startswith(f"{word}/") for name in used):
        word += "_"
    return f"{word}/"


def _rename(node: NodeProto, names: Mapping[str, str]) -> None:
    """Give values other names, also where bodies inside read them."""
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    for attribute in node.attribute:
        bodies = [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
        for body in bodies:
            for inner in body.node:
                _rename(inner, names)
            for value in body.output:
                value.name = names.get(value.name, value.name)
