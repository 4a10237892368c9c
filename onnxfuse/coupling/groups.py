"""The result of the coupling analysis: which channels must change together, and where they are stored."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxfuse.arrays import BoolArray, IntArray
from onnxfuse.coupling.constraints import Encoded, EncodedBias
from onnxfuse.coupling.layout import Atom, Concat, Layout, Product
from onnxfuse.coupling.rounded import Rounding
from onnxfuse.graph.view import Operand
from onnxfuse.statistics.features import Role

__all__ = [
    "ChannelGraph",
    "Contraction",
    "CouplingGroup",
    "DefaultEntry",
    "IndexEntry",
    "ParameterAxis",
    "SizeEntry",
    "layout_size",
    "positions",
    "product_partners",
]


@dataclass(frozen=True, slots=True)
class ParameterAxis:
    """One axis of one weight that follows the channels of a group.

    Attributes:
        operand: The weight as one node reads it.
        node: Name of the node that computes with it: that node, or one behind it where it only casts or moves elements.
        axis: Which axis.
        role: What it does with the channels.
    """

    operand: Operand
    node: str
    axis: int
    role: Role


@dataclass(frozen=True, slots=True)
class Contraction:
    """A product of two computed tensors that is summed over the channels of a group.

    Attributes:
        node: Index of the node.
        plain: One of the two values, whose channels are mapped by A, and the axis that has them.
        mirrored: The other one, whose channels are mapped by B transposed, and the axis.
    """

    node: int
    plain: tuple[str, int]
    mirrored: tuple[str, int]


@dataclass(frozen=True, eq=False)
class CouplingGroup:
    """Channels that must change together, wherever they occur.

    Attributes:
        name: Name of the first node that produces them; with a range of its channels where it produces several groups.
        channels: How many there are, C.
        parameters: Every axis of every weight that follows them, in graph order.
        frozen: Why they keep their number; empty if they need not.
        residual: Whether an addition of computed tensors ties them.
        unmixable: Why they may be dropped but not mixed; empty if they may be mixed.
        statistic: Which node computes a statistic over them, which fewer channels can only approximate; empty if none.
        atom: The atom that stands for them in layouts.
        over: Atoms for each of whose indices there are so many channels, which may be mapped in a way of their own (see
            `onnxfuse.coupling.sets`).
        multiple: What the number of channels that stay has to be a multiple of.
        contractions: The products of two computed tensors that are summed over the channels. Where these may be mixed,
            one side is mapped by A, and the other side, the *mirrored* one, by B transposed, as weights that read them
            are.
        mirrored: For every axis of an operand on which the channels are, which of the places that each of them has
            there are on the mirrored side: shape (m,), for the places that `onnxfuse.coupling.sets.places` finds. Empty
            where there are no contractions, or the channels are only dropped.
    """

    name: str
    channels: int
    parameters: tuple[ParameterAxis, ...]
    frozen: str
    residual: bool
    unmixable: str
    statistic: str
    atom: Atom = field(repr=False)
    over: tuple[Atom, ...] = field(default=(), repr=False)
    multiple: int = 1
    contractions: tuple[Contraction, ...] = field(default=(), repr=False)
    mirrored: Mapping[tuple[Operand, int], BoolArray] = field(default_factory=dict, repr=False)

    @property
    def sets(self) -> int:
        """How many sets of channels there are, S."""
        return math.prod(atom.size for atom in self.over)

    @property
    def producers(self) -> tuple[ParameterAxis, ...]:
        """The axes that make the channels."""
        return tuple(p for p in self.parameters if p.role is Role.PRODUCER)


@dataclass(frozen=True, slots=True)
class SizeEntry:
    """A place in the file that states ``scale`` times the size of a layout.

    Attributes:
        node: Index of the node that reads it.
        layout: What it states the size of.
        attribute: Name of the attribute that holds it; empty if an input does.
        slot: The input that holds it, or -1.
        index: Entry of the attribute or element of the input; None for an attribute that is one number.
        scale: The factor.
    """

    node: int
    layout: Layout
    attribute: str = ""
    slot: int = -1
    index: int | None = None
    scale: int = 1


@dataclass(frozen=True, slots=True)
class DefaultEntry:
    """An attribute that the file leaves out, and that an operator computes from the size of a layout.

    Attributes:
        node: Index of the node.
        layout: Whose size it is computed from.
        attribute: Its name.
        value: Its value at the size that the layout has now.
    """

    node: int
    layout: Layout
    attribute: str
    value: float


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A vector of indices in the file, which are all positions of some parts of an axis.

    Attributes:
        node: Index of the node that reads it.
        slot: The input that holds it.
        parts: What the axis consists of: parts one after the other, or two factors if ``crossed``.
        order: Which of them are picked, in their order.
        crossed: Whether the axis is a product, and the factors change places.
    """

    node: int
    slot: int
    parts: tuple[Layout, ...]
    order: tuple[int, ...]
    crossed: bool

    def values(self, widths: Mapping[Atom, int]) -> IntArray:
        """Return the indices once atoms have the sizes in ``widths``, shape (n,)."""
        sizes = [layout_size(part, widths) for part in self.parts]
        if self.crossed:
            return np.arange(math.prod(sizes)).reshape(sizes).transpose(self.order).ravel()
        ends = np.cumsum(sizes)
        return np.concatenate([np.arange(ends[i] - sizes[i], ends[i]) for i in self.order])


