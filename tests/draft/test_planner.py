"""Decisions on invented costs are never far from the best of all."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draft.costs import StepCosts
from draft.cut import is_worth_level, keep
from draft.planner import plan
from draft.search import Load, Seat, Shape
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
