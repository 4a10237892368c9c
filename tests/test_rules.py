"""Every rule on networks of its own, through the same laws: what is free follows, what is frozen says why."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxfuse.coupling.rules import DEFAULT_RULES
from onnxfuse.fusion.maps import ChannelMap
from tests.builders import Arrays, initializers, run_ort
from tests.examples import EXAMPLES as ON_FLOATS
from tests.examples import Example
from tests.laws import (
    analysis_of,
    assert_only_weights_differ,
    assert_predicted,
    assert_same_outputs,
    assert_same_shapes,
    assert_valid,
    free_groups,
    fuse,
    group_called,
    with_copies,
    with_unread,
)
from tests.quantised_examples import QUANTISED

EXAMPLES = (*ON_FLOATS, *QUANTISED)
FREE = [example for example in EXAMPLES if example.free]
EXACT = [example for example in FREE if example.exact]
# Operators that ONNX Runtime keeps under ONNX's domain, where ONNX's checker does not know them.
UNCHECKED = {"Affine", "Crop", "ParametricSoftplus", "ScaledTanh", "SimplifiedLayerNormalization"}
# Operators that ONNX's shape inference, node by node, does not know.
OBSERVED = {
    *UNCHECKED,
    *("Compress", "GroupNormalization", "MeanVarianceNormalization", "NonMaxSuppression", "NonZero", "Range", "Unique"),
}


def observed(example: Example) -> Arrays | None:
    """Return inputs to run an example on where inference can't tell its shapes."""
    return example.net().feeds if example.domain or example.op in OBSERVED else None


def every(examples: list[Example] | tuple[Example, ...]) -> pytest.MarkDecorator:
    """Parametrise over examples."""
    return pytest.mark.parametrize("example", examples, ids=[example.name for example in examples])


def permuted(example: Example, seed: int) -> dict[str, ChannelMap]:
    """Permute every set of channels of every group by chance."""
    rng = np.random.default_rng(seed)
    groups = free_groups(analysis_of(example.net().model(), feeds=observed(example)))
    orders = {g.name: [rng.permutation(g.channels) for _ in range(g.sets)] for g in groups}
    return {name: ChannelMap.side_by_side([*map(ChannelMap.permutation, found)]) for name, found in orders.items()}


def uncovered(examples: tuple[Example, ...]) -> set[tuple[str, str]]:
    """Return domain and name of the operators that have a rule and no example."""
    found = {(e.domain, e.op) for e in examples if _has_node(e)}
    return {(rule.domain, rule.op) for rule in DEFAULT_RULES} - found


def _has_node(example: Example) -> bool:
    return any((node.domain, node.op_type) == (example.domain, example.op) for node in example.net().nodes)


def test_every_rule_has_an_example() -> None:
    """A rule without an example is not tested, so there is none."""
    assert not uncovered(EXAMPLES)


def test_a_missing_example_is_found() -> None:
    """The check above fails if an operator is left out, also where an example only claims to have it."""
    assert uncovered(tuple(e for e in EXAMPLES if e.op != "Conv")) == {("", "Conv")}
    liar = Example("Conv", "none", lambda net: net.output(net.node("Relu", net.input(1, 2))))
    assert uncovered((*(e for e in EXAMPLES if e.op != "Conv"), liar)) == {("", "Conv")}


def test_names_are_unique() -> None:
    """No two examples have one name."""
    assert len({example.name for example in EXAMPLES}) == len(EXAMPLES)


@every(EXAMPLES)
def test_groups(example: Example) -> None:
    """The groups that are free are the ones expected, and every frozen one says why."""
    analysis = analysis_of(example.net().model(), feeds=observed(example))
    assert {group.name for group in free_groups(analysis)} == set(example.free)
    for name, reason in example.frozen.items():
        assert reason in group_called(analysis, name).frozen


