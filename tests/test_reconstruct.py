"""Reconstruction: segments are the whole network, views are views, and no segment gets worse on what was held back."""

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import onnxfuse
from onnxfuse import Compressed, changes
from onnxfuse.analysis import analyse
from onnxfuse.arrays import FloatArray
from onnxfuse.calibration.images import MOST_VIEWS, image_inputs, split_and_vary
from onnxfuse.calibration.linear import ending_of, linear_nodes
from onnxfuse.calibration.reconstruct import best_on_the_way
from onnxfuse.calibration.refit import Refit, refit_network
from onnxfuse.calibration.segments import Segment, cut_into_segments
from onnxfuse.calibration.walk import Walk
from onnxfuse.config import Provider
from onnxfuse.coupling.groups import ChannelGraph
from onnxfuse.graph.files import read_model
from onnxfuse.graph.view import GraphView
from onnxfuse.proof.samples import Samples, load_samples
from onnxfuse.statistics.descent import descend
from tests.builders import AnyArray, Net, initializers, run_ort
from tests.families import FAMILIES
from tests.laws import analysis_of, assert_only_weights_differ, assert_valid

MODELS = Path(__file__).resolve().parent.parent / "models"
FILES = ("digits_bn.onnx", "digits_folded.onnx", "digits_dynamo_bn.onnx")
# A quarter of the usual effort does for all that is said here.
EFFORT = 0.25


@cache
def images(name: str, count: int) -> AnyArray:
    """Return some digits."""
    found: AnyArray = np.load(MODELS / f"digits_{name}.npz")["image"][:count]
    return found


@cache
def compressed(file: str, effort: float) -> Compressed:
    """Compress an example network hard on the digits that are for calibration."""
    samples = {"image": images("calibration", 256)}
    return onnxfuse.compress(
        MODELS / file, calibration=samples, target="macs=0.35", effort=effort, prove=False, provider="cpu"
    )


def gap(original: onnx.ModelProto, model: onnx.ModelProto) -> float:
    """Return the share of the logits' variance by which two networks differ on digits that nothing was fitted on."""
    feeds = {"image": images("test", 450)}
    y, z = (next(iter(run_ort(m, feeds).values())).astype(np.float64) for m in (original, model))
    return float(((y - z) ** 2).sum() / ((y - y.mean(axis=0)) ** 2).sum())


@cache
def channels_of(file: str) -> ChannelGraph:
    """Return the channels of an example network."""
    return analysis_of(onnx.load(MODELS / file)).channels


@pytest.mark.parametrize("file", FILES)
def test_no_segment_gets_worse_and_the_whole_gets_better(file: str) -> None:
    """Every segment misses no more of what was held back; the outputs move less on digits that were never seen."""
    without, result = compressed(file, 0.0), compressed(file, EFFORT)
    assert without.report.reconstructions == ()
    # Each layer behind fused channels is in one segment.
    linear = {node.node.name for node in linear_nodes(GraphView(onnx.load(MODELS / file)), channels_of(file))}
    nodes = [node for found in result.report.reconstructions for node in found.nodes if node in linear]
    assert sorted(nodes) == sorted({refit.node for refit in result.report.refits})
    for found in result.report.reconstructions:
        assert found.error_before is not None
        assert found.error_after is not None
        assert 0 <= found.error_after <= found.error_before
        assert (found.steps > 0) == (found.error_after < found.error_before) == (not found.kept)
    assert any(found.steps for found in result.report.reconstructions)
    original = onnx.load(MODELS / file)
    assert gap(original, result.model) < 0.9 * gap(original, without.model)


