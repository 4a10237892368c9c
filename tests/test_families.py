"""Every family of networks at half of all channels: it runs, it is proven, enough goes, and copies merge exactly."""

from functools import cache

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnxfuse
from onnxfuse.coupling.groups import positions
from tests.builders import initializers, run_ort
from tests.families import FAMILIES
from tests.laws import analysis_of, assert_only_weights_differ, assert_same_outputs, assert_same_shapes, free_groups

every = pytest.mark.parametrize("name", FAMILIES)
RATIO = 0.5
# Floats that are no weights, such as masks, do not halve with the widths.
ROUNDING = 0.0005
# Peers were measured on wider networks, in which the input and the classes, which stay, are a smaller share.
ENDS = 0.008


@cache
def model_of(name: str, divisor: int = 1) -> onnx.ModelProto:
    """Return a family's network; whoever changes it makes a copy."""
    return FAMILIES[name].net(divisor).model()


def parameters(model: onnx.ModelProto) -> int:
    """Count the numbers that a network has learned: all floats but statistics of normalisations."""
    statistics = {i for n in model.graph.node if n.op_type == "BatchNormalization" for i in n.input[3:]}
    return sum(v.size for name, v in initializers(model).items() if v.dtype.kind == "f" and name not in statistics)


def removed(report: onnxfuse.CompressionReport) -> float:
    """Return the share of the parameters that went."""
    return 1.0 - report.after.parameters / report.before.parameters


def widths_of(result: onnxfuse.Compressed) -> dict[str, int]:
    """Return how many channels every group keeps."""
    return {group.name: group.channels_after for group in result.report.groups}


@every
def test_half_of_the_channels(name: str) -> None:
    """No group fails its proof, as much goes as half of every width is, the result runs and has the same interface."""
    family, model = FAMILIES[name], model_of(name)
    result = onnxfuse.compress(model, ratio=RATIO, method="prune", provider="cpu")
    assert not [note for note in result.report.notes if "proof" in note or "proven" in note]
    halved = 1.0 - parameters(model_of(name, 2)) / parameters(model)
    assert removed(result.report) >= halved - ROUNDING
    assert removed(result.report) >= family.peer - ENDS
    assert_only_weights_differ(model, result.model)
    feeds = family.net().feeds
    got = run_ort(result.model, feeds, optimise=True)
    assert_same_shapes(run_ort(model, feeds), got)
    assert all(np.isfinite(value).all() for value in got.values())


@every
def test_fused(name: str) -> None:
    """Intra-Fusion takes just as much, and the result runs."""
    model, feeds = model_of(name), FAMILIES[name].net().feeds
    dropped = onnxfuse.plan(model, ratio=RATIO, method="prune", prove=False)
    result = onnxfuse.compress(model, ratio=RATIO, method="intra-fusion", provider="cpu", prove=False)
    assert widths_of(result) == {n: g.keep for n, g in dropped.groups.items()}
    got = run_ort(result.model, feeds, optimise=True)
    assert_same_shapes(run_ort(model, feeds), got)
    assert all(np.isfinite(value).all() for value in got.values())


def with_pairs(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Make every second channel of every group that may be mixed a copy of the one before it.

    What reads the channels reads both alike: a network of half the width, each channel written down twice, with the
    weights that read it split evenly.

    Returns:
        The network, and how many channels each group keeps once copies are merged; all where they may not be mixed.
    """
    analysis = analysis_of(model)
    values = {name: value.copy() for name, value in initializers(model).items()}
    kept = {}
    for group in free_groups(analysis):
        kept[group.name] = group.channels if group.unmixable else (group.channels + 1) // 2
        for parameter in () if group.unmixable else group.parameters:
            layout = analysis.channels.layouts[parameter.operand][parameter.axis]
            where = positions(layout, group.atom, {})
            rows = np.moveaxis(values[parameter.operand.name], parameter.axis, 0)
            rows[where.ravel()] = rows[where[np.arange(group.channels) // 2 * 2].ravel()]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    return copy, kept


def merged(model: onnx.ModelProto, kept: dict[str, int]) -> onnxfuse.Compressed:
    """Fold clusters of equal channels."""
    keep = tuple(f"{name}={width}" for name, width in kept.items())
    return onnxfuse.compress(model, ratio=0.0, keep=keep, method="fold", provider="cpu", prove=False)


@every
def test_copies_merge(name: str) -> None:
    """Copies of every channel, of all groups at once, merge without a change of the outputs."""
    pairs, kept = with_pairs(model_of(name))
    result = merged(pairs, kept)
    widths = widths_of(result)
    assert {name: widths[name] for name in kept} == kept
    assert any(group.channels_after < group.channels_before for group in result.report.groups)
    feeds = FAMILIES[name].net().feeds
    assert_same_outputs(run_ort(pairs, feeds), run_ort(result.model, feeds))


def test_what_is_no_copy_does_not_merge() -> None:
    """The law fails where channels differ."""
    name = "resnet20"
    _, kept = with_pairs(model_of(name))
    feeds = FAMILIES[name].net().feeds
    with pytest.raises(AssertionError):
        assert_same_outputs(run_ort(model_of(name), feeds), run_ort(merged(model_of(name), kept).model, feeds))


def test_untrained_normalisations_are_shared() -> None:
    """The family that is about shared initializers has some, with groups of their own behind them."""
    nodes = model_of("untrained").graph.node
    norms = [tuple(n.input[1:]) for n in nodes if n.op_type == "BatchNormalization"]
    assert len(set(norms)) < len(norms)
