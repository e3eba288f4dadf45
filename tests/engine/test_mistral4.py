"""Mistral Small 4 against transformers, against a slow oracle, and against itself in other cuts and forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import POST_NORM, Mistral4Config, YarnScaling
from engine.core import Batch, DraftTree, PromptChunk, SamplingParams, Scores
from engine.models.mistral4 import Mistral4
from engine.nn.moe import MixtureOfExperts
from engine.nn.weight import Weight, dequantise
from engine.sampler import sampling_tensors
from engine.step import prompt_chain
from tests.engine.mistral_rig import (
    YARN,
    is_matrix,
    make_engine,
    owned,
    plain_tokens,
    pool_layout,
    random_pair,
    sequence,
    tiny_mistral4,
    to_fp8,
    to_nvfp4,
)
from tests.engine.rig import PLAIN, prompts_of, slots_of_pages
from tests.kernels.test_attention import random_tree
from tests.oracles import mistral4 as oracle
from tests.oracles.attention import ancestors_of

SHAPES: dict[str, dict[str, Any]] = {
    "small": {},
    "published-proportions": {
        "hidden_size": 64,
        "q_lora_rank": 16,
        "kv_lora_rank": 4,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "yarn": YarnScaling(128.0, 32, 4.0, 1.0),
        "llama_4_original_positions": 32,
    },
    "one-head-no-yarn": {
        "num_heads": 1,
        "yarn": None,
        "llama_4_original_positions": 7,
        "llama_4_beta": 0.3,
        "num_layers": 1,
    },
    "two-shared-scaled-router": {
        "num_shared_experts": 2,
        "routed_scaling_factor": 1.7,
        "num_layers": 3,
        "yarn": dataclasses.replace(YARN, beta_fast=32.0, beta_slow=1.0),
    },
}
ABSORBED, UNABSORBED = 1 << 30, 0  # up to how many nodes the absorbed form is used


class Sheet:
    """A target with hand-made pages: page tables are given, so that any order can be tried."""

    def __init__(
        self,
        config: Mistral4Config,
        weights: Mapping[str, Weight],
        page_size: int = 4,
        num_pages: int = 64,
        feature_layers: tuple[int, ...] = (POST_NORM,),
        half_weights: bool = False,
        most_absorbed: int | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.page_size = page_size
        self.target = Mistral4(
            config, owned(weights), num_pages * page_size, feature_layers, half_weights, kv_dtype
        )
        if most_absorbed is not None:
            for layer in self.target.layers:
                layer.attention.most_absorbed = most_absorbed

    def _batch(self, rows: list[tuple[int, list[int]]], prompt: PromptChunk | None) -> Batch:
        """rows: how many are already there, and the pages, of each sequence."""
        most = max(len(pages) for _, pages in rows)
        return Batch(
            tuple(sequence(i, past, pages) for i, (past, pages) in enumerate(rows)),
            torch.tensor([past for past, _ in rows]),
            torch.tensor([pages + [0] * (most - len(pages)) for _, pages in rows]),
            self.page_size,
            sampling_tensors([SamplingParams()] * len(rows), "cpu"),
            (),
            prompt,
        )

    def prefill(self, chunks: list[tuple[list[int], int, list[int]]]) -> Scores:
        """chunks: (tokens, rows already there, pages) of each sequence, as one padded batch."""
        width = max(len(tokens) for tokens, _, _ in chunks)
        chunk = PromptChunk(
            torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _, _ in chunks]),
            torch.tensor([len(tokens) for tokens, _, _ in chunks]),
            torch.full((len(chunks),), -1),
            tuple(len(tokens) for tokens, _, _ in chunks),
        )
        batch = self._batch([(past, pages) for _, past, pages in chunks], chunk)
        return self._score(batch, prompt_chain(batch))

    def tree(self, trees: list[tuple[list[int], list[int], int, list[int]]]) -> Scores:
        """trees: (tokens, parents, rows already there, pages) of each sequence, padded to the largest."""
        width = max(len(tokens) for tokens, _, _, _ in trees)
        tree = DraftTree(
            torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _, _, _ in trees]),
            torch.tensor([parents + [-1] * (width - len(parents)) for _, parents, _, _ in trees]),
        )
        return self._score(self._batch([(past, pages) for _, _, past, pages in trees], None), tree)

    def _score(self, batch: Batch, tree: DraftTree) -> Scores:
        return self.target.score((batch,), (tree,))[0].unpacked()

    def all_logits(self, tokens: list[int]) -> Tensor:
        """[T, V]: of every position of a text that goes in as one prompt."""
        assert self.target.feature_layers == (POST_NORM,)
        features = self.prefill([(tokens, 0, pages_for(-(-len(tokens) // self.page_size)))]).features
        return self.target.logits(features[0])


def pages_for(count: int, first: int = 1) -> list[int]:
    return list(range(first, first + count))


# --- transformers


def theirs(config: Mistral4Config, weights: Mapping[str, Tensor]) -> Any:
    """transformers' model with the same weights, under its names."""
    transformers = pytest.importorskip("transformers")
    # Their rope without YaRN turns the whole head, so "no YaRN" is YaRN by a factor of 1.
    yarn = config.yarn or YarnScaling(1.0, config.llama_4_original_positions)
    assert yarn.original_max_position_embeddings == config.llama_4_original_positions, "they know only one"
    rope: dict[str, object] = {
        "rope_type": "yarn",
        "rope_theta": config.rope_theta,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": config.llama_4_beta,
    }
    model = transformers.Mistral4ForCausalLM(
        transformers.Mistral4Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            moe_intermediate_size=config.moe_intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            n_shared_experts=config.num_shared_experts,
            n_routed_experts=config.num_experts,
            routed_scaling_factor=config.routed_scaling_factor,
            kv_lora_rank=config.kv_lora_rank,
            q_lora_rank=config.q_lora_rank,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            qk_nope_head_dim=config.qk_nope_head_dim,
            num_experts_per_tok=config.num_experts_per_tok,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=rope,
            attn_implementation="eager",
        )
    )
    missing, unexpected = model.load_state_dict(their_names(config, weights), strict=False)
    assert not missing
    assert not unexpected
    return model.eval()


