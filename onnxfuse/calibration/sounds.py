"""Inputs that are sounds: one long signal, which a convolution along it reads first."""

from onnx import TensorProto

from onnxfuse.analysis import Analysis
from onnxfuse.graph.shapes import Shapes
from onnxfuse.graph.view import GraphView, NodeView
from onnxfuse.proof.samples import Samples

__all__ = ["sound_inputs"]

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE})
_SHORTEST = 64
# A filter of fewer taps, along one signal, may as well be one over features.
_SHORTEST_FILTER = 5
_REARRANGING = frozenset({"Cast", "Identity", "Pad", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def sound_inputs(analysis: Analysis, samples: Samples) -> dict[str, int]:
    """Return the inputs that take sounds, with the length of one.

    These have one axis longer than 1 beside that of the samples, and the first weights behind them are the filters of a
    convolution of one channel along it; in every branch of an If that reads them, too.

    Args:
        analysis: The network.
        samples: Inputs that it works with.
    """
    found = {}
    for name in samples.batched:
        longer = [size for size in samples.dims[name][1:] if size > 1]
        kind = analysis.graph.inputs[name].type.tensor_type.elem_type
        is_signal = kind in _FLOATS and len(longer) == 1 and longer[0] >= _SHORTEST
        if is_signal and _is_filtered(analysis.graph, analysis.shapes, name):
            found[name] = longer[0]
    return found


def _is_filtered(graph: GraphView, shapes: Shapes, name: str) -> bool:
    """Whether convolutions of one channel along one axis read a value first, and nothing else does."""
    readers = [graph.nodes[index] for index in dict.fromkeys(reader.node for reader in graph.readers.get(name, []))]
    return bool(readers) and all(_filters(graph, shapes, node, name) for node in readers)


def _filters(graph: GraphView, shapes: Shapes, node: NodeView, name: str) -> bool:
    """Whether a node is such a convolution, or only rearranges what such a one reads, or has one in every branch."""
    if node.op in _REARRANGING:
        return _is_filtered(graph, shapes, node.outputs[0])
    if node.op == "If":
        inside = [body for (index, _), body in shapes.bodies.items() if index == node.index]
        hearing = [body for body in inside if body.graph.readers.get(name)]
        return bool(hearing) and all(_is_filtered(body.graph, body.shapes, name) for body in hearing)
    if node.op != "Conv" or node.inputs[1] not in graph.constants:
        return False
    _, channels, *kernel = graph.constants[node.inputs[1]].dims
    return channels == 1 and int(node.attributes.get("group", 1)) == 1 and _is_long(kernel)


def _is_long(kernel: list[int]) -> bool:
    """Whether a filter has one axis, of some length."""
    return [size for size in kernel if size > 1] == [max(kernel)] and max(kernel) >= _SHORTEST_FILTER
