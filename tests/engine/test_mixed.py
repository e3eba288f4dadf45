"""Decodes and chunks of prompts in one step: one forward, no padding, within the budget; and nobody notices.

Requests arrive while others are being answered. Both oracles look on, and each is seen to fail on a mistake
that only a mixed step can make.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import engine.budget
from draft import growth
from draft.head import FeatureDraft
from engine.core import Batch, DraftTree, SamplingParams, Scores, Speculation, Verdict
from engine.kvcache import KVPool, LatentPool, own_slots
from engine.models import decoder
from engine.models.decoder import Decoder
from engine.rows import (
    BatchRows,
    Part,
    RowPlan,
    _join_slots,
    _own_words,
    _padded_rows,
    _prompt_rows,
    join_plans,
    plan_chains,
)
from engine.step import Engine
from kernels import compact_path
from tests.engine import mistral_rig
from tests.engine.rig import (
    PLAIN,
    Prophet,
    Recording,
    assert_idle,
    echo_model,
    make_engine,
    plain_tokens,
    prompts_of,
    record,
)
from tests.engine.state import TOLERANCE, state_error

MODEL = echo_model(8)
PAIR = mistral_rig.echo_pair(8)
PROMPTS = prompts_of([5, 33, 3, 12, 1, 26])
ARRIVALS = [0, 3, 4, 4, 7, 9]
BUDGET = 14
PER_REQUEST = [None, Speculation(5, 4, 1), PLAIN, None, Speculation(3, 2, 1, lookup=4), Speculation(9, 3, 4)]
Mutate = Callable[[pytest.MonkeyPatch], None]


def params_of(temperature: float) -> list[SamplingParams]:
    return [SamplingParams(temperature=temperature, seed=i, max_tokens=16) for i in range(len(PROMPTS))]


@dataclasses.dataclass
class Watched:
    """What the target was asked to do, step by step."""

    nodes: list[list[int]]  # real nodes of each batch of a step
    rows: list[int]  # rows of each forward


def watch(target: object, patch: pytest.MonkeyPatch) -> Watched:
    assert isinstance(target, Decoder)
    watched = Watched([], [])
    score, forward = target.score, target._forward

    def watched_score(batches: Sequence[Batch], trees: Sequence[DraftTree]) -> tuple[Scores, ...]:
        watched.nodes.append([int(tree.real().sum()) for tree in trees])
        assert [batch.is_prefill for batch in batches] in ([False], [True], [False, True])
        return score(batches, trees)

    def watched_forward(tokens: Tensor, positions: Tensor, plan: RowPlan) -> tuple[Tensor, Tensor]:
        watched.rows.append(len(tokens))
        return forward(tokens, positions, plan)

    patch.setattr(target, "score", watched_score)
    patch.setattr(target, "_forward", watched_forward)
    return watched


def run(engine: Engine, temperature: float) -> Recording:
    recording = record(engine, PROMPTS, params_of(temperature), PER_REQUEST, arrivals=ARRIVALS)
    assert_idle(engine)
    return recording


def tokens_of(recording: Recording) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in recording.completions]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("draft", ["none", "ngram", "eagle3", "eagle", "prophet"])
def test_a_mixed_step_is_one_forward_without_padding(
    draft: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain_tokens(MODEL, PROMPTS, params_of(temperature))
    proposer = Prophet(dict(enumerate(expected)), MODEL.config.vocab_size) if draft == "prophet" else draft
    engine = make_engine(MODEL, proposer, max_num_batched_tokens=BUDGET, prefix_caching=False)
    watched = watch(engine.target, monkeypatch)
    recording = run(engine, temperature)
    assert tokens_of(recording) == expected
    assert state_error(MODEL, recording, draft) < TOLERANCE
    assert watched.rows == [sum(nodes) for nodes in watched.nodes]
    assert max(watched.rows) <= BUDGET
    assert draft == "ngram" or max(watched.rows) == BUDGET  # it is given nodes for chains it has not found
    assert sum(len(nodes) == 2 for nodes in watched.nodes) > 5, "the test is idle without mixed steps"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("draft", ["none", "eagle"])
def test_mistral_too(draft: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of more than 16 nodes are attended to unabsorbed, beside trees that are absorbed."""
    params = params_of(temperature)
    expected = mistral_rig.plain_tokens(PAIR, PROMPTS, params, speculation=PLAIN)
    engine = mistral_rig.make_engine(PAIR, draft, max_num_batched_tokens=28)
    watched = watch(engine.target, monkeypatch)
    recording = run(engine, temperature)
    assert tokens_of(recording) == expected
    assert mistral_rig.state_error(PAIR, recording) < TOLERANCE
    assert watched.rows == [sum(nodes) for nodes in watched.nodes]
    assert any(len(nodes) == 2 and nodes[1] > 16 for nodes in watched.nodes)


# --- deliberate mistakes


def no_mistake(patch: pytest.MonkeyPatch) -> None:
    pass


def a_device_keeps_its_padding(patch: pytest.MonkeyPatch) -> None:
    """No mistake but what a device does, whose trees are planned without being asked how large they are, and
    whose nodes find their rows through page tables."""
    patch.setattr(
        decoder,
        "batch_rows",
        lambda batch, tree: (_prompt_rows if batch.is_prefill else _padded_rows)(batch, tree),
    )

    def chains(
        self: FeatureDraft, batch: Batch, index: list[int], firsts: list[int], counts: list[int]
    ) -> RowPlan:
        return plan_chains(batch.page_table[index], batch.page_size, torch.tensor(firsts), counts, start=1)

    def by_path(pool: KVPool | LatentPool, batch: Batch, verdict: Verdict) -> None:
        compact_path(pool.rows, verdict.path, own_slots(batch, verdict))

    patch.setattr(decoder, "compact", by_path)
    patch.setattr(FeatureDraft, "_chains", chains)
    patch.setattr(growth, "plan_own", lambda write, rows, own, longest: _own_words(write, rows, own))


