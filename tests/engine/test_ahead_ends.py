"""Who ends, leaves or breaks while a step that was launched ahead is under way: nobody else notices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from draft.planner import Planner
from engine.core import Batch, Delta, DraftTree, Request, SamplingParams, Scores, Speculation
from engine.decoding import Decoding, Launched
from tests.engine.rig import CHAIN, PLAIN, TREE, assert_idle, known_plain_tokens, make_engine
from tests.engine.test_ahead import (
    MODEL,
    PROMPTS,
    drive,
    gpu,
    is_ahead,
    on_device,
    params_of,
    requests,
    tokens,
)
from tests.engine.test_scheduler import check_pages
from tests.simulated import Simulated

__all__ = ["gpu"]  # a fixture


@pytest.mark.parametrize(
    ("how", "draft", "speculation"),
    [
        ("eos", "eagle3", TREE),
        ("stop id", "none", PLAIN),
        ("length", "eagle", CHAIN),
        ("model length", "eagle3", TREE),
    ],
)
def test_who_ends_is_in_the_next_step_in_vain(
    gpu: Simulated, how: str, draft: str, speculation: Speculation
) -> None:
    """The others go on as if nothing was, the prefix cache keeps what is right, nothing is emitted twice."""
    usual = known_plain_tokens(MODEL, PROMPTS, params_of(3))
    end = usual[1][5]
    options: dict[str, Any] = {"max_num_seqs": 3}
    params = params_of(3, stop_token_ids=(end,) if how == "stop id" else ())
    if how == "eos":
        options["eos"] = (end,)
    elif how == "length":
        params[1] = replace(params[1], max_tokens=6)
    elif how == "model length":
        options["max_model_len"] = len(PROMPTS[1]) + 6
    host = make_engine(MODEL, **options)
    expected = [one.token_ids for one in host.generate(PROMPTS, params)]
    assert len(expected[1]) <= 6
    engine = on_device(gpu, draft, speculation=speculation, **options)
    for _ in range(2):  # the second time behind rows that the first has left
        got = drive(engine, [(0, request) for request in requests(params)])
        assert [tokens(deltas) for deltas in got.values()] == expected
        assert all(deltas[-1].finish_reason is not None for deltas in got.values())
        assert_idle(engine)


def test_aborts_and_arrivals_while_a_step_is_under_way(gpu: Simulated) -> None:
    engine = on_device(gpu, "eagle3", max_num_seqs=3)
    first, second, third = requests([SamplingParams(temperature=0, max_tokens=24) for _ in range(3)])
    expected = known_plain_tokens(MODEL, PROMPTS, [request.sampling for request in (first, second, third)])
    engine.add(first)
    engine.add(second)
    got: dict[int, list[Delta]] = {0: [], 1: [], 2: []}

    def step() -> None:
        for delta in engine.step():
            got[delta.request_id].append(delta)
        check_pages(engine)

    def step_until_ahead() -> None:
        step()
        while not is_ahead(engine):
            assert engine.has_work, "no step was launched ahead"
            step()

    step_until_ahead()
    engine.abort(first.id)
    check_pages(engine)
    step_until_ahead()
    engine.add(third)
    step_until_ahead()
    engine.abort(second.id)
    engine.abort(third.id)
    step()
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    engine.add(replace(third, id=3))
    got[3] = []
    while engine.has_work:
        step()
    assert got[0][-1].finish_reason == got[1][-1].finish_reason == got[2][-1].finish_reason == "abort"
    for number, deltas in got.items():
        known = expected[min(number, 2)]
        assert tokens(deltas) == known[: len(tokens(deltas))]
    assert tokens(got[3]) == expected[2]
    assert_idle(engine)


def test_logits_without_a_number_have_no_successor(gpu: Simulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step is under way with a root that was never chosen."""
    params = SamplingParams(temperature=0, max_tokens=30)
    (usual,) = known_plain_tokens(MODEL, PROMPTS[1:2], [params])
    engine = on_device(gpu, "eagle3")
    score = engine.target.score

    def spoiled(batches: Sequence[Batch], trees: Sequence[DraftTree]) -> tuple[Scores, ...]:
        return tuple(
            replace(one, logits=one.logits.masked_fill((one.positions >= 12)[..., None], float("nan")))
            for one in score(batches, trees)
        )

    launch, roots = Decoding.__call__, list[int]()

    def launched(self: Decoding, batches: Sequence[Batch], trees: Sequence[DraftTree]) -> Launched:
        for tree in trees:
            roots.extend(tree.tokens[:, 0].tolist())
        return launch(self, batches, trees)

    monkeypatch.setattr(engine.target, "score", spoiled)
    monkeypatch.setattr(Decoding, "__call__", launched)
    got = drive(engine, [(0, Request(0, tuple(PROMPTS[1]), params))])
    assert got[0][-1].finish_reason == "error"
    assert tokens(got[0]) == usual[: 13 - len(PROMPTS[1])]
    assert min(roots) >= 0, "a root that is no token"
    assert_idle(engine)


@pytest.mark.parametrize("place", ["propose_ahead", "decode", "observe"])
def test_a_step_that_raises_while_another_is_under_way(
    gpu: Simulated, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Who runs fails, who waits goes on, and the engine is as if neither step had begun."""
    planner = Planner()
    engine = on_device(gpu, "eagle3", planner=planner, max_num_seqs=2)
    params = [SamplingParams(temperature=0.8, seed=i, max_tokens=20) for i in range(3)]
    for request in requests(params):
        engine.add(request)
    while not is_ahead(engine):
        engine.step()

    def broken(*given: object) -> None:
        raise MemoryError("no memory left")

    owner: Any = engine.decoding if place == "decode" else engine.draft
    with monkeypatch.context() as patch:
        patch.setattr(owner, "_captured" if place == "decode" else place, broken)
        with pytest.raises(MemoryError):
            engine.step()
    failed = engine.fail_running("no memory")
    assert [(delta.request_id, delta.finish_reason) for delta in failed] == [(0, "error"), (1, "error")]
    check_pages(engine)
    later = [replace(request, id=10 + request.id) for request in requests(params)]
    got = drive(engine, [(0, request) for request in later] + [(99, replace(later[2], id=2))])
    expected = known_plain_tokens(MODEL, PROMPTS, params)
    assert [tokens(got[10 + number]) for number in range(3)] == expected
    assert_idle(engine)
