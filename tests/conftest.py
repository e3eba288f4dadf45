"""Small random models that every test may build, and the settings all tests share.

Weights have the scale of a trained model's effect, not of its initialisation: every activation and the
logits spread over about one unit, so that a 1% mistake is visible. At the usual 0.02 all of it would drown
in rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import LlamaConfig


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices run faster on one thread, and sums come out the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def matrix(generator: torch.Generator, rows: int, columns: int, gain: float = 1.0) -> Tensor:
    """[rows, columns] that maps unit-variance inputs to outputs of standard deviation ``gain``."""
    return torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))


def norm_weight(generator: torch.Generator, width: int) -> Tensor:
    """[width] around 1, but far enough from it that a forgotten weight shows."""
    return 1.0 + 0.2 * torch.randn(width, generator=generator)


def layer_weights(
    generator: torch.Generator, config: LlamaConfig, prefix: str, input_width: int
) -> dict[str, Tensor]:
    """Attention, feed-forward and second norm of a decoder layer whose attention reads ``input_width``."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        prefix + "self_attn.q_proj.weight": matrix(generator, queries, input_width, 1.5),
        prefix + "self_attn.k_proj.weight": matrix(generator, keys, input_width, 1.5),
        prefix + "self_attn.v_proj.weight": matrix(generator, keys, input_width),
        prefix + "self_attn.o_proj.weight": matrix(generator, hidden, queries),
        prefix + "post_attention_layernorm.weight": norm_weight(generator, hidden),
        prefix + "mlp.gate_proj.weight": matrix(generator, inner, hidden, 1.5),
        prefix + "mlp.up_proj.weight": matrix(generator, inner, hidden, 1.5),
        prefix + "mlp.down_proj.weight": matrix(generator, hidden, inner),
    }


def tiny_llama(seed: int = 0, **overrides: Any) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """A random Llama in float32: its config and its weights by Hugging Face name.

    overrides replace fields of LlamaConfig. With tied embeddings there is no ``lm_head.weight``.
    """
    config = dataclasses.replace(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            max_position_embeddings=512,
        ),
        **overrides,
    )
    generator = torch.Generator().manual_seed(seed)
    # A tied embedding is an output matrix too, so it gets the output's scale; the first norm evens it out.
    gain = 2.0 if config.tie_word_embeddings else math.sqrt(config.hidden_size)
    weights = {"model.embed_tokens.weight": matrix(generator, config.vocab_size, config.hidden_size, gain)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        weights[prefix + "input_layernorm.weight"] = norm_weight(generator, config.hidden_size)
        weights |= layer_weights(generator, config, prefix, config.hidden_size)
    weights["model.norm.weight"] = norm_weight(generator, config.hidden_size)
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = matrix(generator, config.vocab_size, config.hidden_size, 2.0)
    return config, weights


def tiny_eagle3(
    config: LlamaConfig, seed: int = 0, draft_vocab_size: int = 61, **overrides: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A random EAGLE-3 head for a target: its published config.json as a dict and its tensors by published
    name.

    The draft vocabulary is a random ascending subset of the target's. overrides replace keys of the config.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    hidden = config.hidden_size
    raw: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": draft_vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "use_aux_hidden_state": True},
    } | overrides
    ids = torch.randperm(config.vocab_size, generator=generator)[:draft_vocab_size].sort().values
    in_draft = torch.zeros(config.vocab_size, dtype=torch.bool)
    in_draft[ids] = True
    weights = {
        "fc.weight": matrix(generator, hidden, 3 * hidden),
        "midlayer.input_layernorm.weight": norm_weight(generator, hidden),
        "midlayer.hidden_norm.weight": norm_weight(generator, hidden),
        **layer_weights(generator, config, "midlayer.", 2 * hidden),
        "norm.weight": norm_weight(generator, hidden),
        "lm_head.weight": matrix(generator, draft_vocab_size, hidden, 2.0),
        "d2t": ids - torch.arange(draft_vocab_size),
        "t2d": in_draft,
    }
    return raw, weights
