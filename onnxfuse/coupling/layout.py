"""Axes as expressions over atoms, and the unifier that solves equations between them.

Every axis of every tensor is a *layout*: an `Atom` (so many indices that mean the same everywhere the atom occurs), a
`Concat` of layouts (one after the other, as after Concat or Pad), or a `Product` of layouts (row-major, the last factor
running fastest, as after Flatten: channels x height x width). Operators state equations between layouts; solving them
is first-order unification: an atom that must equal a compound layout is *bound* to it, and the binding holds wherever
the atom occurs. What is left unbound at the end are the sets of channels that must change together.

An equation that can't hold for every choice of sizes raises `LayoutMismatchError`; the caller then freezes both sides.
A frozen atom keeps its size, so over-freezing costs compression and never correctness.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Atom", "Concat", "Layout", "LayoutMismatchError", "Product", "Unifier", "leaves"]


class LayoutMismatchError(Exception):
    """Two layouts can't be made equal by splitting atoms.

    Attributes:
        parts: The parts of both that can't be, if all the rest is equal as long as these keep their sizes; else empty.
    """

    def __init__(self, what: str, parts: "tuple[Layout, ...]" = ()) -> None:
        """Say what does not fit, and in which parts."""
        super().__init__(what)
        self.parts = parts


class Atom:
    """Indices that belong together: the unit that a coupling group is made of.

    Attributes:
        size: Number of indices, >= 0.
        label: Where the atom came from, for messages.
        reason: Why it must keep its size; empty while it need not.
        multiple: What any new size has to be a multiple of.
        residual: Whether an addition of computed tensors ties it (a residual stream).
        unmixable: Why its indices may be dropped but not mixed; empty if they may be mixed.
        parallel: Whether products of computed tensors run index by index over it (the heads of an attention).
        statistic: Which node computes a statistic over its indices; empty if none does.
        structural: Whether it counts parts that an operator's form gives (gates, groups, blocks) and not channels.
        entangled: Whether what is computed for one index may depend on others, so far as is known.
        spare: Why it keeps its size as long as something beside it can change; empty if it need not.
        binding: The layout that it was found to equal, or None.
    """

    __slots__ = (
        "binding",
        "entangled",
        "label",
        "multiple",
        "parallel",
        "reason",
        "residual",
        "size",
        "spare",
        "statistic",
        "structural",
        "unmixable",
    )

    def __init__(self, size: int, label: str = "", reason: str = "", *, structural: bool = False) -> None:
        """Make an atom that nothing else is equal to yet; what is frozen from the start is entangled by default."""
        self.size = size
        self.label = label
        self.reason = reason
        self.multiple = 1
        self.structural = structural
        self.entangled = bool(reason)
        self.residual = False
        self.unmixable = ""
        self.parallel = False
        self.spare = ""
        self.statistic = ""
        self.binding: Layout | None = None

    def __repr__(self) -> str:
        """Show size and label."""
        return f"Atom({self.size}, {self.label!r})"


@dataclass(frozen=True, slots=True)
class Concat:
    """Layouts one after the other."""

    parts: "tuple[Layout, ...]"


@dataclass(frozen=True, slots=True)
class Product:
    """All combinations of the factors' indices in row-major order: the last factor runs fastest."""

    factors: "tuple[Layout, ...]"


Layout: TypeAlias = Atom | Concat | Product


def leaves(layout: Layout) -> Iterator[Atom]:
    """Yield the atoms of a layout as written, bound ones too, in order, repeated as often as they occur."""
    match layout:
        case Atom():
            yield layout
        case Concat(parts):
            for part in parts:
                yield from leaves(part)
        case Product(factors):
            for factor in factors:
                yield from leaves(factor)


