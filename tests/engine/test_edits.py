"""Penalties, biases, bad words and min_tokens are exact in whole answers, whoever drafts.

Two oracles: every token of an answer is the one that the written-out sampler chooses; speculative tokens are
the plain ones. The mistakes at the end were seen by them. The edits of a node: ``test_edited_nodes``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.core import Batch, DraftTree, SamplingParams, Speculation
from engine.core import Request as EngineRequest
from engine.core import Sequence as EngineSequence
from engine.edits import BadWords, LogitBias, MinTokens
from engine.penalties import Penalties
from kernels import gumbel_noise
from tests.engine.edited import EOS, MODEL, PROMPTS, VOCAB, params_strategy, written_out
from tests.engine.rig import TREE, Prophet, assert_idle, make_engine, plain_tokens, record
from tests.oracles import sampler
from tests.oracles.llama import forward


def is_explained(prompt: list[int], tokens: tuple[int, ...], params: SamplingParams) -> bool:
    """Whether the written-out sampler would have chosen every token of an answer, near ties aside, and would
    have gone on until there."""
    logits = forward(MODEL.config, MODEL.weights, [*prompt, *tokens]).logits
    for number, token in enumerate(tokens):
        position = len(prompt) + number
        row = written_out(logits[position - 1], prompt, list(tokens[:number]), params)
        if params.temperature > 0:
            row = sampler.process(row, params.temperature, params.top_k, params.top_p, params.min_p)
            noise = gumbel_noise(torch.tensor([params.seed]), torch.tensor([[position]]), torch.arange(VOCAB))
            row = row + noise[0, 0].double().numpy()
        if row[token] < row.max() - 1e-3:
            return False
    ends = params.stop_token_ids if params.ignore_eos else EOS + params.stop_token_ids
    return not any(token in ends for token in tokens[:-1])


ALONE: dict[str, dict[str, Any]] = {
    "presence_penalty": {"presence_penalty": 2.0},
    "frequency_penalty": {"frequency_penalty": 2.0},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "logit_bias": {"logit_bias": ((5, 9.0), (7, -50.0), (11, 8.0))},
    "bad_words": {},  # from what would be said otherwise
    "min_tokens": {"min_tokens": 11, "stop_token_ids": tuple(range(90))},
    "stop_token_ids": {"stop_token_ids": tuple(range(40, 70))},
    "min_p": {"min_p": 0.4},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.4},
}


def answers(
    params: list[SamplingParams], draft: str = "prophet", **kwargs: Any
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], int]:
    """Plain and speculative tokens, and how many drafted ones were accepted."""
    plain = plain_tokens(MODEL, PROMPTS, params, eos=EOS)
    proposer = Prophet(dict(enumerate(plain)), VOCAB) if draft == "prophet" else draft
    engine = make_engine(MODEL, proposer, speculation=Speculation(9, 4, 3), eos=EOS, **kwargs)
    recording = record(engine, PROMPTS, params)
    assert_idle(engine)
    found = [one.token_ids for one in recording.completions]
    return plain, found, sum(one.num_accepted for one in recording.completions)


USUAL = [SamplingParams(temperature=t, seed=2, max_tokens=16) for t in (0.0, 0.5, 0.5)]


@cache
def usual_tokens() -> list[tuple[int, ...]]:
    return plain_tokens(MODEL, PROMPTS, USUAL, eos=EOS)


@pytest.mark.parametrize("name", ALONE)
def test_each_parameter_alone(name: str) -> None:
    """Of three requests the middle one does not ask for it: its tokens are what they always were."""
    without, asked = usual_tokens(), dict(ALONE[name])
    if name == "bad_words":
        asked["bad_words"] = ((without[0][3],), without[0][5:7], without[2][2:5])
    params = [replace(USUAL[0], **asked), USUAL[1], replace(USUAL[2], **asked)]
    plain, found, num_accepted = answers(params)
    assert found == plain
    assert num_accepted > 3, "the test is idle unless drafts are accepted"
    assert plain[1] == without[1]
    assert plain[2] != without[2], "the parameter did nothing"
    assert (plain[0] != without[0]) == (name not in ("min_p", "top_k", "top_p"))
    assert all(is_explained(*each) for each in zip(PROMPTS, plain, params, strict=True))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_mixture(data: st.DataObject) -> None:
    """Also where the prompt is read in pieces beside trees that are cut."""
    likely = sorted({token for tokens in usual_tokens() for token in tokens})
    params = [data.draw(params_strategy(st.sampled_from(likely))) for _ in PROMPTS]
    plain, found, _ = answers(
        params, data.draw(st.sampled_from(["prophet", "eagle3", "eagle", "ngram"])), max_num_batched_tokens=16
    )
    assert found == plain
    assert all(is_explained(*each) for each in zip(PROMPTS, plain, params, strict=True))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_what_a_request_edits_does_not_reach_its_draft(temperature: float) -> None:
    """Target and draft throw the same dice, which no edit touches; the edits are the target's alone."""
    trees = []
    for bias in ((), tuple((token, 9.0) for token in range(0, VOCAB, 3))):
        engine = make_engine(MODEL, "eagle3", speculation=TREE, eos=EOS)
        asked = SamplingParams(temperature=temperature, seed=3, max_tokens=16)
        engine.add(EngineRequest(0, tuple(PROMPTS[0]), asked))
        engine.step()
        (seq,) = engine.scheduler.running
        seq.request = replace(seq.request, sampling=replace(asked, logit_bias=bias))
        (batch,) = engine.scheduler.next_batches()
        trees.append(engine.draft.propose(batch, engine.grammars.allowed))
    assert trees[0].tokens.shape[1] > 3
    assert torch.equal(trees[0].tokens, trees[1].tokens)
    assert torch.equal(trees[0].parents, trees[1].parents)


