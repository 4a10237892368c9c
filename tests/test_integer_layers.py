"""Networks on integers: what is dropped leaves every number as it was, what is merged is exact where integers allow."""

from collections.abc import Mapping

import numpy as np
import onnx
import pytest

from onnxfuse.analysis import Analysis
from onnxfuse.arrays import FloatArray, IntArray
from onnxfuse.coupling.constraints import Encoded
from onnxfuse.coupling.groups import CouplingGroup, ParameterAxis, positions
from onnxfuse.coupling.layout import leaves
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.fusion.quantised import integer_range
from onnxfuse.statistics.features import Role
from tests.builders import AnyArray, initializers, run_ort
from tests.examples import Example
from tests.laws import analysis_of, assert_same_outputs, free_groups, fuse, group_called
from tests.quantised_examples import QUANTISED

FREE = [example for example in QUANTISED if example.free]
# A unit of a recurrent layer is made and read by one weight at once, whose integers can't be chosen to suit both.
MERGED = [example for example in FREE if not example.exact and example.op != "DynamicQuantizeLSTM"]


def every(examples: list[Example]) -> pytest.MarkDecorator:
    """Parametrise over examples."""
    return pytest.mark.parametrize("example", examples, ids=[example.name for example in examples])


def analysis_on(example: Example, model: onnx.ModelProto | None = None) -> Analysis:
    """Analyse an example, or a model like it, by what it computes."""
    net = example.net()
    return analysis_of(net.model() if model is None else model, feeds=net.feeds)


# Dropping -------------------------------------------------------------------------------------------------------------


@every(FREE)
def test_dropping_keeps_every_number(example: Example) -> None:
    """Where channels are only dropped, weights, scales, zero points and biases are what they were, bit by bit."""
    analysis = analysis_on(example)
    kept = {g.name: np.arange(g.channels - 1, -1, -2)[::-1].astype(np.int64) for g in free_groups(analysis)}
    groups = {g.atom: g for g in free_groups(analysis)}
    fused = fuse(analysis, {n: ChannelMap.selection(k, group_called(analysis, n).channels) for n, k in kept.items()})
    before, after = initializers(analysis.source.model), initializers(fused.model)
    assert before.keys() == after.keys()
    checked = 0
    for operand, layouts in analysis.channels.layouts.items():
        if not operand.is_constant or operand.name not in before:
            continue
        expected = before[operand.name]
        for axis, layout in enumerate(layouts):
            gone = [np.empty(0, np.int64)]
            for atom in dict.fromkeys(leaves(layout)):
                if atom in groups:
                    where = positions(layout, atom, {})
                    gone.append(np.delete(where, kept[groups[atom].name], axis=0).ravel())
            expected = np.delete(expected, np.unique(np.concatenate(gone)), axis=axis)
        got = after[operand.name]
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape), operand.name
        assert got.tobytes() == expected.tobytes(), operand.name
        checked += got.shape != before[operand.name].shape
    assert checked


