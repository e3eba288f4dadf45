"""The logits of every node of every tree are those of the edits written out for its path."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.core import Batch, DraftTree, PromptChunk, SamplingParams
from engine.core import Request as EngineRequest
from engine.core import Sequence as EngineSequence
from engine.edits import EditList, sampling_edits
from engine.sampler import sampling_tensors
from tests.engine.edited import EOS, VOCAB, params_strategy, written_out
from tests.oracles import sampler

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
