"""Speculation that changes its mind: whatever a planner decides, tokens and rows are those of plain steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draft.head import FeatureDraft
from draft.planner import Ask, Plan, Planner
from draft.search import Load, Shape
from engine.core import Decision, Request, SamplingParams, Speculation
from engine.step import Engine
from tests.engine.rig import (
    PLAIN,
    assert_idle,
    echo_model,
    known_plain_tokens,
    make_engine,
    prompts_of,
    record,
)
from tests.engine.state import TOLERANCE, state_error

LIMITS = Speculation(9, 4, 3, lookup=5)
PROMPTS = prompts_of([1, 9, 2, 21])
MODEL = echo_model(3)


class Fickle(Planner):
    """Decides by dice: off for long stretches, then this, then that; and cuts trees by dice, too."""

    def __init__(self, seed: int, most_off: int = 9) -> None:
        super().__init__(stops_early=True)
        self.draw, self.most_off = random.Random(seed), most_off
        self.until: dict[int, int] = {}
        self.seen: set[str] = set()

    def plan(self, asks: Sequence[Ask], load: Load) -> Plan:
        super().plan(asks, load)  # keeps its memories
        decisions = tuple(self._decide(ask) for ask in asks)
        return Plan(decisions, Shape(), (False,) * len(asks), False, 1.0, 1.0)

    def _decide(self, ask: Ask) -> Decision:
        if ask.asked != "auto":
            return Decision(ask.limits, "request said so")
        off = self.until.get(ask.request_id, 0)
        if off > 0:
            self.until[ask.request_id] = off - 1
            return Decision(ask.limits.within(1), "off")
        self.until[ask.request_id] = self.draw.choice((0, 0, self.draw.randint(0, self.most_off)))
        lookup = self.draw.randint(0, ask.limits.lookup)
        kind = self.draw.choice(("tree", "lookup", "chain"))
        self.seen.add(kind)
        if kind == "lookup":
            return Decision(replace(ask.limits, nodes=1, lookup=lookup), kind)
        top_k = 1 if kind == "chain" else ask.limits.top_k
        return Decision(replace(ask.limits, top_k=top_k, lookup=lookup), kind)

    def is_worth_level(self, *args: object) -> bool:
        return self.draw.random() < 0.7

    def keep(
        self, values: Sequence[Sequence[float]], num_drafting: int, level_rows: Sequence[int]
    ) -> list[int]:
        super().keep(values, num_drafting, level_rows)
        return [self.draw.randint(0, len(own)) for own in values]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("draft", ["eagle3", "eagle"])
@pytest.mark.parametrize("count", [1, 4])
def test_tokens_and_state(draft: str, count: int, temperature: float) -> None:
    prompts = [(prompt * 3)[:24] for prompt in PROMPTS[:count]]
    params = [SamplingParams(temperature=temperature, top_k=4, seed=i, max_tokens=45) for i in range(count)]
    planner = Fickle(count)
    engine = make_engine(MODEL, draft, speculation=LIMITS, planner=planner, num_pages=200)
    recording = record(engine, prompts, params)
    assert [c.token_ids for c in recording.completions] == known_plain_tokens(MODEL, prompts, params)
    assert state_error(MODEL, recording, draft) < TOLERANCE
    assert planner.seen == {"tree", "lookup", "chain"}
    assert sum(c.num_accepted for c in recording.completions) > 0, "idle unless something is accepted"
    assert_idle(engine)
    assert planner._memories == {}


@pytest.mark.parametrize("draft", ["eagle3", "eagle"])
def test_a_head_that_was_off_for_long_comes_back_with_its_rows(
    draft: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it missed is bounded on the way, and filled in exactly. The planner knows of it, and what it
    costs is not taken for what drafts usually do."""
    monkeypatch.setattr("draft.head._MOST_PENDING", 64)
    params = [SamplingParams(temperature=0, max_tokens=150)]
    planner = Fickle(1)
    planner.until[0] = 100
    usual, caught_up = Mock(), Mock()
    monkeypatch.setattr(planner.costs, "observe_draft", usual)
    monkeypatch.setattr(planner.costs, "observe_catch_up", caught_up)
    engine = make_engine(MODEL, draft, speculation=LIMITS, planner=planner)
    waiting, asked = list[int](), list[int]()

    def watch(engine: Engine) -> None:
        assert isinstance(engine.draft, FeatureDraft)
        waiting.extend(pending.num_waiting for pending in engine.draft._pending.values())
        asked.extend(ask.num_pending for ask in planner._asks)

    recording = record(engine, [PROMPTS[1]], params, after_step=watch)
    assert recording.completions[0].token_ids == known_plain_tokens(MODEL, [PROMPTS[1]], params)[0]
    assert state_error(MODEL, recording, draft) < TOLERANCE
    assert max(waiting) == max(asked) == 64
    assert recording.completions[0].num_accepted > 0
    assert usual.call_count > 1
    late = [call.args[2] for call in caught_up.call_args_list]
    assert late
    assert min(late) > 16, "drafts soon after another are usual"


