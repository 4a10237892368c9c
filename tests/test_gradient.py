"""Gradients: every rule, and whole networks, against finite differences; losses against theirs."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from onnx import TensorProto

from onnxfuse.arrays import IntArray
from onnxfuse.config import Provider
from onnxfuse.errors import DataError, UnsupportedGraphError
from onnxfuse.gradient import Batch, stream, stream_gradients
from onnxfuse.gradient.expressions import Rule
from onnxfuse.gradient.loss import CrossEntropy, HalfSquares, choose_loss
from onnxfuse.gradient.rules import DEFAULT_RULES, linear
from onnxfuse.graph.view import GraphView
from onnxfuse.proof.samples import Samples, load_samples
from tests.builders import AnyArray, Arrays, Net, run_ort, run_ort_all, run_reference
from tests.examples import EXAMPLES, Example
from tests.gradients import LinearLoss, assert_gradients, in_double
from tests.strategies import RandomNet, nets

INT64 = np.int64
# Operators that ONNX's own evaluator does not know in the version or the form of the examples, or computes in single
# precision or in another way than the standard says; steps are wider there, and these networks have no kinks.
IN_RUNTIME = {
    *("AveragePool", "BatchNormalization", "ConvTranspose", "Erf", "Gelu", "GroupNormalization", "LogSoftmax", "Pad"),
    *("Mean", "QuickGelu", "Resize", "SimplifiedLayerNormalization", "Softmax", "Upsample"),
}


def conv(label: str, width: int = 4, group: int = 1, dims: Sequence[int] = (4, 7, 8), **attributes: Any) -> Example:
    """One convolution of a kind."""

    def build(net: Net) -> None:
        net.output(net.conv(net.input(2, *dims), width, (3, 2, 2)[: len(dims) - 1], group=group, **attributes))

    return Example("Conv", label, build)


def simple(op: str, label: str, *dims: int, opset: int = 17, domain: str = "", **attributes: Any) -> Example:
    """One operator on one input."""

    def build(net: Net) -> None:
        if domain:
            net.domains[domain] = 1
        x = net.input(*dims)
        net.output(net.node(op, x, domain=domain, like=x if domain else "", **attributes))

    return Example(op, label, build, opset=opset, domain=domain)


def operands(op: str, label: str, *shapes: Sequence[int], opset: int = 17, **attributes: Any) -> Example:
    """One operator on several inputs, none of them constant."""

    def build(net: Net) -> None:
        net.output(net.node(op, *(net.input(*dims) for dims in shapes), **attributes))

    return Example(op, label, build, opset=opset)


def made(op: str, label: str, build: Callable[[Net], str], opset: int = 17) -> Example:
    """A network that ends in what a function returns."""
    return Example(op, label, lambda net: net.output(build(net)), opset=opset)


def _slice(net: Net) -> str:
    return net.slice(net.input(2, 7, 6), [5, -1, 0], [0, -9, 9], [1, 2, 0], [-2, -1, 1])


def _gather(net: Net, axis: int, *indices: int, shape: Sequence[int]) -> str:
    return net.node("Gather", net.input(2, 5, 3), net.constant(np.array(indices, INT64).reshape(shape)), axis=axis)


_UPS: Mapping[str, Mapping[str, Any]] = {
    "strides": {"strides": [2, 3], "pads": [1, 0, 1, 2]},
    "more at the end": {"strides": [2, 3], "output_padding": [1, 2]},
    "dilations and groups": {"dilations": [2, 1], "group": 2, "pads": [1, 1, 0, 1]},
    "output shape": {"strides": [2, 2], "output_shape": [10, 9]},
    "same upper": {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
    "same lower": {"strides": [2, 2], "auto_pad": "SAME_LOWER"},
}


def _up(net: Net, more: Mapping[str, Any]) -> str:
    return net.conv_transpose(net.input(2, 4, 5, 4), 6, 3, **more)


def _padded(net: Net, mode: str) -> str:
    return net.pad(net.input(2, 4, 5), [0, 2, -1, 1, 1, 3], mode=mode)


def _resize(net: Net, how: str, nearest: str, scale: float) -> str:
    scales = net.constant(np.array([1, 1, scale, scale], np.float32), dtype=TensorProto.FLOAT)
    x = net.input(1, 2, 4, 5)
    return net.node("Resize", x, "", scales, mode="nearest", coordinate_transformation_mode=how, nearest_mode=nearest)


def _interpolated(net: Net, how: str, scale: float) -> str:
    scales = net.constant(np.array([1, 1, scale, 2.0], np.float32), dtype=TensorProto.FLOAT)
    x = net.input(1, 2, 4, 5)
    return net.node("Resize", x, "", scales, mode="linear", coordinate_transformation_mode=how)


_CONTRACTIONS: Mapping[str, Sequence[Sequence[int]]] = {
    "abc,cd->abd": [(2, 3, 4), (4, 5)],
    "ab,bc,cd->da": [(2, 3), (3, 4), (4, 2)],
    "abc,ab->b": [(2, 3, 4), (2, 3)],
    "ab->b": [(3, 4)],
    "bhid,bhjd->bhij": [(2, 2, 3, 4), (2, 2, 5, 4)],
}


def _contracted(net: Net, equation: str, shapes: Sequence[Sequence[int]]) -> str:
    return net.node("Einsum", *(net.input(*shape) for shape in shapes), equation=equation)


def _unread_part(net: Net) -> str:
    first, _, third = net.split(net.input(2, 6), [1, 2, 3], 3)
    return net.node("Concat", third, first, axis=1)


def _quantised(net: Net, *, steps: bool) -> None:
    x = net.input(3, 4, 6, 6)
    h = net.node("Relu", net.conv(x, 5))
    if steps:
        zero = net.constant(np.array(0, np.uint8))
        net.initializers[-1].data_type = TensorProto.UINT8
        h = net.node("QuantizeLinear", h, net.constant(np.float32(0.02)), zero)
        h = net.node("MaxPool", h, kernel_shape=[2, 2], strides=[2, 2])
        h = net.node("DequantizeLinear", h, net.constant(np.float32(0.02)), zero)
    else:
        h = net.node("MaxPool", h, kernel_shape=[2, 2], strides=[2, 2])
    net.output(net.gemm(net.node("Flatten", h), 3, transB=1))


OWN = (
    conv("plain", pads=[0, 0, 0, 0]),
    conv("strides with a rest", strides=[2, 3], pads=[1, 0, 0, 1]),
    conv("dilations", dilations=[2, 3], pads=[2, 1, 1, 2]),
    conv("groups", width=6, group=2, strides=[2, 1], pads=[1, 1, 0, 0]),
    conv("depthwise", width=8, group=4, dilations=[1, 2], pads=[1, 1, 1, 1]),
    conv("depthwise, one filter each", group=4, dilations=[2, 1], pads=[2, 1, 1, 0]),
    conv("depthwise, one filter each, more padding than taps", group=4, pads=[3, 0, 0, 3]),
    conv("depthwise, one filter each, strides", group=4, strides=[2, 1], pads=[1, 1, 1, 1]),
    conv("depthwise, one filter each, three axes", dims=(4, 5, 4, 5), group=4, pads=[1] * 6),
    conv("same upper", auto_pad="SAME_UPPER", strides=[2, 2]),
    conv("same lower", auto_pad="SAME_LOWER", strides=[2, 3]),
    conv("valid", auto_pad="VALID", strides=[3, 3]),
    conv("one axis", dims=(4, 9), strides=[2], pads=[1, 1]),
    conv("three axes", dims=(4, 5, 4, 5), strides=[2, 1, 2], pads=[1] * 6),
    *(made("ConvTranspose", label, partial(_up, more=more)) for label, more in _UPS.items()),
    *(
        operands(
            "Gemm", f"{ta}{tb}", (3, 4)[:: 1 - 2 * ta], (4, 2)[:: 1 - 2 * tb], (2,), transA=ta, transB=tb, alpha=0.7
        )
        for ta in (0, 1)
        for tb in (0, 1)
    ),
    operands("Gemm", "without C", (3, 4), (4, 2), opset=13),
    operands("Gemm", "C as a column", (3, 4), (4, 2), (3, 1), beta=2.0),
    operands("MatMul", "stacks", (2, 1, 3, 4), (5, 4, 2)),
    operands("MatMul", "vectors", (4,), (4,)),
    operands("MatMul", "vector first", (4,), (2, 4, 3)),
    operands("MatMul", "vector last", (2, 3, 4), (4,)),
    *(operands(op, "broadcast", (2, 1, 4), (3, 1)) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean")),
    made(
        "Where",
        "broadcast",
        lambda net: net.node("Where", net.constant(np.array([True, False, True])), net.input(2, 3), net.input(2, 1)),
    ),
    made("Mul", "a value with itself", lambda net: net.node("Mul", *[net.node("Tanh", net.input(2, 3))] * 2)),
    made("Pow", "square", lambda net: net.node("Pow", net.input(2, 3), net.constant(np.array(2, INT64)))),
    made(
        "Pow",
        "by channel",
        lambda net: net.node("Pow", net.node("Exp", net.input(2, 3)), net.constant(np.array([0.5, -1.0, 3.0]))),
    ),
    made("PRelu", "computed slope", lambda net: net.node("PRelu", net.input(2, 3, 4), net.input(3, 1))),
    simple("Gelu", "exact", 2, 5, opset=20),
    simple("Gelu", "tanh", 2, 5, opset=20, approximate="tanh"),
    simple("QuickGelu", "own", 2, 5, domain="com.microsoft", alpha=1.3),
    simple("LeakyRelu", "default", 2, 9),
    simple("Swish", "steep", 2, 9, opset=24, alpha=1.5),
    simple("HardSwish", "wide", 4, 9),
    *(
        simple("AveragePool", label, 2, 3, 7, 8, opset=opset, **more)
        for label, opset, more in (
            ("overlapping", 17, {"kernel_shape": [3, 2], "strides": [2, 1]}),
            ("padded", 17, {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 1, 2]}),
            ("padding counts", 17, {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
            ("same", 17, {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
            ("beyond the end", 19, {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
            ("dilated", 19, {"kernel_shape": [2, 2], "dilations": [2, 3]}),
        )
    ),
    *(
        simple("MaxPool", label, 2, 3, 7, 8, **more)
        for label, more in (
            ("overlapping", {"kernel_shape": [3, 2], "strides": [2, 1]}),
            ("padded", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 1, 2]}),
            ("beyond the end", {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
            ("dilated", {"kernel_shape": [2, 2], "dilations": [2, 3]}),
        )
    ),
    made(
        "LayerNormalization",
        "two axes",
        lambda net: net.node(
            "LayerNormalization", net.input(2, 3, 4), net.input(3, 4), net.input(3, 4), axis=1, epsilon=0.01
        ),
    ),
    made(
        "InstanceNormalization",
        "computed",
        lambda net: net.node("InstanceNormalization", net.input(2, 3, 4, 5), net.input(3), net.input(3)),
    ),
    made(
        "GroupNormalization",
        "scales of groups",
        lambda net: net.node(
            "GroupNormalization", net.input(2, 6, 4), net.vector(2), net.vector(2), num_groups=2, like="x0"
        ),
        opset=18,
    ),
    made(
        "BatchNormalization",
        "computed",
        lambda net: net.node(
            "BatchNormalization", net.input(2, 3, 4), net.input(3), net.input(3), net.input(3), net.constant(np.ones(3))
        ),
    ),
    simple("Softmax", "in the middle", 2, 3, 4, axis=1),
    simple("LogSoftmax", "last", 2, 3, 4),
    made("Slice", "backwards", _slice),
    made("Gather", "repeated", lambda net: _gather(net, 1, 0, 3, 3, -1, shape=(2, 2))),
    made("Gather", "one", lambda net: _gather(net, 2, 1, shape=())),
    *(made("Pad", mode, partial(_padded, mode=mode), opset=19) for mode in ("constant", "edge", "reflect", "wrap")),
    *(
        made("Resize", f"{how} {nearest} {scale}", partial(_resize, how=how, nearest=nearest, scale=scale))
        for how in ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
        for nearest in ("round_prefer_floor", "floor", "ceil", "round_prefer_ceil")
        for scale in (2.0, 3.0, 0.5)
    ),
    *(
        made("Resize", f"linear {how} {scale}", partial(_interpolated, how=how, scale=scale))
        for how in ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
        for scale in (2.0, 2.5, 0.5, 0.25)
    ),
    *(
        made("Einsum", equation, partial(_contracted, equation=equation, shapes=shapes))
        for equation, shapes in _CONTRACTIONS.items()
    ),
    made("Split", "a part that nothing reads", _unread_part),
    simple("Transpose", "default", 2, 3, 4),
    simple("SpaceToDepth", "two", 1, 2, 4, 4, blocksize=2),
    *(simple("DepthToSpace", mode, 1, 8, 2, 3, blocksize=2, mode=mode) for mode in ("DCR", "CRD")),
    *(
        simple("ReduceMean", f"axes {axes} {keep}", 2, 3, 4, axes=axes, keepdims=keep)
        for axes in ([1], [0, -1])
        for keep in (0, 1)
    ),
    simple("ReduceL2", "everything", 2, 3, 4),
    Example("QuantizeLinear", "between", partial(_quantised, steps=True)),
)

RULED = {(rule.domain, rule.op) for rule in DEFAULT_RULES}
# Examples with rules that say themselves why there is no gradient, and one that ONNX Runtime does not run.
REFUSED = (
    "Pow-two-17",
    "Pow-constant first-17",
    "BatchNormalization-training-17",
    "BatchNormalization-per element-8",
    *(f"Einsum-{label}-17" for label in ("ellipsis", "implicit", "diagonal")),
)
# Steps have no slope; see `test_gradients_go_straight_through_quantisation`.
STEPPED = {"QuantizeLinear", "DequantizeLinear"}
SMOOTH = [
    pytest.param(example, id=f"{'own-' if example in OWN else ''}{example.name}")
    for example in (*EXAMPLES, *OWN)
    if (example.domain, example.op) in RULED and example.name not in {*REFUSED, "Split-uneven-18"}
    if example.op not in STEPPED
]


def one_run(feeds: Arrays) -> Samples:
    """One run with just these feeds."""
    arrays = {name: feed[None] for name, feed in feeds.items()}
    return Samples(arrays, {name: feed.shape for name, feed in feeds.items()}, "feeds", frozenset(), 1)


def check(model: onnx.ModelProto, feeds: Arrays, names: Sequence[str] = (), *, single: bool = False) -> Batch:
    """Compare the gradients of a network's inputs, of everything that it computes, and of some weights."""
    everything = {**feeds, **run_ort_all(model, feeds)}
    loss = LinearLoss.of({o.name: everything[o.name] for o in model.graph.output})
    floats = [name for name, value in everything.items() if value.dtype.kind == "f"]
    batch = next(stream_gradients(GraphView(model), one_run(feeds), [*floats, *names], loss))
    assert_gradients(model, feeds, loss, batch.values, batch.gradients, single=single)
    return batch


