"""Steps that are captured emit the tokens of steps that are not, and wait for the device once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from draft.head import FeatureDraft
from engine.core import Delta, Request, SamplingParams, Speculation
from engine.graphs import Graphs
from engine.step import Engine
from engine.warmup import warm_up
from tests.engine import mistral_rig
from tests.engine.rig import Model, assert_idle, echo_model, make_engine, plain_tokens, prompts_of, record
from tests.engine.state import TOLERANCE, state_error
from tests.engine.test_planned import Fickle
from tests.simulated import DEVICE, Simulated, simulated_gpu

PLAIN = Speculation(1, 0, 1)
CHAIN = Speculation(4, 3, 1)
TREE = Speculation(7, 3, 3)
WITH_LOOKUP = Speculation(6, 3, 2, lookup=5)
PROMPTS = prompts_of([1, 9, 2, 5])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    with simulated_gpu(monkeypatch) as device:
        yield device


@pytest.fixture(scope="module")
def echo() -> Model:
    return echo_model(3)


def params_of(count: int, max_tokens: int = 9) -> list[SamplingParams]:
    """Greedy, sampled, and sampled with filters; they end one after another."""
    kinds = [(0.0, 1.0, 0), (0.8, 1.0, 0), (1.0, 0.9, 5), (0.8, 1.0, 0)]
    return [
        SamplingParams(temperature=heat, top_p=top_p, top_k=top_k, seed=i, max_tokens=max_tokens)
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


@pytest.mark.parametrize(
    ("draft", "speculation", "count"),
    [("none", PLAIN, 4), ("ngram", CHAIN, 4), ("eagle3", CHAIN, 1), ("eagle3", TREE, 4), ("eagle", TREE, 1)],
)
def test_tokens_are_those_of_the_host(
    gpu: Simulated, echo: Model, draft: str, speculation: Speculation, count: int
) -> None:
    params = params_of(count)
    expected = tokens(run(make_engine(echo), params))
    graphs = Graphs(gpu)
    device = make_engine(echo, draft, speculation=speculation, device=DEVICE, graphs=graphs)
    reads, seen = list[int](), gpu.num_reads

    def count_reads(deltas: list[Delta]) -> None:
        reads.append(gpu.num_reads - sum(reads) - seen)

    got = run(device, params, after_step=count_reads)
    assert tokens(got) == expected
    assert max(reads) == 1, "the host waited more than once in a step"
    assert gpu.num_replays > 5
    if draft.startswith("eagle"):
        assert sum(delta.num_accepted for deltas in got for delta in deltas) > 0
    assert gpu.num_captures == len(graphs.keys) < gpu.num_replays, "captured once, used again"


def test_padding_leaves_nothing_that_a_head_reads(gpu: Simulated, echo: Model) -> None:
    """Three begin together, where there is room for four: the head is right as often as on a host. It never
    is where the fourth has left NaN on the dummy page."""
    params = params_of(3, 12)
    host = make_engine(echo, "eagle3", speculation=TREE)
    device = make_engine(echo, "eagle3", speculation=TREE, device=DEVICE, graphs=Graphs(gpu))
    usual, found = (
        sum(done.num_accepted for done in engine.generate(PROMPTS[:3], params)) for engine in (host, device)
    )
    assert usual > 6
    assert found >= usual - 2
    assert isinstance(device.draft, FeatureDraft)
    assert not bool(device.draft.model.pool.rows.isnan().any())


def test_a_mixture_of_experts_and_its_head(gpu: Simulated) -> None:
    """Latent attention, experts and a dense head, whose tokens are chosen with noise."""
    pair, graphs = mistral_rig.echo_pair(3), Graphs(gpu)
    params = params_of(2)
    expected = tokens(run(mistral_rig.make_engine(pair, speculation=PLAIN), params))
    device = mistral_rig.make_engine(pair, "eagle", speculation=CHAIN, device=DEVICE, graphs=graphs)
    got = run(device, params)
    assert tokens(got) == expected
    assert sum(delta.num_accepted for deltas in got for delta in deltas) > 0
    assert {key[0] for key in graphs.keys if isinstance(key, tuple)} == {"decode", "propose"}


def test_what_is_common_is_captured_before_anybody_waits(gpu: Simulated, echo: Model) -> None:
    """Greedy and sampled, alone and side by side; progress is told, and nothing else is left of it."""
    graphs, told = Graphs(gpu), list[float]()
    device = make_engine(echo, speculation=PLAIN, device=DEVICE, graphs=graphs)
    warm_up(device, lambda share, what: told.append(share))
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0.0, 1.0)
    assert_idle(device)
    sizes = {(key[1], key[-1][0]) for key in graphs.keys if isinstance(key, tuple)}
    assert sizes == {(num_seqs, greedy) for num_seqs in (1, 2, 8) for greedy in (True, False)}
    params = [SamplingParams(temperature=heat, seed=1, max_tokens=6) for heat in (0.0, 0.9)]
    before = gpu.num_captures
    assert tokens(run(device, params)) == tokens(run(make_engine(echo), params))
    assert gpu.num_captures == before


def test_sizes_that_come_late_and_find_no_room_fail_nobody(
    gpu: Simulated, echo: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = Graphs(gpu)
    device = make_engine(echo, "eagle3", speculation=TREE, device=DEVICE, graphs=graphs)
    warm_up(device)
    before = set(graphs.keys)

    def full(function: Callable[[], object]) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(gpu, "capture", full)
    params = params_of(4, 12)
    got = run(device, params)
    assert tokens(got) == tokens(run(make_engine(echo), params))
    assert all(deltas[-1].finish_reason == "length" for deltas in got)
    assert set(graphs.keys) == before
    assert_idle(device)


def test_a_device_without_graphs_does_the_same(gpu: Simulated, echo: Model) -> None:
    params = params_of(3, 10)
    device = make_engine(echo, "eagle3", speculation=TREE, device=DEVICE)
    assert tokens(run(device, params)) == tokens(run(make_engine(echo), params))
    assert gpu.num_captures == 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_planner_that_changes_its_mind(gpu: Simulated, echo: Model, temperature: float) -> None:
    """Some draft and some do not, lookups come and go, and a head that was off has much to catch up with.
    What it keeps of features meanwhile is its own, or its rows would not be what they should."""
    prompts = [(prompt * 3)[:24] for prompt in PROMPTS[:3]]
    params = [SamplingParams(temperature=temperature, top_k=4, seed=i, max_tokens=20) for i in range(3)]
    planner = Fickle(5, most_off=3)
    device = make_engine(
        echo, "eagle3", speculation=WITH_LOOKUP, planner=planner, device=DEVICE, graphs=Graphs(gpu)
    )
    recording = record(device, prompts, params, arrivals=[0, 2, 4])
    assert [done.token_ids for done in recording.completions] == plain_tokens(echo, prompts, params)
    assert state_error(echo, recording, "eagle3") < TOLERANCE
    assert planner.seen == {"tree", "lookup", "chain"}
    assert sum(done.num_accepted for done in recording.completions) > 0
    assert gpu.num_replays > gpu.num_captures


def test_logprobs_and_edits_begin_behind_captured_scores(gpu: Simulated, echo: Model) -> None:
    params = [
        SamplingParams(temperature=0.7, seed=1, max_tokens=8, logprobs=2),
        SamplingParams(temperature=0.0, max_tokens=8, frequency_penalty=1.5, logit_bias=((5, 3.0),)),
        SamplingParams(temperature=0.9, seed=3, max_tokens=8),
    ]
    expected = run(make_engine(echo), params)
    graphs = Graphs(gpu)
    got = run(make_engine(echo, "eagle3", speculation=TREE, device=DEVICE, graphs=graphs), params)
    assert tokens(got) == tokens(expected)
    found, wanted = ([one for delta in of[0] for one in delta.logprobs] for of in (got, expected))
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in wanted], abs=1e-4)
    assert [[token for token, _ in one.top] for one in found] == [
        [token for token, _ in one.top] for one in wanted
    ]
    assert len(found) == 8
    kinds = {key[0] for key in graphs.keys if isinstance(key, tuple)}
    assert kinds == {"score", "decode", "propose"}
