"""From what a reader sees back to what the producers make: h = f(z), where f acts on every number alike.

Between a group's producers and z all nodes must commute with an output map, so that fused producers make A z; from z to
h all must act on every number by itself, with no other number per channel, so that the reader then sees f(A z).
"""

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from onnxfuse.analysis import Analysis
from onnxfuse.arrays import FloatArray
from onnxfuse.config import Provider
from onnxfuse.coupling.groups import CouplingGroup
from onnxfuse.coupling.layout import leaves
from onnxfuse.coupling.rules.elementwise import UNARY
from onnxfuse.graph.view import DEFAULT_DOMAIN, NodeView, Operand
from onnxfuse.proof.runtime import Session
from onnxfuse.statistics.features import Role

__all__ = ["ActivationPath", "PathFunction", "activation_path"]

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE})
_SUMS = frozenset({"Add", "Sub", "Sum"})
# One tensor in, and every channel is scaled or moved alike: these commute with any mixture of channels.
_COMMUTING = frozenset(
    {
        *("AveragePool", "Dropout", "Flatten", "GlobalAveragePool", "Identity", "ReduceMean", "Reshape"),
        *("Squeeze", "Transpose", "Unsqueeze"),
    }
)
# What makes channels with a weight, and does nothing else with them.
_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# With other operands that are single numbers.
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Max", "Min", "Pow"})
_POINTWISE = (frozenset(UNARY) | _ARITHMETIC) - {"Cast", "Dropout"}


@dataclass(frozen=True)
class ActivationPath:
    """What lies between the producers of a group and one of its readers.

    Attributes:
        before: The value z: what producers make, summed and pooled perhaps.
        after: The value h, which the reader reads.
        nodes: The nodes of f, in order; none where f is the identity.
    """

    before: str
    after: str
    nodes: tuple[NodeView, ...]

    @property
    def is_linear(self) -> bool:
        """Whether h is z."""
        return all(node.op == "Identity" for node in self.nodes)


def activation_path(analysis: Analysis, group: CouplingGroup, value: str) -> ActivationPath | None:
    """Return how a value that holds the channels of a group comes from what its producers make.

    Args:
        analysis: The original.
        group: The group.
        value: What a reader reads.

    Returns:
        The path; None where what happens in between does not take the form of f(z).
    """
    search = _Search(analysis, group)
    frontier = {value}
    nodes: dict[int, NodeView] = {}
    while frontier:
        if len(frontier) == 1 and search.commutes(next(iter(frontier))):
            before = frontier.pop()
            # A producer whose result is rounded to integers also clips it.
            is_float = analysis.shapes.types.get(before) in _FLOATS
            return ActivationPath(before, value, tuple(nodes[i] for i in sorted(nodes))) if is_float else None
        last = max(frontier, key=search.maker_index)
        node = search.maker(last)
        inputs = None if node is None else search.pointwise_inputs(node)
        if node is None or inputs is None:
            return None
        nodes[node.index] = node
        frontier = (frontier - set(node.outputs)) | inputs
    return None


class _Search:
    """Questions about the nodes around one group."""

    def __init__(self, analysis: Analysis, group: CouplingGroup) -> None:
        self.graph, self.channels, self.atom = analysis.graph, analysis.channels, group.atom
        self.makers = {p.operand.node for p in group.parameters if p.role is Role.PRODUCER}
        self.known: dict[str, bool] = {}

    def maker(self, value: str) -> NodeView | None:
        index = self.graph.producers.get(value)
        return None if index is None else self.graph.nodes[index]

    def maker_index(self, value: str) -> int:
        return self.graph.producers.get(value, -1)

    def holds(self, operand: Operand) -> bool:
        return any(self.atom in set(leaves(layout)) for layout in self.channels.layouts.get(operand, ()))

    def commutes(self, value: str) -> bool:
        """Whether the value becomes A z when the producers' weights and biases are multiplied by A."""
        if value not in self.known:
            node = self.maker(value)
            self.known[value] = False
            self.known[value] = node is not None and self._passes_mixtures(node)
        return self.known[value]

    def _passes_mixtures(self, node: NodeView) -> bool:
        if node.domain != DEFAULT_DOMAIN:
            return False
        if node.index in self.makers:
            return node.op in _LINEAR
        if node.index in self.channels.normalising:
            makers = self.channels.batch_norms.get(node.index, ())
            return bool(makers) and self.commutes(node.inputs[0])
        if node.op in _SUMS:
            return all(self._is_summand(node, slot) for slot in range(len(node.inputs)))
        return node.op in _COMMUTING and self.commutes(node.inputs[0])

    def _is_summand(self, node: NodeView, slot: int) -> bool:
        """Whether an operand of a sum is mixed like its result: a computed one, or a bias for every channel."""
        operand = self.graph.operand(node, slot)
        if operand is None:
            return False
        return self.holds(operand) if operand.is_constant else self.commutes(operand.name)

    def pointwise_inputs(self, node: NodeView) -> set[str] | None:
        """Return the computed inputs of a node that acts on every number by itself; None if it does not."""
        if node.domain != DEFAULT_DOMAIN or node.op not in _POINTWISE or len([o for o in node.outputs if o]) != 1:
            return None
        computed = set()
        for slot, name in enumerate(node.inputs):
            operand = self.graph.operand(node, slot)
            if operand is None:
                continue
            if operand.is_constant:
                if int(np.prod(self.graph.constants[name].dims)) != 1:
                    return None
            elif self.holds(operand):
                computed.add(name)
            else:
                return None
        return computed or None


class PathFunction:
    """f of a path, for arrays of any shape: its nodes as a model of their own, in single precision.

    Args:
        analysis: The original.
        path: The path.
        provider: Where to run.

    Raises:
        RuntimeFailedError: ONNX Runtime refuses the nodes.
    """

    def __init__(self, analysis: Analysis, path: ActivationPath, provider: Provider) -> None:
        """Cut the nodes out."""
        self.path = path
        self.session = None
        if path.is_linear:
            return
        graph, kind = analysis.graph, TensorProto.FLOAT
        constants = {name: graph.constants[name] for n in path.nodes for name in n.inputs if name in graph.constants}
        # Numbers that follow from shapes are made by nodes that are not among these.
        read = {name for n in path.nodes for name in n.inputs} - {name for n in path.nodes for name in n.outputs}
        followed = {name: analysis.shapes.static[name] for name in sorted(read & set(analysis.shapes.static))}
        constants |= {n: onnx.numpy_helper.from_array(v, n) for n, v in followed.items() if n not in constants}
        model = onnx.helper.make_model(
            onnx.helper.make_graph(
                [node.proto for node in path.nodes],
                "activation",
                [onnx.helper.make_tensor_value_info(path.before, kind, None)],
                [onnx.ValueInfoProto(name=path.after)],
                [_named(tensor, name) for name, tensor in constants.items()],
            ),
            opset_imports=analysis.graph.model.opset_import,
            ir_version=analysis.graph.model.ir_version,
        )
        self.session = Session(model, provider, name=f"the nodes before {path.after!r}")

    def __call__(self, x: FloatArray) -> FloatArray:
        """Return f(x), float64."""
        if self.session is None:
            return np.asarray(x, np.float64)
        found = self.session.run({self.path.before: np.ascontiguousarray(x, np.float32)})[self.path.after]
        return np.asarray(found, np.float64)


def _named(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    value = onnx.numpy_helper.to_array(tensor)
    return onnx.numpy_helper.from_array(value.astype(np.float32) if value.dtype.kind == "f" else value, name)
