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

__all__ = ["GroupPlan", "allowed_widths", "kept_channels", "plan_widths"]

_MOST_WIDTHS = 64


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


def allowed_widths(channels: int, config: CompressionConfig) -> tuple[int, ...]:
    """Return the widths that a group of C channels may have, decreasing from C on.

    Below C they are multiples of ``round_to`` and at least ``min_channels``; of many, about 64 are enough to choose
    from.

    Example:
        >>> allowed_widths(20, CompressionConfig(round_to=8))
        (20, 16, 8)
    """
    least = max(config.min_channels, config.round_to, 1)
    step = config.round_to * max(1, round(channels / config.round_to / _MOST_WIDTHS))
    first = math.ceil(channels / config.round_to) * config.round_to - config.round_to
    return (channels, *(width for width in range(first, 0, -step) if width >= least))


def plan_widths(groups: Sequence[CouplingGroup], config: CompressionConfig) -> list[GroupPlan]:
    """Decide the width of every group by the ratio, in the order of ``groups``.

    Raises:
        ConfigError: A pattern fits no group at all.
    """
    keeps = tuple(Keep.parse(rule).pattern for rule in config.keep)
    for flag, patterns in (("--keep", keeps), ("--only", config.only), ("--skip", config.skip)):
        for pattern in patterns:
            if not any(_fits(group.name, pattern) for group in groups):
                what = f"no group's name fits {pattern!r}"
                raise ConfigError(what, where=flag, mend="`onnxfuse inspect` lists the names of the groups")
    return [_plan(group, config) for group in groups]


def _plan(group: CouplingGroup, config: CompressionConfig) -> GroupPlan:
    reason = group.frozen
    if not reason and config.scope is Scope.HIDDEN and group.residual:
        reason = "a residual addition ties it, and the scope is hidden"
    if not reason and config.only and not any(_fits(group.name, p) for p in config.only):
        reason = "it fits no pattern of --only"
    if not reason and any(_fits(group.name, p) for p in config.skip):
        reason = "it fits a pattern of --skip"
    if reason:
        return GroupPlan(group, group.channels, reason)
    fixed = [keep for rule in config.keep if _fits(group.name, (keep := Keep.parse(rule)).pattern)]
    if fixed:
        return GroupPlan(group, fixed[-1].width(group.channels), "", is_fixed=True)
    return GroupPlan(group, _rounded(group.channels, config), "")


def _rounded(channels: int, config: CompressionConfig) -> int:
    """Return K by the ratio, up to the next multiple that is asked for."""
    kept = max(kept_channels(channels, config.ratio), config.min_channels)
    return min(channels, math.ceil(kept / config.round_to) * config.round_to)


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)
