"""Attention in the forms that exporters and runtimes write it: heads go one by one, exactly, and nothing else changes.

A head contributes to the output through its own rows of the output projection alone. So a file without head h must
compute what the original computes with these rows set to zero: an exact law, whatever the weights are. Which rows they
are is counted here, from the form alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest

import onnxfuse
from onnxfuse.analysis import Analysis
from onnxfuse.coupling.groups import CouplingGroup
from onnxfuse.errors import ConfigError
from onnxfuse.fusion.maps import ChannelMap
from tests.builders import AnyArray, Net, initializers, run_ort
from tests.laws import (
    analysis_of,
    assert_predicted,
    assert_same_outputs,
    assert_same_shapes,
    assert_valid,
    free_groups,
    fuse,
    group_called,
    with_copies,
)

LENGTH, WIDTH, INT64 = 5, 6, np.int64
OWN = "com.microsoft"


@dataclass(frozen=True)
class Form:
    """A way to write attention.

    Attributes:
        name: What it is.
        build: Writes it, with an output projection called ``out``.
        kept: Heads of keys and values.
        sharing: Heads of queries that share one of them.
        size: What values have in a head.
        opset: Version of the operator set.
    """

    name: str
    build: Callable[["Form", Net], None]
    kept: int = 4
    sharing: int = 1
    size: int = 4
    opset: int = 17

    def net(self) -> Net:
        """Write the network anew."""
        net = Net(self.opset, seed=3)
        self.build(self, net)
        return net

    @property
    def heads(self) -> int:
        """Heads of queries."""
        return self.kept * self.sharing


# Writing --------------------------------------------------------------------------------------------------------------


def apart(net: Net, x: str, heads: int, size: int) -> str:
    """Put heads on axis 1: (batch, length, heads x size) to (batch, heads, length, size)."""
    batch, length, _ = net.dims(x)
    return net.node("Transpose", net.reshape(x, batch, length, heads, size), perm=[0, 2, 1, 3])


def together(net: Net, x: str) -> str:
    """Put heads and sizes on one axis again."""
    batch, heads, length, size = net.dims(x)
    return net.reshape(net.node("Transpose", x, perm=[0, 2, 1, 3]), batch, length, heads * size)


def attend(net: Net, q: str, k: str, v: str, scale: float = 0.6) -> str:
    """Write scaled scores, their softmax, and the mean of values."""
    turned = net.node("Transpose", k, perm=[*range(len(net.dims(k)) - 2), -1 % len(net.dims(k)), len(net.dims(k)) - 2])
    scores = net.node("Mul", net.node("MatMul", q, turned), net.constant(scale))
    return net.node("MatMul", net.node("Softmax", scores, axis=-1), v)


def finish(net: Net, y: str) -> None:
    """Project what all heads say, and use it beside the input."""
    out = net.matmul(y, WIDTH, name="out")
    net.output(net.node("Tanh", net.node("Add", net.inputs[0].name, out)))


def projected(net: Net, *widths: int) -> list[str]:
    """Make queries, keys and values from one input."""
    x = net.input(2, LENGTH, WIDTH)
    return [net.matmul(x, width, name=name) for width, name in zip(widths, ("query", "key", "value"), strict=True)]


def separate(form: Form, net: Net, *, turn: Callable[[Net, str], str] | None = None, size: int = 4) -> None:
    """Three projections, heads apart; with shared heads, repeated by Unsqueeze, Expand and Reshape."""
    q, k, v = projected(net, form.heads * size, form.kept * size, form.kept * form.size)
    q, k, v = apart(net, q, form.heads, size), apart(net, k, form.kept, size), apart(net, v, form.kept, form.size)
    if turn is not None:
        q, k = turn(net, q), turn(net, k)
    if form.sharing > 1 and form.kept > 1:
        k, v = (repeated(net, x, form.sharing) for x in (k, v))
    finish(net, together(net, attend(net, q, k, v)))


def repeated(net: Net, x: str, times: int) -> str:
    """Repeat every head, as Llama does."""
    batch, heads, length, size = net.dims(x)
    target = net.constant(np.array([batch, heads, times, length, size], INT64))
    return net.reshape(net.node("Expand", net.unsqueeze(x, [2]), target), batch, heads * times, length, size)


def tiled(form: Form, net: Net) -> None:
    """One head of keys and values, copied to all by Tile."""
    q, k, v = projected(net, form.heads * 4, 4, form.size)
    q, k, v = apart(net, q, form.heads, 4), apart(net, k, 1, 4), apart(net, v, 1, form.size)
    times = net.constant(np.array([1, form.heads, 1, 1], INT64))
    k, v = (net.node("Tile", x, times) for x in (k, v))
    finish(net, together(net, attend(net, q, k, v)))


def split(form: Form, net: Net, *, stated: bool) -> None:
    """One projection, cut in three by Split."""
    inner = form.heads * 4
    sizes = [inner, inner, form.heads * form.size]
    qkv = net.matmul(net.input(2, LENGTH, WIDTH), sum(sizes), name="query")
    parts = net.split(qkv, sizes if stated else None, 3, axis=2)
    q, k, v = (apart(net, x, form.heads, n // form.heads) for x, n in zip(parts, sizes, strict=True))
    finish(net, together(net, attend(net, q, k, v)))


def picked(form: Form, net: Net, *, by_split: bool, inside: bool = False) -> None:
    """One projection, (3, heads, size) or (heads, 3, size), of which Gather or Split takes each third."""
    qkv = net.matmul(net.input(2, LENGTH, WIDTH), 3 * form.heads * form.size, name="query")
    shape = (form.heads, 3, form.size) if inside else (3, form.heads, form.size)
    perm = [3, 0, 2, 1, 4] if inside else [2, 0, 3, 1, 4]
    qkv = net.node("Transpose", net.reshape(qkv, 2, LENGTH, *shape), perm=perm)
    if by_split:
        q, k, v = (net.squeeze(x, [0]) for x in net.split(qkv, [1, 1, 1], 3, axis=0))
    else:
        q, k, v = (net.node("Gather", qkv, net.constant(np.array(i, INT64)), axis=0) for i in range(3))
    finish(net, together(net, attend(net, q, k, v)))


def in_the_batch(form: Form, net: Net) -> None:
    """Heads on the axis of the batch, as torch's own MultiheadAttention has them."""
    q, k, v = projected(net, form.heads * 4, form.heads * 4, form.heads * form.size)
    q, k, v = (
        net.reshape(apart(net, x, form.heads, size), 2 * form.heads, LENGTH, size)
        for x, size in ((q, 4), (k, 4), (v, form.size))
    )
    y = net.reshape(attend(net, q, k, v), 2, form.heads, LENGTH, form.size)
    finish(net, together(net, y))


