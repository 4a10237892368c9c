"""Values that a graph computes from its own sizes: those of the trained network stay when channels go."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import onnxfuse
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.graph.shapes import Shapes, infer_shapes
from onnxfuse.graph.view import GraphView
from tests.builders import Net, run_ort, run_reference
from tests.laws import (
    analysis_of,
    assert_same_outputs,
    assert_valid,
    free_groups,
    fuse,
    group_called,
    with_unread,
)

WIDTH = 8
DROPPED = np.array([1, 4, 6])


def root_of_size(net: Net, x: str, axis: int) -> str:
    """Compute the square root of one size of a value."""
    size = net.node("Gather", net.node("Shape", x), net.constant(np.array(axis, np.int64)), axis=0)
    return net.node("Sqrt", net.node("Cast", size, to=TensorProto.FLOAT))


def scaled_scores(net: Net, batch: str) -> str:
    """Write an attention whose scale is computed from the width of the queries; return the scale's name."""
    x = net.input(2, 4, 5, batch=batch)
    q, k, v = (net.matmul(x, WIDTH, name=name) for name in ("query", "key", "value"))
    scores = net.node("MatMul", q, net.node("Transpose", k, perm=[0, 2, 1]))
    scale = root_of_size(net, q, 2)
    weights = net.node("Softmax", net.node("Div", scores, scale), axis=-1)
    net.output(net.matmul(net.node("MatMul", weights, v), 3, name="last"))
    return scale


def scaled_map(net: Net, batch: str) -> str:
    """Write a convolution whose channels are divided by the root of their number; return the root's name."""
    h = net.conv(net.input(2, 3, 4, 4, batch=batch), WIDTH, name="value")
    scale = root_of_size(net, h, 1)
    net.output(net.conv(net.node("Div", net.node("Relu", h), scale), 2, 1, name="last"))
    return scale


NETS = [scaled_scores, scaled_map]


