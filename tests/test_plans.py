"""Plans: made, written, edited, read and replayed; and widths that are asked for by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxfuse
from onnxfuse.errors import ConfigError, DataError
from onnxfuse.planning.files import Plan, read_plan
from onnxfuse.target import Keep
from tests.conftest import QUICK, MakeMlp


@pytest.fixture
def made(digits: Path, models: Path) -> Plan:
    """A plan for the example network."""
    return onnxfuse.plan(
        digits, target="macs=0.5", calibration=models / "digits_calibration.npz", prove=False, provider="cpu"
    )


def edited(plan: Plan, tmp_path: Path, **changes: Any) -> Path:
    """Write a plan with other entries."""
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**json.loads(plan.to_json()), **changes}), encoding="utf-8")
    return path


def test_a_plan_is_replayed_as_it_was_made(made: Plan, digits: Path, models: Path, tmp_path: Path) -> None:
    """Compressing by a plan, as an object or through its file, gives what its own options give."""
    calibration = models / "digits_calibration.npz"
    path = tmp_path / "plan.json"
    path.write_text(made.to_json(), encoding="utf-8")
    assert read_plan(path).to_json() == made.to_json()
    assert f"from {calibration}" in made.samples
    results = [
        onnxfuse.compress(digits, calibration=calibration, effort=QUICK, prove=False, provider="cpu", **how)
        for how in ({"target": "macs=0.5"}, {"plan": made}, {"plan": path})
    ]
    for result in results:
        assert {g.name: g.channels_after for g in result.report.groups} == {n: g.keep for n, g in made.groups.items()}
        del result.model.metadata_props[:]
    assert len({result.model.SerializeToString(deterministic=True) for result in results}) == 1
    assert all(group.damage is None or group.damage >= 0 for group in made.groups.values())


def test_an_edited_plan_is_followed(made: Plan, digits: Path, tmp_path: Path) -> None:
    """An edited width is followed, and groups that are left out keep all channels."""
    path = edited(made, tmp_path, groups={"/block1/conv1/Conv": {"channels": 16, "keep": 5}})
    report = onnxfuse.compress(digits, plan=path, method="prune", prove=False, provider="cpu").report
    changed = {g.name: g.channels_after for g in report.groups if g.channels_after < g.channels_before}
    assert changed == {"/block1/conv1/Conv": 5}


def test_a_plan_for_another_file_is_said_to_be_one(made: Plan, digits: Path, tmp_path: Path) -> None:
    """A plan that was made for another file with the same groups is used, with a note."""
    path = edited(made, tmp_path, sha256="0" * 64)
    report = onnxfuse.compress(digits, plan=path, method="prune", prove=False, provider="cpu").report
    assert any("another file" in note for note in report.notes)


def test_a_plan_for_other_weights_is_said_to_be_one(tmp_path: Path, make_mlp: MakeMlp) -> None:
    """A plan for a file whose weights, beside it, have changed is used, with a note; for the same ones without."""
    path = tmp_path / "m.onnx"
    onnx.save_model(make_mlp(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    options: dict[str, Any] = {"method": "prune", "prove": False, "provider": "cpu"}
    made = onnxfuse.plan(path, ratio=0.5, **options)
    assert onnxfuse.compress(path, plan=made, **options).report.notes == ()
    weights = np.fromfile(tmp_path / "weights.bin", np.float32)
    (2 * weights).tofile(tmp_path / "weights.bin")
    (note,) = onnxfuse.compress(path, plan=made, **options).report.notes
    assert note == f"the plan was made for another file, {str(path)!r}, with the same groups"


BAD_GROUPS = {
    "unknown": ({"nobody": {"channels": 16, "keep": 5}}, "does not have"),
    "too many": ({"/conv/Conv": {"channels": 16, "keep": 17}}, "keeps 17 of 16"),
    "other width": ({"/conv/Conv": {"channels": 12, "keep": 5}}, "which has 16"),
    "frozen": ({"/fc/Gemm": {"channels": 10, "keep": 5}}, "graph output"),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_a_plan_that_does_not_fit_is_refused(made: Plan, digits: Path, tmp_path: Path, case: str) -> None:
    """A plan that names other groups, or widths that a group can't have, is refused."""
    groups, message = BAD_GROUPS[case]
    with pytest.raises(ConfigError, match=message) as caught:
        onnxfuse.compress(digits, plan=edited(made, tmp_path, groups=groups), prove=False, provider="cpu")
    assert caught.value.where == "--plan"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no plan"),
        ("{}", "no plan"),
        ('{"onnxfuse_plan": 7}', "its format is 7"),
        (
            '{"onnxfuse_plan": 1, "model": "m", "sha256": "", "groups": {"a": {"channels": 4, "keep": 1.5}}}',
            "keep of 'a' is 1.5, not a whole number",
        ),
        ('{"onnxfuse_plan": 1, "groups": {"a": {"channels": 4, "kep": 1}}}', "keep of 'a' is missing"),
        ('{"onnxfuse_plan": 1, "groups": {}}', "'model' is missing"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(digits: Path, tmp_path: Path, text: str, message: str) -> None:
    """A file that is no plan is refused, and so is one that is not there."""
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        onnxfuse.compress(digits, plan=path, provider="cpu")
    with pytest.raises(DataError, match="can't be read"):
        onnxfuse.compress(digits, plan=tmp_path / "missing.json", provider="cpu")


@pytest.mark.parametrize("option", [{"ratio": 0.5}, {"target": "macs=0.5"}])
def test_a_plan_excludes_a_ratio_and_a_target(made: Plan, digits: Path, option: dict[str, Any]) -> None:
    """A plan excludes a ratio and a target."""
    with pytest.raises(ConfigError, match="a plan is given beside"):
        onnxfuse.compress(digits, plan=made, provider="cpu", **option)


@pytest.mark.parametrize("how", [{"ratio": 0.5}, {"target": "macs=0.6"}])
def test_groups_keep_what_is_asked_for_by_name(digits: Path, how: dict[str, Any]) -> None:
    """Groups keep what is asked for by name, whatever a ratio or a budget says; the last rule that fits holds."""
    keep = ("/block*=0.25", "/block1/*=13", "/conv/Conv=1.0")
    report = onnxfuse.compress(digits, keep=keep, effort=QUICK, prove=False, provider="cpu", **how).report
    after = {g.name: g.channels_after for g in report.groups}
    assert (after["/conv/Conv"], after["/block1/conv1/Conv"], after["/block2/conv1/Conv"]) == (16, 13, 8)


@pytest.mark.parametrize("text", ["a", "=3", "a=", "a=0", "a=-1", "a=1.5", "a=x", "a=nan", "a=inf"])
def test_other_rules_are_refused(text: str) -> None:
    """Rules of another form are refused, and so are patterns that fit nothing."""
    with pytest.raises(ConfigError, match="does not say what to keep"):
        Keep.parse(text)


def test_a_pattern_that_fits_nothing_is_refused(digits: Path) -> None:
    """A pattern that fits no group is refused."""
    with pytest.raises(ConfigError, match="no group's name fits 'nobody'"):
        onnxfuse.compress(digits, keep="nobody=3", provider="cpu")


def test_the_written_model_is_the_planned_one(made: Plan, digits: Path, tmp_path: Path) -> None:
    """The file that a plan gives has the widths that it states."""
    output = tmp_path / "small.onnx"
    onnxfuse.compress(digits, output, plan=made, method="prune", prove=False, provider="cpu")
    shapes = {t.name: tuple(t.dims) for t in onnx.load(output).graph.initializer}
    assert any(dims[0] == made.groups["/block1/conv1/Conv"].keep for dims in shapes.values() if len(dims) == 4)


@pytest.mark.parametrize(
    ("flag", "options"),
    [
        ("--keep", {"keep": ("/block1/*=7",)}),
        ("--min-channels", {"min_channels": 4}),
        ("--round-to", {"round_to": 8}),
        ("--ratio", {"ratio": 0.3}),
        ("--target", {"target": "macs=0.5"}),
    ],
)
def test_options_that_a_plan_decides_are_refused_beside_it(flag: str, options: Any, made: Plan, digits: Path) -> None:
    """What says how many channels stay is refused beside a plan, which says so itself; what it has is named."""
    with pytest.raises(ConfigError, match="beside other options that say how many channels stay") as caught:
        onnxfuse.compress(digits, plan=made, prove=False, provider="cpu", **options)
    assert caught.value.where == f"--plan, {flag}"
