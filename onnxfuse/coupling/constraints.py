"""What operator rules say: equations between axes, and what the axes of weights do.

A rule is a pure function from a `Site` (one node, with the shapes and constants around it) to constraints. It reads
like the operator's definition: a convolution says that its output channels are the filters of its weight. The solver in
`onnxfuse.coupling.solve` interprets the constraints; rules never see atoms, weights or other nodes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from onnxfuse.graph.view import DEFAULT_DOMAIN, NodeView, Operand
from onnxfuse.statistics.features import Role

__all__ = [
    "AttributeSize",
    "AxisRef",
    "Cat",
    "ConstantSize",
    "Constraint",
    "Contracted",
    "Default",
    "Encoded",
    "EncodedBias",
    "Equal",
    "Expr",
    "Freeze",
    "Fresh",
    "Multiple",
    "Normalises",
    "Parallel",
    "Picked",
    "Prod",
    "Residual",
    "Rounded",
    "Rule",
    "SelectOnly",
    "Site",
    "Spare",
    "Statistic",
    "Tensor",
    "Weight",
    "axis_references",
    "cat",
    "prod",
]


@dataclass(frozen=True, slots=True)
class AxisRef:
    """One axis of one operand."""

    operand: Operand
    axis: int


@dataclass(frozen=True, eq=False)
class Fresh:
    """An axis part that the rule introduces, such as the groups of a convolution or the zeros of a Pad.

    Attributes:
        size: Number of indices, >= 0.
        label: What it is, for messages.
        fixed: Why its size may not change; empty if it may.
        apart: Whether only the size is fixed, and what is computed for one index depends on no other.
    """

    size: int
    label: str
    fixed: str = ""
    apart: bool = False


@dataclass(frozen=True, slots=True)
class Cat:
    """Parts one after the other along an axis."""

    parts: "tuple[Expr, ...]"


@dataclass(frozen=True, slots=True)
class Prod:
    """Factors combined in row-major order, the last one fastest."""

    factors: "tuple[Expr, ...]"


Expr: TypeAlias = AxisRef | Fresh | Cat | Prod


def cat(*parts: Expr) -> Cat:
    """Return the concatenation of ``parts``."""
    return Cat(parts)


def prod(*factors: Expr) -> Prod:
    """Return the row-major product of ``factors``."""
    return Prod(factors)


@dataclass(frozen=True, slots=True)
class Equal:
    """Both sides are the same indices, whatever the sizes become."""

    left: Expr
    right: Expr


@dataclass(frozen=True, slots=True)
class Freeze:
    """The expression keeps its size, for a reason that is shown to the user.

    Attributes:
        expr: What keeps its size.
        reason: Why.
        apart: Whether what is computed for one index depends on no other, so that each may have channels of its own.
    """

    expr: Expr
    reason: str
    apart: bool = False


@dataclass(frozen=True, slots=True)
class Residual:
    """The expression is an axis of a sum of computed tensors: a residual stream."""

    expr: Expr


@dataclass(frozen=True, slots=True)
class SelectOnly:
    """The channels may be dropped or reordered but not mixed, for a reason that is shown to the user."""

    expr: Expr
    reason: str


@dataclass(frozen=True, slots=True)
class Contracted:
    """Two computed tensors are multiplied and summed over these axes, as queries and keys of an attention are.

    The product is invariant under the same permutation of both, but a linear map of both squares. Where nothing else
    ties the two, one may be mapped by A and the other by B transposed, as weights that read channels are (see
    `onnxfuse.coupling.contractions`). Elsewhere channels are only dropped, for a reason that is shown to the user.

    Attributes:
        left: What is summed over, on one side.
        right: The same on the other side.
        reason: Why they can't be mixed; shown where that is so.
        axes: The axes of the two tensors that have them.
    """

    left: Expr
    right: Expr
    reason: str
    axes: tuple[AxisRef, AxisRef]


@dataclass(frozen=True, slots=True)
class Parallel:
    """Two computed tensors are multiplied index by index over the expression, as over the heads of an attention.

    An index is dropped as a whole, with everything that it multiplies on an axis; indices can't be mixed, since what
    is computed from the mean of two has nothing to do with the mean of what is computed from each.
    """

    expr: Expr
    reason: str


@dataclass(frozen=True, slots=True)
class Multiple:
    """The node takes only certain sizes of the expression, for a reason that is shown to the user.

    Attributes:
        expr: The expression.
        of: What its size has to be a multiple of.
        reason: Why; shown where it can't be.
    """

    expr: Expr
    of: int
    reason: str


@dataclass(frozen=True, slots=True)
class Spare:
    """The indices are `Parallel`, but kept, for a reason shown to the user, as long as anything beside them can go.

    Attributes:
        expr: The indices.
        reason: Why they are kept.
        axes: Where they are beside other things; they go if nothing else on one of these axes may change.
    """

    expr: Expr
    reason: str
    axes: tuple[AxisRef, ...]


@dataclass(frozen=True, slots=True)
class Statistic:
    """The node computes a mean or an extremum over the channels, which only approximates the original's with fewer."""

    expr: Expr
    reason: str


