"""The best shape of a step's drafts, on the requests' typical trees.

For one shape (levels, children) and one set of drafting requests, the best nodes are a cut through the pooled
trees (``draft.planner``). Shapes are few and all tried. Who drafts is settled in two looks: first all do,
then only those whose nodes pay for their share of the draft, taken by what they gained.

Tokens of prompt lookup are nodes that need no draft. Where head and lookup both propose, one of them counts
only for the chance that the other is wrong; so a sure lookup leaves the head nothing to gain.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from draft.belief import MAX_LEVELS, Levels
from draft.costs import StepCosts
from engine.core import Speculation

_LEAST_VALUE = 0.01  # a less likely node decides nothing here
# Of the time per token that lookups must save where nobody drafts: less than that is lost in planning, and in
# what is believed of costs. With many users one more token is no more than that.
_LOOKUP_MARGIN = 0.02
_MOST_LOOKED_UP = 32  # tokens of lookups that may be taken together where nobody drafts
_TRIFLE = 0.002  # nor does so small a share of a step

Asked = Literal["auto", "fixed", "off"]


@dataclass(frozen=True, slots=True)
class Seat:
    """One request of the batch, as the planner sees it."""

    asked: Asked  # "fixed": the request gave its sizes, and they are obeyed
    limits: Speculation  # the most it may use in this step; off where there is no room
    levels: Levels  # typical path values of its trees, as many levels as the limits' depth
    lookup: Sequence[float] = ()  # path chances of the chain that prompt lookup found
    drafted: bool | None = None  # what the last plan had decided; None for a newcomer
    idle_steps: int = 0  # steps since a tree was last drafted for it
    num_pending: int = 0  # pairs that the head would have to catch up with

    @property
    def is_free(self) -> bool:
        """Whether the planner decides."""
        return self.asked == "auto" and not self.limits.is_off


@dataclass(frozen=True, slots=True)
class Load:
    """What the step does anyway."""

    context: float  # mean tokens before the sequences
    other_rows: int = 0  # of prompt chunks in the same step


class Shape(NamedTuple):
    """How the free requests that draft do so; the same for all, since a level is drafted for all together."""

    levels: int = 0
    top_k: int = 1


# (minus its path value, level, seat) of a node of a typical tree; level 0 are tokens of a lookup without a
# head, _BESIDE those of one beside a head. Sorts best first, then shallow first. Plain tuples: hundreds are
# made in a step.
Node = tuple[float, int, int]
_BESIDE = -1


class Found(NamedTuple):
    """The best nodes of a shape."""

    seconds_per_token: float
    drafting: frozenset[int]  # free seats for which the head drafts
    taken: list[Node]
    seconds: float  # of the step
    draft_seconds: float  # of them


class Search:
    """The typical trees of a batch, pooled, and times by the number of nodes taken from them."""

    def __init__(self, costs: StepCosts, seats: Sequence[Seat], load: Load) -> None:
        self.costs, self.seats, self.load = costs, seats, load
        self.free = [place for place, seat in enumerate(seats) if seat.is_free]
        self.fixed = [
            place for place, seat in enumerate(seats) if seat.asked == "fixed" and not seat.limits.is_off
        ]
        most = sum(seats[place].limits.nodes + len(seats[place].lookup) for place in self.free + self.fixed)
        self.times = costs.verify_run(len(seats) + load.other_rows, most + 1, load.context)
        self.tokens = [1.0] * len(seats)  # that each seat emits without a draft of ours
        self.rows = 0  # that fixed seats add
        self._fixed_levels: list[int] = []  # rows of their levels
        for place in self.fixed:
            self._add_fixed(place)
        self._tokens = sum(self.tokens)
        self._lookups: list[Node] = sorted(
            (-chance, 0, place)
            for place in self.free
            for chance in seats[place].lookup[: seats[place].limits.lookup]
        )
        self.without_head = self._take([], frozenset(), Shape())
        if self._lookups:
            found = self._take(self._lookups, frozenset(), Shape())
            if found.seconds_per_token < (1 - _LOOKUP_MARGIN) * self.without_head.seconds_per_token:
                self.without_head = found
        self._pools: dict[Shape, list[Node]] = {}

    def least_chance(self) -> float:
        """What a token of a lookup must at least be worth, on average, for any number of them to pay where
        nobody drafts; 0 if that is unknown."""
        if self.fixed:
            return 0.0
        now, *more = self.times[: _MOST_LOOKED_UP + 1]
        bar = (1 - _LOOKUP_MARGIN) * now
        prices = [(seconds - bar) / count for count, seconds in enumerate(more, start=1)]
        return min(prices, default=0.0) * self._tokens / bar

    def _add_fixed(self, place: int) -> None:
        seat = self.seats[place]
        size = seat.limits
        values = sorted(
            (value for level in seat.levels[: size.depth] for value in level[: size.top_k]), reverse=True
        )
        self.tokens[place] += max(sum(values[: size.nodes - 1]), sum(seat.lookup[: size.lookup]))
        self.rows += size.nodes - 1 + min(len(seat.lookup), size.lookup)
        for level in range(size.depth):
            if level == len(self._fixed_levels):
                self._fixed_levels.append(0)
            self._fixed_levels[level] += size.top_k

    def _draft_seconds(self, num_drafting: int, rows: Sequence[int]) -> float:
        """rows: what the free seats expand, by level from the second one on; 0 where none is so deep."""
        if not num_drafting and not self.fixed:
            return 0.0
        if self.fixed:
            both = itertools.zip_longest(rows, self._fixed_levels[1:], fillvalue=0)
            rows = [free + fixed for free, fixed in both]
        return self.costs.draft(num_drafting + len(self.fixed), [count for count in rows if count])

    def _level_rows(self, drafting: Collection[int], shape: Shape) -> list[int]:
        rows = [0] * (shape.levels - 1)
        for place in drafting:
            limits = self.seats[place].limits
            for level in range(min(shape.levels, limits.depth) - 1):
                rows[level] += min(shape.top_k, limits.top_k)
        return rows

    def _pool(self, shape: Shape) -> list[Node]:
        """What can be taken in a shape, best first, and perhaps deeper nodes."""
        if not self._lookups:  # nodes are worth the same in shapes of any depth: one pool for them all
            shape = Shape(MAX_LEVELS, shape.top_k)
        pool = self._pools.get(shape)
        if pool is None:
            pool = self._lookups[:]
            for place in self.free:
                pool += _nodes(place, self.seats[place], shape)
            pool.sort()
            self._pools[shape] = pool
        return pool

    def best(self) -> tuple[Found, Shape]:
        """The best nodes over all shapes, and for each over who takes part."""
        best, best_shape = self.without_head, Shape()
        if not self.free:
            return best, best_shape
        limits = [self.seats[place].limits for place in self.free]
        most_levels, most_top_k = max(size.depth for size in limits), max(size.top_k for size in limits)
        for top_k in sorted({top_k for top_k in (1, 2, 4, 8) if top_k < most_top_k} | {most_top_k}):
            worse, before = 0, float("inf")
            for levels in range(1, most_levels + 1):
                shape = Shape(levels, top_k)
                found = self._refined(shape, best.seconds_per_token)
                if found.seconds_per_token < best.seconds_per_token:
                    best, best_shape = found, shape
                worse = worse + 1 if found.seconds_per_token >= before else 0
                before = found.seconds_per_token
                if worse == 2:  # values fall from level to level, their price does not
                    break
        return best, best_shape

    def again(self, drafting: set[int], shape: Shape) -> tuple[Found, Shape]:
        """The best nodes of a shape for given seats."""
        if not drafting or not shape.levels:
            return self.without_head, Shape()
        return self._take(self._pool(shape), frozenset(drafting), shape), shape

    def _refined(self, shape: Shape, bar: float) -> Found:
        """All draft, or only those whose nodes pay for their share of the draft.

        bar: seconds per token that would be of interest.
        """
        everybody = self._take(self._pool(shape), frozenset(self.free), shape)
        if len(self.free) == 1:
            return everybody
        alone = self._draft_seconds(1, self._level_rows(self.free[:1], shape))
        share = (everybody.draft_seconds - alone) / everybody.seconds  # the most that others' absence saves
        if share < _TRIFLE or everybody.seconds_per_token * (1 - share) >= bar:
            return everybody
        gains, counts = dict.fromkeys(self.free, 0.0), dict.fromkeys(self.free, 0)
        tokens, num_taken = self._tokens, self.rows
        for negative, level, place in everybody.taken:
            if level > 0:
                gains[place] -= negative
                counts[place] += 1
            else:
                tokens -= negative
                num_taken += 1
        best, num_best = self.without_head.seconds_per_token, 0
        order = sorted(self.free, key=lambda place: -gains[place])
        rows = [0] * (shape.levels - 1)
        for number, place in enumerate(order, start=1):
            limits = self.seats[place].limits
            for level in range(min(shape.levels, limits.depth) - 1):
                rows[level] += min(shape.top_k, limits.top_k)
            tokens += gains[place]
            num_taken += counts[place]
            rate = (self._draft_seconds(number, rows) + self.times[num_taken]) / tokens
            if rate < best:
                best, num_best = rate, number
        if num_best in (0, len(order)):
            return everybody
        few = self._take(self._pool(shape), frozenset(order[:num_best]), shape)
        return min(everybody, few, key=lambda found: found.seconds_per_token)

    def _take(self, pool: Sequence[Node], drafting: frozenset[int], shape: Shape) -> Found:
        """The best number of nodes, by value."""
        most = shape.levels
        room = [seat.limits.nodes - 1 if place in drafting else 0 for place, seat in enumerate(self.seats)]
        spent = self._draft_seconds(len(drafting), self._level_rows(drafting, shape) if drafting else [])
        tokens, times, rows = self._tokens, self.times, self.rows
        best, num_best = (spent + times[rows]) / tokens, 0
        rest = -sum([node[0] for node in pool])  # of what has not been looked at
        taken = []
        for node in pool:
            negative, level, seat = node
            rest += negative
            if level > 0:
                if level > most or not room[seat]:
                    continue
                room[seat] -= 1
            elif (level == _BESIDE) != (seat in drafting):
                continue
            taken.append(node)
            rows += 1
            tokens -= negative
            seconds = spent + times[rows]
            if seconds < best * tokens:
                best, num_best = seconds / tokens, len(taken)
            elif seconds >= best * (tokens + rest):  # not even if all further rows were free
                break
        return Found(best, drafting, taken[:num_best], spent + times[self.rows + num_best], spent)


def _nodes(place: int, seat: Seat, shape: Shape) -> list[Node]:
    """What can be taken for a seat whose head drafts.

    Every level before a node's has a better one, so that a tree of few nodes never gets to the later ranks of
    its later levels. Where head and lookup both propose, the likelier comes first and the other counts for
    the chance that the first is wrong.
    """
    size = seat.limits
    depth, top_k = min(shape.levels, size.depth), min(shape.top_k, size.top_k)
    widths = [top_k] + [top_k if top_k == 1 else top_k * top_k] * (depth - 1)
    levels = [
        values[: max(min(width, size.nodes - level), 0)]
        for level, (values, width) in enumerate(zip(seat.levels, widths, strict=False), start=1)
    ]
    heads = [
        (-value, level) for level, of in enumerate(levels, start=1) for value in of if value >= _LEAST_VALUE
    ]
    beside = list(seat.lookup[: size.lookup])
    if not beside:
        return [(negative, level, place) for negative, level in heads]
    heads = sorted(heads)[: size.nodes - 1]
    missed = [1.0] * (depth + 1)
    for level, (values, chance) in enumerate(zip(levels, beside, strict=False), start=1):
        if values and chance < values[0]:
            tried = sum(negative for negative, of in heads if of == level)
            beside[level - 1] *= max(1.0 + tried, 0.0)
        else:
            missed[level] -= chance
    worths = _falling([-negative * missed[level] for negative, level in heads])
    nodes = [(-worth, level, place) for worth, (_, level) in zip(worths, heads, strict=True)]
    return nodes + [(-chance, _BESIDE, place) for chance in _falling(beside)]


def _falling(values: Sequence[float]) -> list[float]:
    """The same in sum, but never growing: a node worth more than one that it needs is taken with it."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while blocks and blocks[-1][0] < mean:
            before, more = blocks.pop()
            mean, count = (mean * count + before * more) / (count + more), count + more
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]
