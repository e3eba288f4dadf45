"""Steps that are captured emit the tokens of steps that are not, and wait for the device once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

import engine.batches
from engine.core import Delta, Request, SamplingParams, Speculation
from engine.graphs import Graphs, Mailbox
from engine.step import Engine
from tests.engine.rig import Model, echo_model, make_engine, prompts_of
from tests.engine.test_planned import Fickle
from tests.simulated import DEVICE, Simulated, simulated_gpu

PLAIN = Speculation(1, 0, 1)
CHAIN = Speculation(4, 3, 1)
TREE = Speculation(7, 3, 3)
WITH_LOOKUP = Speculation(6, 3, 2, lookup=5)
PROMPTS = prompts_of([1, 9, 2])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    with simulated_gpu(monkeypatch) as device:
        yield device


@pytest.fixture(scope="module")
def echo() -> Model:
    return echo_model(3)


def params_of(count: int, max_tokens: int = 12) -> list[SamplingParams]:
    """Greedy, sampled, and sampled with filters; the first ends last."""
    kinds = [(0.0, 1.0, 0), (0.8, 1.0, 0), (1.0, 0.9, 5)]
    return [
        SamplingParams(temperature=heat, top_p=top_p, top_k=top_k, seed=i, max_tokens=max_tokens - 3 * i)
        for i, (heat, top_p, top_k) in enumerate(kinds[:count])
    ]


def run(
    engine: Engine,
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]] = PROMPTS,
    after_step: Callable[[list[Delta]], None] = lambda deltas: None,
) -> list[list[Delta]]:
    """What each request got. They come two steps after one another."""
    coming = [Request(i, tuple(prompts[i]), one) for i, one in enumerate(params)]
    got: list[list[Delta]] = [[] for _ in params]
    step = 0
    while engine.has_work or coming:
        if coming and step % 2 == 0:
            engine.add(coming.pop(0))
        step += 1
        deltas = engine.step()
        for delta in deltas:
            got[delta.request_id].append(delta)
        after_step(deltas)
    return got


def tokens(got: list[list[Delta]]) -> list[list[int]]:
    return [[token for delta in deltas for token in delta.token_ids] for deltas in got]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("draft", "speculation"),
    [("none", PLAIN), ("ngram", CHAIN), ("eagle3", CHAIN), ("eagle3", TREE), ("eagle", TREE)],
)
def test_tokens_are_those_of_the_host(
    gpu: Simulated, echo: Model, draft: str, speculation: Speculation, count: int
) -> None:
    params = params_of(count)
    expected = tokens(run(make_engine(echo), params))
    graphs, reads = Graphs(gpu), []
    device = make_engine(echo, draft, speculation=speculation, device=DEVICE, graphs=graphs)

    def count_reads(deltas: list[Delta]) -> None:
        reads.append(gpu.num_reads - sum(reads))

    got = run(device, params, after_step=count_reads)
    assert tokens(got) == expected
    assert max(reads) == 1, "the host waited more than once in a step"
    assert gpu.num_replays > 5
    if draft.startswith("eagle"):
        assert sum(delta.num_accepted for deltas in got for delta in deltas) > 0
    # The same once more: all there is to capture is captured.
    before = gpu.num_captures
    assert tokens(run(device, params)) == expected
    assert gpu.num_captures == before


def test_a_device_without_graphs_does_the_same(gpu: Simulated, echo: Model) -> None:
    params = params_of(3, 10)
    device = make_engine(echo, "eagle3", speculation=TREE, device=DEVICE)
    assert tokens(run(device, params)) == tokens(run(make_engine(echo), params))
    assert gpu.num_captures == 0
