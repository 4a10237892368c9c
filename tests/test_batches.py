"""More samples at once than a file states: where the network then computes the same, and no trace in the result."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

import onnxfuse
from onnxfuse.calibration.batches import for_samples, in_larger_runs, open_batch
from onnxfuse.config import Provider
from onnxfuse.proof.samples import Samples, load_samples, whole_batches
from tests.builders import AnyArray, Net, initializers, run_ort
from tests.laws import analysis_of, assert_only_weights_differ


def network(batch: str = "", *, head: str = "all") -> onnx.ModelProto:
    """A small classifier that reshapes to a stated batch of one, or, with ``batch``, to any."""
    net = Net(17, seed=3)
    x = net.input(1, 3, 8, 8, batch=batch)
    h = net.node("Relu", net.conv(x, 8, name="first", pads=[1, 1, 1, 1]))
    h = net.node("Relu", net.conv(h, 12, name="second", strides=[2, 2]))
    shape = {"all": [1, -1], "zero": [1, 12 * 9]}[head]
    flat = net.node("Reshape", h, net.constant(np.array([0, -1] if batch else shape, np.int64)))
    net.output(net.gemm(flat, 5, name="head", transB=1))
    return net.model()


def images(count: int) -> AnyArray:
    """Random inputs, each of another size."""
    rng = np.random.default_rng(5)
    found: AnyArray = (rng.normal(size=(count, 3, 8, 8)) * rng.uniform(0.5, 2, (count, 1, 1, 1))).astype(np.float32)
    return found


def given(model: onnx.ModelProto, count: int = 24) -> Samples:
    """Samples for the only input of a model."""
    analysis = analysis_of(model)
    return load_samples({next(iter(analysis.graph.inputs)): images(count)}, analysis.graph, "arrays")


@pytest.mark.parametrize("head", ["all", "zero"])
def test_an_opened_network_computes_the_same(head: str) -> None:
    """Many samples in one run give what each gives by itself."""
    model = network(head=head)
    larger = in_larger_runs(analysis_of(model), given(model), Provider.CPU)
    assert (larger.batch, larger.count, larger.divisible) == (24, 24, True)
    feeds = next(larger.feeds())
    name = next(iter(feeds))
    together = next(iter(run_ort(for_samples(model, larger), feeds).values()))
    apart = [next(iter(run_ort(model, {name: image[None]}).values())) for image in feeds[name]]
    np.testing.assert_allclose(together, np.concatenate(apart), rtol=1e-4, atol=1e-5)


def test_a_run_of_one_sample_takes_the_model_as_it_is() -> None:
    """So does a network that takes any number anyway."""
    model, anyway = network(), network("n")
    assert for_samples(model, given(model)) is model
    samples = given(anyway)
    assert samples.batch > 1
    assert for_samples(anyway, samples) is anyway
    assert in_larger_runs(analysis_of(anyway), samples, Provider.CPU) is samples


@pytest.mark.parametrize("kind", ["mixes", "heads", "state"])
def test_what_counts_on_its_batch_keeps_it(kind: str) -> None:
    """Samples that would see one another, or shapes that can't be told, stay apart."""
    net = Net(17, seed=1)
    x = net.input(1, 3, 8, 8)
    h = net.node("Relu", net.conv(x, 8, name="first"))
    if kind == "mixes":
        h = net.node("Sub", h, net.node("ReduceMean", h, axes=[0], keepdims=1))
    elif kind == "heads":
        dims = net.dims(h)
        h = net.node("Reshape", h, net.constant(np.array([4, 2, *dims[2:]], np.int64)))
        h = net.node("Softmax", h, axis=1)
        h = net.node("Reshape", h, net.constant(np.array(dims, np.int64)))
    else:
        h = net.node("Concat", h, net.constant(np.ones((1, 2, *net.dims(h)[2:]), np.float32)), axis=1)
    net.output(net.conv(h, 4, name="second"))
    model = net.model()
    samples = given(model)
    assert in_larger_runs(analysis_of(model), samples, Provider.CPU) is samples