@every(FREE)
def test_permutation(example: Example) -> None:
    """A permutation changes nothing."""
    net = example.net()
    fused = fuse(analysis_of(net.model(), feeds=observed(example)), permuted(example, 1))
    assert_same_outputs(run_ort(net.model(), net.feeds), run_ort(fused.model, net.feeds))


@every([e for e in FREE if "before" in e.free])
def test_permutation_matters(example: Example) -> None:
    """The example would notice: permuting the producer of the channels alone changes the outputs."""
    net = example.net()
    analysis = analysis_of(net.model(), feeds=observed(example))
    producer = group_called(analysis, "before").producers[0]
    model = net.model()
    for tensor in model.graph.initializer:
        if tensor.name == producer.operand.name:
            turned = np.roll(numpy_helper.to_array(tensor), 1, axis=producer.axis)
            tensor.CopyFrom(numpy_helper.from_array(turned, tensor.name))
    with pytest.raises(AssertionError):
        assert_same_outputs(run_ort(net.model(), net.feeds), run_ort(model, net.feeds))


@every(FREE)
def test_fewer_channels(example: Example) -> None:
    """With half of the channels gone, and with one left of each group, the model is what was predicted."""
    net = example.net()
    analysis = analysis_of(net.model(), feeds=observed(example))
    want = run_ort(net.model(), net.feeds)
    for most in (100, 1):
        maps = {}
        for group in free_groups(analysis):
            units = min(most, max(group.channels // 2 // group.multiple, 1))
            kept = np.arange(min(units * group.multiple, group.channels))
            maps[group.name] = ChannelMap.selection(kept, group.channels)
        fused = fuse(analysis, maps)
        assert_predicted(fused, net.feeds)
        assert_same_shapes(want, run_ort(fused.model, net.feeds))
        assert_only_weights_differ(net.model(), fused.model)
        if example.op not in UNCHECKED:
            assert_valid(fused.model)


@every(EXACT)
def test_copies(example: Example) -> None:
    """Copies merge without error."""
    net = example.net()
    for group in free_groups(analysis_of(net.model(), feeds=observed(example))):
        if group.unmixable or group.statistic:
            continue
        analysis = analysis_of(net.model(), feeds=observed(example))
        kinds = (group.channels + 1) // 2
        # Copies are at different places in different sets.
        labels = np.concatenate(
            [np.roll(np.arange(group.channels) % kinds, number) + kinds * number for number in range(group.sets)]
        )
        doubled = with_copies(analysis, group_called(analysis, group.name), labels)
        assert doubled is not None
        merged = fuse(
            analysis_of(doubled, feeds=observed(example)), {group.name: ChannelMap.clusters(labels, labels.max() + 1)}
        )
        assert_same_outputs(run_ort(doubled, net.feeds), run_ort(merged.model, net.feeds))


@every(EXACT)
def test_unread_channels(example: Example) -> None:
    """Channels that nobody weighs are dropped without a change."""
    net = example.net()
    for group in free_groups(analysis_of(net.model(), feeds=observed(example))):
        if group.unmixable or group.statistic:
            continue
        analysis = analysis_of(net.model(), feeds=observed(example))
        evens, channels = np.arange(0, group.channels, 2), group.channels
        kept = ChannelMap.side_by_side(
            [ChannelMap.selection(np.sort((evens + number) % channels), channels) for number in range(group.sets)]
        )
        unread = np.setdiff1d(np.arange(kept.channels), kept.anchors)
        model = with_unread(analysis, group_called(analysis, group.name), unread)
        assert model is not None
        pruned = fuse(analysis_of(model, feeds=observed(example)), {group.name: kept})
        assert_same_outputs(run_ort(model, net.feeds), run_ort(pruned.model, net.feeds))


def test_examples_hold_no_constant_nodes() -> None:
    """The check that permuting matters finds weights among the initializers, so they have to be there."""
    for example in EXAMPLES:
        model: onnx.ModelProto = example.net().model()
        assert initializers(model).keys() == {t.name for t in model.graph.initializer}
