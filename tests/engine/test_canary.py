"""The canary sees mistakes, is not fooled by rounding, and disturbs nothing.

On a CPU a node's logits may be the same to the last bit in every batch, so that rounding has to be played:
``Elsewhere`` is the target as a machine would have it that sums in another order.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engine.canary
from draft.head import FeatureDraft
from engine.canary import Canary, CanaryCounts
from engine.config import EngineConfig
from engine.core import Batch, DraftTree, Request, SamplingParams, Scores, Speculation
from engine.errors import ConfigError
from engine.roles import Target
from engine.step import Engine
from tests.engine.rig import (
    CHAIN,
    PLAIN,
    TREE,
    Model,
    Prophet,
    assert_idle,
    echo_model,
    make_engine,
    plain_tokens,
    pool_rows,
    prompts_of,
    snapshots,
)
from tests.engine.test_mutants import (
    Mutate,
    ancestors_not_checked,
    bonus_at_the_root,
    causal_mask,
    compaction_skipped,
    first_rows_to_the_head,
    no_mistake,
)

MODEL: Model = echo_model(8)
TEXT = prompts_of([60], seed=5)[0]
BFLOAT16 = torch.bfloat16


class Elsewhere:
    """Scores as a target does, and rounds otherwise: the rows it writes, and its logits by up to ``units``
    eps of the largest. Remembers how many rows it wrote from which on."""

    def __init__(self, engine: Engine, units: float = 0.0) -> None:
        self._engine, self._units = engine, units
        self._generator = torch.Generator().manual_seed(0)
        self.written: list[tuple[int, int]] = []
        engine.canary._target = cast(Target, self)

    def score(self, batches: Sequence[Batch], trees: Sequence[DraftTree]) -> tuple[Scores, ...]:
        (scores,) = self._engine.target.score(batches, trees)
        ((batch,), (tree,)) = batches, trees
        num_rows = tree.tokens.shape[1]
        self.written.append((int(batch.kv_lens), num_rows))
        slots = batch.slots(batch.kv_lens[:, None] + torch.arange(num_rows))[0]
        pool_rows(self._engine)[:, :, :, slots] *= 1 + 1e-6
        logits = scores.logits
        reach = self._units * torch.finfo(self._engine.config.dtype).eps * float(logits.abs().max())
        moved = logits + reach * (2 * torch.rand(logits.shape, generator=self._generator) - 1)
        return (dataclasses.replace(scores, logits=moved),)


def generate(engine: Engine, temperature: float = 0.0, max_tokens: int = 20) -> list[tuple[int, ...]]:
    prompts = prompts_of([3, 9, 2])
    params = [SamplingParams(temperature=temperature, seed=i, max_tokens=max_tokens) for i in range(3)]
    tokens = [completion.token_ids for completion in engine.generate(prompts, params)]
    assert_idle(engine)
    return tokens


# --- nothing is disturbed -------------------------------------------------------------------------


def state(engine: Engine) -> list[Any]:
    """Everything that a step leaves behind for later ones, in tensors and lists."""
    pages = engine.scheduler.pages
    known = torch.tensor(sorted(pages._entries), dtype=torch.int64)
    slots = (known[:, None] * pages.page_size + torch.arange(pages.page_size)).flatten()
    tensors = [pool_rows(engine)[:, :, :, slots], *(one.target_rows for one in snapshots(engine))]
    if isinstance(engine.draft, FeatureDraft):
        tensors.append(engine.draft.model.pool.rows.clone())
    lists = [(seq.request.id, seq.tokens.copy(), seq.pages.copy()) for seq in engine.scheduler.running]
    return [tensors, lists, pages._is_free.tolist(), list(pages._cached), known.tolist()]


def same(one: list[Any], other: list[Any]) -> bool:
    return one[1:] == other[1:] and all(map(torch.equal, one[0], other[0]))


def run_beside_twin(
    draft: str, requests: Sequence[Request], arrivals: Sequence[int], **kwargs: Any
) -> CanaryCounts:
    """Run requests, which arrive after so many steps, with a canary at every step and without one."""
    watched, twin = (make_engine(MODEL, draft, canary=canary, **kwargs) for canary in (1.0, 0.0))
    Elsewhere(watched)
    step = 0
    while step <= max(arrivals) or twin.has_work:
        for request, arrival in zip(requests, arrivals, strict=True):
            if arrival == step:
                watched.add(request)
                twin.add(request)
        assert watched.step() == twin.step()
        assert same(state(watched), state(twin))
        step += 1
    assert_idle(watched)
    assert twin.canary_counts() == CanaryCounts()
    return watched.canary_counts()


def requests_of(lengths: Sequence[int], temperatures: Sequence[float], max_tokens: int) -> list[Request]:
    """Prompts that begin alike."""
    return [
        Request(
            i, tuple(TEXT[:length]), SamplingParams(temperature=t, seed=i, max_tokens=max_tokens, top_p=0.9)
        )
        for i, (length, t) in enumerate(zip(lengths, temperatures, strict=True))
    ]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    draft=st.sampled_from(["none", "ngram", "eagle3", "eagle"]),
    speculation=st.sampled_from([CHAIN, TREE, Speculation(5, 3, 2, lookup=8)]),
    lengths=st.lists(st.integers(1, 30), min_size=3, max_size=3),
    temperatures=st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=3),
    arrivals=st.lists(st.integers(0, 6), min_size=3, max_size=3),
    page_size=st.sampled_from([1, 4, 16]),
    room=st.sampled_from([80, 400]),
)
def test_it_finds_nothing_and_disturbs_nothing(
    draft: str,
    speculation: Speculation,
    lengths: list[int],
    temperatures: list[float],
    arrivals: list[int],
    page_size: int,
    room: int,
) -> None:
    requests = requests_of(lengths, temperatures, 9)
    pages = {"num_pages": room // page_size + 1, "page_size": page_size}
    counts = run_beside_twin(draft, requests, arrivals, speculation=speculation, **pages)
    assert counts.num_bugs == counts.num_ties == 0
    assert counts.num_steps + counts.num_skipped >= 3


def test_without_free_pages_a_step_is_let_go() -> None:
    """Three sequences want 8 pages each, and the canary as many; it takes none that are cached."""
    requests = requests_of([20, 18, 19], [0.0, 1.0, 0.0], 12)
    counts = run_beside_twin("eagle", requests, [0, 0, 0], num_pages=20)
    assert counts.num_skipped > 0
    assert counts.num_steps > 0
    assert counts.num_bugs == counts.num_ties == 0


def test_what_is_written() -> None:
    """The module's example: rows 64 to 99 at once, then one after the other; the prompt's end cut to steps of
    the engine's size."""
    engine = make_engine(MODEL, page_size=16, num_pages=40, max_num_batched_tokens=20, canary=1.0)
    elsewhere = Elsewhere(engine)
    prompt = prompts_of([100])[0]
    engine.generate([prompt], SamplingParams(temperature=0, max_tokens=3))
    assert elsewhere.written == [(64, 20), (84, 16), (100, 1)]  # of two decodes, the last ends the request


