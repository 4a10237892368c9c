"""Formulas of gradients: what rules write, and what `onnxfuse.gradient.backward` turns into ONNX operators.

A rule is a pure function from a `Site` (one node with its shapes) to one expression for each input. Every shape is
known when a rule runs, so a rule needs no operator that asks for shapes at run time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

import numpy as np

from onnxfuse.errors import UnsupportedGraphError
from onnxfuse.graph.view import DEFAULT_DOMAIN, NodeView

__all__ = ["ANOTHER_WAY", "Apply", "Expr", "Expression", "Given", "Literal", "Rule", "Site", "call", "integers"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

ANOTHER_WAY = "choose an importance that needs no gradients, such as l1 or activation-l2"


class Expression:
    """Arithmetic of expressions; a number beside one becomes a `Literal`."""

    __slots__ = ()

    def __add__(self, other: "Operand") -> "Apply":
        """Return the sum."""
        return call("Add", self, other)

    def __radd__(self, other: float) -> "Apply":
        """Return the sum."""
        return call("Add", other, self)

    def __sub__(self, other: "Operand") -> "Apply":
        """Return the difference."""
        return call("Sub", self, other)

    def __rsub__(self, other: float) -> "Apply":
        """Return the difference."""
        return call("Sub", other, self)

    def __mul__(self, other: "Operand") -> "Apply":
        """Return the product."""
        return call("Mul", self, other)

    def __rmul__(self, other: float) -> "Apply":
        """Return the product."""
        return call("Mul", other, self)

    def __truediv__(self, other: "Operand") -> "Apply":
        """Return the quotient."""
        return call("Div", self, other)

    def __rtruediv__(self, other: float) -> "Apply":
        """Return the quotient."""
        return call("Div", other, self)

    def __neg__(self) -> "Apply":
        """Return the negative."""
        return call("Neg", self)


@dataclass(frozen=True, eq=False, slots=True)
class Given(Expression):
    """A value of the original network by its name, or with ``backward`` one of the backward network."""

    name: str
    backward: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Literal(Expression):
    """A constant; floats get the type that the backward network computes in."""

    value: AnyArray


@dataclass(frozen=True, eq=False, slots=True)
class Apply(Expression):
    """An operator of ONNX's operator set 18 on other expressions; the output that is asked for is number ``output``."""

    op: str
    inputs: tuple["Expr | None", ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    output: int = 0


Expr: TypeAlias = Given | Literal | Apply
Operand: TypeAlias = "Expression | float"


def call(op: str, *inputs: "Operand | None", output: int = 0, **attributes: Any) -> Apply:
    """Apply an operator; numbers become literals, None leaves an input out."""
    return Apply(op, tuple(None if x is None else _lifted(x) for x in inputs), attributes, output)


def integers(values: Sequence[int]) -> Literal:
    """Return whole numbers as a literal: axes, shapes, indices."""
    return Literal(np.array(values, np.int64))


def _lifted(x: "Operand") -> "Expr":
    if isinstance(x, Given | Literal | Apply):
        return x
    return Literal(np.array(x, np.float64))


@dataclass(frozen=True, eq=False)
class Site:
    """One node as its rule sees it.

    Attributes:
        node: The node.
        dims: Shape of every input and output by name.
        types: `onnx.TensorProto` element type of every input and output by name.
        static: Values that are known, by name.
        gradients: The gradient of each output; None for one that the loss does not depend on.
    """

    node: NodeView
    dims: Mapping[str, tuple[int, ...]]
    types: Mapping[str, int]
    static: Mapping[str, AnyArray]
    gradients: tuple[Expr | None, ...]

    @property
    def x(self) -> Given:
        """The first input."""
        return self.input(0)

    @property
    def y(self) -> Given:
        """The first output."""
        return Given(self.node.outputs[0])

    @property
    def g(self) -> Expr:
        """The gradient of the first output."""
        found = self.gradients[0]
        return Literal(np.zeros(self.dims_out())) if found is None else found

    def has(self, slot: int) -> bool:
        """Whether an input is there."""
        return slot < len(self.node.inputs) and bool(self.node.inputs[slot])

    def input(self, slot: int) -> Given:
        """Return an input."""
        return Given(self.node.inputs[slot])

    def dims_in(self, slot: int = 0) -> tuple[int, ...]:
        """Return the shape of an input."""
        return self._dims(self.node.inputs[slot])

    def dims_out(self, slot: int = 0) -> tuple[int, ...]:
        """Return the shape of an output."""
        return self._dims(self.node.outputs[slot])

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or the default."""
        return self.node.attributes.get(name, default)

    def is_known(self, slot: int) -> bool:
        """Whether the value of an input is known, or it is left out."""
        return not self.has(slot) or self.static.get(self.node.inputs[slot]) is not None

    def known(self, slot: int, default: Sequence[int] | None = None) -> AnyArray:
        """Return the value of an input that must be known; the default where it is left out."""
        if not self.has(slot):
            return np.array(default if default is not None else [])
        found = self.static.get(self.node.inputs[slot])
        if found is None:
            self.refuse(f"its input {self.node.inputs[slot]!r} is computed at run time")
        return found

    def listed(self, name: str, slot: int, since: int) -> list[int] | None:
        """Return whole numbers that are an attribute before a version and an input from it on; None if left out."""
        if self.node.version < since or not self.has(slot):
            found = self.attribute(name)
            return None if found is None else [int(i) for i in found]
        return [int(i) for i in self.known(slot).reshape(-1)]

    def fitted(self, value: Expr, slot: int) -> Expr:
        """Sum a gradient of the output's shape to that of an input which was broadcast."""
        return summed_to(value, self.dims_out(), self.dims_in(slot))

    def refuse(self, why: str) -> NoReturn:
        """Say that there is no gradient, and why."""
        what = f"no gradient is known through {self.node.title}: {why}"
        raise UnsupportedGraphError(what, where=self.node.name, mend=ANOTHER_WAY)

    def _dims(self, name: str) -> tuple[int, ...]:
        if name not in self.dims:
            self.refuse(f"the shape of {name!r} is not known")
        return self.dims[name]


def summed_to(value: Expr, dims: Sequence[int], target: Sequence[int]) -> Expr:
    """Sum an expression of shape ``dims`` to a shape that was broadcast to it."""
    if tuple(dims) == tuple(target):
        return value
    padded = (1,) * (len(dims) - len(target)) + tuple(target)
    axes = [i for i, (size, wanted) in enumerate(zip(dims, padded, strict=True)) if wanted == 1 and size != 1]
    total = call("ReduceSum", value, integers(axes), keepdims=1) if axes else value
    return call("Reshape", total, integers(target), allowzero=1)


Gradients: TypeAlias = Mapping[int, Expr | None]
"""By input slot: the gradient; None for one that is zero everywhere."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How gradients go back through one operator.

    Attributes:
        op: Operator name.
        gradients: The rule itself.
        since: First version of the operator set that it holds for; it holds until a rule with a later one.
        domain: Operator domain.
    """

    op: str
    gradients: Callable[[Site], Gradients]
    since: int = 1
    domain: str = DEFAULT_DOMAIN
