"""Reports: what they hold, that they are JSON for everyone, and what stays in the model."""

import json
import math
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxfuse
from onnxfuse import CompressionReport
from onnxfuse.fusion.options import FusionOptions
from onnxfuse.report import ModelCost, ValidationReport
from tests.builders import Net
from tests.conftest import QUICK, MakeMlp, logits_of


def strict(text: str) -> Any:
    """Read JSON as the standard has it."""

    def refuse(word: str) -> float:
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def report(digits: Path, models: Path) -> CompressionReport:
    """The report of a compression of the example network."""
    calibration = models / "digits_calibration.npz"
    output = digits.with_name("small.onnx")
    return onnxfuse.compress(digits, output, calibration=calibration, effort=QUICK, provider="cpu").report


def test_the_report_has_all_that_was_promised(report: CompressionReport, digits: Path) -> None:
    """The report has all that was promised."""
    plain = strict(report.to_json())
    small = digits.with_name("small.onnx")
    assert plain["before"] == {"parameters": 38234, "macs": 828736, "bytes": digits.stat().st_size}
    assert plain["after"] == {"parameters": 18281, "macs": 393756, "bytes": small.stat().st_size}
    assert (plain["model"], plain["output"], plain["provider"]) == (str(digits), str(small), "cpu")
    groups = {g["name"]: g for g in plain["groups"]}
    assert next(iter(groups)) == "/conv/Conv"
    assert groups["/conv/Conv"]["channels_before"], groups["/conv/Conv"]["channels_after"] == (16, 11)
    assert groups["/conv/Conv"]["frozen"] is None
    assert groups["/fc/Gemm"]["frozen"] == "graph output 'logits'"
    assert groups["/fc/Gemm"]["channels_after"] == groups["/fc/Gemm"]["channels_before"] == 10
    assert plain["drift"]["samples"] == 256
    assert plain["drift"]["outputs"][0].keys() == {
        "name", "max_abs", "mean_abs", "cosine", "sqnr_db", "top1_agreement",
    }  # fmt: skip
    assert set(plain["seconds"]) >= {"load", "couple", "fuse", "prove"}
    assert all(0 <= seconds < 60 for seconds in plain["seconds"].values())
    assert plain["versions"]["onnxfuse"] == onnxfuse.__version__
    assert plain["versions"].keys() >= {"python", "onnx", "numpy", "onnx-graphsurgeon", "scipy", "pot"}
    assert plain["config"]["ratio"] == 0.3
    assert plain["config"].keys() >= set(FusionOptions.__slots__)
    assert plain["config"]["method"] == "auto"


def test_a_group_is_called_after_its_first_producer(report: CompressionReport) -> None:
    """A group is called after its first producer."""
    assert [g.name for g in report.groups] == [g.nodes[0] for g in report.groups]


def test_names_of_groups_are_unique(report: CompressionReport) -> None:
    """Names of groups are unique."""
    names = [g.name for g in report.groups]
    assert len(set(names)) == len(names)


def test_the_model_carries_the_report_in_short(report: CompressionReport, digits: Path) -> None:
    """The model carries the report in short."""
    stored = {p.key: p.value for p in onnx.load(digits.with_name("small.onnx")).metadata_props}
    assert stored["onnxfuse.version"] == onnxfuse.__version__
    assert strict(stored["onnxfuse.report"]) == {
        "parameters": [38234, 18281],
        "macs": [828736, 393756],
        "method": "auto",
        "ratio": 0.3,
        "seed": 0,
        "source_sha256": report.sha256,
        "groups": {
            g.name: [g.channels_before, g.channels_after] for g in report.groups if g.channels_after < g.channels_before
        },
    }


def test_a_second_run_replaces_the_first_one_s_report(make_mlp: MakeMlp) -> None:
    """A second run replaces the first one's report."""
    first = onnxfuse.compress(make_mlp(), ratio=0.3).model
    second = onnxfuse.compress(first, ratio=0.5).model
    keys = [p.key for p in second.metadata_props]
    assert keys == ["onnxfuse.version", "onnxfuse.report"]
    assert strict(second.metadata_props[1].value)["ratio"] == 0.5


def test_numbers_of_numpy_are_plain_in_json(make_mlp: MakeMlp) -> None:
    """Numbers of NumPy are plain in JSON."""
    result = onnxfuse.compress(make_mlp(), ratio=np.float32(0.5), seed=np.int64(3), p=math.inf)
    config = strict(result.report.to_json())["config"]
    assert (config["ratio"], config["seed"], config["p"]) == (0.5, 3, "inf")
    short = strict({p.key: p.value for p in result.model.metadata_props}["onnxfuse.report"])
    assert (short["ratio"], short["seed"]) == (0.5, 3)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have_are_strings(number: float, make_mlp: MakeMlp) -> None:
    """Numbers that JSON does not have are strings."""
    drift = onnxfuse.validate(make_mlp(), make_mlp()).drift
    cost = ModelCost(1, 2, 3)
    report = ValidationReport("a", "b", cost, cost, drift, {"original": number}, "cpu", (), {})
    assert strict(report.to_json())["accuracy"] == {"original": str(number)}
    assert json.loads(report.to_json())["accuracy"]["original"] == str(number)