def unread(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Let nothing read some channels of a group, and make them the least important."""
    analysis = analysis_of(model)
    group = group_called(analysis, name)
    silent = with_unread(analysis, group, DROPPED)
    assert silent is not None
    for tensor in silent.graph.initializer:
        for parameter in group.producers:
            if tensor.name == parameter.operand.name:
                array = onnx.numpy_helper.to_array(tensor).copy()
                np.moveaxis(array, parameter.axis, 0)[DROPPED] *= np.float32(1e-3)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return silent


def pruned(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Remove the channels of a group that nothing reads."""
    result = onnxfuse.compress(model, method="prune", ratio=3 / 8, only=name, provider="cpu")
    assert {g.name: g.channels_after for g in result.report.groups}[name] == WIDTH - len(DROPPED)
    return result.model


@pytest.mark.parametrize("batch", ["", "n"])
@pytest.mark.parametrize("build", NETS)
def test_a_scale_computed_from_the_width_stays(build: Callable[[Net, str], str], batch: str) -> None:
    """A scale that is computed from the width stays when channels go that nothing reads: so does the function."""
    net = Net(17, seed=2)
    build(net, batch)
    model = unread(net.model(), "value")
    small = pruned(model, "value")
    assert_valid(small)
    for run in (run_ort, run_reference):
        assert_same_outputs(run(model, net.feeds), run(small, net.feeds))


@pytest.mark.parametrize("batch", ["", "n"])
def test_the_scale_of_attention_scores_stays(batch: str) -> None:
    """The scale of attention scores stays when queries and keys lose channels that are zero in both."""
    net = Net(17, seed=3)
    scaled_scores(net, batch)
    model = net.model()
    (name,) = [g.name for g in onnxfuse.inspect(model).groups if not g.frozen and g.name != "value"]
    analysis = analysis_of(model)
    for tensor in model.graph.initializer:
        for parameter in group_called(analysis, name).parameters:
            if tensor.name == parameter.operand.name:
                array = onnx.numpy_helper.to_array(tensor).copy()
                np.moveaxis(array, parameter.axis, 0)[DROPPED] = 0
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    small = pruned(model, name)
    assert_same_outputs(run_ort(model, net.feeds), run_ort(small, net.feeds))


@pytest.mark.parametrize("build", NETS)
def test_an_open_batch_stays_open(build: Callable[[Net, str], str]) -> None:
    """A result with an open batch runs, and says the same, at batches that nothing was computed at."""
    net = Net(17, seed=4)
    build(net, "n")
    model = unread(net.model(), "value")
    small = pruned(model, "value")
    rng = np.random.default_rng(0)
    for batch in (1, 3, 7):
        feeds = {"x0": rng.normal(size=(batch, *net.feeds["x0"].shape[1:])).astype(np.float32)}
        assert_same_outputs(run_ort(model, feeds), run_ort(small, feeds))


@pytest.mark.parametrize("build", NETS)
def test_nothing_is_written_down_where_no_size_changes(build: Callable[[Net, str], str]) -> None:
    """Where no channels go, the graph keeps computing its scale."""
    net = Net(17, seed=4)
    build(net, "n")
    result = onnxfuse.compress(net.model(), ratio=0, provider="cpu").model
    assert [n.op_type for n in result.graph.node] == [n.op_type for n in net.model().graph.node]


# What is known to stay ----------------------------------------------------------------------------------------------


def shapes_of(model: onnx.ModelProto, *dims: int) -> Shapes:
    """Infer shapes at some input shape."""
    return infer_shapes(GraphView(model), {"x0": dims})


def sizes(open_axes: dict[int, str]) -> tuple[onnx.ModelProto, list[str], str]:
    """Write a network that computes the root of each of its sizes, and the sum of them all."""
    net = Net(17)
    x = net.input(2, 4, 6)
    h = net.matmul(x, WIDTH)
    roots = [root_of_size(net, h, axis) for axis in range(3)]
    total = net.node("Add", net.node("Add", roots[0], roots[1]), roots[2])
    net.output(net.node("Mul", h, total))
    model = net.model()
    for value in (model.graph.input[0], model.graph.output[0]):
        for axis, symbol in open_axes.items():
            value.type.tensor_type.shape.dim[axis].dim_param = symbol
    return model, roots, total


@pytest.mark.parametrize("open_axes", [{}, {0: "n"}, {1: "length"}, {0: "n", 1: "length"}, {0: "s", 1: "s"}], ids=str)
def test_only_what_no_open_size_changes_is_fixed(open_axes: dict[int, str]) -> None:
    """A value that follows an open batch or length is not fixed; one that follows a stated size or a width is."""
    model, roots, total = sizes(open_axes)
    dims = (4, 4, 6) if set(open_axes.values()) == {"s"} else (2, 4, 6)
    shapes = shapes_of(model, *dims)
    assert {axis for axis, name in enumerate(roots) if name in shapes.fixed} == {0, 1, 2} - set(open_axes)
    assert (total in shapes.fixed) == (not open_axes)
    for name, size in zip(roots, (dims[0], dims[1], WIDTH), strict=True):
        assert shapes.static[name] == pytest.approx(np.sqrt(size))


@pytest.mark.parametrize("open_axes", [{}, {0: "n"}, {0: "n", 1: "length"}], ids=str)
def test_fixed_values_are_those_of_a_run_at_other_sizes(open_axes: dict[int, str]) -> None:
    """Every fixed value is what a run gives at any other choice of the open sizes; every other value is not."""
    model, roots, total = sizes(open_axes)
    fixed = shapes_of(model, 2, 4, 6).fixed
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in (*roots, total))
    runs = []
    for dims in ((2, 4, 6), (5, 4, 6), (5, 9, 6)):
        sized = tuple(
            d if axis in open_axes else stated for axis, (d, stated) in enumerate(zip(dims, (2, 4, 6), strict=True))
        )
        runs.append(run_ort(model, {"x0": np.zeros(sized, np.float32)}))
    for name in (*roots, total):
        assert (len({float(run[name]) for run in runs}) == 1) == (name in fixed), name


def test_a_fixed_value_says_what_it_was_read_from() -> None:
    """A fixed value says whose shape it was read from; a constant was read from none."""
    net = Net(17)
    scale = scaled_map(net, "n")
    shapes = shapes_of(net.model(), 2, 3, 4, 4)
    (source,) = shapes.read_from[scale]
    assert net.dims(source) == (2, WIDTH, 4, 4)
    assert set(net.values) <= shapes.fixed
    assert not set(net.values) & set(shapes.read_from)


