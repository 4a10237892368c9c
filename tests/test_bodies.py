"""Bodies of If, Loop and Scan: compressed as models of their own, put back, and left alone where that can't be."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxfuse
from onnxfuse.errors import ConfigError, UnsupportedGraphError
from onnxfuse.graph.bodies import cut_body, subgraphs
from onnxfuse.graph.shapes import infer_shapes, shapes_at_other_sizes
from onnxfuse.graph.view import GraphView
from tests.builders import AnyArray, Arrays, run_ort, run_reference
from tests.laws import analysis_of, assert_same_outputs, assert_valid

WIDTH, HIDDEN, KEPT = 4, 6, 3
FLOAT = TensorProto.FLOAT
Weights = dict[str, AnyArray]


def mlp_weights(stem: str, seed: int, *, width: int = WIDTH) -> Weights:
    """Weights of a network whose six hidden channels are three pairs of copies."""
    rng = np.random.default_rng(seed)
    first = np.repeat(rng.standard_normal((width, KEPT)), HIDDEN // KEPT, axis=1)
    second = rng.standard_normal((HIDDEN, width)) / HIDDEN
    return {f"{stem}_1": first.astype(np.float32), f"{stem}_2": second.astype(np.float32)}


def mlp(stem: str, x: str, y: str, *, names: str = "") -> list[onnx.NodeProto]:
    """Nodes that compute y from x with those weights."""
    inner = f"{names or stem}_h"
    return [
        helper.make_node("MatMul", [x, f"{stem}_1"], [inner], name=f"{names or stem}_make"),
        helper.make_node("Relu", [inner], [f"{inner}_relu"]),
        helper.make_node("MatMul", [f"{inner}_relu", f"{stem}_2"], [y], name=f"{names or stem}_read"),
    ]


def tensors(weights: Weights) -> list[onnx.TensorProto]:
    """Weights as initializers."""
    return [numpy_helper.from_array(value, name) for name, value in weights.items()]


def info(name: str, *dims: int | str, kind: int = FLOAT) -> onnx.ValueInfoProto:
    """State a shape."""
    return helper.make_tensor_value_info(name, kind, dims)


def body(name: str, nodes: Sequence[onnx.NodeProto], y: str, weights: Weights | None = None) -> onnx.GraphProto:
    """Make a branch, which states no shape."""
    out = onnx.ValueInfoProto(name=y)
    out.type.tensor_type.elem_type = FLOAT
    return helper.make_graph(nodes, name, [], [out], tensors(weights or {}))


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Weights | None = None,
) -> onnx.ModelProto:
    """Make a model with pinned versions."""
    graph = helper.make_graph(nodes, "net", inputs, outputs, tensors(weights or {}))
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def if_model(*, shared: bool = False, batch: int | str = "n") -> onnx.ModelProto:
    """A layer, then one of two networks, by the sign of an input; with weights of the branches inside or outside."""
    left, right = mlp_weights("left", 1), mlp_weights("right", 2)
    branches: dict[str, Any] = {
        "then_branch": body("yes", mlp("left", "z", "a"), "a", {} if shared else left),
        "else_branch": body(
            "no", mlp("left" if shared else "right", "z", "b", names="other"), "b", {} if shared else right
        ),
    }
    outside: Weights = {"w": np.eye(WIDTH, dtype=np.float32), "zero": np.zeros((), np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["z"], name="first"),
        helper.make_node("Greater", ["flag", "zero"], ["yes"]),
        helper.make_node("If", ["yes"], ["y"], name="choose", **branches),
    ]
    inputs = [info("x", batch, WIDTH), info("flag")]
    return model_of(nodes, inputs, [info("y", batch, WIDTH)], {**outside, **(left if shared else {})})


def nested_model() -> onnx.ModelProto:
    """An If in a branch of an If, whose weights are in the outer branch."""
    weights = mlp_weights("deep", 3)
    inner: dict[str, Any] = {
        "then_branch": body("inner_yes", mlp("deep", "x", "p", names="pp"), "p"),
        "else_branch": body("inner_no", [helper.make_node("Identity", ["x"], ["q"])], "q"),
    }
    outer: dict[str, Any] = {
        "then_branch": body("outer_yes", [helper.make_node("If", ["yes"], ["r"], name="inner", **inner)], "r", weights),
        "else_branch": body("outer_no", [helper.make_node("Neg", ["x"], ["s"])], "s"),
    }
    nodes = [
        helper.make_node("Greater", ["flag", "zero"], ["yes"]),
        helper.make_node("If", ["yes"], ["y"], name="outer", **outer),
    ]
    return model_of(
        nodes,
        [info("x", 2, WIDTH), info("flag")],
        [info("y", 2, WIDTH)],
        {"zero": np.zeros((), np.float32)},
    )


def scan_model(axis: int = 0, *, turned: bool = False) -> onnx.ModelProto:
    """A state that goes through a network at every step, and what it was at each of them."""
    step = helper.make_graph(
        [
            *mlp("net", "state", "moved"),
            helper.make_node("Add", ["moved", "item"], ["next"]),
            helper.make_node("Identity", ["next"], ["out"]),
        ],
        "step",
        [info("state", 1, WIDTH), info("item", 1, WIDTH)],
        [info("next", 1, WIDTH), info("out", 1, WIDTH)],
        tensors(mlp_weights("net", 4)),
    )
    scan = helper.make_node("Scan", ["x", "items"], ["last", "all"], name="scan", num_scan_inputs=1, body=step)
    if axis or turned:
        told = {"scan_input_axes": [axis], "scan_output_axes": [axis], "scan_input_directions": [int(turned)]}
        scan.attribute.extend(helper.make_attribute(name, value) for name, value in told.items())
    dims = [5, 1, WIDTH] if axis == 0 else [1, 5, WIDTH]
    return model_of([scan], [info("x", 1, WIDTH), info("items", *dims)], [info("last", 1, WIDTH), info("all", *dims)])


def loop_model() -> onnx.ModelProto:
    """The same as a Loop of three steps, with weights outside."""
    step = helper.make_graph(
        [
            *mlp("net", "state", "moved"),
            helper.make_node("Add", ["moved", "x"], ["next"]),
            helper.make_node("Identity", ["goes"], ["on"]),
        ],
        "step",
        [
            info("i", kind=TensorProto.INT64),
            info("goes", kind=TensorProto.BOOL),
            info("state", 1, WIDTH),
        ],
        [info("on", kind=TensorProto.BOOL), info("next", 1, WIDTH)],
    )
    loop = helper.make_node("Loop", ["steps", "", "x"], ["y"], name="loop", body=step)
    weights = {"steps": np.array(3, np.int64), **mlp_weights("net", 5)}
    return model_of([loop], [info("x", 1, WIDTH)], [info("y", 1, WIDTH)], weights)


def feeds_of(model: onnx.ModelProto, flag: float = 1.0, rows: int = 2) -> Arrays:
    """Random inputs."""
    rng = np.random.default_rng(7)
    feeds: dict[str, AnyArray] = {}
    for given in model.graph.input:
        dims = [d.dim_value or rows for d in given.type.tensor_type.shape.dim]
        feeds[given.name] = rng.standard_normal(dims).astype(np.float32)
    if "flag" in feeds:
        feeds["flag"] = np.array(flag, np.float32)
    return feeds


def compressed(model: onnx.ModelProto, **options: Any) -> onnxfuse.pipeline.Compressed:
    """Compress to half the channels, so that copies merge."""
    chosen: dict[str, Any] = {"ratio": 0.5, "method": "fold", "provider": "cpu"}
    return onnxfuse.compress(model, **(chosen | options))


def widths(report: onnxfuse.CompressionReport) -> dict[str, tuple[int, int]]:
    """What became of the groups that are not frozen."""
    return {g.name: (g.channels_before, g.channels_after) for g in report.groups if not g.frozen}


MODELS: dict[str, tuple[Callable[[], onnx.ModelProto], set[str]]] = {
    "if": (if_model, {"choose/then_branch/left_make", "choose/else_branch/other_make"}),
    "if-shared": (
        lambda: if_model(shared=True),
        {"choose/then_branch/left_make", "choose/else_branch/other_make"},
    ),
    "nested": (nested_model, {"outer/then_branch/inner/then_branch/pp_make"}),
    "scan": (scan_model, {"scan/body/net_make"}),
    "scan-turned": (lambda: scan_model(1, turned=True), {"scan/body/net_make"}),
    "loop": (loop_model, {"loop/body/net_make"}),
}


@pytest.fixture(params=list(MODELS))
def case(request: pytest.FixtureRequest) -> tuple[onnx.ModelProto, set[str]]:
    """One model after the other, with the names of the groups in its bodies that may change."""
    build, names = MODELS[request.param]
    return build(), names


def test_copies_inside_bodies_merge_without_a_change(case: tuple[onnx.ModelProto, set[str]]) -> None:
    """Copies inside bodies merge without a change, whichever branch is taken, as two runtimes say."""
    model, names = case
    result = compressed(model)
    found = widths(result.report)
    assert {name: found[name] for name in names} == dict.fromkeys(names, (HIDDEN, KEPT))
    assert_valid(result.model)
    for flag in (1.0, -1.0):
        feeds = feeds_of(model, flag)
        assert_same_outputs(run_ort(model, feeds), run_ort(result.model, feeds))
        # ONNX's own evaluator has no Scan that goes backwards.
        if "scan_input_directions" not in {a.name for node in model.graph.node for a in node.attribute}:
            assert_same_outputs(run_reference(model, feeds), run_reference(result.model, feeds))


def test_bodies_are_inspected_like_the_model(case: tuple[onnx.ModelProto, set[str]]) -> None:
    """Inspect names the same groups, and knows how many parameters follow them."""
    model, names = case
    report = onnxfuse.inspect(model, provider="cpu")
    found = {group.name: group for group in report.groups if group.frozen is None}
    assert names <= set(found)
    assert {found[name].parameters for name in names} == {2 * WIDTH * HIDDEN}
    stored = {t.name: int(np.prod(t.dims)) for t in all_tensors(model.graph) if t.data_type == FLOAT}
    assert report.cost.parameters == sum(stored.values())
    sharing = 2 * WIDTH * HIDDEN * len(names)
    assert report.compressible_share == pytest.approx(sharing / sum(stored.values()))


def all_tensors(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """All initializers, those of bodies too."""
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [*graph.initializer, *(t for g in inner for t in all_tensors(g))]


def test_costs_follow_from_the_widths() -> None:
    """Of an If the larger branch counts, of a Scan or Loop every step."""
    once = 2 * WIDTH * HIDDEN
    expected = {"if": WIDTH * WIDTH + once, "scan": 5 * once, "loop": 3 * once}
    for name, macs in expected.items():
        report = compressed(MODELS[name][0]()).report
        assert report.before.macs == macs, name
        half = WIDTH * WIDTH + once // 2 if name == "if" else macs // 2
        assert report.after.macs == half, name


def test_ratio_zero_changes_no_byte(case: tuple[onnx.ModelProto, set[str]]) -> None:
    """A body that keeps its channels is not touched."""
    model, _ = case
    result = compressed(model, ratio=0.0).model
    assert result.graph.SerializeToString() == model.graph.SerializeToString()


def test_other_readers_of_a_shared_weight_keep_it() -> None:
    """Where one branch is skipped, the other gets weights of its own, and the outside keeps what it has."""
    model = if_model(shared=True)
    before = {t.name: t for t in model.graph.initializer}
    result = compressed(model, skip=("choose/else_branch/*",))
    assert widths(result.report) == {"choose/then_branch/left_make": (HIDDEN, KEPT)}
    after = {t.name: t for t in result.model.graph.initializer}
    assert after["left_1"] == before["left_1"]
    choose = next(node for node in result.model.graph.node if node.name == "choose")
    held = {a.name: [list(t.dims) for t in a.g.initializer] for a in choose.attribute}
    assert held == {"then_branch": [[WIDTH, KEPT], [KEPT, WIDTH]], "else_branch": []}
    assert result.report.after.parameters == result.report.before.parameters + WIDTH * HIDDEN


def test_weights_that_nothing_outside_reads_any_more_go() -> None:
    """Weights that every branch has replaced are gone from the model."""
    result = compressed(if_model(shared=True))
    assert {t.name for t in result.model.graph.initializer} == {"w", "zero"}
    assert result.report.after.parameters == result.report.before.parameters


def test_patterns_go_by_full_names() -> None:
    """Patterns choose groups in bodies by node and branch; one that fits nothing is an error."""
    only = compressed(if_model(), only=("*/else_branch/*",)).report
    assert widths(only) == {"choose/else_branch/other_make": (HIDDEN, KEPT)}
    reasons = {group.name: group.frozen for group in only.groups}
    assert reasons["choose/then_branch/left_make"] == "it fits no pattern of --only"
    with pytest.raises(ConfigError, match="no group's name fits"):
        compressed(if_model(), only=("choose/nowhere/*",))


def test_the_batch_stays_open() -> None:
    """What is found at a batch of two holds for any: sizes that the model leaves open are left open in bodies."""
    model = if_model()
    branch = dict(subgraphs(GraphView(model).nodes[-1]))["then_branch"]
    branch.node.insert(0, helper.make_node("Shape", ["z"], ["shape"]))
    branch.node.insert(1, helper.make_node("Reshape", ["z", "shape"], ["again"]))
    branch.node[2].input[0] = "again"
    result = compressed(model)
    assert ("choose/then_branch/left_make", (HIDDEN, KEPT)) in widths(result.report).items()
    for rows in (1, 2, 5):
        feeds = feeds_of(model, rows=rows)
        assert_same_outputs(run_ort(model, feeds), run_ort(result.model, feeds))


def test_open_dimensions_of_a_body_move_together() -> None:
    """Dimensions that move together have one symbol in the body; stated ones stay as they are."""
    model = if_model()
    graph = GraphView(model)
    dims = {"x": (2, WIDTH), "flag": ()}
    cut = cut_body(graph, graph.nodes[-1], "then_branch", infer_shapes(graph, dims), shapes_at_other_sizes(graph, dims))
    (given,) = cut.model.graph.input
    assert given.name == "z"
    assert [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim] == ["size_2_3_4", WIDTH]


def test_values_that_a_body_reads_keep_their_channels() -> None:
    """What a body reads from around it is frozen, with a reason that names the node."""
    report = onnxfuse.inspect(if_model(), provider="cpu")
    first = next(group for group in report.groups if group.name == "first")
    assert first.frozen == "a subgraph of 'choose' (If) reads 'z'"


def test_what_goes_through_a_loop_keeps_its_channels() -> None:
    """What goes into a Loop stays, and not for want of a rule: its body is compressed by itself."""
    model = loop_model()
    model.graph.node[0].input[2] = "z"
    model.graph.node.insert(0, helper.make_node("MatMul", ["x", "w"], ["z"], name="layer"))
    model.graph.initializer.append(numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32), "w"))
    reasons = {group.name: group.frozen for group in onnxfuse.inspect(model, provider="cpu").groups}
    assert reasons["layer"] == "it goes into or comes out of a body of 'loop' (Loop)"
    assert None in reasons.values()


def test_a_body_that_can_not_run_is_left_with_its_reason() -> None:
    """A branch that fails on every input that the model takes stays as it is; the other one is compressed."""
    model = if_model()
    then = dict(subgraphs(GraphView(model).nodes[-1]))["then_branch"]
    then.initializer.append(numpy_helper.from_array(np.array([7, 7], np.int64), "odd"))
    then.node.append(helper.make_node("Reshape", ["left_h", "odd"], ["never"]))
    then.output[0].name = "never"
    x = np.random.default_rng(0).standard_normal((4, 2, WIDTH)).astype(np.float32)
    calibration = {"x": x, "flag": np.full(4, -1.0, np.float32)}
    result = compressed(model, calibration=calibration)
    assert widths(result.report) == {"choose/else_branch/other_make": (HIDDEN, KEPT)}
    (note,) = [note for note in result.report.notes if "then_branch" in note]
    assert "choose/then_branch was left as it is: ONNX Runtime" in note


def test_a_model_whose_bodies_are_all_frozen_is_refused() -> None:
    """Reasons inside bodies are given where nothing can be compressed."""
    model = scan_model()
    with pytest.raises(UnsupportedGraphError, match="it fits a pattern of --skip"):
        compressed(model, skip=("scan/body/net_make",))


def test_shapes_and_costs_inside_bodies_need_no_run() -> None:
    """Shapes behind an If or Scan are inferred through its bodies."""
    for name in ("if", "nested", "scan", "scan-turned"):
        analysis = analysis_of(MODELS[name][0]())
        expected = {o.name: tuple(d.dim_value or 1 for d in o.type.tensor_type.shape.dim) for o in outputs_of(analysis)}
        assert {o: analysis.shapes.dims[o] for o in expected} == expected, name


def outputs_of(analysis: Any) -> list[onnx.ValueInfoProto]:
    """The stated outputs of the model that was analysed."""
    return list(analysis.source.model.graph.output)


def test_the_model_and_its_bodies_are_compressed_together() -> None:
    """Groups of the main graph and of bodies change in one run, and the file's metadata names them all."""
    model = if_model()
    weights = mlp_weights("main", 9)
    model.graph.initializer.extend(tensors(weights))
    model.graph.node[0].input[0] = "before"
    for node in reversed(mlp("main", "x", "before")):
        model.graph.node.insert(0, node)
    result = compressed(model, skip=("main_read",))
    names = {"main_make", "choose/then_branch/left_make", "choose/else_branch/other_make"}
    assert set(widths(result.report)) == names
    short = next(p.value for p in result.model.metadata_props if p.key == "onnxfuse.report")
    assert set(json.loads(short)["groups"]) == names
    for flag in (1.0, -1.0):
        feeds = feeds_of(model, flag)
        assert_same_outputs(run_ort(model, feeds), run_ort(result.model, feeds))