def test_text_that_is_not_ascii_stays_readable(make_mlp: MakeMlp) -> None:
    """Text that is not ascii stays readable."""
    report = onnxfuse.inspect(make_mlp(names=("schön", "второй")))
    assert '"schön"' in report.to_json()
    assert strict(report.to_json())["groups"][0]["name"] == "schön"


def test_inspection_counts_what_is_frozen(digits: Path) -> None:
    """Inspection counts what is frozen."""
    report = onnxfuse.inspect(digits)
    plain = strict(report.to_json())
    assert plain["opset"] == {"ai.onnx": 17}
    assert (plain["ir_version"], plain["input_shapes"], plain["notes"]) == (8, {"image": [1, 1, 8, 8]}, [])
    assert plain["frozen_reasons"] == {"graph output 'logits'": {"groups": 1, "parameters": 330}}
    assert plain["compressible_share"] == pytest.approx(1, abs=1e-3)
    assert all(g["channels_before"] == g["channels_after"] for g in plain["groups"])


def test_a_single_channel_costs_nothing() -> None:
    """Where there is one channel none could go; so it stays, and no parameters are lost by that."""
    net = Net(17)
    h = net.gemm(net.input(2, 5), 1, name="one")
    net.output(net.gemm(net.node("Relu", h), 3, name="last"))
    reasons = onnxfuse.inspect(net.model(), prove=False).frozen_reasons
    assert reasons["it has one channel"] == {"groups": 1, "parameters": 0}
    assert all(entry["parameters"] > 0 for reason, entry in reasons.items() if reason.startswith("graph output"))


def test_what_goes_with_other_channels_costs_nothing() -> None:
    """The groups of a normalisation stay, and with them just what there is once for each: channels of each may go."""
    net = Net(17)
    h = net.reshape(net.conv(net.input(1, 3, 4, 4), 12, name="first"), 1, 3, -1)
    h = net.reshape(net.node("InstanceNormalization", h, net.vector(3), net.vector(3)), 1, 12, 4, 4)
    h = net.node("Relu", net.node("Mul", h, net.vector(1, 12, 1, 1)))
    net.output(net.conv(h, 2, 1, name="last"))
    report = onnxfuse.inspect(net.model())
    (entry,) = [v for reason, v in report.frozen_reasons.items() if "which are fused instead" in reason]
    assert entry == {"groups": 1, "parameters": 6}


def test_no_parameter_stays_twice_for_one_reason() -> None:
    """Where the channels on both axes of a layer stay, its weight is counted once."""
    net = Net(17)
    h = net.conv(net.input(1, 2, 4, 4), 6, name="first")
    h = net.node("Concat", h, net.conv(h, 6, 1, name="second"), axis=2)
    net.output(net.conv(net.node("LRN", h, size=3), 2, 1, name="last"))
    report = onnxfuse.inspect(net.model())
    (entry,) = [v for reason, v in report.frozen_reasons.items() if "mixes the channels" in reason]
    # All of the three layers but the bias of the last.
    assert entry == {"groups": 1, "parameters": report.cost.parameters - 2}


def test_validation_counts_what_is_right(digits: Path, models: Path) -> None:
    """Validation counts what is right."""
    data = models / "digits_test.npz"
    small = digits.with_name("small.onnx")
    onnxfuse.compress(digits, small, effort=QUICK)
    plain = strict(onnxfuse.validate(digits, small, data=data, provider="cpu").to_json())
    arrays = np.load(data)
    for word, path in (("original", digits), ("compressed", small)):
        # Nothing of onnxfuse takes part in the count that it is compared with.
        logits = logits_of(path, arrays["image"])
        assert plain["accuracy"][word] == pytest.approx(np.mean(logits.argmax(axis=1) == arrays["labels"]))
    assert plain["drift"]["data"] == f"450 samples from {data}"


def test_a_checkout_that_is_not_installed_works(make_mlp: MakeMlp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout on the path works like an installed package."""

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    result = onnxfuse.compress(make_mlp(), method="prune")
    assert result.report.versions["onnxfuse"] == "not installed"
    assert {p.key: p.value for p in result.model.metadata_props}["onnxfuse.version"] == "not installed"


def test_options_without_effect_are_told(make_mlp: MakeMlp) -> None:
    """What only some methods ask for is told where another was used; not where a method asks for it."""
    samples = {"x": np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)}
    options: dict[str, Any] = {"prove": False, "provider": "cpu", "effort": 0}
    chosen = onnxfuse.compress(make_mlp(), calibration=samples, importance="l2", p=2, **options).report
    (note,) = chosen.notes
    assert note.startswith("--importance, --p had no effect: auto chose by what the readers of each group lose")
    assert not onnxfuse.compress(make_mlp(), calibration=samples, **options).report.notes
    by_weights: dict[str, Any] = {"method": "intra-fusion", "importance": "l2", "p": 2}
    assert not onnxfuse.compress(make_mlp(), calibration=samples, **by_weights, **options).report.notes
    idle = onnxfuse.compress(make_mlp(), method="prune", candidates=("descent",), **options).report
    assert any(note.startswith("--candidates has no effect: the method prune takes none") for note in idle.notes)
