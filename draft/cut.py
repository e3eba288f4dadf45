"""How far trees grow and where they are cut: what the trees of a step are worth once they are there.

``draft.planner`` decides on trees that it expects; these functions look at those that grew, at the values of
their nodes and at the seconds that went into them, and minimise the same time per emitted token.
"""

from __future__ import annotations

from collections.abc import Sequence

from draft.costs import StepCosts
from draft.search import Load


def best_cut(times: Sequence[float], values: Sequence[float], tokens: float) -> tuple[float, int]:
    """How many nodes to take (values best first): the least times[count] / (tokens + their sum), and the
    count."""
    best, num_best = times[0] / tokens, 0
    for count, value in enumerate(values, start=1):
        tokens += value
        rate = times[count] / tokens
        if rate < best:
            best, num_best = rate, count
    return best, num_best


def keep(
    costs: StepCosts, load: Load, values: Sequence[Sequence[float]], spent: float, fixed: Sequence[bool] = ()
) -> list[int]:
    """How many of its best nodes to keep of every tree of the batch (ties: the older node first).

    values: path values of each tree's nodes, root excluded, in any order; spent: seconds that drafting took;
    fixed: trees of which all is kept, none if empty.
    """
    whole = fixed or [False] * len(values)
    counts = [len(of) if all_of else 0 for of, all_of in zip(values, whole, strict=True)]
    tokens = len(values) + sum(sum(of) for of, all_of in zip(values, whole, strict=True) if all_of)
    pool = sorted(
        (-value, place)
        for place, (of, all_of) in enumerate(zip(values, whole, strict=True))
        if not all_of
        for value in of
    )
    rows = len(values) + load.other_rows + sum(counts)
    times = [spent + seconds for seconds in costs.verify_run(rows, len(pool) + 1, load.context)]
    _, num_kept = best_cut(times, [-negative for negative, _ in pool], tokens)
    for _, place in pool[:num_kept]:
        counts[place] += 1
    return counts


def is_worth_level(
    costs: StepCosts,
    load: Load,
    values: Sequence[Sequence[float]],
    frontier: Sequence[Sequence[float]],
    chances: Sequence[float],
    spent: float,
) -> bool:
    """Whether the target's step gets better by more than another level costs.

    values: path values of all nodes so far, by tree; frontier: of those that would be expanded, by tree;
    chances: that the best child of an accepted frontier node is accepted too, by tree; spent: seconds.
    """
    so_far = sorted((value for of in values for value in of), reverse=True)
    children = [value * chance for of, chance in zip(frontier, chances, strict=True) for value in of]
    times = costs.verify_run(len(values) + load.other_rows, len(so_far) + len(children) + 1, load.context)
    tokens = float(len(values))
    now, _ = best_cut([spent + seconds for seconds in times], so_far, tokens)
    spent += costs.level(len(children))
    later, _ = best_cut(
        [spent + seconds for seconds in times], sorted(so_far + children, reverse=True), tokens
    )
    return later < now