@pytest.mark.parametrize("example", SMOOTH)
def test_rules_agree_with_finite_differences(example: Example) -> None:
    """The gradient of every input and of every value on the way is the slope of the loss."""
    net = example.net()
    batch = check(net.model(), net.feeds, single=example.op in IN_RUNTIME)
    assert any(gradient.any() for gradient in batch.gradients.values())


def test_every_rule_has_an_example() -> None:
    """A rule without an example is not tested, so there is none."""
    examples = [example for example in (*EXAMPLES, *OWN) if example.name not in REFUSED]
    covered = {(e.domain, e.op) for e in examples for n in e.net().nodes if (n.domain, n.op_type) == (e.domain, e.op)}
    assert RULED - covered == {("com.microsoft", "QuantizeLinear"), ("com.microsoft", "DequantizeLinear")}


def test_a_wrong_gradient_is_found() -> None:
    """The comparison fails for a gradient that is off by a hundredth, in one entry of many."""
    net = Net(17)
    net.output(net.conv(net.input(1, 2, 3, 3), 2))
    model, loss = net.model(), LinearLoss({net.outputs[0]: np.ones((1, 2, 3, 3))})
    batch = next(stream_gradients(GraphView(model), one_run(net.feeds), ["x0"], loss))
    assert_gradients(model, net.feeds, loss, batch.values, batch.gradients)
    wrong = batch.gradients["x0"].copy()
    wrong[0, 0, 1, 1] *= 1.5
    with pytest.raises(AssertionError, match="x0"):
        assert_gradients(model, net.feeds, loss, batch.values, {"x0": wrong})


