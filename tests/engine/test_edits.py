"""Penalties, biases, bad words and min_tokens are exact, in every node of every tree.

Three oracles: the logits of each node are those of the written-out edits; every token of an answer is the one
that the written-out sampler chooses; speculative tokens are the plain ones. The mistakes at the end were seen
by them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.core import Batch, DraftTree, PromptChunk, SamplingParams, Speculation
from engine.core import Request as EngineRequest
from engine.core import Sequence as EngineSequence
from engine.edits import BadWords, EditList, LogitBias, MinTokens, sampling_edits
from engine.penalties import Penalties
from engine.sampler import sampling_tensors
from kernels import gumbel_noise
from tests.engine.rig import (
    TREE,
    Model,
    Prophet,
    assert_idle,
    echo_model,
    make_engine,
    plain_tokens,
    prompts_of,
    record,
)
from tests.oracles import sampler
from tests.oracles.llama import forward

VOCAB, EOS = 97, (96, 95)
PROMPTS = prompts_of([9, 2, 21])
MODEL: Model = echo_model(3)


# --- the oracles ----------------------------------------------------------------------------------


def written_out(logits: Tensor, prompt: list[int], answer: list[int], params: SamplingParams) -> sampler.Row:
    return sampler.edit(
        logits.double().numpy(),
        prompt,
        answer,
        ends=EOS + params.stop_token_ids,
        min_tokens=params.min_tokens,
        bad_words=params.bad_words,
        logit_bias=params.logit_bias,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
    )


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


# --- the logits of a node -------------------------------------------------------------------------


def params_strategy(tokens: st.SearchStrategy[int]) -> st.SearchStrategy[SamplingParams]:
    """Any mixture; edits concern the given tokens."""
    return st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.0, 0.6, 1.0]),
        top_k=st.sampled_from([0, 0, 20]),
        top_p=st.sampled_from([1.0, 0.9]),
        min_p=st.sampled_from([0.0, 0.0, 0.05]),
        seed=st.integers(0, 1000),
        presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -2.0]),
        frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -0.3]),
        repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
        logit_bias=st.dictionaries(tokens, st.sampled_from([-100.0, -2.5, 3.0]), max_size=3).map(
            lambda found: tuple(found.items())
        ),
        bad_words=st.lists(st.lists(tokens, min_size=1, max_size=4).map(tuple), max_size=4).map(tuple),
        min_tokens=st.sampled_from([0, 0, 3, 9]),
        max_tokens=st.just(14),
        stop_token_ids=st.lists(tokens, max_size=2).map(tuple),
        ignore_eos=st.booleans(),
    )


FEW = st.integers(0, 7)


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Tokens and parents of up to 7 nodes over 8 tokens, padded by up to 2."""
    parents = [-1] + [draw(st.integers(0, node - 1)) for node in range(1, draw(st.integers(1, 7)))]
    num_padding = 9 - len(parents) if draw(st.booleans()) else 0
    tokens = [draw(FEW) for _ in parents] + [0] * num_padding
    return tokens, parents + [-1] * num_padding


def path_of(node: int, tokens: list[int], parents: list[int]) -> list[int]:
    """The drafted tokens of a node's path."""
    return [] if node == 0 else [*path_of(parents[node], tokens, parents), tokens[node]]


def batch_of(
    seqs: list[EngineSequence], prompt: PromptChunk | None = None, num_nodes: int = 1
) -> tuple[Batch, Tensor]:
    """What edits read of a batch, and logits for it."""
    params = [seq.request.sampling for seq in seqs]
    lens = torch.tensor([seq.kv_len for seq in seqs])
    generator = torch.Generator().manual_seed(len(seqs))
    logits = torch.randn(len(seqs), num_nodes, VOCAB, generator=generator) * 3
    return Batch(tuple(seqs), lens, lens[:, None], 4, sampling_tensors(params, "cpu"), (), prompt), logits