@pytest.mark.parametrize("method", ["prune", "auto"])
def test_no_note_is_of_options_that_nobody_gave(case: tuple[onnx.ModelProto, set[str]], method: str) -> None:
    """What is usual is handed on to bodies beside the method; it is no wish of the user that has no effect."""
    notes = compressed(case[0], method=method, effort=0).report.notes
    assert not [note for note in notes if "--candidates" in note]


def test_new_weights_get_names_that_nothing_around_has() -> None:
    """A weight that a body gets of its own must not hide one of the graph around it."""
    model = if_model(shared=True)
    for tensor in model.graph.initializer:
        if tensor.name == "w":
            tensor.name = "left_1_fused"
    model.graph.node[0].input[1] = "left_1_fused"
    result = compressed(model)
    choose = next(node for node in result.model.graph.node if node.name == "choose")
    held = [t.name for a in choose.attribute for t in a.g.initializer]
    assert "left_1_fused" not in held
    assert len(held) == len(set(held)) == 4
    feeds = feeds_of(model)
    assert_same_outputs(run_ort(model, feeds), run_ort(result.model, feeds))


@pytest.mark.parametrize("stated", [True, False])
def test_a_state_may_grow_from_step_to_step(*, stated: bool) -> None:
    """Where a state changes its shape, its dimensions are open in the body, and steps of one shape are taken."""
    model = loop_model()
    step = model.graph.node[0].attribute[0].g
    step.node[-2].CopyFrom(helper.make_node("Concat", ["moved", "state"], ["next"], axis=0))
    for given in (step.input[2], step.output[1]):
        given.CopyFrom(info(given.name, "rows", WIDTH))
        if not stated:
            given.type.tensor_type.ClearField("shape")
    model.graph.output[0].CopyFrom(info("y", 8, WIDTH))
    result = compressed(model)
    assert widths(result.report) == {"loop/body/net_make": (HIDDEN, KEPT)}
    feeds = feeds_of(model)
    assert_same_outputs(run_ort(model, feeds), run_ort(result.model, feeds))


