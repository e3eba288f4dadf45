"""Decisions on invented costs: never far from the best of all, steady under noise, never off for good."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import draft.planner
from draft.costs import StepCosts
from draft.cut import is_worth_level, keep
from draft.planner import Ask, Drafted, Plan, Planner, plan
from draft.search import Found, Load, Search, Seat, Shape
from engine.core import SPECULATION_OFF, Decision, Speculation
from tests.oracles import planner as oracle

# Milliseconds: of the target by rows, of a draft's first pass by sequences, of a further level by rows.
CURVES = {
    "flat": oracle.Costs(lambda n: 10.0, lambda n: 0.5, lambda n: 0.4),
    "linear": oracle.Costs(lambda n: 10.0 + 1.0 * n, lambda n: 0.5 + 0.2 * n, lambda n: 0.4 + 0.1 * n),
    "moe": oracle.Costs(lambda n: 6.0 + 5.0 * (n > 1) + 5.0 * n**0.5, lambda n: 0.6, lambda n: 0.5),
    "launch-bound": oracle.Costs(lambda n: 10.0 + 0.05 * n, lambda n: 3.0, lambda n: 2.5),
    "knee": oracle.Costs(lambda n: 10.0 + 1.5 * max(n - 12, 0), lambda n: 0.8, lambda n: 0.6 + 0.01 * n),
    "rows are dear": oracle.Costs(lambda n: 10.0 * n, lambda n: 0.5, lambda n: 0.5),
}
LOAD = Load(0.0)


class Invented(StepCosts):
    """Costs that are given, not learned."""

    def __init__(self, costs: oracle.Costs, noise: Callable[[], float] = lambda: 1.0) -> None:
        super().__init__()
        self.given, self.noise = costs, noise

    def verify_run(self, first: int, count: int, context: float) -> list[float]:
        return [self.given.verify(rows) * self.noise() for rows in range(first, first + count)]

    def first(self, num_seqs: int) -> float:
        return self.given.first(num_seqs) * self.noise()

    def level(self, num_rows: int) -> float:
        return self.given.level(num_rows) * self.noise()


def typical(draw: random.Random, depth: int) -> list[list[float]]:
    """Path values that fall from level to level and from rank to rank; a level has at most one winner."""
    levels, mass, best = [], 1.0, 1.0
    for _ in range(depth):
        mass *= draw.uniform(0.1, 1.0)
        ratio = draw.uniform(0.05, 0.7)
        first = min(mass * (1 - ratio), best)
        levels.append([first * ratio**rank for rank in range(4)])
        mass, best = sum(levels[-1]), first
    return levels


def request(draw: random.Random, most_depth: int = 4) -> oracle.Request:
    depth = draw.randint(1, most_depth)
    chance, lookup = 1.0, []
    for _ in range(draw.choice((0, 0, 1, 3))):
        chance *= draw.uniform(0.2, 1.0)
        lookup.append(chance)
    return oracle.Request(typical(draw, depth), lookup, draw.randint(2, 8), depth, draw.choice((1, 2, 3, 4)))


def seat_of(request: oracle.Request, drafted: bool | None = None, idle_steps: int = 0) -> Seat:
    limits = Speculation(request.nodes, request.depth, request.top_k, len(request.lookup))
    return Seat("auto", limits, request.levels, request.lookup, drafted, idle_steps)


def levels_of(decision: Decision) -> int:
    """That the head is asked for."""
    return decision.speculation.depth if decision.speculation.has_tree else 0


def rate_of(
    costs: oracle.Costs, requests: Sequence[oracle.Request], drafted: Sequence[bool], shape: Shape
) -> float:
    """What a plan's shape and drafting requests are really worth."""
    group = {place for place, is_drafting in enumerate(drafted) if is_drafting}
    return oracle.rate(costs, requests, group, shape.levels, shape.top_k)