def test_values_that_do_not_depend_on_the_samples_do_not_matter() -> None:
    """A value made of constants alone is the same for any number of samples."""
    net = Net(17, seed=2)
    x = net.input(1, 3, 8, 8)
    h = net.conv(x, 8, name="first")
    place = net.node("Sin", net.vector(*net.dims(h)))
    net.output(net.conv(net.node("Add", h, place), 4, name="second"))
    model = net.model()
    assert in_larger_runs(analysis_of(model), given(model), Provider.CPU).batch == 24


def test_the_result_states_what_the_original_states() -> None:
    """A file with a batch of one stays one, with the weights that the same file for any batch gets."""
    closed, free = (
        onnxfuse.compress(model, calibration={"x0": images(64)}, ratio=0.5, prove=False, provider="cpu")
        for model in (network(), network("n"))
    )
    assert_only_weights_differ(network(), closed.model)
    assert [d.dim_value for d in closed.model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 8, 8]
    assert {len(r) for r in (closed.report.refits, free.report.refits)} != {0}
    left, right = initializers(closed.model), initializers(free.model)
    for name in left.keys() & right.keys():
        if left[name].dtype.kind == "f":
            np.testing.assert_allclose(left[name], right[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_opening_touches_nothing_else() -> None:
    """The model at hand stays as it is; constants that others read stay in the opened one."""
    model = network()
    before = model.SerializeToString(deterministic=True)
    opened = open_batch(model)
    assert model.SerializeToString(deterministic=True) == before
    old = initializers(model)
    assert {name: v for name, v in initializers(opened).items() if name in old}.keys() == old.keys()
    assert not opened.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value")


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 100, 101, 127, 130, 509, 512])
def test_batches_leave_few_samples_out(count: int) -> None:
    """Nothing is left out of up to 64 samples, and never more than a batch of 16 would leave out."""
    batch, used = whole_batches(count)
    assert used % batch == 0
    assert used <= count
    assert count - used <= (0 if count <= 64 else min(count % 16, count // 16))


def test_samples_in_runs_of_a_stated_size_are_not_divided() -> None:
    """A network for eight samples at once gets eight."""
    net = Net(17, seed=4)
    net.output(net.conv(net.input(8, 3, 8, 8), 4, name="only"))
    model = net.model()
    samples = given(model)
    assert samples.in_batches(2) is samples
    assert replace(samples, divisible=True).in_batches(3).batch == 3


def test_few_samples_in_a_run_are_still_for_an_opened_network() -> None:
    """Smaller runs, down to one sample, go through the same network; few samples are left out."""
    model = network()
    larger = in_larger_runs(analysis_of(model), given(model, 53), Provider.CPU)
    assert larger.batch == 53
    for most, count in ((19, 52), (7, 52), (1, 53)):
        fewer = larger.in_batches(most)
        assert (fewer.batch <= most, fewer.count, fewer.divisible) == (True, count, True)
        assert for_samples(model, fewer) is not model


def test_a_reconstruction_of_a_closed_network_takes_any_number_of_samples() -> None:
    """A prime number of samples is cut into other runs on the way."""
    made = onnxfuse.compress(network(), calibration={"x0": images(53)}, ratio=0.5, prove=False, provider="cpu")
    assert made.report.reconstructions


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("given", [0, 64])
@pytest.mark.parametrize("options", [{"method": "prune"}, {"effort": 0}], ids=str)
def test_a_batch_that_is_open_by_name_alone(batch: int, given: int, options: dict[str, Any]) -> None:
    """A traced network may state an open batch and compute with the one that it was traced with."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]> net (float[n, 3, 8, 8] x) => (float[n, 5] y)
        <int64[2] flat = {{{batch}, -1}}> {{ h = Conv(x, w)  g = Relu(h)  f = Reshape(g, flat)  y = Gemm(f, v) }}
    """)
    for name, dims in {"w": (8, 3, 3, 3), "v": (8 * 36, 5)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=dims).astype(np.float32), name))
    data = {"x": rng.normal(size=(given, 3, 8, 8)).astype(np.float32)} if given else None
    result = onnxfuse.compress(model, ratio=0.5, calibration=data, provider="cpu", **options)
    first = result.report.groups[0]
    assert (first.channels_before, first.channels_after) == (8, 4)