def in_an_open_batch(form: Form, net: Net) -> None:
    """The same with a batch of any size: the product of batch and heads is computed at run time."""
    x = net.input(2, LENGTH, WIDTH, batch="batch")
    batch = net.node("Gather", net.node("Shape", x), net.constant(np.array([0], INT64)), axis=0)
    both = net.node("Mul", batch, net.constant(np.array([form.heads], INT64)))
    parts = []
    for size, name in ((4, "query"), (4, "key"), (form.size, "value")):
        made = net.node("Transpose", net.matmul(x, form.heads * size, name=name), perm=[1, 0, 2])
        target = net.node(
            "Concat", net.constant(np.array([LENGTH], INT64)), both, net.constant(np.array([size])), axis=0
        )
        like = net.reshape(made, LENGTH, 2 * form.heads, size)
        net.nodes.pop()
        made = net.node("Reshape", made, target, like=like)
        parts.append(net.node("Transpose", made, perm=[1, 0, 2]))
    q, k, v = parts
    y = net.node("Transpose", attend(net, q, k, v), perm=[1, 0, 2])
    finish(net, net.node("Transpose", net.reshape(y, LENGTH, -1, form.heads * form.size), perm=[1, 0, 2]))


def computed(form: Form, net: Net) -> None:
    """Target shapes that are put together at run time, of sizes read and numbers written into the file."""
    x = net.input(2, LENGTH, WIDTH, batch="batch")
    widths = (form.heads * 4, form.heads * 4, form.heads * form.size)
    q, k, v = (net.matmul(x, n, name=name) for n, name in zip(widths, ("query", "key", "value"), strict=True))
    q, k, v = (
        net.node("Transpose", shaped(net, x, h, form.heads, size), perm=[0, 2, 1, 3])
        for h, size in ((q, 4), (k, 4), (v, form.size))
    )
    y = net.node("Transpose", attend(net, q, k, v), perm=[0, 2, 1, 3])
    finish(net, shaped(net, x, y, form.heads * form.size))


def shaped(net: Net, x: str, y: str, *last: int) -> str:
    """Reshape to the batch and length of ``x`` and stated sizes."""
    shape = net.node("Shape", x)
    read = [net.node("Gather", shape, net.constant(np.array([i], INT64)), axis=0) for i in range(2)]
    target = net.node("Concat", *read, net.constant(np.array(last, INT64)), axis=0)
    dims = (*net.dims(x)[:2], *last)
    like = net.reshape(y, *dims)
    net.nodes.pop()
    return net.node("Reshape", y, target, like=like)


