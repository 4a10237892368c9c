"""The weights while they are being fused: precise copies of what the groups touch, and how a map acts on them.

A coupling group says which axes follow its channels; a `ChannelMap` says how the channels become fewer. This module
multiplies the two. Where a batch normalisation can be folded into the layer before it, the map acts on the folded
weights (the paper's equation 1, with the epsilon that the operator adds), and the result is written back as a layer
and a normalisation whose composition is the fused layer exactly: the network keeps its nodes, and no statistic is lost.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from onnxfuse.arrays import FloatArray, Floats, IntArray
from onnxfuse.coupling.constraints import Encoded
from onnxfuse.coupling.groups import ChannelGraph, CouplingGroup, ParameterAxis
from onnxfuse.coupling.layout import Atom
from onnxfuse.coupling.rounded import Rounding
from onnxfuse.coupling.scales_behind import scale_behind
from onnxfuse.coupling.sets import Places, has_sets_elsewhere, places
from onnxfuse.errors import InvariantError
from onnxfuse.fusion.mapping import along, map_sides, rows_of
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.fusion.normalised import Norm, mapped_norm
from onnxfuse.fusion.quantised import Encoding, clipped, decode, encode, fitting_encoding, integer_range, pack, unpack
from onnxfuse.graph.shapes import Shapes
from onnxfuse.graph.view import BIAS_SLOTS, DEFAULT_DOMAIN, GraphView, NodeView, Operand
from onnxfuse.matrices import Matrix, transposed
from onnxfuse.statistics.features import ChannelFeatures, MemberFeatures, Role

__all__ = ["WeightState"]

_SCALE, _SHIFT, _MEAN, _VARIANCE = 1, 2, 3, 4
_DEFAULT_EPSILON = 1e-5
_NO_SCALE = 1e-200
# Weights of more entries are not kept before they change, and in single precision after it, unless the file has double.
_LARGE = 2**22


class WeightState:
    """All weights that groups touch, changed one group at a time.

    Args:
        graph: The original graph; not changed.
        shapes: Its shapes and static values.
        channels: Its coupling groups.

    Attributes:
        widths: Present size of every atom that has been changed.
    """

    widths: dict[Atom, int]

    def __init__(self, graph: GraphView, shapes: Shapes, channels: ChannelGraph) -> None:
        """Start from the original weights; nothing is converted before it is needed."""
        self.graph = graph
        self.shapes = shapes
        self.channels = channels
        self.widths = {}
        self._arrays: dict[Operand, Floats] = {}
        self._changed: set[Operand] = set()
        self._mixed: set[Operand] = set()
        self._output_axis = {
            p.operand: p.axis for group in channels.groups for p in group.parameters if p.role is Role.PRODUCER
        }
        self._rounded_by: dict[Operand | None, Operand] = {
            scale: weight for weight, rounding in channels.roundings.items() for scale in rounding.scales
        }
        self._norm_after = {maker: norm for norm, makers in channels.batch_norms.items() for maker in makers}

    def array(self, operand: Operand) -> FloatArray:
        """Return the present value of a weight as one node reads it, float64."""
        return self._value(operand).astype(np.float64, copy=False)

    def _value(self, operand: Operand) -> Floats:
        """Return the present value of a weight as it is kept, large ones in single precision, or as it counts.

        What is beyond the ends of the integers that a weight is rounded to counts as if it were there.
        """
        value = self._kept(operand)
        told = self.channels.roundings.get(operand)
        if told is None or operand in self._mixed:
            return value
        found = clipped(value.astype(np.float64, copy=False), self._rounding(told), told.limits)
        return found.astype(self._precision(operand, value.size), copy=False)

    def _kept(self, operand: Operand) -> Floats:
        """Return the present value of a weight as it is kept."""
        if operand in self._arrays:
            return self._arrays[operand]
        value = self._decoded(operand)
        # Large weights are read anew each time: copies of all of them would be the most memory that is ever needed.
        if value.size <= _LARGE:
            self._arrays[operand] = value
        return value

    def changed(self) -> Iterator[tuple[Operand, np.ndarray[Any, np.dtype[Any]]]]:
        """Yield every weight that a map has acted on, cast once to the data type that the file has."""
        values: dict[Operand, Floats] = {operand: self._arrays[operand] for operand in self._changed}
        for operand in self._changed:
            values.update(self._as_stored(operand))
        for node in self.graph.nodes:
            values.update(self._stored_bias(node, values))
        values.update(self._stored_biases(values))
        for operand in sorted(values, key=lambda o: (o.node, o.slot)):
            yield operand, values[operand].astype(self._original(operand).dtype)

    def features(self, group: CouplingGroup) -> ChannelFeatures:
        """Return what importances and costs may see of a group, on the weights as they are now, set by set."""
        biases = self._biases(group)
        members = []
        for parameter in group.parameters:
            if parameter.role not in {Role.PRODUCER, Role.CONSUMER}:
                continue
            where = self._places(parameter, group)
            rows = rows_of(self._folded(parameter.operand), where)
            bn_scale = bias = None
            if parameter.role is Role.PRODUCER:
                bn_scale = self._bn_scale(parameter.operand.node, where.index)
                bias = biases.pop(parameter.operand.node, None)
            members.append(MemberFeatures(parameter.node, parameter.role, rows, bias, bn_scale))
        return ChannelFeatures(self._sets(group) * group.channels, tuple(members))

    def fuse(self, group: CouplingGroup, channel_map: ChannelMap, *, readers: bool = True) -> None:
        """Let a map act on every weight of a group.

        Args:
            group: The group.
            channel_map: The map: of all its sets of channels, one after the other, or one that acts in each set alike.
            readers: Whether it acts on the consumers too; without, they keep reading the original channels.
        """
        sets = self._sets(group)
        if sets > 1 and channel_map.channels == group.channels:
            channel_map = ChannelMap.side_by_side([channel_map] * sets)
        if channel_map.channels != sets * self.widths.get(group.atom, group.channels):
            what = f"a map of {channel_map.channels} channels is not for {sets} sets of {group.channels}"
            raise InvariantError(what, where=group.name)
        widths = {**self.widths, group.atom: channel_map.kept // sets}
        nodes = {p.operand.node for p in group.parameters}
        norms = [n for n in self.channels.normalising if n in nodes]
        before = {n: self._norm(n) for n in norms}
        # A selection copies numbers, so it needs no folding; without it, what is kept stays bit-identical.
        folded = {} if channel_map.is_selection else {n: self._makers(n) for n in norms if self._makers(n)}
        for norm, makers in folded.items():
            self._scale_outputs(makers, self._factor_inside(norm, group), group)
        results: dict[Operand, Floats] = {}
        # Where other axes tell the sets apart, these must not have changed yet.
        for parameter in sorted(group.parameters, key=lambda p: not self._has_sets_elsewhere(p, group)):
            if parameter.operand.node in norms or (parameter.role is Role.CONSUMER and not readers):
                continue
            value = self._kept if channel_map.is_selection else self._value
            current = results[parameter.operand] if parameter.operand in results else value(parameter.operand)
            results[parameter.operand] = self._mapped(current, parameter, group, channel_map)
            if not channel_map.is_selection:
                self._mixed.add(parameter.operand)
        for norm in norms:
            results.update(self._mapped_norm(norm, group, channel_map, before[norm]))
        self._arrays.update(results)
        self._changed.update(results)
        self.widths = widths
        for norm, makers in folded.items():
            self._scale_outputs(makers, 1.0 / self._factor_inside(norm, group, zero=1.0), group)

    def replace(self, operand: Operand, value: FloatArray) -> None:
        """Give a weight a new value of the shape that it has now."""
        if self.array(operand).shape != value.shape:
            what = f"a weight of shape {self.array(operand).shape} can't become {value.shape}"
            raise InvariantError(what, where=operand.name)
        self._arrays[operand] = value.astype(self._precision(operand, value.size), copy=False)
        self._changed.add(operand)
        self._mixed.add(operand)

    def output_shift(self, node: NodeView) -> Operand | None:
        """Return what can shift the outputs of a linear node one by one: its norm's mean, its bias, an added constant.

        Returns:
            A vector with one entry for each output; None if there is none.
        """
        norm = self._norm_after.get(node.index)
        if norm is not None:
            return self._operand(norm, _MEAN)
        behind = scale_behind(self.graph, node)
        slot = BIAS_SLOTS.get(node.op, len(node.inputs))
        if slot < len(node.inputs) and node.inputs[slot]:
            return self._shifting(self.graph.decoded_operand(node, slot))
        value = node.outputs[0] if behind is None else behind.result
        reader = self.graph.sole_reader(value)
        if reader is not None and reader.op == "Add" and reader.domain == DEFAULT_DOMAIN:
            return self._shifting(self._operand(reader.index, 1 - list(reader.inputs).index(value)))
        return None

    def shift_outputs(self, node: NodeView, shift: FloatArray) -> None:
        """Add to the outputs of a linear node, at the operand that `output_shift` names.

        Args:
            node: The node.
            shift: Shape (outputs,), float64.
        """
        operand = self.output_shift(node)
        if operand is None:
            what = "there is nothing that shifts the outputs"
            raise InvariantError(what, where=node.title)
        value = self.array(operand)
        # A normalisation subtracts its mean.
        sign = -1.0 if node.index in self._norm_after else 1.0
        self.replace(operand, value + sign * shift.reshape(value.shape))

    def affine(self, node: NodeView, size: int) -> tuple[FloatArray, FloatArray]:
        """Return what a normalisation or an added constant multiplies every channel by, and adds to it.

        Args:
            node: A batch normalisation, or an Add with a constant that has one number, or one for every channel.
            size: The number of channels.

        Returns:
            Factor and offset, shape (size,) each.
        """
        if node.index in self.channels.normalising:
            norm = self._norm(node.index)
            return norm.factor, norm.shift - norm.factor * norm.mean
        slot = next(slot for slot, name in enumerate(node.inputs) if name in self.graph.constants)
        value = self.array(Operand(node.inputs[slot], node.index, slot))
        return np.ones(size), np.broadcast_to(value.reshape(-1), (size,)).astype(np.float64)

    def stored(
        self, node: NodeView, operands: Iterable[Operand]
    ) -> Iterator[tuple[Operand, np.ndarray[Any, np.dtype[Any]]]]:
        """Yield the present values of a linear node's weights as the file would have them, with how they are stored."""
        values: dict[Operand, Floats] = {}
        for operand in operands:
            values.update({operand: self._value(operand)} | self._as_stored(operand))
        values.update(self._stored_bias(node, values))
        values.update(self._stored_biases(values))
        for operand, value in values.items():
            yield operand, value.astype(self._original(operand).dtype)

    def _shifting(self, operand: Operand | None) -> Operand | None:
        operand = None if operand is None else self._before_reshape(operand)
        if (
            operand is None
            or operand not in self.channels.layouts
            or not (operand.name in self.graph.constants or operand.name in self.shapes.static)
        ):
            return None
        if self.graph.nodes[operand.node].op == "QuantizeLinear" and operand not in self.channels.roundings:
            return None
        is_vector = self.array(operand).size == max(self.array(operand).shape, default=0) > 1
        return operand if is_vector else None

    def _before_reshape(self, operand: Operand) -> Operand:
        """Return the constant that a Reshape for one reader alone gives its form, where there is one."""
        maker = self.graph.producers.get(operand.name)
        if maker is None or self.graph.sole_reader(operand.name) is None or self.graph.nodes[maker].op != "Reshape":
            return operand
        source = self._operand(maker, 0)
        return operand if source is None or source.name not in self.graph.constants else source

    # Reading ----------------------------------------------------------------------------------------------------

    def _original(self, operand: Operand) -> np.ndarray[Any, np.dtype[Any]]:
        if operand.name in self.graph.constants:
            return self.graph.array(operand.name)
        return self.shapes.static[operand.name]

    def _places(self, parameter: ParameterAxis, group: CouplingGroup, kept: int | None = None) -> Places:
        return places(self.channels.layouts[parameter.operand], parameter.axis, group, self.widths, kept)

    def _has_sets_elsewhere(self, parameter: ParameterAxis, group: CouplingGroup) -> bool:
        return has_sets_elsewhere(self.channels.layouts[parameter.operand], parameter.axis, group)

    def _sets(self, group: CouplingGroup) -> int:
        """Return how many sets of channels a group has by now."""
        return math.prod(self.widths.get(atom, atom.size) for atom in group.over)

    def _norm(self, node: int) -> Norm:
        names = self.graph.nodes[node].inputs
        scale, shift, mean, variance = (
            self.array(Operand(names[s], node, s)) for s in (_SCALE, _SHIFT, _MEAN, _VARIANCE)
        )
        epsilon = float(self.graph.nodes[node].attributes.get("epsilon", _DEFAULT_EPSILON))
        return Norm(scale, shift, mean, variance, epsilon)

    def _folded(self, operand: Operand) -> Floats:
        """Return a weight with the normalisation after its node folded into its outputs (the paper's equation 1).

        All weights of a group are seen so, those that read its channels too, as after folding the whole network.
        """
        value, after = self._value(operand), self._norm_after.get(operand.node)
        axis = self._output_axis.get(operand)
        if after is None or axis is None:
            return value
        folded: Floats = value * along(self._norm(after).factor, axis, value.ndim).astype(value.dtype)
        return folded

    def _bn_scale(self, node: int, where: IntArray) -> FloatArray | None:
        """Return the magnitude of the scale that a normalisation after ``node`` gives every channel."""
        after = self._norm_after.get(node)
        return None if after is None else np.abs(self._norm(after).scale)[where].mean(axis=1)

    def _biases(self, group: CouplingGroup) -> dict[int, FloatArray]:
        """Return the producers' biases, normalisation folded in, by the node of the producer's weight."""
        makers = {p.operand.node: self._places(p, group) for p in group.producers}
        # A bias that a node of its own adds belongs to the producer before it, or else to the first without one.
        found: dict[int, FloatArray] = {}
        homeless: list[FloatArray] = []
        for parameter in (p for p in group.parameters if p.role is Role.BIAS):
            value = np.asarray(rows_of(self.array(parameter.operand), self._places(parameter, group)), np.float64)
            home = self._home(parameter.operand.node, makers)
            if home is None:
                homeless.append(value)
            else:
                found[home] = value
        found.update(zip([n for n in makers if n not in found], homeless, strict=False))
        for node, place in makers.items():
            after = self._norm_after.get(node)
            if after is not None:
                norm, where = self._norm(after), place.index
                bias = found.get(node, np.zeros(where.shape))
                found[node] = norm.factor[where] * (bias - norm.mean[where]) + norm.shift[where]
        return found

    def _home(self, node: int, makers: Mapping[int, Places]) -> int | None:
        """The producer whose bias node ``node`` adds: itself, or the one that it reads from."""
        if node in makers:
            return node
        before = (self.graph.producers.get(name) for name in self.graph.nodes[node].inputs)
        return next((maker for maker in before if maker in makers), None)

    # Quantised weights ------------------------------------------------------------------------------------------

    def _is_stored(self, operand: Operand) -> bool:
        """Whether an operand is the integers of a weight."""
        return operand.is_constant and operand in self.channels.encodings

    def _precision(self, operand: Operand, size: int) -> np.dtype[Any]:
        """Return the type that a weight is kept in: single precision if it is large, unless the file has double."""
        is_large = size > _LARGE and self._original(operand).dtype != np.float64
        return np.dtype(np.float32 if is_large else np.float64)

    def _decoded(self, operand: Operand) -> Floats:
        """Return the original value of a weight as the numbers that it stands for."""
        value = self._original(operand)
        if self._is_stored(operand):
            bits = self.channels.encodings[operand].bits
            # What a byte holds gets an axis of its own, so that all others stay as they are.
            integers = unpack(value, bits).reshape(*value.shape, -1) if bits else value.astype(np.float64)
            return decode(integers, self._encoding(operand))
        if operand in self.channels.biases:
            return decode(value.astype(np.float64), self._bias_encoding(operand, {}))
        return value.astype(self._precision(operand, value.size))

    def _operand(self, node: int, slot: int) -> Operand | None:
        inputs = self.graph.nodes[node].inputs
        return Operand(inputs[slot], node, slot) if slot < len(inputs) and inputs[slot] else None

    def _encoding(self, operand: Operand) -> Encoding:
        """Return how a weight is stored, at its present width."""
        told = self.channels.encodings[operand]
        scales = np.ones(()) if told.scale is None else self.array(told.scale)
        # A scale of 0 makes zeros of all integers; one that is next to nothing keeps them apart.
        scales = np.where(scales == 0, _NO_SCALE, scales)
        zeros = np.full((), 2.0 ** (told.bits - 1)) if told.bits else np.zeros(())
        if told.zero is not None:
            zeros = self._zero_point(told, told.zero, scales.size)
        return Encoding(scales, zeros, told.axes, told.along, told.block)

    def _zero_point(self, told: Encoded, operand: Operand, count: int) -> FloatArray:
        """Return the zero points of a weight, one for each of ``count`` scales or one for all."""
        stored = self.array(operand)
        if not told.bits:
            # A mean of zero points is not a whole number.
            return np.rint(stored)
        if self._original(operand).dtype.kind == "f":
            return stored
        # Each row of blocks fills whole bytes, so the last byte of a row may be half empty.
        rows = self.channels.dims(told.operand, self.widths)[0]
        return unpack(stored.reshape(rows, -1), told.bits)[:, : count // rows]

    def _rounding(self, told: Rounding) -> Encoding:
        """Return how a weight of floats is rounded, at its present width."""
        scales = self.array(told.scales[0])
        scales = np.where(scales == 0, _NO_SCALE, scales)
        zeros = np.rint(self.array(told.zeros[0])) if told.zeros else np.zeros(())
        return Encoding(scales, zeros, told.axes, told.along, told.block)

    def _as_stored(self, operand: Operand) -> dict[Operand, Floats]:
        """Return what has to be written for a changed weight that is encoded or rounded."""
        if self._is_stored(operand):
            return {**self._stored(operand)}
        rounding = self.channels.roundings.get(operand)
        if rounding is None or operand not in self._mixed:
            return {}
        dtype = self._original(rounding.scales[0]).dtype
        found = fitting_encoding(self.array(operand), self._rounding(rounding), rounding.limits, dtype)
        values: dict[Operand, Floats] = {s: found.scale.reshape(self.array(s).shape) for s in rounding.scales}
        for zero in rounding.zeros:
            if zero in self._changed:
                values[zero] = found.zero_point.reshape(self.array(zero).shape)
        return values

    def _stored(self, operand: Operand) -> dict[Operand, FloatArray]:
        """Return the integers of a changed weight, and its scales and zero points where they had to change."""
        told, encoding = self.channels.encodings[operand], self._encoding(operand)
        if told.bits:
            integers = encode(self.array(operand), encoding, (0, 2**told.bits - 1))
            return {operand: pack(integers.reshape(*integers.shape[:-2], -1), told.bits)}
        bounds = integer_range(self._original(operand).dtype)
        values: dict[Operand, FloatArray] = {}
        if operand in self._mixed and told.scale is not None:
            encoding = fitting_encoding(self.array(operand), encoding, bounds, self._original(told.scale).dtype)
            values[told.scale] = encoding.scale
            if told.zero in self._changed:
                values[told.zero] = encoding.zero_point
        values[operand] = encode(self.array(operand), encoding, bounds)
        return values

    def _stored_biases(self, values: Mapping[Operand, Floats]) -> dict[Operand, FloatArray]:
        """Return the integers of biases anew where the scale of their weight, or they themselves, have changed."""
        found = {}
        for operand, told in self.channels.biases.items():
            if operand in values or told.weight in values:
                encoding = self._bias_encoding(operand, values)
                found[operand] = encode(self.array(operand), encoding, integer_range(self._original(operand).dtype))
        return found

    def _bias_encoding(self, operand: Operand, values: Mapping[Operand, Floats]) -> Encoding:
        """Return how a bias is stored with the scales among some values, or else the present ones."""
        told = self.channels.biases[operand]
        w_scale = self.channels.encodings[told.weight].scale
        scale = np.ones(()) if w_scale is None else values.get(w_scale, self.array(w_scale))
        last = self._original(operand).ndim - 1
        return Encoding(told.factor * self.array(told.x_scale).reshape(-1)[0] * scale, np.zeros(()), (last,))

    def _stored_bias(self, node: NodeView, values: Mapping[Operand, Floats]) -> dict[Operand, FloatArray]:
        """Return a linear node's integer bias anew where the scale of its weight has changed.

        Runtimes compute in integers and take for granted that the scale of the bias is that of the input times that of
        the weight, whatever the file says; so it has to be.
        """
        makers = [self._dequantizer(node, slot) for slot in (0, 1, 2)]
        if makers[0] is None or makers[1] is None or makers[2] is None or node.domain != DEFAULT_DOMAIN:
            return {}
        scales = [self._operand(maker, 1) for maker in makers if maker is not None]
        weight, bias = self._decoded_by(makers[1]), self._operand(makers[2], 0)
        if weight is None or bias is None or None in scales or not self._is_stored(bias):
            return {}
        if not any(operand in values and operand in self._mixed for operand in (weight, bias)):
            return {}
        x_scale, w_scale, b_scale = (scale for scale in scales if scale is not None)
        scale = self.array(x_scale).reshape(-1)[0] * values.get(w_scale, self.array(w_scale))
        width = self.array(bias).shape
        if scale.size not in {1, self.array(bias).size}:
            return {}
        shape = self.array(b_scale).shape if self.array(b_scale).size == 1 else width
        rounded = np.broadcast_to(scale, shape).astype(self._original(b_scale).dtype).astype(np.float64)
        encoding = Encoding(rounded, np.zeros(()), (0,))
        stored = encode(self.array(bias), encoding, integer_range(self._original(bias).dtype))
        return {b_scale: encoding.scale, bias: stored}

    def _decoded_by(self, maker: int) -> Operand | None:
        """Return the weight that a DequantizeLinear decodes: its integers, or the floats that they are rounded from."""
        scale = self._operand(maker, 1)
        return self._rounded_by[scale] if scale in self._rounded_by else self._operand(maker, 0)

    def _dequantizer(self, node: NodeView, slot: int) -> int | None:
        if node.op not in {"Conv", "ConvTranspose", "Gemm"} or slot >= len(node.inputs):
            return None
        maker = self.graph.producers.get(node.inputs[slot])
        return maker if maker is not None and self.graph.nodes[maker].op == "DequantizeLinear" else None

    # Writing ----------------------------------------------------------------------------------------------------

    def _mapped(self, value: Floats, parameter: ParameterAxis, group: CouplingGroup, channel_map: ChannelMap) -> Floats:
        old = self._places(parameter, group)
        new = self._places(parameter, group, channel_map.kept // self._sets(group))
        matrices = (_matrix(channel_map, parameter.role), transposed(channel_map.reading))
        return map_sides(value, old, new, matrices, group.mirrored.get((parameter.operand, parameter.axis)))

    def _makers(self, norm: int) -> tuple[int, ...]:
        return self.channels.batch_norms.get(norm, ())

    def _factor_inside(self, norm: int, group: CouplingGroup, zero: float = 0.0) -> FloatArray:
        """The factor of a normalisation, with zeros replaced by ``zero`` inside the group and by 1 outside.

        A factor of 0 wipes a channel out; that is right for the channels being fused, and must not touch the others.
        """
        factor = self._norm(norm).factor
        inside = np.zeros(len(factor), bool)
        for parameter in group.parameters:
            if parameter.operand.node == norm:
                inside[self._places(parameter, group).index.ravel()] = True
        return np.where(factor == 0, np.where(inside, zero, 1.0), factor)

    def _scale_outputs(self, makers: tuple[int, ...], factor: FloatArray, group: CouplingGroup) -> None:
        """Multiply what makes the channels of a group, weights and biases, by a factor for each output."""
        for parameter in group.parameters:
            if parameter.operand.node in makers and parameter.role is not Role.CONSUMER:
                value = self._value(parameter.operand)
                self._arrays[parameter.operand] = value * along(factor, parameter.axis, value.ndim).astype(value.dtype)

    def _mapped_norm(
        self, node: int, group: CouplingGroup, channel_map: ChannelMap, norm: Norm
    ) -> dict[Operand, FloatArray]:
        """Return what the parameters of a normalisation become."""
        operands = {p.operand.slot: p for p in group.parameters if p.operand.node == node}
        old = self._places(operands[_SCALE], group).index
        new = self._places(operands[_SCALE], group, channel_map.kept // self._sets(group)).index
        found = mapped_norm(norm, channel_map, old, new, is_folded=bool(self._makers(node)))
        values = {_SCALE: found.scale, _SHIFT: found.shift, _MEAN: found.mean, _VARIANCE: found.variance}
        return {operands[slot].operand: value for slot, value in values.items()}


def _matrix(channel_map: ChannelMap, role: Role) -> Matrix:
    match role:
        case Role.PRODUCER | Role.BIAS:
            return channel_map.making
        case Role.CONSUMER:
            return transposed(channel_map.reading)
        case Role.CARRIED | Role.ENCODING:
            return channel_map.carried
