"""Walks through networks, linear nodes as regressions, what samples say of groups, and samples that are made up."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import onnxfuse
from onnxfuse.analysis import Analysis, choose_samples
from onnxfuse.calibration.judge import judge_groups
from onnxfuse.calibration.linear import ending_of, linear_nodes
from onnxfuse.calibration.observe import observe_readings
from onnxfuse.calibration.pictures import read_pictures
from onnxfuse.calibration.synthetic import calibration_samples
from onnxfuse.calibration.walk import Walk, largest_gap
from onnxfuse.config import CompressionConfig, Pixels, Provider
from onnxfuse.coupling.groups import CouplingGroup
from onnxfuse.errors import DataError, InvariantError
from onnxfuse.gradient.forward import with_outputs
from onnxfuse.proof.runtime import Session
from onnxfuse.proof.samples import Samples, load_samples
from onnxfuse.statistics.damage import Reading
from onnxfuse.statistics.dead_leaves import dead_leaves
from onnxfuse.statistics.features import Role
from tests.builders import AnyArray, Net, run_ort
from tests.laws import analysis_of, free_groups

MODELS = Path(__file__).parents[1] / "models"


def residual_net(seed: int = 0) -> Net:
    """A block with a shortcut of its own, a depthwise and a grouped convolution, and a dense head."""
    net = Net(17, seed=seed)
    x = net.input(1, 4, 8, 8, batch="n")
    h = net.node("Relu", net.conv(x, 8, name="stem", pads=[1, 1, 1, 1]))
    a = net.node("Relu", net.conv(h, 8, name="depthwise", group=8, pads=[1, 1, 1, 1]))
    a = net.conv(a, 6, name="point", kernel=1)
    b = net.conv(h, 6, name="shortcut", kernel=1)
    h = net.node("Relu", net.node("Add", a, b))
    h = net.node("Relu", net.conv(h, 6, name="grouped", group=2, strides=[2, 2]))
    net.output(net.gemm(net.node("Flatten", h), 3, name="head", transB=1))
    return net


def samples_for(model: onnx.ModelProto, count: int = 12) -> Samples:
    """Samples for the only input of a model, in several runs."""
    analysis = analysis_of(model)
    name, dims = next(iter(analysis.input_dims.items()))
    rng = np.random.default_rng(1)
    arrays = {name: rng.normal(size=(count, *dims[1:])).astype(np.float32)}
    return replace(load_samples(arrays, analysis.graph, "arrays"), batch=4, dims={name: (4, *dims[1:])})


def test_a_walk_sees_what_a_whole_run_sees() -> None:
    """Every value that a walk is asked for in order is that of a whole run; then it is forgotten."""
    model = residual_net().model()
    samples = samples_for(model)
    walk = Walk(model, samples, Provider.CPU)
    names = [node.outputs[0] for node in walk.graph.nodes]
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    whole.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in walk.graph.outputs)
    expected = [run_ort(whole, feeds) for feeds in samples.feeds()]
    for name in names:
        gap = largest_gap(walk.values(name), [run[name] for run in expected])
        assert gap < 1e-5
    assert walk.pending(names[-1]) == []
    with pytest.raises(InvariantError, match="after its last reader has run"):
        walk.values(names[0])


def test_a_walk_goes_on_with_a_changed_weight() -> None:
    """A constant that is changed before its node runs is what the node computes with; afterwards it is too late."""
    model = residual_net().model()
    walk = Walk(model, samples_for(model), Provider.CPU)
    stem, shortcut = walk.graph.nodes[0], next(n for n in walk.graph.nodes if n.name == "shortcut")
    walk.values(stem.outputs[0])
    weight = walk.graph.array(shortcut.inputs[1])
    walk.set_constant(shortcut.outputs[0], 1, np.zeros_like(weight))
    bias = walk.graph.array(shortcut.inputs[2])
    for value in walk.values(shortcut.outputs[0]):
        np.testing.assert_allclose(value, np.broadcast_to(bias[:, None, None], value.shape), atol=1e-6)
    with pytest.raises(InvariantError, match="after its node has run"):
        walk.set_constant(stem.outputs[0], 1, weight)


def test_a_gap_of_different_shapes_is_infinite() -> None:
    """Values of other shapes, or other values, are told apart."""
    assert largest_gap([np.zeros(3)], [np.zeros(4)]) == np.inf
    assert largest_gap([np.zeros(3), np.ones(2)], [np.zeros(3), np.full(2, 3.0)]) == 2.0


@pytest.mark.parametrize("name", ["stem", "depthwise", "point", "grouped", "head"])
def test_rows_times_matrices_are_the_outputs(name: str) -> None:
    """A linear node's rows times its matrices, and its bias, are what ONNX Runtime computes at those places."""
    model = residual_net().model()
    analysis = analysis_of(model)
    graph = analysis.graph
    linear = next(node for node in linear_nodes(graph, analysis.channels) if node.node.name == name)
    walk = Walk(model, samples_for(model), Provider.CPU)
    x = walk.values(linear.node.inputs[0])[1]
    y = Walk(model, samples_for(model), Provider.CPU).values(linear.node.outputs[0])[1]
    weight = graph.array(linear.weight.name).astype(np.float64)
    samples, places = linear.place_count(x, weight)
    flat = np.random.default_rng(0).permutation(samples * places)[:10]
    chosen = np.stack(np.divmod(flat, places), axis=1)
    matrices = linear.matrices(weight)
    made = np.einsum("ngd,god->ngo", linear.rows(x, weight, chosen), matrices).reshape(len(chosen), -1)
    bias = graph.array(linear.node.inputs[2])
    np.testing.assert_allclose(made + bias, linear.outputs(y, chosen), atol=1e-4)
    np.testing.assert_array_equal(linear.weight_like(matrices, weight), weight)


