"""What the coupling analysis finds, and what it keeps its hands off: always with a reason that names the node."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxfuse.coupling.constraints import Constraint, Equal, Rule, Site
from onnxfuse.coupling.rules import DEFAULT_RULES
from onnxfuse.coupling.rules.elementwise import unary
from onnxfuse.fusion.maps import ChannelMap
from tests.builders import Net, run_ort
from tests.laws import (
    analysis_of,
    assert_predicted,
    assert_same_outputs,
    assert_same_shapes,
    free_groups,
    fuse,
    group_called,
)


def integers(net: Net, *values: int) -> str:
    """Add a vector of integers."""
    return net.constant(np.array(values, np.int64))


def check_halving(net: Net) -> None:
    """Halve every free group alone, then all together: shapes are as predicted, and the model runs."""
    analysis = analysis_of(net.model())
    halves = {
        g.name: ChannelMap.selection(np.arange(max(1, g.channels // 2)), g.channels) for g in free_groups(analysis)
    }
    want = run_ort(net.model(), net.feeds)
    for maps in (*({name: each} for name, each in halves.items()), halves):
        fused = fuse(analysis, maps)
        assert_predicted(fused, net.feeds)
        assert_same_shapes(want, run_ort(fused.model, net.feeds))


def names_of_free(net: Net) -> set[str]:
    """Return the names of the groups that may change."""
    return {group.name for group in free_groups(analysis_of(net.model()))}


class TestFrozen:
    """What may not change."""

    def test_no_weight_is_kept_in_silence(self) -> None:
        """Weights of nodes that are not understood, or behind one of unknown shape, are listed with that reason."""
        net = Net(17)
        h = net.gemm(net.input(2, 5), 6, name="before")
        net.output(net.gemm(net.node("Einsum", h, net.weight(6, 6, 7), equation="bi,iij->bj", name="odd"), 3))
        analysis = analysis_of(net.model())
        assert "the equation 'bi,iij->bj' repeats a letter" in group_called(analysis, "odd").frozen
        told = {p.operand.name for group in analysis.channels.groups for p in group.parameters}
        assert {name for name, value in net.values.items() if value.size > 1} <= told

    def test_no_layer_behind_an_unknown_shape_is_kept_in_silence(self) -> None:
        """Where a shape is not known, the layers behind it are listed too."""
        net = Net(17)
        net.domains["acme"] = 1
        h = net.gemm(net.input(2, 5), 6, name="before")
        h = net.node("Odd", h, net.weight(6, 7), domain="acme", like=h, name="odd")
        net.output(net.gemm(net.gemm(h, 8, name="behind", bias=False), 3, name="last", bias=False))
        analysis = analysis_of(net.model())
        reasons = {group.name: group.frozen for group in analysis.channels.groups}
        assert reasons.keys() == {"before", "odd", "behind", "last"}
        assert "at 'odd' (acme::Odd), is not known" in reasons["odd"]
        assert "at 'behind' (Gemm), is not known" in reasons["behind"]

    def test_operator_without_a_rule(self) -> None:
        """An operator that has no rule freezes what it reads and what it makes, and is named as the reason."""
        net = Net(17)
        h = net.conv(net.input(1, 2, 4, 4), 4, name="before")
        y = net.node("Bernoulli", net.node("Sigmoid", h), name="odd")
        net.output(net.conv(net.node("Relu", net.conv(y, 5, name="free")), 3))
        analysis = analysis_of(net.model(), feeds=net.feeds)
        assert "'odd' (Bernoulli)" in group_called(analysis, "before").frozen
        assert [group.name for group in free_groups(analysis)] == ["free"]

    def test_left_out_rule(self) -> None:
        """The same for an operator of ONNX's own whose rule is not among those given."""
        net = Net(17)
        h = net.node("Relu", net.conv(net.input(1, 2, 4, 4), 4, name="before"), name="bend")
        net.output(net.conv(h, 3))
        rules = tuple(rule for rule in DEFAULT_RULES if rule.op != "Relu")
        assert group_called(analysis_of(net.model(), rules), "before").frozen == "there is no rule for 'bend' (Relu)"
        assert not group_called(analysis_of(net.model()), "before").frozen

    def test_newest_rule_that_fits(self) -> None:
        """Of several rules for an operator the newest one holds that is not newer than the model."""
        net = Net(17)
        h = net.node("Relu", net.conv(net.input(1, 2, 4, 4), 4, name="before"), name="bend")
        net.output(net.conv(h, 3))

        def refuse(site: Site) -> Iterator[Constraint]:
            what = f"{site.node.op} is not like this"
            raise ValueError(what)

        for since, frozen in ((18, False), (17, True)):
            rules = (Rule("Relu", refuse, since=since), *DEFAULT_RULES)
            assert bool(group_called(analysis_of(net.model(), rules), "before").frozen) is frozen

    def test_rule_that_fails(self) -> None:
        """A rule that does not cover a form says so, and the node is frozen."""
        net = Net(17)
        h = net.node("Relu", net.conv(net.input(1, 2, 4, 4), 4, name="before"), name="bend")
        net.output(net.conv(h, 3))

        def absent(site: Site) -> Iterator[Constraint]:
            yield Equal(site.input(3)[0], site.input(0)[0])

        rules = (*(r for r in DEFAULT_RULES if r.op != "Relu"), Rule("Relu", absent))
        reason = group_called(analysis_of(net.model(), rules), "before").frozen
        assert reason == "the rule does not cover this form of 'bend' (Relu): input 3 is missing"

    def test_rule_that_forgets_an_axis(self) -> None:
        """A rule that says nothing of an axis is not trusted with the others."""
        net = Net(17)
        h = net.node("Relu", net.conv(net.input(1, 2, 4, 4), 4, name="before"), name="bend")
        net.output(net.conv(h, 3))

        def forgetful(site: Site) -> Iterator[Constraint]:
            yield from list(unary(site))[:-1]

        rules = (*(r for r in DEFAULT_RULES if r.op != "Relu"), Rule("Relu", forgetful))
        reason = group_called(analysis_of(net.model(), rules), "before").frozen
        assert reason.startswith("the rule for 'bend' (Relu) does not cover axis 3 of ")

    def test_inputs_and_outputs(self) -> None:
        """What is an input or an output of the graph keeps its size, and is named."""
        net = Net(17)
        x = net.input(1, 4, 4, 4, name="image")
        h = net.conv(x, 4, name="residual")
        y = net.node("Add", x, h)
        net.output(y, net.conv(y, 3, name="last"))
        analysis = analysis_of(net.model())
        assert not free_groups(analysis)
        assert group_called(analysis, "residual").frozen == "graph input 'image'"
        assert group_called(analysis, "last").frozen == f"graph output {net.outputs[1]!r}"

    def test_subgraphs(self) -> None:
        """A value that a subgraph reads from around it keeps its size."""
        net = Net(17)
        h = net.conv(net.input(1, 2, 4, 4), 4, name="before")
        info = helper.make_tensor_value_info("t", TensorProto.FLOAT, [1, 4, 4, 4])
        branch = helper.make_graph([helper.make_node("Neg", [h], ["t"], name="n")], "yes", [], [info])
        info = helper.make_tensor_value_info("e", TensorProto.FLOAT, [1, 4, 4, 4])
        other = helper.make_graph([helper.make_node("Abs", [h], ["e"], name="m")], "no", [], [info])
        flag = net.node("Greater", net.node("ReduceSum", "x0", keepdims=0), net.constant(0.0))
        y = net.node("If", flag, name="choice", like=h, then_branch=branch, else_branch=other)
        net.output(net.conv(net.node("Relu", net.conv(y, 5, name="free")), 3))
        analysis = analysis_of(net.model())
        assert "'choice' (If)" in group_called(analysis, "before").frozen
        assert names_of_free(net) == {"free"}
        check_halving(net)

    def test_products_of_channels(self) -> None:
        """Where channels multiply on one axis, the larger set may change and the other one keeps still."""
        net = Net(17)
        h = net.reshape(net.matmul(net.input(1, 3, 5), 6, name="before"), 1, 3, 2, 3)
        q = net.node("Transpose", h, perm=[0, 2, 1, 3])
        net.output(net.matmul(net.reshape(net.node("Transpose", q, perm=[0, 2, 1, 3]), 1, 3, 6), 2))
        analysis = analysis_of(net.model())
        (free,) = free_groups(analysis)
        assert free.channels == 3
        (kept,) = [g for g in analysis.channels.groups if "times 3 channels" in g.frozen]
        assert kept.channels == 2
        check_halving(net)


