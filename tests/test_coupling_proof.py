"""The proof of the coupling on the model at hand: what a wrong rule breaks is found and frozen, and nothing else."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import onnxfuse
from onnxfuse import analysis as analysis_module
from onnxfuse.coupling.constraints import Constraint, Equal, Rule, Site, Weight, prod
from onnxfuse.coupling.rules import DEFAULT_RULES
from onnxfuse.coupling.rules.elementwise import broadcasting, unary
from onnxfuse.errors import UnsupportedGraphError
from onnxfuse.fusion.maps import ChannelMap
from onnxfuse.proof.coupling import CouplingProof, watched_values
from onnxfuse.proof.runtime import Feeds, Session
from onnxfuse.proof.scaling import scalable_groups
from onnxfuse.report import InspectReport
from onnxfuse.statistics.features import Role
from tests.builders import Net, run_ort
from tests.laws import analysis_of, assert_same_outputs, free_groups, fuse

FAILED = "the proof on this model failed"


def plant(monkeypatch: pytest.MonkeyPatch, *wrong: Rule) -> None:
    """Let some rules take the place of the right ones."""
    changed = {rule.op for rule in wrong}
    rules = (*(rule for rule in DEFAULT_RULES if rule.op not in changed), *wrong)

    monkeypatch.setattr(analysis_module, "known_rules", lambda: rules)


def frozen(report: InspectReport) -> dict[str, str]:
    """Return why groups are frozen, by name; the one that makes the output is left out."""
    return {g.name: g.frozen or "" for g in report.groups if g.name != "last"}


def refuted(report: InspectReport) -> set[str]:
    """Return the groups that the proof has frozen; no others may be."""
    reasons = frozen(report)
    found = {name for name, reason in reasons.items() if reason.startswith(FAILED)}
    assert all(not reason for name, reason in reasons.items() if name not in found)
    return found


def with_lrn(net: Net) -> onnx.ModelProto:
    """Write a network of four layers with a normalisation over neighbouring channels after the second."""
    h = net.conv(net.input(1, 3, 5, 5), 6, name="first")
    h = net.conv(net.node("Relu", h), 6, name="second")
    h = net.node("LRN", h, size=3, alpha=3.0, beta=0.75, bias=0.5, name="lrn")
    h = net.conv(h, 5, name="third")
    net.output(net.conv(net.node("Relu", h), 2, name="last"))
    return net.model()


def shuffle(site: Site) -> Iterator[Constraint]:
    """Say, wrongly, that a Reshape from (n, c) to (n, a, b) splits channels with the inner factor outside."""
    x, y = site.input(0), site.output()
    yield Equal(x[0], y[0])
    if x.rank == 2 and y.rank == 3:
        yield Equal(x[1], prod(y[2], y[1]))
    else:
        yield Equal(x[1], prod(y[1], y[2]))


def shuffled(net: Net) -> onnx.ModelProto:
    """Write a network that splits channels in two axes of equal size, sums one up, and has a layer on either side."""
    h = net.node("Relu", net.gemm(net.input(2, 4), 6, name="first"))
    h = net.gemm(h, 9, name="second")
    h = net.reduce("Mean", net.node("Tanh", net.reshape(h, 2, 3, 3)), [2], keepdims=0)
    h = net.node("Relu", net.gemm(h, 5, name="third"))
    net.output(net.gemm(h, 2, name="last"))
    return net.model()


def test_a_wrong_rule_freezes_what_it_concerns_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong rule freezes what it concerns and nothing else, with the reason and a note that names it."""
    plant(monkeypatch, Rule("LRN", unary))
    report = onnxfuse.inspect(with_lrn(Net()))
    assert refuted(report) == {"second"}
    assert "permuting its channels changes" in frozen(report)["second"]
    (note,) = report.notes
    assert note.startswith("a defect of onnxfuse, made harmless")
    assert note.endswith("no proof for second")


def test_the_right_rules_leave_the_proof_nothing_to_say() -> None:
    """The right rules leave the proof nothing to say: what it would refute is frozen before, for its own reason."""
    for model in (with_lrn(Net()), shuffled(Net())):
        report = onnxfuse.inspect(model)
        assert report.notes == ()
        assert not any(reason.startswith(FAILED) for reason in frozen(report).values())
        assert {"first", "third"} <= {name for name, reason in frozen(report).items() if not reason}
    assert frozen(onnxfuse.inspect(with_lrn(Net())))["second"]


