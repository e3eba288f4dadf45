"""What breaks for one request breaks for no other: logits without a number, and steps that raise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from engine.core import Batch, DraftTree, Request, SamplingParams, Scores
from engine.step import Engine
from tests.engine.rig import assert_idle, echo_model, make_engine, prompts_of

MODEL = echo_model()
PROMPTS = prompts_of([9, 14, 6])
SAMPLING = SamplingParams(temperature=0, max_tokens=12)
VICTIM = 1
NAN, INF = float("nan"), float("inf")


def run(engine: Engine, requests: Sequence[Request]) -> dict[int, tuple[list[int], str | None, str | None]]:
    """Tokens, finish reason and error of each request, by id."""
    found: dict[int, tuple[list[int], str | None, str | None]] = {}
    for request in requests:
        engine.add(request)
        found[request.id] = ([], None, None)
    while engine.has_work:
        for delta in engine.step():
            tokens = found.setdefault(delta.request_id, ([], None, None))[0] + list(delta.token_ids)
            found[delta.request_id] = (tokens, delta.finish_reason, delta.error)
    return found


def requests_of(params: SamplingParams = SAMPLING, first: int = 0) -> list[Request]:
    return [Request(first + number, tuple(prompt), params) for number, prompt in enumerate(PROMPTS)]


def expected(params: SamplingParams = SAMPLING) -> list[list[int]]:
    return [list(one.token_ids) for one in make_engine(MODEL).generate(PROMPTS, params)]


def spoil(engine: Engine, change: Callable[[Batch, int, Scores], None]) -> None:
    """Let ``change(batch, row, scores)`` spoil what the target says of the victim's row, in every step."""
    score = engine.target.score

    def spoiled(batches: Sequence[Batch], trees: Sequence[DraftTree]) -> tuple[Scores, ...]:
        found = score(batches, trees)
        for batch, scores in zip(batches, found, strict=True):
            for row, seq in enumerate(batch.seqs):
                if seq.request.id == VICTIM:
                    change(batch, row, scores)
        return found

    engine.target.score = spoiled  # type: ignore[method-assign]


@pytest.mark.parametrize("draft", ["none", "eagle3"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_logits_without_a_number_end_their_request(draft: str, temperature: float, value: float) -> None:
    """From position 18 on: what came before is emitted, the same with and without a tree, and the others do
    not notice. NaN and infinity need stand in one place only."""
    params = SamplingParams(temperature=temperature, top_p=0.9, seed=5, max_tokens=12)

    def change(batch: Batch, row: int, scores: Scores) -> None:
        late = scores.positions[row] >= 18
        scores.logits[row, late, slice(None) if value == -INF else slice(40, 41)] = value

    engine = make_engine(MODEL, draft)
    spoil(engine, change)
    found, truth = run(engine, requests_of(params)), expected(params)
    for number, tokens in enumerate(truth):
        if number == VICTIM:
            assert found[number][:2] == (tokens[: 19 - len(PROMPTS[VICTIM])], "error")
            assert "logits" in str(found[number][2])
        else:
            assert found[number] == (tokens, "length", None)
    assert_idle(engine)


@pytest.mark.parametrize("draft", ["none", "eagle3", "eagle"])
def test_broken_rows_are_found_by_nobody(draft: str) -> None:
    """A forward that makes NaN leaves it in the KV rows too. Their pages serve others as if they were new."""
    engine = make_engine(MODEL, draft, num_pages=40, max_num_batched_tokens=16)  # several steps for a prompt
    rows: torch.Tensor = engine.target.pool.rows  # type: ignore[attr-defined]

    def change(batch: Batch, row: int, scores: Scores) -> None:
        chunk = batch.prompt.tokens.shape[1] if batch.prompt is not None else 1
        written = torch.arange(int(batch.kv_lens[row]) + chunk)[None]
        rows[..., batch.page_table[row, written // 4] * 4 + written % 4, :] = NAN
        scores.logits[row], scores.features[row] = NAN, NAN

    score = engine.target.score
    spoil(engine, change)
    found, truth = run(engine, requests_of()), expected()
    assert found[VICTIM][:2] == ([], "error")
    assert [found[number][0] for number in (0, 2)] == [truth[0], truth[2]]
    engine.target.score = score  # type: ignore[method-assign]
    for first in (10, 20, 30):  # the same prompt again, and enough others to use every page
        again = run(engine, requests_of(first=first))
        assert [tokens for tokens, _, _ in again.values()] == truth
    assert_idle(engine)


@pytest.mark.parametrize("place", ["propose", "score", "observe"])
def test_a_step_that_raises_fails_who_runs(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait go on, and the engine is as if the step had never begun."""
    engine = make_engine(MODEL, "eagle3", max_num_seqs=2)
    owner: Any = engine.target if place == "score" else engine.draft
    for request in requests_of():
        engine.add(request)
    for _ in range(3):
        engine.step()

    def broken(*args: object) -> None:
        raise MemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, broken)
        with pytest.raises(MemoryError):
            engine.step()
    failed = engine.fail_running("MemoryError")
    assert [(delta.request_id, delta.finish_reason, delta.error) for delta in failed] == [
        (0, "error", "MemoryError"),
        (1, "error", "MemoryError"),
    ]
    found = run(engine, requests_of(first=10))
    truth = expected()
    assert found[2][0] == truth[2]
    assert [found[10 + number][0] for number in range(3)] == truth
    assert_idle(engine)


def test_what_a_step_did_before_it_raised_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode that ends its request is committed before the prompt beside it breaks."""
    engine = make_engine(MODEL)
    engine.add(Request(0, tuple(PROMPTS[0]), SamplingParams(temperature=0, max_tokens=2)))
    engine.step()
    engine.add(Request(1, tuple(PROMPTS[1]), SAMPLING))

    def broken(batch: Batch, *args: object) -> None:
        if batch.is_prefill:
            raise MemoryError("no memory left")

    monkeypatch.setattr(engine.draft, "observe", broken)
    with pytest.raises(MemoryError):
        engine.step()
    told = [
        (delta.request_id, len(delta.token_ids), delta.finish_reason) for delta in engine.fail_running("")
    ]
    assert told == [(0, 1, "length"), (1, 0, "error")]
    assert_idle(engine)
