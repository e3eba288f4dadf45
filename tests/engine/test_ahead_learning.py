"""What is learned of steps, and told of them, when they are read one step late: each is taken for itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from draft.planner import Drafted, Planner
from engine.core import Delta, Request, SamplingParams, Speculation, StepCost
from engine.step import Engine
from tests.engine.rig import PLAIN, assert_idle, known_plain_tokens, make_engine
from tests.engine.test_ahead import MODEL, PROMPTS, gpu, on_device, params_of, requests, tokens
from tests.simulated import Simulated
from verify.stats import StepLog

__all__ = ["gpu"]  # a fixture

SAME = {"request", "context_len", "temperature", "tokens", "parents", "depth", "accepted", "reason"}


def logged(engine: Engine, path: Path, coming: Sequence[Request]) -> list[dict[str, Any]]:
    """The step log of some requests, by request."""
    engine.step_log = StepLog(str(path))
    for request in coming:
        engine.add(request)
    while engine.has_work:
        engine.step()
    engine.step_log.close()
    records = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
    return sorted(records, key=lambda record: (record["request"], record["context_len"]))


@pytest.mark.parametrize(("draft", "speculation"), [("none", PLAIN), ("eagle3", Speculation(3, 2, 1))])
def test_the_log_is_that_of_a_host_that_waits(
    gpu: Simulated, tmp_path: Path, draft: str, speculation: Speculation
) -> None:
    """Chains of one length, so that nothing depends on what was learned when; one request ends when nobody
    expects it, and is in a step in vain. At the end of the others less is drafted ahead: that is left out."""
    coming = requests(params_of(3))
    end = known_plain_tokens(MODEL, PROMPTS, params_of(3))[1][4]
    options: dict[str, Any] = {"speculation": speculation, "eos": (end,)}
    expected = logged(make_engine(MODEL, draft, **options), tmp_path / "host", coming)
    found = logged(on_device(gpu, draft, **options), tmp_path / "device", coming)
    least = {one.id: len(one.prompt) + one.sampling.max_tokens - 5 for one in coming}
    told, wanted = (
        [
            {name: record[name] for name in SAME}
            for record in of
            if record["context_len"] < least[record["request"]]
        ]
        for of in (found, expected)
    )
    assert told == wanted
    assert len(told) > 9


def test_a_planner_hears_of_every_step_once(gpu: Simulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """What became of a draft, and what a step cost, belong to the step that is told of, not to the newest."""
    planner = Planner()
    engine = on_device(gpu, "eagle3", planner=planner, speculation=Speculation(4, 3, 1))
    costs, drafts = list[StepCost](), list[Drafted]()
    account, observe = engine.draft.account, planner.observe

    def accounted(cost: StepCost) -> None:
        costs.append(cost)
        account(cost)

    def observed(given: Sequence[Drafted]) -> None:
        drafts.extend(given)
        observe(given)

    monkeypatch.setattr(engine.draft, "account", accounted)
    monkeypatch.setattr(planner, "observe", observed)
    params = [SamplingParams(temperature=0, seed=i, max_tokens=16 - 5 * i) for i in range(2)]
    for request in requests(params):
        engine.add(request)
    got: dict[int, list[Delta]] = {0: [], 1: []}
    num_ahead = 0
    while engine.has_work:
        costs.clear()
        drafts.clear()
        was_ahead = engine._next is not None
        deltas = engine.step()
        decodes = [delta for delta in deltas if delta.is_decode]
        judged = {one.request_id: one.accepted for one in drafts}
        ended = {delta.request_id for delta in deltas if delta.finish_reason is not None}
        for delta in decodes:
            got[delta.request_id].append(delta)
            if delta.num_draft_tokens and delta.request_id not in ended:
                assert judged.pop(delta.request_id) == delta.num_accepted
        assert set(judged) <= ended
        if costs:
            assert [cost.num_rows for cost in costs] == [sum(1 + delta.num_draft_tokens for delta in decodes)]
            assert costs[0].seconds > 0
            num_ahead += was_ahead
    assert num_ahead > 3
    assert_idle(engine)
    assert planner._memories == {}


def test_the_engines_own_choice_of_drafts(gpu: Simulated) -> None:
    """Plans that come and go, with tokens that never change."""
    planner = Planner()
    engine = on_device(gpu, "eagle3", planner=planner, speculation=Speculation(5, 3, 2, lookup=3))
    prompts = [(prompt * 4)[:20] for prompt in PROMPTS[:2]]
    params = [SamplingParams(temperature=0.9 * i, seed=i, max_tokens=24) for i in range(2)]
    for number, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
        engine.add(Request(number, tuple(prompt), one))
    got: dict[int, list[Delta]] = {0: [], 1: []}
    while engine.has_work:
        for delta in engine.step():
            got[delta.request_id].append(delta)
    assert [tokens(deltas) for deltas in got.values()] == known_plain_tokens(MODEL, prompts, params)
    assert_idle(engine)