@pytest.mark.parametrize("name", [*REFUSED, "LSTM-forward-14"])
def test_what_has_no_gradient_is_refused(name: str) -> None:
    """The complaint names the node and says what to do instead."""
    example = next(e for e in EXAMPLES if e.name == name)
    net = example.net()
    model = net.model()
    with pytest.raises(UnsupportedGraphError, match="no gradient is known through") as caught:
        next(stream_gradients(GraphView(model), one_run(net.feeds), ["x0"]))
    assert caught.value.where in {node.name for node in model.graph.node if node.op_type == example.op}
    assert "importance" in caught.value.mend


@pytest.mark.parametrize("name", ["Resize", "Pad", "MaxPool"])
def test_a_form_without_a_gradient_is_refused(name: str) -> None:
    """So is a known operator in a form that is not."""
    net = Net(17)
    x = net.input(1, 2, 4, 4)
    scales = net.constant(np.array([1, 1, 2, 2], np.float32), dtype=TensorProto.FLOAT)
    if name == "Resize":
        y = net.node("Resize", x, "", scales, mode="cubic")
    elif name == "Pad":
        widths = net.node("Cast", net.node("ReduceSum", x, keepdims=0), to=TensorProto.INT64)
        zeros = net.node("Mul", net.node("Expand", widths, net.constant(np.array([8]))), net.constant(np.array([0])))
        y = net.node("Pad", x, zeros, like=x)
    else:
        y = net.node("MaxPool", x, kernel_shape=[2, 2], storage_order=1)
    net.output(y)
    with pytest.raises(UnsupportedGraphError, match=name):
        next(stream_gradients(GraphView(net.model()), one_run(net.feeds), ["x0"], LinearLoss({})))