@dataclass(frozen=True, slots=True)
class Weight:
    """An axis of a weight takes part in fusion with this role."""

    axis: AxisRef
    role: Role


@dataclass(frozen=True, slots=True)
class Normalises:
    """The node is a per-channel affine map y = scale x + shift in inference form (a batch normalisation).

    Attributes:
        channels: The channel axis of its input.
    """

    channels: AxisRef


@dataclass(frozen=True, slots=True)
class AttributeSize:
    """Attribute ``name`` (or its entry ``index``) holds ``scale`` times the size of ``expr``."""

    name: str
    expr: Expr
    index: int | None = None
    scale: int = 1


@dataclass(frozen=True, slots=True)
class ConstantSize:
    """Element ``index`` of the integer input at ``slot`` holds ``scale`` times the size of ``expr``."""

    slot: int
    index: int
    expr: Expr
    scale: int = 1


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tensor holds integers q that stand for (q - zero) scale.

    It says nothing of axes: those of scale and zero point need equations and roles of their own.

    Attributes:
        operand: The tensor: a weight, or a computed value.
        scale: Its scale; None where the node does not have it, so that the integers are all there is.
        zero: Its zero point; None for 0, or for half of the range of packed integers.
        axes: The axes that scale and zero point run along, in their order; none for one scale for all.
        along: The axis of ``axes`` along which one scale is for ``block`` indices, the last block being shorter where
            they do not come out even.
        block: How many indices share a scale along ``along``.
        bits: Width of integers that are packed into bytes along the last axis, the lowest first; 0 if they are not.
    """

    operand: Operand
    scale: Operand | None
    zero: Operand | None
    axes: tuple[int, ...] = ()
    along: int = -1
    block: int = 1
    bits: int = 0


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight of floats is rounded to integers, which stand for it from here on.

    It says nothing of axes: those of scale and zero point need equations and roles of their own.

    Attributes:
        operand: The weight, as the node that rounds it reads it.
        result: Its integers.
        scale: Their scale.
        zero: Their zero point; None for 0.
        axes: The axes that scale and zero point run along, as in `Encoded`.
        along: The axis of ``axes`` that falls into blocks.
        block: How many indices share a scale along it.
    """

    operand: Operand
    result: Operand
    scale: Operand
    zero: Operand | None
    axes: tuple[int, ...] = ()
    along: int = -1
    block: int = 1


@dataclass(frozen=True, slots=True)
class EncodedBias:
    """A bias holds integers whose scale is ``factor`` times that of the input times that of the weight.

    Attributes:
        operand: The bias.
        x_scale: The scale of what the node reads, one number.
        weight: The weight, which is `Encoded` too.
        factor: A factor that the node states.
    """

    operand: Operand
    x_scale: Operand
    weight: Operand
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Default:
    """The file leaves attribute ``name`` out, and the operator then computes ``value`` from the size of ``expr``.

    The value belongs to the network as it was trained, so it is written down once that size changes.
    """

    name: str
    value: float
    expr: Expr


@dataclass(frozen=True, slots=True)
class Picked:
    """The vector of indices at ``slot`` is all positions of some parts of an axis, one part after the other.

    Attributes:
        slot: The input that holds the indices.
        parts: What the axis consists of: parts one after the other, or, if ``crossed``, the two factors of a product.
        order: Which parts are picked, in their order; a part may occur several times.
        crossed: Whether the axis is a product, of which all positions are picked with the factors in this order.
    """

    slot: int
    parts: tuple[Expr, ...]
    order: tuple[int, ...]
    crossed: bool = False


Constraint: TypeAlias = (
    Equal
    | Freeze
    | Residual
    | SelectOnly
    | Contracted
    | Parallel
    | Multiple
    | Spare
    | Statistic
    | Weight
    | Normalises
    | AttributeSize
    | ConstantSize
    | Default
    | Picked
    | Encoded
    | EncodedBias
    | Rounded
)


