"""A Gather that takes all of a flattened value in order is a Reshape, and can be written as one.

The torch.export exporter writes views of memory (``as_strided``) as indices into the flattened value, computed from
its strides; behind pooling over a map whose channels were last these say nothing but "as it is". Numbers of strides
would have to follow the channels; a Reshape states sizes, which do.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, numpy_helper

from onnxfuse.errors import ModelError
from onnxfuse.graph.shapes import Shapes, infer_shapes
from onnxfuse.graph.targets import fresh_name
from onnxfuse.graph.unread import drop_unread
from onnxfuse.graph.view import GraphView, NodeView

__all__ = ["with_reads_in_order_reshaped"]

# What open dimensions are taken to be: the first one of an input, and others.
_TRIED = ((1, 64), (2, 96))
# Before this version of the file format every initializer had to be an input too.
_WITH_OWN_INITIALIZERS = 4


def with_reads_in_order_reshaped(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model in which a Reshape stands for every Gather that takes all of a flattened value in order.

    Args:
        model: Any model; it is not changed.

    Returns:
        The model itself if there is nothing to do.
    """
    if model.ir_version < _WITH_OWN_INITIALIZERS or not any(node.op_type == "Gather" for node in model.graph.node):
        return model
    try:
        graph = GraphView(model)
    except ModelError:
        # Who reads the model next says so.
        return model
    candidates = [node for node in graph.nodes if _may_be(node, graph)]
    known = list(_known(graph)) if candidates else []
    targets = {node.position: target for node in candidates if (target := _target(node, known)) is not None}
    if not targets:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    indices = {copy.graph.node[position].input[1] for position in targets}
    for position, target in targets.items():
        _reshape(copy.graph, copy.graph.node[position], target)
    drop_unread(copy.graph, indices, {name for node in graph.nodes for name in node.captured})
    return copy


def _may_be(node: NodeView, graph: GraphView) -> bool:
    """Whether a node picks from a value that was flattened to one axis, by indices that are not stored."""
    if node.op != "Gather" or node.domain or int(node.attributes.get("axis", 0)) or node.inputs[1] in graph.constants:
        return False
    maker = graph.producers.get(node.inputs[0])
    return maker is not None and graph.nodes[maker].op in {"Flatten", "Reshape"} and not graph.nodes[maker].domain


def _known(graph: GraphView) -> Iterator[Shapes]:
    """Yield what is known of all values at several choices of the sizes that the file leaves open."""
    for first, other in _TRIED:
        dims: dict[str, list[int]] = {}
        for name, info in graph.inputs.items():
            stated = info.type.tensor_type.shape.dim
            dims[name] = [dim.dim_value or (other if axis else first) for axis, dim in enumerate(stated)]
        yield infer_shapes(graph, dims)


def _target(node: NodeView, known: Sequence[Shapes]) -> list[int] | None:
    """Return the shape that a Gather gives a value that it takes all of in order; None if it does anything else.

    One dimension may be open.
    """
    found = []
    for shapes in known:
        indices = shapes.static.get(node.inputs[1])
        size = math.prod(shapes.dims.get(node.inputs[0], (-1,)))
        if indices is None or not indices.ndim or not np.array_equal(indices.ravel(), np.arange(size)):
            return None
        found.append(indices.shape)
    if len({len(dims) for dims in found}) != 1:
        return None
    target = [sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*found, strict=True)]
    return target if target.count(-1) <= 1 and 0 not in target else None


def _reshape(graph: GraphProto, node: NodeProto, target: Sequence[int]) -> None:
    """Let a node reshape its input to a stated shape."""
    used = {tensor.name for tensor in graph.initializer} | {name for n in graph.node for name in (*n.input, *n.output)}
    name = fresh_name(f"{node.output[0]}_shape", used)
    graph.initializer.append(numpy_helper.from_array(np.array(target, np.int64), name))
    node.op_type = "Reshape"
    node.input[1] = name
    del node.attribute[:]
