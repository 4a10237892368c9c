"""From a graph and operator rules to coupling groups.

Every axis of every operand starts as an atom of its own. The rules' equations are solved one node at a time by the
unifier; where an equation fails, where a rule is missing, where an axis is left unmentioned, the atoms involved are
frozen with a reason that names the node. The atoms that remain, with the weights' axes in which they occur, are the
groups.
"""

import logging
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxfuse.coupling.constraints import (
    AttributeSize,
    AxisRef,
    Cat,
    ConstantSize,
    Constraint,
    Contracted,
    Default,
    Encoded,
    EncodedBias,
    Equal,
    Expr,
    Freeze,
    Fresh,
    Multiple,
    Normalises,
    Parallel,
    Picked,
    Prod,
    Residual,
    Rounded,
    Rule,
    SelectOnly,
    Site,
    Spare,
    Statistic,
    Tensor,
    Weight,
    axis_references,
)
from onnxfuse.coupling.contractions import with_sides
from onnxfuse.coupling.foldable import LINEAR, RolesOver, foldable_norms
from onnxfuse.coupling.groups import (
    ChannelGraph,
    DefaultEntry,
    IndexEntry,
    SizeEntry,
)
from onnxfuse.coupling.layout import Atom, Concat, Layout, LayoutMismatchError, Product, Unifier, leaves
from onnxfuse.coupling.proposal import COARSE_TYPES, STORED_TYPES, WEIGHT_TYPES, Proposal
from onnxfuse.coupling.rearranged import REARRANGING, moved_axis
from onnxfuse.coupling.rounded import Rounding, RoundingFinder
from onnxfuse.coupling.rules import DEFAULT_RULES
from onnxfuse.coupling.scales_behind import scale_behind
from onnxfuse.coupling.sets import SetFinder
from onnxfuse.coupling.settled_sizes import SizeSettler
from onnxfuse.coupling.shared import SharedTies
from onnxfuse.graph.bodies import subgraphs
from onnxfuse.graph.shapes import Shapes
from onnxfuse.graph.view import GraphView, NodeView, Operand
from onnxfuse.statistics.features import Role

__all__ = ["solve_coupling"]

logger = logging.getLogger(__name__)

# Operators whose results are made anew and not out of the values that they read, element by element.
_MAKING = LINEAR | {"Einsum", "GRU", "LSTM", "RNN"}
_SUMS = frozenset({"Add", "Sub", "Sum"})


def solve_coupling(graph: GraphView, shapes: Shapes, rules: Sequence[Rule] = DEFAULT_RULES) -> ChannelGraph:
    """Find the coupling groups of a graph.

    Args:
        graph: The graph.
        shapes: Its shapes at one concrete choice of the input shapes.
        rules: Operator rules; the newest one whose ``since`` is not above the model's operator set holds.

    Returns:
        Groups, layouts and size entries. Nothing is skipped in silence: what is not understood is frozen with a reason.
    """
    solver = _Solver(graph, shapes, rules)
    found = solver.solve()
    contractions = solver.contractions_of(found)
    if not contractions:
        return found
    # What nothing but a contraction ties is tied no more in a second solution, so it shows what is on which side.
    nodes = frozenset(node for axes in contractions.values() for node in axes)
    return with_sides(graph, found, _Solver(graph, shapes, rules, nodes).solve(), contractions)