# Weights that are cut by a size -------------------------------------------------------------------------------------


def cut_projection(net: Net, h: str, width: int) -> str:
    """Write a layer whose weight is the first half of a packed one, cut at the width of its input, and transposed."""
    packed = net.rng.standard_normal((2 * width, width))
    packed[:, DROPPED] = 0
    size = net.node("Shape", h, start=2, end=3)
    zero = net.constant(np.array([0], np.int64))
    part = net.node("Slice", net.constant(packed, name="packed"), zero, size, zero, like=net.weight(width, width))
    return net.node("MatMul", h, net.node("Transpose", part, perm=[1, 0]), name="cut")


@pytest.mark.parametrize("width", [WIDTH, 72])
@pytest.mark.parametrize("dropped", [(0,), (1,), (0, 1)], ids=str)
def test_a_weight_that_is_cut_by_a_size_loses_channels(dropped: tuple[int, ...], width: int) -> None:
    """A half of a packed weight, cut at a width that changes, loses the channels that nothing reads or makes."""
    net = Net(17, seed=5)
    y = cut_projection(net, net.matmul(net.input(2, 4, 5), width, name="before"), width)
    last = net.rng.standard_normal((width, 3))
    last[DROPPED] = 0
    net.output(net.node("MatMul", y, net.constant(last), name="last"))
    model = net.model()
    analysis = analysis_of(model)
    names = [group.name for group in free_groups(analysis)]
    assert len(names) == 2
    keep = np.setdiff1d(np.arange(width), DROPPED)
    fused = fuse(analysis, {names[i]: ChannelMap.selection(keep, width) for i in dropped})
    assert_valid(fused.model)
    assert_same_outputs(run_ort(model, net.feeds), run_ort(fused.model, net.feeds))


