"""The mean that a fusion takes from what reads the channels, given back at a bias behind each reader.

Channels h become h' and are rebuilt as B h'. Where a layer with weights V reads them and something shifts its outputs,
B makes good how h moves about its mean, and the shift :math:`V^T E[h - B h']` makes good the mean. At the borders of a
map a convolution reads zeros, which are not missed; so a tap counts as often as it reads the map at all.
"""

from collections.abc import Sequence

import numpy as np

from onnxfuse.analysis import Analysis
from onnxfuse.arrays import FloatArray, join_axes
from onnxfuse.calibration.gates import gates_of
from onnxfuse.calibration.linear import LinearNode, linear_nodes
from onnxfuse.coupling.groups import CouplingGroup, layout_size
from onnxfuse.coupling.layout import Product, leaves
from onnxfuse.coupling.sets import places
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.fusion.values import Applied, fused_values
from onnxfuse.fusion.weights import WeightState
from onnxfuse.graph.view import Operand
from onnxfuse.statistics.damage import Reading

__all__ = ["MeanShifts", "missed_means"]

# What is on an axis that has no channels.
_NONE = Product(())


def missed_means(reading: Reading, channel_map: ChannelMap) -> FloatArray:
    """Return what a fusion leaves of the mean of every channel, E[h - B h'], shape (C, m), float64.

    Of mixed channels it is the mean over all m places that a channel has on the axis that is read.

    Args:
        reading: What a reader sees.
        channel_map: A and B; A only selects where `Reading.channels` are not known.

    Example:
        >>> kept = ChannelMap.selection(np.array([0]), 2)
        >>> missed_means(Reading(np.eye(2), np.array([[1.0], [3.0]]), np.eye(2)), kept).tolist()
        [[0.0], [3.0]]
    """
    if reading.channels is None or channel_map.selects:
        return np.asarray(reading.means - channel_map.reading @ reading.means[channel_map.anchors], np.float64)
    mean, fused = reading.channels[1].means(channel_map.output)
    missed = np.asarray(mean - channel_map.reading @ fused, np.float64)
    return np.broadcast_to(missed[:, None], reading.means.shape)


class MeanShifts:
    """Gives the layers that read a group the mean back that its fusion takes.

    Args:
        analysis: The original.
        state: The weights; changed.
        applied: The groups that were fused before.
    """

    def __init__(self, analysis: Analysis, state: WeightState, applied: Applied) -> None:
        """Note where the layers are."""
        self.analysis, self.state, self.applied = analysis, state, applied
        self._linear = {linear.node.name: linear for linear in linear_nodes(analysis.graph, analysis.channels)}

    def apply(self, group: CouplingGroup, readings: Sequence[Reading], channel_map: ChannelMap) -> None:
        """Shift the outputs of every layer that reads a group, as it is before its fusion.

        Args:
            group: The group.
            readings: What its readers see.
            channel_map: The map that is about to act on it.
        """
        for reading in readings:
            if not reading.has_shift or reading.parameter < 0:
                continue
            parameter, missed = group.parameters[reading.parameter], missed_means(reading, channel_map)
            linear = self._linear.get(parameter.node)
            if linear is None:
                self._shift_gates(parameter.operand, group, missed)
            # A single output is nothing that a vector could shift.
            elif self.state.output_shift(linear.node) is not None:
                heard = self._heard(linear, self._on_axis(linear.node.inputs[0], group, missed))
                self.state.shift_outputs(linear.node, heard)

    def _shift_gates(self, weight: Operand, group: CouplingGroup, missed: FloatArray) -> None:
        """Shift what the gates of a recurrent layer add up, of which one of the weights reads the group."""
        node = self.analysis.graph.nodes[weight.node]
        gates = gates_of(self.analysis.graph, self.state, node)
        if gates is None:
            return
        recurs = weight == self.analysis.graph.decoded_operand(node, 2)
        found = self._on_axis(gates.states if recurs else gates.inputs, group, missed)
        steps = self.analysis.shapes.dims[gates.inputs][int(gates.batch_first)]
        gates.shift(self.state, found, steps, recurs=recurs)

    def _on_axis(self, name: str, group: CouplingGroup, missed: FloatArray) -> FloatArray:
        """Return what is missed at every entry of the axis that has a group, of a value at its present width.

        Args:
            name: The value.
            group: The group.
            missed: Of its channels at each of their places, shape (C, m).
        """
        layouts = self.analysis.channels.layouts[Operand(name)]
        axis = next(axis for axis, layout in enumerate(layouts) if group.atom in set(leaves(layout)))
        where = places(layouts, axis, group, {})
        changed = {other.atom for other, _ in self.applied}
        # Axes without channels, such as those of an image, count as one place.
        held = [i in where.axes or bool(changed & set(leaves(layout))) for i, layout in enumerate(layouts)]
        told = [layout if has else _NONE for layout, has in zip(layouts, held, strict=True)]
        spread = np.zeros([layout_size(layout, {}) for layout in told])
        joined = join_axes(spread, where.axes)
        joined[where.index] = missed.reshape(*missed.shape, *[1] * (joined.ndim - 1))
        spread = joined.reshape(*(spread.shape[i] for i in where.axes), *joined.shape[1:])
        spread = np.moveaxis(spread, range(len(where.axes)), where.axes)
        fused = fused_values(spread, told, name, range(len(told)), self.applied)
        # Sets of channels that other axes tell apart are heard by the same weights, one after the other.
        return np.asarray(np.moveaxis(fused, axis, -1).reshape(-1, fused.shape[axis]).mean(axis=0))

    def _heard(self, linear: LinearNode, missed: FloatArray) -> FloatArray:
        """Return what a layer makes of its input's mean, on average over its places; shape (outputs,)."""
        weight = self.state.array(linear.weight)
        matrices = linear.matrices(weight)
        taps = linear.taps_in_sight(self.analysis.shapes.dims[linear.node.inputs[0]], weight)
        rows = (missed[:, None] * taps).reshape(len(matrices), -1)
        return np.asarray((matrices @ rows[:, :, None]).reshape(-1))
