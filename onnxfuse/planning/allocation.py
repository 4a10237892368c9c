"""How many channels each group keeps under a budget: where the least damage is done for what is saved."""

from collections.abc import Mapping, Sequence
from math import inf

import numpy as np

from onnxfuse.arrays import FloatArray
from onnxfuse.coupling.groups import CouplingGroup
from onnxfuse.coupling.layout import Atom
from onnxfuse.planning.costs import CostTable
from onnxfuse.planning.nearest import Choice, nearest_widths

__all__ = ["Choice", "allocate", "lower_hull"]

# Of more widths of a group the greedy solution looks at about so many.
_MOST_WIDTHS = 64


def allocate(
    choices: Sequence[Choice], table: CostTable, limit: float, fixed: Mapping[Atom, int] | None = None
) -> dict[Atom, int]:
    """Choose widths so that the network costs at most ``limit``, and little less, with little damage in sum.

    From the full widths on, the next step is always the one with the least damage for what it saves at the widths so
    far (a greedy solution of the knapsack; exact for convex damages and independent savings). Damages are replaced by
    their lower convex hulls, so that a step that looks dear does not hide cheap ones behind it. Of the last step as
    little is taken as is needed; and where that is still more than a percent too much, other widths come nearer
    (`nearest_widths`). The steps don't depend on the budget, so a smaller one never keeps more.

    Args:
        choices: The groups.
        table: What the network costs.
        limit: What it may cost; it is not exceeded.
        fixed: Widths of other groups that are not up for choice.

    Returns:
        The width of every group, the fixed ones too. Where the widths allow no less than ``limit``, their least.
    """
    widths: dict[Atom, int] = dict(fixed or {}) | {choice.group.atom: choice.widths[0] for choice in choices}
    coarse = [_coarse(choice.widths) for choice in choices]
    hulls = [lower_hull(np.asarray(steps), choice.damage) for choice, steps in zip(choices, coarse, strict=True)]
    at = [0] * len(choices)
    groups = [choice.group for choice in choices]
    near = [table.neighbours(group, groups) for group in groups]
    cost = table.total(widths)

    def slope(i: int) -> float:
        return _slope(groups[i], coarse[i], hulls[i], at[i], table, widths)

    slopes = np.array([slope(i) for i in range(len(choices))])
    while cost > limit and len(slopes) and np.isfinite(slopes).any():
        best = int(np.argmin(slopes))
        at[best] += 1
        group, before, width = groups[best], coarse[best][at[best] - 1], coarse[best][at[best]]
        saved = table.saving(group, width, widths)
        if cost - saved <= limit:
            steps = [w for w in choices[best].widths if width <= w < before]
            return _last_step(choices, table, widths, group, steps, limit)
        cost -= saved
        widths[group.atom] = width
        for i in near[best]:
            slopes[i] = slope(i)
    return widths


def _last_step(
    choices: Sequence[Choice],
    table: CostTable,
    widths: dict[Atom, int],
    group: CouplingGroup,
    steps: Sequence[int],
    limit: float,
) -> dict[Atom, int]:
    """Return widths within the budget: those given, but one group as wide as it allows, or others near these."""
    above = table.total(widths)
    for width in steps:
        chosen = {**widths, group.atom: width}
        cost = table.total(chosen)
        if cost <= limit:
            return nearest_widths(choices, table, chosen, limit, above)
        above = cost
    return {**widths, group.atom: steps[-1]}


def _coarse(widths: tuple[int, ...]) -> tuple[int, ...]:
    """Return about 64 of many widths: enough to compare groups by.

    Example:
        >>> _coarse((5, 4, 3, 2, 1)), _coarse(tuple(range(256, 0, -1)))[-3:]
        ((5, 4, 3, 2, 1), (8, 4, 1))
    """
    step = max(1, round(len(widths) / _MOST_WIDTHS))
    some = widths[::step]
    return some if some[-1] == widths[-1] else (*some, widths[-1])


def lower_hull(widths: np.ndarray[tuple[int], np.dtype[np.int64]], damage: FloatArray) -> FloatArray:
    """Return the greatest convex function of the width that is nowhere above the damage, at those widths.

    Example:
        >>> lower_hull(np.array([3, 2, 1]), np.array([9.0, 8.0, 8.0, 0.0])).tolist()
        [0.0, 4.0, 8.0]
    """
    points = [(float(w), float(damage[w])) for w in widths[::-1]]
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x1) < (y - y1) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return np.asarray(np.interp(np.asarray(widths, float), [p[0] for p in hull], [p[1] for p in hull]))


def _slope(
    group: CouplingGroup,
    steps: Sequence[int],
    hull: FloatArray,
    at: int,
    table: CostTable,
    widths: dict[Atom, int],
) -> float:
    """Return the damage of a group's next step for each unit saved; infinite where there is none."""
    if at + 1 >= len(steps):
        return inf
    saved = table.saving(group, steps[at + 1], widths)
    return float(hull[at + 1] - hull[at]) / saved if saved > 0 else inf