def test_results_end_behind_a_residual_addition() -> None:
    """Both branches end in the sum; a convolution before an activation ends in itself."""
    analysis = analysis_of(residual_net().model())
    ends = {
        n.node.name: ending_of(n, analysis.graph, analysis.channels)
        for n in linear_nodes(analysis.graph, analysis.channels)
    }
    add = next(node for node in analysis.graph.nodes if node.op == "Add")
    assert ends["point"].value == ends["shortcut"].value == add.outputs[0]
    assert {ends["point"].other, ends["shortcut"].other} == set(add.inputs)
    assert (ends["point"].plain.value, ends["point"].plain.other) == (ends["point"].before, "")
    assert (ends["stem"].value, ends["stem"].other) == (analysis.graph.nodes[0].outputs[0], "")


def variance_errors_of(x: AnyArray, count: float) -> AnyArray:
    """Return the relative standard error of the variance of every column, as SciPy's kurtosis has it."""
    return np.asarray(np.sqrt((scipy.stats.kurtosis(np.asarray(x, np.float64), fisher=False) - 1) / count))


def two_layers() -> tuple[onnx.ModelProto, Samples, Analysis, CouplingGroup]:
    """Return a network of eight hidden channels, samples for it, and the group of these."""
    net = Net(17, seed=2)
    h = net.node("Relu", net.gemm(net.input(1, 5, batch="n"), 8, name="first"))
    net.output(net.gemm(h, 3, name="last"))
    model = net.model()
    analysis = analysis_of(model)
    return model, samples_for(model, 400), analysis, next(g for g in analysis.channels.groups if not g.frozen)


def test_judgements_predict_what_a_reader_loses() -> None:
    """On the samples themselves, J is what the best linear reader loses, or what it may well lose: measured on outputs.

    The loss is the mean over outputs of the share of each one's variance; the variances of channels count as larger by
    their standard errors.
    """
    model, samples, analysis, group = two_layers()
    judgement = judge_groups(analysis, [group], samples, Provider.CPU, 0)[group.name]
    feeds = dict(samples.arrays)
    made = onnxfuse.compress(model, calibration=feeds, ratio=0.5, prove=False, provider="cpu", candidates=())
    y, z = (next(iter(run_ort(m, feeds).values())).astype(np.float64) for m in (model, made.model))
    lost = (np.square(y - z).sum(axis=0) / np.square(y - y.mean(axis=0)).sum(axis=0)).mean()
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weight, bias = (constants[name] for name in model.graph.node[0].input[1:3])
    seen = np.maximum(next(iter(feeds.values())) @ weight + bias, 0.0)
    kept, covariance = judgement.selected(4), np.cov(seen.T)
    rebuilt = covariance[:, kept] @ np.linalg.solve(covariance[np.ix_(kept, kept)], covariance[kept])
    read = constants[model.graph.node[2].input[1]] / np.sqrt(3 * y.var(axis=0))
    plain, cautious = (
        float(np.trace(v.T @ (covariance - rebuilt) @ v))
        for v in (read, read * np.sqrt(1 + variance_errors_of(seen, 400))[:, None])
    )
    assert plain == pytest.approx(lost, rel=0.05)
    assert judgement.damage[4] == pytest.approx(cautious, rel=0.05)
    report = next(g for g in made.report.groups if g.name == group.name)
    assert report.method == "least-damage"
    assert report.damage == pytest.approx(judgement.damage[4], rel=1e-6)


