"""A Llama forward over a whole token list: no cache, no batch, no fusing, weights by their Hugging Face
names.

Written from the architecture's description (RMSNorm, rotary halves, grouped-query attention, SwiGLU). It
returns the hidden states beside the logits, because the heads read them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import LlamaConfig


@dataclass(frozen=True)
class Forward:
    """All that a forward saw. ``inputs[i]`` enters layer i; the last one leaves the last layer, un-normed."""

    logits: Tensor  # [T, V] row t predicts token t + 1
    inputs: list[Tensor]  # num_layers + 1 times [T, hidden]
    post_norm: Tensor  # [T, hidden]
    keys: list[Tensor]  # per layer [T, Hkv, D], rotated
    values: list[Tensor]  # per layer [T, Hkv, D]


def rms_norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide every row by its root mean square, then scale its columns."""
    return rows / torch.sqrt((rows * rows).mean(-1, keepdim=True) + eps) * weight


def frequencies(config: LlamaConfig) -> Tensor:
    """[head_dim / 2] rotations in radians per position, with Llama 3's stretching of the slow ones."""
    found = []
    for pair in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * pair / config.head_dim)
        scaling = config.rope_scaling
        if scaling is not None:
            turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
            if turns < scaling.low_freq_factor:
                frequency /= scaling.factor
            elif turns <= scaling.high_freq_factor:
                width = scaling.high_freq_factor - scaling.low_freq_factor
                blend = (turns - scaling.low_freq_factor) / width
                frequency = (1 - blend) * frequency / scaling.factor + blend * frequency
        found.append(frequency)
    return torch.tensor(found, dtype=torch.float64)


def rotate(rows: Tensor, positions: Sequence[int], freqs: Tensor) -> Tensor:
    """Turn component i against component i + D/2 by position * freqs[i]. rows: [T, H, D]."""
    angles = torch.tensor(list(positions), dtype=torch.float64)[:, None] * freqs
    cos, sin = angles.cos().to(rows.dtype)[:, None, :], angles.sin().to(rows.dtype)[:, None, :]
    first, second = rows.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def causal_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Row t attends to rows 0..t. query: [T, H, D]; keys, values: [T, Hkv, D]; returns [T, H * D]."""
    length, num_heads, head_dim = query.shape
    group = num_heads // keys.shape[1]  # query heads that share a key head lie side by side
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    scores = torch.einsum("thd,shd->hts", query, keys) / math.sqrt(head_dim)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    shares = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)
    return torch.einsum("hts,shd->thd", shares, values).reshape(length, -1)


def swiglu(rows: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The feed-forward block: down(silu(gate x) * up x)."""
    gated = rows @ gate.T
    return (gated * torch.sigmoid(gated) * (rows @ up.T)) @ down.T


def forward(
    config: LlamaConfig,
    weights: Mapping[str, Tensor],
    tokens: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Forward:
    """Run all tokens at positions 0, 1, ... through the model."""
    w = {name: tensor.to(dtype) for name, tensor in weights.items()}
    length, freqs = len(tokens), frequencies(config)
    hidden = w["model.embed_tokens.weight"][list(tokens)]
    inputs, all_keys, all_values = [hidden], [], []
    for layer in range(config.num_layers):
        name = f"model.layers.{layer}."
        rows = rms_norm(hidden, w[name + "input_layernorm.weight"], config.rms_norm_eps)
        query = (rows @ w[name + "self_attn.q_proj.weight"].T).view(length, config.num_heads, -1)
        keys = (rows @ w[name + "self_attn.k_proj.weight"].T).view(length, config.num_kv_heads, -1)
        values = (rows @ w[name + "self_attn.v_proj.weight"].T).view(length, config.num_kv_heads, -1)
        query, keys = rotate(query, range(length), freqs), rotate(keys, range(length), freqs)
        hidden = hidden + causal_attention(query, keys, values) @ w[name + "self_attn.o_proj.weight"].T
        rows = rms_norm(hidden, w[name + "post_attention_layernorm.weight"], config.rms_norm_eps)
        hidden = hidden + swiglu(
            rows,
            w[name + "mlp.gate_proj.weight"],
            w[name + "mlp.up_proj.weight"],
            w[name + "mlp.down_proj.weight"],
        )
        inputs.append(hidden)
        all_keys.append(keys)
        all_values.append(values)
    post_norm = rms_norm(hidden, w["model.norm.weight"], config.rms_norm_eps)
    out = w["model.embed_tokens.weight"] if config.tie_word_embeddings else w["lm_head.weight"]
    return Forward(post_norm @ out.T, inputs, post_norm, all_keys, all_values)


def greedy(
    config: LlamaConfig, weights: Mapping[str, Tensor], prompt: Sequence[int], num_tokens: int
) -> list[int]:
    """The ``num_tokens`` greedy tokens after a prompt, one full forward each."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(forward(config, weights, tokens).logits[-1].argmax()))
    return tokens[len(prompt) :]
