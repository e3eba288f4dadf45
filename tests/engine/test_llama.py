"""The paged, batched, fused Llama against transformers, and against itself in other cuts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import POST_NORM, LlamaConfig, RopeScaling
from engine.core import Batch, PromptChunk, SamplingParams, Scores, Sequence
from engine.core import Request as EngineRequest
from engine.models.llama import Llama
from engine.sampler import sampling_tensors
from engine.step import prompt_chain
from perf.peers import transformers_llama
from tests.conftest import tiny_llama
from tests.engine.rig import copies, prompts_of, slots_of_pages
from tests.engine.state import pool_layout
from tests.oracles.llama import forward

LLAMA3 = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha-tied": {"num_kv_heads": 4, "tie_word_embeddings": True},
    "mqa-llama3-rope": {"num_kv_heads": 1, "rope_scaling": LLAMA3, "rope_theta": 5e5},
    "wide-heads": {"head_dim": 12, "num_heads": 8, "num_kv_heads": 2, "rms_norm_eps": 1e-3},
    "one-layer-one-head": {"num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 32},
}


class Sheet:
    """A target with hand-made pages: page tables are given, so that any order can be tried."""

    def __init__(
        self,
        config: LlamaConfig,
        weights: dict[str, Tensor],
        page_size: int = 4,
        num_pages: int = 64,
        feature_layers: tuple[int, ...] = (),
        half_weights: bool = False,
    ) -> None:
        self.page_size = page_size
        self.target = Llama(config, copies(weights), num_pages * page_size, feature_layers, half_weights)

    def prefill(self, chunks: list[tuple[list[int], int, list[int]]]) -> Scores:
        """chunks: (tokens, rows already there, pages) of each sequence, as one padded batch."""
        width = max(len(tokens) for tokens, _, _ in chunks)
        seqs = tuple(
            Sequence(EngineRequest(i, (0,), SamplingParams()), [0] * (past + 1), [], pages)
            for i, (_, past, pages) in enumerate(chunks)
        )
        chunk = PromptChunk(
            torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _, _ in chunks]),
            torch.tensor([len(tokens) for tokens, _, _ in chunks]),
            torch.full((len(chunks),), -1),
            tuple(len(tokens) for tokens, _, _ in chunks),
        )
        most = max(len(pages) for _, _, pages in chunks)
        batch = Batch(
            seqs,
            torch.tensor([past for _, past, _ in chunks]),
            torch.tensor([pages + [0] * (most - len(pages)) for _, _, pages in chunks]),
            self.page_size,
            sampling_tensors([SamplingParams()] * len(chunks), "cpu"),
            (),
            chunk,
        )
        tree = prompt_chain(batch)
        return self.target.score((batch,), (tree,))[0].unpacked()


def pages_for(count: int, first: int = 1) -> list[int]:
    return list(range(first, first + count))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape: str) -> None:
    """All positions at once: every prefix is a sequence of one batch, whose last row is scored."""
    config, weights = tiny_llama(1, **SHAPES[shape])
    model = transformers_llama(config, weights)
    tokens = prompts_of([23])[0]
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0]
    sheet = Sheet(config, weights, num_pages=1 + 23 * 6)
    got = sheet.prefill([(tokens[:n], 0, pages_for(6, 1 + 6 * (n - 1))) for n in range(1, 24)]).logits[:, 0]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_and_scattered_pages_equal_one_prefill(shape: str) -> None:
    """Any cut of the prompt, pages in any order: same logits, same rows, same features."""
    config, weights = tiny_llama(2, **SHAPES[shape])
    layers = (0, config.num_layers, POST_NORM)
    tokens = prompts_of([29])[0]
    seen = forward(config, weights, tokens)
    features = torch.cat((seen.inputs[0], seen.inputs[-1], seen.post_norm), dim=-1)
    truth = pool_layout(seen.keys, seen.values)
    for cuts in ([29], [1] * 29, [16, 13], [3, 7, 1, 18]):
        for pages in (pages_for(8), [9, 2, 30, 4, 3, 11, 7, 1]):
            sheet, past, parts = Sheet(config, weights, feature_layers=layers), 0, []
            for cut in cuts:
                scores = sheet.prefill([(tokens[past : past + cut], past, pages)])
                assert scores.positions.tolist() == [[past + cut - 1]]
                torch.testing.assert_close(
                    scores.logits[0, 0], seen.logits[past + cut - 1], atol=1e-4, rtol=1e-4
                )
                parts.append(scores.features[0])
                past += cut
            torch.testing.assert_close(torch.cat(parts), features, atol=1e-4, rtol=1e-4)
            rows = sheet.target.pool.rows[:, :, :, slots_of_pages(pages, 4, 0, 29)]
            torch.testing.assert_close(rows, truth, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scattered", [False, True])
def test_a_ragged_batch_equals_each_alone(scattered: bool) -> None:
    """Different prompt lengths and rows already there; more than 64 nodes take the other attention path."""
    config, weights = tiny_llama(3)
    prompts = prompts_of([70, 5, 33, 12])
    pasts = [0, 4, 20, 11]
    generator = torch.Generator().manual_seed(0)
    order = (torch.randperm(100, generator=generator) + 1).tolist() if scattered else list(range(1, 101))
    pages = [order[25 * i : 25 * i + -(-len(prompt) // 4)] for i, prompt in enumerate(prompts)]
    sheet = Sheet(config, weights, num_pages=101)
    for prompt, past, mine in zip(prompts, pasts, pages, strict=True):
        if past:
            sheet.prefill([(prompt[:past], 0, mine)])
    scores = sheet.prefill(
        [(prompt[past:], past, mine) for prompt, past, mine in zip(prompts, pasts, pages, strict=True)]
    )
    assert scores.positions[:, 0].tolist() == [len(prompt) - 1 for prompt in prompts]
    for row, prompt in enumerate(prompts):
        seen = forward(config, weights, prompt)
        torch.testing.assert_close(scores.logits[row, 0], seen.logits[-1], atol=1e-4, rtol=1e-4)
        rows = sheet.target.pool.rows[:, :, :, slots_of_pages(pages[row], 4, 0, len(prompt))]
        torch.testing.assert_close(rows, pool_layout(seen.keys, seen.values), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_output_rows(tied: bool) -> None:
    """What an EAGLE-3 head without its own lm_head shares."""
    config, weights = tiny_llama(4, tie_word_embeddings=tied)
    rows = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    target = Llama(config, copies(weights), 8)
    ids = torch.tensor([5, 0, 96])
    assert torch.equal(target.output_rows(ids), rows[ids])


@pytest.mark.parametrize("tied", [False, True])
def test_half_weights_are_the_model_of_rounded_matrices(tied: bool) -> None:
    config, weights = tiny_llama(6, tie_word_embeddings=tied)
    output = "model.embed_tokens.weight" if tied else "lm_head.weight"
    sheet = Sheet(config, weights, half_weights=True)
    half = sheet.target.lm_head.scheme == "half"
    rounded = {
        name: tensor.half().float() if half and name.endswith(("_proj.weight", output)) else tensor
        for name, tensor in weights.items()
    }
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    got = sheet.prefill([(prompt, 0, pages_for(2))]).logits[0, 0]
    if tied:  # the table that is looked up keeps its precision, the one that is multiplied does not
        config = dataclasses.replace(config, tie_word_embeddings=False)
        rounded |= {"lm_head.weight": rounded[output], output: weights[output]}
    torch.testing.assert_close(got, forward(config, rounded, prompt).logits[-1], atol=1e-4, rtol=1e-4)
    exact = forward(config, weights | ({"lm_head.weight": weights[output]} if tied else {}), prompt)
    if half:
        assert float((got - exact.logits[-1]).abs().max()) > 1e-3, "nothing was rounded"
    assert torch.equal(sheet.target.output_rows(torch.tensor([7])), rounded["lm_head.weight"][[7]]) or tied
