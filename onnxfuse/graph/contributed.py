"""Shapes and types of what ONNX Runtime's own operators give: ONNX has no schema of them, so it can't infer them.

Only those are here that stand in the way of shapes that a graph goes on to compute with: what its optimiser fuses.
"""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import onnx

from onnxfuse.graph.view import NodeView

__all__ = ["contributed_dims", "without_activation"]

_Dims: TypeAlias = tuple[int, ...]

_DOMAIN = "com.microsoft"
# Their first output is like their first input.
_LIKE_FIRST = frozenset(
    {
        "BiasGelu",
        "FastGelu",
        "Gelu",
        "QuickGelu",
        "RotaryEmbedding",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)


def contributed_dims(node: NodeView, dims: Mapping[str, _Dims]) -> _Dims | None:
    """Return the shape of a node's first output, which has the data type of its first input.

    Args:
        node: The node.
        dims: The shapes of its inputs, as far as they are known, by name.

    Returns:
        None where this is not known.
    """
    if node.domain != _DOMAIN or not node.inputs:
        return None
    if node.op in _LIKE_FIRST:
        return dims.get(node.inputs[0])
    if node.op == "FusedMatMul" and all(name in dims for name in node.inputs[:2]):
        return _product(node, dims[node.inputs[0]], dims[node.inputs[1]])
    return None


def _product(node: NodeView, left: _Dims, right: _Dims) -> _Dims | None:
    """Return the shape of a product of matrices, some of them transposed."""
    if min(len(left), len(right)) < 2 or any(node.attributes.get(a, 0) for a in ("transBatchA", "transBatchB")):
        return None
    rows = left[-1] if node.attributes.get("transA", 0) else left[-2]
    columns = right[-2] if node.attributes.get("transB", 0) else right[-1]
    try:
        return (*np.broadcast_shapes(left[:-2], right[:-2]), rows, columns)
    except ValueError:
        return None


def without_activation(node: NodeView) -> onnx.NodeProto | None:
    """Return a convolution that gives what a FusedConv gives, in shape; None for other nodes."""
    if (node.domain, node.op) != (_DOMAIN, "FusedConv"):
        return None
    plain = onnx.NodeProto()
    plain.CopyFrom(node.proto)
    plain.op_type, plain.domain = "Conv", ""
    del plain.input[3:], plain.attribute[:]
    plain.attribute.extend(a for a in node.proto.attribute if not a.name.startswith("activation"))
    return plain