class TestSizes:
    """Numbers and sizes in shape computations."""

    def target(self, net: Net, h: str, *, shared: bool) -> None:
        """Reshape two values to targets that share a stated number, of one group or of two."""
        number = integers(net, 16)
        g = h if shared else net.conv("x0", 4, name="other")
        for value in (h, g):
            channels = net.slice(net.node("Shape", value), [0], [2], [0])
            target = net.node("Concat", channels, number, axis=0)
            y = net.node("Reshape", value, target, like=_like(net, 1, 4, 16))
            net.output(net.conv(y, 2, 1))

    @pytest.mark.parametrize("shared", [True, False])
    def test_shared_number(self, *, shared: bool) -> None:
        """A number that two targets share does not get in the way."""
        net = Net(17)
        self.target(net, net.conv(net.input(1, 2, 4, 4), 4, name="before"), shared=shared)
        assert "before" in names_of_free(net)
        check_halving(net)

    def test_size_of_another_axis(self) -> None:
        """A target that takes the size of other channels, equal by chance, holds both."""
        net = Net(17)
        x = net.input(1, 2, 4, 4)
        h, g = net.conv(x, 6, name="first"), net.conv(x, 6, name="second")
        size = net.slice(net.node("Shape", g), [1], [2], [0])
        target = net.node("Concat", integers(net, 1), size, integers(net, 16), axis=0)
        y = net.node("Reshape", h, target, like=_like(net, 1, 6, 16))
        net.output(net.conv(y, 2, 1), net.conv(g, 2))
        check_halving(net)

    def test_bound_from_another_axis(self) -> None:
        """A slice that ends where other channels end, equal by chance, keeps its end when these go."""
        net = Net(17)
        x = net.input(1, 2, 4, 4)
        h, g = net.conv(x, 6, name="first"), net.conv(x, 6, name="second")
        end = net.slice(net.node("Shape", g), [1], [2], [0])
        y = net.node("Slice", h, integers(net, 0), end, integers(net, 1), like=h)
        net.output(net.conv(y, 2), net.conv(g, 2))
        assert "second" in names_of_free(net)
        check_halving(net)

    def test_filled_to_a_size(self) -> None:
        """Constants that are filled to a size that never changes are channels like others."""
        net = Net(17)
        x = net.input(1, 2, 4, 4)
        h, g = net.conv(x, 6, name="first"), net.conv(x, 4, name="second")
        zeros = net.node("ConstantOfShape", net.node("Shape", h), like=h)
        net.output(net.conv(net.node("Concat", g, zeros, axis=1), 2), net.conv(h, 2))
        assert {"first", "second"} <= names_of_free(net)
        check_halving(net)

    def test_repeats_from_a_size(self) -> None:
        """A number of repeats that is read from a width stays when the width shrinks."""
        net = Net(17)
        x = net.input(1, 2, 4, 4)
        h, single = net.conv(x, 6, name="first"), net.conv(x, 1, name="single")
        size = net.slice(net.node("Shape", h), [1], [2], [0])
        repeats = net.node("Concat", integers(net, 1), size, integers(net, 1, 1), axis=0)
        y = net.node("Tile", single, repeats, like=h)
        net.output(net.conv(y, 2), net.conv(h, 2))
        assert "first" in names_of_free(net)
        check_halving(net)

    def test_squeeze_without_axes(self) -> None:
        """A Squeeze that names no axes would drop one that becomes 1, so nothing does."""
        net = Net(17)
        h = net.squeeze(net.node("GlobalAveragePool", net.conv(net.input(2, 3, 4, 4), 4, name="before")), None)
        net.output(net.gemm(h, 2))
        assert "names no axes" in group_called(analysis_of(net.model()), "before").frozen


