"""Operators that act on every element alone: the gradient times the derivative, summed where an operand was broadcast.

At a kink (Relu at 0) the derivative is that of the flat side, as in training frameworks.
"""

import math
from collections.abc import Callable

import numpy as np

from onnxfuse.gradient.expressions import Expr, Gradients, Literal, Rule, Site, call

__all__ = ["RULES"]

_ROOT_2, _ROOT_PI = math.sqrt(2), math.sqrt(math.pi)
# The cubic coefficient of the tanh form of Gelu (Hendrycks and Gimpel, 2016).
_CUBIC = 0.044715


def _choose(condition: Expr, yes: Expr | float, no: Expr | float) -> Expr:
    return call("Where", condition, yes, no)


def _above(value: Expr, bound: Expr | float) -> Expr:
    return call("Greater", value, bound)


def _below(value: Expr, bound: Expr | float) -> Expr:
    return call("Less", value, bound)


def _through(derivative: Callable[[Site], Expr | float]) -> Callable[[Site], Gradients]:
    """Make the rule of an operator with one input from its derivative."""

    def rule(site: Site) -> Gradients:
        return {0: site.g * derivative(site)}

    return rule


def _number(site: Site, name: str, default: float) -> float:
    return float(site.attribute(name, default))


def _relu(site: Site) -> Gradients:
    return {0: _choose(_above(site.y, 0.0), site.g, 0.0)}


def _leaky_relu(site: Site) -> Expr:
    return _choose(_above(site.x, 0.0), 1.0, _number(site, "alpha", 0.01))


def _elu(site: Site) -> Expr:
    return _choose(_above(site.x, 0.0), 1.0, site.y + _number(site, "alpha", 1.0))


def _celu(site: Site) -> Expr:
    return _choose(_above(site.x, 0.0), 1.0, call("Exp", site.x / _number(site, "alpha", 1.0)))


def _selu(site: Site) -> Expr:
    alpha = _number(site, "alpha", 1.67326319217681884765625)
    gamma = _number(site, "gamma", 1.05070102214813232421875)
    return _choose(_above(site.x, 0.0), gamma, site.y + alpha * gamma)


def _hard_sigmoid(site: Site) -> Expr:
    inside = call("And", _above(site.y, 0.0), _below(site.y, 1.0))
    return _choose(inside, _number(site, "alpha", 0.2), 0.0)


def _hard_swish(site: Site) -> Expr:
    inside = _choose(_above(site.x, 3.0), 1.0, site.x / 3.0 + 0.5)
    return _choose(_below(site.x, -3.0), 0.0, inside)


def _softplus(site: Site) -> Expr:
    return call("Sigmoid", site.x)


def _softsign(site: Site) -> Expr:
    size = call("Abs", site.x) + 1.0
    return 1.0 / (size * size)


def _gelu(site: Site) -> Expr:
    """The exact form, x Phi(x), or its approximation by tanh."""
    x = site.x
    if site.attribute("approximate", b"none") == b"tanh":
        scale = _ROOT_2 / _ROOT_PI
        t = call("Tanh", scale * (x + _CUBIC * (x * x * x)))
        return 0.5 * (t + 1.0) + 0.5 * x * (1.0 - t * t) * (scale * (1.0 + 3 * _CUBIC * (x * x)))
    return 0.5 * (1.0 + call("Erf", x / _ROOT_2)) + x * call("Exp", -0.5 * (x * x)) * (1 / (_ROOT_2 * _ROOT_PI))


def _quick_gelu(site: Site) -> Expr:
    alpha = _number(site, "alpha", 1.702)
    s = call("Sigmoid", site.x * alpha)
    return s + alpha * site.x * s * (1.0 - s)


def _swish(site: Site) -> Expr:
    alpha = _number(site, "alpha", 1.0)
    s = call("Sigmoid", site.x * alpha)
    return s + alpha * site.x * s * (1.0 - s)


def _mish(site: Site) -> Expr:
    t = call("Tanh", call("Softplus", site.x))
    return t + site.x * (1.0 - t * t) * call("Sigmoid", site.x)


def clip(site: Site) -> Gradients:
    """Clip, with bounds as attributes or as inputs: only what is inside goes through."""
    value = site.g
    for slot, name, test in ((1, "min", _above), (2, "max", _below)):
        if site.has(slot):
            value = _choose(test(site.x, site.input(slot)), value, 0.0)
        elif site.attribute(name) is not None:
            value = _choose(test(site.x, float(site.attribute(name))), value, 0.0)
    return {0: value}


