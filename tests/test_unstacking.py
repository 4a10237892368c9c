"""What is made together is cut apart: the same numbers come out, bit for bit, and each part has channels of its own."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnxfuse
from onnxfuse.graph.shapes import infer_shapes
from onnxfuse.graph.unstacking import unstacked
from onnxfuse.graph.view import GraphView
from onnxfuse.proof.sameness import computes_the_same
from tests.builders import AnyArray, Net, run_ort, run_reference
from tests.laws import analysis_of, assert_same_outputs, free_groups

LENGTH, WIDTH, HEADS, SIZE = 5, 6, 2, 4
INT64 = np.int64

Write = Callable[[Net, str, int], list[str]]


def by_number(net: Net, x: str, axis: int) -> list[str]:
    """Pick with one number each, which takes the axis away."""
    return [net.node("Gather", x, net.constant(np.array(i - 3 * (i == 2), INT64)), axis=axis) for i in range(3)]


def by_list(net: Net, x: str, axis: int) -> list[str]:
    """Pick with a list of one number each, and take the axis away."""
    parts = [net.node("Gather", x, net.constant(np.array([i], INT64)), axis=axis) for i in range(3)]
    return [net.squeeze(part, [axis]) for part in parts]


def by_split(net: Net, x: str, axis: int) -> list[str]:
    """Split into ones."""
    return [net.squeeze(part, [axis]) for part in net.split(x, [1, 1, 1], 3, axis=axis)]


def by_slice(net: Net, x: str, axis: int) -> list[str]:
    """Slice, with the last bound beyond the end."""
    ends = (1, 2, 2**31)
    parts = [net.slice(x, [i], [ends[i]], [axis]) for i in range(3)]
    return [net.squeeze(part, [axis]) for part in parts]


PICKS = (by_number, by_list, by_split, by_slice)


def model_of(shapes_of: onnx.ModelProto, net: Net) -> onnx.ModelProto | None:
    """Return the model cut apart."""
    graph = GraphView(shapes_of)
    dims = {name: array.shape for name, array in net.feeds.items()}
    return unstacked(graph, infer_shapes(graph, dims), dims)


def unread(model: onnx.ModelProto) -> set[str]:
    """Return what a model has and nothing reads."""
    read = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    return ({t.name for t in model.graph.initializer} | {o for node in model.graph.node for o in node.output}) - read


def stacked(opset: int, pick: Write, moves: Sequence[str], *, is_computed: bool = False, batch: str = "") -> Net:
    """Queries, keys and values of one layer, with moves between where they are reshaped and where they are picked."""
    net = Net(opset, seed=1)
    x = net.input(2, LENGTH, WIDTH, batch=batch)
    made = net.matmul(x, 3 * HEADS * SIZE, name="made")
    last = (3, HEADS, SIZE)
    if is_computed:
        shape = net.node("Shape", x)
        read = [net.node("Gather", shape, net.constant(np.array([i], INT64)), axis=0) for i in range(2)]
        pieces = [net.constant(np.array(piece, INT64)) for piece in ([3], [HEADS, SIZE])]
        target = net.node("Concat", *read, *pieces, axis=0)
        like = net.reshape(made, 2, LENGTH, *last)
        net.nodes.pop()
        made = net.node("Reshape", made, target, like=like)
    else:
        made = net.reshape(made, 2, LENGTH, *last)
    # Where the axes are: of the batch, of places, of parts, of heads, of their channels, and of nothing.
    order = list("btphc")
    for move in moves:
        if move == "transpose":
            turned = order[1:] + order[:1]
            made = net.node("Transpose", made, perm=[order.index(a) for a in turned])
            order = turned
        elif move == "unsqueeze" and "1" not in order:
            made, order = net.unsqueeze(made, [1]), [order[0], "1", *order[1:]]
        elif move == "squeeze" and "1" in order:
            made = net.squeeze(made, [order.index("1")])
            order = [a for a in order if a != "1"]
        elif move == "identity":
            made = net.node("Identity", made)
    parts = pick(net, made, order.index("p"))
    order.remove("p")
    if "1" in order:
        parts = [net.squeeze(part, [order.index("1")]) for part in parts]
        order.remove("1")
    q, k, v = (net.node("Transpose", part, perm=[order.index(a) for a in "bhtc"]) for part in parts)
    scores = net.node("MatMul", q, net.node("Transpose", k, perm=[0, 1, 3, 2]))
    mixed = net.node("Transpose", net.node("MatMul", net.node("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    net.output(net.matmul(net.reshape(mixed, 2 if not batch else -1, LENGTH, HEADS * SIZE), 3, name="out"))
    return net


@given(
    opset=st.sampled_from([11, 13, 17, 18]),
    pick=st.sampled_from(PICKS),
    moves=st.lists(st.sampled_from(["transpose", "unsqueeze", "squeeze", "identity"]), max_size=5),
    is_computed=st.booleans(),
)
def test_the_same_numbers_come_out(opset: int, pick: Write, moves: list[str], *, is_computed: bool) -> None:
    """However parts are moved and picked, they are cut before the Reshape, and nothing else is computed."""
    net = stacked(opset, pick, moves, is_computed=is_computed, batch="n" if is_computed else "")
    model = net.model()
    before = model.SerializeToString(deterministic=True)
    found = model_of(model, net)
    assert found is not None
    assert model.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(found)
    for name, value in run_ort(model, net.feeds).items():
        np.testing.assert_array_equal(run_ort(found, net.feeds)[name], value)
    assert_same_outputs(run_reference(found, net.feeds), run_ort(model, net.feeds))
    reshaped = {node.input[0] for node in found.graph.node if node.op_type == "Reshape"}
    (split,) = [node for node in found.graph.node if node.op_type == "Split"]
    assert set(split.output) <= reshaped
    assert unread(found) <= unread(model)


@pytest.mark.parametrize("is_computed", [False, True])
def test_queries_keys_and_values_are_apart(*, is_computed: bool) -> None:
    """Queries and keys may be mixed, values too, and each has a width of its own."""
    net = stacked(17, by_number, ["transpose"], is_computed=is_computed, batch="n" if is_computed else "")
    groups = {g.name: g for g in free_groups(analysis_of(net.model(), feeds=net.feeds))}
    inner = [g for g in groups.values() if g.channels == SIZE and not g.frozen]
    assert len(inner) == 2
    assert not any(g.unmixable for g in inner)
    assert sorted(bool(g.contractions) for g in inner) == [False, True]
    contracted = next(g.name for g in inner if g.contractions)
    result = onnxfuse.compress(net.model(), ratio=0.0, keep=[f"{contracted}=3"], method="prune")
    widths = {t.name: tuple(t.dims) for t in result.model.graph.initializer if len(t.dims) == 2}
    assert (WIDTH, HEADS * (3 + 3 + SIZE)) in widths.values()
    assert (HEADS * SIZE, 3) in widths.values()


def test_targets_are_not_shared_by_parts() -> None:
    """Where one target is put together for all parts, each gets its own, so that their widths may differ."""
    net = Net(18, seed=2)
    x = net.input(2, LENGTH, WIDTH, batch="n")
    made = net.reshape(net.matmul(x, 3 * HEADS * SIZE, name="made"), -1, LENGTH, 3, HEADS * SIZE)
    shape = net.node("Shape", x)
    read = [net.node("Gather", shape, net.constant(np.array([i], INT64)), axis=0) for i in range(2)]
    target = net.node("Concat", *read, net.constant(np.array([HEADS, SIZE], INT64)), axis=0)
    parts = []
    for i in range(3):
        part = net.node("Gather", made, net.constant(np.array(i, INT64)), axis=2)
        like = net.reshape(part, 2, LENGTH, HEADS, SIZE)
        net.nodes.pop()
        parts.append(net.node("Transpose", net.node("Reshape", part, target, like=like), perm=[0, 2, 1, 3]))
    scores = net.node("MatMul", parts[0], net.node("Transpose", parts[1], perm=[0, 1, 3, 2]))
    mixed = net.node("Transpose", net.node("MatMul", net.node("Softmax", scores, axis=-1), parts[2]), perm=[0, 2, 1, 3])
    net.output(net.matmul(net.reshape(mixed, -1, LENGTH, HEADS * SIZE), 3, name="out"))
    groups = [g for g in free_groups(analysis_of(net.model(), feeds=net.feeds)) if g.channels == SIZE]
    assert len(groups) == 2
    result = onnxfuse.compress(
        net.model(), ratio=0.0, keep=[f"{groups[0].name}=3", f"{groups[1].name}=2"], method="prune"
    )
    assert result.report.after.parameters < result.report.before.parameters


def test_a_target_may_begin_with_several_sizes_at_once() -> None:
    """Batch and length may be read together; the number of parts is found behind both."""
    net = Net(17, seed=7)
    x = net.input(2, LENGTH, WIDTH, batch="n")
    made = net.matmul(x, 3 * HEADS * SIZE, name="made")
    both = net.slice(net.node("Shape", x), [0], [2], [0])
    like = net.reshape(made, 2, LENGTH, 3, HEADS, SIZE)
    net.nodes.pop()
    target = net.node("Concat", both, net.constant(np.array([3, HEADS, SIZE], INT64)), axis=0)
    parts = by_number(net, net.node("Reshape", made, target, like=like), 2)
    net.output(net.node("Add", parts[0], net.node("Mul", parts[1], parts[2])))
    found = model_of(net.model(), net)
    assert found is not None
    before, after = (next(iter(run_ort(model, net.feeds).values())) for model in (net.model(), found))
    np.testing.assert_array_equal(after, before)


def whole(net: Net, made: str) -> None:
    """Something else reads all parts together."""
    net.output(net.node("Tanh", made))


def shown(net: Net, made: str) -> None:
    """The stack is an output."""
    net.output(made)


def in_steps(net: Net, made: str) -> None:
    """Every second part is cut out."""
    net.output(net.slice(made, [0], [3], [2], [2]))


def two_at_once(net: Net, made: str) -> None:
    """Two parts are picked together."""
    net.output(net.node("Gather", made, net.constant(np.array([0, 2], INT64)), axis=2))


@pytest.mark.parametrize("read", [whole, shown, in_steps, two_at_once])
def test_what_is_read_otherwise_stays(read: Callable[[Net, str], None]) -> None:
    """A stack that is not merely picked apart is left as it is."""
    net = Net(17, seed=3)
    made = net.reshape(net.matmul(net.input(2, LENGTH, WIDTH), 3 * SIZE, name="made"), 2, LENGTH, 3, SIZE)
    net.output(*by_number(net, made, 2))
    read(net, made)
    assert model_of(net.model(), net) is None


def test_an_axis_of_any_length_stays() -> None:
    """Places of an open number that are cut into three are not channels; to state their number would be wrong."""
    net = Net(17, seed=3)
    x = net.input(2, 6, WIDTH)
    made = net.reshape(x, 2, 3, -1, WIDTH)
    net.output(*by_number(net, made, 1))
    model = net.model()
    assert model_of(model, net) is not None
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "t"
    target = next(node for node in model.graph.node if node.op_type == "Reshape").input[1]
    (tensor,) = [t for t in model.graph.initializer if t.name == target]
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([2, 3, -1, WIDTH], INT64), target))
    assert model_of(model, net) is None


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_an_even_split_may_become_uneven(opset: int) -> None:
    """Sizes that a Split leaves unstated are stated where no input changes them."""
    net = Net(opset, seed=4)
    x = net.input(2, LENGTH, WIDTH, batch="n")
    made = net.matmul(x, 2 * SIZE, name="made")
    parts = net.split(made, None, 2, axis=2)
    y = net.node("Concat", net.node("Relu", parts[0]), net.node("Tanh", parts[1]), axis=2)
    net.output(net.matmul(y, 3, name="out"))
    found = model_of(net.model(), net)
    assert found is not None
    before, after = (run_ort(model, net.feeds) for model in (net.model(), found))
    np.testing.assert_array_equal(next(iter(after.values())), next(iter(before.values())))
    groups = [g for g in free_groups(analysis_of(net.model(), feeds=net.feeds)) if g.channels == SIZE]
    assert len(groups) == 2
    result = onnxfuse.compress(
        net.model(), ratio=0.0, keep=[f"{groups[0].name}=1", f"{groups[1].name}=3"], method="prune"
    )
    assert {tuple(t.dims) for t in result.model.graph.initializer} >= {(WIDTH, 4), (4, 3)}


def test_an_even_split_of_places_stays() -> None:
    """What depends on the input is not stated, and channels pass beside it."""
    net = Net(17, seed=5)
    x = net.input(1, 2, 4, 4)
    halves = net.split(net.conv(x, 6, name="before"), None, 2, axis=2)
    net.output(net.conv(net.node("Concat", *halves[::-1], axis=3), 2, name="after"))
    model = net.model()
    assert model_of(model, net) is not None
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "h"
    assert model_of(model, net) is None
    analysis = analysis_of(model, feeds=net.feeds)
    assert [group.name for group in free_groups(analysis)] == ["before"]
    (split,) = [node for node in analysis.graph.nodes if node.op == "Split"]
    assert len(split.inputs) == 1


def test_what_computes_something_else_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If cutting apart changed outputs, the graph would stay as it is, and a message would ask to report that."""
    net = stacked(17, by_number, ["transpose"])
    cut = model_of(net.model(), net)
    assert cut is not None
    for node in cut.graph.node:
        if node.op_type == "Split":
            node.output[:] = node.output[::-1]
    monkeypatch.setattr("onnxfuse.analysis.unstacked", lambda *_: cut)
    found = analysis_of(net.model(), feeds=net.feeds)
    assert found.graph.model is found.source.model
    assert "please report this" in caplog.text


def test_a_small_run_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many samples go into a run, two are enough to see that the same comes out."""
    seen: list[tuple[int, ...]] = []

    def compared(_name: str, _before: onnx.ModelProto, _after: onnx.ModelProto, feeds: dict[str, AnyArray]) -> bool:
        seen.extend(array.shape for array in feeds.values())
        return computes_the_same(_name, _before, _after, feeds)

    monkeypatch.setattr("onnxfuse.analysis.computes_the_same", compared)
    net = stacked(17, by_number, ["transpose"], is_computed=True, batch="n")
    many = {name: np.concatenate([array] * 8) for name, array in net.feeds.items()}
    analysis_of(net.model(), feeds=many)
    assert seen == [(2, LENGTH, WIDTH)]


def test_what_keeps_all_channels_stays_as_it_was() -> None:
    """Where nothing is compressed, the file is not written in another way."""
    net = stacked(17, by_number, ["transpose"])
    result = onnxfuse.compress(net.model(), ratio=0.0, method="prune")
    assert list(result.model.graph.node) == list(net.model().graph.node)