def test_what_made_up_samples_leave_still_counts_for_more() -> None:
    """Without data, channels count as if each varied by half of the mean variance besides; what they share stays."""
    model, samples, analysis, group = two_layers()
    (plain,), (made_up,) = (
        observe_readings(analysis, [group], samples, Provider.CPU, 0, is_made_up=is_made_up)[group.name]
        for is_made_up in (False, True)
    )
    np.testing.assert_array_equal(made_up.covariance, plain.covariance)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weight, bias = (constants[name] for name in model.graph.node[0].input[1:3])
    seen = np.maximum(next(iter(samples.arrays.values())) @ weight + bias, 0.0)
    variance, errors = np.var(seen, axis=0, dtype=np.float64), variance_errors_of(seen, 400)
    more = 1 + 0.5 * variance.mean() / variance / (1 + errors)
    np.testing.assert_allclose(np.diag(made_up.strength), np.diag(plain.strength) * more, rtol=1e-3)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("file", ["digits_bn.onnx", "digits_folded.onnx"])
def test_the_damage_of_hidden_channels_is_what_residual_sums_lose(file: str, ratio: float) -> None:
    """J of a group inside a residual block is, within a factor of 1.5, the share of the block's sum that is lost.

    The inputs are Gaussian, and others than J was estimated on; no other group changes, and nothing is refitted. J does
    not know that borders lose less, nor that errors of neighbouring places are alike, and is cautious.
    """
    model = onnx.load(MODELS / file)
    rng = np.random.default_rng(2)
    seen, other = ({"image": rng.normal(size=(256, 1, 8, 8)).astype(np.float32)} for _ in range(2))
    analysis = analysis_of(model)
    ends = {
        linear.node.name: ending_of(linear, analysis.graph, analysis.channels)
        for linear in linear_nodes(analysis.graph, analysis.channels)
    }
    hidden = [group for group in free_groups(analysis) if not group.residual]
    assert len(hidden) == 3
    options: dict[str, Any] = {"refit": False, "candidates": (), "prove": False, "provider": "cpu"}
    for group in hidden:
        made = onnxfuse.compress(model, calibration=seen, ratio=ratio, only=group.name, **options)
        (reader,) = (p.node for p in group.parameters if p.role is Role.CONSUMER)
        value = ends[reader].value
        assert ends[reader].other
        y, z = (
            Session(with_outputs(m, [value]), Provider.CPU).run(other)[value].astype(np.float64)
            for m in (model, made.model)
        )
        lost = np.square(y - z).mean() / np.square(y - y.mean(axis=(0, 2, 3), keepdims=True)).mean()
        damage = next(g.damage for g in made.report.groups if g.name == group.name)
        assert damage is not None
        assert 1 / 1.5 < damage / lost < 1.5


@given(st.integers(1, 9), st.integers(4, 20), st.integers(4, 20), st.sampled_from([1, 3]))
def test_dead_leaves_are_images(count: int, height: int, width: int, channels: int) -> None:
    """Dead leaves have the shape that was asked for, are in range, differ, and are the same for the same seed."""
    images = dead_leaves(count, height, width, channels, np.random.default_rng(3))
    assert images.shape == (count, channels, height, width)
    assert images.dtype == np.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert len({image.tobytes() for image in images}) == count
    np.testing.assert_array_equal(images, dead_leaves(count, height, width, channels, np.random.default_rng(3)))


def test_neighbouring_pixels_are_alike() -> None:
    """Neighbouring pixels are correlated much more than distant ones, as in photographs and unlike noise."""
    images = dead_leaves(64, 32, 32, 3, np.random.default_rng(0)).mean(axis=1)

    def correlation(distance: int) -> float:
        return float(np.corrcoef(images[:, :, distance:].ravel(), images[:, :, :-distance].ravel())[0, 1])

    assert correlation(1) > 0.8
    assert correlation(1) > correlation(4) > correlation(16)