def passed(site: Site) -> Gradients:
    """Identity, Cast between floats, Dropout as it is after training."""
    return {0: site.g}


def flat(site: Site) -> Gradients:
    """Operators that are constant almost everywhere."""
    return dict.fromkeys(range(len(site.node.inputs)))


def add(site: Site) -> Gradients:
    """Add and Sum, any number of operands."""
    return {slot: site.fitted(site.g, slot) for slot in range(len(site.node.inputs))}


def mean(site: Site) -> Gradients:
    """Mean of any number of operands."""
    count = len(site.node.inputs)
    return {slot: site.fitted(site.g * (1.0 / count), slot) for slot in range(count)}


def sub(site: Site) -> Gradients:
    """Sub."""
    return {0: site.fitted(site.g, 0), 1: site.fitted(-site.g, 1)}


def mul(site: Site) -> Gradients:
    """Mul."""
    return {0: site.fitted(site.g * site.input(1), 0), 1: site.fitted(site.g * site.x, 1)}


def div(site: Site) -> Gradients:
    """Div."""
    over = site.g / site.input(1)
    return {0: site.fitted(over, 0), 1: site.fitted(-(over * site.y), 1)}


def power(site: Site) -> Gradients:
    """Pow with a known exponent, which may be of any type."""
    exponent = site.known(1).astype(np.float64)
    if exponent.size == 1:
        factor = float(exponent.reshape(-1)[0])
        slope: Expr = 2.0 * site.x if factor == 2 else factor * call("Pow", site.x, factor - 1.0)
    else:
        slope = Literal(exponent) * call("Pow", site.x, Literal(exponent - 1.0))
    return {0: site.fitted(site.g * slope, 0)}


def prelu(site: Site) -> Gradients:
    """PRelu: the slope is broadcast to the input."""
    rising = _above(site.x, 0.0)
    return {
        0: site.g * _choose(rising, 1.0, site.input(1)),
        1: site.fitted(site.g * _choose(rising, 0.0, site.x), 1),
    }


def extreme(site: Site) -> Gradients:
    """Max and Min: to the operand that was taken; operands that tie share."""
    count = len(site.node.inputs)
    taken = [_choose(call("Equal", site.input(i), site.y), 1.0, 0.0) for i in range(count)]
    total = taken[0]
    for other in taken[1:]:
        total = total + other
    return {i: site.fitted(site.g * taken[i] / total, i) for i in range(count)}


def where(site: Site) -> Gradients:
    """Where: to the operand that was taken."""
    condition = site.input(0)
    return {1: site.fitted(_choose(condition, site.g, 0.0), 1), 2: site.fitted(_choose(condition, 0.0, site.g), 2)}


_DERIVATIVES: dict[str, Callable[[Site], Expr | float]] = {
    "Abs": lambda s: call("Sign", s.x),
    "Celu": _celu,
    "Cos": lambda s: -call("Sin", s.x),
    "Elu": _elu,
    "Erf": lambda s: call("Exp", -(s.x * s.x)) * (2 / _ROOT_PI),
    "Exp": lambda s: s.y,
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "LeakyRelu": _leaky_relu,
    "Log": lambda s: 1.0 / s.x,
    "Mish": _mish,
    "Neg": lambda _: -1.0,
    "Reciprocal": lambda s: -(s.y * s.y),
    "Selu": _selu,
    "Sigmoid": lambda s: s.y * (1.0 - s.y),
    "Sin": lambda s: call("Cos", s.x),
    "Softplus": _softplus,
    "Softsign": _softsign,
    "Sqrt": lambda s: 0.5 / s.y,
    "Swish": _swish,
    "Tanh": lambda s: 1.0 - s.y * s.y,
}

RULES = (
    *(Rule(op, _through(derivative)) for op, derivative in _DERIVATIVES.items()),
    *(Rule(op, passed) for op in ("Identity", "Cast", "CastLike", "Dropout")),
    *(Rule(op, flat) for op in ("Ceil", "Floor", "Round", "Sign")),
    *(Rule(op, extreme) for op in ("Max", "Min")),
    Rule("Relu", _relu),
    Rule("Clip", clip),
    Rule("Add", add),
    Rule("Sum", add),
    Rule("Mean", mean),
    Rule("Sub", sub),
    Rule("Mul", mul),
    Rule("Div", div),
    Rule("Pow", power),
    Rule("PRelu", prelu),
    Rule("Where", where),
    Rule("Gelu", _through(_gelu), domain="com.microsoft"),
    Rule("QuickGelu", _through(_quick_gelu), domain="com.microsoft"),
)
