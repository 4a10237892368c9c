"""An If that is decided in the file gives way to its branch, with the same outputs; any other stays."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxfuse
from onnxfuse.graph.branches import without_decided_ifs
from tests.builders import run_ort, run_reference
from tests.laws import assert_same_outputs, assert_valid
from tests.test_bodies import WIDTH, body, info, mlp, mlp_weights, model_of

FEEDS = {"x": np.random.default_rng(4).standard_normal((3, WIDTH)).astype(np.float32)}


def choice(condition: str, output: str, branches: list[onnx.GraphProto], name: str) -> onnx.NodeProto:
    """Make an If."""
    given: dict[str, Any] = dict(zip(("then_branch", "else_branch"), branches, strict=True))
    return helper.make_node("If", [condition], [output], name=name, **given)


def copied(x: str, y: str) -> onnx.NodeProto:
    """Make a node that passes a value on; ONNX Runtime wants one before the end of a branch."""
    return helper.make_node("Identity", [x], [y])


def stored(condition: str, *, holds: bool) -> onnx.TensorProto:
    """Make a condition."""
    return numpy_helper.from_array(np.array(holds), condition)


def decided(*, holds: bool, style: str = "initializer") -> onnx.ModelProto:
    """A layer, then one of two networks: twice, with the same names inside both times, and a layer behind."""
    outside = {"w": mlp_weights("w", 5)["w_1"], **mlp_weights("v", 6)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z0"], name="first")]
    for i in range(2):
        back = [helper.make_node("MatMul", ["a", "back"], ["b"], name=f"back{i}")]
        weights = {**mlp_weights("left", i, width=6), "back": np.eye(6, dtype=np.float32)}
        yes = body("yes", [*mlp("left", f"z{i}", "a"), *back], "b", weights)
        no = body("no", [helper.make_node("Tanh", [f"z{i}"], ["a"])], "a")
        nodes.append(choice("flag", f"z{i + 1}", [yes, no], f"choose{i}"))
    nodes.append(helper.make_node("MatMul", ["z2", "v_2"], ["y"], name="last"))
    model = model_of(nodes, [info("x", "n", WIDTH)], [info("y", "n", WIDTH)], outside)
    flag = stored("flag", holds=holds)
    if style == "node":
        model.graph.node.insert(0, helper.make_node("Constant", [], ["flag"], value=flag))
    else:
        model.graph.initializer.append(flag)
    if style == "input":
        model.graph.input.append(info("flag", kind=TensorProto.BOOL))
    return model


def kinds(model: onnx.ModelProto) -> set[str]:
    """Return the operators at the top."""
    return {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("style", ["initializer", "node"])
@pytest.mark.parametrize("branch", ["then", "else"])
def test_the_branch_stands_for_it(branch: str, style: str) -> None:
    """Either branch, with the condition stored either way: no If is left, and nothing changes."""
    model = decided(holds=branch == "then", style=style)
    before = model.SerializeToString()
    result = without_decided_ifs(model)
    assert "If" not in kinds(result)
    assert ("Tanh" in kinds(result)) == (branch == "else")
    assert_valid(result)
    assert_same_outputs(run_ort(model, FEEDS), run_ort(result, FEEDS))
    assert model.SerializeToString() == before


def test_one_inside_another() -> None:
    """A decided If in a branch of a decided one goes too; one in a body that reads renamed values is followed."""
    deep = body("deep", [helper.make_node("Neg", ["h"], ["d"])], "d")
    other = body("other", [helper.make_node("Abs", ["h"], ["e"])], "e")
    open_if = choice("sign", "inner", [deep, other], "open")
    inside = [
        helper.make_node("Relu", ["x"], ["h"]),
        helper.make_node("ReduceSum", ["h"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["sign"]),
        choice("flag", "middle", [body("a", [open_if], "inner"), body("b", [copied("h", "i")], "i")], "decided too"),
    ]
    outer = choice("flag", "y", [body("c", inside, "middle"), body("d", [copied("x", "j")], "j")], "decided")
    model = model_of([outer], [info("x", 3, WIDTH)], [info("y", 3, WIDTH)], {"zero": np.zeros((), np.float32)})
    model.graph.initializer.append(stored("flag", holds=True))
    result = without_decided_ifs(model)
    (left,) = (n.name for n in result.graph.node if n.op_type == "If")
    assert left == "decided/then_branch/decided too/then_branch/open"
    assert_same_outputs(run_ort(model, FEEDS), run_ort(result, FEEDS))


def test_a_branch_that_only_passes_on() -> None:
    """A branch without nodes gives what it names: a value from around it, or a constant of its own, or one twice."""
    constant = {"c": np.arange(WIDTH, dtype=np.float32)}
    for nodes, named, weights in (
        ([], "x", {}),
        ([], "c", constant),
        ([helper.make_node("Exp", ["x"], ["e"])], "e", {}),
    ):
        branch = body("yes", nodes, named, weights)
        branch.output.add().CopyFrom(branch.output[0])
        node = choice("flag", "y", [branch, branch], "choose")
        node.output.append("again")
        outputs = [info("y", *("nm" if named != "c" else "m")), info("again", *("nm" if named != "c" else "m"))]
        model = model_of([node], [info("x", 3, WIDTH)], outputs)
        model.graph.initializer.append(stored("flag", holds=True))
        result = without_decided_ifs(model)
        assert "If" not in kinds(result)
        # ONNX Runtime refuses a branch that gives a value from around it, so ONNX's own evaluator runs the original.
        assert_same_outputs(run_reference(model, FEEDS), run_ort(result, FEEDS))


def test_what_is_not_decided_stays() -> None:
    """A condition that a caller may give, or that is computed, decides nothing: the model is the same object."""
    model = decided(holds=True, style="input")
    assert without_decided_ifs(model) is model
    plain = model_of([helper.make_node("Relu", ["x"], ["y"])], [info("x", 3, 4)], [info("y", 3, 4)])
    assert without_decided_ifs(plain) is plain


def test_channels_are_coupled_across_the_edge() -> None:
    """What goes into the branch and what comes out of it is free, and compressed without an If."""
    model = decided(holds=True)
    result = onnxfuse.compress(model, ratio=0.5, provider="cpu")
    inside = [f"choose{i}/then_branch/{name}" for i in range(2) for name in ("left_make", "left_read", f"back{i}")]
    assert {g.name: g.frozen for g in result.report.groups if g.name != "last"} == dict.fromkeys(("first", *inside))
    assert "If" not in kinds(result.model)