def test_a_wrong_order_of_factors_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels split the wrong way round are found, although every shape fits."""
    plant(monkeypatch, Rule("Reshape", shuffle))
    report = onnxfuse.inspect(shuffled(Net()))
    found = {name for name, reason in frozen(report).items() if reason.startswith(FAILED)}
    assert found
    assert all(name.startswith("second") for name in found)
    assert {"first", "third"} <= set(frozen(report)) - found
    assert report.notes[0].endswith(f"no proof for {', '.join(g for g in frozen(report) if g in found)}")


def test_without_the_proof_a_wrong_rule_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the proof a wrong rule is believed: the group is free, and there is no note."""
    plant(monkeypatch, Rule("LRN", unary))
    report = onnxfuse.inspect(with_lrn(Net()), prove=False)
    assert set(frozen(report).values()) == {""}
    assert report.notes == ()


def test_compress_keeps_what_the_proof_refutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compress keeps what the proof refutes, compresses the rest, and refuses if that is all there was to do."""
    plant(monkeypatch, Rule("LRN", unary))
    model = with_lrn(Net())
    report = onnxfuse.compress(model, ratio=0.5, provider="cpu").report
    assert {g.name: g.channels_after for g in report.groups} == {"first": 3, "second": 6, "third": 2, "last": 2}
    assert any("no proof for second" in note for note in report.notes)
    with pytest.raises(UnsupportedGraphError, match=FAILED):
        onnxfuse.compress(model, ratio=0.5, only="second", provider="cpu")
    believed = onnxfuse.compress(model, ratio=0.5, only="second", provider="cpu", prove=False).report
    assert {g.name: g.channels_after for g in believed.groups}["second"] == 3


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_wrong_group_is_found_among_many(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many groups are wrong among right ones, bisection finds each of them."""
    plant(monkeypatch, Rule("LRN", unary))
    net = Net(seed=count)
    h = net.input(1, 3, 4, 4)
    for i in range(6):
        h = net.conv(h, 6, name=f"layer{i}")
        wrong = i % 2 and i // 2 < count
        h = net.node("LRN", h, size=3, alpha=3.0, bias=0.5) if wrong else net.node("Tanh", h)
    net.output(net.conv(h, 2, name="last"))
    assert refuted(onnxfuse.inspect(net.model())) == {f"layer{2 * i + 1}" for i in range(count)}


@pytest.mark.parametrize("seed", range(4))
def test_a_wrong_group_of_two_channels_is_found_with_any_seed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong group of two channels is found with any seed: every channel moves, although they are so few."""
    plant(monkeypatch, Rule("CumSum", unary))
    net = Net(seed=1)
    h = net.conv(net.input(1, 3, 4, 4), 2, name="first")
    h = net.node("CumSum", h, net.constant(np.array(1, np.int64)))
    net.output(net.conv(h, 2, name="last"))
    assert refuted(onnxfuse.inspect(net.model(), seed=seed)) == {"first"}


def as_bias(site: Site) -> Iterator[Constraint]:
    """Say, wrongly, that a constant factor moves with the channels like a bias."""
    for constraint in broadcasting(site):
        yield replace(constraint, role=Role.BIAS) if isinstance(constraint, Weight) else constraint


def scaled(net: Net, bend: str = "Relu") -> onnx.ModelProto:
    """Write a network with a constant factor for each channel between two layers."""
    h = net.node(bend, net.conv(net.input(1, 3, 4, 4), 6, name="first"))
    h = net.node("Mul", h, net.vector(6, 1, 1, low=0.5, high=1.5))
    net.output(net.conv(net.node("Relu", net.conv(h, 4, name="second")), 2, name="last"))
    return net.model()


def test_a_wrong_role_is_found_by_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong role, which permuting can't show, is found where all on the way is homogeneous."""
    assert frozen(onnxfuse.inspect(scaled(Net()))) == {"first": "", "second": ""}
    plant(monkeypatch, Rule("Mul", as_bias))
    report = onnxfuse.inspect(scaled(Net()))
    assert refuted(report) == {"first"}
    assert "scaling its channels changes" in frozen(report)["first"]
    assert frozen(onnxfuse.inspect(scaled(Net(), "Sigmoid"))) == {"first": "", "second": ""}


