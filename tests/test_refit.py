"""The refit of readers: it never makes a reader worse, and makes good what linear algebra can make good."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxfuse
from onnxfuse import Compressed
from onnxfuse.fusion.candidates import CANDIDATES
from onnxfuse.statistics.features import Role
from tests.builders import AnyArray, Net, initializers, run_ort
from tests.conftest import QUICK
from tests.laws import analysis_of, assert_only_weights_differ, assert_valid, group_called, with_copies

MODELS = Path(__file__).resolve().parent.parent / "models"
FILES = ("digits_bn.onnx", "digits_folded.onnx")
METHODS = ("prune", "intra-fusion")


@cache
def images(name: str, count: int) -> AnyArray:
    """Return some digits."""
    found: AnyArray = np.load(MODELS / f"digits_{name}.npz")["image"][:count]
    return found


@cache
def compressed(file: str, method: str, *, refit: bool) -> Compressed:
    """Compress an example network on the digits that are for calibration."""
    calibration = {"image": images("calibration", 64)}
    return onnxfuse.compress(
        MODELS / file,
        calibration=calibration,
        method=method,
        ratio=0.3,
        refit=refit,
        effort=0,
        prove=False,
        provider="cpu",
    )


def gap(original: onnx.ModelProto, model: onnx.ModelProto, feeds: Mapping[str, AnyArray]) -> float:
    """Return the share of the outputs' variance by which two models differ."""
    y, z = (next(iter(run_ort(m, feeds).values())).astype(np.float64) for m in (original, model))
    return float(((y - z) ** 2).sum() / ((y - y.mean(axis=0)) ** 2).sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("file", FILES)
def test_no_reader_gets_worse(file: str, method: str) -> None:
    """No reader gets worse; every reader of compressed channels is named once."""
    report = compressed(file, method, refit=True).report
    nodes = [r.node for r in report.refits]
    assert len(set(nodes)) == len(nodes) >= 7
    for refit in report.refits:
        assert 0 <= refit.error_after <= refit.error_before
        assert (refit.ridge > 0) == (refit.error_after < refit.error_before)
    assert any(r.error_after < 0.8 * r.error_before for r in report.refits)
    assert compressed(file, method, refit=False).report.refits == ()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("file", FILES)
def test_the_drift_on_held_out_digits_is_smaller(file: str, method: str) -> None:
    """The drift on digits that nothing was fitted on is smaller than without."""
    original, feeds = onnx.load(MODELS / file), {"image": images("test", 450)}
    without, refitted = (gap(original, compressed(file, method, refit=r).model, feeds) for r in (False, True))
    assert refitted < 0.8 * without


@pytest.mark.parametrize("file", FILES)
def test_only_numbers_differ_from_a_run_without(file: str) -> None:
    """The refit changes numbers, not the network: nodes, names and every shape are as without it."""
    plain, refitted = (compressed(file, "prune", refit=r).model for r in (False, True))
    assert_valid(refitted)
    assert_only_weights_differ(plain, refitted)
    before, after = initializers(plain), initializers(refitted)
    assert {n: (a.shape, a.dtype) for n, a in before.items()} == {n: (a.shape, a.dtype) for n, a in after.items()}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_broken_sample_spoils_nothing(value: float) -> None:
    """A sample with a value that is not finite is not counted, and said to be broken; all others still decide."""
    samples = images("calibration", 160)
    samples[5, 0, 2, 2] = value
    file = MODELS / "digits_bn.onnx"
    for options in ({"ratio": 0.3}, {"target": "macs=0.5"}):
        report = onnxfuse.compress(file, calibration={"image": samples}, effort=QUICK, provider="cpu", **options).report
        note = "1 of the 160 samples have values that are NaN or infinite; what these reach is not counted"
        assert report.notes == (note,)
        judged = onnxfuse.validate(file, file, data={"image": samples}, provider="cpu")
        assert judged.notes == (note,)
        methods = {g.method for g in report.groups if g.channels_after < g.channels_before}
        assert methods <= {"least-damage", *CANDIDATES}
        assert len(report.refits) > 3
        top1 = report.drift.outputs[0].top1_agreement
        assert top1 is not None
        assert top1 > 0.9


def test_the_refit_gives_the_same_bytes_twice() -> None:
    """The refit gives the same bytes twice, and others with another choice of rows, which is the seed's."""

    def run(seed: int) -> bytes:
        # More places than rows are asked for, so that they are chosen at random.
        made = onnxfuse.compress(
            MODELS / FILES[1],
            calibration={"image": np.tile(images("calibration", 256), (2, 1, 1, 1))},
            refit=True,
            method="prune",
            only="/block1/conv1/*",
            ratio=0.5,
            effort=0,
            prove=False,
            provider="cpu",
            seed=seed,
        ).model
        # The seed itself stands in the metadata.
        del made.metadata_props[:]
        return made.SerializeToString(deterministic=True)

    assert run(0) == run(0) != run(1)


def _copied(net: Net, names: tuple[str, ...]) -> onnx.ModelProto:
    """Make every two neighbouring channels of some groups copies of each other."""
    model = net.model()
    for name in names:
        analysis = analysis_of(model)
        group = group_called(analysis, name)
        changed = with_copies(analysis, group, np.arange(group.channels) // 2)
        assert changed is not None
        model = changed
    return model


def _samples(*dims: int, seed: int = 0) -> dict[str, AnyArray]:
    return {"x0": np.random.default_rng(seed).normal(size=dims).astype(np.float32)}


def _keeping_one_of_each(model: onnx.ModelProto, names: tuple[str, ...]) -> onnx.ModelProto:
    """Scale producers so that one of every two copies is half as large as the other, and readers hardly count."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    analysis = analysis_of(model)
    tensors = {t.name: t for t in copy.graph.initializer}
    for name, size in zip(names, (1e4, 1e2), strict=True):
        factor = np.ones(0)
        for parameter in group_called(analysis, name).parameters:
            if parameter.role is Role.CONSUMER:
                continue
            array = onnx.numpy_helper.to_array(tensors[parameter.operand.name])
            rows = np.moveaxis(array, parameter.axis, 0)
            if parameter.role is Role.PRODUCER:
                lengths = np.abs(rows.reshape(len(rows), -1)).sum(axis=1)
                factor = size / lengths / (1 + np.arange(len(rows)) % 2)
            scaled = np.moveaxis(rows * factor.reshape(-1, *[1] * (rows.ndim - 1)), 0, parameter.axis)
            tensors[parameter.operand.name].CopyFrom(
                onnx.numpy_helper.from_array(scaled.astype(array.dtype), parameter.operand.name)
            )
    return copy


def _layers(net: Net, kind: str) -> tuple[str, ...]:
    match kind:
        case "Conv":
            x = net.input(1, 2, 6, 6, batch="n")
            h = net.node("Relu", net.conv(x, 8, name="first"))
            h = net.node("Relu", net.conv(h, 8, name="second", strides=[2, 2], pads=[1, 0, 1, 2]))
            net.output(net.gemm(net.node("Flatten", h), 3, name="last", transB=1))
        case "MatMul":
            x = net.input(1, 5, batch="n")
            h = net.node("Relu", net.matmul(x, 8, name="first"))
            h = net.node("Relu", net.matmul(h, 8, name="second"))
            net.output(net.matmul(h, 3, name="last"))
        case _:
            x = net.input(1, 5, batch="n")
            h = net.node("Relu", net.gemm(x, 8, name="first"))
            h = net.node("Relu", net.gemm(h, 8, name="second", transB=1))
            net.output(net.gemm(h, 3, name="last"))
    return "first", "second"


@pytest.mark.parametrize("kind", ["Conv", "MatMul", "Gemm"])
def test_dropped_copies_are_rebuilt_by_their_readers(kind: str) -> None:
    """Where every dropped channel has a copy that stays, the readers are rebuilt nearly exactly; without, they fail."""
    net = Net(17, seed=3)
    names = _layers(net, kind)
    model = _keeping_one_of_each(_copied(net, names), names)
    dims = net.feeds["x0"].shape[1:]
    samples, held_out = _samples(1024, *dims), _samples(64, *dims, seed=1)
    results = {
        refit: onnxfuse.compress(
            model, calibration=samples, method="prune", ratio=0.5, refit=refit, prove=False, provider="cpu"
        )
        for refit in (False, True)
    }
    assert [(g.channels_before, g.channels_after) for g in results[True].report.groups[:2]] == [(8, 4), (8, 4)]
    assert [r.node for r in results[True].report.refits] == ["second", "last"]
    assert gap(model, results[False].model, held_out) > 0.05
    assert gap(model, results[True].model, held_out) < 1e-4


def test_a_reader_without_a_bias_is_fitted_about_zero() -> None:
    """A reader with nothing to shift its outputs is fitted all the same, means included."""
    net = Net(17, seed=4)
    h = net.node("Relu", net.gemm(net.input(1, 5, batch="n"), 8, name="first"))
    net.output(net.gemm(h, 3, name="last", bias=False))
    model, held_out = net.model(), _samples(256, 5, seed=1)
    gaps = [
        gap(
            model,
            onnxfuse.compress(
                model, calibration=_samples(512, 5), method="prune", ratio=0.5, refit=refit, provider="cpu"
            ).model,
            held_out,
        )
        for refit in (False, True)
    ]
    assert gaps[1] < 0.8 * gaps[0]


def test_a_reader_that_cannot_be_fitted_is_left_alone() -> None:
    """A reader with a factor is as it is without the refit; it is not in the report."""
    net = Net(17, seed=4)
    h = net.node("Relu", net.gemm(net.input(1, 5, batch="n"), 8, name="first"))
    net.output(net.gemm(h, 3, name="last", alpha=0.5))
    samples = _samples(256, 5)
    made = [
        onnxfuse.compress(net.model(), calibration=samples, method="prune", ratio=0.5, refit=refit, provider="cpu")
        for refit in (False, True)
    ]
    assert made[1].report.refits == ()
    before, after = (initializers(m.model) for m in made)
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert {a.shape for a in after.values()} != {a.shape for a in initializers(net.model()).values()}


def test_channels_that_carry_nothing_leave_their_reader_as_it_is() -> None:
    """Channels that are zero for every sample say nothing of a reader: it stays, and nothing becomes infinite."""
    net = Net(17, seed=5)
    dead = net.gemm(net.input(1, 5, batch="n"), 8, name="first")
    h = net.node("Relu", net.node("Sub", net.node("Sigmoid", dead), net.constant(2.0)))
    net.output(net.gemm(h, 3, name="last"))
    model = net.model()
    made = onnxfuse.compress(
        model, calibration=_samples(64, 5), method="prune", ratio=0.5, refit=True, prove=False, provider="cpu"
    )
    assert made.report.refits == ()
    assert all(np.isfinite(a).all() for a in initializers(made.model).values())
    y, z = (run_ort(m, _samples(4, 5))[model.graph.output[0].name] for m in (model, made.model))
    np.testing.assert_allclose(z, y, atol=1e-6)


def test_a_convolution_that_loses_groups_is_fitted_group_by_group() -> None:
    """Where channels of a group compete, whole groups go; those that stay, and what reads them, are still fitted."""
    net = Net(17, seed=2)

    def competing(h: str) -> str:
        shares = net.node("Softmax", net.reshape(h, 0, 8, 3, 5, 5), axis=2)
        return net.reshape(shares, 0, 24, 5, 5)

    h = competing(net.conv(net.input(1, 3, 5, 5, batch="n"), 24, name="first"))
    h = competing(net.conv(net.node("Mul", h, net.constant(3.0)), 24, name="grouped", group=8))
    net.output(net.conv(h, 4, name="last"))
    model, samples = net.model(), {"x0": np.random.default_rng(1).normal(size=(64, 3, 5, 5)).astype(np.float32)}
    without, refitted = (
        onnxfuse.compress(model, calibration=samples, method="prune", ratio=0.5, refit=refit, provider="cpu")
        for refit in (False, True)
    )
    found = {n.name: {a.name: a.i for a in n.attribute}.get("group", 1) for n in refitted.model.graph.node}
    assert found["grouped"] == 4
    shapes = {name: value.shape for name, value in initializers(refitted.model).items()}
    assert (shapes["first_w"], shapes["grouped_w"], shapes["last_w"]) == ((12, 3, 3, 3), (12, 3, 3, 3), (4, 12, 3, 3))
    assert [r.node for r in refitted.report.refits] == ["grouped", "last"]
    others = {"x0": np.random.default_rng(2).normal(size=(64, 3, 5, 5)).astype(np.float32)}
    assert gap(model, refitted.model, others) < 0.8 * gap(model, without.model, others)


@pytest.mark.parametrize("effort", [0, 0.1])
def test_what_has_become_longer_or_shorter_is_not_fitted(effort: float) -> None:
    """How many places go on depends on values, as how long a voice speaks does; so it changes with the channels."""
    rng = np.random.default_rng(5)
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]> net (float[1, 2, 40] x) => (float[1, 3, m] y)
        <int64[1] all = {-1}, float zero = {0}>
        { h = Conv(x, w)  g = Relu(h)  o = Conv(g, u)  f = ReduceMean <axes = [0, 1], keepdims = 0> (o)
          loud = Greater(f, zero)  kept = Compress <axis = 2> (o, loud)
          i = Conv(kept, v)  j = Relu(i)  y = Conv(j, z) }
    """)
    for name, dims in {"w": (16, 2, 1), "u": (8, 16, 1), "v": (16, 8, 1), "z": (3, 16, 1)}.items():
        weight = rng.normal(size=dims).astype(np.float32) / np.sqrt(np.float32(dims[1]))
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    samples = {"x": rng.normal(size=(64, 2, 40)).astype(np.float32)}
    result = onnxfuse.compress(model, ratio=0.5, calibration=samples, provider="cpu", effort=effort)
    assert "depends on values" in " ".join(result.report.notes)
    fitted = {refit.node for refit in result.report.refits}
    assert fitted == {"Conv_2"}


@pytest.mark.parametrize("method", ["prune", "auto"])
def test_a_layer_on_a_stored_table_is_no_layer(method: str) -> None:
    """The keys of a small table of positions are known without an input: they follow channels, and are not fitted."""
    net = Net(17, seed=1)
    x = net.input(2, 5, 6)
    table = net.node("LayerNormalization", net.weight(1, 5, 6), net.vector(6), net.vector(6), axis=-1)
    keys = net.matmul(table, 8, name="keys")
    net.output(net.matmul(net.node("Relu", net.node("Add", net.matmul(x, 8, name="queries"), keys)), 3, name="out"))
    result = onnxfuse.compress(net.model(), ratio=0.5, method=method, effort=0)
    assert [(g.name, g.channels_after) for g in result.report.groups if g.frozen is None] == [("queries", 4)]
    assert run_ort(result.model, net.feeds).keys() == run_ort(net.model(), net.feeds).keys()
