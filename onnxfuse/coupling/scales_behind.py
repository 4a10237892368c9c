"""Where the scale of an integer weight is applied if not by the node that reads it.

Dynamic quantisation writes an integer product as ConvInteger or MatMulInteger -> Cast -> Mul by (scale of the input x
scale of the weight). The scale of the weight is a constant of that inner Mul, so it can be chosen anew.
"""

from dataclasses import dataclass

from onnxfuse.graph.view import DEFAULT_DOMAIN, GraphView, NodeView, Operand

__all__ = ["ScaleBehind", "scale_behind"]

_INTEGER_PRODUCTS = frozenset({"ConvInteger", "MatMulInteger"})


@dataclass(frozen=True, slots=True)
class ScaleBehind:
    """The scale that is applied behind an integer product.

    Attributes:
        weight_scale: The scale of the weight, a constant that the inner Mul reads.
        result: The name of the product once it is scaled.
    """

    weight_scale: Operand
    result: str


def scale_behind(graph: GraphView, product: NodeView) -> ScaleBehind | None:
    """Return the scale that is applied to an integer product; None where it is not written as above."""
    if product.op not in _INTEGER_PRODUCTS or product.domain != DEFAULT_DOMAIN:
        return None
    cast = graph.sole_reader(product.outputs[0])
    if cast is None or not _is(cast, "Cast"):
        return None
    scaling = graph.sole_reader(cast.outputs[0])
    if scaling is None or not _is(scaling, "Mul"):
        return None
    factor = scaling.inputs[1 - list(scaling.inputs).index(cast.outputs[0])]
    maker = graph.producers.get(factor)
    if maker is None or not _is(graph.nodes[maker], "Mul") or graph.sole_reader(factor) is not scaling:
        return None
    inner = graph.nodes[maker]
    constants = [Operand(name, maker, slot) for slot, name in enumerate(inner.inputs) if name in graph.constants]
    return ScaleBehind(constants[0], scaling.outputs[0]) if len(constants) == 1 else None


def _is(node: NodeView, op: str) -> bool:
    return node.op == op and node.domain == DEFAULT_DOMAIN