@pytest.mark.parametrize("channels", [8, 72])
def test_a_weight_that_is_normalised_in_the_graph_loses_channels(channels: int) -> None:
    """As the weight normalisation of wav2vec 2.0 is written by the newer exporter, whatever the size of the weight."""
    net = Net(17, seed=5)
    v, g = net.weight(channels, 8, 3, 3, name="v"), net.weight(channels, 1, 1, 1, name="g")
    w = net.node("Mul", v, net.node("Div", g, net.reduce("L2", v, [1, 2, 3])))
    h = net.node("Conv", net.conv(net.input(1, 3, 8, 8), 8, name="first"), w, name="normalised")
    net.output(net.conv(net.node("Relu", h), 2, 1, name="last"))
    model = net.model()
    analysis = analysis_of(model)
    groups = {group.name: group for group in free_groups(analysis)}
    assert groups.keys() == {"first", "normalised"}
    rng = np.random.default_rng(0)
    maps = {name: ChannelMap.permutation(rng.permutation(group.channels)) for name, group in groups.items()}
    assert_same_outputs(run_ort(model, net.feeds), run_ort(fuse(analysis, maps).model, net.feeds))
    small = onnxfuse.compress(model, method="prune", ratio=0.5, provider="cpu").model
    assert {channels // 2} <= {tensor.dims[0] for tensor in small.graph.initializer}


# Bounds that follow open sizes --------------------------------------------------------------------------------------

ROWS = 8


def length_of(net: Net, x: str) -> str:
    """Compute the length of a sequence."""
    return net.node("Shape", x, start=1, end=2)


def mean_of_rows(net: Net, x: str, h: str) -> str:
    """Add the mean of those rows of a table that the length of the input asks for."""
    table, zero = net.weight(ROWS, WIDTH, name="table"), net.constant(np.array([0], np.int64))
    rows = net.node("Slice", table, zero, length_of(net, x), zero, like=table)
    return net.node("Add", h, net.reduce("Mean", rows, [0]))


def padded_channels(net: Net, x: str, h: str) -> str:
    """Add the mean of channels, and of as many zeros as the length of the input asks for."""
    more = net.node("Sub", length_of(net, x), net.constant(np.array([ROWS], np.int64)))
    none = net.constant(np.zeros(5, np.int64))
    padded = net.node("Pad", h, net.node("Concat", none, more, axis=0), like=h)
    return net.node("Add", net.matmul(x, WIDTH, name="other"), net.reduce("Mean", padded, [2]))


def of_open_length(middle: Callable[[Net, str, str], str]) -> Net:
    """Put something between two layers of a network whose length is open, and for now as large as everything else."""
    net = Net(17, seed=6)
    x = net.input(2, ROWS, 5, batch="n")
    h = middle(net, x, net.matmul(x, WIDTH, name="before"))
    net.output(net.matmul(net.node("Tanh", h), 3, name="last"))
    return net


def with_open_length(net: Net) -> onnx.ModelProto:
    """Leave the length open in the file."""
    model = net.model()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[1].dim_param = "length"
    return model


def test_rows_that_are_cut_at_an_open_length_stay() -> None:
    """Rows of a table that are cut at an open length stay, even where all of them are read at the length looked at."""
    net = of_open_length(mean_of_rows)
    model = with_open_length(net)
    analysis = analysis_of(model, feeds=net.feeds)
    free = free_groups(analysis)
    assert [group.name for group in free] == ["before"]
    rng = np.random.default_rng(0)
    small = fuse(analysis, {g.name: ChannelMap.permutation(rng.permutation(g.channels)) for g in free}).model
    for length in (1, 3, ROWS):
        feeds = {"x0": net.feeds["x0"][:, :length]}
        assert_same_outputs(run_ort(model, feeds), run_ort(small, feeds))


def test_a_width_is_fixed_where_positions_end_before_a_multiple_of_the_length() -> None:
    """A table of positions that is a little longer than the length looked at hides no size that does not move."""
    net = Net(17)
    x = net.input(2, ROWS, 5)
    zero, one = net.constant(np.array([0], np.int64)), net.constant(np.array([1], np.int64))
    table = net.weight(ROWS + 2, WIDTH, name="table")
    rows = net.node("Slice", table, zero, length_of(net, x), zero, one, like=net.slice(table, [0], [ROWS], [0]))
    h = net.node("Add", net.matmul(x, WIDTH), rows)
    roots = [root_of_size(net, h, axis) for axis in (1, 2)]
    net.output(net.node("Mul", h, net.node("Add", *roots)))
    assert [name in shapes_of(with_open_length(net), 2, ROWS, 5).fixed for name in roots] == [False, True]


def test_channels_that_are_padded_by_an_open_length_stay() -> None:
    """Channels that are padded by as much as an open length says stay; others beside them need not."""
    net = of_open_length(padded_channels)
    analysis = analysis_of(with_open_length(net), feeds=net.feeds)
    assert "pads it by what follows" in group_called(analysis, "before").frozen
    assert [group.name for group in free_groups(analysis)] == ["other"]


def test_only_the_bound_that_moves_keeps_its_axis() -> None:
    """One Slice cuts positions at an open length, and channels at a stated one: the channels may change."""

    def cut(net: Net, x: str, h: str) -> str:
        numbers = [np.array(values, np.int64) for values in ([0, 2], [WIDTH - 1], [1, 2])]
        starts, end, axes = (net.constant(array) for array in numbers)
        ends = net.node("Concat", length_of(net, x), end, axis=0)
        return net.node("Slice", h, starts, ends, axes, like=net.slice(h, [2], [WIDTH - 1], [2]))

    net = of_open_length(cut)
    analysis = analysis_of(with_open_length(net), feeds=net.feeds)
    assert [(group.name, group.channels) for group in free_groups(analysis)] == [
        ("before:0-2", 2),
        ("before:2-7", 5),
    ]


def resampled_rows(net: Net, x: str, h: str) -> str:
    """Add the mean of a table that is resampled to the length of the input."""
    table = net.weight(1, WIDTH, ROWS, name="table")
    sizes = net.node("Concat", net.constant(np.array([1, WIDTH], np.int64)), length_of(net, x), axis=0)
    rows = net.node("Resize", table, "", "", sizes, mode="linear", like=table)
    return net.node("Add", h, net.node("Transpose", net.reduce("Mean", rows, [2]), perm=[0, 2, 1]))


def test_rows_that_are_resampled_to_an_open_length_stay() -> None:
    """Rows of a table that are resampled to an open length stay, also at the length at which they are what they are."""
    net = of_open_length(resampled_rows)
    analysis = analysis_of(with_open_length(net), feeds=net.feeds)
    assert [(group.name, group.channels) for group in free_groups(analysis)] == [("before", WIDTH)]
    (group,) = free_groups(analysis)
    assert "table" in {parameter.operand.name for parameter in group.parameters}


# What is filled with one number -------------------------------------------------------------------------------------


def zeros_like(net: Net, h: str) -> str:
    """Write zeros of the shape of a value."""
    return net.node("ConstantOfShape", net.node("Shape", h), like=h)


def copies_like(net: Net, h: str) -> str:
    """Write copies of a computed mean, of the shape of a value."""
    return net.node("Expand", net.reduce("Mean", net.node("Abs", "x0"), [1, 2, 3]), net.node("Shape", h), like=h)


@pytest.mark.parametrize("fill", [zeros_like, copies_like])
@pytest.mark.parametrize("join", ["Add", "Concat"])
def test_what_is_filled_follows_what_its_sizes_are_read_from(fill: Callable[[Net, str], str], join: str) -> None:
    """A map that has the shape of another, and the same in every channel, has its channels, and loses them with it."""
    net = Net(17, seed=8)
    h = net.node("Relu", net.conv(net.input(2, 3, 4, 4, batch="n"), WIDTH, name="value"))
    filled = fill(net, h)
    joined = net.node(join, h, filled, axis=1 if join == "Concat" else None)
    net.output(net.conv(joined, 2, 1, name="last"))
    model = net.model()
    assert [group.name for group in free_groups(analysis_of(model))] == ["value"]
    model = unread(model, "value")
    small = pruned(model, "value")
    assert_valid(small)
    assert_same_outputs(run_ort(model, net.feeds), run_ort(small, net.feeds))


def draw_weights(model: onnx.ModelProto) -> None:
    """Fill weights of three axes with random numbers."""
    rng = np.random.default_rng(3)
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 3:
            array = rng.standard_normal(tuple(tensor.dims)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def test_what_a_taken_branch_states_is_known() -> None:
    """Repeats that an If makes are known where its condition follows from a rank: what is padded by them is free."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]> net (float[n, 3, 6] x) => (float[n, 2, 6] y)
        <float[8, 3, 1] w = {0}, float[2, 8, 1] v = {0}, float[3, 1] table = {1, 2, 3}, int64 three = {3},
         int64[1] one = {1}, int64[1] two = {2}, int64[1] zero = {0}, int64[4] none = {0, 0, 0, 0}>
        {
            sizes = Shape(x)
            rank = Size(sizes)
            known = Equal(rank, three)
            repeats = If (known) <
                then_branch = yes () => (int64[2] r) { r = Concat <axis = 0> (one, one) },
                else_branch = no () => (int64[2] r) { r = Concat <axis = 0> (one, zero) }
            >
            tiled = Tile(table, repeats)
            dims = Shape(tiled)
            width = Slice(dims, one, two)
            more = Sub(width, one)
            pads = Concat <axis = 0> (zero, more, none)
            h = Conv(x, w)
            p = Pad(h, pads)
            y = Conv(p, v)
        }""")
    draw_weights(model)
    shapes = infer_shapes(GraphView(model), {"x": (2, 3, 6)})
    assert {"repeats", "pads"} <= shapes.fixed
    (group,) = (g for g in onnxfuse.inspect(model).groups if g.channels_before == 8)
    assert group.frozen is None
    small = onnxfuse.compress(model, ratio=0.5, method="prune", provider="cpu").model
    assert run_ort(small, {"x": np.ones((2, 3, 6), np.float32)})["y"].shape == (2, 2, 6)


def test_a_size_that_comes_out_of_a_branch() -> None:
    """What is reshaped to a size that a branch reads elsewhere keeps it, or gets a number for it."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]> net (float[n, 3, 6] x) => (float[n, 2, 6] y)
        <float[8, 3, 1] w = {0}, float[8, 3, 1] u = {0}, float[2, 8, 1] v = {0}, int64 three = {3},
         int64[1] six = {6}, int64[1] open = {-1}>
        {
            a = Conv(x, w)
            b = Relu(a)
            c = Conv(x, u)
            sizes = Shape(a)
            rank = Size(sizes)
            known = Equal(rank, three)
            half = Shape <start = 1, end = 2> (c)
            target = If (known) <
                then_branch = yes () => (int64[3] r) { r = Concat <axis = 0> (open, half, six) },
                else_branch = no () => (int64[3] r) { r = Concat <axis = 0> (open, six, half) }
            >
            d = Reshape(b, target)
            e = Conv(d, v)
            f = Conv(c, v)
            y = Add(e, f)
        }""")
    draw_weights(model)
    small = onnxfuse.compress(model, ratio=0.5, method="prune", provider="cpu").model
    assert run_ort(small, {"x": np.ones((2, 3, 6), np.float32)})["y"].shape == (2, 2, 6)


