"""Tables for people: what was done to each group, by what, and at which cost."""

from pathlib import Path

from rich.console import Console, RenderableType

import onnxfuse
from onnxfuse.cli.render import compression_tables, plan_tables
from onnxfuse.planning.files import Plan, PlannedGroup
from tests.conftest import Command
from tests.test_cli import assert_quiet, one_object


def lines_of(table: RenderableType) -> list[str]:
    """Return the lines that a table is shown as."""
    with (shown := Console(width=200)).capture() as capture:
        shown.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_compress_shows_what_won_for_each_group_and_its_damage(digits: Path, models: Path) -> None:
    """For every group that was fused: what won, and J in percent; the rest of the words are explained below."""
    calibration = models / "digits_calibration.npz"
    report = onnxfuse.compress(
        digits, target="macs=0.5", calibration=calibration, effort=0, prove=False, provider="cpu"
    ).report
    lines = lines_of(compression_tables(report, verbose=True))
    start = next(i for i, line in enumerate(lines) if line.startswith("coupling group"))
    assert lines[start].split() == ["coupling", "group", "channels", "method", "J", "state"]
    assert len({group.method for group in report.groups}) > 2
    for group, line in zip(report.groups, lines[start + 1 :], strict=False):
        if group.channels_after < group.channels_before:
            assert group.damage is not None
            said = f"{group.name} {group.channels_before} -> {group.channels_after} {group.method}"
            assert " ".join(line.split()).startswith(f"{said} {100 * group.damage:.2f} %")
        else:
            assert " ".join(line.split()) == f"{group.name} 10 -> 10 kept: {group.frozen}"
    assert sum(line.startswith("J: ") for line in lines) == 1


def test_there_is_no_damage_where_none_was_measured(digits: Path) -> None:
    """A method that looks at no samples has a name but no J; the column, and what it means, are left out."""
    report = onnxfuse.compress(digits, ratio=0.5, method="prune", prove=False, provider="cpu").report
    lines = lines_of(compression_tables(report, verbose=False))
    assert ["coupling", "group", "channels", "method", "state"] in [line.split() for line in lines]
    assert "/block1/conv1/Conv 16 -> 8 prune" in [" ".join(line.split()) for line in lines]
    assert not [line for line in lines if line.startswith("J: ")]


def test_small_damages_can_be_told_apart(digits: Path) -> None:
    """A damage that two decimals would show as nothing is shown with its own digits; none at all is 0."""
    plan = onnxfuse.plan(digits, ratio=0.5, effort=0, prove=False, provider="cpu")
    groups = {
        name: PlannedGroup(8, 4, None, damage)
        for name, damage in {"a": 0.0, "b": 3.2e-7, "c": 0.00005, "d": 1.5}.items()
    }
    lines = lines_of(plan_tables(Plan(plan.model, "", groups, {})))
    assert [line.split()[4:] for line in lines[1:5]] == [
        ["0.00", "%"],
        ["3.2e-05", "%"],
        ["0.01", "%"],
        ["150.00", "%"],
    ]


def test_a_plan_in_a_file_is_shown_as_a_table(cli: Command, digits: Path) -> None:
    """A plan that goes into a file is shown, with notes such as that nothing was given to choose by."""
    path = digits.with_name("plan.json")
    words = ("plan", digits, "-o", path, "--target", "macs=0.5", "--no-prove", "--effort", "0")
    outcome = cli(*words)
    assert_quiet(outcome)
    found = one_object(path.read_text(encoding="utf-8"))
    head, *lines = [line.rstrip() for line in outcome.out.splitlines()]
    assert head.split() == ["coupling", "group", "channels", "J", "state"]
    for (name, group), line in zip(found["groups"].items(), lines, strict=False):
        shown = " ".join(line.split())
        if group["keep"] < group["channels"]:
            assert shown == f"{name} {group['channels']} -> {group['keep']} {100 * group['damage']:.2f} %"
        else:
            why = f": {group['frozen']}" if "frozen" in group else ""
            assert shown == f"{name} {group['channels']} -> {group['keep']} kept{why}"
    assert [f"note: {note}" for note in found["notes"]] == [line for line in lines if line.startswith("note: ")]
    assert any("no data" in note for note in found["notes"])
    assert cli(*words, "--quiet").out == ""
