"""Steps that are launched before the host has read the one before: the same tokens and rows, and nobody is
disturbed by those that end meanwhile, leave, or break."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from engine.core import Batch, Delta, Request, SamplingParams, Speculation
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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    with simulated_gpu(monkeypatch) as device:
        yield device


def on_device(gpu: Simulated, draft: str, **options: Any) -> Engine:
    return make_engine(MODEL, draft, device=DEVICE, graphs=Graphs(gpu), **options)


def is_ahead(engine: Engine) -> bool:
    """Whether a step is launched that nobody has read."""
    return engine._next is not None


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


@pytest.mark.parametrize(
    ("draft", "speculation", "count"),
    [("none", PLAIN, 3), ("eagle3", TREE, 1), ("eagle3", TREE, 3), ("eagle", CHAIN, 3)],
)
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
    recording = record(engine, texts, params, after_step=lambda engine: ahead.append(is_ahead(engine)))
    assert recording.completions[0].token_ids == known_plain_tokens(MODEL, texts, params)[0]
    assert state_error(MODEL, recording, "eagle3") < TOLERANCE
    assert set(ahead) == {True, False}


def test_a_queue_before_a_full_engine_keeps_nobody_back(gpu: Simulated) -> None:
    """Whoever waits for a place need not be looked at, unless somebody should make room."""
    engine = on_device(gpu, "none", speculation=PLAIN, max_num_seqs=1)
    params = SamplingParams(temperature=0, max_tokens=8)
    for number in range(2):
        engine.add(Request(number, tuple(PROMPTS[number]), params))
    for _ in range(3):
        engine.step()
    assert engine.num_waiting == 1
    assert is_ahead(engine)
    engine.add(Request(2, tuple(PROMPTS[2]), params, priority=-1))
    engine.step()
    assert not is_ahead(engine)
    assert {delta.request_id for delta in engine.step()} == {2}
