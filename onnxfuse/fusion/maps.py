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

from onnxfuse.arrays import FloatArray, IntArray, block_diagonal
from onnxfuse.errors import InvariantError
from onnxfuse.matrices import (
    Matrix,
    added,
    as_dense,
    count_entries,
    entries_at,
    from_entries,
    has_finite_entries,
    magnitudes,
    rows_to_one,
    transposed,
)

__all__ = ["ChannelMap", "OutputNorm"]

OutputNorm: TypeAlias = Literal["sum", "mean"]


@dataclass(frozen=True, slots=True, eq=False)
class ChannelMap:
    """How C channels become K.

    Attributes:
        making: A, shape (K, C), float64, finite, dense or sparse: fused producer = A times producer.
        reading: B, shape (C, K), float64, finite, dense or sparse: fused consumer = B transposed times consumer.
        anchors: Shape (K,), int64, in [0, C): the source channel that each fused channel stands for most.

    Raises:
        InvariantError: A shape, a value or an anchor is not as above, or K is not from 1 to C.
    """

    making: Matrix
    reading: Matrix
    anchors: IntArray

    def __post_init__(self) -> None:
        """Check shapes and values."""
        made, read = tuple(self.making.shape), tuple(self.reading.shape)
        if len(made) != 2 or not 1 <= made[0] <= made[1]:
            _refuse(f"an output map has shape (K, C) with K from 1 to C, not {made}")
        if read != made[::-1]:
            _refuse(f"an output map of shape {made} has no input map of shape {read}")
        if not (has_finite_entries(self.making) and has_finite_entries(self.reading)):
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
        making = from_entries(np.ones(len(kept)), np.arange(len(kept)), kept, (len(kept), channels))
        return cls(making, transposed(making), kept.astype(np.int64))

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
    def scaling(cls, factors: FloatArray) -> "ChannelMap":
        """Return the map that multiplies what makes each channel by a factor, and divides what reads it by that.

        Args:
            factors: Shape (C,), float64, none of them 0.

        Example:
            >>> ChannelMap.scaling(np.array([2.0, 1.0])).input.tolist()
            [[0.5, 0.0], [0.0, 1.0]]
        """
        where, shape = np.arange(len(factors)), (len(factors), len(factors))
        return cls(from_entries(factors, where, where, shape), from_entries(1 / factors, where, where, shape), where)

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
        membership = from_entries(np.ones(len(labels)), np.arange(len(labels)), labels, (len(labels), kept))
        clusters = cls(rows_to_one(transposed(membership)), membership, anchors)
        if not np.array_equal(labels[anchors], np.arange(kept)):
            _refuse("an anchor is not a member of its cluster")
        return clusters

    @classmethod
    def from_plan(cls, plan: Matrix, anchors: IntArray, *, output_norm: OutputNorm = "sum") -> "ChannelMap":
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
        if len(plan.shape) != 2 or not has_finite_entries(plan) or plan.min() < 0:
            _refuse("a transport plan is a matrix of finite masses that are at least 0")
        given = rows_to_one(plan)
        making = rows_to_one(transposed(given)) if output_norm == "mean" else transposed(given).copy()
        return cls(making, given, anchors.astype(np.int64))

    @property
    def output(self) -> FloatArray:
        """A as a plain array, shape (K, C)."""
        return as_dense(self.making)

    @property
    def input(self) -> FloatArray:
        """B as a plain array, shape (C, K)."""
        return as_dense(self.reading)

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

    def of_anchors(self) -> "ChannelMap":
        """Return the map that keeps the anchors as they are, and reads them for what they stand for.

        Example:
            >>> two = ChannelMap.clusters(np.array([0, 0, 1]), 2).of_anchors()
            >>> two.output.tolist(), two.input.tolist()
            ([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        """
        return ChannelMap(ChannelMap.selection(self.anchors, self.channels).making, self.reading, self.anchors)

    @property
    def channels(self) -> int:
        """C, the number of channels before."""
        return int(self.reading.shape[0])

    @property
    def kept(self) -> int:
        """K, the number of channels after."""
        return int(self.making.shape[0])

    @property
    def carried(self) -> Matrix:
        """Weights of the mean that a parameter per channel (a scale, a slope) is carried along by.

        Shape (K, C), float64, ``>= 0``, dense or sparse: magnitudes of A with every row divided by its sum; a row of
        zeros becomes 1 at the anchor. So a constant parameter stays what it is.
        """
        carried = rows_to_one(magnitudes(self.making))
        empty = np.flatnonzero(np.asarray(carried.sum(axis=1)) == 0)
        ones = from_entries(np.ones(len(empty)), empty, self.anchors[empty], (self.kept, self.channels))
        return added(carried, ones)

    @property
    def selects(self) -> bool:
        """Whether every fused channel is one of the channels, unchanged, however they are read."""
        made = entries_at(self.making, np.arange(self.kept), self.anchors)
        return bool((made == 1.0).all()) and count_entries(self.making) == self.kept

    @property
    def is_selection(self) -> bool:
        """Whether the map only selects, and readers do without the others, so that weights can be copied."""
        read = entries_at(self.reading, self.anchors, np.arange(self.kept))
        return self.selects and bool((read == 1.0).all()) and count_entries(self.reading) == self.kept

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes at all."""
        return self.is_selection and np.array_equal(self.anchors, np.arange(self.channels))


def _refuse(what: str) -> None:
    raise InvariantError(what, where="channel map")