class _Solver:
    """The state of one analysis; at some nodes contractions do not tie what they contract."""

    def __init__(
        self, graph: GraphView, shapes: Shapes, rules: Sequence[Rule], untied: Container[int] = frozenset()
    ) -> None:
        self.untied = untied
        self.contracted: dict[int, list[Contracted]] = {}
        self.graph = graph
        self.shapes = shapes
        self.rules: dict[tuple[str, str], list[Rule]] = {}
        for rule in sorted(rules, key=lambda rule: rule.since):
            self.rules.setdefault((rule.domain, rule.op), []).append(rule)
        self.unifier = Unifier()
        self.axes: dict[Operand, tuple[Layout, ...]] = {}
        self.fresh: dict[Fresh, Atom] = {}
        self.weights: dict[tuple[Operand, int], Role] = {}
        self.weights_of: dict[int, list[tuple[Operand, int]]] = {}
        self.users: dict[Operand, str] = {}
        self.sizes: list[SizeEntry] = []
        self.normalising: list[int] = []
        self.defaults: list[DefaultEntry] = []
        self.indices: list[IndexEntry] = []
        self.weight_values: set[str] = set()
        self.encodings: dict[Operand, Encoded] = {}
        self.biases: dict[Operand, EncodedBias] = {}
        self.rounded: dict[int, Rounded] = {}
        self.spare: list[Spare] = []
        self.sources: dict[str, frozenset[str]] = {}

    def solve(self) -> ChannelGraph:
        for name in self.graph.inputs:
            self._freeze_value(name, f"graph input {name!r}")
            self.sources[name] = frozenset({name})
        for node in self.graph.nodes:
            self._visit(node)
            self._note_sources(node)
        for name in self.graph.outputs:
            self._freeze_value(name, f"graph output {name!r}")
        self._freeze_reported_sizes()
        self._pass_roles_back()
        ties = SharedTies(self.graph, self.unifier, self.axes, self.weights)
        ties.tie()
        settler = SizeSettler(self.graph, self.shapes, self.unifier, self.axes, self._operand)
        self.sizes, targets = settler.settle(self.sizes)
        roundings = self._roundings()
        resolve = self.unifier.resolve
        layouts = {operand: tuple(resolve(axis) for axis in axes) for operand, axes in self.axes.items()}
        roles = RolesOver(layouts, self.weights, self.weights_of)
        norms = foldable_norms(self.graph, self.normalising, roles, self._operand)
        ties.keep_before(norms)
        groups = tuple(self._proposal().groups())
        apart = {atom for told in self.unifier.apart for atom in leaves(resolve(told))}
        finder = SetFinder(layouts, apart)
        groups = tuple(group if group.frozen else replace(group, over=finder.over(group.atom)) for group in groups)
        sizes = [self._resolved(entry) for entry in self.sizes]
        defaults = [replace(entry, layout=resolve(entry.layout)) for entry in self.defaults]
        indices = [replace(entry, parts=tuple(map(resolve, entry.parts))) for entry in self.indices]
        return ChannelGraph(
            groups,
            layouts,
            sizes,
            targets,
            norms,
            tuple(self.normalising),
            self.encodings,
            self.biases,
            defaults,
            roundings,
            indices,
        )

    def contractions_of(self, found: ChannelGraph) -> dict[Atom, dict[int, tuple[AxisRef, AxisRef]]]:
        """Return the axes of each contraction, by node, by the channels that it sums over if these can't be mixed."""
        atoms = {group.atom for group in found.groups if group.unmixable and not group.frozen}
        contractions: dict[Atom, dict[int, tuple[AxisRef, AxisRef]]] = {}
        for node, told in self.contracted.items():
            if len(told) == 1:
                for atom in atoms & set(leaves(self.unifier.resolve(self._layout(told[0].left)))):
                    contractions.setdefault(atom, {})[node] = told[0].axes
        return contractions

    # One node ---------------------------------------------------------------------------------------------------

    def _visit(self, node: NodeView) -> None:
        for name in node.captured:
            self._freeze_value(name, f"a subgraph of {node.title} reads {name!r}")
        is_weight = self._is_rearranging(node) and self._is_rounded(node)
        if not is_weight and all(self._is_shape_value(o) or self._is_folded(node, o) for o in node.outputs if o):
            self._freeze_read_numbers(node)
            return
        site, unknown = self._site(node)
        reason = f"the shape of {unknown!r}, at {node.title}, is not known" if unknown else ""
        rule = self._rule(node)
        if not reason and rule is None:
            has_bodies = next(subgraphs(node), None) is not None
            bounded = f"it goes into or comes out of a body of {node.title}"
            reason = bounded if has_bodies else f"there is no rule for {node.title}"
        if not reason and node.captured:
            reason = f"{node.title} has subgraphs that read values from around them"
        if reason or rule is None:
            self._freeze_site(site, reason)
            return
        try:
            constraints = list(rule.infer(site))
        except (IndexError, KeyError, ValueError, TypeError) as error:
            self._freeze_site(site, f"the rule does not cover this form of {node.title}: {error}")
            return
        self._freeze_numbered(site)
        for constraint in constraints:
            self._apply(node, constraint)
        self._check_complete(site, constraints)
        if self._is_rearranging(node) and site.inputs and site.inputs[0] is not None and site.inputs[0].is_weight:
            self.weight_values.update(node.outputs)

    def _freeze_read_numbers(self, node: NodeView) -> None:
        """Freeze what a node that is not looked at makes integers of, such as a table that becomes a mask."""
        for name in node.inputs if node.op not in {"Shape", "Size"} else ():
            if name in self.shapes.static and Operand(name) in self.axes:
                self._freeze_value(name, f"{node.title} computes with its numbers")

    def _freeze_numbered(self, site: Site) -> None:
        """Freeze the axes along which integers differ that are computed from shapes: positions are no channels."""
        for tensor in site.inputs:
            if tensor is None or tensor.is_weight or not self._is_shape_value(tensor.operand.name):
                continue
            value = self.shapes.static[tensor.operand.name]
            for axis, size in enumerate(value.shape):
                if size > 1 and (value != np.take(value, [0], axis)).any():
                    reason = f"{site.node.title} reads numbers that differ along it"
                    self.unifier.freeze(self._layout(tensor[axis]), reason)

    def _is_rounded(self, node: NodeView) -> bool:
        """Whether a node makes integers that stand for a weight of floats, or passes them on."""
        return node.op == "QuantizeLinear" or any(name in self.weight_values for name in node.inputs[:1])

    def _is_rearranging(self, node: NodeView) -> bool:
        """Whether a node passes a weight on; a Clip does so with integers that stand for one."""
        clips_integers = node.op == "Clip" and self.shapes.types.get(node.inputs[0]) in STORED_TYPES
        return node.op in REARRANGING or clips_integers

    def _note_sources(self, node: NodeView) -> None:
        """Note for what a node computes which values it is made of: its own where it makes something anew."""
        read = [self.sources[name] for name in node.inputs if name in self.sources]
        roles = {self.weights[key] for key in self.weights_of.get(node.index, ())}
        is_new = node.op in _MAKING or bool(node.domain or node.captured or roles & {Role.PRODUCER, Role.CONSUMER})
        for name in node.outputs:
            # A single number, such as a scale found at run time, is no form of the tensor that it is found from.
            is_number = math.prod(self.shapes.dims.get(name, (0,))) == 1
            if name and read and not is_number and not self._is_shape_value(name):
                self.sources[name] = frozenset({name}) if is_new else frozenset().union(*read)

    def _is_sum_with_itself(self, node: NodeView) -> bool:
        """Whether a node adds forms of one value, as rotary positions do and a GELU written out: no residual stream."""
        if node.op not in _SUMS or node.domain:
            return False
        added = [self.sources[name] for name in node.inputs if name in self.sources]
        return bool(added) and bool(frozenset.intersection(*added))

    def _rule(self, node: NodeView) -> Rule | None:
        fitting = [r for r in self.rules.get((node.domain, node.op), []) if r.since <= node.version]
        return fitting[-1] if fitting else None

    def _is_shape_value(self, name: str) -> bool:
        value = self.shapes.static.get(name)
        return value is not None and value.dtype.kind in "iub" and name not in self.graph.outputs

    def _is_folded(self, node: NodeView, name: str) -> bool:
        """Whether readers see a small value made from constants as a constant, so that how it is made does not matter.

        A weight matrix that is merely rearranged is followed to where it is stored instead.
        """
        is_stored = node.op in {"DequantizeLinear", "QuantizeLinear"} or self._is_rounded(node)
        follows = self._is_rearranging(node) and (is_stored or len(self.shapes.dims.get(name, ())) > 1)
        return name in self.shapes.fixed and not follows and name not in self.graph.outputs

    def _operand(self, node: NodeView, slot: int) -> Operand:
        name = node.inputs[slot]
        folded = name in self.shapes.fixed and name not in self.weight_values
        constant = name in self.graph.constants or folded
        return Operand(name, node.index, slot) if constant else Operand(name)

    def _site(self, node: NodeView) -> tuple[Site, str]:
        """Return the node with its operands, and the name of the first value of unknown shape, or ""."""
        unknown = ""
        inputs: list[Tensor | None] = []
        for slot, name in enumerate(node.inputs):
            tensor = self._tensor(self._operand(node, slot)) if name else None
            unknown = unknown or (name if name and tensor is None else "")
            inputs.append(tensor)
        outputs = [self._tensor(Operand(name)) if name else None for name in node.outputs]
        read = [n for n, t in zip(node.outputs, outputs, strict=True) if n and t is None]
        return Site(node, inputs, outputs), unknown or (read[0] if read else "")

    def _tensor(self, operand: Operand) -> Tensor | None:
        dims = self.shapes.dims.get(operand.name)
        if dims is None:
            return None
        if operand not in self.axes:
            self.axes[operand] = tuple(Atom(size, f"{operand.name}[{i}]") for i, size in enumerate(dims))
        is_weight = operand.is_constant or operand.name in self.weight_values
        name = operand.name
        return Tensor(operand, dims, self.shapes.static.get(name), is_weight, self.shapes.moving.get(name))

    def _apply(self, node: NodeView, constraint: Constraint) -> None:
        match constraint:
            case Equal(left, right):
                self._equate(node, self._layout(left), self._layout(right))
            case Freeze(expr, reason, apart):
                self.unifier.freeze(self._layout(expr), reason, apart=apart)
            case Contracted(left, right, reason, _):
                self.contracted.setdefault(node.index, []).append(constraint)
                if node.index not in self.untied:
                    self._equate(node, self._layout(left), self._layout(right))
                    self.unifier.forbid_mixing(self._layout(left), reason)
            case Residual() | SelectOnly() | Parallel() | Multiple() | Spare() | Statistic():
                self._mark(node, constraint)
            case Weight(axis, role):
                self._give_role(axis.operand, axis.axis, role, node)
            case Normalises():
                self.normalising.append(node.index)
            case Encoded() | EncodedBias() | Rounded():
                self._note_encoding(node, constraint)
            case AttributeSize() | ConstantSize() | Default() | Picked():
                self._note_numbers(node, constraint)

    def _note_numbers(self, node: NodeView, constraint: AttributeSize | ConstantSize | Default | Picked) -> None:
        """Note numbers in the file that follow from sizes."""
        match constraint:
            case AttributeSize(name, expr, index, scale):
                self.sizes.append(SizeEntry(node.index, self._layout(expr), name, -1, index, scale))
            case ConstantSize(slot, index, expr, scale):
                self.sizes.append(SizeEntry(node.index, self._layout(expr), "", slot, index, scale))
            case Default(name, value, expr):
                self.defaults.append(DefaultEntry(node.index, self._layout(expr), name, value))
            case Picked(slot, parts, order, crossed):
                layouts = tuple(self._layout(part) for part in parts)
                self.indices.append(IndexEntry(node.index, slot, layouts, order, crossed))

    def _equate(self, node: NodeView, a: Layout, b: Layout) -> None:
        self.unifier.at = node.title
        try:
            self.unifier.equate(a, b)
        except LayoutMismatchError as error:
            for part in error.parts or (a, b):
                self.unifier.freeze(part, f"{node.title} needs equal axes, but {error}")

    def _give_role(self, operand: Operand, axis: int, role: Role, node: NodeView) -> None:
        """Note what an axis of a weight does; in two roles at once it can't be mixed, but channels can be dropped."""
        self.users.setdefault(operand, node.name)
        if (operand, axis) not in self.weights:
            self.weights_of.setdefault(operand.node, []).append((operand, axis))
        if self.weights.setdefault((operand, axis), role) is not role:
            self.unifier.forbid_mixing(
                self.axes[operand][axis], f"{node.title} reads a weight that has another role too"
            )

    def _note_encoding(self, node: NodeView, constraint: Encoded | EncodedBias | Rounded) -> None:
        """Note how integers stand for numbers; what is not known before run time, or too coarse, can't be mixed."""
        if isinstance(constraint, Rounded):
            self.rounded[node.index] = constraint
            return
        operand = constraint.operand
        if isinstance(constraint, EncodedBias):
            self.biases[operand] = constraint
            read = [operand, constraint.x_scale]
            problem = "whose integers have a scale that is computed at run time"
        else:
            constraint = self._with_scale_behind(node, constraint)
            if constraint.scale is not None or operand not in self.encodings:
                self.encodings[operand] = constraint
            read = [o for o in (constraint.scale, constraint.zero) if o is not None]
            problem = "whose scale or zero point is computed at run time"
        if not operand.is_constant:
            return
        if not all(o.is_constant for o in read):
            for axis in self.axes[operand]:
                self.unifier.freeze(axis, f"{node.title} reads {operand.name!r}, {problem}")
        elif isinstance(constraint, Encoded):
            self._forbid_coarse_mixing(node, constraint)

    def _with_scale_behind(self, node: NodeView, encoded: Encoded) -> Encoded:
        """Give a weight the scale that other nodes apply to what it makes, where there is just one place for it."""
        behind = scale_behind(self.graph, node)
        if encoded.scale is not None or not encoded.operand.is_constant or behind is None:
            return encoded
        dims = self.shapes.dims[behind.weight_scale.name]
        # A vector belongs to the columns of a product; along the last axis of a convolution it would be something else.
        per_column = node.op == "MatMulInteger" and encoded.operand.slot == 1 and len(dims) == 1
        if max(dims, default=1) > 1 and not per_column:
            return encoded
        columns = (len(self.axes[encoded.operand]) - 1,) if max(dims, default=1) > 1 else encoded.axes
        return replace(encoded, scale=behind.weight_scale, axes=columns)

    def _forbid_coarse_mixing(self, node: NodeView, encoded: Encoded) -> None:
        problem = ""
        if encoded.scale is None:
            problem = "integers whose scale other nodes apply"
        elif encoded.bits or self.shapes.types.get(encoded.operand.name) in COARSE_TYPES:
            problem = f"integers of {encoded.bits or 4} bits"
        for axis in self.axes[encoded.operand] if problem else ():
            self.unifier.forbid_mixing(axis, f"{node.title} reads {encoded.operand.name!r}, which holds {problem}")

    def _stored(self) -> set[Operand]:
        """Return the constants that are stored as integers, or say how such are."""
        found = {*self.biases}
        for encoded in self.encodings.values():
            found.update(o for o in (encoded.operand, encoded.scale, encoded.zero) if o is not None)
        found.update(told.zero for told in self.rounded.values() if told.zero is not None)
        return found

    def _roundings(self) -> dict[Operand, Rounding]:
        """Return how weights are rounded; where a scale can't be chosen anew, channels are only dropped."""
        found, odd = RoundingFinder(self.graph, self.shapes, self._operand).find(self.rounded)
        for operand, reason in odd.items():
            for axis in self.axes[operand]:
                self.unifier.forbid_mixing(axis, reason)
        return found

    def _mark(
        self, node: NodeView, constraint: Residual | SelectOnly | Parallel | Multiple | Spare | Statistic
    ) -> None:
        layout = self._layout(constraint.expr)
        match constraint:
            case Residual():
                if not self._is_sum_with_itself(node):
                    self.unifier.mark_residual(layout)
            case SelectOnly():
                self.unifier.forbid_mixing(layout, constraint.reason)
            case Parallel():
                self.unifier.mark_parallel(layout, constraint.reason)
            case Multiple():
                self.unifier.mark_multiple(layout, constraint.of, constraint.reason)
            case Spare():
                self.spare.append(constraint)
                self.unifier.mark_spare(layout, constraint.reason)
            case Statistic():
                self.unifier.mark_statistic(layout, constraint.reason)

    def _layout(self, expr: Expr) -> Layout:
        match expr:
            case AxisRef(operand, axis):
                return self.axes[operand][axis]
            case Fresh():
                if expr not in self.fresh:
                    self.fresh[expr] = Atom(expr.size, expr.label, structural=bool(expr.fixed))
                    if expr.fixed:
                        self.unifier.freeze(self.fresh[expr], expr.fixed, apart=expr.apart)
                return self.fresh[expr]
            case Cat(parts):
                return Concat(tuple(self._layout(part) for part in parts))
            case Prod(factors):
                return Product(tuple(self._layout(factor) for factor in factors))

    def _check_complete(self, site: Site, constraints: Iterable[Constraint]) -> None:
        """Freeze the whole node where its rule says nothing of some axis: better small than wrong."""
        told = {(ref.operand, ref.axis) for constraint in constraints for ref in axis_references(constraint)}
        for tensor in (*site.inputs, *site.outputs):
            if tensor is None or (tensor.value is not None and tensor.value.dtype.kind in "iub"):
                continue
            silent = [a for a, n in enumerate(tensor.dims) if n > 1 and (tensor.operand, a) not in told]
            if silent:
                name = tensor.operand.name
                self._freeze_site(site, f"the rule for {site.node.title} does not cover axis {silent[0]} of {name!r}")
                return

    def _freeze_site(self, site: Site, reason: str) -> None:
        """Freeze all that a node reads and makes; its matrices are listed as what makes channels that stay."""
        for tensor in (*site.inputs, *site.outputs):
            if tensor is not None:
                for axis in self.axes[tensor.operand]:
                    self.unifier.freeze(axis, reason)
        for weight in (tensor for tensor in site.inputs if tensor is not None and tensor.is_weight):
            is_known = any((weight.operand, axis) in self.weights for axis in range(weight.rank))
            is_matrix = math.prod(weight.dims) > max(weight.dims, default=1)
            if not is_known and is_matrix and self.shapes.types.get(weight.operand.name) in WEIGHT_TYPES:
                self._give_role(weight.operand, weight.dims.index(max(weight.dims)), Role.PRODUCER, site.node)

    def _freeze_value(self, name: str, reason: str) -> None:
        if self._tensor(Operand(name)) is not None:
            for axis in self.axes[Operand(name)]:
                self.unifier.freeze(axis, reason)

    def _freeze_reported_sizes(self) -> None:
        """Freeze what graph outputs and subgraphs read the shape of: there is no place to put a constant instead."""
        told = [*self.graph.outputs, *(name for node in self.graph.nodes for name in node.captured)]
        for name in told:
            for value in self.shapes.read_from.get(name, ()):
                self._freeze_value(value, f"{name!r} states its shape")

    # The whole graph --------------------------------------------------------------------------------------------

    def _resolved(self, entry: SizeEntry) -> SizeEntry:
        layout = self.unifier.resolve(entry.layout)
        return SizeEntry(entry.node, layout, entry.attribute, entry.slot, entry.index, entry.scale)

    def _proposal(self) -> Proposal:
        spare = [(self._layout(told.expr), [self._layout(axis) for axis in told.axes]) for told in self.spare]
        told = (self.axes, self.weights, self.users, self._stored(), spare)
        return Proposal(self.graph, self.shapes, self.unifier, *told)

    def _pass_roles_back(self) -> None:
        """Give the weight behind a chain of rearranging nodes the roles that its last form has."""
        roles: dict[tuple[Operand, Atom], set[Role]] = {}
        for (operand, axis), role in self.weights.items():
            if not operand.is_constant:
                for atom in leaves(self.unifier.resolve(self.axes[operand][axis])):
                    roles.setdefault((operand, atom), set()).add(role)
        for node in reversed(self.graph.nodes):
            if not self._is_rearranging(node) or node.outputs[0] not in self.weight_values:
                continue
            source = self._operand(node, 0)
            self.users.setdefault(source, self.users.get(Operand(node.outputs[0]), node.name))
            for axis, layout in enumerate(self.axes[source]):
                moved = moved_axis(node, axis, len(self.axes[source]), self.shapes)
                for atom in dict.fromkeys(leaves(self.unifier.resolve(layout))):
                    found = self._roles_behind(Operand(node.outputs[0]), moved, atom, roles)
                    roles.setdefault((source, atom), set()).update(found)
                    if len(found) == 1:
                        self._give_role(source, axis, next(iter(found)), node)
                    elif found:
                        self.unifier.freeze(atom, f"{node.title} passes on a weight with two roles")

    def _roles_behind(
        self, result: Operand, axis: int | None, atom: Atom, roles: Mapping[tuple[Operand, Atom], set[Role]]
    ) -> set[Role]:
        """Return the roles of one axis of a rearranged weight, or of all that an atom is on where axes merged."""
        if axis is None:
            return roles.get((result, atom), set())
        return {self.weights[result, axis]} if (result, axis) in self.weights else set()