HALF = onnx.numpy_helper.from_array(np.array([0.5], np.float32))
SCALABLE: dict[str, Callable[[Net, str], str]] = {
    "plain": lambda net, h: net.node("Relu", h),
    "normalised": lambda net, h: net.node("LeakyRelu", net.batch_norm(h), alpha=0.1),
    "normalised apart": lambda net, h: net.batch_norm(net.node("Relu", h)),
    "sum": lambda net, h: net.node("Add", h, net.node("Relu", net.conv(h, 6))),
    "bias": lambda net, h: net.node("Sub", net.vector(6, 1, 1), h),
    "slope": lambda net, h: net.node("PRelu", h, net.vector(6, 1, 1, low=0.1, high=0.4)),
    "gate": lambda net, h: net.node("Mul", h, net.node("Sigmoid", net.conv(net.node("GlobalAveragePool", "x0"), 1, 1))),
    "pool": lambda net, h: net.node("MaxPool", net.pad(h, [0, 0, 1, 1, 0, 0, 1, 1]), kernel_shape=[2, 2]),
    "edge": lambda net, h: net.pad(h, [0, 0, 1, 1, 0, 0, 1, 1], mode="edge"),
    "resized": lambda net, h: net.upsample(h),
    "depthwise": lambda net, h: net.conv(h, 6, group=6),
    "concatenated": lambda net, h: net.node("Concat", h, net.node("Relu", h), axis=1),
}
UNSCALABLE: dict[str, Callable[[Net, str], str]] = {
    "curved": lambda net, h: net.node("Mul", h, net.node("Sigmoid", h)),
    "shifted": lambda net, h: net.node("Add", h, net.constant(1.0)),
    "added to": lambda net, h: net.node("Add", h, net.conv("x0", 1)),
    "squared": lambda net, h: net.node("Mul", h, h),
    "divisor": lambda net, h: net.node("Div", net.constant(1.0), net.node("Exp", h)),
    "bounded": lambda net, h: net.clip(h, 0.0, 6.0),
    "padded with ones": lambda net, h: net.pad(h, [0, 0, 1, 1, 0, 0, 1, 1], value=1.0),
    "per channel": lambda net, h: net.node("InstanceNormalization", h, net.vector(6), net.vector(6)),
    "filled": lambda net, h: net.node("Add", h, net.node("ConstantOfShape", net.node("Shape", h), like=h, value=HALF)),
}


@pytest.mark.parametrize("name", [*SCALABLE, *UNSCALABLE])
def test_what_may_be_scaled(name: str) -> None:
    """Just what is homogeneous is scaled, and that does not change the outputs."""
    net = Net(seed=4)
    h = {**SCALABLE, **UNSCALABLE}[name](net, net.conv(net.input(1, 3, 4, 4, batch="N"), 6, name="first"))
    net.output(net.conv(h, 2, name="last"))
    analysis = analysis_of(net.model())
    found = {group.name for group in scalable_groups(analysis.graph, analysis.channels, free_groups(analysis))}
    assert ("first" in found) == (name in SCALABLE)
    factors = 2.0 ** np.arange(-3, 3)
    maps = {"first": ChannelMap(np.diag(factors), np.diag(1 / factors), np.arange(6))}
    before, after = run_ort(net.model(), net.feeds), run_ort(fuse(analysis, maps).model, net.feeds)
    if name in SCALABLE:
        assert_same_outputs(before, after)
    else:
        with pytest.raises(AssertionError):
            assert_same_outputs(before, after)