# --- before drafting


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(CURVES)), st.integers(1, 3), st.integers(0, 2**32))
def test_plan_against_exhaustive_search(name: str, count: int, seed: int) -> None:
    draw = random.Random(seed)
    requests = [request(draw, 3) for _ in range(count)]
    found = plan(Invented(CURVES[name]), [seat_of(r) for r in requests], LOAD)
    best = oracle.best_rate(CURVES[name], requests, oracle.all_groups(count))
    real = rate_of(CURVES[name], requests, found.drafted, found.shape)
    assert real <= 1.01 * found.seconds_per_token, "a plan hardly promises more than it keeps"
    assert real <= 1.03 * best


@pytest.mark.parametrize("name", sorted(CURVES))
@pytest.mark.parametrize(("count", "seed"), [(8, 0), (16, 1), (32, 2)])
def test_plan_against_exhaustive_search_of_many(name: str, count: int, seed: int) -> None:
    """Two kinds of requests, so that all groups can be tried."""
    draw = random.Random(f"{name} {seed}")
    few = 2
    kinds = [oracle.Request(typical(draw, 2), (), 4, 2, 2), oracle.Request(typical(draw, 2), (0.5,), 3, 2, 2)]
    requests = [kinds[0]] * few + [kinds[1]] * (count - few)
    groups = [
        {*range(a), *range(few, few + b)}
        for a, b in itertools.product(range(few + 1), sorted({0, 1, 2, count // 2, count - few}))
    ]
    found = plan(Invented(CURVES[name]), [seat_of(r) for r in requests], LOAD)
    assert found.seconds_per_token <= 1.03 * oracle.best_rate(CURVES[name], requests, groups)


def test_a_predictable_request_drafts_alone_where_others_would_only_cost() -> None:
    """First passes cost by sequence: the seven that would gain nothing stay out."""
    sure = oracle.Request([[0.9, 0.05, 0.0, 0.0], [0.8, 0.05, 0.0, 0.0]], (), 4, 2, 2)
    lost = oracle.Request([[0.05, 0.02, 0.0, 0.0]], (), 4, 1, 2)
    costs = oracle.Costs(lambda n: 10.0 + 0.1 * n, lambda n: 0.8 * n, lambda n: 0.1)
    found = plan(Invented(costs), [seat_of(lost)] * 3 + [seat_of(sure)] + [seat_of(lost)] * 4, LOAD)
    assert found.drafted == (False,) * 3 + (True,) + (False,) * 4
    assert found.decisions[0].reason == "not worth it: drafting costs too much"
    assert found.decisions[3].saved_ms > 0 > found.decisions[0].saved_ms, "others pay for its draft"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**32), st.floats(0.0, 3.0), st.floats(0.0, 3.0))
def test_cheaper_rows_never_draft_less(count: int, seed: int, slope: float, other: float) -> None:
    draw = random.Random(seed)
    values = [[value for level in typical(draw, 3) for value in level] for _ in range(count)]
    cheap, dear = sorted((slope, other))

    def kept(slope: float) -> int:
        costs = oracle.Costs(lambda n: 10.0 + slope * n, lambda n: 0.0, lambda n: 0.0)
        return sum(keep(Invented(costs), LOAD, values, 0.0))

    assert kept(cheap) >= kept(dear)


def test_dear_rows_are_plain_decoding() -> None:
    draw = random.Random(0)
    seats = [seat_of(replace(request(draw), lookup=())) for _ in range(4)]
    found = plan(Invented(CURVES["rows are dear"]), seats, LOAD)
    assert all(decision.speculation.is_off for decision in found.decisions)
    assert {decision.reason for decision in found.decisions} == {"not worth it: rows cost too much"}
    assert found.seconds_per_token == found.plain_seconds_per_token == 10.0
    assert all(decision.saved_ms == 0 for decision in found.decisions)


def test_prompt_rows_of_the_step_count() -> None:
    """Past the knee a row is not free, whoever pushed the step there."""
    seats = [seat_of(oracle.Request([[0.3, 0.1, 0.0, 0.0]], (), 4, 1, 2))]
    assert plan(Invented(CURVES["knee"]), seats, Load(0.0)).drafted == (True,)
    assert plan(Invented(CURVES["knee"]), seats, Load(0.0, other_rows=40)).drafted == (True,)
    steep = oracle.Costs(lambda n: 1.0 * max(n, 12), lambda n: 0.1, lambda n: 0.1)
    assert plan(Invented(steep), seats, Load(0.0)).drafted == (True,)
    seats = [replace(seats[0], levels=[[0.01, 0.0, 0.0, 0.0]])]
    assert plan(Invented(steep), seats, Load(0.0, other_rows=40)).drafted == (False,)


@pytest.mark.parametrize(("chance", "levels", "reason"), [(0.97, 0, "lookup"), (0.2, 3, "chain")])
def test_a_sure_lookup_makes_the_head_superfluous(chance: float, levels: int, reason: str) -> None:
    lookup = [chance**n for n in range(1, 5)]
    values = [[0.8], [0.65], [0.5]]
    seat = seat_of(oracle.Request(values, lookup, 8, 3, 1))
    decision = plan(Invented(CURVES["launch-bound"]), [seat], LOAD).decisions[0]
    assert (levels_of(decision), decision.reason) == (levels, reason)
    assert decision.speculation.lookup == (4 if levels == 0 else 2)


def test_requests_that_decided_themselves_are_obeyed() -> None:
    size = Speculation(6, 3, 2)
    levels = [[0.01, 0.0, 0.0, 0.0]] * 3
    free = seat_of(oracle.Request([[0.8, 0.1, 0.0, 0.0]] * 3, (), 8, 3, 2))
    seats = [Seat("fixed", size, levels), Seat("off", SPECULATION_OFF, []), Seat("auto", SPECULATION_OFF, [])]
    decisions = plan(Invented(CURVES["rows are dear"]), [*seats, free], LOAD).decisions
    assert [decision.speculation for decision in decisions[:3]] == [size, SPECULATION_OFF, SPECULATION_OFF]
    assert [decision.reason for decision in decisions[:3]] == [
        "tree",
        "request said off",
        "no room for a draft",
    ]
    # A draft that is made anyway costs a companion only its own rows.
    costs = oracle.Costs(lambda n: 10.0 + 0.1 * n, lambda n: 9.0, lambda n: 9.0)
    assert plan(Invented(costs), [*seats, free], LOAD).drafted == (False, False, False, True)
    assert plan(Invented(costs), [*seats[1:], free], LOAD).drafted == (False, False, False)


def test_fixed_sizes_are_accounted_for_in_full() -> None:
    costs = CURVES["linear"]
    levels = [[0.5, 0.2, 0.1, 0.1], [0.25, 0.1, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0]]
    found = plan(Invented(costs), [Seat("fixed", Speculation(5, 3, 2), levels)], LOAD)
    spent = costs.first(1) + 2 * costs.level(2) + costs.verify(5)
    assert found.seconds_per_token == pytest.approx(spent / (1 + 0.5 + 0.25 + 0.2 + 0.1))
    assert found.decisions[0].saved_ms == pytest.approx(1e3 * (costs.verify(1) - spent / 2.05))


# --- while and after drafting


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(CURVES)), st.integers(1, 4), st.integers(0, 2**32))
def test_keep_against_exhaustive_search(name: str, count: int, seed: int) -> None:
    """Values with ties, trees of different sizes: exactly the best, over all ways to share out the rows."""
    draw = random.Random(seed)
    values = [[draw.randint(0, 10) / 10 for _ in range(draw.randint(0, 6))] for _ in range(count)]
    spent = draw.uniform(0, 5)
    costs = CURVES[name]
    counts = keep(Invented(costs), LOAD, values, spent)
    tables = [[sum(sorted(of, reverse=True)[:taken]) for taken in range(len(of) + 1)] for of in values]
    best = min(
        (spent + costs.verify(count + rows)) / (count + tokens)
        for rows, tokens in enumerate(oracle.share_out(tables))
    )
    tokens = sum(sum(sorted(of, reverse=True)[:taken]) for of, taken in zip(values, counts, strict=True))
    assert (spent + costs.verify(count + sum(counts))) / (count + tokens) == pytest.approx(best, rel=1e-12)