def test_a_loop_that_never_runs_is_left_with_its_reason() -> None:
    """Without a step there are no inputs to prove anything with."""
    model = loop_model()
    steps = next(t for t in model.graph.initializer if t.name == "steps")
    steps.CopyFrom(numpy_helper.from_array(np.array(0, np.int64), "steps"))
    with pytest.raises(UnsupportedGraphError, match="loop/body does not run on these inputs, not even for one step"):
        compressed(model)


def test_values_of_unknown_shape_leave_a_body_alone() -> None:
    """A body that reads a value of unknown shape is left, with the reason, and the rest goes on."""
    model = if_model()
    graph = GraphView(model)
    known = infer_shapes(graph, {"x": (2, WIDTH), "flag": ()})
    hidden = replace(known, dims={name: dims for name, dims in known.dims.items() if name != "z"})
    with pytest.raises(UnsupportedGraphError, match="the shape of 'z', which then_branch of 'choose'"):
        cut_body(graph, graph.nodes[-1], "then_branch", hidden)


def wide_model(inside: str, *, batch: int | str = 2) -> onnx.ModelProto:
    """A network of 60 hidden channels, or none, then a branch or a loop of others; a branch may have to stay."""
    rng, width = np.random.default_rng(6), 8

    def wide(stem: str, hidden: int) -> Weights:
        return {
            f"{stem}_1": rng.standard_normal((width, hidden)).astype(np.float32),
            f"{stem}_2": (rng.standard_normal((hidden, width)) / hidden).astype(np.float32),
        }

    shape = (batch, width)
    zero: Weights = {"zero": np.zeros((), np.float32)}
    if inside == "loop":
        out = [info("on", kind=TensorProto.BOOL), info("next", *shape)]
        formal = [info("i", kind=TensorProto.INT64), info("goes", kind=TensorProto.BOOL), info("state", *shape)]
        step = [*mlp("net", "state", "next"), helper.make_node("Identity", ["goes"], ["on"])]
        graph = helper.make_graph(step, "step", formal, out, tensors(wide("net", 50)))
        nodes = [*mlp("main", "x", "z"), helper.make_node("Loop", ["steps", "", "z"], ["y"], name="loop", body=graph)]
        weights = {"steps": np.array(3, np.int64), **wide("main", 60)}
        return model_of(nodes, [info("x", *shape)], [info("y", *shape)], weights)
    stays = {"stays": rng.standard_normal((width, width)).astype(np.float32)}
    no = [helper.make_node("MatMul", ["z", "stays"], ["b"], name="stays")]
    branches: dict[str, Any] = {
        "then_branch": body("yes", mlp("left", "z", "a"), "a", wide("left", 70)),
        "else_branch": body("no", no, "b", stays),
    }
    if inside == "two":
        branches["else_branch"] = body("no", mlp("right", "z", "b"), "b", wide("right", 40))
    first = [helper.make_node("Identity", ["x"], ["z"])] if inside == "alone" else mlp("main", "x", "z")
    nodes = [
        *first,
        helper.make_node("Greater", ["flag", "zero"], ["yes"]),
        helper.make_node("If", ["yes"], ["y"], name="choose", **branches),
    ]
    weights = zero if inside == "alone" else {**zero, **wide("main", 60)}
    return model_of(nodes, [info("x", *shape), info("flag")], [info("y", *shape)], weights)


