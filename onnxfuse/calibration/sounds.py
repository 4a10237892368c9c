"""Inputs that are sounds: one long signal, which a convolution along it reads first."""

from onnx import TensorProto

from onnxfuse.analysis import Analysis
from onnxfuse.graph.view import NodeView
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
    convolution of one channel along it.

    Args:
        analysis: The network.
        samples: Inputs that it works with.
    """
    found = {}
    for name in samples.batched:
        longer = [size for size in samples.dims[name][1:] if size > 1]
        kind = analysis.graph.inputs[name].type.tensor_type.elem_type
        if kind in _FLOATS and len(longer) == 1 and longer[0] >= _SHORTEST:
            readers = [analysis.graph.nodes[reader.node] for reader in analysis.graph.readers.get(name, [])]
            if readers and all(_filters(analysis, node) for node in readers):
                found[name] = longer[0]
    return found


def _filters(analysis: Analysis, node: NodeView) -> bool:
    """Whether a node is a convolution of one channel along one axis, or only rearranges what such a node reads."""
    if node.op in _REARRANGING:
        readers = [analysis.graph.nodes[reader.node] for reader in analysis.graph.readers.get(node.outputs[0], [])]
        return bool(readers) and all(_filters(analysis, reader) for reader in readers)
    if node.op != "Conv" or node.inputs[1] not in analysis.graph.constants:
        return False
    _, channels, *kernel = analysis.graph.constants[node.inputs[1]].dims
    return channels == 1 and int(node.attributes.get("group", 1)) == 1 and _is_long(kernel)


def _is_long(kernel: list[int]) -> bool:
    """Whether a filter has one axis, of some length."""
    return [size for size in kernel if size > 1] == [max(kernel)] and max(kernel) >= _SHORTEST_FILTER