@dataclass(frozen=True)
class Tensor:
    """An operand as a rule sees it.

    Attributes:
        operand: Which value.
        dims: Its concrete shape.
        value: Its value where that depends on constants and shapes alone and is small, else None.
        is_weight: Whether it is a constant, or made from constants by operators that only rearrange.
        moving: Which elements of the value may be others at other sizes of what the file leaves open; None if none may.
    """

    operand: Operand
    dims: tuple[int, ...]
    value: np.ndarray[Any, np.dtype[Any]] | None
    is_weight: bool
    moving: np.ndarray[Any, np.dtype[np.bool_]] | None = None

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.dims)

    @cached_property
    def axes(self) -> tuple[AxisRef, ...]:
        """All axes in order."""
        return tuple(AxisRef(self.operand, i) for i in range(len(self.dims)))

    def __getitem__(self, axis: int) -> AxisRef:
        """Return one axis; negative positions count from the end."""
        if not -len(self.axes) <= axis < len(self.axes):
            what = f"axis {axis} of a tensor of rank {self.rank}"
            raise IndexError(what)
        return self.axes[axis]


@dataclass(frozen=True)
class Site:
    """A node with the operands around it: all that a rule may look at.

    Attributes:
        node: The node.
        inputs: Its inputs by position; None where one is left out.
        outputs: Its outputs by position; None where one is left out.
    """

    node: NodeView
    inputs: Sequence[Tensor | None]
    outputs: Sequence[Tensor | None] = field(default=())

    def input(self, slot: int) -> Tensor:
        """Return an input that must be there; IndexError where it is not."""
        tensor = self.optional_input(slot)
        if tensor is None:
            what = f"input {slot} is missing"
            raise IndexError(what)
        return tensor

    def optional_input(self, slot: int) -> Tensor | None:
        """Return the input at ``slot``, or None where it is left out."""
        return self.inputs[slot] if slot < len(self.inputs) else None

    def output(self, slot: int = 0) -> Tensor:
        """Return an output that must be there; IndexError where it is not."""
        tensor = self.outputs[slot]
        if tensor is None:
            what = f"output {slot} is missing"
            raise IndexError(what)
        return tensor

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return the value of an attribute, or ``default`` where the node has none of that name."""
        return self.node.attributes.get(name, default)

    def integers(self, name: str, slot: int) -> list[int] | None:
        """Return integers that older operator sets keep in attribute ``name`` and newer ones in input ``slot``.

        Returns:
            The integers; None where neither is there, or where they are not known before run time.
        """
        if name in self.node.attributes:
            return [int(i) for i in np.atleast_1d(self.node.attributes[name])]
        tensor = self.optional_input(slot)
        if tensor is None or tensor.value is None:
            return None
        return [int(i) for i in np.atleast_1d(tensor.value)]

    def moves(self, slot: int, index: int) -> bool:
        """Return whether element ``index`` of the integers in input ``slot`` may be another at other open sizes."""
        tensor = self.optional_input(slot)
        moving = None if tensor is None else tensor.moving
        return moving is not None and index < moving.size and bool(moving.ravel()[index])

    def entry_size(self, name: str, slot: int, index: int, expr: Expr, scale: int = 1) -> Constraint:
        """Say that entry ``index`` of such integers holds ``scale`` times the size of ``expr``."""
        if name in self.node.attributes:
            return AttributeSize(name, expr, index, scale)
        return ConstantSize(slot, index, expr, scale)


@dataclass(frozen=True, slots=True)
class Rule:
    """How one operator couples axes.

    Attributes:
        op: Operator name.
        infer: The rule itself.
        since: First version of the operator set that it holds for; it holds until a rule with a later one.
        domain: Operator domain.
    """

    op: str
    infer: Callable[[Site], Iterator[Constraint]]
    since: int = 1
    domain: str = DEFAULT_DOMAIN


def axis_references(constraint: Constraint) -> Iterator[AxisRef]:
    """Yield the axes that a constraint says something of; roles and stated sizes say nothing of an axis' identity."""
    match constraint:
        case Equal(left, right) | Contracted(left, right):
            yield from _axis_refs(left)
            yield from _axis_refs(right)
        case Freeze(expr, _) | Residual(expr) | SelectOnly(expr, _) | Statistic(expr, _):
            yield from _axis_refs(expr)
        case Parallel(expr, _) | Spare(expr) | Multiple(expr):
            yield from _axis_refs(expr)
        case Weight() | Normalises() | AttributeSize() | ConstantSize() | Default() | Picked():
            return
        case Encoded() | EncodedBias() | Rounded():
            return


def _axis_refs(expr: Expr) -> Iterator[AxisRef]:
    match expr:
        case AxisRef():
            yield expr
        case Fresh():
            return
        case Cat(parts):
            for part in parts:
                yield from _axis_refs(part)
        case Prod(factors):
            for factor in factors:
                yield from _axis_refs(factor)