def assert_row(edited: Tensor, expected: sampler.Row) -> None:
    np.testing.assert_allclose(edited.double().numpy(), expected, atol=1e-4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_every_node_is_edited_for_its_own_path(data: st.DataObject) -> None:
    """Two steps of a batch, so that counts grow; nobody's row but one's own changes, and raw scores stay."""
    num_seqs = data.draw(st.integers(1, 3))
    seqs = []
    for row in range(num_seqs):
        params = data.draw(st.one_of(st.just(SamplingParams()), params_strategy(FEW)))
        prompt = data.draw(st.lists(FEW, min_size=1, max_size=5))
        seqs.append(EngineSequence(EngineRequest(row, tuple(prompt), params), list(prompt), []))
    edits = EditList(sampling_edits(VOCAB, "cpu", (*EOS, VOCAB + 3)))
    for _ in range(2):
        for seq in seqs:
            seq.tokens += data.draw(st.lists(FEW, min_size=1, max_size=4))
        drawn = [data.draw(trees()) for _ in seqs]
        width = max(len(tokens) for tokens, _ in drawn)
        drawn = [
            (tokens + [0] * (width - len(tokens)), parents + [-1] * (width - len(parents)))
            for tokens, parents in drawn
        ]
        for (tokens, _), seq in zip(drawn, seqs, strict=True):
            tokens[0] = seq.tokens[-1]
        tree = DraftTree(
            torch.tensor([tokens for tokens, _ in drawn]), torch.tensor([parents for _, parents in drawn])
        )
        batch, logits = batch_of(seqs, num_nodes=width)
        raw = logits.clone()
        edited = edits.edited(logits, batch, tree)
        assert torch.equal(logits, raw)
        for row, (seq, (tokens, parents)) in enumerate(zip(seqs, drawn, strict=True)):
            request, num_prompt = seq.request, len(seq.request.prompt)
            if request.sampling == SamplingParams():
                assert torch.equal(edited[row], raw[row])
            for node in range(width):
                if node == 0 or parents[node] >= 0:
                    answer = seq.tokens[num_prompt:] + path_of(node, tokens, parents)
                    assert_row(
                        edited[row, node],
                        written_out(raw[row, node], [*request.prompt], answer, request.sampling),
                    )


def test_behind_a_prompt_its_last_node_is_edited() -> None:
    """Chunks of prompts, one of a preempted sequence that had an answer already; the third goes on, so that
    nothing will be chosen behind it."""
    params = SamplingParams(
        repetition_penalty=1.7, frequency_penalty=1.0, bad_words=((5, 6), (3,)), min_tokens=3
    )
    fresh = EngineSequence(EngineRequest(0, (1, 2, 3), params), [1, 2], [3])
    resumed = EngineSequence(EngineRequest(1, (1, 2), params), [1], [2, 4, 5])
    unfinished = EngineSequence(EngineRequest(2, (1, 2, 3, 4), params), [1], [2, 3, 4])
    chunk = PromptChunk(
        torch.tensor([[2, 3, 0, 0], [1, 2, 4, 5], [1, 2, 0, 0]]),
        torch.tensor([2, 4, 2]),
        torch.tensor([-1, -1, 3]),
        (2, 4, 2),
    )
    batch, logits = batch_of([fresh, resumed, unfinished], chunk)
    tree = DraftTree(chunk.tokens, torch.tensor([[-1, 0, -1, -1], [-1, 0, 1, 2], [-1, 0, -1, -1]]))
    edited = EditList(sampling_edits(VOCAB, "cpu", EOS)).edited(logits, batch, tree)
    assert_row(edited[0, 0], written_out(logits[0, 0], [1, 2, 3], [], params))
    assert_row(edited[1, 0], written_out(logits[1, 0], [1, 2], [4, 5], params))
    assert torch.equal(edited[2], logits[2])


def test_who_asks_for_nothing_pays_nothing() -> None:
    seq = EngineSequence(EngineRequest(0, (1,), SamplingParams(temperature=0, logprobs=3)), [1, 2], [])
    batch, logits = batch_of([seq])
    tree = DraftTree(torch.tensor([[2]]), torch.tensor([[-1]]))
    assert EditList(sampling_edits(VOCAB, "cpu", EOS)).edited(logits, batch, tree) is logits


# --- whole answers --------------------------------------------------------------------------------

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


# --- log-probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("draft", ["none", "eagle3"])
def test_logprobs_are_those_of_the_raw_logits(draft: str) -> None:
    """Of every token, accepted or not, edited or not; and none for who does not ask."""
    params = [
        SamplingParams(temperature=0.9, seed=3, max_tokens=15, logprobs=0),
        SamplingParams(temperature=0.9, seed=4, max_tokens=15),
        SamplingParams(temperature=0, max_tokens=15, logprobs=5, frequency_penalty=2.0, min_p=0.2),
    ]
    engine = make_engine(MODEL, draft, max_num_batched_tokens=16)
    for request_id, (prompt, param) in enumerate(zip(PROMPTS, params, strict=True)):
        engine.add(EngineRequest(request_id, tuple(prompt), param))
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    for row, (prompt, param) in enumerate(zip(PROMPTS, params, strict=True)):
        own = [delta for delta in deltas if delta.request_id == row]
        tokens = [token for delta in own for token in delta.token_ids]
        found = [logprob for delta in own for logprob in delta.logprobs]
        if param.logprobs is None:
            assert found == []
            continue
        assert all(len(delta.logprobs) == len(delta.token_ids) for delta in own)
        logits = forward(MODEL.config, MODEL.weights, [*prompt, *tokens]).logits[len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        for token, of_token, row_of_token in zip(tokens, found, expected, strict=True):
            assert of_token.logprob == pytest.approx(float(row_of_token[token]), abs=1e-5)
            best = row_of_token.topk(param.logprobs)
            assert [token for token, _ in of_token.top] == best.indices.tolist()
            assert [each for _, each in of_token.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert (sum(delta.num_accepted for delta in deltas) > 3) == (draft != "none")


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