def rows_of_another_sequence(patch: pytest.MonkeyPatch) -> None:
    """The last part reads one page further on."""
    attend = RowPlan.attend

    def wrong(self: RowPlan, q: Tensor, attention: Callable[[Tensor, Part], Tensor]) -> Tensor:
        *others, last = self.parts
        if others and isinstance(last.read, tuple):
            read = tuple(slice(run.start + 4, run.stop + 4) for run in last.read)
            self = RowPlan(self.write, (*others, dataclasses.replace(last, read=read)))
        return attend(self, q, attention)

    patch.setattr(RowPlan, "attend", wrong)


def batches_swap_their_slots(patch: pytest.MonkeyPatch) -> None:
    def wrong(plans: Sequence[RowPlan]) -> RowPlan:
        swapped = _join_slots([plan.write for plan in reversed(plans)])
        return dataclasses.replace(join_plans(plans), write=swapped)

    patch.setattr(decoder, "join_plans", wrong)


def scores_of_the_other_batch(patch: pytest.MonkeyPatch) -> None:
    """A chunk's choice is read from its first row."""
    patch.setattr(BatchRows, "last", lambda self, rows: self.unpack(rows)[:, 0])


def budget_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine.budget, "chunk_sizes", lambda needs, priorities, budget: needs)


@pytest.mark.parametrize(
    ("mutate", "tokens", "state", "tight", "within"),
    [
        (no_mistake, True, True, True, True),
        (a_device_keeps_its_padding, True, True, False, True),
        (rows_of_another_sequence, False, False, True, True),
        (batches_swap_their_slots, False, False, True, True),
        (scores_of_the_other_batch, False, True, True, True),
        (budget_ignored, True, True, True, False),
    ],
)
def test_who_sees_a_mistake(
    mutate: Mutate, tokens: bool, state: bool, tight: bool, within: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens and pools; whether every row is a node (tight); whether nodes keep to the budget (within)."""
    expected = plain_tokens(MODEL, PROMPTS, params_of(0.0))
    mutate(monkeypatch)
    engine = make_engine(MODEL, "eagle", max_num_batched_tokens=BUDGET, prefix_caching=False)
    watched = watch(engine.target, monkeypatch)
    recording = run(engine, 0.0)
    assert (tokens_of(recording) == expected) == tokens
    assert (state_error(MODEL, recording, "eagle") < TOLERANCE) == state
    assert (watched.rows == [sum(nodes) for nodes in watched.nodes]) == tight
    assert (max(map(sum, watched.nodes)) <= BUDGET) == within


def test_logits_are_asked_for_real_nodes_and_the_ends_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(MODEL, "eagle", max_num_batched_tokens=BUDGET, prefix_caching=False)
    assert isinstance(engine.target, Decoder)
    wanted: list[int] = []
    score, lm_head = engine.target.score, engine.target.lm_head
    scoring = False

    def watched_score(batches: Sequence[Batch], trees: Sequence[DraftTree]) -> tuple[Scores, ...]:
        nonlocal scoring
        scoring = True
        needed = [
            len(b.seqs) if b.is_prefill else int(tree.real().sum())
            for b, tree in zip(batches, trees, strict=True)
        ]
        wanted.append(sum(needed))
        found = score(batches, trees)
        scoring = False
        return found

    def watched_head(hidden: Tensor) -> Tensor:
        if scoring:
            assert hidden.shape == (wanted[-1], MODEL.config.hidden_size)
        return lm_head(hidden)

    monkeypatch.setattr(engine.target, "score", watched_score)
    monkeypatch.setattr(engine.target, "lm_head", watched_head)
    run(engine, 0.0)
    assert len(wanted) > 20


def test_ragged_pending_pairs_of_a_head_are_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extending takes one pass over as many rows as there are pairs, however different the sequences."""
    engine = make_engine(MODEL, "eagle", max_num_batched_tokens=BUDGET, prefix_caching=False)
    model = engine.draft.model  # type: ignore[attr-defined]
    extend, forward = engine.draft._extend, model.forward  # type: ignore[attr-defined]
    pairs: list[list[int]] = []
    rows: list[int] = []
    extending = False

    def watched_extend(batch: Batch, wanted: list[tuple[int, int]]) -> Tensor:
        nonlocal extending
        extending = True
        pairs.append([count for _, count in wanted])
        found: Tensor = extend(batch, wanted)
        extending = False
        return found

    def watched_forward(tokens: Tensor, feature: Tensor, positions: Tensor, plan: RowPlan) -> Tensor:
        if extending:
            rows.append(len(tokens))
        found: Tensor = forward(tokens, feature, positions, plan)
        return found

    monkeypatch.setattr(engine.draft, "_extend", watched_extend)
    monkeypatch.setattr(model, "forward", watched_forward)
    run(engine, 0.0)
    assert rows == [sum(counts) for counts in pairs]
    assert any(len(set(counts)) > 1 for counts in pairs), "the test is idle without ragged pairs"
