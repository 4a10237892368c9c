"""How many channels each group keeps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction

from onnxfuse.config import CompressionConfig, Scope
from onnxfuse.coupling.groups import CouplingGroup
from onnxfuse.errors import ConfigError
from onnxfuse.target import Keep

__all__ = ["GroupPlan", "allowed_widths", "fits", "kept_channels", "plan_widths", "reason_to_keep"]


@dataclass(frozen=True, eq=False)
class GroupPlan:
    """What happens to one group.

    Attributes:
        group: The group.
        kept: K, how many channels it keeps.
        reason: Why it keeps all of them although less was asked for; empty if it does not.
        is_fixed: Whether K was asked for by name, so that no budget changes it.
    """

    group: CouplingGroup
    kept: int
    reason: str
    is_fixed: bool = False


def kept_channels(channels: int, ratio: float) -> int:
    """Return K = floor(C (1 - ratio)), at least 1, with the ratio taken as the decimal number that was written.

    Example:
        >>> kept_channels(64, 0.3), kept_channels(90, 0.3), kept_channels(1, 0.9)
        (44, 63, 1)
    """
    return max(1, math.floor(channels * (1 - Fraction(str(ratio)))))


def allowed_widths(channels: int, config: CompressionConfig, multiple: int = 1) -> tuple[int, ...]:
    """Return the widths that a group of C channels may have, decreasing from C on.

    Below C they are multiples of ``round_to`` and of what the group's operators ask for, and at least
    ``min_channels``.

    Example:
        >>> allowed_widths(20, CompressionConfig(round_to=8))
        (20, 16, 8)
    """
    unit = math.lcm(config.round_to, multiple)
    least = max(config.min_channels, unit, 1)
    first = math.ceil(channels / unit) * unit - unit
    return (channels, *(width for width in range(first, 0, -unit) if width >= least))


def plan_widths(
    groups: Sequence[CouplingGroup], config: CompressionConfig, elsewhere: Sequence[str] = ()
) -> list[GroupPlan]:
    """Decide the width of every group by the ratio, in the order of ``groups``; for a budget, the least possible one.

    Args:
        groups: The groups.
        config: The options.
        elsewhere: Names of groups that are planned elsewhere, which a pattern may fit instead.

    Raises:
        ConfigError: A pattern fits no group at all.
    """
    names = [*(group.name for group in groups), *elsewhere]
    keeps = tuple(Keep.parse(rule).pattern for rule in config.keep)
    for flag, patterns in (("--keep", keeps), ("--only", config.only), ("--skip", config.skip)):
        for pattern in patterns:
            if not any(fits(name, [pattern]) for name in names):
                what = f"no group's name fits {pattern!r}"
                raise ConfigError(what, where=flag, mend="`onnxfuse inspect` lists the names of the groups")
    return [_plan(group, config) for group in groups]


def reason_to_keep(name: str, config: CompressionConfig, *, residual: bool) -> str:
    """Return why the options leave a group of that name out; empty if they do not."""
    if config.scope is Scope.HIDDEN and residual:
        return "a residual addition ties it, and the scope is hidden"
    if config.only and not fits(name, config.only):
        return "it fits no pattern of --only"
    if fits(name, config.skip):
        return "it fits a pattern of --skip"
    return ""


def _plan(group: CouplingGroup, config: CompressionConfig) -> GroupPlan:
    reason = group.frozen or reason_to_keep(group.name, config, residual=group.residual)
    if reason:
        return GroupPlan(group, group.channels, reason)
    fixed = [keep for rule in config.keep if fits(group.name, [(keep := Keep.parse(rule)).pattern])]
    if fixed:
        return GroupPlan(group, _rounded(fixed[-1].width(group.channels), group, 1), "", is_fixed=True)
    if config.target:
        # What it will be is up to the budget; the ratio that is usual says nothing of whether it can have fewer.
        return GroupPlan(group, allowed_widths(group.channels, config, group.multiple)[-1], "")
    kept = max(kept_channels(group.channels, config.removed), config.min_channels)
    return GroupPlan(group, _rounded(kept, group, config.round_to), "")


def _rounded(kept: int, group: CouplingGroup, round_to: int) -> int:
    """Return K, up to the next multiple that is asked for, by an option or by the group's operators."""
    unit = math.lcm(round_to, group.multiple)
    return min(group.channels, math.ceil(kept / unit) * unit)


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether a group's name fits one of some patterns; its own name always fits it."""
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)
