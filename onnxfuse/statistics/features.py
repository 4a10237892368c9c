"""What is known about the channels of one coupling group: the weights that make them and the weights that read them.

A group has C channels. Every layer that *produces* them contributes one row per channel (its filters, batch
normalisation folded in), every layer that *consumes* them likewise (the slice of each of its filters that reads the
channel). Where it was asked for, samples add what the channels do. Importances and ground costs see nothing else, so
they need no knowledge of ONNX.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from onnxfuse.arrays import FloatArray, Floats
from onnxfuse.statistics.damage import Reading

__all__ = ["ActivationFeatures", "ChannelFeatures", "MemberFeatures", "Role"]


class Role(StrEnum):
    """What an axis of a parameter does with the channels of a group."""

    PRODUCER = "producer"
    """Index c of the axis makes channel c (a filter): transformed by the output map A."""
    BIAS = "bias"
    """Index c of the axis is added to channel c: transformed by the output map A like the filter before it."""
    CONSUMER = "consumer"
    """Index c of the axis reads channel c: transformed by the input map, B transposed."""
    CARRIED = "carried"
    """Index c of the axis belongs to channel c (a scale, a slope): carried along as a weighted mean."""
    ENCODING = "encoding"
    """Index c of the axis says how channel c of a quantised weight is stored: computed anew with the weight."""


@dataclass(frozen=True, slots=True)
class MemberFeatures:
    """One parameter's view of the channels of a group.

    Attributes:
        node: Name of the node that owns the parameter.
        role: `Role.PRODUCER` or `Role.CONSUMER`.
        weights: Shape (C, D), float64, of large weights float32: everything in the parameter that belongs to channel
            c, flattened.
        bias: Shape (C, m), float64: the producer's bias for channel c (m = 1 unless a channel is repeated, as after
            a Flatten); None where there is none, and for consumers.
        bn_scale: Shape (C,), float64: batch normalisation's scale (gamma) as the file states it; None where no batch
            normalisation follows the producer.
    """

    node: str
    role: Role
    weights: Floats
    bias: FloatArray | None = None
    bn_scale: FloatArray | None = None

    def part(self, some: slice) -> "MemberFeatures":
        """Return the view of some of the channels."""
        bias, bn_scale = _part(self.bias, some), _part(self.bn_scale, some)
        return MemberFeatures(self.node, self.role, self.weights[some], bias, bn_scale)


@dataclass(frozen=True, slots=True)
class ActivationFeatures:
    """What samples say of the channels of a group: only what was asked for is there.

    Attributes:
        magnitude: Mean of |h| over samples and places, where readers see the channels; shape (C,), float64.
        square: Mean of h^2, likewise.
        sensitivity: Sum of |w dL/dw| over the weights of each channel, for a loss L, averaged over the members.
        independence: By how much the nuclear norm of the channels' map falls without each, averaged over samples.
        readings: What each reader sees of the channels.
    """

    magnitude: FloatArray | None = None
    square: FloatArray | None = None
    sensitivity: FloatArray | None = None
    independence: FloatArray | None = None
    readings: tuple[Reading, ...] = ()

    def part(self, some: slice) -> "ActivationFeatures":
        """Return what samples say of some of the channels."""
        return ActivationFeatures(
            _part(self.magnitude, some),
            _part(self.square, some),
            _part(self.sensitivity, some),
            _part(self.independence, some),
            tuple(reading.part(some) for reading in self.readings),
        )


@dataclass(frozen=True, slots=True)
class ChannelFeatures:
    """Everything that importances and ground costs may see of one coupling group.

    Attributes:
        channels: The number of channels, C >= 1.
        members: The parameters, in graph order; at least one.
        activations: What samples say of the channels; None where nobody asked, or none of their values was seen.
    """

    channels: int
    members: tuple[MemberFeatures, ...]
    activations: ActivationFeatures | None = None

    def sets(self, count: int) -> list["ChannelFeatures"]:
        """Return what may be seen of each of so many sets of channels, which are of one size and stand set by set."""
        if count == 1:
            return [self]
        size = self.channels // count
        return [self._part(slice(start, start + size)) for start in range(0, self.channels, size)]

    def _part(self, some: slice) -> "ChannelFeatures":
        members = tuple(member.part(some) for member in self.members)
        activations = None if self.activations is None else self.activations.part(some)
        return ChannelFeatures(len(members[0].weights), members, activations)

    def vectors(self, *, with_bias: bool = False) -> Floats:
        """Concatenate the members' rows into one feature vector per channel.

        This is the paper's concatenation of a pairing's weights (section 3.2.2); the released code leaves the biases
        out, the text of the paper puts them in.

        Args:
            with_bias: Whether to append the producers' biases.

        Returns:
            Shape (C, D), float64; float32 where that is what all members have.
        """
        parts: list[Floats] = [member.weights for member in self.members]
        if with_bias:
            parts += [member.bias for member in self.members if member.bias is not None]
        return np.asarray(np.concatenate(parts, axis=1))


def _part(vector: FloatArray | None, some: slice) -> FloatArray | None:
    return None if vector is None else vector[some]
