"""Widths near those that a budget's last step leads to, which come nearer to the budget.

A channel of a small network, or a multiple of channels of any, may cost several percent of the whole; so the step that
brings a network below a budget may bring it far below. Between the two ends of that step are the costs of widths that
differ in a few groups. Which of these are considered does not depend on the budget, only which is taken: the dearest
that the budget allows. So a smaller budget never keeps more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from onnxfuse.arrays import FloatArray, IntArray
from onnxfuse.coupling.groups import CouplingGroup
from onnxfuse.coupling.layout import Atom
from onnxfuse.planning.costs import CostTable

__all__ = ["NEAR_ENOUGH", "Choice", "nearest_widths"]

# A budget is hit if so much of it is used.
NEAR_ENOUGH = 0.99
# How many other widths of a group are considered, each way, and of all groups together.
_MOST_SHIFTS, _MOST_MOVES = 8, 120
# How many groups may change together, and how many sets of all but one of them there may be.
_MOST_TOGETHER, _MOST_SETS = 5, 8000
# What fills a gap may do so many times the damage of the cheaper widths before it, or so much more: to hit a budget
# is not worth any damage.
_DEARER, _LITTLE = 1.5, 0.01
# Costs that differ by a smaller share are the same.
_ROUNDING = 1e-9


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


@dataclass(frozen=True)
class _Move:
    """Another width for one group.

    Attributes:
        number: Position of the group's choice.
        width: The width.
        step: How many channels more that is.
        cost: What the network costs more then.
        damage: How much more damage that does.
    """

    number: int
    width: int
    step: int
    cost: float
    damage: float


@dataclass(frozen=True, eq=False)
class _Found:
    """Sets of moves.

    Attributes:
        moves: Shape (n, 5), positions of moves; -1 for none.
        cost: Shape (n,), what the network costs with them.
        damage: Shape (n,), the damage in sum.
    """

    moves: IntArray
    cost: FloatArray
    damage: FloatArray

    def some(self, which: IntArray) -> "_Found":
        """Return some of them, in that order."""
        return _Found(self.moves[which], self.cost[which], self.damage[which])


def nearest_widths(
    choices: Sequence[Choice], table: CostTable, widths: Mapping[Atom, int], limit: float, above: float
) -> dict[Atom, int]:
    """Return the dearest widths within a budget of those near given ones that are worth it, or fill a gap.

    They are worth it if no cheaper ones do as little damage. Between costs of such that are more than a percent apart,
    those that do least damage fill the gap, unless that is more than half as much damage again.

    Args:
        choices: The groups.
        table: What the network costs.
        widths: The widths of all groups; they cost at most ``limit``.
        limit: What the network may cost.
        above: What it costs one step before ``widths``, more than ``limit``.
    """
    start = table.total(widths)
    lost = sum(float(choice.damage[widths[choice.group.atom]]) for choice in choices)
    if start >= NEAR_ENOUGH * above:
        return dict(widths)
    moves = _moves(choices, table, widths, above - start)
    found = _Found(np.full((1, _MOST_TOGETHER), -1), np.array([start]), np.array([lost]))
    interaction = _interactions(moves, choices, table, widths)
    rungs = found
    for size in range(1, _MOST_TOGETHER + 1):
        if _is_dense(rungs.cost, above) or not 0 < comb(len(moves), size - 1) <= _MOST_SETS:
            break
        found = _joined(found, _sets(moves, interaction, size, start, above, lost))
        rungs = found.some(_rungs(found, above))
    ladder = [_with(choices, widths, [moves[i] for i in row if i >= 0]) for row in rungs.moves]
    # What several groups save together is only nearly known so far.
    within = [(cost, n) for n, chosen in enumerate(ladder) if (cost := table.total(chosen)) <= limit]
    return ladder[max(within)[1]]


def _with(choices: Sequence[Choice], widths: Mapping[Atom, int], moves: Sequence[_Move]) -> dict[Atom, int]:
    return {**widths, **{choices[move.number].group.atom: move.width for move in moves}}


def _moves(choices: Sequence[Choice], table: CostTable, widths: Mapping[Atom, int], gap: float) -> list[_Move]:
    """Return other widths of every group, up to such as cost several times the gap more or less."""
    found: list[_Move] = []
    most = max(1, min(_MOST_SHIFTS, _MOST_MOVES // (2 * max(len(choices), 1))))
    for number, choice in enumerate(choices):
        now = widths[choice.group.atom]
        at = choice.widths.index(now)
        for others in (choice.widths[:at][::-1], choice.widths[at + 1 :]):
            if not others:
                continue
            first = abs(table.saving(choice.group, others[0], dict(widths)))
            reach = min(len(others), max(most, int(2 * gap / first)) if first > 0 else most)
            # The next ones, and, where a channel is small against the gap, some that are evenly apart.
            picked = np.unique(np.linspace(0, reach - 1, most).astype(int)) if reach > most else range(reach)
            for i in picked:
                cost = -table.saving(choice.group, others[i], dict(widths))
                damage = float(choice.damage[others[i]] - choice.damage[now])
                found.append(_Move(number, others[i], others[i] - now, cost, damage))
    return found


def _interactions(
    moves: Sequence[_Move], choices: Sequence[Choice], table: CostTable, widths: Mapping[Atom, int]
) -> FloatArray:
    """Return what two moves cost together beyond what they cost apart, shape (n, n); infinite for one group's.

    A node whose cost is a product of two widths makes it a product of both steps, so it is worked out once for two
    groups.
    """
    numbers = np.array([move.number for move in moves])
    steps = np.array([move.step for move in moves], float)
    found = np.zeros((len(moves), len(moves)))
    groups = [choice.group for choice in choices]
    for i, choice in enumerate(choices):
        for j in table.neighbours(choice.group, groups):
            first, second = ([move for move in moves if move.number == k] for k in (i, j))
            if i < j and first and second:
                one, other = (max(some, key=lambda move: abs(move.step)) for some in (first, second))
                apart = -table.saving(groups[j], other.width, _with(choices, widths, [one]))
                slope = (apart - other.cost) / (one.step * other.step)
                both = np.outer(np.where(numbers == i, steps, 0), np.where(numbers == j, steps, 0))
                found += slope * (both + both.T)
    found[numbers[:, None] == numbers] = np.inf
    return found


def _sets(
    moves: Sequence[_Move], interaction: FloatArray, size: int, start: float, above: float, lost: float
) -> _Found:
    """Return the sets of so many moves whose cost lies between two costs."""
    each = np.array([move.cost for move in moves])
    damage = np.array([move.damage for move in moves])
    rest = np.array(list(combinations(range(len(moves)), size - 1)), np.int64).reshape(
        comb(len(moves), size - 1), size - 1
    )
    cost = start + each[rest].sum(axis=1)
    for i, j in combinations(range(size - 1), 2):
        cost += interaction[rest[:, i], rest[:, j]]
    # All beginnings go on with every move behind their last one, at once.
    whole = cost[:, None] + each + interaction[rest].sum(axis=1)
    fits = (whole > start * (1 + _ROUNDING)) & (whole < above * (1 - _ROUNDING))
    if size > 1:
        fits &= np.arange(len(moves)) > rest[:, -1:]
    begin, last = np.nonzero(fits)
    rows = np.full((len(begin), _MOST_TOGETHER), -1)
    rows[:, : size - 1] = rest[begin]
    rows[:, size - 1] = last
    return _Found(rows, whole[fits], lost + damage[last] + damage[rest].sum(axis=1)[begin])


def _joined(*found: _Found) -> _Found:
    return _Found(
        np.concatenate([f.moves for f in found]),
        np.concatenate([f.cost for f in found]),
        np.concatenate([f.damage for f in found]),
    )


def _rungs(found: _Found, above: float) -> IntArray:
    """Return which sets of moves may be taken, by cost: those worth it, and between them those that fill gaps."""
    order = np.lexsort((found.damage, found.cost))
    cost, damage = found.cost[order], found.damage[order]
    least = np.minimum.accumulate(damage)
    worth = np.flatnonzero(np.concatenate([[True], damage[1:] < least[:-1]]))
    rungs: list[int] = []
    for here, following in zip(worth, [*worth[1:], len(order)], strict=True):
        rungs.append(int(here))
        end = cost[following] if following < len(order) else above
        while cost[rungs[-1]] < NEAR_ENOUGH * end:
            first = int(np.searchsorted(cost, cost[rungs[-1]] * (1 + _ROUNDING), side="right"))
            last = min(int(np.searchsorted(cost, cost[rungs[-1]] / NEAR_ENOUGH, side="right")), int(following))
            if first >= following:
                break
            best = first + int(np.argmin(damage[first : max(last, first + 1)]))
            if damage[best] > max(_DEARER * damage[here], damage[here] + _LITTLE):
                break
            rungs.append(best)
    return np.asarray(order[rungs])


def _is_dense(cost: FloatArray, above: float) -> bool:
    """Whether any budget up to a cost is hit by one of some costs, which ascend."""
    return bool(np.all(cost >= NEAR_ENOUGH * np.append(cost[1:], above)))
