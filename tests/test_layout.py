"""Layouts and the unifier, against brute force: every layout written out index by index."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from onnxfuse.coupling.groups import layout_size, positions, product_partners
from onnxfuse.coupling.layout import Atom, Concat, Layout, LayoutMismatchError, Product, Unifier, leaves
from tests.strategies import coarsened, layouts

# One index of an axis: which index of which atom each of its factors is. Frozen atoms that count equal parts say
# nothing, so they do not show.
Label = tuple[tuple[int, int], ...]
SIZES = st.sampled_from([2, 3, 4, 6, 8, 12])
LAWS = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
COUNTS_PARTS = "a concatenation is read as"


def written_out(layout: Layout, widths: Mapping[Atom, int] | None = None) -> list[Label]:
    """Write a layout out, index by index, following bindings."""
    match layout:
        case Atom():
            if layout.binding is not None:
                return written_out(layout.binding, widths)
            size = (widths or {}).get(layout, layout.size)
            silent = layout.size == 1 or layout.reason.startswith(COUNTS_PARTS)
            return [() if silent else ((id(layout), i),) for i in range(size)]
        case Concat(parts):
            return [label for part in parts for label in written_out(part, widths)]
        case Product(factors):
            labels: list[Label] = [()]
            for factor in factors:
                labels = [(*a, *b) for a in labels for b in written_out(factor, widths)]
            return labels


def assert_equal_layouts(left: Layout, right: Layout) -> None:
    """Assert that two layouts are the same, index by index."""
    assert written_out(left) == written_out(right)


def atoms_of(layout: Layout) -> list[Atom]:
    """Return the atoms of a layout, once each."""
    return list(dict.fromkeys(leaves(layout)))


def every_part(layout: Layout) -> Iterator[Layout]:
    """Yield a layout and everything that it is made of."""
    yield layout
    match layout:
        case Atom():
            return
        case Concat(inner) | Product(inner):
            for part in inner:
                yield from every_part(part)


def test_equal_layouts_can_fail() -> None:
    """The assertion sees order, nesting and identity."""
    a, b = Atom(2), Atom(3)
    assert_equal_layouts(Product((a, b)), Product((a, Product((b, Atom(1))))))
    for wrong in (Product((b, a)), Product((a, Atom(3))), Concat((a, b)), Atom(6)):
        with pytest.raises(AssertionError):
            assert_equal_layouts(Product((a, b)), wrong)


class TestUnifier:
    """What `Unifier` promises, for random layouts."""

    @LAWS
    @given(st.data())
    def test_equate(self, data: st.DataObject) -> None:
        """Whatever was equated is equal, index by index, also after later equations; what fails leaves it so."""
        unifier = Unifier()
        pool: dict[int, list[Atom]] = {}
        solved: list[tuple[Layout, Layout]] = []
        for _ in range(data.draw(st.integers(1, 4))):
            size = data.draw(SIZES)
            left, right = data.draw(layouts(size, pool)), data.draw(layouts(size, pool))
            try:
                unifier.equate(left, right)
            except LayoutMismatchError:
                continue
            solved.append((left, right))
        for left, right in solved:
            assert_equal_layouts(left, right)

    @LAWS
    @given(st.data())
    def test_solvable_equations_are_solved(self, data: st.DataObject) -> None:
        """Two views of one layout, each with parts replaced by plain atoms, can be equated."""
        size = data.draw(SIZES)
        layout = data.draw(layouts(size, {}))
        size_of = {id(part): Unifier().size(part) for part in every_part(layout)}
        left, right = data.draw(coarsened(layout, size_of)), data.draw(coarsened(layout, size_of))
        Unifier().equate(left, right)
        assert_equal_layouts(left, right)

    @LAWS
    @given(st.data())
    def test_resolve(self, data: st.DataObject) -> None:
        """The normal form says the same, is its own normal form, and has no nesting that says nothing."""
        unifier, pool = Unifier(), dict[int, list[Atom]]()
        layout = data.draw(layouts(data.draw(SIZES), pool))
        other = data.draw(layouts(unifier.size(layout), pool))
        with suppress(LayoutMismatchError):
            unifier.equate(layout, other)
        for each in (layout, other):
            normal = unifier.resolve(each)
            assert_equal_layouts(each, normal)
            assert unifier.resolve(normal) == normal
            assert unifier.size(normal) == unifier.size(each) == len(written_out(each))
            for part in every_part(normal):
                inner = part.parts if isinstance(part, Concat) else part.factors if isinstance(part, Product) else ()
                assert not any(type(i) is type(part) for i in inner)
                assert not isinstance(part, Product) or all(unifier.size(i) > 1 for i in inner)
                assert all(atom.binding is None for atom in leaves(part))

    @LAWS
    @given(st.data())
    def test_split(self, data: st.DataObject) -> None:
        """The two parts of a cut, one after the other, are what was cut."""
        layout = data.draw(layouts(data.draw(SIZES), {}))
        unifier = Unifier()
        at = data.draw(st.integers(1, unifier.size(layout) - 1))
        try:
            head, tail = unifier.split(layout, at)
        except LayoutMismatchError:
            return
        assert (unifier.size(head), unifier.size(tail)) == (at, unifier.size(layout) - at)
        assert_equal_layouts(Concat((head, tail)), layout)

    @LAWS
    @given(st.data())
    def test_factor(self, data: st.DataObject) -> None:
        """The two factors that a layout is written as, multiplied, are what it was."""
        layout = data.draw(layouts(data.draw(SIZES), {}))
        unifier = Unifier()
        size = unifier.size(layout)
        outer = data.draw(st.sampled_from([d for d in range(2, size + 1) if size % d == 0]))
        try:
            first, second = unifier.factor(layout, outer)
        except LayoutMismatchError:
            return
        assert (unifier.size(first), unifier.size(second)) == (outer, size // outer)
        assert_equal_layouts(Product((first, second)), layout)

    @LAWS
    @given(st.data())
    def test_marks_spread(self, data: st.DataObject) -> None:
        """A reason, a residual and the like hold for all that an axis turns out to be, and for nothing else."""
        unifier, pool = Unifier(), dict[int, list[Atom]]()
        layout = data.draw(layouts(data.draw(SIZES), pool))
        other = data.draw(layouts(unifier.size(layout), pool))
        marked = data.draw(st.sampled_from(atoms_of(layout)))
        early = data.draw(st.booleans())
        if early:
            unifier.freeze(marked, "a reason")
            unifier.mark_residual(marked)
        try:
            unifier.equate(layout, other)
        except LayoutMismatchError:
            return
        if not early:
            unifier.freeze(marked, "a reason")
            unifier.mark_residual(marked)
        inside = set(leaves(unifier.resolve(marked)))
        assert all(atom.reason and atom.residual for atom in inside)
        ends = {a for known in pool.values() for atom in known for a in leaves(unifier.resolve(atom))}
        assert not any(atom.residual for atom in ends - inside)
        assert all(not atom.reason or atom.reason.startswith(COUNTS_PARTS) for atom in ends - inside)

    @pytest.mark.parametrize(
        ("left", "right"),
        [
            (Atom(3), Atom(4)),
            (Product((Atom(2), Atom(3))), Product((Atom(3), Atom(2)))),
            (Product((Atom(4), Atom(3))), Product((Atom(6), Atom(2)))),
        ],
    )
    def test_mismatch(self, left: Layout, right: Layout) -> None:
        """Sizes that differ, and factors whose boundaries can't be matched."""
        with pytest.raises(LayoutMismatchError):
            Unifier().equate(left, right)

    def test_what_fits_beside_a_mismatch(self) -> None:
        """Windows of 3 against pairs of rows: the channels beside them are equal all the same."""
        unifier = Unifier()
        windows, rows, pairs, row = Atom(2), Atom(3), Atom(3), Atom(2)
        batch, channels, again, same = Atom(5), Atom(4), Atom(5), Atom(4)
        with pytest.raises(LayoutMismatchError, match="equal parts") as caught:
            unifier.equate(Product((batch, windows, rows, channels)), Product((again, pairs, row, same)))
        assert unifier.resolve(channels) is unifier.resolve(same)
        assert unifier.resolve(batch) is unifier.resolve(again)
        assert {atom for part in caught.value.parts for atom in leaves(part)} == {windows, rows, pairs, row}

    def test_nothing_at_all(self) -> None:
        """An axis of no indices says nothing against the others."""
        unifier = Unifier()
        one, two = Atom(3), Atom(3)
        unifier.equate(Product((Atom(0), one)), Product((Atom(0), two)))
        assert unifier.resolve(one) is unifier.resolve(two)

    def test_flatten(self) -> None:
        """What Flatten needs: channels x height x width against one axis, cut back into the three."""
        unifier = Unifier()
        channels, height, width, flat = Atom(3), Atom(2), Atom(2), Atom(12)
        unifier.equate(flat, Product((channels, height, width)))
        again = tuple(Atom(n) for n in (3, 2, 2))
        unifier.equate(Product(again), flat)
        assert [unifier.resolve(atom) for atom in again] == [channels, height, width]

    def test_equal_parts(self) -> None:
        """A concatenation that is read as a matrix has equal rows: they become one, and their count can't change."""
        unifier = Unifier()
        one, two, rows, inside = Atom(3), Atom(3), Atom(2), Atom(3)
        unifier.equate(Concat((one, two)), Product((rows, inside)))
        assert unifier.resolve(one) == unifier.resolve(two) == unifier.resolve(inside)
        assert not any(atom.reason for atom in leaves(unifier.resolve(one)))
        assert all(atom.reason or atom.size == 1 for atom in leaves(unifier.resolve(rows)))

    @pytest.mark.parametrize("outer", [0, 4, 5])
    def test_factor_must_divide(self, outer: int) -> None:
        """A number of rows that does not divide the size is refused."""
        with pytest.raises(LayoutMismatchError, match="equal parts"):
            Unifier().factor(Atom(6), outer)

    def test_first_reason_stays(self) -> None:
        """An axis keeps the reason that it was frozen for first."""
        unifier, atom = Unifier(), Atom(2)
        unifier.freeze(atom, "first")
        unifier.freeze(atom, "second")
        assert atom.reason == "first"

    def test_long_chains(self) -> None:
        """Ten thousand axes bound one to the next are resolved without recursion."""
        unifier = Unifier()
        atoms = [Atom(2) for _ in range(10_000)]
        for one, next_one in pairwise(atoms):
            unifier.equate(one, next_one)
        assert unifier.resolve(atoms[0]) is atoms[-1]

    def test_repr(self) -> None:
        """An atom shows its size and its label."""
        assert repr(Atom(3, "x[1]")) == "Atom(3, 'x[1]')"


