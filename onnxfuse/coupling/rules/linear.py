"""Gemm and MatMul: a product of a computed tensor with a constant matrix makes and consumes channels.

Gemm is y = alpha op(A) op(B) + beta C with op the transposition asked for; MatMul multiplies the last two axes and
broadcasts the others. The scalars do not matter to the coupling: a linear map of the output axis acts on B and C alike.
"""

from collections.abc import Iterator, Sequence

from onnxfuse.coupling.constraints import (
    AxisRef,
    Constraint,
    Contracted,
    Equal,
    Freeze,
    Parallel,
    Rule,
    Site,
    Tensor,
    Weight,
)
from onnxfuse.statistics.features import Role

__all__ = ["RULES", "full_product", "gemm", "product"]


def gemm(site: Site) -> Iterator[Constraint]:
    """Gemm with every combination of transA and transB, and every broadcast of C."""
    yield from full_product(site, site.input(0), site.input(1), site.optional_input(2))


def full_product(site: Site, a: Tensor, b: Tensor, c: Tensor | None) -> Iterator[Constraint]:
    """A Gemm, whatever the slots are that it reads A, B and C from."""
    y = site.output()
    rows, inner_a = (a[1], a[0]) if site.attribute("transA", 0) else (a[0], a[1])
    inner_b, columns = (b[1], b[0]) if site.attribute("transB", 0) else (b[0], b[1])
    yield Equal(y[0], rows)
    yield Equal(y[1], columns)
    yield from _contraction(site, a, b, inner_a, inner_b, rows, columns)
    if c is not None:
        for position in range(1, c.rank + 1):
            if c.dims[-position] == y.dims[-position] > 1:
                yield Equal(c[-position], y[-position])
                yield Weight(c[-position], Role.BIAS)


def matmul(site: Site) -> Iterator[Constraint]:
    """MatMul of any ranks; batch axes broadcast."""
    yield from product(site, site.input(0), site.input(1))


def product(
    site: Site, a: Tensor, b: Tensor, order_a: Sequence[int] | None = None, order_b: Sequence[int] | None = None
) -> Iterator[Constraint]:
    """A product over the last two axes of both inputs, each of which may be transposed.

    Args:
        site: The node, whose output is Y.
        a: A.
        b: B.
        order_a: The order that the axes of A are put into first; None if they stay.
        order_b: That of B.
    """
    y = site.output()
    of_a, of_b = list(order_a or range(a.rank)), list(order_b or range(b.rank))
    rows, inner_a = (a[of_a[-2]], a[of_a[-1]]) if a.rank > 1 else (None, a[0])
    inner_b, columns = (b[of_b[-2]], b[of_b[-1]]) if b.rank > 1 else (b[0], None)
    if rows is not None:
        yield Equal(rows, y[-2] if columns is not None else y[-1])
    if columns is not None:
        yield Equal(columns, y[-1])
    matrix_axes = (rows is not None) + (columns is not None)
    computed = not a.is_weight and not b.is_weight
    for operand, order in ((a, of_a), (b, of_b)):
        for position, axis in enumerate(order[:-2]):
            behind = operand.rank - position  # counted from the end, where broadcasting aligns
            target = y.rank - behind + (2 - matrix_axes)
            if operand.dims[axis] == y.dims[target]:
                yield Equal(operand[axis], y[target])
                if operand.is_weight:
                    yield Freeze(operand[axis], f"{site.node.title} multiplies by a stack of matrices")
                if computed:
                    yield Parallel(operand[axis], f"{site.node.title} multiplies index by index over it")
    yield from _contraction(site, a, b, inner_a, inner_b, rows, columns)


def _contraction(
    site: Site,
    a: Tensor,
    b: Tensor,
    inner_a: AxisRef,
    inner_b: AxisRef,
    rows: AxisRef | None,
    columns: AxisRef | None,
) -> Iterator[Constraint]:
    if not a.is_weight and not b.is_weight:
        reason = f"{site.node.title} multiplies two computed tensors over it"
        yield Contracted(inner_a, inner_b, reason, (inner_a, inner_b))
        return
    yield Equal(inner_a, inner_b)
    if a.is_weight and b.is_weight:
        yield Freeze(inner_a, f"{site.node.title} multiplies two constants over it")
        return
    constant_inner, constant_outer = (inner_b, columns) if b.is_weight else (inner_a, rows)
    yield Weight(constant_inner, Role.CONSUMER)
    if constant_outer is not None:
        yield Weight(constant_outer, Role.PRODUCER)


RULES = (Rule("Gemm", gemm), Rule("MatMul", matmul))
