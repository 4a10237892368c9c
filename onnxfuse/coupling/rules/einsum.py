"""Einsum, as exporters write it: every letter is an axis; letters that vanish are summed over."""

from collections.abc import Iterator

from onnxfuse.coupling.constraints import (
    AxisRef,
    Constraint,
    Equal,
    Freeze,
    Parallel,
    Rule,
    SelectOnly,
    Site,
    Tensor,
    Weight,
)
from onnxfuse.statistics.features import Role

__all__ = ["RULES"]


def einsum(site: Site) -> Iterator[Constraint]:
    """Einsum of explicit letters, without an ellipsis, a letter twice in one operand, or an implicit output."""
    equation = site.attribute("equation").decode().replace(" ", "")
    if "." in equation or "->" not in equation:
        what = f"the equation {equation!r} has an ellipsis or no output"
        raise ValueError(what)
    left, right = equation.split("->")
    terms = [*left.split(","), right]
    tensors = [*(site.input(i) for i in range(len(terms) - 1)), site.output()]
    if any(len(set(term)) != len(term) for term in terms):
        what = f"the equation {equation!r} repeats a letter in one operand"
        raise ValueError(what)
    places: dict[str, list[tuple[Tensor, AxisRef]]] = {}
    for term, tensor in zip(terms, tensors, strict=True):
        for letter, axis in zip(term, tensor.axes, strict=True):
            places.setdefault(letter, []).append((tensor, axis))
    for letter, found in places.items():
        yield from (Equal(found[0][1], axis) for _, axis in found[1:])
        yield from _roles(site, found, summed=letter not in right)


def _roles(site: Site, found: list[tuple[Tensor, AxisRef]], *, summed: bool) -> Iterator[Constraint]:
    weights = [axis for tensor, axis in found if tensor.is_weight]
    computed = [axis for tensor, axis in found if not tensor.is_weight]
    if summed and len(weights) == 1 and len(computed) == 1:
        yield Weight(weights[0], Role.CONSUMER)
    elif summed and not weights and len(computed) > 1:
        yield SelectOnly(computed[0], f"{site.node.title} multiplies two computed tensors over it")
    elif summed:
        yield from (Freeze(axis, f"{site.node.title} sums over it") for axis in (*weights, *computed))
    elif len(weights) == 0 and len(computed) > 2:
        yield Parallel(computed[0], f"{site.node.title} multiplies index by index over it")
    elif len(weights) == 1 and len(computed) == 1:
        yield Weight(weights[0], Role.PRODUCER)
    elif weights:
        # Also an axis of the output: it scales along, entry by entry.
        yield from (Weight(axis, Role.CARRIED) for axis in weights)


RULES = (Rule("Einsum", einsum, since=12),)