def test_who_forbids_everything_fails_alone() -> None:
    params = [
        replace(USUAL[0], bad_words=tuple((token,) for token in range(VOCAB)), logprobs=2),
        replace(USUAL[1], logprobs=2),
        USUAL[2],
    ]
    engine = make_engine(MODEL, "eagle3", eos=EOS)
    found = record(engine, PROMPTS, params).completions
    assert [one.finish_reason for one in found] == ["error", "length", "length"]
    assert [one.token_ids for one in found] == [(), *usual_tokens()[1:]]
    assert_idle(engine)


def test_what_a_preempted_sequence_had_still_counts() -> None:
    params = [
        SamplingParams(
            temperature=0, max_tokens=30, frequency_penalty=0.8, repetition_penalty=1.2, min_tokens=25
        )
    ] * 3
    preempted = []
    engine = make_engine(MODEL, "eagle3", num_pages=24, prefix_caching=False)
    preempt = engine.scheduler._preempt

    def noted(seq: EngineSequence) -> None:
        preempted.append(seq.num_generated)
        preempt(seq)

    engine.scheduler._preempt = noted  # type: ignore[method-assign]
    found = record(engine, PROMPTS, params)
    assert max(preempted) > 3
    assert [one.token_ids for one in found.completions] == plain_tokens(MODEL, PROMPTS, params)
    assert_idle(engine)


def test_the_canary_edits_too() -> None:
    """It decodes plainly behind fewer tokens than are committed, and keeps nothing."""
    params = [
        SamplingParams(temperature=t, seed=1, max_tokens=20, frequency_penalty=1.0, bad_words=((4, 5),))
        for t in (0.0, 0.8, 1.0)
    ]
    engine = make_engine(MODEL, "eagle3", speculation=TREE, canary=1.0)
    completions = record(engine, PROMPTS, params).completions
    assert engine.canary.counts.num_steps > 10
    assert engine.canary.counts.num_ties == engine.canary.counts.num_bugs == 0
    assert [one.token_ids for one in completions] == plain_tokens(MODEL, PROMPTS, params)
    assert_idle(engine)


# --- deliberate mistakes --------------------------------------------------------------------------


def of_the_neighbour(patch: pytest.MonkeyPatch) -> None:
    """An edit is applied to the next row of the batch."""
    penalise = Penalties.__call__

    def wrong(self: Penalties, logits: Tensor, batch: Batch, tree: DraftTree, rows: list[int]) -> None:
        shifted = logits.roll(-1, 0)
        penalise(self, shifted, batch, tree, rows)
        logits.copy_(shifted.roll(1, 0))

    patch.setattr(Penalties, "__call__", wrong)


def root_alone(tree: DraftTree) -> DraftTree:
    return DraftTree(tree.tokens[:, :1], tree.parents[:, :1])


def counts_of_the_path_forgotten(patch: pytest.MonkeyPatch) -> None:
    penalise = Penalties.__call__
    patch.setattr(
        Penalties,
        "__call__",
        lambda self, logits, batch, tree, rows: penalise(self, logits, batch, root_alone(tree), rows),
    )


def words_of_the_path_forgotten(patch: pytest.MonkeyPatch) -> None:
    ends = BadWords._path_ends

    def wrong(self: BadWords, batch: Batch, tree: DraftTree, row: int, num: int) -> Tensor:
        return ends(self, batch, root_alone(tree), row, num).expand(tree.tokens.shape[1], -1)

    patch.setattr(BadWords, "_path_ends", wrong)


def tokens_of_the_path_not_counted(patch: pytest.MonkeyPatch) -> None:
    columns = MinTokens._columns

    def wrong(self: MinTokens, kept: Tensor, batch: Batch, tree: DraftTree, row: int) -> Any:
        flat = DraftTree(tree.tokens, torch.full_like(tree.parents, -1))
        return columns(self, kept, batch, flat, row)

    patch.setattr(MinTokens, "_columns", wrong)


def bias_after_temperature(patch: pytest.MonkeyPatch) -> None:
    columns = LogitBias._columns

    def wrong(self: LogitBias, kept: Any, batch: Batch, tree: DraftTree, row: int) -> tuple[Tensor, Tensor]:
        ids, amounts = columns(self, kept, batch, tree, row)
        return ids, amounts * batch.seqs[row].request.sampling.temperature

    patch.setattr(LogitBias, "_columns", wrong)


def no_mistake(patch: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize(
    ("mutate", "tokens", "explained"),  # do the tokens still match the plain ones; are the plain ones right
    [
        (no_mistake, True, True),
        (of_the_neighbour, False, True),  # alone in a batch everybody is their own neighbour
        (counts_of_the_path_forgotten, False, True),
        (words_of_the_path_forgotten, False, True),
        (tokens_of_the_path_not_counted, False, True),
        (bias_after_temperature, True, False),
    ],
)
def test_the_oracles_see_mistakes(
    mutate: Callable[[pytest.MonkeyPatch], None], tokens: bool, explained: bool
) -> None:
    usual = [replace(one, max_tokens=24) for one in USUAL]
    said = usual_tokens()[2]
    params = [
        replace(usual[0], frequency_penalty=1.5, logit_bias=((5, 12.0), (11, 12.0), (13, 12.0))),
        replace(usual[1], min_tokens=10, stop_token_ids=tuple(range(90)), logit_bias=((5, 2.5), (11, 3.0))),
        replace(usual[2], bad_words=tuple(said[at : at + 2] for at in range(1, 14, 2))),
    ]
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        plain, found, _ = answers(params)
    assert (found == plain) == tokens
    assert all(is_explained(*each) for each in zip(PROMPTS, plain, params, strict=True)) == explained