def test_keep_looks_past_a_jump() -> None:
    """The first node alone is not worth the jump from one row to two, three are."""
    costs = oracle.Costs(lambda n: 10.0 + 6.0 * (n > 1), lambda n: 0.0, lambda n: 0.0)
    assert keep(Invented(costs), LOAD, [[0.5]], 0.0) == [0]
    assert keep(Invented(costs), LOAD, [[0.5, 0.4, 0.3]], 0.0) == [3]


def test_keep_all_of_fixed_trees() -> None:
    values = [[0.0, 0.0], [0.9, 0.01]]
    costs = Invented(oracle.Costs(lambda n: 10.0 + n, lambda n: 0.0, lambda n: 0.0))
    assert keep(costs, LOAD, values, 0.0, [True, False]) == [2, 1]
    full = Invented(oracle.Costs(lambda n: 10.0 + 5.0 * max(n - 4, 0), lambda n: 0.0, lambda n: 0.0))
    assert keep(full, LOAD, [[0.0, 0.0], [0.3, 0.2]], 0.0, [False, False]) == [0, 2]
    assert keep(full, LOAD, [[0.0, 0.0], [0.3, 0.2]], 0.0, [True, False]) == [2, 0], (
        "its rows were the free ones"
    )


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(CURVES)), st.integers(0, 2**32))
def test_another_level_is_drafted_where_it_pays(name: str, seed: int) -> None:
    draw = random.Random(seed)
    costs, top, chance = CURVES[name], draw.uniform(0.05, 1.0), draw.uniform(0.05, 1.0)
    values, spent = [[top, top / 4]], costs.first(1)

    def best(values: list[float], spent: float) -> float:
        tables = [[sum(values[:n]) for n in range(len(values) + 1)]]
        return min(
            (spent + costs.verify(1 + rows)) / (1 + tokens)
            for rows, tokens in enumerate(oracle.share_out(tables))
        )

    pays = best(sorted([top, top / 4, top * chance], reverse=True), spent + costs.level(1)) < best(
        [top, top / 4], spent
    )
    assert is_worth_level(Invented(costs), LOAD, values, [[top]], [chance], spent) == pays


