"""Shapes and types of what ONNX Runtime's own operators give: ONNX has no schema of them, so it can't infer them.

Only those are here that stand in the way of shapes that a graph goes on to compute with: what its optimiser fuses.
"""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import onnx

from onnxfuse.graph.view import DEFAULT_DOMAIN, NodeView

__all__ = ["contributed_dims", "turned_axes", "without_activation"]

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
_SUM = 3
# The same of what ONNX Runtime keeps under ONNX's own domain, where ONNX has no schema of it either.
_KEPT_UNDER_THE_STANDARD = frozenset({"SimplifiedLayerNormalization"})


def contributed_dims(node: NodeView, dims: Mapping[str, _Dims], slot: int = 0) -> _Dims | None:
    """Return the shape of an output of a node, which has the data type of its first input.

    Args:
        node: The node.
        dims: The shapes of its inputs, as far as they are known, by name.
        slot: Which output.

    Returns:
        None where this is not known.
    """
    if not node.inputs or node.domain not in {DEFAULT_DOMAIN, _DOMAIN}:
        return None
    if slot:
        # The sum that a Skip* normalises, which goes on as the residual stream.
        is_sum = slot == _SUM and node.domain and node.op.startswith("Skip") and node.op in _LIKE_FIRST
        return dims.get(node.inputs[0]) if is_sum else None
    if node.op in (_LIKE_FIRST if node.domain else _KEPT_UNDER_THE_STANDARD):
        return dims.get(node.inputs[0])
    if node.domain and node.op == "FusedMatMul" and all(name in dims for name in node.inputs[:2]):
        return _product(node, dims[node.inputs[0]], dims[node.inputs[1]])
    return None


def _product(node: NodeView, left: _Dims, right: _Dims) -> _Dims | None:
    """Return the shape of a product of matrices, some of them transposed."""
    if min(len(left), len(right)) < 2:
        return None
    a, b = (_turned(node, side, dims) for side, dims in (("A", left), ("B", right)))
    try:
        return (*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1])
    except ValueError:
        return None


def _turned(node: NodeView, side: str, dims: _Dims) -> _Dims:
    """Return the shape of a factor as it is multiplied."""
    return tuple(dims[axis] for axis in turned_axes(node, side, len(dims)))


def turned_axes(node: NodeView, side: str, rank: int) -> list[int]:
    """Return which axes of a factor of a FusedMatMul are the batch, rows and columns of what is multiplied, in order.

    Args:
        node: The node.
        side: ``A`` or ``B``.
        rank: How many axes the factor has.

    Example:
        >>> from onnxfuse.graph.view import GraphView
        >>> text = 'net (float[2, 3, 4, 5] a) => (float[3, 4, 2, 2] y) { y = com.microsoft.FusedMatMul'
        >>> text += ' <transBatchA = 1, transBatchB = 1, transB = 1> (a, a) }'
        >>> model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> {text}')
        >>> node = GraphView(model).nodes[0]
        >>> turned_axes(node, "A", 4), turned_axes(node, "B", 4)
        ([1, 2, 0, 3], [1, 2, 3, 0])
    """
    axes = list(range(rank))
    if rank < 2:
        return axes
    if node.attributes.get(f"transBatch{side}", 0):
        axes = [*axes[1:-1], axes[0], axes[-1]]
    if node.attributes.get(f"trans{side}", 0):
        axes[-2:] = axes[:-3:-1]
    return axes


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