class TestWeights:
    """Weights behind other nodes, in several places, in two roles."""

    @pytest.mark.parametrize("op", ["Identity", "Cast", "Transpose"])
    def test_square_weight_in_a_residual(self, op: str) -> None:
        """A weight that reads and makes the same channels, behind a node that only moves or casts it."""
        net = Net(17)
        h = net.node("Relu", net.matmul(net.input(3, 5), 6, name="before"))
        forms: dict[str, dict[str, Any]] = {"Identity": {}, "Cast": {"to": 1}, "Transpose": {"perm": [1, 0]}}
        moved = net.node(op, net.weight(6, 6), **forms[op])
        y = net.node("Add", h, net.node("Relu", net.node("MatMul", h, moved, name="inner")))
        net.output(net.gemm(y, 2))
        (group,) = free_groups(analysis_of(net.model()))
        assert group.name == "before"
        assert group.residual
        fused = fuse(analysis_of(net.model()), {"before": ChannelMap.permutation(np.array([3, 1, 5, 0, 2, 4]))})
        assert_same_outputs(run_ort(net.model(), net.feeds), run_ort(fused.model, net.feeds))
        check_halving(net)

    def test_one_weight_in_two_roles(self) -> None:
        """A weight behind a node that makes channels in one place and reads them in another may not be mixed."""
        net = Net(17)
        x = net.input(2, 5)
        tied = net.node("Identity", net.weight(5, 6))
        h = net.node("Relu", net.node("MatMul", x, tied, name="one"))
        h = net.node("Add", h, net.matmul(x, 6, name="two"))
        net.output(net.node("Gemm", h, tied, transB=1))
        (group,) = free_groups(analysis_of(net.model()))
        assert "has another role" in group.unmixable
        fused = fuse(analysis_of(net.model()), {group.name: ChannelMap.permutation(np.array([3, 1, 5, 0, 2, 4]))})
        assert_same_outputs(run_ort(net.model(), net.feeds), run_ort(fused.model, net.feeds))
        check_halving(net)

    def test_one_weight_read_twice(self) -> None:
        """A stored weight that two layers read is one where that can be; what is free for one of them is cut for it."""
        net = Net(17)
        h = net.conv(net.input(1, 4, 4, 4), 4, name="first")
        weight = net.weight(4, 4, 1, 1, name="shared")
        y = net.node("Relu", net.conv(h, 4, 1, weight=weight, name="second"))
        net.output(net.conv(y, 4, 1, weight=weight, name="third"))
        check_halving(net)
        half = ChannelMap.selection(np.array([0, 2]), 4)
        fused = fuse(analysis_of(net.model()), {"first": half})
        shapes = [list(t.dims) for t in fused.model.graph.initializer if "shared" in t.name]
        assert sorted(shapes) == [[2, 2, 1, 1], [4, 2, 1, 1]]

    def test_weight_that_is_an_output(self) -> None:
        """A weight that the graph also returns is returned as it was, whatever becomes of its layer."""
        net = Net(17)
        h = net.conv(net.input(1, 2, 4, 4), 4, name="before")
        net.output(net.conv(h, 3), "before_w")
        check_halving(net)
        fused = fuse(analysis_of(net.model()), {"before": ChannelMap.selection(np.array([0, 2]), 4)})
        np.testing.assert_array_equal(run_ort(fused.model, net.feeds)["before_w"], net.values["before_w"])

    def test_names(self) -> None:
        """A layer that makes several groups gives its name to each of them, with the range of its channels."""
        net = Net(17)
        a, b = net.split(net.conv(net.input(1, 2, 4, 4), 6, name="before"), [2, 4], 2)
        net.output(net.conv(a, 3), net.conv(b, 3))
        assert names_of_free(net) == {"before:0-2", "before:2-6"}

    def test_windows_that_do_not_fit_each_other(self) -> None:
        """Rows in windows of 3, then in pairs: they keep their number, and the channels beside them are free."""
        net = Net(17)
        h = net.matmul(net.input(2, 6, 5), 8, name="before")
        h = net.node("Relu", net.reshape(h, -1, 3, 8))
        h = net.node("Transpose", net.reshape(h, 2, 3, 2, 8), perm=[0, 2, 1, 3])
        net.output(net.matmul(net.reshape(h, 2, 6, 8), 3, name="after"))
        assert names_of_free(net) == {"before"}
        check_halving(net)

    def test_residual(self) -> None:
        """Only what is added to something computed is a residual stream."""
        net = Net(17)
        h = net.node("Add", net.conv(net.input(1, 2, 4, 4), 4, name="stream"), net.vector(4, 1, 1))
        y = net.conv(net.node("Relu", net.conv(h, 5, name="hidden")), 4, name="back")
        net.output(net.conv(net.node("Add", h, y), 3))
        analysis = analysis_of(net.model())
        assert {g.name: g.residual for g in free_groups(analysis)} == {"stream": True, "hidden": False}

    def test_a_sum_of_forms_of_one_value(self) -> None:
        """A GELU written out adds what is made of one value; a shortcut around a layer adds two."""
        net = Net(17)
        h = net.matmul(net.input(2, 5), 6, name="hidden")
        cube = net.node("Mul", net.node("Mul", h, net.node("Mul", h, h)), net.constant(0.045))
        h = net.node("Mul", h, net.node("Tanh", net.node("Add", h, cube)))
        h = net.matmul(h, 4, name="stream")
        net.output(net.matmul(net.node("Add", h, net.matmul(h, 4, name="around")), 3))
        assert {g.name: g.residual for g in free_groups(analysis_of(net.model()))} == {"hidden": False, "stream": True}

    def test_order_of_the_file(self) -> None:
        """A file whose nodes are out of order has the same groups."""
        net = Net(17)
        h = net.node("Relu", net.conv(net.input(1, 2, 4, 4), 4, name="first"))
        net.output(net.conv(net.node("Relu", net.conv(h, 5, name="second")), 3))
        shuffled = net.model()
        nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in reversed(shuffled.graph.node)]
        del shuffled.graph.node[:]
        shuffled.graph.node.extend(nodes)
        found = [(g.name, g.channels, g.frozen) for g in analysis_of(shuffled).channels.groups]
        assert found == [(g.name, g.channels, g.frozen) for g in analysis_of(net.model()).channels.groups]