# --- from step to step


class Simulation:
    """A planner at work on requests whose trees are as good as ``quality`` says, by request.

    Every draft is a chain of which level d is reached with quality ** d.
    """

    def __init__(self, costs: oracle.Costs, count: int, noise: float = 0.0, seed: int = 0) -> None:
        self.draw = random.Random(seed)
        self.given = costs
        self.planner = Planner(
            Invented(costs, lambda: self.draw.lognormvariate(0.0, noise) if noise else 1.0)
        )
        self.asks = [Ask(place, False, "auto", Speculation(4, 3, 1)) for place in range(count)]

    def step(self, quality: Sequence[float]) -> tuple[tuple[str, ...], float, float]:
        """(reasons, milliseconds of the step, of a plain one)."""
        found = self.planner.plan(self.asks, LOAD)
        self.planner.carry_out()
        levels = [levels_of(decision) for decision in found.decisions]
        drafts = []
        for ask, num_levels, good in zip(self.asks, levels, quality, strict=True):
            values = [good**d for d in range(1, num_levels + 1)]
            accepted = 0
            while accepted < num_levels and self.draw.random() < good:
                accepted += 1
            drafts.append(Drafted(ask.request_id, [[value] for value in values], sum(values), accepted))
        self.planner.observe(drafts)
        count, drafting = len(self.asks), [n for n in levels if n]
        spent = self.given.first(len(drafting)) if drafting else 0.0
        spent += sum(
            self.given.level(sum(n > d for n in drafting)) for d in range(1, max(drafting, default=0))
        )
        reasons = tuple(decision.reason for decision in found.decisions)
        return reasons, spent + self.given.verify(count + sum(levels)), self.given.verify(count)


