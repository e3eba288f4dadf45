"""The least time per token by trying everything: who drafts, how many levels, how wide, how many rows.

Written from SPECULATION.md section 4. Rows are shared out by dynamic programming: ``table[r]`` is the most
tokens that r rows can promise, over all ways to split them among the requests. Slow and obvious.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Seconds: of a target step of so many rows, of a draft's first pass, of a further level."""

    verify: Callable[[int], float]
    first: Callable[[int], float]
    level: Callable[[int], float]


@dataclass(frozen=True)
class Request:
    """Typical path values by level, chances of a lookup chain, and the sizes it may use."""

    levels: Sequence[Sequence[float]]
    lookup: Sequence[float]
    nodes: int
    depth: int
    top_k: int


def promises(request: Request, levels: int, top_k: int) -> list[float]:
    """The most tokens that 0, 1, 2, .. rows can promise; levels 0: without the head.

    A node of the head counts for the chance that the lookup's token of its level is wrong. It needs its
    ancestors, so nodes are taken in the order of what they were worth without the lookup.
    """
    found: dict[int, float] = {}
    width = min(top_k, request.top_k)
    for length in range(len(request.lookup) + 1):
        values = []
        for level, row in enumerate(request.levels[: min(levels, request.depth)], start=1):
            missed = 1.0 - request.lookup[level - 1] if level <= length else 1.0
            allowed = width if level == 1 or width == 1 else width * width
            values += [(-value, level, value * missed) for value in row[:allowed]]
        values.sort()
        for count in range(min(len(values), request.nodes - 1) + 1):
            tokens = sum(request.lookup[:length]) + sum(value for _, _, value in values[:count])
            rows = length + count
            found[rows] = max(found.get(rows, 0.0), tokens)
    return [found[rows] for rows in range(len(found))]


def share_out(tables: Iterable[list[float]]) -> list[float]:
    """The most tokens of all requests together, by total rows."""
    best = [0.0]
    for table in tables:
        merged = [0.0] * (len(best) + len(table) - 1)
        for (rows, tokens), (more, further) in itertools.product(enumerate(best), enumerate(table)):
            merged[rows + more] = max(merged[rows + more], tokens + further)
        best = merged
    return best


def rate(costs: Costs, requests: Sequence[Request], drafting: set[int], levels: int, top_k: int) -> float:
    """Least seconds per token of one shape for given drafting requests."""
    spent = 0.0
    if drafting:
        spent = costs.first(len(drafting))
        for level in range(1, levels):
            expanding = [requests[i] for i in drafting if requests[i].depth > level]
            spent += costs.level(sum(min(top_k, request.top_k) for request in expanding)) if expanding else 0
    best = share_out(
        promises(request, levels if place in drafting else 0, top_k) for place, request in enumerate(requests)
    )
    count = len(requests)
    return min((spent + costs.verify(count + rows)) / (count + tokens) for rows, tokens in enumerate(best))


def best_rate(costs: Costs, requests: Sequence[Request], groups: Iterable[set[int]]) -> float:
    """Least seconds per token over all shapes and the given groups of drafting requests."""
    most_levels, most_top_k = max(r.depth for r in requests), max(r.top_k for r in requests)
    shapes = list(itertools.product(range(1, most_levels + 1), range(1, most_top_k + 1)))
    return min(
        rate(costs, requests, group, levels, top_k)
        for group in groups
        for levels, top_k in (shapes if group else [(0, 1)])
    )


def all_groups(count: int) -> list[set[int]]:
    """Every subset of so many requests."""
    return [set(g) for size in range(count + 1) for g in itertools.combinations(range(count), size)]
