"""How much to draft: plain decoding, a chain, a tree or prompt lookup, for every request and step.

The objective is the least expected time per emitted token of the batch,

    (draft seconds + seconds of the target's step) / (sequences + expected accepted tokens),

where every sequence emits its bonus, and a node adds its path value: the chance that the step gets that far.
Three questions come up on the way of a step, and pure functions answer them:

- ``plan``, before drafting: who drafts, how many levels, how wide, which tokens of prompt lookup; on the
  requests' typical trees (``draft.belief``);
- ``draft.cut.is_worth_level``, while drafting: whether to expand the frontier once more;
- ``draft.cut.keep``, after drafting: how many of its best nodes each tree may show the target.

All rest on one fact: a row costs the same whoever needs it, so nodes are taken by value over the whole batch,
and the only question is how many. Along a path values never grow, and ties go to the older node, so the
ancestors of whatever is taken are taken too. Every count is looked at, so that the answer is exact for any
cost curve: with a knee or a jump the first bad node is not the last good one.

``Planner`` holds what the functions are given: costs, beliefs, the last plan, counters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from draft.belief import Belief, Levels
from draft.costs import StepCosts
from draft.cut import is_worth_level, keep
from draft.search import Asked, Found, Load, Search, Seat, Shape
from engine.core import Decision, Speculation

Reason = Literal[
    "chain",
    "tree",
    "lookup",
    "probe",
    "request said off",
    "no room for a draft",
    "nothing to draft",
    "not worth it: rows cost too much",
    "not worth it: drafting costs too much",
]

_MARGIN = 0.03  # a new shape must save this share of the time per token
_PROBE_SHARE = 0.005  # of all time that may go into probes
_LEAST_PROBE_STEPS = 16
_MODE_SLOWNESS = 8.0  # a mode's belief follows its requests' trees so much slower than each request's own
# Plans between searches for a better shape: the fewest, and the most where search after search finds that
# nobody should draft. Newcomers are not kept waiting.
_LOOK_EVERY, _LOOK_SELDOM = 8, 64
# A typical tree lags behind the text, and while nothing is drafted nothing is learned of it. Where a draft is
# asked before every level, a bad one costs its first pass alone, so it is tried as if it were worth so much;
# not with more requests than this, for what is tried in vain adds up.
_LENIENCE, _LENIENT_SEATS = 1.2, 4
# Newcomers are looked at in the step in which they come, unless they are so small a part of a batch in which
# nobody drafts: what is not worth it for the others will hardly be for them.
_NEWS = 0.25
_CERTAINLY = 0.9  # of the least chance that pays: costs have moved a little since it was found
_PLAIN_EVERY = 512  # steps with drafts after which one has none, so that its cost stays known


@dataclass(frozen=True, slots=True)
class Plan:
    """The decisions of a step, and what the next plan must know of them."""

    decisions: tuple[Decision, ...]
    shape: Shape  # of free requests that draft, and ..
    drafted: tuple[bool, ...]  # .. which they are; both without probes
    is_probe: bool  # this step tries out what the plan is against
    seconds_per_token: float  # expected, of the batch
    plain_seconds_per_token: float
    least_chance: float = 0.0  # with a smaller one no lookup's token pays for its row in such a step


def plan(
    costs: StepCosts,
    seats: Sequence[Seat],
    load: Load,
    last: Shape | None = None,
    *,
    steps_since_probe: int = 0,
    steps_since_plain: int = 0,
    stops_early: bool = False,
    looks_around: bool = True,
) -> Plan:
    """Decide for a batch.

    last: shape of the last plan, None if there was none; it stays unless another is better by a margin.
    steps_since_plain: since the last step without any draft. stops_early: ``is_worth_level`` is asked before
    every level, so a draft may go as deep as its limits. looks_around: False spares most of the time; then
    only the last plan is compared with having no head in this step, as lookups come and go.
    """
    search = Search(costs, seats, load)
    newcomers = [place for place in search.free if seats[place].drafted is None]
    same = {place for place in search.free if seats[place].drafted}
    are_news = len(newcomers) > (0 if last is not None and last.levels else _NEWS * len(search.free))
    if last is not None and not looks_around and not are_news:
        stays, shape = search.again(same, last)
        found = min(stays, search.without_head, key=lambda found: found.seconds_per_token)
    else:
        found, shape = search.best()
        stays = found
        if last is not None:
            kept, kept_shape = search.again(same | found.drafting.intersection(newcomers), last)
            if found.seconds_per_token > (1 - _MARGIN) * kept.seconds_per_token:
                found, shape = kept, kept_shape
                stays = found
    drafted = tuple(place in stays.drafting for place in range(len(seats)))
    plain = search.times[0] / len(seats)
    if found.drafting and not search.fixed and steps_since_plain >= _PLAIN_EVERY:
        off = tuple(Decision(seat.limits.within(1), _refusal(seat) or "probe") for seat in seats)
        return Plan(off, shape, drafted, True, plain, plain)
    probed = _probe(search, found, steps_since_probe)
    decisions = _decisions(search, found, shape, probed, stops_early)
    least = 0.0 if stays.drafting else search.least_chance()
    return Plan(decisions, shape, drafted, probed is not None, found.seconds_per_token, plain, least)


def _refusal(seat: Seat) -> Reason | None:
    """Why there is nothing to decide for a seat."""
    if seat.asked == "off":
        return "request said off"
    return "no room for a draft" if seat.limits.is_off else None


def _probe(search: Search, found: Found, steps_since_probe: int) -> int | None:
    """The idle seat whose turn it is to be drafted for, to see whether that has become worth it.

    One seat at a time, the longest idle first, and so seldom that probes take ``_PROBE_SHARE`` of the time
    even if nothing of what they propose is accepted.
    """
    idle = [place for place in search.free if place not in found.drafting]
    if not idle:
        return None
    place = max(idle, key=lambda place: search.seats[place].idle_steps)
    rows = search.rows + len(found.taken)
    extra = search.costs.first(1) + search.costs.catch_up(search.seats[place].num_pending)
    extra += search.times[rows + 1] - search.times[rows]
    least = max(extra / (_PROBE_SHARE * found.seconds), _LEAST_PROBE_STEPS)
    return place if min(steps_since_probe, search.seats[place].idle_steps) >= least else None


def _decisions(
    search: Search, found: Found, shape: Shape, probed: int | None, stops_early: bool
) -> tuple[Decision, ...]:
    tokens, lookups, nodes = search.tokens[:], [0] * len(search.seats), [1] * len(search.seats)
    for negative, level, place in found.taken:
        tokens[place] -= negative
        lookups[place] += level <= 0
        nodes[place] += level > 0
    no_head = _why_not(search, found)
    decisions = []
    for place, seat in enumerate(search.seats):
        limits, lookup = seat.limits, lookups[place]
        refusal, size, reason = _refusal(seat), limits.within(1), no_head
        if refusal is not None:
            reason = refusal
        elif seat.asked == "fixed":
            size, reason = limits, _form(limits.top_k) if limits.has_tree else "lookup"
        elif place in found.drafting:
            depth, top_k = min(shape.levels, limits.depth), min(shape.top_k, limits.top_k)
            reason = _form(top_k)
            if stops_early:
                size = replace(limits, top_k=top_k, lookup=lookup)
            else:
                size = Speculation(max(nodes[place], 2), depth, top_k, lookup)
        elif place == probed:
            size, reason = Speculation(2, 1, 1, lookup), "probe"
        elif lookup:
            size, reason = replace(limits, nodes=1, lookup=lookup), "lookup"
        saved = search.times[0] - found.seconds / tokens[place]
        decisions.append(Decision(size, reason, saved * 1e3))
    return tuple(decisions)


def _form(top_k: int) -> Reason:
    return "chain" if top_k == 1 else "tree"


def _why_not(search: Search, found: Found) -> Reason:
    """Whether it is the rows that make the head's nodes too dear, or drafting them."""
    firsts = [search.seats[place].levels[0][0] for place in search.free if search.seats[place].levels]
    if not firsts:
        return "nothing to draft"
    if max(firsts) * found.seconds_per_token <= search.times[search.rows + 1] - search.times[search.rows]:
        return "not worth it: rows cost too much"
    return "not worth it: drafting costs too much"