@given(net=nets(opsets=(17, 18)))
@settings(max_examples=40)
def test_random_networks_agree_with_finite_differences(net: RandomNet) -> None:
    """In whole networks, where many operators meet, gradients of all values are the slopes."""
    assume(_is_evaluated_well(net))
    check(net.model, net.feeds)


def _is_evaluated_well(net: RandomNet) -> bool:
    """Whether ONNX's own evaluator, which has gaps of its own, computes what ONNX Runtime does."""
    try:
        expected = run_reference(net.model, net.feeds)
    except (TypeError, ValueError, RuntimeError):
        return False
    actual = run_ort(net.model, net.feeds)
    return all(
        y.shape == actual[name].shape and np.allclose(y, actual[name], rtol=1e-2, atol=1e-3)
        for name, y in expected.items()
    )


WEIGHTED = [example for example in OWN if example.op in {"Conv", "ConvTranspose"}]


@pytest.mark.parametrize("example", WEIGHTED, ids=lambda e: e.name)
def test_weights_have_gradients_in_any_geometry(example: Example) -> None:
    """Gradients of weights and biases are slopes too."""
    net = example.net()
    check(net.model(), net.feeds, list(net.values), single=example.op == "ConvTranspose")


@pytest.mark.parametrize("many_places", [1, 10**9], ids=["one sample at a time", "all samples at once"])
@pytest.mark.parametrize("example", WEIGHTED, ids=lambda e: e.name)
def test_weights_have_gradients_tap_by_tap(example: Example, many_places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So are those from a product of matrices for each tap, which only wider layers take."""
    monkeypatch.setattr(linear, "_FEWEST_CHANNELS", 1)
    monkeypatch.setattr(linear, "_MANY_PLACES", many_places)
    net = example.net()
    check(net.model(), net.feeds, list(net.values), single=example.op == "ConvTranspose")


@pytest.mark.parametrize("example", WEIGHTED, ids=lambda e: e.name)
def test_weights_have_gradients_from_all_taps_at_once(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    """So are those from one product of matrices for all taps, and of single channels on large maps."""
    monkeypatch.setattr(linear, "_FEWEST_GATHERED", 1)
    monkeypatch.setattr(linear, "_FEWEST_STRIDED", 1)
    monkeypatch.setattr(linear, "_FEWEST_PLACES_OF_ONE", 1)
    net = example.net()
    check(net.model(), net.feeds, list(net.values), single=example.op == "ConvTranspose")


@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.INT32])
@pytest.mark.parametrize("axis", [0, 1])
def test_tables_have_gradients_wherever_tokens_point(axis: int, kind: int) -> None:
    """Rows that are looked up several times add up, negative indices count from the end, others get nothing."""
    net = Net(17, seed=3)
    table, tokens = net.weight(6, 6, name="table"), net.input(2, 3, dtype=kind)
    found = net.node("Gather", table, tokens, axis=axis)
    net.output(net.matmul(net.node("Tanh", found), 2, name="last"))
    net.feeds[tokens] = np.array([[1, 4, 1], [-2, 0, 5]], net.feeds[tokens].dtype)
    check(net.model(), net.feeds, list(net.values))


def test_weights_have_gradients_wherever_they_are() -> None:
    """So they are for weights behind a Cast, in the middle of a network, and where two nodes share one."""
    net = Net(17, seed=3)
    net.stored = TensorProto.FLOAT16
    x = net.input(2, 3, 4, 4)
    weight = net.weight(3, 3, 3, 3, name="shared")
    h = net.node("Relu", net.conv(x, 3, weight=weight))
    h = net.conv(h, 3, weight=weight)
    net.output(net.gemm(net.node("Flatten", h), 2, name="last"))
    check(net.model(), net.feeds, list(net.values))


@pytest.mark.parametrize("name", ["digits_bn", "digits_folded", "digits_dynamo"])
def test_a_trained_network_agrees_with_finite_differences(models: Path, name: str) -> None:
    """So they are in a trained network, where many activations are dead."""
    model = onnx.load(models / f"{name}.onnx")
    images = np.load(models / "digits_test.npz")
    key = model.graph.input[0].name
    check(model, {key: images[key][:3]})


def test_gradients_go_straight_through_quantisation() -> None:
    """A quantised network has about the gradients of the one that it was made from; nothing goes where it saturates."""
    plain, stepped = Net(17, seed=1), Net(17, seed=1)
    _quantised(plain, steps=False)
    _quantised(stepped, steps=True)
    loss = LinearLoss.of(run_ort(plain.model(), plain.feeds))
    found = []
    for net in (plain, stepped):
        renamed = LinearLoss({net.outputs[0]: next(iter(loss.weights.values()))})
        batch = next(stream_gradients(GraphView(net.model()), one_run(plain.feeds), ["x0"], renamed))
        found.append(batch.gradients["x0"])
    assert np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1] > 0.99
    saturated = {"x0": np.full_like(plain.feeds["x0"], 1e4)}
    batch = next(stream_gradients(GraphView(stepped.model()), one_run(saturated), ["x0"], renamed))
    assert not batch.gradients["x0"].any()


@pytest.mark.parametrize("each", [False, True])
def test_only_what_is_moved_by_more_than_rounding_saturates(*, each: bool) -> None:
    """The largest and the smallest integer pass gradients on for what they stand for, and not for what is beyond."""
    net = Net(17)
    scale, zero = (np.array([0.5]), [5]) if not each else (np.array([0.5, 0.25]), [5, -7])
    point = net.constant(np.array(zero, np.int8), dtype=TensorProto.INT8)
    parts = [net.constant(scale.astype(np.float32)), point]
    steps = np.array([[-128, -128], [127, 127], [-129, -129], [128, 128], [127.3, -128.3], [0.2, 3]]) - zero
    x = net.input(*steps.shape)
    net.feeds[x] = (steps * scale).astype(np.float32)
    net.output(net.node("DequantizeLinear", net.node("QuantizeLinear", x, *parts, axis=1), *parts, axis=1))
    loss = LinearLoss({net.outputs[0]: np.ones(steps.shape)})
    batch = next(stream_gradients(GraphView(net.model()), one_run(net.feeds), [x], loss))
    expected = np.ones(steps.shape) * np.array([1, 1, 0, 0, 1, 1])[:, None]
    np.testing.assert_allclose(batch.gradients[x], expected)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_other_precisions(kind: int) -> None:
    """Half precision is differentiated in single precision, double in double."""
    net = Net(17, seed=2, dtype=kind)
    h = net.node("Relu", net.gemm(net.input(3, 5), 6))
    net.output(net.gemm(h, 2))
    batch = check(net.model(), net.feeds) if kind == TensorProto.DOUBLE else None
    if batch is None:
        values = {**net.feeds, **run_ort_all(net.model(), net.feeds)}
        loss = LinearLoss.of({net.outputs[0]: values[net.outputs[0]]})
        batch = next(stream_gradients(GraphView(net.model()), one_run(net.feeds), [h, "x0"], loss))
        assert_gradients(in_double(net.model()), net.feeds, loss, batch.values, batch.gradients)
    wanted = np.float64 if kind == TensorProto.DOUBLE else np.float32
    assert {gradient.dtype for gradient in batch.gradients.values()} == {np.dtype(wanted)}


def dense(batch: int | str = "n", *, last: str = "") -> tuple[onnx.ModelProto, Samples, str]:
    """A classifier, twelve samples for it in runs of four, and the name of its hidden values."""
    net = Net(17, seed=6)
    x = net.input(1 if isinstance(batch, str) else batch, 5, batch=batch if isinstance(batch, str) else "")
    h = net.node("Relu", net.gemm(x, 6))
    y = net.gemm(h, 4)
    net.output(net.node(last, y, axis=-1) if last else y)
    model = net.model()
    arrays = {x: np.random.default_rng(1).normal(size=(12, 5)).astype(np.float32)}
    return model, load_samples(arrays, GraphView(model)).in_batches(4), h


def whole(model: onnx.ModelProto, samples: Samples, names: Sequence[str], **more: Any) -> list[Batch]:
    """Return all runs."""
    return list(stream_gradients(GraphView(model), samples, names, **more))


def entropy(scores: AnyArray, labels: IntArray) -> float:
    """The cross entropy, written down anew."""
    shifted = scores.astype(np.float64) - scores.max(axis=1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]).sum())


@pytest.mark.parametrize("last", ["", "Softmax", "LogSoftmax"])
def test_cross_entropy_is_what_it_says(last: str) -> None:
    """Its gradient is the slope of the cross entropy, whether a network returns scores or probabilities."""
    model, samples, _ = dense(last=last)
    labels = np.arange(12) % 4
    (x,) = samples.arrays
    gradient = np.concatenate([b.gradients[x] for b in whole(model, samples, [x], labels=labels)])
    scores, _, _ = dense()
    way = np.random.default_rng(3).normal(size=(12, 5))
    totals = []
    for step in (1e-6, -1e-6):
        moved = {x: samples.arrays[x] + step * way}
        totals.append(entropy(next(iter(run_reference(in_double(scores), moved).values())), labels))
    assert float((gradient * way).sum()) == pytest.approx((totals[0] - totals[1]) / 2e-6, rel=1e-3)


def test_without_labels_the_network_answers_itself() -> None:
    """The loss of a classifier is that with its own answers as labels; other networks get half squares."""
    model, samples, h = dense()
    own = next(iter(run_ort(model, dict(samples.arrays)).values())).argmax(axis=1)
    unlabelled, labelled = whole(model, samples, [h]), whole(model, samples, [h], labels=own)
    for a, b in zip(unlabelled, labelled, strict=True):
        np.testing.assert_array_equal(a.gradients[h], b.gradients[h])
    assert isinstance(choose_loss(GraphView(model), samples, Provider.CPU), CrossEntropy)


def test_drawn_classes_follow_what_the_network_predicts() -> None:
    """Drawn by a seed, each class comes as often as it is predicted, so that the mean gradient vanishes."""
    rows = np.log(np.tile([0.7, 0.2, 0.1], (4000, 1)))
    gradient = CrossEntropy(seed=1)({"y": rows}, 0)["y"]
    np.testing.assert_allclose(gradient.mean(axis=0), 0.0, atol=0.03)
    np.testing.assert_array_equal(gradient, CrossEntropy(seed=1)({"y": rows}, 0)["y"])
    assert not np.array_equal(gradient, CrossEntropy(seed=2)({"y": rows}, 0)["y"])


def test_half_squares_are_about_the_mean_and_relative() -> None:
    """Every output is compared with its own mean, and scales of outputs do not count."""
    net = Net(17, seed=8)
    x = net.input(1, 5, batch="n")
    first, second = net.gemm(x, 3), net.node("Mul", net.gemm(x, 2), net.constant(100.0))
    net.output(first, second)
    model = net.model()
    arrays = {x: np.random.default_rng(1).normal(size=(12, 5)).astype(np.float32)}
    samples = load_samples(arrays, GraphView(model)).in_batches(3)
    loss = choose_loss(GraphView(model), samples, Provider.CPU)
    assert isinstance(loss, HalfSquares)
    outputs = run_ort(model, arrays)
    total = np.zeros(())
    for name, gradient in loss(outputs, 0).items():
        np.testing.assert_allclose(gradient.sum(axis=0), 0.0, atol=1e-4)
        total = np.square(gradient * loss.variances[name]).sum() / loss.variances[name] / len(gradient)
        assert total == pytest.approx(1.0, rel=1e-3)


def test_outputs_that_do_not_vary_make_no_loss() -> None:
    """A network whose outputs are always the same has no loss, and says so."""
    net = Net(17)
    net.output(net.node("Mul", net.input(1, 2, 3, 3, batch="n"), net.constant(0.0)))
    samples = load_samples({"x0": np.ones((4, 2, 3, 3), np.float32)}, GraphView(net.model()))
    with pytest.raises(DataError, match="vary"):
        choose_loss(GraphView(net.model()), samples, Provider.CPU)


@pytest.mark.parametrize("labels", [np.arange(11) % 4, np.arange(12), np.full(12, -1)])
def test_labels_have_to_fit(labels: IntArray) -> None:
    """Labels are one for each sample, and classes that there are."""
    model, samples, h = dense()
    with pytest.raises(DataError, match="labels"):
        whole(model, samples, [h], labels=labels)


def test_labels_are_for_classifiers() -> None:
    """Labels of a network without a row of scores for each sample are refused."""
    net = Net(17)
    net.output(net.conv(net.input(1, 2, 4, 4, batch="n"), 3))
    samples = load_samples({"x0": np.ones((4, 2, 4, 4), np.float32)}, GraphView(net.model()))
    with pytest.raises(DataError, match="one row of scores"):
        whole(net.model(), samples, ["x0"], labels=np.zeros(4, np.int64))


def test_gradients_do_not_depend_on_the_batch() -> None:
    """Runs of any size give the same gradients, also in a network that takes one sample at a time."""
    model, samples, h = dense()
    expected = np.concatenate([b.gradients[h] for b in whole(model, samples, [h])])
    for other in (samples.in_batches(1), samples.in_batches(2)):
        np.testing.assert_allclose(
            np.concatenate([b.gradients[h] for b in whole(model, other, [h])]), expected, atol=1e-6
        )
    fixed, single, h = dense(1)
    assert single.batch == 1
    np.testing.assert_allclose(np.concatenate([b.gradients[h] for b in whole(fixed, single, [h])]), expected, atol=1e-6)


def test_runs_get_smaller_where_values_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the values of a run would take too much memory, it is made of fewer samples."""
    model, samples, h = dense()
    monkeypatch.setattr(stream, "_MOST_BYTES", 100)
    assert {b.samples for b in whole(model, samples, [h])} == {2}
    fixed, single, h = dense(1)
    assert {b.samples for b in whole(fixed, single, [h])} == {1}


def test_what_no_output_depends_on_has_no_gradient() -> None:
    """A value that leads nowhere has a gradient of zeros, and a name that is not there is refused."""
    net = Net(17)
    x = net.input(2, 3)
    dead = net.gemm(x, 2)
    net.output(net.gemm(x, 3))
    batch = next(stream_gradients(GraphView(net.model()), one_run(net.feeds), [dead], LinearLoss({})))
    np.testing.assert_array_equal(batch.gradients[dead], np.zeros((2, 2)))
    with pytest.raises(DataError, match="no value called 'y'"):
        next(stream_gradients(GraphView(net.model()), one_run(net.feeds), ["y"]))


def test_the_newest_rule_that_fits_holds() -> None:
    """Of several rules for one operator, the one with the latest version that the model has is taken."""
    net = Net(17)
    net.output(net.node("Relu", net.input(2, 3)))
    rules = [Rule("Relu", lambda site: {0: site.g * 1.0}), Rule("Relu", lambda site: {0: site.g * 5.0}, since=14)]
    rules.append(Rule("Relu", lambda site: {0: site.g * 7.0}, since=18))
    loss = LinearLoss({net.outputs[0]: np.ones((2, 3))})
    batch = next(stream_gradients(GraphView(net.model()), one_run(net.feeds), ["x0"], loss, rules=rules))
    np.testing.assert_array_equal(batch.gradients["x0"], np.full((2, 3), 5.0))