@pytest.mark.parametrize("measure", ["macs", "params"])
@pytest.mark.parametrize("share", [0.75, 0.4])
@pytest.mark.parametrize("inside", ["alone", "one", "two", "loop", "open"])
def test_a_budget_is_for_a_model_with_all_its_bodies(inside: str, share: float, measure: str) -> None:
    """The whole file meets the budget, within what a channel costs, although the main graph or a branch may not."""
    model = wide_model("one", batch="n") if inside == "open" else wide_model(inside)
    report = onnxfuse.compress(model, target=f"{measure}={share}", method="prune", refit=False, provider="cpu").report
    left = {
        "macs": report.after.macs / report.before.macs,
        "params": report.after.parameters / report.before.parameters,
    }
    assert share - 0.02 < left[measure] <= share
    made = onnxfuse.plan(model, target=f"{measure}={share}", method="prune", refit=False, provider="cpu")
    assert {n: g.keep for n, g in made.groups.items() if not g.frozen} == {n: k for n, (_, k) in widths(report).items()}
    with pytest.raises(UnsupportedGraphError, match="the target allows as many"):
        onnxfuse.compress(model, target=f"{measure}=1.0", provider="cpu")


def test_what_a_budget_can_not_reach_is_said() -> None:
    """A budget that is less than what has to stay is as nearly met as can be, and the report says what is the least."""
    report = onnxfuse.compress(wide_model("one"), target="params=0.01", method="prune", provider="cpu").report
    assert any("can't be met" in note for note in report.notes)
    assert {after for _, after in widths(report).values()} == {1}