def test_a_constant_that_is_repeated_for_every_sample() -> None:
    """Positions that a Tile repeats as often as there are samples follow the channels that they are added to."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]> net (float[n, 3, 600] x) => (float[n, 2, 600] y)
        <float[8, 3, 1] w = {0}, float[2, 8, 1] v = {0}, float[1, 8, 600] positions = {0}, int64[2] one = {1, 1}>
        {
            samples = Shape <start = 0, end = 1> (x)
            repeats = Concat <axis = 0> (samples, one)
            tiled = Tile(positions, repeats)
            h = Conv(x, w)
            sum = Add(h, tiled)
            y = Conv(sum, v)
        }""")
    draw_weights(model)
    (group,) = (g for g in onnxfuse.inspect(model).groups if g.channels_before == 8)
    assert group.frozen is None
    small = onnxfuse.compress(model, ratio=0.5, method="prune", provider="cpu").model
    assert run_ort(small, {"x": np.ones((2, 3, 600), np.float32)})["y"].shape == (2, 2, 600)


def test_angles_in_the_file_follow_the_channels_that_they_turn() -> None:
    """The sine of a large table of angles is computed at run time: channels are dropped from the table too."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]> net (float[n, 3, 600] x) => (float[n, 2, 600] y)
        <float[8, 3, 1] w = {0}, float[2, 8, 1] v = {0}, float[1, 8, 600] angles = {0}>
        {
            h = Conv(x, w)
            sine = Sin(angles)
            cosine = Cos(angles)
            a = Mul(h, sine)
            b = Mul(a, cosine)
            y = Conv(b, v)
        }""")
    draw_weights(model)
    (group,) = (g for g in onnxfuse.inspect(model).groups if g.channels_before == 8)
    assert group.frozen is None
    assert group.unmixable == "'Sin_1' (Sin) bends constants that belong to it"
    analysis = analysis_of(model)
    silent = with_unread(analysis, group_called(analysis, group.name), DROPPED)
    assert silent is not None
    keep = np.setdiff1d(np.arange(WIDTH), DROPPED)
    small = fuse(analysis_of(silent), {group.name: ChannelMap.selection(keep, WIDTH)}).model
    assert {t.name: tuple(t.dims) for t in small.graph.initializer}["angles"] == (1, len(keep), 600)
    feeds = {"x": np.random.default_rng(2).standard_normal((2, 3, 600)).astype(np.float32)}
    assert_same_outputs(run_ort(silent, feeds), run_ort(small, feeds))