def by_einsum(form: Form, net: Net) -> None:
    """Einsum with weights of three axes, as Keras has them."""
    x = net.input(2, LENGTH, WIDTH)
    sizes = {"query": 4, "key": 4, "value": form.size}
    weights = {name: net.weight(WIDTH, form.heads, size, fan_in=WIDTH) for name, size in sizes.items()}
    q, k, v = (net.node("Einsum", x, w, equation="btc,chd->bthd", name=name) for name, w in weights.items())
    scores = net.node("Softmax", net.node("Einsum", q, k, equation="bqhd,bkhd->bhqk"), axis=-1)
    y = net.node("Einsum", scores, v, equation="bhqk,bkhd->bqhd")
    finish(net, net.reshape(y, 2, LENGTH, form.heads * form.size))


def halves(net: Net, x: str, *, by_split: bool = False, length: int = LENGTH) -> str:
    """Turn pairs that are half a head apart: Slice or Split, Neg, Concat."""
    size = net.dims(x)[-1]
    angles = np.tile(np.linspace(0.1, 2.5, length * size // 2).reshape(length, -1), 2)
    if by_split:
        a, b = net.split(x, [size // 2] * 2, 2, axis=3)
    else:
        a, b = net.slice(x, [0], [size // 2], [3]), net.slice(x, [size // 2], [2**63 - 1], [3])
    turned = net.node("Concat", net.node("Neg", b), a, axis=-1)
    cos, sin = net.constant(np.cos(angles)), net.constant(np.sin(angles))
    return net.node("Add", net.node("Mul", x, cos), net.node("Mul", turned, sin))


def neighbours(net: Net, x: str, *, by_steps: bool) -> str:
    """Turn pairs of neighbours, taken by strided Slices or from an axis of their own."""
    dims = net.dims(x)
    angles = np.linspace(0.1, 2.5, LENGTH * dims[-1] // 2).reshape(LENGTH, -1)
    if by_steps:
        a, b = (net.slice(x, [i], [2**63 - 1], [3], [2]) for i in range(2))
    else:
        pairs = net.reshape(x, *dims[:3], dims[3] // 2, 2)
        a, b = (net.node("Gather", pairs, net.constant(np.array(i, INT64)), axis=4) for i in range(2))
    cos, sin = net.constant(np.cos(angles)), net.constant(np.sin(angles))
    first = net.node("Sub", net.node("Mul", a, cos), net.node("Mul", b, sin))
    second = net.node("Add", net.node("Mul", a, sin), net.node("Mul", b, cos))
    both = net.node("Concat", net.unsqueeze(first, [4]), net.unsqueeze(second, [4]), axis=4)
    return net.reshape(both, *dims)


def biased(form: Form, net: Net, *, table: bool) -> None:
    """Scores get a number for each head and pair of positions, stored so or looked up by distance, as T5 does."""
    q, k, v = (apart(net, x, form.heads, 4) for x in projected(net, *[form.heads * 4] * 3))
    bias = net.vector(1, form.heads, LENGTH, LENGTH)
    if table:
        distance = np.abs(np.arange(LENGTH)[:, None] - np.arange(LENGTH))
        looked_up = net.node("Gather", net.weight(LENGTH, form.heads), net.constant(distance), axis=0)
        bias = net.unsqueeze(net.node("Transpose", looked_up, perm=[2, 0, 1]), [0])
    scores = net.node("Add", net.node("MatMul", q, net.node("Transpose", k, perm=[0, 1, 3, 2])), bias)
    finish(net, together(net, net.node("MatMul", net.node("Softmax", scores, axis=-1), v)))


def normalised(form: Form, net: Net) -> None:
    """Queries and keys normalised inside every head, as ViT-22B has them."""
    q, k, v = (apart(net, x, form.heads, 4) for x in projected(net, *[form.heads * 4] * 3))
    q, k = (net.node("LayerNormalization", x, net.vector(4, low=0.5, high=1.5), net.vector(4), axis=-1) for x in (q, k))
    finish(net, together(net, attend(net, q, k, v)))


def across(form: Form, net: Net) -> None:
    """Attention between the channels of a head, as XCiT has it: what is in a head stays."""
    q, k, v = (apart(net, x, form.heads, 4) for x in projected(net, *[form.heads * 4] * 3))
    q, k, v = (net.node("Transpose", x, perm=[0, 1, 3, 2]) for x in (q, k, v))
    finish(net, together(net, net.node("Transpose", attend(net, q, k, v), perm=[0, 1, 3, 2])))


def fused(form: Form, net: Net, *, op: str = "MultiHeadAttention", **more: Any) -> None:
    """One operator of ONNX Runtime's own, or of ONNX."""
    kept = form.kept * form.size
    q, k, v = projected(net, form.heads * form.size, kept, kept)
    domain = "" if op == "Attention" else OWN
    if domain:
        net.domains[OWN] = 1
    lengths: list[str] = []
    if op == "GroupQueryAttention":
        last = net.constant(np.full(2, LENGTH - 1, np.int32))
        lengths = ["", "", last, net.constant(np.array(LENGTH, np.int32))]
    finish(net, net.node(op, q, k, v, *lengths, domain=domain, like=q, **more))


def in_one(form: Form, net: Net) -> None:
    """ONNX Runtime's Attention, which has the weights inside."""
    inner = form.heads * form.size
    x = net.input(2, LENGTH, WIDTH)
    like = net.matmul(x, inner)
    del net.nodes[-2:]
    net.domains[OWN] = 1
    inputs = (x, net.weight(WIDTH, 3 * inner, fan_in=WIDTH), net.vector(3 * inner))
    finish(net, net.node("Attention", *inputs, domain=OWN, like=like, num_heads=form.heads, name="query"))


FORMS = (
    Form("separate", separate),
    Form("values of another size", separate, size=3),
    Form("split evenly", partial(split, stated=False)),
    Form("split by stated sizes", partial(split, stated=True), size=6),
    Form("gathered", partial(picked, by_split=False)),
    Form("split from an axis", partial(picked, by_split=True)),
    Form("gathered inside heads", partial(picked, by_split=False, inside=True)),
    Form("heads in the batch", in_the_batch, size=5),
    Form("heads in an open batch", in_an_open_batch, size=5),
    Form("shapes computed", computed, size=5),
    Form("einsum", by_einsum, size=5),
    Form("one head of keys, broadcast", separate, kept=1, sharing=4),
    Form("one head of keys, tiled", tiled, kept=1, sharing=4),
    Form("shared heads", separate, kept=3, sharing=2, size=5),
    Form("rotary, halves by Slice", partial(separate, turn=halves)),
    Form("rotary, halves by Split", partial(separate, turn=partial(halves, by_split=True)), kept=2, sharing=2),
    Form("rotary, pairs by steps", partial(separate, turn=partial(neighbours, by_steps=True))),
    Form("rotary, pairs by Gather", partial(separate, turn=partial(neighbours, by_steps=False)), kept=2, sharing=3),
    Form("a bias for each head", partial(biased, table=False)),
    Form("a bias looked up", partial(biased, table=True)),
    Form("normalised inside heads", normalised),
    Form("between channels", across),
    Form("MultiHeadAttention", partial(fused, num_heads=4)),
    Form("GroupQueryAttention", partial(fused, op="GroupQueryAttention", num_heads=6, kv_num_heads=3), 3, 2, 8),
    Form("Attention of ONNX Runtime", in_one),
    Form("Attention of ONNX", partial(fused, op="Attention", q_num_heads=6, kv_num_heads=2), 2, 3, 4, 23),
)
every_form = pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])


# Laws -----------------------------------------------------------------------------------------------------------------


def analysed(net: Net) -> Analysis:
    """Analyse a net; shapes behind operators that inference does not know are seen in a run."""
    return analysis_of(net.model(), feeds=net.feeds)


def head_groups(analysis: Analysis) -> list[CouplingGroup]:
    """Return the groups of whole heads."""
    return [g for g in free_groups(analysis) if "index by index" in g.unmixable or "of their own" in g.unmixable]


def rows_of(analysis: Analysis, group: CouplingGroup) -> list[int]:
    """Return which rows of the output projection go if channel 0 goes, seen on the weights alone."""
    small = fuse(analysis, {group.name: ChannelMap.selection(np.arange(1, group.channels), group.channels)}).model
    after = output_weight(small)[1]
    return [i for i, row in enumerate(output_weight(analysis.source.model)[1]) if not (after == row).all(axis=1).any()]


def output_weight(model: onnx.ModelProto) -> tuple[str, AnyArray]:
    """Return name and value of the output projection's weight."""
    weight = next(n.input[1] for n in model.graph.node if n.name == "out")
    return weight, initializers(model)[weight]


def without_rows(model: onnx.ModelProto, rows: Sequence[int]) -> onnx.ModelProto:
    """Let the output projection ignore some rows."""
    weight, value = output_weight(model)
    array = value.copy()
    array[list(rows)] = 0
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name == weight:
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, weight))
    return copy


def dropped_rows(form: Form) -> dict[str, tuple[int, Callable[[int], list[int]]]]:
    """Return, for each kind of head that a form has, how many there are and which output rows each has."""

    def of(heads: Sequence[int]) -> list[int]:
        return [head * form.size + i for head in heads for i in range(form.size)]

    kinds: dict[str, tuple[int, Callable[[int], list[int]]]] = {}
    if form.kept > 1:
        kinds["kept"] = form.kept, lambda h: of(range(h * form.sharing, (h + 1) * form.sharing))
    if form.sharing > 1:
        kinds["sharing"] = form.sharing, lambda g: of(range(g, form.heads, form.sharing))
    return kinds


def group_of(analysis: Analysis, count: int, rows: Sequence[int]) -> CouplingGroup:
    """Return the group whose channel 0 has just these output rows."""
    found = [g for g in head_groups(analysis) if g.channels == count and rows_of(analysis, g) == list(rows)]
    assert len(found) == 1, f"{len(found)} groups of {count} heads have the rows {rows}"
    return found[0]


@every_form
def test_a_dropped_head_is_one_that_the_output_ignores(form: Form) -> None:
    """Without a head, the file computes what the original does if the output projection ignores that head."""
    net = form.net()
    for count, rows in dropped_rows(form).values():
        group = group_of(analysed(net), count, rows(0))
        for head in range(count):
            kept = np.setdiff1d(np.arange(count), [head])
            result = fuse(analysed(net), {group.name: ChannelMap.selection(kept, count)})
            assert_same_outputs(
                run_ort(without_rows(net.model(), rows(head)), net.feeds), run_ort(result.model, net.feeds)
            )
            assert_predicted(result, net.feeds)
            with pytest.raises(AssertionError):
                assert_same_outputs(run_ort(net.model(), net.feeds), run_ort(result.model, net.feeds))


@every_form
def test_heads_go_together(form: Form) -> None:
    """Kinds of heads go at once, down to one of each, in a valid file whose heads are those that are left."""
    net = form.net()
    analysis = analysed(net)
    maps, gone = {}, set[int]()
    for count, rows in dropped_rows(form).values():
        maps[group_of(analysis, count, rows(0)).name] = ChannelMap.selection(np.array([count - 1]), count)
        gone.update(row for head in range(count - 1) for row in rows(head))
    result = fuse(analysis, maps)
    assert_valid(result.model)
    assert_same_outputs(run_ort(without_rows(net.model(), sorted(gone)), net.feeds), run_ort(result.model, net.feeds))


@every_form
def test_permutation(form: Form) -> None:
    """Permuting every free group at once changes nothing; no group of the attention is left out without reason."""
    net = form.net()
    analysis = analysed(net)
    rng = np.random.default_rng(2)
    maps = {}
    for group in free_groups(analysis):
        order = rng.permutation(group.channels)
        maps[group.name] = ChannelMap.permutation(np.roll(order, 1)[np.argsort(order)])
    result = fuse(analysis, maps)
    assert_same_outputs(run_ort(net.model(), net.feeds), run_ort(result.model, net.feeds))


@every_form
def test_half_of_everything(form: Form) -> None:
    """Half of all heads and of all sizes at once: the file is valid and has the shapes that were predicted."""
    net = form.net()
    analysis = analysed(net)
    maps = {g.name: ChannelMap.selection(np.arange(-(-g.channels // 2)), g.channels) for g in free_groups(analysis)}
    result = fuse(analysis, maps)
    assert_valid(result.model)
    assert_predicted(result, net.feeds)
    assert_same_shapes(run_ort(net.model(), net.feeds), run_ort(result.model, net.feeds))


# Sizes of heads -------------------------------------------------------------------------------------------------------

APART = [form for form in FORMS if form.size != 4 or form.name in {"separate", "MultiHeadAttention"}]
APART = [form for form in APART if form.name != "GroupQueryAttention"]


def value_group(analysis: Analysis) -> CouplingGroup:
    """Return the group of the values' size: the free one that may be mixed, and that nothing is multiplied over."""
    found = [g for g in free_groups(analysis) if not (g.unmixable or g.contractions)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("form", APART, ids=[form.name for form in APART])
def test_copies_among_values_merge(form: Form) -> None:
    """Values are only averaged, so what is in a head may be mixed: copies merge without error."""
    net = form.net()
    analysis = analysed(net)
    group = value_group(analysis)
    assert group.channels == form.size
    labels = np.arange(form.size) % (form.size - 1)
    doubled = with_copies(analysis, group, labels)
    assert doubled is not None
    merged = fuse(analysis_of(doubled, feeds=net.feeds), {group.name: ChannelMap.clusters(labels, form.size - 1)})
    assert_same_outputs(run_ort(doubled, net.feeds), run_ort(merged.model, net.feeds))


def zeroed(model: onnx.ModelProto, columns: dict[str, Sequence[int]]) -> onnx.ModelProto:
    """Let named layers and the biases behind them make nothing in some columns."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    values: dict[str, AnyArray] = {}
    for node in model.graph.node:
        if node.name in columns:
            behind = next(n for n in model.graph.node if node.output[0] in n.input)
            for name in (node.input[1], behind.input[1]):
                values[name] = initializers(model)[name].copy()
                values[name][..., list(columns[node.name])] = 0
    for tensor in copy.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values[tensor.name], tensor.name))
    return copy


TURNED = {
    "separate": lambda pair: [pair],
    "rotary, halves by Slice": lambda pair: [pair, pair + 2],
    "rotary, halves by Split": lambda pair: [pair, pair + 2],
    "rotary, pairs by steps": lambda pair: [2 * pair, 2 * pair + 1],
    "rotary, pairs by Gather": lambda pair: [2 * pair, 2 * pair + 1],
    "MultiHeadAttention": lambda pair: [pair],
}


@pytest.mark.parametrize("name", TURNED)
def test_what_queries_and_keys_lack_can_go(name: str) -> None:
    """Channels of a head that queries and keys have no use for go without a change; rotary ones in pairs."""
    form = next(form for form in FORMS if form.name == name)
    net = form.net()
    inside = TURNED[name](1)
    columns = {"query": form.heads, "key": form.kept}
    lacking = zeroed(net.model(), {n: [h * 4 + i for h in range(k) for i in inside] for n, k in columns.items()})
    analysis = analysis_of(lacking, feeds=net.feeds)
    heads = {group.name for group in head_groups(analysis)}
    groups = [g for g in free_groups(analysis) if g.contractions and g.name not in heads]
    assert not any(g.residual for g in free_groups(analysis) if g.contractions)
    assert [g.channels for g in groups] == [4 // len(inside)]
    kept = np.setdiff1d(np.arange(groups[0].channels), [1])
    result = fuse(analysis, {groups[0].name: ChannelMap.selection(kept, groups[0].channels)})
    assert_same_outputs(run_ort(lacking, net.feeds), run_ort(result.model, net.feeds))


# What must stay -------------------------------------------------------------------------------------------------------


def with_caches(net: Net) -> None:
    """Write a step of a decoder: grouped queries, rotary positions, caches in and out, and a gated layer behind."""
    kept, sharing, size, before = 2, 3, 4, 3
    q, k, v = projected(net, kept * sharing * size, kept * size, kept * size)
    past = [net.input(2, kept, before, size, name=name) for name in ("past_key", "past_value")]
    q, k, v = apart(net, q, kept * sharing, size), apart(net, k, kept, size), apart(net, v, kept, size)
    q, k = halves(net, q), halves(net, k)
    k, v = (net.node("Concat", old, new, axis=2) for old, new in zip(past, (k, v), strict=True))
    y = together(net, attend(net, q, repeated(net, k, sharing), repeated(net, v, sharing)))
    x = net.node("Add", "x0", net.matmul(y, WIDTH, name="out"))
    gate, up = (net.matmul(x, 10, name=name) for name in ("gate", "up"))
    gated = net.node("Mul", net.node("Mul", gate, net.node("Sigmoid", gate)), up)
    net.output(net.node("Add", x, net.matmul(gated, WIDTH, name="down")), k, v)


def test_caches_fix_their_own_sizes_only() -> None:
    """Caches that go in and out have the sizes that the user's program gives them; the rest is free."""
    net = Net(seed=3)
    with_caches(net)
    groups = {g.name: (g.channels, g.frozen) for g in analysed(net).channels.groups}
    free = {name: channels for name, (channels, frozen) in groups.items() if not frozen}
    assert free == {"query": 3, "gate": 10}
    reasons = {frozen for _, frozen in groups.values() if frozen}
    assert reasons == {"graph input 'x0'", "graph input 'past_key'", "graph input 'past_value'"}


def test_heads_that_a_cache_does_not_name_go() -> None:
    """Heads of queries that share one of the cache's go, and the file computes what is left of the output."""
    net = Net(seed=3)
    with_caches(net)
    group = group_called(analysed(net), "query")
    result = fuse(analysed(net), {"query": ChannelMap.selection(np.array([0, 2]), group.channels)})
    gone = [head * 4 + i for head in (1, 4) for i in range(4)]
    assert_same_outputs(run_ort(without_rows(net.model(), gone), net.feeds), run_ort(result.model, net.feeds))


def test_heads_that_are_mixed_behind_softmax_stay() -> None:
    """Where a softmax runs over heads, one head's share depends on the others, so none can go."""
    net = Net(seed=3)
    q, k, v = (apart(net, x, 4, 4) for x in projected(net, 16, 16, 16))
    scores = net.node("MatMul", q, net.node("Transpose", k, perm=[0, 1, 3, 2]))
    finish(net, together(net, net.node("MatMul", net.node("Softmax", scores, axis=1, name="over heads"), v)))
    reasons = {g.frozen for g in analysed(net).channels.groups if g.frozen and not g.frozen.startswith("graph")}
    assert reasons == {"'over heads' (Softmax) normalises over it"}


@pytest.mark.parametrize("op", ["MultiHeadAttention", "Attention"])
def test_the_scale_stays_that_of_the_network(op: str) -> None:
    """Scores are divided by the root of the head size; with fewer channels, by the root of what it was."""
    numbers: dict[str, Any] = {"num_heads": 4} if op != "Attention" else {"q_num_heads": 4, "kv_num_heads": 4}
    form = Form(op, partial(fused, op=op, **numbers), opset=23 if op == "Attention" else 17)
    net = form.net()
    columns = [h * 4 + 1 for h in range(4)]
    lacking = zeroed(net.model(), {"query": columns, "key": columns})
    analysis = analysis_of(lacking, feeds=net.feeds)
    group = next(g for g in free_groups(analysis) if g.contractions)
    result = fuse(analysis, {group.name: ChannelMap.selection(np.array([0, 2, 3]), 4)})
    assert_same_outputs(run_ort(lacking, net.feeds), run_ort(result.model, net.feeds))
    node = next(n for n in result.model.graph.node if n.op_type == op)
    (scale,) = [a.f for a in node.attribute if a.name == "scale"]
    assert scale == pytest.approx(0.5)
    del node.attribute[[a.name for a in node.attribute].index("scale")]
    with pytest.raises(AssertionError):
        assert_same_outputs(run_ort(lacking, net.feeds), run_ort(result.model, net.feeds))


# The whole road -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "prune", "fold", "intra-fusion"])
def test_every_method_drops_heads(method: Any) -> None:
    """Whatever the method, queries, keys and values of a head that stays are those of one head, number by number."""
    form = FORMS[0]
    net = form.net()
    samples = {"x0": np.random.default_rng(4).standard_normal((64, LENGTH, WIDTH)).astype(np.float32)}
    result = onnxfuse.compress(
        net.model(), method=method, ratio=0.5, only=["query"], calibration=samples, provider="cpu", refit=False
    )
    for name in ("query", "key", "value"):
        before, after = (weight_of(model, name).reshape(WIDTH, -1, 4) for model in (net.model(), result.model))
        assert after.shape[1] == 2
        assert all(any((head == old).all() for old in before.swapaxes(0, 1)) for head in after.swapaxes(0, 1))


# Copies can't be written into a table that is looked up for every pair of positions.
COPIED = [form for form in FORMS if form.name != "a bias looked up"]


@pytest.mark.parametrize("form", COPIED, ids=lambda form: form.name)
def test_like_heads_merge(form: Form) -> None:
    """Of heads that are copies of each other one stays, and is read for all: nothing is lost by folding."""
    net = form.net()
    analysis = analysis_of(net.model(), feeds=net.feeds)
    merged = 0
    for group in free_groups(analysis):
        if "index by index" not in group.unmixable or group.contractions or group.channels < 2:
            continue
        kinds = (group.channels + 1) // 2
        labels = np.arange(group.channels) % kinds
        pairs = with_copies(analysis, group, labels)
        assert pairs is not None
        keep = [f"{group.name}={kinds}"]
        result = onnxfuse.compress(pairs, ratio=0.0, keep=keep, method="fold", provider="cpu", prove=False)
        assert_same_outputs(run_ort(pairs, net.feeds), run_ort(result.model, net.feeds))
        merged += 1
    assert merged or not any("index by index" in group.unmixable for group in free_groups(analysis))


def weight_of(model: onnx.ModelProto, name: str) -> AnyArray:
    """Return the weight of the layer of that name."""
    return initializers(model)[next(n.input[1] for n in model.graph.node if n.name == name)]


def test_samples_find_heads_that_say_nothing() -> None:
    """Where two heads add nothing to the output, half of the heads go without a change, and it is these two."""
    form = FORMS[0]
    net = form.net()
    silent = without_rows(net.model(), [*range(4, 8), *range(12, 16)])
    samples = {"x0": np.random.default_rng(4).standard_normal((64, LENGTH, WIDTH)).astype(np.float32)}
    result = onnxfuse.compress(silent, ratio=0.5, only=["query"], calibration=samples, provider="cpu", refit=False)
    want = weight_of(net.model(), "query").reshape(WIDTH, 4, 4)[:, [0, 2]].reshape(WIDTH, 8)
    np.testing.assert_array_equal(weight_of(result.model, "query"), want)
    assert_same_outputs(run_ort(silent, net.feeds), run_ort(result.model, net.feeds))


@pytest.mark.parametrize("name", ["heads in an open batch", "shapes computed"])
def test_an_open_batch_stays_open(name: str) -> None:
    """Where the original takes any batch, so does the file with fewer heads."""
    form = next(form for form in FORMS if form.name == name)
    net = form.net()
    count, rows = dropped_rows(form)["kept"]
    group = group_of(analysed(net), count, rows(0))
    result = fuse(analysed(net), {group.name: ChannelMap.selection(np.array([0, 2, 3]), count)})
    feeds = {"x0": np.random.default_rng(8).standard_normal((3, LENGTH, WIDTH)).astype(np.float32)}
    assert_same_outputs(run_ort(without_rows(net.model(), rows(1)), feeds), run_ort(result.model, feeds))


# Sizes that an operator takes -----------------------------------------------------------------------------------------


def turned_heads(pairs: int, *, rotary: bool = True) -> Net:
    """Write a GroupQueryAttention with rotary positions, of a size that may shrink by multiples alone."""
    form = Form("", fused, 2, 2, 2 * pairs)
    net = Net(17, seed=8)
    kept = form.kept * form.size
    q, k, v = projected(net, form.heads * form.size, kept, kept)
    last, total = net.constant(np.full(2, LENGTH - 1, np.int32)), net.constant(np.array(LENGTH, np.int32))
    tables = [net.vector(LENGTH, pairs) for _ in range(2)] if rotary else []
    more: dict[str, Any] = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": int(rotary)}
    net.domains[OWN] = 1
    y = net.node("GroupQueryAttention", q, k, v, "", "", last, total, *tables, domain=OWN, like=q, **more)
    finish(net, y)
    return net


@pytest.mark.parametrize(
    "options",
    [{"ratio": 0.1}, {"ratio": 0.4}, {"target": "params=0.7"}, {"ratio": 0.0, "keep": ["query#3=11"]}, {"ratio": 0.9}],
    ids=str,
)
@pytest.mark.parametrize("turned", ["rotary", ""])
def test_heads_have_sizes_that_the_operator_takes(options: dict[str, Any], turned: str) -> None:
    """However much goes, a head has a multiple of 16 channels where pairs are turned, else of 8; the result runs."""
    rotary = bool(turned)
    net = turned_heads(24 if rotary else 16, rotary=rotary)
    sizes = {g.name: g.channels_before for g in onnxfuse.inspect(net.model()).groups if not g.frozen}
    assert sizes["query#3"] == (24 if rotary else 32)
    result = onnxfuse.compress(net.model(), method="prune", provider="cpu", **options)
    after = {g.name: g.channels_after for g in result.report.groups}
    assert after["query#3"] % 8 == 0
    assert after["query#3"] < sizes["query#3"] or options == {"ratio": 0.1} or "target" in options
    if "keep" in options:
        assert after["query#3"] == 16


def test_a_plan_for_another_size_is_refused() -> None:
    """A plan that has been edited to a size that the operator does not take is refused, with the multiple."""
    made = onnxfuse.plan(turned_heads(24).model(), ratio=0.4, method="prune", provider="cpu")
    group = made.groups["query#3"]
    assert group.keep == 16
    edited = replace(made, groups={**made.groups, "query#3": replace(group, keep=12)})
    with pytest.raises(ConfigError, match="must be a multiple of 8"):
        onnxfuse.compress(turned_heads(24).model(), plan=edited, method="prune", provider="cpu")


def test_a_size_that_can_only_stay_says_why() -> None:
    """A head of eight pairs can't lose any, for a reason that names the operator."""
    frozen = {g.name: g.frozen for g in onnxfuse.inspect(turned_heads(8).model()).groups}
    assert "turns multiples of 8 pairs" in (frozen["query#3"] or "")