@pytest.mark.parametrize("text", ["macs=0.75", "macs=0.048k"])
def test_a_budget_holds_for_every_body(text: str) -> None:
    """A share is for all together; an absolute amount, of 64 MACs in all, becomes the share that it is."""
    weights = mlp_weights("left", 1)
    model = if_model()
    calibration = {
        "x": np.random.default_rng(3).standard_normal((16, WIDTH)).astype(np.float32),
        "flag": np.linspace(-1, 1, 16, dtype=np.float32),
    }
    calibration["x"] = calibration["x"][:, None]
    options: dict[str, Any] = {"target": text, "calibration": calibration, "method": "auto", "provider": "cpu"}
    report = onnxfuse.compress(model, **options).report
    widest = 2 * weights["left_1"].size
    assert report.before.macs == WIDTH * WIDTH + widest
    # Of 48 in each branch three quarters are 36, which is 4.5 of its 6 channels.
    kept = {name: after for name, (_, after) in widths(report).items()}
    assert kept == {"choose/then_branch/left_make": 4, "choose/else_branch/other_make": 4}


def test_widths_by_name_go_by_full_names() -> None:
    """Rules for widths choose groups in bodies by node and branch; those of others do not touch them."""
    report = compressed(if_model(), keep=("*/then_branch/*=5", "choose/else_branch/other_make=0.5")).report
    assert widths(report)["choose/then_branch/left_make"] == (HIDDEN, 5)
    assert widths(report)["choose/else_branch/other_make"] == (HIDDEN, 3)
    with pytest.raises(ConfigError, match="no group's name fits"):
        compressed(if_model(), keep=("choose/nowhere/*=5",))


