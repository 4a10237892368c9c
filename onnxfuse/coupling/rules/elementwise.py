"""Operators that act on every element alone: all operands share their axes, up to broadcasting.

Axes align from the end; an axis of size 1 against a longer one is repeated and says nothing. A constant that is added
moves with the channels like a bias; one that multiplies, bounds or bends is carried along as a mean.
"""

from collections.abc import Iterator, Sequence

from onnxfuse.coupling.constraints import Constraint, Equal, Residual, Rule, SelectOnly, Site, Tensor, Weight
from onnxfuse.statistics.features import Role

__all__ = ["RULES", "UNARY", "broadcast", "summed", "unary"]

UNARY = (
    *(
        "Abs",
        "Acos",
        "Acosh",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "BitwiseNot",
        "Cast",
        "Ceil",
        "Celu",
        "Clip",
        "Cos",
    ),
    *(
        "Cosh",
        "Dropout",
        "Elu",
        "Erf",
        "Exp",
        "Floor",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "IsInf",
    ),
    *(
        "IsNaN",
        "LeakyRelu",
        "Log",
        "Mish",
        "Neg",
        "Not",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Shrink",
        "Sigmoid",
    ),
    *("Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu"),
)
_ADDITIVE = ("Add", "Sub", "Sum")
_BROADCASTING = (
    *(
        "And",
        "BitShift",
        "BitwiseAnd",
        "BitwiseOr",
        "BitwiseXor",
        "Div",
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
    ),
    *("LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Where", "Xor"),
)


# A weight goes through these as it is, and has the role that what reads it in the end gives it.
_PASSING = frozenset({"Cast", "Clip", "Identity"})


def unary(site: Site) -> Iterator[Constraint]:
    """One tensor in, the same axes out; further inputs are scalars (Clip's bounds, Dropout's ratio)."""
    x = site.input(0)
    for y in site.outputs:
        if y is not None:
            for axis_x, axis_y in zip(x.axes, y.axes, strict=True):
                yield Equal(axis_x, axis_y)
    if x.is_weight and site.node.op not in _PASSING:
        # As the angles of rotary positions: the sine of a mean is no mean of sines.
        for i, axis in enumerate(x.axes):
            if x.dims[i] > 1:
                yield Weight(axis, Role.CARRIED)
                yield SelectOnly(axis, f"{site.node.title} bends constants that belong to it")


def cast_like(site: Site) -> Iterator[Constraint]:
    """CastLike: the second input gives its data type alone."""
    x, y = site.input(0), site.output()
    for axis_x, axis_y in zip(x.axes, y.axes, strict=True):
        yield Equal(axis_x, axis_y)
    yield from (Equal(axis, axis) for axis in site.input(1).axes)


def broadcasting(site: Site) -> Iterator[Constraint]:
    """Any number of operands, broadcast against each other."""
    yield from broadcast(site, [x for x in site.inputs if x is not None], Role.CARRIED)


def additive(site: Site) -> Iterator[Constraint]:
    """Sums: constants move like biases, computed operands form a residual stream."""
    yield from summed(site, [x for x in site.inputs if x is not None])


def summed(site: Site, terms: Sequence[Tensor]) -> Iterator[Constraint]:
    """The sum of some of the inputs."""
    yield from broadcast(site, terms, Role.BIAS)
    y = site.output()
    computed = [x for x in terms if not x.is_weight]
    for position in range(1, y.rank + 1):
        sharing = [x for x in computed if x.rank >= position and x.dims[-position] == y.dims[-position] > 1]
        if len(sharing) > 1:
            yield Residual(y[-position])


def broadcast(site: Site, operands: Sequence[Tensor], constant_role: Role) -> Iterator[Constraint]:
    """Some of the inputs, broadcast against each other; axes align from the end."""
    y = site.output()
    for x in operands:
        for position in range(1, x.rank + 1):
            if x.dims[-position] == y.dims[-position]:
                yield Equal(x[-position], y[-position])
                if x.is_weight:
                    yield Weight(x[-position], constant_role)


RULES = (
    *(Rule(op, unary) for op in UNARY),
    # Experiments of early versions of ONNX, which ONNX Runtime still runs.
    *(Rule(op, unary) for op in ("Affine", "ParametricSoftplus", "ScaledTanh")),
    *(Rule(op, additive) for op in _ADDITIVE),
    *(Rule(op, broadcasting) for op in _BROADCASTING),
    Rule("CastLike", cast_like),
)