def their_names(config: Mistral4Config, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {
        "model.embed_tokens.weight": weights["tok_embeddings.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["output.weight"],
    }
    parts = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.wq_a": "self_attn.q_a_proj",
        "attention.q_a_norm": "self_attn.q_a_layernorm",
        "attention.wq_b": "self_attn.q_b_proj",
        "attention.wkv_a_with_mqa": "self_attn.kv_a_proj_with_mqa",
        "attention.kv_a_norm": "self_attn.kv_a_layernorm",
        "attention.wkv_b": "self_attn.kv_b_proj",
        "attention.wo": "self_attn.o_proj",
        "gate": "mlp.gate",
        "shared_experts.w1": "mlp.shared_experts.gate_proj",
        "shared_experts.w3": "mlp.shared_experts.up_proj",
        "shared_experts.w2": "mlp.shared_experts.down_proj",
    }
    for layer in range(config.num_layers):
        ours, their = f"layers.{layer}.", f"model.layers.{layer}."
        named |= {f"{their}{b}.weight": weights[f"{ours}{a}.weight"] for a, b in parts.items()}
        gate_up = torch.cat((weights[ours + "experts.w1"], weights[ours + "experts.w3"]), 1)
        named |= {
            their + "mlp.experts.gate_up_proj": gate_up,
            their + "mlp.experts.down_proj": weights[ours + "experts.w2"],
        }
    return named


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape: str) -> None:
    """Every position of a text five times as long as the original context, in both forms of attention.

    Their attention multiplies the softmax scale by YaRN's mscale squared, which Mistral's own config says not
    to do: it is overridden.
    """
    config, weights = tiny_mistral4(1, **SHAPES[shape])
    model = theirs(config, weights)
    for layer in model.model.layers:
        layer.self_attn.scaling = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    tokens = prompts_of([5 * config.llama_4_original_positions])[0]
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0]
    assert 0.7 < float(expected.std()) < 4
    for form in (ABSORBED, UNABSORBED):
        got = Sheet(config, weights, most_absorbed=form).all_logits(tokens)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_the_disputed_mscale_equals_transformers_as_it_is() -> None:
    config, weights = tiny_mistral4(1, softmax_mscale=True)
    tokens = prompts_of([40])[0]
    with torch.no_grad():
        expected = theirs(config, weights)(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(Sheet(config, weights).all_logits(tokens), expected, atol=1e-4, rtol=1e-4)
    plain = Sheet(dataclasses.replace(config, softmax_mscale=False), weights).all_logits(tokens)
    assert float((plain - expected).abs().max()) > 0.1


# --- cuts and forms


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [ABSORBED, UNABSORBED], ids=["absorbed", "unabsorbed"])
def test_chunks_and_scattered_pages_equal_one_prefill(shape: str, form: int) -> None:
    """Any cut of the prompt, pages in any order: same logits, same rows, same features."""
    config, weights = tiny_mistral4(2, **SHAPES[shape])
    layers = (0, config.num_layers, POST_NORM)
    tokens = prompts_of([29])[0]
    seen = oracle.forward(config, weights, tokens)
    features = torch.cat((seen.inputs[0], seen.inputs[-1], seen.post_norm), dim=-1)
    for cuts in ([29], [1] * 29, [16, 13], [3, 7, 1, 18]):
        for pages in (pages_for(8), [9, 2, 30, 4, 3, 11, 7, 1]):
            sheet = Sheet(config, weights, feature_layers=layers, most_absorbed=form)
            past, parts = 0, []
            for cut in cuts:
                scores = sheet.prefill([(tokens[past : past + cut], past, pages)])
                assert scores.positions.tolist() == [[past + cut - 1]]
                last = seen.logits[past + cut - 1]
                torch.testing.assert_close(scores.logits[0, 0], last, atol=1e-4, rtol=1e-4)
                parts.append(scores.features[0])
                past += cut
            torch.testing.assert_close(torch.cat(parts), features, atol=1e-4, rtol=1e-4)
            rows = sheet.target.pool.rows[:, :, :, slots_of_pages(pages, 4, 0, 29)]
            torch.testing.assert_close(rows, pool_layout(seen.latents), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scattered", [False, True])
def test_a_ragged_batch_equals_each_alone(scattered: bool) -> None:
    """Different prompt lengths and rows already there; the prefixes go in absorbed, the rest not."""
    config, weights = tiny_mistral4(3)
    prompts, pasts = prompts_of([41, 5, 33, 12]), [0, 4, 16, 11]
    generator = torch.Generator().manual_seed(0)
    order = (torch.randperm(100, generator=generator) + 1).tolist() if scattered else list(range(1, 101))
    pages = [order[25 * i : 25 * i + -(-len(prompt) // 4)] for i, prompt in enumerate(prompts)]
    sheet = Sheet(config, weights, num_pages=101)
    assert sheet.target.layers[0].attention.most_absorbed == 16
    for prompt, past, mine in zip(prompts, pasts, pages, strict=True):
        if past:
            sheet.prefill([(prompt[:past], 0, mine)])
    scores = sheet.prefill(
        [(prompt[past:], past, mine) for prompt, past, mine in zip(prompts, pasts, pages, strict=True)]
    )
    assert scores.positions[:, 0].tolist() == [len(prompt) - 1 for prompt in prompts]
    for row, prompt in enumerate(prompts):
        seen = oracle.forward(config, weights, prompt)
        torch.testing.assert_close(scores.logits[row, 0], seen.logits[-1], atol=1e-4, rtol=1e-4)
        rows = sheet.target.pool.rows[:, :, :, slots_of_pages(pages[row], 4, 0, len(prompt))]
        torch.testing.assert_close(rows, pool_layout(seen.latents), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", [ABSORBED, UNABSORBED], ids=["absorbed", "unabsorbed"])
def test_trees_equal_the_oracle_along_every_path(form: int) -> None:
    """Ragged trees behind ragged texts, near and past the end of the original context; one is padded."""
    config, weights = tiny_mistral4(4)
    texts, sizes = prompts_of([14, 3, 19]), [9, 6, 9]
    generator = torch.Generator().manual_seed(5)
    sheet = Sheet(config, weights, most_absorbed=form)
    sheet.prefill([(text[:-1], 0, pages_for(12, 1 + 12 * i)) for i, text in enumerate(texts)])
    parents = [random_tree(size, generator) for size in sizes]
    tokens = [[texts[i][-1], *prompts_of([size - 1], 50 + i)[0]] for i, size in enumerate(sizes)]
    scores = sheet.tree(
        [(tokens[i], parents[i], len(text) - 1, pages_for(12, 1 + 12 * i)) for i, text in enumerate(texts)]
    )
    for row, text in enumerate(texts):
        for leaf in set(range(sizes[row])) - set(parents[row]):
            path = ancestors_of(parents[row], leaf)
            seen = oracle.forward(config, weights, text[:-1] + [tokens[row][node] for node in path])
            truth = seen.logits[len(text) - 1 :]
            torch.testing.assert_close(scores.logits[row, path], truth, atol=1e-4, rtol=1e-4)
            positions = scores.positions[row, path].tolist()
            assert positions == list(range(len(text) - 1, len(text) - 1 + len(path)))


# --- other weights


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_quantised_weights_give_what_their_dequantised_tensors_give(kind: str) -> None:
    """FP8 everywhere the published files have it; NVFP4 in the experts alone."""
    config, weights = tiny_mistral4(6)
    generator = torch.Generator().manual_seed(6)
    stored: dict[str, Weight] = dict(weights)
    for name, tensor in weights.items():
        if kind == "fp8" and is_matrix(name):
            stored[name] = to_fp8(tensor)
        elif kind == "nvfp4" and "experts" in name:
            stored[name] = to_nvfp4(tensor, generator)
    assert sum(not isinstance(weight, Tensor) for weight in stored.values()) == 2 * (
        11 if kind == "fp8" else 6
    )
    wide = {name: dequantise(weight, torch.float32) for name, weight in stored.items()}
    tokens = prompts_of([30])[0]
    expected = oracle.forward(config, wide, tokens).logits
    torch.testing.assert_close(Sheet(config, stored).all_logits(tokens), expected, atol=1e-4, rtol=1e-4)
    exact = oracle.forward(config, weights, tokens).logits
    assert float((expected - exact).abs().max()) > 0.05, "nothing was rounded"


def test_half_weights_are_the_model_of_rounded_matrices() -> None:
    """Experts and what is absorbed keep their precision."""
    config, weights = tiny_mistral4(7)
    sheet = Sheet(config, weights, half_weights=True)
    half = sheet.target.lm_head.scheme == "half"
    kept = ("norm", "gate.", "experts.", "tok_embeddings", "wkv_b")
    rounded = {
        name: tensor.half().float() if half and not any(part in name for part in kept) else tensor
        for name, tensor in weights.items()
    }
    tokens = prompts_of([20])[0]
    got, expected = sheet.all_logits(tokens), oracle.forward(config, rounded, tokens).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    if half:
        exact = oracle.forward(config, weights, tokens).logits
        assert float((got - exact).abs().max()) > 1e-3, "nothing was rounded"


def test_bfloat16_stays_bfloat16_and_near() -> None:
    config, weights = tiny_mistral4(8)
    narrow = {name: tensor.bfloat16() for name, tensor in weights.items()}
    wide = {name: tensor.float() for name, tensor in narrow.items()}
    tokens = prompts_of([30])[0]
    expected = oracle.forward(config, wide, tokens).logits
    for form in (ABSORBED, UNABSORBED):
        sheet = Sheet(config, narrow, most_absorbed=form)
        assert sheet.target.pool.rows.dtype == torch.bfloat16
        got = sheet.all_logits(tokens)
        assert got.dtype == torch.float32
        assert float((got - expected).abs().mean() / expected.std()) < 0.04
    mlp = sheet.target.layers[0].mlp
    assert isinstance(mlp, MixtureOfExperts)
    assert mlp.gate.dtype == torch.bfloat16


def test_output_rows() -> None:
    config, weights = tiny_mistral4(9)
    target = Mistral4(config, owned(weights), 8)
    ids = torch.tensor([5, 0, 96])
    assert torch.equal(target.output_rows(ids), weights["output.weight"][ids])
    assert (target.vocab_size, target.hidden_size, target.max_positions) == (97, 32, 512)
    assert torch.equal(target.embedding, weights["tok_embeddings.weight"])


def test_a_weight_too_many_is_noticed() -> None:
    config, weights = tiny_mistral4(9)
    with pytest.raises(AssertionError, match=r"layers\.0\.attention\.wq"):
        Mistral4(config, {**weights, "layers.0.attention.wq.weight": torch.zeros(1)}, 8)


def test_greedy_decoding_equals_the_oracle() -> None:
    """Prefill, then one node a step, across the end of the original context."""
    pair = random_pair(10)
    prompts, params = prompts_of([1, 13, 30]), SamplingParams(temperature=0, max_tokens=8)
    got = make_engine(pair, speculation=PLAIN).generate(prompts, params)
    for prompt, completion in zip(prompts, got, strict=True):
        seen = oracle.forward(pair.config, pair.weights, [*prompt, *completion.token_ids])
        best = seen.logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert list(completion.token_ids) == best
    assert plain_tokens(pair, prompts, [params] * 3) == [c.token_ids for c in got]
