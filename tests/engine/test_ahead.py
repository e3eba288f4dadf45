"""Steps that are launched before the host has read the one before: the same tokens and rows, and nobody is
disturbed by those that end meanwhile, leave, or break."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from draft.planner import Planner
from engine.core import Batch, Delta, DraftTree, Request, SamplingParams, Scores, Speculation
from engine.decoding import Decoded, Decoding, Launched
from engine.graphs import Graphs
from engine.step import Engine
from tests.engine.rig import (
    CHAIN,
    PLAIN,
    TREE,
    Model,
    assert_idle,
    echo_model,
    known_plain_tokens,
    make_engine,
    prompts_of,
    record,
)
from tests.engine.state import TOLERANCE, state_error
from tests.engine.test_scheduler import check_pages
from tests.simulated import DEVICE, Simulated, simulated_gpu

MODEL: Model = echo_model(3)
PROMPTS = prompts_of([3, 9, 6])
KINDS = [("none", PLAIN), ("eagle3", TREE), ("eagle", CHAIN)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    with simulated_gpu(monkeypatch) as device:
        yield device


def on_device(gpu: Simulated, draft: str, **options: Any) -> Engine:
    return make_engine(MODEL, draft, device=DEVICE, graphs=Graphs(gpu), **options)


def params_of(count: int, max_tokens: int = 12, **others: Any) -> list[SamplingParams]:
    """Greedy, then sampled; some end before the others."""
    return [
        SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=max_tokens - 2 * i, **others)
        for i in range(count)
    ]


def drive(engine: Engine, coming: Sequence[tuple[int, Request]]) -> dict[int, list[Delta]]:
    """What each request got; with each comes the number of the step before which it arrives."""
    got: dict[int, list[Delta]] = {request.id: [] for _, request in coming}
    left, step = list(coming), 0
    while engine.has_work or left:
        while left and left[0][0] <= step:
            engine.add(left.pop(0)[1])
        step += 1
        for delta in engine.step():
            got[delta.request_id].append(delta)
        check_pages(engine)
    return got


def tokens(deltas: Sequence[Delta]) -> tuple[int, ...]:
    return tuple(token for delta in deltas for token in delta.token_ids)


def requests(params: Sequence[SamplingParams]) -> list[Request]:
    return [
        Request(i, tuple(prompt), one) for i, (prompt, one) in enumerate(zip(PROMPTS, params, strict=False))
    ]


# --- tokens, rows and the order of things


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("draft", "speculation"), KINDS)
def test_tokens_and_rows(
    gpu: Simulated, monkeypatch: pytest.MonkeyPatch, draft: str, speculation: Speculation, count: int
) -> None:
    """Read one step late, but once a step, and in order."""
    params, prompts = params_of(count), PROMPTS[:count]
    expected = known_plain_tokens(MODEL, prompts, params)
    order = list[tuple[str, int]]()
    launch, read = Decoding.__call__, Launched.read
    numbers: dict[int, int] = {}

    def launched(self: Decoding, *given: Any) -> Launched:
        found = launch(self, *given)
        numbers[id(found)] = len(numbers)
        order.append(("launch", numbers[id(found)]))
        kept.append(found)
        return found

    def was_read(self: Launched) -> list[tuple[Batch, Decoded]]:
        before = gpu.num_reads
        found = read(self)
        order.append(("read", numbers[id(self)]))
        assert gpu.num_reads == before + 1
        return found

    kept = list[Launched]()  # so that each has a number of its own
    monkeypatch.setattr(Decoding, "__call__", launched)
    monkeypatch.setattr(Launched, "read", was_read)
    engine = on_device(gpu, draft, speculation=speculation)
    recording = record(engine, prompts, params, arrivals=[0, 1, 4][:count])
    assert [one.token_ids for one in recording.completions] == expected
    assert state_error(MODEL, recording, draft) < TOLERANCE
    reads = [number for what, number in order if what == "read"]
    assert reads == sorted(reads)
    is_late = [order.index(("launch", number + 1)) < order.index(("read", number)) for number in reads[:-1]]
    assert sum(is_late) >= len(reads) // 3
    assert all(order.index(("read", n)) < order.index(("launch", n + 2)) for n in reads if n + 2 in reads)
    if draft != "none":
        assert sum(one.num_accepted for one in recording.completions) > 0
    assert_idle(engine)


def test_lookups_wait_for_the_text(gpu: Simulated) -> None:
    """A step is ahead where nothing is found, and never where something is."""
    speculation = Speculation(4, 3, 1, lookup=4)
    engine = on_device(gpu, "eagle3", speculation=speculation)
    texts, params = [PROMPTS[1] * 3], [SamplingParams(temperature=0.9, seed=4, max_tokens=30)]
    ahead = list[bool]()
    recording = record(
        engine, texts, params, after_step=lambda engine: ahead.append(engine._next is not None)
    )
    assert recording.completions[0].token_ids == known_plain_tokens(MODEL, texts, params)[0]
    assert state_error(MODEL, recording, "eagle3") < TOLERANCE
    assert set(ahead) == {True, False}


# --- ends


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
        while engine._next is None:
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
    assert not engine.has_work
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
    engine = on_device(gpu, "eagle3")
    score = engine.target.score

    def spoiled(batches: Sequence[Batch], trees: Sequence[DraftTree]) -> tuple[Scores, ...]:
        return tuple(
            replace(one, logits=one.logits.masked_fill((one.positions >= 12)[..., None], float("nan")))
            for one in score(batches, trees)
        )

    monkeypatch.setattr(engine.target, "score", spoiled)
    params = SamplingParams(temperature=0, max_tokens=30)
    got = drive(engine, [(0, Request(0, tuple(PROMPTS[1]), params))])
    assert got[0][-1].finish_reason == "error"
    assert tokens(got[0]) == known_plain_tokens(MODEL, PROMPTS[1:2], [params])[0][: 13 - len(PROMPTS[1])]
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
    while engine._next is None:
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
