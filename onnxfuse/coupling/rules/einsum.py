"""Einsum, as exporters write it: every letter is an axis; letters that vanish are summed over."""

from collections.abc import Iterator, Sequence

from onnxfuse.coupling.constraints import (
    AxisRef,
    Constraint,
    Contracted,
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
    """Einsum in all its forms but one: a letter twice in one operand, which takes a diagonal."""
    equation = site.attribute("equation").decode().replace(" ", "")
    tensors = [tensor for tensor in site.inputs if tensor is not None]
    terms = _terms(equation, [tensor.rank for tensor in tensors])
    tensors.append(site.output())
    if any(len(set(term)) != len(term) for term in terms):
        what = f"the equation {equation!r} repeats a letter in one operand"
        raise ValueError(what)
    places: dict[str, list[tuple[Tensor, AxisRef]]] = {}
    for term, tensor in zip(terms, tensors, strict=True):
        for letter, axis in zip(term, tensor.axes, strict=True):
            places.setdefault(letter, []).append((tensor, axis))
    for letter, found in places.items():
        size = max(tensor.dims[axis.axis] for tensor, axis in found)
        # An axis of size 1 is repeated and says nothing.
        wide = [(tensor, axis) for tensor, axis in found if tensor.dims[axis.axis] == size]
        summed = letter not in terms[-1]
        if summed and len(wide) == 2 and not any(tensor.is_weight for tensor, _ in wide):
            reason = f"{site.node.title} multiplies two computed tensors over it"
            yield Contracted(wide[0][1], wide[1][1], reason, (wide[0][1], wide[1][1]))
            continue
        yield from (Equal(wide[0][1], axis) for _, axis in wide)
        yield from _roles(site, wide, summed=summed)


def _terms(equation: str, ranks: Sequence[int]) -> list[str]:
    """Return the letters of every operand and then of the output, one for each axis.

    An ellipsis stands for the axes that have no letter; they align from the end, so they get numbers, the last one 0.
    An output that is left out has the ellipsis and then, in alphabetical order, the letters that occur just once.
    """
    left, _, right = equation.partition("->")
    given = left.split(",")
    several = [rank - len(term.replace("...", "")) for term, rank in zip(given, ranks, strict=True)]
    if "->" not in equation:
        letters = left.replace(",", "").replace("...", "")
        once = sorted(letter for letter in letters if letters.count(letter) == 1)
        right = "..." * ("..." in left) + "".join(once)
    longest = max((n for term, n in zip(given, several, strict=True) if "..." in term), default=0)

    def spelled(term: str, n: int) -> str:
        return term.replace("...", "".join(str(i) for i in reversed(range(n))))

    return [*(spelled(term, n) for term, n in zip(given, several, strict=True)), spelled(right, longest)]


def _roles(site: Site, found: list[tuple[Tensor, AxisRef]], *, summed: bool) -> Iterator[Constraint]:
    weights = [axis for tensor, axis in found if tensor.is_weight]
    computed = [axis for tensor, axis in found if not tensor.is_weight]
    if summed and len(weights) == 1 and len(computed) == 1:
        yield Weight(weights[0], Role.CONSUMER)
    elif summed and not weights and len(computed) > 1:
        yield SelectOnly(computed[0], f"{site.node.title} multiplies computed tensors over it")
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