@pytest.mark.parametrize("ending", ["Sigmoid", "ArgMax", "Softmax"])
def test_a_deaf_output_is_judged_by_what_comes_before_it(ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an output hardly moves, the value just before it shows the change."""
    plant(monkeypatch, Rule("LRN", unary))
    net = Net(seed=1)
    h = net.conv(net.input(1, 3, 4, 4), 6, name="first")
    h = net.node("LRN", h, size=3, alpha=3.0, bias=0.5)
    h = net.conv(h, 3, 1, name="last", bias=False)
    h = net.node("Add", h, net.constant(np.array([900.0, 600.0, 300.0]).reshape(3, 1, 1)))
    net.output(net.node(ending, h, name="deaf", axis=None if ending == "Sigmoid" else 1))
    model = net.model()
    assert h in watched_values(analysis_of(model).graph, analysis_of(model).channels)
    assert refuted(onnxfuse.inspect(model)) == {"first"}


def whole_slice(site: Site) -> Iterator[Constraint]:
    """Say, wrongly, that what a Slice leaves whole at the sizes looked at is left whole at all."""
    x, y = site.input(0), site.output()
    for i, axis in enumerate(x.axes):
        yield Equal(axis, y[i])
        if x.is_weight:
            yield Weight(axis, Role.PRODUCER)


@pytest.mark.parametrize("symbol", ["", "length"])
def test_what_shows_at_other_sizes_alone_is_found(symbol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are all read at the length looked at are found to be cut at another, if the length is open."""
    plant(monkeypatch, Rule("Slice", whole_slice))
    net = Net(seed=1)
    # Of more entries than are computed ahead.
    x, table = net.input(2, 64, 3, batch="n"), net.weight(64, 80, name="table")
    zero, length = net.constant(np.array([0], np.int64)), net.node("Shape", x, start=1, end=2)
    rows = net.node("Slice", table, zero, length, zero, like=table, name="cut")
    h = net.node("Add", net.matmul(x, 80, name="first"), net.reduce("Mean", rows, [0]))
    net.output(net.matmul(net.node("Relu", h), 2, name="last"))
    model = net.model()
    for value in (model.graph.input[0], model.graph.output[0]):
        if symbol:
            value.type.tensor_type.shape.dim[1].dim_param = symbol
    report = onnxfuse.inspect(model)
    assert report.input_shapes == {"x0": (1, 64, 3)}
    assert refuted(report) == ({"cut:0-64"} if symbol else set())
    if symbol:
        assert "at other sizes of the inputs" in frozen(report)["cut:0-64"]


def test_noise_makes_no_proof_and_says_so() -> None:
    """A network with noise of its own can't be proven: a note says that its outputs differ from run to run."""
    net = Net()
    h = net.conv(net.input(1, 3, 4, 4), 6, name="first")
    noise = net.node("RandomNormal", shape=[1, 6, 4, 4], dtype=TensorProto.FLOAT)
    net.output(net.conv(net.node("Relu", h), 2, 1, name="last"), net.node("Identity", noise))
    report = onnxfuse.inspect(net.model())
    assert report.notes == (
        "the coupling was not proven on this model: its outputs differ from run to run on the same inputs",
    )
    assert frozen(report) == {"first": ""}


def test_rounding_that_differs_from_run_to_run_is_allowed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the last digits may differ from run to run: the proof holds and refutes as it does without."""
    rng, run = np.random.default_rng(0), Session.run

    def rounded(session: Session, feeds: Feeds) -> dict[str, Any]:
        return {
            name: y * (1 + 1e-6 * rng.normal(size=y.shape)).astype(y.dtype) for name, y in run(session, feeds).items()
        }

    monkeypatch.setattr(Session, "run", rounded)
    plant(monkeypatch, Rule("LRN", unary))
    report = onnxfuse.inspect(with_lrn(Net()))
    assert refuted(report) == {"second"}
    assert not [note for note in report.notes if "differ from run to run" in note]


def test_an_output_that_never_changes_makes_no_proof_and_says_so() -> None:
    """Outputs that hardly depend on the inputs show nothing, so there is no proof, and a note says so."""
    net = Net()
    h = net.gemm(net.input(2, 4), 6, name="first")
    h = net.gemm(net.node("Mul", h, net.constant(0.0)), 2, name="last", bias=False)
    net.output(net.node("Sigmoid", h))
    (note,) = onnxfuse.inspect(net.model()).notes
    assert "hardly depend on the inputs" in note


def test_nothing_to_prove_is_proven() -> None:
    """Where every group is frozen, there is nothing to prove and nothing to note."""
    net = Net()
    net.output(net.gemm(net.input(2, 4), 6, name="only"))
    assert onnxfuse.inspect(net.model()).notes == ()
    assert CouplingProof(0, {}).note == ""


def test_one_shift_for_all_channels_may_not_be_scaled() -> None:
    """A Gemm that adds a single number to all of its channels: that number has no factor of its own."""
    net = Net(seed=4)
    shift = net.constant(np.float32(0.5))
    h = net.node("Gemm", net.input(1, 4, batch="N"), net.weight(4, 6), shift, name="first")
    net.output(net.gemm(net.node("Relu", h), 2))
    analysis = analysis_of(net.model())
    assert not scalable_groups(analysis.graph, analysis.channels, free_groups(analysis))
    report = onnxfuse.compress(net.model(), ratio=0.5, method="prune", provider="cpu").report
    assert report.groups[0].channels_after == 3