class TestPositions:
    """Where channels are on an axis, whatever the widths."""

    @LAWS
    @given(st.data())
    def test_positions(self, data: st.DataObject) -> None:
        """Row c lists the places whose label has channel c, and the rest of the labels is the same in every row."""
        pool: dict[int, list[Atom]] = {}
        layout = Unifier().resolve(data.draw(layouts(data.draw(SIZES), pool)))
        assume(not any(a is b for a, b in product_partners(layout)))
        atoms = [atom for atom in atoms_of(layout) if atom.size > 1]
        assume(atoms)
        atom = data.draw(st.sampled_from(atoms))
        widths = {a: data.draw(st.integers(1, a.size)) for a in atoms if data.draw(st.booleans())}
        labels = written_out(layout, widths)
        where = positions(layout, atom, widths)
        assert where.dtype == np.int64
        assert where.shape[0] == widths.get(atom, atom.size)
        for c, row in enumerate(where):
            assert sorted(row) == [i for i, label in enumerate(labels) if (id(atom), c) in label]
            rest = [tuple(part for part in labels[i] if part[0] != id(atom)) for i in row]
            assert rest == [tuple(part for part in labels[i] if part[0] != id(atom)) for i in where[0]]
        assert layout_size(layout, widths) == len(labels)

    def test_atom_that_does_not_occur(self) -> None:
        """An atom that is not there has no positions."""
        assert positions(Atom(4), Atom(3), {}).shape == (3, 0)

    @LAWS
    @given(st.data())
    def test_product_partners(self, data: st.DataObject) -> None:
        """Two atoms are partners where some index belongs to both."""
        layout = Unifier().resolve(data.draw(layouts(data.draw(SIZES), {})))
        found = {frozenset((id(a), id(b))) for a, b in product_partners(layout) if a.size > 1 and b.size > 1}
        seen = {
            frozenset((a[0], b[0]))
            for label in written_out(layout)
            for i, a in enumerate(label)
            for b in label[i + 1 :]
        }
        assert found == seen