def image_net(kind: int = onnx.TensorProto.FLOAT) -> onnx.ModelProto:
    """A network for images of a type."""
    net = Net(17, seed=4)
    x = net.input(1, 3, 16, 16, batch="n", dtype=kind)
    h = x if kind == onnx.TensorProto.FLOAT else net.node("Cast", x, to=onnx.TensorProto.FLOAT)
    h = net.node("Relu", net.conv(h, 6, name="first"))
    net.output(net.gemm(net.node("Flatten", h), 3, name="last", transB=1))
    return net.model()


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [(onnx.TensorProto.UINT8, 0, 255), (onnx.TensorProto.INT8, -128, 127), (onnx.TensorProto.FLOAT, -3, 3)],
)
def test_made_up_images_have_the_range_of_the_input(kind: int, low: float, high: float) -> None:
    """Made-up images have the type of the input and its range."""
    model = image_net(kind)
    analysis = analysis_of(model)
    found, _ = choose_samples(analysis.source, analysis.graph, Provider.CPU, 0)
    assert found is not None
    made = calibration_samples(analysis, found, CompressionConfig(provider=Provider.CPU))
    assert made.is_like_data
    assert "dead leaves" in made.samples.origin
    array: AnyArray = next(iter(made.samples.arrays.values()))
    assert array.dtype == onnx.helper.tensor_dtype_to_np_dtype(kind)
    assert array.shape[1:] == (3, 16, 16)
    assert low <= array.min() < array.max() <= high
    assert np.ptp(array.astype(float)) > 0.5 * (high - low)


def test_without_samples_like_data_moments_decide() -> None:
    """For inputs of no known kind moments are worked out; nothing is fitted, and the report says so."""
    net = Net(17, seed=2)
    net.output(net.gemm(net.node("Relu", net.gemm(net.input(1, 5, batch="n"), 8, name="first")), 3, name="last"))
    made = onnxfuse.compress(net.model(), ratio=0.5, provider="cpu")
    assert {g.method for g in made.report.groups} <= {"descent", "least-damage", None}
    assert made.report.refits == ()
    assert any("--calibration" in note and "moments" in note for note in made.report.notes)


def test_tokens_are_made_up_where_their_shape_changes_first() -> None:
    """As in GPT-2, which flattens its tokens before it looks them up."""
    net = Net(17)
    tokens = net.input(2, 3, dtype=TensorProto.INT64, batch="n")
    rows = net.node("Reshape", net.node("Cast", tokens, to=TensorProto.INT64), net.constant(np.array([-1, 3])))
    h = net.node("Gather", net.weight(50, 8), rows, name="table")
    net.output(net.matmul(net.node("Relu", net.matmul(h, 8)), 2, name="last"))
    result = onnxfuse.compress(net.model(), ratio=0.5, effort=0, provider="cpu")
    assert "rows of random tokens" in result.report.notes[0]


def test_without_moments_the_weights_decide() -> None:
    """A group behind an operator without a rule is fused by its weights alone."""
    net = Net(17, seed=2)
    x = net.node("Softmax", net.input(1, 5, batch="n"))
    net.output(net.gemm(net.node("Relu", net.gemm(x, 8, name="first")), 3, name="last"))
    made = onnxfuse.compress(net.model(), ratio=0.5, provider="cpu")
    assert {g.method for g in made.report.groups} == {"intra-fusion", None}
    assert made.report.refits == ()


def test_sounds_are_made_up_for_a_network_that_reads_a_signal() -> None:
    """Where filters of one channel run along an input, it gets sounds; where they run over several, it does not."""
    for channels, word in ((1, "synthetic sounds"), (2, "random numbers")):
        net = Net(17, seed=3)
        x = net.node("Relu", net.conv(net.input(1, channels, 128, batch="n"), 8, 9, name="first"))
        net.output(net.gemm(net.node("Flatten", net.node("GlobalAveragePool", x)), 3))
        made = onnxfuse.compress(net.model(), ratio=0.5, provider="cpu", effort=0)
        assert any(word in note for note in made.report.notes)
        assert bool(made.report.refits) == (channels == 1)