def test_every_step_is_rewritten_from_a_page_on() -> None:
    [prompt] = prompts_of([70])
    params = SamplingParams(temperature=0, max_tokens=60)
    prophet = Prophet(
        dict(enumerate(plain_tokens(MODEL, [prompt], [params]))), MODEL.config.vocab_size, seed=2
    )
    engine = make_engine(
        MODEL, prophet, speculation=Speculation(12, 7, 3), page_size=16, max_num_batched_tokens=64, canary=1.0
    )
    elsewhere = Elsewhere(engine)
    engine.generate([prompt], params)
    emitted: list[int] = []
    first, end = 0, 1 << 30
    for start, num_rows in elsewhere.written:
        if start < end:  # a new step
            first = start
            assert first % 16 == 0
        elif num_rows == 1:
            assert start - first >= 32
            emitted.append(start)
        end = start + num_rows
    assert emitted == list(range(70, end)), "of each step all that it emitted, and nothing twice"
    assert engine.canary_counts().num_steps < len(emitted)


def test_off_it_is_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the canary is off")

    monkeypatch.setattr(Canary, "check", refuse)
    assert EngineConfig().canary == 0
    engine = make_engine(MODEL, "eagle")
    generate(engine)
    assert engine.canary_counts() == CanaryCounts()