def zero_points(encoded: Encoded | None, values: Mapping[str, AnyArray], shape: tuple[int, ...]) -> AnyArray:
    """Return what stands for zero in every element of a weight, worked out from the file's numbers alone."""
    if encoded is None or encoded.zero is None:
        return np.zeros(shape)
    zero = values[encoded.zero.name].astype(np.float64)
    if zero.size == 1:
        return np.full(shape, zero.ravel()[0])
    if encoded.block > 1:
        index = [np.arange(n) // (encoded.block if i == encoded.along else 1) for i, n in enumerate(shape)]
        found: AnyArray = zero[np.ix_(*index)]
        return found
    return np.broadcast_to(zero.reshape([n if i in encoded.axes else 1 for i, n in enumerate(shape)]), shape)


def rows_of(analysis: Analysis, group: CouplingGroup, parameter: ParameterAxis) -> IntArray:
    """Return where the channels of a group are on an axis of a weight, shape (C, m)."""
    return positions(analysis.channels.layouts[parameter.operand][parameter.axis], group.atom, {})


def silenced(analysis: Analysis, group: CouplingGroup, dropped: IntArray) -> onnx.ModelProto:
    """Make what reads some channels weigh them by zero: integers their zero point, packed ones a scale of zero."""
    values = {name: array.copy() for name, array in initializers(analysis.source.model).items()}
    told = analysis.channels.encodings
    read = {p.operand for p in group.parameters if p.role is Role.CONSUMER}
    scales_read = {told[o].scale for o in read if o in told and told[o].bits}
    for parameter in group.parameters:
        where = rows_of(analysis, group, parameter)[dropped].ravel()
        encoded, array = told.get(parameter.operand), values[parameter.operand.name]
        if parameter.operand in scales_read:
            np.moveaxis(array, parameter.axis, 0)[where] = 0
        elif parameter.role is Role.CONSUMER and (encoded is None or not encoded.bits):
            zero = np.moveaxis(zero_points(encoded, values, array.shape), parameter.axis, 0)
            np.moveaxis(array, parameter.axis, 0)[where] = zero[where]
    return with_values(analysis.source.model, values)


def with_values(model: onnx.ModelProto, values: Mapping[str, AnyArray]) -> onnx.ModelProto:
    """Return a model with other constants."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(values[tensor.name], tensor.name))
    return copy


@every([example for example in FREE if example.op != "QAttention"])
def test_what_nobody_weighs_can_go(example: Example) -> None:
    """Channels that are weighed by zero are dropped without a change; attention weighs them by each other."""
    for group in free_groups(analysis_on(example)):
        analysis = analysis_on(example)
        if group.statistic or not any(p.role is Role.CONSUMER for p in group.parameters):
            continue
        kept = np.arange(0, group.channels, 2)
        dropped = np.setdiff1d(np.arange(group.channels), kept)
        model = silenced(analysis, group_called(analysis, group.name), dropped)
        want = run_ort(model, example.net().feeds)
        pruned = fuse(analysis_on(example, model), {group.name: ChannelMap.selection(kept, group.channels)})
        assert_same_outputs(want, run_ort(pruned.model, example.net().feeds))


# Merging --------------------------------------------------------------------------------------------------------------


def mergeable(analysis: Analysis, group: CouplingGroup, labels: IntArray) -> onnx.ModelProto:
    """Make channels with equal labels copies of each other, and integers such that their sums are integers again.

    The largest integer is kept by a mean and by a sum, so that no scale has to change: what makes the channels holds
    the largest integer or the zero point, and of what reads them the members of a cluster share the largest integer.
    """
    values = {name: array.copy() for name, array in initializers(analysis.source.model).items()}
    rng = np.random.default_rng(3)
    first = np.array([np.flatnonzero(labels == label)[0] for label in labels])
    for parameter in group.parameters:
        where = rows_of(analysis, group, parameter)
        rows = np.moveaxis(values[parameter.operand.name], parameter.axis, 0)
        if parameter.role is not Role.CONSUMER:
            rows[where.ravel()] = rows[where[first].ravel()]
    for parameter in group.parameters:
        encoded = analysis.channels.encodings.get(parameter.operand)
        if encoded is None:
            continue
        where = rows_of(analysis, group, parameter)
        array = values[parameter.operand.name]
        zero = np.moveaxis(zero_points(encoded, values, array.shape), parameter.axis, 0)
        share = integer_range(array.dtype)[1] - zero
        if parameter.role is Role.CONSUMER:
            share[where.ravel()] = shared(share[where], labels).reshape(where.size, *share.shape[1:])
        pattern = rng.choice([0.0, 1.0, 1.0], share.shape)
        pattern[where.ravel()] = pattern[where[first].ravel()]
        np.moveaxis(array, parameter.axis, 0)[...] = (zero + share * pattern).astype(array.dtype)
    return with_values(analysis.source.model, values)


def shared(whole: FloatArray, labels: IntArray) -> FloatArray:
    """Return integers of which the members of a cluster have as many as there were; ``whole`` has shape (C, ...)."""
    sizes = np.bincount(labels)[labels].reshape(-1, *[1] * (whole.ndim - 1))
    is_first = np.array([label not in labels[:i] for i, label in enumerate(labels)]).reshape(sizes.shape)
    part = np.floor(whole / sizes)
    return np.where(is_first, whole - part * (sizes - 1), part)


@every(MERGED)
def test_copies_merge_exactly(example: Example) -> None:
    """Copies merge without error where sums and means of their integers are integers."""
    for group in free_groups(analysis_on(example)):
        analysis = analysis_on(example)
        if group.unmixable:
            continue
        labels = np.arange(group.channels) % ((group.channels + 1) // 2)
        model = mergeable(analysis, group_called(analysis, group.name), labels)
        want = run_ort(model, example.net().feeds)
        assert all(np.ptp(y) > 0 for y in want.values())
        merged = fuse(analysis_on(example, model), {group.name: ChannelMap.clusters(labels, labels.max() + 1)})
        assert_same_outputs(want, run_ort(merged.model, example.net().feeds))
        wrong = fuse(analysis_on(example, model), {group.name: ChannelMap.clusters(np.sort(labels), labels.max() + 1)})
        with pytest.raises(AssertionError):
            assert_same_outputs(want, run_ort(wrong.model, example.net().feeds))