class Unifier:
    """Solves equations between layouts by binding atoms.

    Attributes:
        apart: Atoms of which it was said that what is computed for one index depends on no other.
        spare: Atoms of which it was said that they are only dropped where nothing beside them can change.
        at: What demands the equations that are being solved, for messages.

    Example:
        >>> u = Unifier()
        >>> channels, flat = Atom(3, "channels"), Atom(12, "flat")
        >>> u.equate(flat, Product((channels, Atom(2), Atom(2))))
        >>> u.resolve(flat).factors[0] is channels
        True
    """

    def __init__(self) -> None:
        """Start without equations."""
        self.apart: set[Atom] = set()
        self.spare: set[Atom] = set()
        self.at = ""

    def size(self, layout: Layout) -> int:
        """Return the number of indices of ``layout``."""
        match layout:
            case Atom():
                return layout.size
            case Concat(parts):
                return sum(self.size(part) for part in parts)
            case Product(factors):
                return math.prod(self.size(factor) for factor in factors)

    def resolve(self, layout: Layout) -> Layout:
        """Replace bound atoms by what they are bound to, and flatten: the normal form that `equate` works on.

        Factors of size 1 and parts of size 0 vanish; a concat or product of one layout is that layout.
        """
        match layout:
            case Atom():
                return self._resolve_atom(layout)
            case Concat(parts):
                return _concat(self.resolve(part) for part in parts)
            case Product(factors):
                return self._product(self.resolve(factor) for factor in factors)

    def freeze(self, layout: Layout, reason: str, *, apart: bool = False) -> None:
        """Fix the size of every atom in ``layout``; the first reason given to an atom stays.

        Args:
            layout: What keeps its size.
            reason: Why.
            apart: Whether it is only the size that matters, and what is computed for one index depends on no other.
        """
        for atom in leaves(self.resolve(layout)):
            atom.reason = atom.reason or reason
            atom.entangled = atom.entangled or not apart
            if apart:
                self.apart.add(atom)

    def mark_residual(self, layout: Layout) -> None:
        """Note that an addition of computed tensors ties the atoms of ``layout``."""
        for atom in leaves(self.resolve(layout)):
            atom.residual = True

    def forbid_mixing(self, layout: Layout, reason: str) -> None:
        """Note that the indices of ``layout`` may be dropped but not mixed; the first reason stays."""
        for atom in leaves(self.resolve(layout)):
            atom.unmixable = atom.unmixable or reason

    def mark_parallel(self, layout: Layout, reason: str) -> None:
        """Note that computed tensors are multiplied index by index over ``layout``, so that indices can't be mixed."""
        for atom in leaves(self.resolve(layout)):
            atom.parallel = True
            self.apart.add(atom)
        self.forbid_mixing(layout, reason)

    def mark_multiple(self, layout: Layout, of: int, reason: str) -> None:
        """Note that ``layout`` has sizes that are multiples of a number; freeze atoms that have no smaller one."""
        for atom in leaves(self.resolve(layout)):
            # Sums and products of multiples are multiples.
            atom.multiple = math.lcm(atom.multiple, of)
            if atom.size % atom.multiple or atom.size == atom.multiple:
                self.freeze(atom, reason, apart=True)

    def mark_spare(self, layout: Layout, reason: str) -> None:
        """Note that the indices of ``layout`` are only dropped where nothing beside them can change."""
        for atom in leaves(self.resolve(layout)):
            atom.spare = atom.spare or reason
            self.apart.add(atom)
            self.spare.add(atom)

    def mark_statistic(self, layout: Layout, reason: str) -> None:
        """Note that a statistic is computed over the indices of ``layout``; the first reason stays."""
        for atom in leaves(self.resolve(layout)):
            atom.statistic = atom.statistic or reason

    def equate(self, left: Layout, right: Layout) -> None:
        """Make two layouts equal.

        Raises:
            LayoutMismatchError: They can't be equal whatever the sizes of their atoms. Some atoms may be bound already:
                every binding made follows from the equation.
        """
        a, b = self.resolve(left), self.resolve(right)
        if a is b:
            return
        if self.size(a) != self.size(b):
            what = f"{self.size(a)} indices against {self.size(b)}"
            raise LayoutMismatchError(what)
        if isinstance(a, Atom):
            self._bind(a, b)
        elif isinstance(b, Atom):
            self._bind(b, a)
        elif isinstance(a, Product) and isinstance(b, Product):
            self._equate_products(a.factors, b.factors)
        else:
            self._equate_sequences(a, b)

    def split(self, layout: Layout, at: int) -> tuple[Layout, Layout]:
        """Cut a layout in two after ``at`` indices, 0 < at < size, binding atoms as needed."""
        layout = self.resolve(layout)
        match layout:
            case Atom():
                head, tail = self._like(layout, at), self._like(layout, layout.size - at)
                layout.binding = Concat((head, tail))
                return head, tail
            case Concat(parts):
                return self._split_concat(parts, at)
            case Product(factors):
                return self._split_product(factors, at)

    def factor(self, layout: Layout, outer: int) -> tuple[Layout, Layout]:
        """Write a layout as a product whose first factor has ``outer`` indices, which must divide its size.

        A concat can be written so only if it consists of ``outer`` equal pieces: the pieces are equated.
        """
        layout = self.resolve(layout)
        size = self.size(layout)
        if outer == 0 or size % outer:
            what = f"{size} indices do not fall into {outer} equal parts"
            raise LayoutMismatchError(what)
        match layout:
            case Atom():
                first, second = self._like(layout, outer), self._like(layout, size // outer)
                layout.binding = Product((first, second))
                return first, second
            case Product(factors):
                return self._factor_product(factors, outer)
            case Concat():
                return self._factor_concat(layout, outer, size // outer)

    def _resolve_atom(self, atom: Atom) -> Layout:
        """Follow bindings to the end and shorten the path, so that long chains stay cheap."""
        chain: list[Atom] = []
        end: Layout = atom
        while isinstance(end, Atom) and end.binding is not None:
            chain.append(end)
            end = end.binding
        if not isinstance(end, Atom):
            end = self.resolve(end)
        for link in chain:
            link.binding = end
        return end

    def _bind(self, atom: Atom, layout: Layout) -> None:
        if atom in leaves(layout):
            what = f"{atom.label or 'an axis'} would be part of itself"
            raise LayoutMismatchError(what)
        if atom.reason:
            self.freeze(layout, atom.reason, apart=not atom.entangled)
        if atom.residual:
            self.mark_residual(layout)
        if atom.parallel:
            self.mark_parallel(layout, atom.unmixable)
        if atom.multiple > 1:
            self.mark_multiple(layout, atom.multiple, f"its size has to be a multiple of {atom.multiple}")
        if atom.spare:
            self.mark_spare(layout, atom.spare)
        if atom.unmixable:
            self.forbid_mixing(layout, atom.unmixable)
        if atom.statistic:
            self.mark_statistic(layout, atom.statistic)
        if isinstance(layout, Atom):
            layout.label = layout.label or atom.label
            layout.structural = layout.structural and atom.structural
        atom.binding = layout

    def _equate_products(self, left: Sequence[Layout], right: Sequence[Layout]) -> None:
        """Equate two products factor by factor; a part that does not fit says nothing against the factors beside it."""
        failed: list[tuple[str, tuple[Layout, ...]]] = []
        is_empty = not self.size(Product(tuple(left)))
        for run_a, run_b in [(tuple(left), tuple(right))] if is_empty else self._runs(left, right):
            try:
                self._equate_run(run_a, run_b)
            except LayoutMismatchError as error:
                failed.append((str(error), error.parts or (Product(run_a), Product(run_b))))
        if failed:
            raise LayoutMismatchError(failed[0][0], tuple(part for _, parts in failed for part in parts))

    def _runs(
        self, left: Sequence[Layout], right: Sequence[Layout]
    ) -> Iterator[tuple[tuple[Layout, ...], tuple[Layout, ...]]]:
        """Cut two products of one size into the shortest runs of factors that have one size each."""
        first_a = first_b = end_a = end_b = 0
        size_a = size_b = 1
        while end_a < len(left) or end_b < len(right):
            if end_b == len(right) or (size_a <= size_b and end_a < len(left)):
                size_a *= self.size(left[end_a])
                end_a += 1
            else:
                size_b *= self.size(right[end_b])
                end_b += 1
            if size_a == size_b:
                yield tuple(left[first_a:end_a]), tuple(right[first_b:end_b])
                first_a, first_b = end_a, end_b

    def _equate_run(self, left: Sequence[Layout], right: Sequence[Layout]) -> None:
        a, b = list(left), list(right)
        while a and b:
            head_a, head_b = self.resolve(a[0]), self.resolve(b[0])
            size_a, size_b = self.size(head_a), self.size(head_b)
            if size_a == size_b:
                self.equate(head_a, head_b)
                a, b = a[1:], b[1:]
            elif size_a > size_b:
                outer, inner = self.factor(head_a, size_b)
                a[:1] = [outer, inner]
            else:
                outer, inner = self.factor(head_b, size_a)
                b[:1] = [outer, inner]

    def _equate_sequences(self, left: Layout, right: Layout) -> None:
        a: Layout | None = left
        b: Layout | None = right
        failed: list[LayoutMismatchError] = []
        while a is not None and b is not None:
            head_a, rest_a = self._pop(a)
            head_b, rest_b = self._pop(b)
            cut = min(self.size(head_a), self.size(head_b))
            head_a, rest_a = self._cut_head(head_a, rest_a, cut)
            head_b, rest_b = self._cut_head(head_b, rest_b, cut)
            try:
                self.equate(head_a, head_b)
            except LayoutMismatchError as error:
                if not error.parts:
                    raise
                failed.append(error)
            a, b = rest_a, rest_b
        if failed:
            raise LayoutMismatchError(str(failed[0]), tuple(part for error in failed for part in error.parts))

    def _pop(self, layout: Layout) -> tuple[Layout, Layout | None]:
        layout = self.resolve(layout)
        if isinstance(layout, Concat):
            return layout.parts[0], _concat(layout.parts[1:])
        return layout, None

    def _cut_head(self, head: Layout, rest: Layout | None, cut: int) -> tuple[Layout, Layout | None]:
        if self.size(head) == cut:
            return head, rest
        first, second = self.split(head, cut)
        return first, second if rest is None else _concat((second, rest))

    def _split_concat(self, parts: Sequence[Layout], at: int) -> tuple[Layout, Layout]:
        before: list[Layout] = []
        for i, part in enumerate(parts):
            size = self.size(part)
            if at == 0:
                return _concat(before), _concat(parts[i:])
            if at < size:
                head, tail = self.split(part, at)
                return _concat((*before, head)), _concat((tail, *parts[i + 1 :]))
            before.append(part)
            at -= size
        what = "a cut beyond the end of an axis"
        raise LayoutMismatchError(what)

    def _split_product(self, factors: Sequence[Layout], at: int) -> tuple[Layout, Layout]:
        first, rest = factors[0], Product(tuple(factors[1:]))
        inner = self.size(rest)
        whole, remainder = divmod(at, inner)
        if remainder == 0:
            head, tail = self.split(first, whole)
            return self.resolve(Product((head, rest))), self.resolve(Product((tail, rest)))
        # The cut falls inside one copy of the inner factors: set that copy apart, then cut it. The copies share their
        # atoms, so the cut binds them in all copies, as it must.
        before: list[Layout] = []
        after: list[Layout] = []
        middle: Layout = first
        if whole > 0:
            head, middle = self.split(first, whole)
            before.append(Product((head, rest)))
        if self.size(middle) > 1:
            middle, tail = self.split(middle, 1)
            after.append(Product((tail, rest)))
        cut_head, cut_tail = self.split(Product((middle, rest)), remainder)
        return self.resolve(Concat((*before, cut_head))), self.resolve(Concat((cut_tail, *after)))

    def _factor_product(self, factors: Sequence[Layout], outer: int) -> tuple[Layout, Layout]:
        taken: list[Layout] = []
        rest = list(factors)
        while outer > 1:
            head = self.resolve(rest[0])
            size = self.size(head)
            if outer % size == 0:
                taken.append(head)
                rest = rest[1:]
                outer //= size
            else:
                first, second = self.factor(head, outer)
                taken.append(first)
                rest[:1] = [second]
                outer = 1
        return self.resolve(Product(tuple(taken))), self.resolve(Product(tuple(rest)))

    def _factor_concat(self, layout: Layout, outer: int, inner: int) -> tuple[Layout, Layout]:
        first, rest = self.split(layout, inner)
        for _ in range(outer - 2):
            piece, rest = self.split(rest, inner)
            self.equate(first, piece)
        self.equate(first, rest)
        what = f"{self.at} reads a concatenation" if self.at else "a concatenation is read"
        reason = f"{what} as {outer} equal parts, and as many there have to be (repeated shuffles tie channels so)"
        count = Atom(outer, "", reason)
        return count, self.resolve(first)

    @staticmethod
    def _like(atom: Atom, size: int) -> Atom:
        part = Atom(size, atom.label, atom.reason)
        part.residual, part.unmixable, part.statistic = atom.residual, atom.unmixable, atom.statistic
        part.structural, part.parallel, part.entangled = atom.structural, atom.parallel, atom.entangled
        part.spare, part.multiple = atom.spare, atom.multiple
        if size % atom.multiple or size == atom.multiple > 1:
            part.reason = part.reason or f"its size has to be a multiple of {atom.multiple}"
        return part

    def _product(self, factors: Iterable[Layout]) -> Layout:
        flat: list[Layout] = []
        for factor in factors:
            flat.extend(factor.factors if isinstance(factor, Product) else (factor,))
        wide = [factor for factor in flat if self.size(factor) != 1]
        if not wide:
            return flat[0] if flat else Atom(1)
        return wide[0] if len(wide) == 1 else Product(tuple(wide))


def _concat(parts: Iterable[Layout]) -> Layout:
    flat: list[Layout] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, Concat) else (part,))
    some = [part for part in flat if not (isinstance(part, Atom) and part.size == 0)]
    if not some:
        return flat[0] if flat else Atom(0)
    return some[0] if len(some) == 1 else Concat(tuple(some))