@pytest.mark.parametrize("file", FILES)
def test_where_segments_end_layers_are_fitted_once_more(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the reconstruction, those layers alone that end where a segment does; none gets worse."""
    calls: list[tuple[set[str] | None, list[Refit]]] = []

    def recorded(*arguments: Any) -> list[Refit]:
        found = refit_network(*arguments)
        calls.append((arguments[7] if len(arguments) > 7 else None, found))
        return found

    monkeypatch.setattr(changes, "refit_network", recorded)
    report = compressed.__wrapped__(file, EFFORT).report
    (everywhere, first), (ends, again) = calls
    assert everywhere is None
    assert ends == {found.value for found in report.reconstructions}
    assert tuple(first) == report.refits
    assert {"reconstruct", "refit ends"} <= set(report.seconds)
    graph = GraphView(onnx.load(MODELS / file))
    channels = channels_of(file)
    values = {linear.node.name: ending_of(linear, graph, channels).value for linear in linear_nodes(graph, channels)}
    fitted = {refit.node for refit in again}
    assert fitted
    assert fitted < {refit.node for refit in first}
    assert {values[node] for node in fitted} <= {found.value for found in report.reconstructions}
    assert all(refit.error_after <= refit.error_before for refit in again)


@pytest.mark.parametrize("file", FILES)
def test_only_numbers_differ_from_a_run_without(file: str) -> None:
    """Nodes, names and shapes are as without it."""
    without, result = compressed(file, 0.0).model, compressed(file, EFFORT).model
    assert_valid(result)
    assert_only_weights_differ(without, result)
    before, after = initializers(without), initializers(result)
    assert {n: (a.shape, a.dtype) for n, a in before.items()} == {n: (a.shape, a.dtype) for n, a in after.items()}


def test_the_same_seed_gives_the_same_bytes() -> None:
    """Two runs with the same seed agree in every byte of the graph; another seed gives other weights."""
    first, again, other = (
        onnxfuse.compress(
            MODELS / "digits_bn.onnx",
            calibration={"image": images("calibration", 64)},
            target="macs=0.5",
            effort=0.2,
            seed=seed,
            prove=False,
            provider="cpu",
        ).model.graph
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_nothing_changes_where_nothing_was_removed() -> None:
    """At ratio 0 every weight stays bit-identical, whatever the effort."""
    source = MODELS / "digits_bn.onnx"
    result = onnxfuse.compress(source, ratio=0, calibration={"image": images("calibration", 64)}, provider="cpu")
    before, after = initializers(onnx.load(source)), initializers(result.model)
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["unet", "densenet", "vit_fused", "convnext", "se", "lstm", "embedding", "two_towers"])
def test_every_kind_of_network_goes_through(name: str) -> None:
    """Networks with crossing values, gates, attention, recurrence or tokens are fitted as far as they can be."""
    matching = [family for family in FAMILIES if family.startswith(name)]
    for family in matching[:1]:
        net = FAMILIES[family].net()
        rng = np.random.default_rng(0)
        samples = {
            key: rng.normal(size=(24, *value.shape[1:])).astype(value.dtype)
            if value.dtype.kind == "f"
            else rng.integers(0, 5, (24, *value.shape[1:])).astype(value.dtype)
            for key, value in net.feeds.items()
        }
        result = onnxfuse.compress(net.model(), ratio=0.5, calibration=samples, effort=0.1, prove=False, provider="cpu")
        for found in result.report.reconstructions:
            assert found.kept or (found.error_after or 0) < (found.error_before or 0)
        run_ort(result.model, net.feeds)


def test_one_broken_sample_spoils_nothing() -> None:
    """A sample that is not finite is left out; the others still decide."""
    samples = images("calibration", 256).copy()
    samples[3] = np.nan
    result = onnxfuse.compress(
        MODELS / "digits_bn.onnx",
        calibration={"image": samples},
        target="macs=0.4",
        effort=0.3,
        prove=False,
        provider="cpu",
    )
    assert any(found.steps for found in result.report.reconstructions)


def test_what_has_no_gradient_is_said() -> None:
    """A segment with an operator whose gradient is not known keeps its weights, and the report says why."""
    net = Net()
    x = net.input(1, 6, 4, 4, batch="n")
    h = net.node("Relu", net.conv(x, 12))
    net.output(net.conv(net.node("LRN", net.conv(h, 12), size=3), 4))
    samples = {x: np.random.default_rng(0).normal(size=(64, 6, 4, 4)).astype(np.float32)}
    report = onnxfuse.compress(net.model(), ratio=0.5, calibration=samples, prove=False, provider="cpu").report
    assert [found for found in report.reconstructions if "LRN" in found.kept]


@pytest.mark.parametrize(("classes", "is_fitted"), [(8, True), (40, False)])
def test_too_few_samples_for_the_classes_fit_no_segment(classes: int, *, is_fitted: bool) -> None:
    """What ends in more classes than samples can tell of keeps the weights of the refit."""
    net = Net()
    x = net.input(1, 6, 4, 4, batch="n")
    h = net.node("Relu", net.conv(net.node("Relu", net.conv(x, 12)), 12))
    net.output(net.gemm(net.node("Flatten", net.node("GlobalAveragePool", h)), classes))
    samples = {x: np.random.default_rng(0).normal(size=(48, 6, 4, 4)).astype(np.float32)}
    report = onnxfuse.compress(net.model(), ratio=0.5, calibration=samples, prove=False, provider="cpu").report
    (found,) = report.reconstructions
    assert found.nodes
    assert (found.error_before is not None) == is_fitted
    assert ("too few samples" in found.kept) == (not is_fitted)


@given(middle=st.floats(0.0, 2.0), breaks=st.booleans())
def test_weights_go_as_far_as_is_best(*, middle: float, breaks: bool) -> None:
    """Of four shares of the way the one with the least error is taken; what is not a number is not."""
    start, end = {"w": np.array([1.0, 0.0])}, {"w": np.array([1.0, 4.0])}

    def error(at: Mapping[str, FloatArray]) -> float:
        share = float(at["w"][1]) / 4.0
        return math.nan if breaks and share > 0.5 else (share - middle) ** 2

    found, least = best_on_the_way(start, end, error)
    shares = (0.25, 0.5) if breaks else (0.25, 0.5, 0.75, 1.0)
    assert least == min((share - middle) ** 2 for share in shares)
    assert found["w"][0] == 1.0
    assert error(found) == least


# Segments -------------------------------------------------------------------------------------------------------------


def segments_of(model: onnx.ModelProto) -> tuple[GraphView, list[Segment]]:
    """Cut a network where its convolutions and products are."""
    graph = GraphView(model)
    linear = [node.index for node in graph.nodes if node.op in {"Conv", "ConvTranspose", "Gemm", "MatMul"}]
    return graph, cut_into_segments(graph, linear, lambda _: True, lambda _: True)


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_one_after_the_other_are_the_network(family: str) -> None:
    """Segments are all nodes in order, and running them one by one gives what the network gives."""
    net = FAMILIES[family].net(2)
    model = net.model()
    graph, segments = segments_of(model)
    assert [node.index for segment in segments for node in segment.nodes] == list(range(len(graph.nodes)))
    batches = {len(value) for value in net.feeds.values()}
    samples = Samples(net.feeds, {k: v.shape for k, v in net.feeds.items()}, "", frozenset(net.feeds), batches.pop())
    walk = Walk(model, samples, Provider.CPU)
    values: dict[str, AnyArray] = dict(net.feeds)
    for segment in segments:
        assert all(read in values for read in segment.inputs)
        part = walk.part(segment.nodes, segment.outputs)
        values |= run_ort(part, {info.name: values[info.name] for info in part.graph.input})
        for name in segment.outputs:
            walk.values(name)
    for output, value in run_ort(model, net.feeds).items():
        np.testing.assert_allclose(values[output], value, rtol=1e-4, atol=1e-5)


def test_a_cut_is_where_one_whole_value_goes_on() -> None:
    """A segment is some residual blocks, not parts of them."""
    graph, segments = segments_of(FAMILIES["resnet20"].net().model())
    assert len(segments) >= 3
    for segment in segments[:-1]:
        assert len(segment.outputs) == 1
        assert graph.nodes[graph.producers[segment.outputs[0]]].op == "Add"
        assert 6 <= sum(node.op == "Conv" for node in segment.nodes) <= 8


def test_copies_of_constants_do_not_cross() -> None:
    """Equal biases that an exporter makes of one another, in front of all layers, change no cut."""
    model = FAMILIES["resnet20"].net().model()
    plain, segments = segments_of(model)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    for number in (5, 12, 18):
        bias = numpy_helper.from_array(np.zeros(4, np.float32), f"bias{number}")
        model.graph.initializer.append(bias)
        model.graph.node.insert(0, helper.make_node("Identity", [bias.name], [f"copy{number}"]))
        assert len(convolutions[number].input) == 2
        convolutions[number].input.append(f"copy{number}")
    graph, found = segments_of(model)
    assert [segment.outputs for segment in found] == [segment.outputs for segment in segments]
    assert [segment.inputs for segment in found] == [segment.inputs for segment in segments]
    names = [[node.title for node in segment.nodes if node.op != "Identity"] for segment in found]
    assert names == [[node.title for node in segment.nodes] for segment in segments]
    assert sum(node.op == "Identity" for segment in found for node in segment.nodes) == 3
    assert len(graph.nodes) == len(plain.nodes) + 3


@st.composite
def branching(draw: st.DrawFn) -> tuple[onnx.ModelProto, set[str], set[str]]:
    """Draw a network of layers and sums, which of its values are whole, and at which no segment may end."""
    net = Net()
    made = [net.input(1, 4, 5, 5)]
    for _ in range(draw(st.integers(1, 30))):
        newest = made[-1]
        kind = draw(st.sampled_from(("conv", "conv", "conv", "relu", "add")))
        if kind == "add":
            made.append(net.node("Add", newest, draw(st.sampled_from(made))))
        else:
            made.append(net.conv(newest, 4) if kind == "conv" else net.node("Relu", newest))
    net.output(made[-1])
    return net.model(), draw(st.sets(st.sampled_from(made))), draw(st.sets(st.sampled_from(made[:-1])))


@given(branching())
def test_segments_end_at_the_first_good_value(drawn: tuple[onnx.ModelProto, set[str], set[str]]) -> None:
    """No segment but the last ends where it must not, or goes past a whole value once it is long enough."""
    model, whole, closed = drawn
    graph = GraphView(model)
    linear = [node.index for node in graph.nodes if node.op == "Conv"]
    found = cut_into_segments(graph, linear, lambda name: name in whole, lambda name: name not in closed)
    assert [node.index for segment in found for node in segment.nodes] == list(range(len(graph.nodes)))
    for segment in found:
        start, stop = segment.nodes[0].index, segment.nodes[-1].index + 1
        is_last = stop == len(graph.nodes)
        counts = {s: sum(start <= index < s for index in linear) for s in range(start + 1, stop + 1)}
        crossing = {s: set(segment_outputs(graph, s)) for s in counts}
        possible = [s for s in counts if counts[s] and not crossing[s] & closed and not (is_last and s == stop)]
        single = [s for s in possible if len(crossing[s]) == 1]
        assert is_last or stop in possible
        # From six layers on the first whole value is an end.
        long = [s for s in single if counts[s] >= 6 and crossing[s] <= whole]
        assert long in ([], [stop])
        if not is_last and not long:
            # Otherwise it has four and ends at a single value, unless there is none.
            assert (stop in single and counts[stop] >= 4) or not [s for s in single if counts[s] >= 4]
        if counts[stop] > 12 or (is_last and counts[stop] >= 8):
            # It is longer than it should be only where it can't be cut.
            assert not [s for s in single if 4 <= counts[s] < counts[stop]]


def segment_outputs(graph: GraphView, stop: int) -> list[str]:
    """Return the values made before a node that it or others from it on read, or that the network gives."""
    made = [name for node in graph.nodes[:stop] for name in node.outputs]
    read = {name for node in graph.nodes[stop:] for name in node.inputs} | set(graph.outputs)
    return [name for name in made if name in read]


# Descent --------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(1, 4), st.floats(0.01, 100.0))
def test_descent_finds_the_least_of_a_bowl(seed: int, size: int, scale: float) -> None:
    """It finds the middle of a quadratic bowl of any size, and does not change where it started."""
    rng = np.random.default_rng(seed)
    middle, start = scale * rng.normal(size=size), scale * rng.normal(size=size)
    kept = start.copy()
    found = descend({"w": start}, {"w": scale}, lambda at, _: {"w": at["w"] - middle}, 400, 0.1)
    assert np.abs(found["w"] - middle).max() < 0.05 * scale
    assert np.array_equal(start, kept)


def test_a_gradient_whose_square_overflows_makes_no_step() -> None:
    """Single precision ends at 3e38: nothing is warned of, and the array stays as it was."""
    steep = np.full(3, 1e25, np.float32)
    found = descend({"w": np.ones(3)}, {"w": 1.0}, lambda *_: {"w": steep}, 3, 0.1)
    np.testing.assert_array_equal(found["w"], np.ones(3))


# Views ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("views", range(1, MOST_VIEWS + 1))
def test_views_are_of_images_to_fit_on_alone(views: int, *, channels_last: bool) -> None:
    """Images that are held back come as they are and have no views; the others have as many as asked for."""
    net = Net()
    x = net.input(*((1, 8, 10, 3) if channels_last else (1, 3, 8, 10)), batch="n")
    net.output(net.node("Relu", x))
    graph = GraphView(net.model())
    rng = np.random.default_rng(0)
    array = rng.normal(size=(40, *net.dims(x)[1:])).astype(np.float32)
    # Every image has a mean of its own that no view changes.
    array += 100.0 * np.arange(40, dtype=np.float32).reshape(-1, 1, 1, 1)
    samples = load_samples({x: array}, graph)
    analysis = analyse(read_model(net.model()), graph, samples)
    found = image_inputs(analysis, samples)
    assert found[x].channels_last == channels_last
    split = split_and_vary(samples, found, views, 8, rng)
    assert split is not None
    runs = list(split.samples.feeds())
    fitted, held = (np.concatenate([run[x] for run in part]) for part in (runs[: split.used], runs[split.used :]))
    numbers = [np.rint(part.mean(axis=(1, 2, 3)) / 100.0).astype(int) for part in (fitted, held)]
    assert np.array_equal(held, array[numbers[1]])
    assert set(numbers[0]).isdisjoint(numbers[1])
    assert set(numbers[0]) | set(numbers[1]) == set(range(40))
    assert set(np.unique(numbers[0], return_counts=True)[1]) == {views}


def test_too_few_samples_are_not_split() -> None:
    """One sample can't be held back and fitted on."""
    net = Net()
    x = net.input(1, 4)
    net.output(net.node("Relu", x))
    samples = load_samples({x: np.ones((1, 4), np.float32)}, GraphView(net.model()))
    assert split_and_vary(samples, {}, 1, 8, np.random.default_rng(0)) is None
