r"""Channel maps: what any way of shrinking a group comes down to.

A group of C channels that keeps K is given by two matrices. Producers become :math:`W' = A W`, :math:`b' = A
b` with the output map A (K, C); consumers become :math:`V' = B^T V` with the input map B (C, K), so that C
channels are rebuilt from K as :math:`B h'`. Dropping channels, folding clusters, permuting and Intra-Fusion
differ only in A and B.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from onnxfuse.arrays import FloatArray, IntArray, block_diagonal, strips
from onnxfuse.errors import InvariantError

__all__ = ["ChannelMap", "OutputNorm"]

OutputNorm: TypeAlias = Literal["sum", "mean"]


@dataclass(frozen=True, slots=True, eq=False)
class ChannelMap:
    """How C channels become K.

    Attributes:
        output: A, shape (K, C), float64, finite: fused producer = A times producer.
        input: B, shape (C, K), float64, finite: fused consumer = B transposed times consumer.
        anchors: Shape (K,), int64, in [0, C): the source channel that each fused channel stands for most.

    Raises:
        InvariantError: A shape, a value or an anchor is not as above, or K is not from 1 to C.
    """

    output: FloatArray
    input: FloatArray
    anchors: IntArray

    def __post_init__(self) -> None:
        """Check shapes and values."""
        if self.output.ndim != 2 or not 1 <= self.output.shape[0] <= self.output.shape[1]:
            _refuse(f"an output map has shape (K, C) with K from 1 to C, not {self.output.shape}")
        if self.input.shape != self.output.shape[::-1]:
            _refuse(f"an output map of shape {self.output.shape} has no input map of shape {self.input.shape}")
        if not all(np.isfinite(x[rows]).all() for x in (self.output, self.input) for rows in strips(len(x))):
            _refuse("a channel map has values that are not finite")
        if self.anchors.shape != (self.kept,):
            _refuse(f"{self.kept} fused channels have anchors of shape {self.anchors.shape}")
        if self.anchors.min() < 0 or self.anchors.max() >= self.channels:
            _refuse(f"anchors are out of the range of {self.channels} channels")

    @classmethod
    def identity(cls, channels: int) -> "ChannelMap":
        """Return the map that changes nothing.

        Example:
            >>> ChannelMap.identity(3).is_identity
            True
        """
        return cls.selection(np.arange(channels), channels)

    @classmethod
    def selection(cls, kept: IntArray, channels: int) -> "ChannelMap":
        """Return the map that keeps some channels as they are, in the order given, and drops the others.

        Args:
            kept: Different channels, shape (K,), int64, in [0, C).
            channels: C.

        Raises:
            InvariantError: Channels are repeated or out of range.

        Example:
            >>> ChannelMap.selection(np.array([2, 0]), 3).output.tolist()
            [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
        """
        if len(np.unique(kept)) != len(kept) or np.any(kept < 0) or np.any(kept >= channels):
            _refuse(f"channels to keep are to be different and in the range of {channels} channels")
        # Zeros that nobody writes to take no memory.
        output, back = np.zeros((len(kept), channels)), np.zeros((channels, len(kept)))
        output[np.arange(len(kept)), kept] = 1.0
        back[kept, np.arange(len(kept))] = 1.0
        return cls(output, back, kept.astype(np.int64))

    @classmethod
    def permutation(cls, order: IntArray) -> "ChannelMap":
        """Return the map that makes channel ``order[k]`` the k-th.

        Args:
            order: A permutation of 0 to C - 1, shape (C,), int64.

        Raises:
            InvariantError: ``order`` is not a permutation.
        """
        return cls.selection(order, len(order))

    @classmethod
    def clusters(cls, labels: IntArray, kept: int, anchors: IntArray | None = None) -> "ChannelMap":
        """Return the map that makes clusters into channels: the producers' mean, the consumers' sum.

        Channels that are exact copies of each other merge without error (up to the rounding of a mean).

        Args:
            labels: The cluster of each channel, shape (C,), int64, in [0, K).
            kept: The number of clusters, K; none may be empty.
            anchors: A member of each cluster, shape (K,), int64; by default the first.

        Raises:
            InvariantError: A cluster is empty, a label is out of range, or an anchor is not in its cluster.

        Example:
            >>> two = ChannelMap.clusters(np.array([0, 0, 1]), 2)
            >>> two.output.tolist(), two.input.tolist()
            ([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        """
        present, first = np.unique(labels, return_index=True)
        if not np.array_equal(present, np.arange(kept)):
            _refuse(f"labels are to be all of 0 to {kept - 1}, but are {present.tolist()}")
        anchors = first.astype(np.int64) if anchors is None else anchors
        membership = np.zeros((len(labels), kept))
        membership[np.arange(len(labels)), labels] = 1.0
        clusters = cls((membership / membership.sum(axis=0)).T.copy(), membership, anchors)
        if not np.array_equal(labels[anchors], np.arange(kept)):
            _refuse("an anchor is not a member of its cluster")
        return clusters

    @classmethod
    def from_plan(cls, plan: FloatArray, anchors: IntArray, *, output_norm: OutputNorm = "sum") -> "ChannelMap":
        r"""Turn a transport plan into a map, as Intra-Fusion does.

        With ``"sum"``, as in the released code, :math:`A = P^T \mathrm{diag}(P 1)^{-1}` and :math:`B = A^T`:
        every source channel is given away in whole, so a fused channel is a *sum* that is C / K times too
        large on average where masses are uniform (the text of the paper, section 3.2.4, asks for coefficients
        that sum to 1, but for those of a fused channel). Exact copies then merge to their sum on both sides.
        With ``"mean"``, rows of A are divided by their sums, so that fused producers are means, and B stays;
        exact copies then merge without error. Neither is better for all networks.

        A source channel without mass gives nothing to any fused channel: its column of A and its row of B are
        0. A target without mass becomes a channel of zeros.

        Args:
            plan: Shape (C, K), float64, ``>= 0``, finite: the mass that goes from channel c to target k.
            anchors: The channel that each target stands for most, shape (K,), int64.
            output_norm: What the coefficients of a fused producer are: see above.

        Returns:
            The map; A's columns (``"sum"``) or rows (``"mean"``), and B's rows, sum to 1 where there is mass.

        Raises:
            InvariantError: The plan is not a matrix, or has values that are negative or not finite.

        Example:
            >>> plan = np.array([[0.25, 0.0], [0.25, 0.0], [0.0, 0.5]])
            >>> ChannelMap.from_plan(plan, np.array([0, 2])).output.tolist()
            [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
            >>> ChannelMap.from_plan(plan, np.array([0, 2]), output_norm="mean").output.tolist()
            [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
        """
        if plan.ndim != 2 or not np.isfinite(plan).all() or np.any(plan < 0):
            _refuse("a transport plan is a matrix of finite masses that are at least 0")
        given = _rows_to_one(plan)
        output = _rows_to_one(given.T) if output_norm == "mean" else given.T.copy()
        return cls(output, given, anchors.astype(np.int64))

    @classmethod
    def side_by_side(cls, maps: Sequence["ChannelMap"]) -> "ChannelMap":
        """Return the map that acts on sets of channels, one after the other, with a map for each.

        Args:
            maps: At least one.

        Example:
            >>> maps = [ChannelMap.permutation(np.array([1, 0])), ChannelMap.selection(np.array([1]), 2)]
            >>> ChannelMap.side_by_side(maps).output.tolist()
            [[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
        """
        if len(maps) == 1:
            return maps[0]
        starts = np.cumsum([0, *(m.channels for m in maps)])
        anchors = np.concatenate([m.anchors + start for m, start in zip(maps, starts, strict=False)])
        return cls(block_diagonal([m.output for m in maps]), block_diagonal([m.input for m in maps]), anchors)

    @property
    def channels(self) -> int:
        """C, the number of channels before."""
        return len(self.input)

    @property
    def kept(self) -> int:
        """K, the number of channels after."""
        return len(self.output)

    @property
    def carried(self) -> FloatArray:
        """Weights of the mean that a parameter per channel (a scale, a slope) is carried along by.

        Shape (K, C), float64, ``>= 0``: magnitudes of A with every row divided by its sum; a row of zeros
        becomes 1 at the anchor. So a constant parameter stays what it is.
        """
        carried = _rows_to_one(np.abs(self.output))
        empty = ~self.output.any(axis=1)
        carried[empty, self.anchors[empty]] = 1.0
        return carried

    @property
    def is_selection(self) -> bool:
        """Whether every fused channel is one of the channels, unchanged, so that weights can be copied."""
        fused = np.arange(self.kept)
        ones = (self.output[fused, self.anchors] == 1.0) & (self.input[self.anchors, fused] == 1.0)
        return bool(ones.all()) and np.count_nonzero(self.output) == np.count_nonzero(self.input) == self.kept

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes at all."""
        return self.is_selection and np.array_equal(self.anchors, np.arange(self.channels))


def _rows_to_one(x: FloatArray) -> FloatArray:
    """Divide rows of numbers ``>= 0`` by their sums; rows of zeros stay zero."""
    sums = x.sum(axis=1, keepdims=True)
    return x / np.where(sums > 0, sums, 1.0)


def _refuse(what: str) -> None:
    raise InvariantError(what, where="channel map")
