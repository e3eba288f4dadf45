"""The planner from step to step: steady under noise, never off for good, and sparing with its own time."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import draft.planner
from draft.planner import Ask, Drafted, Plan, Planner, plan
from draft.search import Found, Load, Search, Seat, Shape
from engine.core import Speculation
from tests.draft.test_planner import CURVES, LOAD, Invented, levels_of
from tests.oracles import planner as oracle


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that planners make, other than those that hold."""
    found = list[Plan]()

    def counted(*args: Any, **options: Any) -> Plan:
        found.append(plan(*args, **options))
        return found[-1]

    monkeypatch.setattr(draft.planner, "plan", counted)
    return found


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


def test_a_plan_holds_for_a_few_steps_where_nothing_has_changed(made: list[Plan]) -> None:
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


def test_a_lookup_that_cannot_pay_makes_no_new_plan(made: list[Plan]) -> None:
    """A row costs 4 and a token 5: it must be likelier than 0.8."""
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
