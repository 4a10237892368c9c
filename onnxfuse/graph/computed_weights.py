"""Weights that a graph computes from constants alone, as a weight normalisation that was not folded does.

Where all that a layer's weight is made of is in the file, it is as good as stored: what is made of it is known before
the network has run.
"""

from collections.abc import Iterator

from onnxfuse.graph.view import DEFAULT_DOMAIN, GraphView

__all__ = ["weight_makers"]

_LINEAR = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (0, 1), "MatMul": (0, 1)}
_COMPUTING = frozenset({"Abs", "Add", "Div", "Mul", "Neg", "Pow", "Reciprocal", "Sqrt", "Sub"}) | {
    f"Reduce{kind}" for kind in ("L1", "L2", "Mean", "Sum", "SumSquare")
}
_MOVING = frozenset({"Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def weight_makers(graph: GraphView) -> Iterator[int]:
    """Yield the nodes, in order, that compute weights from constants alone and do more than move their elements.

    Example:
        >>> import onnx
        >>> model = onnx.parser.parse_model('''
        ...     <ir_version: 8, opset_import: ["" : 17]> net (float[n, 2] x) => (float[n, 2] y)
        ...     <float[2, 2] v = {3, 4, 0, 1}> { norm = ReduceL2 <axes = [1]> (v) w = Div(v, norm) y = MatMul(x, w) }
        ... ''')
        >>> list(weight_makers(GraphView(model)))
        [0, 1]
    """
    # By node: whether all that it is made of is in the file.
    known: dict[int, bool] = {}
    for node in graph.nodes:
        known[node.index] = (
            node.op in _COMPUTING | _MOVING
            and node.domain == DEFAULT_DOMAIN
            and not node.captured
            and all(n in graph.constants or known.get(graph.producers.get(n, -1), False) for n in node.inputs if n)
        )

    def is_known(name: str) -> bool:
        return name in graph.constants or known.get(graph.producers.get(name, -1), False)

    # Of a product of two constants, such as a table with a matrix, each stays what it is.
    waiting = [
        node.inputs[slot]
        for node in graph.nodes
        for slot in _LINEAR.get(node.op, ())
        if not node.domain and len(node.inputs) > 1 and not is_known(node.inputs[1 - slot])
    ]
    found: set[int] = set()
    while waiting:
        maker = graph.producers.get(waiting.pop())
        if maker is not None and known[maker] and maker not in found:
            found.add(maker)
            waiting.extend(graph.nodes[maker].inputs)
    yield from (index for index in sorted(found) if graph.nodes[index].op in _COMPUTING)