def switches(last: bool, steps: int = 400) -> int:
    """How often one request's shape changes under noisy costs, near the point where drafting is worth it."""
    draw = random.Random(7)
    costs = oracle.Costs(lambda n: 10.0 + 0.8 * n, lambda n: 1.7, lambda n: 0.9)
    noisy = Invented(costs, lambda: draw.lognormvariate(0.0, 0.01))
    levels = [[0.55], [0.3], [0.16]]
    shape, drafted, seen = None, None, []
    for _ in range(steps):
        seat = Seat("auto", Speculation(4, 3, 1), levels, (), drafted)
        found = plan(noisy, [seat], LOAD, shape if last else None)
        shape, drafted = found.shape, found.drafted[0]
        seen.append(shape)
    return sum(a != b for a, b in itertools.pairwise(seen))


def test_hysteresis_damps_noise() -> None:
    assert switches(last=False) > 15
    assert switches(last=True) < 3


def test_probes_are_rare_and_take_turns() -> None:
    """Eight requests that are not worth drafting for: each is tried, never two at once, under 1% of time."""
    simulation = Simulation(CURVES["launch-bound"], 8)
    probes, spent, plain = [], 0.0, 0.0
    for step in range(4000):
        reasons, seconds, without = simulation.step([0.02] * 8)
        if step >= 100:  # beliefs have settled
            assert all(reason == "probe" or reason.startswith("not worth it") for reason in reasons)
            assert reasons.count("probe") <= 1
            if "probe" in reasons:
                probes.append(reasons.index("probe"))
                kept = simulation.planner.keep([[0.02]] * 8, 1, [])
                assert kept == [int(reason == "probe") for reason in reasons], "it shows what its row costs"
            spent, plain = spent + seconds, plain + without
    assert set(probes) == set(range(8))
    assert max(probes.count(n) for n in range(8)) - min(probes.count(n) for n in range(8)) <= 1
    assert 1.0 < spent / plain < 1.01


def test_probes_bring_a_request_back() -> None:
    simulation = Simulation(CURVES["linear"], 2)
    for _ in range(300):
        simulation.step([0.02, 0.9])
    reasons = simulation.step([0.02, 0.9])[0]
    assert reasons[0].startswith("not worth it")
    assert reasons[1] == "chain"
    for _ in range(700):
        simulation.step([0.9, 0.9])
    assert simulation.step([0.9, 0.9])[0] == ("chain", "chain")


def test_plain_steps_are_seen_now_and_then() -> None:
    simulation = Simulation(CURVES["flat"], 1)
    reasons = [simulation.step([0.9])[0][0] for _ in range(2000)]
    assert set(reasons) == {"chain", "probe"}
    assert 2 <= reasons.count("probe") <= 4


def test_what_was_promised_and_not_kept_is_trusted_less() -> None:
    """The head is sure of every token, and wrong: calibration is one for all, so trust must see it."""
    planner = Planner(Invented(CURVES["linear"]))
    ask = Ask(1, True, "auto", Speculation(4, 3, 1))
    for _ in range(60):
        found = planner.plan([ask], LOAD)
        planner.carry_out()
        num_levels = levels_of(found.decisions[0])
        if num_levels:
            planner.observe([Drafted(1, [[0.6], [0.3], [0.1]][:num_levels], 1.0, 0)])
    assert found.decisions[0].reason.startswith("not worth it")
    other = planner.plan([Ask(2, True, "auto", Speculation(4, 3, 1))], LOAD)
    assert other.decisions[0].reason == "chain", "a newcomer is not judged by it"
    planner.forget(1)
    assert planner.plan([ask], LOAD).decisions[0].reason == "chain"


def test_a_plan_that_is_not_carried_out_leaves_nothing_behind() -> None:
    """Not even a probe, which would else never come where every second plan is dropped."""

    def run(num_dropped: int) -> list[str]:
        planner = Planner(Invented(CURVES["rows are dear"]))
        ask = Ask(1, False, "auto", Speculation(4, 3, 1))
        reasons = list[str]()
        for _ in range(400):
            for _ in range(num_dropped):
                planner.plan([ask], LOAD)
            found = planner.plan([ask], LOAD)
            planner.carry_out()
            reasons.append(found.decisions[0].reason)
            num_levels = levels_of(found.decisions[0])
            if num_levels:
                planner.observe([Drafted(1, [[0.2], [0.1], [0.1]][:num_levels], 0.2, 0)])
        return reasons

    assert run(2) == run(0)
    assert "probe" in run(1)


