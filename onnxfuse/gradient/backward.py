"""The backward network: reverse-mode differentiation, written down in ONNX operators.

It is a model of its own, beside the original: its inputs are the values of the original that some derivative needs and
the gradient of each output, its results are the gradients asked for. So it always has the same operator set, whatever
the original's, and the loss need not be written in ONNX at all.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxfuse.errors import UnsupportedGraphError
from onnxfuse.gradient.expressions import (
    ANOTHER_WAY,
    AnyArray,
    Apply,
    Expr,
    Given,
    Literal,
    Rule,
    Site,
    call,
)
from onnxfuse.gradient.forward import final_values
from onnxfuse.gradient.rules import DEFAULT_RULES
from onnxfuse.graph.shapes import Shapes
from onnxfuse.graph.view import GraphView, NodeView

__all__ = ["Backward", "build_backward"]

_OPSET, _IR_VERSION = 18, 8
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16})
_QUANTISED = frozenset({TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16})


@dataclass(frozen=True)
class Backward:
    """A backward network.

    Attributes:
        model: The network; its inputs are ``values`` and ``seeds``.
        dtype: What it computes in: double precision where the original does, else single.
        values: Names of its inputs for values of the original, by value.
        seeds: Names of its inputs for the gradients of the values that the loss is a function of, by value.
        results: Names of its outputs, by the value of the original that each is the gradient of.
        zeros: Values that no output depends on: their gradient is zero.
    """

    model: onnx.ModelProto
    dtype: "np.dtype[np.float32] | np.dtype[np.float64]"
    values: Mapping[str, str]
    seeds: Mapping[str, str]
    results: Mapping[str, str]
    zeros: tuple[str, ...]


def build_backward(
    graph: GraphView, shapes: Shapes, names: Sequence[str], rules: Sequence[Rule] = DEFAULT_RULES
) -> Backward:
    """Differentiate a network.

    Args:
        graph: The network.
        shapes: Its shapes, at the batch that it is to run with.
        names: What gradients are wanted of: graph inputs, computed values, or constants.
        rules: Operator rules; the newest one whose ``since`` is not above the model's operator set holds.

    Raises:
        UnsupportedGraphError: An operator on the way from the values to the outputs has no rule.
    """
    return _Builder(graph, shapes, rules).build(names)


class _Builder:
    """Writes the backward network, node by node from the outputs to what gradients are wanted of."""

    def __init__(self, graph: GraphView, shapes: Shapes, rules: Sequence[Rule]) -> None:
        self.graph = graph
        self.shapes = shapes
        self.rules: dict[tuple[str, str], list[Rule]] = {}
        for rule in sorted(rules, key=lambda rule: rule.since):
            self.rules.setdefault((rule.domain, rule.op), []).append(rule)
        is_double = any(shapes.types.get(name) == TensorProto.DOUBLE for name in final_values(graph))
        self.dtype = np.dtype(np.float64) if is_double else np.dtype(np.float32)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: dict[str, onnx.ValueInfoProto] = {}
        self.values: dict[str, str] = {}
        self.seeds: dict[str, str] = {}
        self.stored: dict[str, str] = {}
        self.parts: dict[str, list[Expr]] = {}

    def build(self, names: Sequence[str]) -> Backward:
        active = self._active(names)
        for name in final_values(self.graph):
            if name in active:
                self.parts.setdefault(name, []).append(Given(self._seed(name), backward=True))
        for node in reversed(self.graph.nodes):
            if any(output in active for output in node.outputs):
                gradients = tuple(self._total(output) if output else None for output in node.outputs)
                if any(gradients) and any(read in active for read in (*node.inputs, *node.captured)):
                    self._visit(node, gradients, active)
        results = {}
        for number, name in enumerate(names):
            found = self._total(name)
            if found is not None:
                self._node("Identity", [found.name], f"gradient{number}")
                results[name] = f"gradient{number}"
        return Backward(
            self._model(list(results.values())),
            self.dtype,
            self.values,
            self.seeds,
            results,
            tuple(name for name in names if name not in results),
        )

    def _active(self, names: Sequence[str]) -> set[str]:
        """Return what depends on the values that gradients are wanted of, and these."""
        active = set(names)
        for node in self.graph.nodes:
            if any(read in active for read in (*node.inputs, *node.captured)):
                active |= {output for output in node.outputs if output and self._is_number(output)}
        return active

    def _is_number(self, name: str) -> bool:
        """Whether a value is made of floats, or of what stands for them."""
        return self.shapes.types.get(name, TensorProto.FLOAT) in _FLOATS | _QUANTISED

    def _visit(self, node: NodeView, gradients: tuple[Given | None, ...], active: set[str]) -> None:
        """Hand the gradients of a node's outputs on to its inputs."""
        site = Site(node, self.shapes.dims, self.shapes.types, _Known(self.graph, self.shapes.static), gradients)
        fitting = [r for r in self.rules.get((node.domain, node.op), []) if r.since <= node.version]
        if not fitting:
            what = f"no gradient is known through {node.title}: there is no rule for its operator"
            raise UnsupportedGraphError(what, where=node.name, mend=ANOTHER_WAY)
        told = fitting[-1].gradients(site)
        memo: dict[int, str] = {}
        for slot, read in enumerate(node.inputs):
            if read not in active:
                continue
            if slot not in told:
                site.refuse(f"none with respect to its input {read!r}")
            part = told[slot]
            if part is not None:
                self.parts.setdefault(read, []).append(Given(self._write(part, memo), backward=True))

    def _total(self, name: str) -> Given | None:
        """Return the gradient of a value, which all its readers have told by now."""
        parts = self.parts.get(name)
        if not parts:
            return None
        total = parts[0] if len(parts) == 1 else call("Sum", *parts)
        found = Given(self._write(total, {}), backward=True)
        self.parts[name] = [found]
        return found

    def _write(self, expr: Expr, memo: dict[int, str]) -> str:
        """Write an expression down; return the name of its value. Shared parts are written once."""
        if id(expr) not in memo:
            memo[id(expr)] = self._written(expr, memo)
        return memo[id(expr)]

    def _written(self, expr: Expr, memo: dict[int, str]) -> str:
        match expr:
            case Given(name, backward=True):
                return name
            case Given(name):
                return self._value(name)
            case Literal(value):
                return self._constant(value)
            case Apply(op, inputs, attributes, output):
                reads = ["" if x is None else self._write(x, memo) for x in inputs]
                name = f"value{len(self.nodes)}"
                outputs = [""] * output + [name]
                if output:
                    # Some kernels write every output before the one that is asked for.
                    outputs = [f"{name}_{i}" for i in range(output)] + [name]
                self.nodes.append(helper.make_node(op, reads, outputs, **attributes))
                return name

    def _node(self, op: str, inputs: Sequence[str], output: str) -> None:
        self.nodes.append(helper.make_node(op, list(inputs), [output]))

    def _constant(self, value: AnyArray) -> str:
        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(self._cast(value), name))
        return name

    def _cast(self, value: AnyArray) -> AnyArray:
        """Give floats the type that the network computes in."""
        # Types that NumPy knows only by their size, such as bfloat16, are of kind V.
        return value.astype(self.dtype) if value.dtype.kind in "fV" else value

    def _value(self, name: str) -> str:
        """Return the backward network's own name for a value of the original."""
        if name in self.graph.constants:
            if name not in self.stored:
                self.stored[name] = self._constant(self.graph.array(name))
            return self.stored[name]
        if name not in self.values:
            own = f"original{len(self.values)}"
            self.values[name] = own
            kind = self.shapes.types.get(name, TensorProto.FLOAT)
            self._input(own, helper.np_dtype_to_tensor_dtype(self.dtype) if kind in _FLOATS else kind, name)
        return self.values[name]

    def _seed(self, name: str) -> str:
        own = f"seed{len(self.seeds)}"
        self.seeds[name] = own
        self._input(own, helper.np_dtype_to_tensor_dtype(self.dtype), name)
        return own

    def _input(self, own: str, kind: int, like: str) -> None:
        self.inputs[own] = helper.make_tensor_value_info(own, kind, self.shapes.dims.get(like))

    def _model(self, results: Sequence[str]) -> onnx.ModelProto:
        outputs = [onnx.ValueInfoProto(name=name) for name in results]
        graph = helper.make_graph(self.nodes, "backward", list(self.inputs.values()), outputs, self.constants)
        return helper.make_model(graph, ir_version=_IR_VERSION, opset_imports=[helper.make_opsetid("", _OPSET)])


class _Known(Mapping[str, AnyArray]):
    """Constants of any size, and values that shapes decide."""

    def __init__(self, graph: GraphView, static: Mapping[str, AnyArray]) -> None:
        self.graph, self.static = graph, static

    def __getitem__(self, name: str) -> AnyArray:
        return self.graph.array(name) if name in self.graph.constants else self.static[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.graph.constants, **self.static})

    def __len__(self) -> int:
        return len({**self.graph.constants, **self.static})
