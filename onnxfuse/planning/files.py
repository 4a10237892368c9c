"""Plans as files that people read, edit and replay: JSON with the width of every group."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnxfuse.errors import ConfigError, DataError
from onnxfuse.planning.widths import GroupPlan

__all__ = ["Plan", "PlannedGroup", "apply_plan", "read_plan"]

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class PlannedGroup:
    """What is planned for one group.

    Attributes:
        channels: C, how many channels the group has.
        keep: K, how many it is to keep.
        frozen: Why it keeps all of them; None if it need not.
        damage: The relative damage J of keeping K of them; None where no samples were looked at.
    """

    channels: int
    keep: int
    frozen: str | None = None
    damage: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan for one model.

    Attributes:
        model: Name of the model that it was made for.
        sha256: Hash of that file, and of the weights that lie beside it; empty for a part of it.
        groups: By group name, in graph order.
        options: The options that it was made with, for the reader; they have no effect when it is replayed.
        notes: What else a reader should know, such as a budget that can't be met; without effect likewise.
        samples: The samples of the user's that the damages were measured on, likewise; empty without any.
    """

    model: str
    sha256: str
    groups: Mapping[str, PlannedGroup]
    options: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    samples: str = ""

    def without(self, names: Sequence[str]) -> "Plan":
        """Return the plan for all groups but some."""
        return replace(self, groups={name: group for name, group in self.groups.items() if name not in names})

    def inside(self, prefix: str) -> "Plan":
        """Return the plan for the groups whose names begin with a prefix, without that, for a part of the file."""
        chosen = {name.removeprefix(prefix): g for name, g in self.groups.items() if name.startswith(prefix)}
        return replace(self, sha256="", groups=chosen)

    def to_json(self) -> str:
        """Return the plan as JSON, a line for each group, so that it is easy to read and to edit."""
        head = {"onnxfuse_plan": _FORMAT, "model": self.model, "sha256": self.sha256, "options": dict(self.options)}
        head |= {"samples": self.samples} if self.samples else {}
        head |= {"notes": list(self.notes)} if self.notes else {}
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        groups = [f"    {json.dumps(name)}: {json.dumps(_entry(group))}" for name, group in self.groups.items()]
        return "\n".join(["{", *lines, '  "groups": {', ",\n".join(groups), "  }", "}"])


def _entry(group: PlannedGroup) -> dict[str, Any]:
    """Leave out what says nothing."""
    entry: dict[str, Any] = {"channels": group.channels, "keep": group.keep}
    if group.frozen is not None:
        entry["frozen"] = group.frozen
    if group.damage is not None:
        entry["damage"] = round(group.damage, 6)
    return entry


def read_plan(source: str | os.PathLike[str] | Plan) -> Plan:
    """Read a plan.

    Args:
        source: Path of the file, or a plan, which is given back.

    Raises:
        DataError: There is no such file, or it is no plan.
    """
    if isinstance(source, Plan):
        return source
    where = str(source)
    try:
        found = json.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        what = f"the plan can't be read: {error.strerror or error}"
        raise DataError(
            what, where=where, mend="check the path; `onnxfuse plan MODEL -o plan.json` makes one"
        ) from error
    except ValueError as error:
        what = f"the plan is not JSON: {error}"
        raise DataError(what, where=where, mend="mind the commas and quotes of the lines that were edited") from error
    try:
        return _parsed(found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else error
        what = f"this is no plan of onnxfuse, or it is damaged: {problem}"
        raise DataError(what, where=where, mend="make one with `onnxfuse plan MODEL -o plan.json`") from error


def _parsed(found: Mapping[str, Any]) -> Plan:
    if found["onnxfuse_plan"] != _FORMAT:
        what = f"its format is {found['onnxfuse_plan']!r}, not {_FORMAT}"
        raise ValueError(what)
    groups = {str(name): _planned(name, entry) for name, entry in found["groups"].items()}
    notes = tuple(map(str, found.get("notes", ())))
    return Plan(
        str(found["model"]), str(found["sha256"]), groups, dict(found["options"]), notes, str(found.get("samples", ""))
    )


def _planned(name: str, entry: Mapping[str, Any]) -> PlannedGroup:
    for key in ("channels", "keep"):
        found = entry.get(key)
        if not isinstance(found, int) or isinstance(found, bool):
            what = f"{key} of {name!r} is " + (f"{found!r}, not a whole number" if key in entry else "missing")
            raise TypeError(what)
    return PlannedGroup(entry["channels"], entry["keep"], entry.get("frozen"), entry.get("damage"))


def apply_plan(plan: Plan, plans: Sequence[GroupPlan]) -> list[GroupPlan]:
    """Return the groups with the widths that a plan has for them; those that it leaves out keep all channels.

    Raises:
        ConfigError: It names a group that the model does not have, or a width that the group can't have.
    """
    known = {p.group.name: p for p in plans}
    for name, wanted in plan.groups.items():
        if name not in known:
            what = f"the plan is for a group {name!r}, which this model does not have"
            raise ConfigError(what, where="--plan", mend="`onnxfuse inspect` lists the groups; is it the same model?")
        group = known[name].group
        if wanted.channels != group.channels or not 1 <= wanted.keep <= group.channels:
            what = f"the plan keeps {wanted.keep} of {wanted.channels} channels of {name!r}, which has {group.channels}"
            raise ConfigError(what, where="--plan", mend="give from 1 to all of them")
        if wanted.keep < group.channels and wanted.keep % group.multiple:
            what = f"the plan keeps {wanted.keep} channels of {name!r}, which must be a multiple of {group.multiple}"
            raise ConfigError(what, where="--plan", mend="give such a number, or all of them")
        if known[name].reason and wanted.keep < group.channels:
            what = f"the plan keeps {wanted.keep} of {group.channels} channels of {name!r}: {known[name].reason}"
            raise ConfigError(what, where="--plan", mend="keep all channels of this group")
    kept = {name: wanted.keep for name, wanted in plan.groups.items()}
    return [replace(p, kept=kept.get(p.group.name, p.group.channels)) for p in plans]