def test_a_plan_holds_for_a_few_steps_where_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(*args: Any, **options: Any) -> Plan:
        made.append(plan(*args, **options))
        return made[-1]

    monkeypatch.setattr(draft.planner, "plan", counted)
    planner = Planner(Invented(CURVES["flat"]))

    def steps(count: int, lookups: Callable[[int], list[float]], rows: int = 0) -> int:
        made.clear()
        for number in range(count):
            ask = Ask(1, True, "auto", Speculation(4, 3, 1, lookup=2), lookups(number))
            found = planner.plan([ask], Load(0.0, rows))
            assert found.decisions[0].speculation.lookup == min(len(lookups(number)), 2)
            planner.carry_out()
        return len(made)

    steps(20, lambda _: [])
    assert 80 / 8 <= steps(80, lambda _: []) <= 80 / 3
    assert steps(40, lambda number: [] if number % 2 else [0.9]) == 40, "a lookup is news"
    steps(6, lambda _: [])
    assert steps(1, lambda _: [], rows=5) == 1, "and so is a prompt beside it"
    steps(6, lambda _: [])
    planner.forget(1)
    assert steps(1, lambda _: []) == 1


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(CURVES)), st.integers(1, 8), st.integers(0, 2**32))
def test_lookups_below_the_least_chance_never_pay(name: str, count: int, seed: int) -> None:
    """However many there are, and whatever a plan does with likelier ones."""
    draw = random.Random(seed)
    limits = Speculation(1, 1, 1, lookup=3)
    chances = [sorted((draw.random() for _ in range(3)), reverse=True) for _ in range(count)]
    costs = Invented(CURVES[name])
    least = plan(costs, [Seat("auto", limits, (), own) for own in chances], LOAD).least_chance
    unlikely = [[min(chance, 0.99 * least) for chance in own] for own in chances]
    found = plan(costs, [Seat("auto", limits, (), own) for own in unlikely], LOAD)
    assert all(decision.speculation.lookup == 0 for decision in found.decisions)
    sure = plan(costs, [Seat("auto", limits, (), [1.0, 1.0, 1.0])] * count, LOAD)
    if sure.decisions[0].speculation.lookup:
        assert least < 1, "nothing likely enough is held back"


def test_a_lookup_that_cannot_pay_makes_no_new_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row costs 4 and a token 5: it must be likelier than 0.8."""
    made = []

    def counted(*args: Any, **options: Any) -> Plan:
        made.append(plan(*args, **options))
        return made[-1]

    monkeypatch.setattr(draft.planner, "plan", counted)
    costs = oracle.Costs(lambda n: 10.0 + 4.0 * (n - 2), lambda n: 9.0, lambda n: 9.0)

    def steps(chance: float, count: int = 40) -> tuple[int, set[int]]:
        planner, taken = Planner(Invented(costs)), set()
        for number in range(count):
            asks = [
                Ask(place, False, "auto", Speculation(2, 1, 1, lookup=1), [chance] if number % 2 else [])
                for place in range(2)
            ]
            if number == count // 2:
                made.clear()
            decisions = planner.plan(asks, LOAD).decisions
            planner.carry_out()
            taken |= {decision.speculation.lookup for decision in decisions}
        return len(made), taken

    num_plans, taken = steps(0.4)
    assert 1 <= num_plans <= 4
    assert taken == {0}
    assert steps(0.95) == (20, {0, 1})


@pytest.mark.parametrize(("chance", "tokens"), [(0.85, 0), (0.9, 1), (1.0, 1)])
def test_a_lookup_saves_a_share_of_the_time_or_is_left_alone(chance: float, tokens: int) -> None:
    """Four tokens take 4, a fifth 0.8: at 0.85 it saves 1% of the time per token, at 0.9 2.1%."""
    costs = Invented(oracle.Costs(lambda n: 0.8 * n + 0.8, lambda n: 9.0, lambda n: 9.0))
    limits = Speculation(1, 0, 1, lookup=1)
    seats = [Seat("auto", limits, (), [chance] if place == 0 else []) for place in range(4)]
    assert plan(costs, seats, LOAD).decisions[0].speculation.lookup == tokens


def test_newcomers_of_a_crowd_wait_for_the_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody drafts; alone, or where somebody does, they are looked at as they come."""
    looks = []
    best = Search.best

    def counted(search: Search) -> tuple[Found, Shape]:
        looks.append(1)
        return best(search)

    monkeypatch.setattr(Search, "best", counted)

    def looks_at_newcomers(name: str, count: int) -> int:
        planner = Planner(Invented(CURVES[name]))

        def steps(ids: range, num_steps: int) -> int:
            looks.clear()
            for _ in range(num_steps):
                planner.plan([Ask(number, False, "auto", Speculation(4, 3, 1)) for number in ids], LOAD)
                planner.carry_out()
            return len(looks)

        steps(range(count), 130)  # looks become rare
        while steps(range(count), 1) == 0:
            pass
        return sum(steps(range(come, come + count), 1) for come in range(1, 6))

    assert looks_at_newcomers("rows are dear", 8) == 0
    assert looks_at_newcomers("rows are dear", 1) == 5
    assert looks_at_newcomers("flat", 8) == 5