# --- mistakes are seen ----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("mutate", "is_seen"),
    [
        (no_mistake, False),
        (first_rows_to_the_head, False),  # it costs acceptance, and changes no token
        (compaction_skipped, True),
        (causal_mask, True),
        (bonus_at_the_root, True),
        (ancestors_not_checked, True),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_which_mistakes_it_sees(
    mutate: Mutate, is_seen: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    engine = make_engine(
        MODEL, "eagle", speculation=Speculation(12, 5, 4), max_num_batched_tokens=48, canary=1.0
    )
    generate(engine, temperature)
    counts = engine.canary_counts()
    assert counts.num_steps >= 10
    assert (counts.num_bugs > 0) == is_seen
    assert counts.num_ties == 0


def test_rows_before_the_step_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With pages of one row nothing is written anew but for ``_REWRITTEN``, and rows that were not moved
    mislead the canary as they misled the step."""
    compaction_skipped(monkeypatch)
    bugs = []
    for rewritten in (32, 0):
        monkeypatch.setattr(engine.canary, "_REWRITTEN", rewritten)
        watched = make_engine(MODEL, "eagle", page_size=1, num_pages=400, canary=1.0)
        generate(watched)
        bugs.append(watched.canary_counts().num_bugs)
    assert bugs[0] > 0
    assert bugs[1] == 0


def test_a_bug_is_logged_with_its_numbers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bonus_at_the_root(monkeypatch)
    watched = make_engine(MODEL, "eagle", speculation=Speculation(12, 5, 4), canary=1.0)
    with caplog.at_level(logging.INFO):
        tokens = generate(watched)
    bugs = [record.args for record in caplog.records if record.levelno == logging.ERROR]
    assert len(bugs) == watched.canary_counts().num_bugs > 0
    lengths = [3, 9, 2]
    for args in bugs:
        assert isinstance(args, tuple)
        what, request, position, emitted, rescored, gap = args
        assert (what, emitted != rescored) == ("a BUG", True)
        assert tokens[cast(int, request)][cast(int, position) - lengths[cast(int, request)]] == emitted
        assert cast(float, gap) > 1e-3


# --- rounding is not a mistake --------------------------------------------------------------------


@pytest.mark.parametrize("draft", ["ngram", "eagle"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bfloat16_has_no_bugs(draft: str, temperature: float) -> None:
    engine = make_engine(MODEL, draft, canary=1.0, dtype=BFLOAT16)
    Elsewhere(engine, units=2.0)
    generate(engine, temperature)
    assert engine.canary_counts().num_steps > 20
    assert engine.canary_counts().num_bugs == 0


def test_ties_are_counted_and_are_no_bugs(caplog: pytest.LogCaptureFixture) -> None:
    """Every token has a twin with the same logit, so rounding decides each time; farther than that it is a
    bug."""
    twins = MODEL.weights["lm_head.weight"].clone()
    twins[1::2] = twins[:-1:2]
    model = dataclasses.replace(MODEL, weights=MODEL.weights | {"lm_head.weight": twins})
    engine = make_engine(model, "eagle", canary=1.0, dtype=BFLOAT16)
    Elsewhere(engine, units=1.0)
    with caplog.at_level(logging.INFO):
        generate(engine)
    counts = engine.canary_counts()
    assert counts.num_bugs == 0
    assert counts.num_ties > 5
    assert [record.levelno for record in caplog.records] == [logging.INFO] * counts.num_ties
    engine = make_engine(model, "eagle", canary=1.0, dtype=BFLOAT16)
    Elsewhere(engine, units=40.0)
    generate(engine)
    assert engine.canary_counts().num_bugs > 0


# --- which steps ----------------------------------------------------------------------------------


def test_runs_repeat() -> None:
    counts = []
    for _ in range(2):
        engine = make_engine(MODEL, "eagle", canary=0.3)
        elsewhere = Elsewhere(engine)
        generate(engine)
        counts.append((engine.canary_counts(), elsewhere.written))
    assert counts[0] == counts[1]
    whole = make_engine(MODEL, "eagle", canary=1.0)
    generate(whole)
    assert 0 < counts[0][0].num_steps < whole.canary_counts().num_steps / 2


def test_plain_requests_are_held_to_it_too() -> None:
    engine = make_engine(MODEL, speculation=PLAIN, canary=1.0)
    generate(engine, 1.0)
    assert engine.canary_counts() == CanaryCounts(num_steps=3 * 18)


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=f"canary is {share}, expected a share of all steps, 0 to 1"):
        EngineConfig(canary=share)