@pytest.mark.parametrize("is_other_filter", [False, True])
def test_sounds_are_made_up_where_branches_read_the_signal(*, is_other_filter: bool) -> None:
    """A signal is one where every branch of an If filters it first, and none where one branch does something else."""
    other = "s = ReduceSum <keepdims = 1> (u)\n h = Expand(s, wide)" if is_other_filter else "h = Conv(u, v)"
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
    net (float[n, 128] x, bool flag) => (float[n, 2, 120] y) {{
      y = If (flag) <
        then_branch = one () => (float[n, 2, 120] y1) {{
          p = Unsqueeze(x, axis)
          q = Conv(p, w)
          r = Relu(q)
          y1 = Conv(r, last)
        }},
        else_branch = two () => (float[n, 2, 120] y2) {{
          u = Unsqueeze(x, axis)
          {other}
          k = Relu(h)
          y2 = Conv(k, last)
        }}
      >
    }}""")
    rng = np.random.default_rng(0)
    stored = {"w": rng.normal(size=(8, 1, 9)), "v": rng.normal(size=(8, 1, 9)), "last": rng.normal(size=(2, 8, 1))}
    model.graph.initializer.extend(numpy_helper.from_array(a.astype(np.float32), n) for n, a in stored.items())
    numbers = {"axis": [1], "wide": [1, 8, 120]}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(a, np.int64), n) for n, a in numbers.items())
    made = onnxfuse.compress(model, ratio=0.5, provider="cpu", effort=0)
    assert any("synthetic sounds" in note for note in made.report.notes) != is_other_filter
    changed = [group for group in made.report.groups if group.channels_after < group.channels_before]
    assert len(changed) == 2 - is_other_filter
    assert ({group.method for group in changed} == {"intra-fusion"}) == is_other_filter


def write_pictures(folder: Path, count: int) -> None:
    """Write grey and coloured pictures of several sizes, one of them in a folder of its own."""
    (folder / "more").mkdir(parents=True)
    (folder / "notes.txt").write_text("no picture", encoding="utf-8")
    for i, image in enumerate(dead_leaves(count, 24, 20 + count, 3, np.random.default_rng(0))):
        path = folder / ("more" if i == 0 else "") / f"{i}.{('png', 'jpg')[i % 2]}"
        Image.fromarray((255 * image.transpose(1, 2, 0)).astype(np.uint8)).save(path)


def test_pictures_are_read_as_pixels(tmp_path: Path) -> None:
    """Pictures are cut to the size asked for, in the order of their paths; of many, some evenly spaced ones."""
    write_pictures(tmp_path / "pictures", 6)
    pixels = read_pictures(tmp_path / "pictures", 16, 8, 3, 100).pixels
    assert pixels.shape == (6, 3, 16, 8)
    assert 0 <= pixels.min() < 0.5 < pixels.max() <= 1
    np.testing.assert_array_equal(read_pictures(tmp_path / "pictures", 16, 8, 3, 3).pixels, pixels[::2])
    assert read_pictures(tmp_path / "pictures", 16, 8, 1, 2).pixels.shape == (2, 1, 16, 8)


def test_a_folder_of_pictures_calibrates(tmp_path: Path) -> None:
    """A folder of pictures is a calibration set: as the network seems to expect pixels, or as is asked for."""
    write_pictures(tmp_path / "pictures", 8)
    for pixels in (Pixels.AUTO, Pixels.SYMMETRIC):
        report = onnxfuse.compress(
            image_net(), calibration=tmp_path / "pictures", ratio=0.5, pixels=pixels, prove=False, provider="cpu"
        ).report
        assert report.drift.samples == 8
        assert ("-1..1" in report.drift.data) == (pixels is Pixels.SYMMETRIC)
        assert [note[:30] for note in report.notes] == ["few samples: 8 different of 8,"]
    with pytest.raises(DataError, match=r"can't be '0\.\.1' for inputs of this type"):
        onnxfuse.compress(image_net(onnx.TensorProto.UINT8), ratio=0.5, pixels="0..1", prove=False, provider="cpu")


def test_pictures_that_can_not_be_read_are_left_out_and_counted(tmp_path: Path) -> None:
    """Pictures that can't be read are left out and counted: the others calibrate as if they were alone."""
    write_pictures(tmp_path / "pictures", 8)
    whole = read_pictures(tmp_path / "pictures", 16, 8, 3, 100)
    assert whole.unreadable == ()
    options: dict[str, Any] = {"ratio": 0.5, "effort": 0, "prove": False, "provider": "cpu"}
    alone = onnxfuse.compress(image_net(), calibration=tmp_path / "pictures", **options)
    damaged = [tmp_path / "pictures" / name for name in ("0.png", "more/x.tiff")]
    damaged[0].write_bytes(b"no picture")
    cut_short = (tmp_path / "pictures" / "more" / "0.png").read_bytes()[:300]
    damaged[1].write_bytes(cut_short)
    some = read_pictures(tmp_path / "pictures", 16, 8, 3, 100)
    assert some.unreadable == tuple(damaged)
    np.testing.assert_array_equal(some.pixels, whole.pixels)
    said = f"2 of the 10 pictures can't be read and are left out, the first of them {str(damaged[0])!r}"
    made = onnxfuse.compress(image_net(), calibration=tmp_path / "pictures", **options)
    assert made.report.notes == (said, *alone.report.notes)
    assert [note[:30] for note in alone.report.notes] == ["few samples: 8 different of 8,"]
    assert made.model.graph == alone.model.graph
    assert onnxfuse.validate(made.model, alone.model, data=tmp_path / "pictures", provider="cpu").notes == (said,)


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    """A folder without pictures, a picture that is none, and a network that takes no images are refused."""
    with pytest.raises(DataError, match="there are no pictures"):
        onnxfuse.compress(image_net(), calibration=tmp_path, provider="cpu")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of the 1 pictures can be read; the first: cannot identify"):
        onnxfuse.compress(image_net(), calibration=tmp_path, provider="cpu")
    net = Net(17, seed=2)
    net.output(net.gemm(net.node("Relu", net.gemm(net.input(1, 5, batch="n"), 8, name="first")), 3, name="last"))
    with pytest.raises(DataError, match="one input that takes images"):
        onnxfuse.compress(net.model(), calibration=tmp_path, provider="cpu")