@pytest.mark.parametrize("name", ["if", "nested", "loop"])
def test_a_plan_names_groups_in_bodies_and_is_replayed(name: str) -> None:
    """A plan has the groups in bodies under their full names; replayed, edited or not, it gives what it says."""
    build, names = MODELS[name]
    model = build()
    made = onnxfuse.plan(model, ratio=0.5, method="fold", provider="cpu")
    assert {n: (g.channels, g.keep) for n, g in made.groups.items() if n in names} == dict.fromkeys(
        names, (HIDDEN, KEPT)
    )
    replayed = onnxfuse.compress(model, plan=made, method="fold", provider="cpu")
    assert initializer_bytes(replayed.model) == initializer_bytes(compressed(model).model)
    one = min(names)
    edited = replace(made, groups={one: replace(made.groups[one], keep=4)})
    report = onnxfuse.compress(model, plan=edited, method="fold", provider="cpu").report
    assert {n: after for n, (before, after) in widths(report).items() if after < before} == {one: 4}


def test_a_plan_that_a_body_can_not_follow_is_refused() -> None:
    """A plan for a frozen group, or for one that is not there, is refused with the name."""
    model = if_model()
    made = onnxfuse.plan(model, ratio=0.5, method="fold", provider="cpu")
    frozen = "choose/then_branch/left_read"
    wrong = {**made.groups, frozen: replace(made.groups[frozen], keep=1)}
    with pytest.raises(ConfigError, match=r"the plan keeps 1 of 4 channels of 'left_read': graph output"):
        onnxfuse.compress(model, plan=replace(made, groups=wrong), method="fold", provider="cpu")
    unknown = {**made.groups, "choose/then_branch/other": made.groups[frozen]}
    with pytest.raises(ConfigError, match="which this model does not have"):
        onnxfuse.compress(model, plan=replace(made, groups=unknown), method="fold", provider="cpu")


def initializer_bytes(model: onnx.ModelProto) -> list[bytes]:
    """All weights, those of bodies too."""
    return [t.SerializeToString() for t in all_tensors(model.graph)]