def test_a_size_may_be_that_of_a_table_of_positions() -> None:
    """As in the relative positions of DeBERTa: a row is copied as often as the table has entries."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[batch, length, 4] x) => (float[batch, length, 3] y)
        <int64 zero = {0}, int64 one = {1}, int64[1] front = {0}>
        { dims = Shape(x)  length = Gather(dims, one)  where = Range(zero, length, one)
          table = Unsqueeze(where, front)  copies = Shape <start = 1> (table)  eight = Constant <value_ints = [8]> ()
          size = Concat <axis = 0> (copies, eight)  rows = Expand(row, size)
          h = MatMul(x, w)  g = Add(h, rows)  y = MatMul(g, v) }
    """)
    rng = np.random.default_rng(0)
    for name, dims in {"row": (1, 8), "w": (4, 8), "v": (8, 3)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=dims).astype(np.float32), name))
    result = onnxfuse.compress(model, method="prune", ratio=0.5, provider="cpu")
    assert [(g.channels_after, g.frozen) for g in result.report.groups if g.channels_before == WIDTH] == [(4, None)]


def with_weights(text: str, **dims: tuple[int, ...]) -> onnx.ModelProto:
    """Read a model from text, and add random weights."""
    model, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    for name, shape in dims.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    return model


def frozen_of(model: onnx.ModelProto, *dims: int) -> dict[str, str]:
    """Return why groups are frozen, by name, without a proof."""
    analysis = analysis_of(model, feeds={"x": np.zeros(dims, np.float32)})
    return {group.name: group.frozen for group in analysis.channels.groups}


