"""How many channels each group keeps under a budget: where the least damage is done for what is saved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from onnxfuse.arrays import FloatArray
from onnxfuse.coupling.groups import CouplingGroup
from onnxfuse.coupling.layout import Atom
from onnxfuse.planning.costs import CostTable

__all__ = ["Choice", "allocate", "lower_hull"]


@dataclass(frozen=True, eq=False)
class Choice:
    """A group whose width is to be chosen.

    Attributes:
        group: The group.
        damage: Shape (C + 1,), float64: the damage with k channels kept, not increasing.
        widths: The widths that it may have, decreasing, the first its present one.
    """

    group: CouplingGroup
    damage: FloatArray
    widths: tuple[int, ...]


def allocate(
    choices: Sequence[Choice], table: CostTable, limit: float, fixed: Mapping[Atom, int] | None = None
) -> dict[Atom, int]:
    """Choose widths so that the network costs at most ``limit``, with little damage in sum.

    From the full widths on, the next step is always the one with the least damage for what it saves at the widths so
    far (a greedy solution of the knapsack; exact for convex damages and independent savings). Damages are replaced by
    their lower convex hulls, so that a step that looks dear does not hide cheap ones behind it.

    Args:
        choices: The groups.
        table: What the network costs.
        limit: What it may cost; it is not exceeded.
        fixed: Widths of other groups that are not up for choice.

    Returns:
        The width of every group, the fixed ones too. Where the widths allow no less than ``limit``, their least.
    """
    widths: dict[Atom, int] = dict(fixed or {}) | {choice.group.atom: choice.widths[0] for choice in choices}
    hulls = [lower_hull(np.asarray(choice.widths), choice.damage) for choice in choices]
    at = [0] * len(choices)
    groups = [choice.group for choice in choices]
    near = [table.neighbours(group, groups) for group in groups]
    cost = table.total(widths)
    slopes = np.array([_slope(choices[i], hulls[i], at[i], table, widths) for i in range(len(choices))])
    while cost > limit and len(slopes) and np.isfinite(slopes).any():
        best = int(np.argmin(slopes))
        at[best] += 1
        width = choices[best].widths[at[best]]
        cost -= table.saving(groups[best], width, widths)
        widths[groups[best].atom] = width
        for i in near[best]:
            slopes[i] = _slope(choices[i], hulls[i], at[i], table, widths)
    _fill_up(choices, hulls, at, table, widths, limit - cost)
    return widths


def _fill_up(
    choices: Sequence[Choice],
    hulls: Sequence[FloatArray],
    at: list[int],
    table: CostTable,
    widths: dict[Atom, int],
    room: float,
) -> None:
    """Give channels back where they fit into what the last steps have saved too much, those that help most first."""
    while True:
        found: list[tuple[float, int, float]] = []
        for i, choice in enumerate(choices):
            if at[i] == 0:
                continue
            price = -table.saving(choice.group, choice.widths[at[i] - 1], widths)
            if 0 < price <= room:
                found.append(((hulls[i][at[i]] - hulls[i][at[i] - 1]) / price, i, price))
        if not found:
            return
        _, best, price = max(found)
        at[best] -= 1
        widths[choices[best].group.atom] = choices[best].widths[at[best]]
        room -= price


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


def _slope(choice: Choice, hull: FloatArray, at: int, table: CostTable, widths: dict[Atom, int]) -> float:
    """Return the damage of a group's next step for each unit saved; infinite where there is none."""
    if at + 1 >= len(choice.widths):
        return inf
    saved = table.saving(choice.group, choice.widths[at + 1], widths)
    return float(hull[at + 1] - hull[at]) / saved if saved > 0 else inf