def _like(net: Net, *dims: int) -> str:
    """Name a type of float32 with these sizes."""
    name = f"like{len(net.types)}"
    net.types[name] = helper.make_tensor_type_proto(TensorProto.FLOAT, dims)
    return name


def test_check_halving_can_fail() -> None:
    """The check notices a size that is stated and not followed."""
    net = Net(17)
    h = net.conv(net.input(1, 2, 4, 4), 4, name="before")
    net.output(net.conv(net.reshape(h, 1, 4, 16), 3, 1))
    analysis = analysis_of(net.model())
    check_halving(net)
    blind = replace(analysis, channels=replace(analysis.channels, sizes=[]))
    fused = fuse(blind, {"before": ChannelMap.selection(np.array([0, 1]), 4)})
    with pytest.raises(Exception, match="cannot be reshaped"):
        assert_predicted(fused, net.feeds)


def test_shuffles_that_tie_single_channels_name_the_node() -> None:
    """Halves that are interleaved and added to what they were leave single channels, and the reason says where."""
    net = Net(17, seed=1)
    x = net.conv(net.input(1, 3, 4, 4), 8, name="first")
    for i in range(3):
        left, right = net.many("Split", [x, net.constant(np.array([4, 4]))], 2, axis=1)
        left = net.conv(left, 4, name=f"inner{i}")
        pair = net.node("Concat", net.reshape(left, 1, 4, 1, 4, 4), net.reshape(right, 1, 4, 1, 4, 4), axis=2)
        x = net.node("Add", net.reshape(pair, 1, 8, 4, 4), x, name=f"sum{i}")
    net.output(net.conv(x, 2, name="last"))
    groups = analysis_of(net.model()).channels.groups
    reasons = {g.frozen for g in groups if g.name.startswith("first")}
    assert reasons
    assert all(re.match(r"'sum\d' \(Add\) reads a concatenation as 2 equal parts", reason) for reason in reasons)


def test_what_comes_behind_parts_that_do_not_fit_is_tied_too() -> None:
    """Two of three equal pieces of a sum can't be made equal; the channels of the third stay as well."""
    net = Net(17, seed=0)
    x, other = net.input(1, 6, 5, 6, name="x0"), net.input(1, 3, 5, 6, name="x1")
    both = net.node("Concat", net.conv(x, 6, group=3), net.conv(other, 6, group=3), axis=1)
    wide = net.conv(net.conv(both, 4, name="narrow"), 12, group=4, name="wide")
    net.output(net.gemm(net.node("Flatten", net.node("Add", wide, both)), 2, name="last"))
    analysis = analysis_of(net.model())
    free = [group.name for group in analysis.channels.groups if not group.frozen]
    maps = {name: ChannelMap.selection(np.array([0]), group_called(analysis, name).channels) for name in free}
    result = fuse(analysis, maps)
    assert_same_shapes(run_ort(net.model(), net.feeds), run_ort(result.model, net.feeds))
