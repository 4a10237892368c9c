"""Symbolic dimensions: the names of sizes that a file leaves open, and sums and products of them.

Exporters write down what they know: the attention mask of a decoder is as long as ``past_sequence_length +
sequence_length``. Such an expression is no size of its own.
"""

import ast
import operator
from collections.abc import Callable, Mapping

__all__ = ["is_expression", "value_of"]

_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def is_expression(symbol: str) -> bool:
    """Whether a symbolic dimension is computed from others, by what it says.

    Example:
        >>> [is_expression(symbol) for symbol in ("past + length", "2*s0", "batch_size", "unk__12", "a/b", "")]
        [True, True, False, False, False, False]
    """
    tree = _parsed(symbol)
    return tree is not None and not isinstance(tree, ast.Name) and any(isinstance(n, ast.Name) for n in ast.walk(tree))


def value_of(symbol: str, sizes: Mapping[str, int]) -> int | None:
    """Compute a symbolic dimension.

    Args:
        symbol: The expression.
        sizes: The size of every symbol by itself.

    Returns:
        Its size; None where a symbol in it has none, or the result is none.

    Example:
        >>> value_of("past + length", {"past": 5, "length": 3}), value_of("past - 6", {"past": 5})
        (8, None)
    """
    tree = _parsed(symbol)
    value = None if tree is None else _value(tree, sizes)
    return value if value is not None and value > 0 else None


def _parsed(symbol: str) -> ast.expr | None:
    """Return what an expression consists of; None for what is not made of names, numbers and the four operators."""
    try:
        tree = ast.parse(symbol.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tree if _is_known(tree) else None


def _is_known(tree: ast.expr) -> bool:
    match tree:
        case ast.BinOp(left, op, right):
            return type(op) in _OPERATORS and _is_known(left) and _is_known(right)
        case ast.Constant(value):
            return type(value) is int
        case _:
            return isinstance(tree, ast.Name)


def _value(tree: ast.expr, sizes: Mapping[str, int]) -> int | None:
    match tree:
        case ast.BinOp(left, op, right):
            a, b = _value(left, sizes), _value(right, sizes)
            if a is None or b is None or (isinstance(op, ast.FloorDiv) and b == 0):
                return None
            return _OPERATORS[type(op)](a, b)
        case ast.Constant(value) if isinstance(value, int):
            return value
        case ast.Name(name):
            return sizes.get(name)
        case _:
            return None