@dataclass(frozen=True)
class ChannelGraph:
    """Everything the analysis found.

    Attributes:
        groups: All coupling groups in graph order, frozen ones too.
        layouts: The axes of every operand of known shape, resolved.
        sizes: Every place in the file that states a size that may change.
        targets: Constants that can stand for a target shape computed at run time, by (node, slot) that reads it.
        batch_norms: Index of a BatchNormalization node that folds exactly, to the indices of the nodes that it folds
            into: a linear node, and any that add a bias to its result, none of which anything else reads.
        normalising: Index of every BatchNormalization node in inference form.
        encodings: How operands that hold integers stand for numbers.
        biases: The same of biases whose scale is that of a product.
        defaults: Every attribute that would change by itself with a size that may change.
        roundings: How weights of floats are rounded on the way to the nodes that compute with them.
        indices: Every vector of indices in the file that names parts of an axis that may change.
    """

    groups: tuple[CouplingGroup, ...]
    layouts: Mapping[Operand, tuple[Layout, ...]]
    sizes: Sequence[SizeEntry]
    targets: Mapping[tuple[int, int], IntArray]
    batch_norms: Mapping[int, tuple[int, ...]]
    normalising: Sequence[int]
    encodings: Mapping[Operand, Encoded] = field(default_factory=dict)
    biases: Mapping[Operand, EncodedBias] = field(default_factory=dict)
    defaults: Sequence[DefaultEntry] = ()
    roundings: Mapping[Operand, Rounding] = field(default_factory=dict)
    indices: Sequence[IndexEntry] = ()

    def dims(self, operand: Operand, widths: Mapping[Atom, int]) -> tuple[int, ...]:
        """Return the shape of an operand once atoms have the sizes in ``widths`` (others keep theirs)."""
        return tuple(layout_size(layout, widths) for layout in self.layouts[operand])


def layout_size(layout: Layout, widths: Mapping[Atom, int]) -> int:
    """Return the number of indices of a resolved layout once atoms have the sizes in ``widths``.

    Example:
        >>> c = Atom(4)
        >>> layout_size(Product((c, Atom(9))), {c: 3})
        27
    """
    match layout:
        case Atom():
            return widths.get(layout, layout.size)
        case Concat(parts):
            return sum(layout_size(part, widths) for part in parts)
        case Product(factors):
            return int(np.prod([layout_size(factor, widths) for factor in factors], dtype=np.int64))


def positions(layout: Layout, atom: Atom, widths: Mapping[Atom, int]) -> IntArray:
    """Return where on an axis the channels of ``atom`` are.

    Args:
        layout: A resolved layout in which ``atom`` occurs at most once on every path through products.
        atom: The atom asked for.
        widths: Present sizes of atoms that differ from their original ones.

    Returns:
        Shape (C, m), int64: row c lists the m indices of the axis that belong to channel c, in the same order for every
        channel (m = H W after a Flatten, 1 for a plain channel axis, 0 where the atom does not occur).

    Example:
        >>> c = Atom(2)
        >>> positions(Concat((Atom(3), Product((c, Atom(2))))), c, {}).tolist()
        [[3, 4], [5, 6]]
    """
    channels = widths.get(atom, atom.size)
    found = list(_positions(layout, atom, widths))
    if not found:
        return np.empty((channels, 0), np.int64)
    return np.concatenate(found, axis=1)


def _positions(layout: Layout, atom: Atom, widths: Mapping[Atom, int]) -> Iterator[IntArray]:
    match layout:
        case Atom():
            if layout is atom:
                yield np.arange(widths.get(atom, atom.size), dtype=np.int64)[:, None]
        case Concat(parts):
            start = 0
            for part in parts:
                for block in _positions(part, atom, widths):
                    yield block + start
                start += layout_size(part, widths)
        case Product(factors):
            sizes = [layout_size(factor, widths) for factor in factors]
            for i, factor in enumerate(factors):
                outer = int(np.prod(sizes[:i], dtype=np.int64))
                inner = int(np.prod(sizes[i + 1 :], dtype=np.int64))
                for block in _positions(factor, atom, widths):
                    # index = (o * size_i + position) * inner + rest, for every o and every rest
                    o = np.arange(outer, dtype=np.int64)[None, :, None, None]
                    rest = np.arange(inner, dtype=np.int64)[None, None, None, :]
                    full = (o * sizes[i] + block[:, None, :, None]) * inner + rest
                    yield full.reshape(len(block), -1)


def product_partners(layout: Layout) -> Iterator[tuple[Atom, Atom]]:
    """Yield the pairs of atoms that are multiplied with each other somewhere in a resolved layout."""
    match layout:
        case Atom():
            return
        case Concat(parts):
            for part in parts:
                yield from product_partners(part)
        case Product(factors):
            inside = [list(_atoms(factor)) for factor in factors]
            for i, first in enumerate(inside):
                for second in inside[i + 1 :]:
                    yield from ((a, b) for a in first for b in second)
            for factor in factors:
                yield from product_partners(factor)


def _atoms(layout: Layout) -> Iterator[Atom]:
    match layout:
        case Atom():
            yield layout
        case Concat(parts):
            for part in parts:
                yield from _atoms(part)
        case Product(factors):
            for factor in factors:
                yield from _atoms(factor)