def seen_of_rows(dims: tuple[int, ...], *, channels_last: bool) -> tuple[Reading, AnyArray]:
    """Return what is seen of eight channels, for the same rows laid out in some way, and their variances' errors."""
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(9600, 5)) + np.array([3.0, 0, 0, 0, 0])
    weights = [rng.normal(size=(5, 8)), rng.normal(size=(8, 6)) + 0.5]
    samples = rows.reshape(-1, *dims, 5).astype(np.float32)
    op = "MatMul"
    shape: list[int | str | None] = ["n", *dims, 5]
    if not channels_last:
        samples = np.ascontiguousarray(np.moveaxis(samples, -1, 1))
        op, shape = "Conv", ["n", 5, *dims]
        weights = [weight.T.reshape(*weight.T.shape, *[1] * len(dims)) for weight in weights]
    nodes = [
        helper.make_node(op, ["x", "first"], ["z"], "first"),
        helper.make_node("Relu", ["z"], ["h"], "relu"),
        helper.make_node(op, ["h", "second"], ["y"], "second"),
    ]
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
    ]
    constants = [
        numpy_helper.from_array(w.astype(np.float32), n) for n, w in zip(("first", "second"), weights, strict=True)
    ]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    analysis = analysis_of(model, feeds={"x": samples})
    group = next(group for group in analysis.channels.groups if group.channels == 8)
    given_samples = load_samples({"x": samples}, analysis.graph)
    (reading,) = observe_readings(analysis, [group], given_samples, Provider.CPU, 0)[group.name]
    values = np.maximum(rows @ weights[0].reshape(8, 5).T if not channels_last else rows @ weights[0], 0.0)
    # Of the places of one sample the root of their number counts.
    return reading, variance_errors_of(values, len(samples) * math.sqrt(math.prod(dims)))


def correlations(matrix: AnyArray) -> AnyArray:
    """Return a matrix divided so that its diagonal is 1."""
    scale = np.sqrt(np.diag(matrix))
    return np.asarray(matrix / np.outer(scale, scale))


@pytest.mark.parametrize("dims", [(20,), (3, 20), (2, 3, 4)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_readings_do_not_depend_on_how_places_are_laid_out(dims: tuple[int, ...], *, channels_last: bool) -> None:
    """Along one axis or more; read by a product of matrices, or by a convolution."""
    expected, errors = seen_of_rows((), channels_last=True)
    found, more_errors = seen_of_rows(dims, channels_last=channels_last)
    np.testing.assert_allclose(found.means, expected.means, rtol=1e-4)
    np.testing.assert_allclose(np.diag(found.covariance), np.diag(expected.covariance), rtol=1e-3)
    # As how many independent rows the places of a sample count decides how far correlations are shrunk, and by how much
    # each channel counts for more than it seems to.
    np.testing.assert_allclose(correlations(found.covariance), correlations(expected.covariance), atol=0.02)
    plain = expected.strength / np.sqrt(np.outer(1 + errors, 1 + errors))
    other = found.strength / np.sqrt(np.outer(1 + more_errors, 1 + more_errors))
    np.testing.assert_allclose(other, plain, rtol=1e-3)