def test_channels_that_a_mask_tells_apart_stay() -> None:
    """A mask that is expanded to an open length and becomes one of booleans is none that anybody permutes."""
    model = with_weights(
        """
        <ir_version: 8, opset_import: ["" : 17]> net (float[n, t, 4] x) => (float[n, t, 3] y)
        <float[6] mask = {0, 1, 0, 1, 1, 0}, float zero = {0}, int64[1] six = {6}>
        { h = MatMul(x, w)  length = Shape <start = 1, end = 2> (x)  size = Concat <axis = 0> (length, six)
          table = Expand(mask, size)  kept = Cast <to = 9> (table)  g = Where(kept, h, zero)  y = MatMul(g, v) }
        """,
        w=(4, 6),
        v=(6, 3),
    )
    frozen = frozen_of(model, 2, 5, 4)
    assert "numbers" in frozen["MatMul_0"]
    assert not [name for name, reason in frozen.items() if not reason]


def test_a_constant_that_is_repeated_along_an_open_length_loses_channels() -> None:
    """What is copied as often as the input is long makes channels like a bias does."""
    model = with_weights(
        """
        <ir_version: 8, opset_import: ["" : 17]> net (float[n, t, 4] x) => (float[n, t, 3] y)
        <int64[1] one = {1}>
        { h = MatMul(x, w)  length = Shape <start = 1, end = 2> (x)  often = Concat <axis = 0> (length, one)
          rows = Tile(row, often)  g = Add(h, rows)  y = MatMul(g, v) }
        """,
        w=(4, 6),
        row=(1, 6),
        v=(6, 3),
    )
    assert [reason for reason in frozen_of(model, 2, 5, 4).values() if "output" not in reason] == [""]
    small = onnxfuse.compress(model, method="prune", ratio=0.5, provider="cpu")
    assert [group.channels_after for group in small.report.groups] == [3, 3]


def test_a_table_that_is_normalised_before_it_is_read_loses_channels() -> None:
    """Relative positions of DeBERTa go through the keys' matrix, and so have the channels of the tokens."""
    model = with_weights(
        """
        <ir_version: 8, opset_import: ["" : 17]> net (float[n, t, 4] x) => (float[n, t, 80] y)
        { h = MatMul(x, w)  q = MatMul(h, v)  r = LayerNormalization(table, scale)  k = MatMul(r, v)
          turned = Transpose(k)  y = MatMul(q, turned) }
        """,
        w=(4, 64),
        v=(64, 8),
        table=(80, 64),
        scale=(64,),
    )
    frozen = frozen_of(model, 2, 5, 4)
    assert [frozen[name] for name in ("MatMul_0", "MatMul_1")] == ["", ""]
    small = onnxfuse.compress(model, method="prune", ratio=0.5, provider="cpu")
    stored = {tensor.name: tuple(tensor.dims) for tensor in small.model.graph.initializer}
    assert stored["table"] == (80, 32)


def test_a_product_of_two_computed_constants_is_no_weight() -> None:
    """A table from which its mean is taken goes on through a matrix that the tokens go through as well."""
    model = with_weights(
        """
        <ir_version: 8, opset_import: ["" : 17]> net (float[n, t, 4] x) => (float[n, t, 80] y)
        { h = MatMul(x, w)  q = MatMul(h, v)  m = ReduceMean <axes = [1]> (table)  r = Sub(table, m)  k = MatMul(r, v)
          turned = Transpose(k)  y = MatMul(q, turned) }
        """,
        w=(4, 64),
        v=(64, 8),
        table=(80, 64),
    )
    assert frozen_of(model, 2, 5, 4)["MatMul_1"] == ""