# --- the state


@dataclass(frozen=True, slots=True)
class Ask:
    """A request of the batch, as the step knows it."""

    request_id: int
    sampled: bool
    asked: Asked
    limits: Speculation  # the most it may use in this step; off where tokens or pages run out
    lookup: Sequence[float] = ()  # path chances of the chain that prompt lookup found
    num_pending: int = field(default=0, compare=False)  # pairs that the head would have to catch up with


@dataclass(frozen=True, slots=True)
class Drafted:
    """What became of a request's draft."""

    request_id: int
    levels: Levels  # path values of the head's tree before the cut, best first in each level; () without one
    expected: float  # sum of the path values of the nodes that the target scored
    accepted: int  # of them


@dataclass(slots=True)
class _Memory:
    """What is kept of a request."""

    belief: Belief
    sampled: bool
    drafted: bool | None = None
    idle_steps: int = 0


class Planner:
    """Beliefs by request, the last plan and the counters; one per engine, asked once a step.

    Costs are learned by ``costs.observe_verify`` and ``costs.observe_draft``, beliefs by ``observe``.
    stops_early: as for ``plan``.
    """

    def __init__(self, costs: StepCosts | None = None, *, stops_early: bool = False) -> None:
        self.costs = StepCosts() if costs is None else costs
        self._stops_early = stops_early
        self.start_over()

    def start_over(self) -> None:
        """Forget what requests have shown; costs stay."""
        self._modes = (Belief(), Belief())  # greedy, sampled
        self._memories: dict[int, _Memory] = {}
        self._shape: Shape | None = None
        self._since_probe = self._since_plain = 0
        self._next_look, self._look_every = 0, _LOOK_EVERY  # in plans
        self._asks: Sequence[Ask] = ()
        self._whole: list[bool] = []  # of which asks every drafted node is kept
        self._load = Load(0.0)
        self._least_chance = 0.0  # as the last plan has it
        self._planned: tuple[Sequence[Ask], Load, Plan, bool] | None = None
        self._made: Plan | None = None  # the last plan, if others may go by it, ..
        self._age = 0  # .. and how many steps have

    def plan(self, asks: Sequence[Ask], load: Load) -> Plan:
        """Decide for the sequences of a decode step, in their order. Unless the plan is carried out, the next
        one is made as if nobody had asked for it."""
        asks = self._without_idle_lookups(asks, load)
        looks_around = self._next_look < 1
        if not looks_around and self._still_holds(asks, load):
            assert self._made is not None
            self._planned = asks, load, self._made, False
            return self._made
        lenience = _LENIENCE if self._stops_early and len(asks) <= _LENIENT_SEATS else 1.0
        found = plan(
            self.costs,
            [_seat(ask, self._memory(ask), lenience) for ask in asks],
            load,
            self._shape,
            steps_since_probe=self._since_probe + 1,
            steps_since_plain=self._since_plain + 1,
            stops_early=self._stops_early,
            looks_around=looks_around,
        )
        self._planned = asks, load, found, looks_around
        return found

    def _without_idle_lookups(self, asks: Sequence[Ask], load: Load) -> Sequence[Ask]:
        """The asks as if lookups that cannot pay had found nothing. With many users and dear rows these are
        nearly all, and every one would make a new plan."""
        least = _CERTAINLY * self._least_chance
        if not least or len(asks) != len(self._asks) or load.other_rows != self._load.other_rows:
            return asks
        return [
            ask
            if not ask.lookup or ask.lookup[0] * self._memory(ask).belief.trust >= least
            else replace(ask, lookup=ask.lookup[:0])
            for ask in asks
        ]

    def _still_holds(self, asks: Sequence[Ask], load: Load) -> bool:
        """Whether the last plan is good for another step: what one step teaches is hardly ever news, and to
        plan costs a small model's step a hundredth."""
        if self._made is None or self._made.is_probe or self._age >= _LOOK_EVERY:
            return False
        return load.other_rows == self._load.other_rows and list(asks) == list(self._asks)

    def carry_out(self) -> None:
        """The last plan is what the step does."""
        assert self._planned is not None, "a step without a plan"
        (self._asks, self._load, found, looked_around), self._planned = self._planned, None
        self._age = self._age + 1 if found is self._made else 1
        self._made = None if looked_around else found  # what hysteresis has kept may be worse than no head
        self._since_probe = 0 if found.is_probe else self._since_probe + 1
        is_plain = all(decision.speculation.is_off for decision in found.decisions)
        self._since_plain = 0 if is_plain else self._since_plain + 1
        self._next_look -= 1
        if looked_around:
            drafts = found.shape.levels > 0
            self._look_every = _LOOK_EVERY if drafts else min(2 * self._look_every, _LOOK_SELDOM)
            self._next_look = self._look_every - 1
        self._shape, self._least_chance = found.shape, found.least_chance
        # A probe is also to show what its row costs and whether it is accepted.
        self._whole = [
            ask.asked == "fixed" or decision.reason == "probe"
            for ask, decision in zip(self._asks, found.decisions, strict=True)
        ]
        for ask, drafted in zip(self._asks, found.drafted, strict=True):
            memory = self._memory(ask)
            memory.drafted = drafted
            memory.idle_steps += 1

    def is_worth_level(
        self,
        depth: int,
        values: Sequence[Sequence[float]],
        frontier: Sequence[Sequence[float]],
        num_drafting: int,
        level_rows: Sequence[int],
    ) -> bool:
        """Whether to expand the frontier, whose nodes have this depth; lists by sequence of the plan.

        level_rows: rows of the levels expanded so far.
        """
        if any(ask.asked == "fixed" and ask.limits.depth > depth for ask in self._asks):
            return True
        beliefs = [self._memories[ask.request_id].belief for ask in self._asks]
        return is_worth_level(
            self.costs,
            self._load,
            [belief.trusted(of) for belief, of in zip(beliefs, values, strict=True)],
            [belief.trusted(of) for belief, of in zip(beliefs, frontier, strict=True)],
            [belief.chance(depth + 1) for belief in beliefs],
            self.costs.draft(num_drafting, level_rows),
        )

    def keep(
        self, values: Sequence[Sequence[float]], num_drafting: int, level_rows: Sequence[int]
    ) -> list[int]:
        """How many of its best nodes to keep of every sequence of the plan; ``values`` as for ``keep``.

        num_drafting: sequences that the head drafted for; level_rows: as for ``is_worth_level``.
        """
        beliefs = [self._memories[ask.request_id].belief for ask in self._asks]
        spent = self.costs.draft(num_drafting, level_rows) if num_drafting else 0.0
        trusted = [belief.trusted(of) for belief, of in zip(beliefs, values, strict=True)]
        return keep(self.costs, self._load, trusted, spent, self._whole)

    def observe(self, drafts: Sequence[Drafted]) -> None:
        """Learn from the drafts of a step, those of sequences that were planned for and go on."""
        for draft in drafts:
            memory = self._memories[draft.request_id]
            memory.belief.judge(draft.expected, draft.accepted)
            if draft.levels:
                memory.belief.learn(draft.levels, max(memory.idle_steps - 1, 0))
                self._modes[memory.sampled].learn(draft.levels, slowness=_MODE_SLOWNESS)
                memory.idle_steps = 0

    def forget(self, request_id: int) -> None:
        """Drop what is kept of a request that ended."""
        self._memories.pop(request_id, None)
        self._made = None

    def _memory(self, ask: Ask) -> _Memory:
        memory = self._memories.get(ask.request_id)
        if memory is None:
            memory = _Memory(Belief(self._modes[ask.sampled]), ask.sampled)
            self._memories[ask.request_id] = memory
        return memory


def _seat(ask: Ask, memory: _Memory, lenience: float) -> Seat:
    """lenience: by what the values of typical trees are multiplied."""
    belief = memory.belief
    levels = belief.typical(ask.limits.depth)
    if lenience != 1.0:
        levels = [[min(lenience * value, 1.0) for value in level] for level in levels]
    return Seat(
        ask.asked,
        ask.limits,
        levels,
        belief.trusted(ask.lookup),
        memory.drafted,
        memory.idle_steps + 1,
        ask.num_pending,
    )