@settings(max_examples=16, deadline=None)
@given(
    seed=st.integers(0, 1000),
    budget=st.sampled_from([12, 40, 96]),
    num_pages=st.sampled_from([40, 120]),
    caching=st.booleans(),
    sizes=st.lists(st.sampled_from([None, PLAIN, Speculation(4, 3, 1), LIMITS]), min_size=5, max_size=5),
)
def test_every_stream_is_that_of_the_lone_request(
    seed: int, budget: int, num_pages: int, caching: bool, sizes: list[Speculation | None]
) -> None:
    """Planned, fixed and plain requests beside each other, with little room."""
    draw = random.Random(seed)
    prompts = [(prompt * 3)[: draw.choice((1, 8, 19, 30))] for prompt in [*PROMPTS, PROMPTS[1]]]
    longest = [
        SamplingParams(temperature=draw.choice((0.0, 0.9)), top_k=4, seed=i, max_tokens=25) for i in range(5)
    ]
    params = [replace(param, max_tokens=draw.randint(1, 25)) for param in longest]
    engine = make_engine(
        MODEL,
        "eagle3",
        speculation=LIMITS,
        planner=Fickle(seed),
        max_num_batched_tokens=budget,
        num_pages=num_pages,
        prefix_caching=caching,
    )
    recording = record(engine, prompts, params, sizes, arrivals=[draw.randint(0, 12) for _ in prompts])
    whole = known_plain_tokens(MODEL, prompts, longest)
    expected = [tokens[: param.max_tokens] for tokens, param in zip(whole, params, strict=True)]
    assert [c.token_ids for c in recording.completions] == expected
    assert_idle(engine)


def test_a_step_costs_what_its_own_rows_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that also says of requests that they were aborted has no rows of theirs."""
    engine = make_engine(MODEL, "eagle3", planner=Planner())
    sizes: list[int] = []
    monkeypatch.setattr(engine.draft, "account", lambda cost: sizes.append(cost.num_rows))
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    for number in range(4):
        engine.add(Request(number, (1, 2, 3), params, PLAIN if number < 3 else Speculation(3, 2, 1)))
    for aborted in ((), (), (0, 1), ()):
        for number in aborted:
            engine.abort(number)
        drafted = {delta.request_id: delta.num_draft_tokens for delta in engine.step()}[3]
    assert drafted > 0
    assert sizes == [4 + 2, 2 + 2, 2 + 2]


def test_the_real_planner_learns_and_says_why() -> None:
    planner = Planner(stops_early=True)
    engine = make_engine(MODEL, "eagle3", speculation=LIMITS, planner=planner)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    sizes = (None, PLAIN, Speculation(3, 2, 1))
    for number, size in enumerate(sizes):
        engine.add(Request(number, tuple(PROMPTS[1]), params, size))
    reasons: dict[int, set[str]] = {0: set(), 1: set(), 2: set()}
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    while engine.has_work:
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
            if delta.is_decode:
                assert delta.decision is not None
                reasons[delta.request_id].add(delta.decision.reason)
    assert tokens[0] == tokens[1] == tokens[2]
    assert reasons[1] == {"request said off"}
    assert reasons[2] <= {"chain", "no room for a draft"}
    assert reasons[0]
    assert planner.costs._rows.is_known
    assert planner.costs._first.is_known, "a fixed request drafts in every step"
    assert_idle(engine)