def test_a_probe_pays_for_what_its_head_has_to_catch_up_with() -> None:
    def probes(num_pending: int) -> int:
        costs = Invented(CURVES["launch-bound"])
        costs.observe_catch_up(1, [], 10, costs.first(1) + 10.0)  # a pair takes 1
        planner, count = Planner(costs), 0
        for _ in range(4000):
            ask = Ask(1, False, "auto", Speculation(4, 3, 1), (), num_pending)
            decision = planner.plan([ask], LOAD).decisions[0]
            planner.carry_out()
            count += decision.reason == "probe"
            if decision.speculation.has_tree:
                planner.observe([Drafted(1, [[0.02]], 0.02, 0)])
        return count

    few, many = probes(1), probes(60)
    assert few > 8 * many > 0, "a draft of 64 is 16 times as dear as one of 4"


def test_a_draft_that_can_be_stopped_is_tried_when_it_seems_a_little_too_dear() -> None:
    """linear: a row costs 1, a draft of one level 0.7, the plain step 11: worth it from 1.7 / 11 on."""

    def drafts(chance: float, *, stops_early: bool) -> bool:
        planner = Planner(Invented(CURVES["linear"]), stops_early=stops_early)
        ask = Ask(1, False, "auto", Speculation(2, 1, 1))
        for _ in range(200):
            decision = planner.plan([ask], LOAD).decisions[0]
            planner.carry_out()
            planner.observe([Drafted(1, [[chance]], 0.0, 0)])
        return decision.speculation.has_tree

    worth = 1.7 / 11
    assert [drafts(share * worth, stops_early=False) for share in (0.3, 0.92, 1.1)] == [False, False, True]
    assert [drafts(share * worth, stops_early=True) for share in (0.3, 0.92, 1.1)] == [False, True, True]


def test_of_many_requests_none_is_drafted_for_in_hope() -> None:
    """A token costs 10 and a further row 9.2: it would have to be right in 92 of 100 cases."""

    def drafts(count: int, chance: float) -> bool:
        costs = oracle.Costs(lambda n: 10.0 * count + 9.2 * (n - count), lambda n: 0.0, lambda n: 0.0)
        planner = Planner(Invented(costs), stops_early=True)
        asks = [Ask(number, False, "auto", Speculation(2, 1, 1)) for number in range(count)]
        for _ in range(200):
            decisions = planner.plan(asks, LOAD).decisions
            planner.carry_out()
            planner.observe([Drafted(number, [[chance]], 0.0, 0) for number in range(count)])
        return any(decision.speculation.has_tree for decision in decisions)

    assert [drafts(count, 0.85) for count in (1, 2, 4, 5, 8)] == [True, True, True, False, False]
    assert drafts(8, 0.99)
