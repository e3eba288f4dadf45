"""Mistral Small 4 and its Eagle head over a whole token list: no cache, no batch, no absorbing, no fusing.

Written from the formulas: one head, one pair of components and one expert at a time, angles in float64.
Weights by their native names, plain tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import Mistral4Config
from tests.oracles.llama import rms_norm, swiglu

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Forward:
    """All that a forward saw. ``inputs[i]`` enters layer i; the last one leaves the last layer, un-normed."""

    logits: Tensor  # [T, V] row t predicts token t + 1
    inputs: list[Tensor]  # num_layers + 1 times [T, hidden]
    post_norm: Tensor  # [T, hidden]; of a head, the next feature
    latents: list[Tensor]  # per layer [T, R + P]: normed latent, rotated key


@functools.cache
def frequency(config: Mistral4Config, pair: int) -> float:
    """Radians per position of pair (2 * pair, 2 * pair + 1)."""
    dim, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.yarn
    plain: float = theta ** (-2 * pair / dim)
    if yarn is None:
        return plain
    original = yarn.original_max_position_embeddings

    def index(turns: float) -> float:
        return dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(0, math.floor(index(yarn.beta_fast)))
    high = min(dim - 1, math.ceil(index(yarn.beta_slow)))
    if pair <= low:
        share = 0.0
    elif pair >= high:
        share = 1.0
    else:
        share = (pair - low) / (high - low)
    return plain / yarn.factor * share + plain * (1 - share)


def turned(config: Mistral4Config, rows: Tensor, positions: Sequence[int]) -> Tensor:
    """Rotate neighbouring components of every row against each other. rows: [T, P]."""
    columns = []
    for pair in range(config.qk_rope_head_dim // 2):
        angles = torch.tensor(positions, dtype=torch.float64) * frequency(config, pair)
        even, odd = rows[:, 2 * pair].double(), rows[:, 2 * pair + 1].double()
        columns += [even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()]
    return torch.stack(columns, dim=1).to(rows.dtype)


def query_scale(config: Mistral4Config, position: int) -> float:
    """1 within the original context, and a logarithm of how many contexts a position is past it."""
    contexts = position // config.llama_4_original_positions
    return 1 + config.llama_4_beta * math.log(1 + contexts)


def softmax_scale(config: Mistral4Config) -> float:
    scale = 1 / math.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim)
    if config.softmax_mscale:
        assert config.yarn is not None
        scale *= (0.1 * math.log(config.yarn.factor) + 1) ** 2
    return scale


def attention(config: Mistral4Config, w: Tensors, name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Row t at position t attends to rows 0..t. rows: [T, hidden]; returns as many and latents [T, R + P]."""
    rank, content, rotated = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim
    value, eps, positions = config.v_head_dim, config.rms_norm_eps, range(len(rows))
    low = rows @ w[name + "wkv_a_with_mqa.weight"].T
    normed = rms_norm(low[:, :rank], w[name + "kv_a_norm.weight"], eps)
    latent = torch.cat([normed, turned(config, low[:, rank:], positions)], dim=1)
    low = rms_norm(rows @ w[name + "wq_a.weight"].T, w[name + "q_a_norm.weight"], eps)
    queries = low @ w[name + "wq_b.weight"].T
    scales = torch.tensor([query_scale(config, t) for t in positions]) * softmax_scale(config)
    future = torch.ones(len(rows), len(rows), dtype=torch.bool).triu(1)
    heads = []
    for head in range(config.num_heads):
        query = queries[:, head * (content + rotated) : (head + 1) * (content + rotated)]
        up = w[name + "wkv_b.weight"][head * (content + value) : (head + 1) * (content + value)]
        keys = torch.cat([latent[:, :rank] @ up[:content].T, latent[:, rank:]], dim=1)
        values = latent[:, :rank] @ up[content:].T
        query = torch.cat([query[:, :content], turned(config, query[:, content:], positions)], dim=1)
        scores = (query @ keys.T * scales[:, None]).masked_fill(future, -math.inf)
        heads.append(torch.softmax(scores, dim=1) @ values)
    return torch.cat(heads, dim=1) @ w[name + "wo.weight"].T, latent


def chosen_experts(config: Mistral4Config, gate: Tensor, row: Tensor) -> dict[int, float]:
    """Expert -> weight, best first; of equals the lower id."""
    shares = torch.softmax(gate.float() @ row.float(), dim=0).tolist()
    best = sorted(range(config.num_experts), key=lambda e: (-shares[e], e))[: config.num_experts_per_tok]
    total = sum(shares[e] for e in best)
    return {e: shares[e] / total * config.routed_scaling_factor for e in best}


def mixture(config: Mistral4Config, w: Tensors, name: str, rows: Tensor) -> Tensor:
    """rows: [T, hidden] -> the same."""
    out = []
    for row in rows:
        total = torch.zeros_like(row)
        for expert, weight in chosen_experts(config, w[name + "gate.weight"], row).items():
            w1, w3, w2 = (w[f"{name}experts.{part}"][expert] for part in ("w1", "w3", "w2"))
            total = total + weight * swiglu(row[None], w1, w3, w2)[0]
        if config.num_shared_experts:
            parts = (w[f"{name}shared_experts.{part}.weight"] for part in ("w1", "w3", "w2"))
            total = total + swiglu(row[None], *parts)[0]
        out.append(total)
    return torch.stack(out)


def layers(config: Mistral4Config, w: Tensors, hidden: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """All decoder layers over rows at positions 0, 1, ...: what enters and leaves them, and their latents."""
    inputs, all_latents = [hidden], []
    for layer in range(config.num_layers):
        name = f"layers.{layer}."
        rows = rms_norm(hidden, w[name + "attention_norm.weight"], config.rms_norm_eps)
        out, latents = attention(config, w, name + "attention.", rows)
        hidden = hidden + out
        rows = rms_norm(hidden, w[name + "ffn_norm.weight"], config.rms_norm_eps)
        if config.num_experts:
            hidden = hidden + mixture(config, w, name, rows)
        else:
            parts = (w[f"{name}feed_forward.{part}.weight"] for part in ("w1", "w3", "w2"))
            hidden = hidden + swiglu(rows, *parts)
        inputs.append(hidden)
        all_latents.append(latents)
    return inputs, all_latents


def forward(config: Mistral4Config, weights: Tensors, tokens: Sequence[int]) -> Forward:
    """Run all tokens at positions 0, 1, ... through the target."""
    inputs, latents = layers(config, weights, weights["tok_embeddings.weight"][list(tokens)])
    post_norm = rms_norm(inputs[-1], weights["norm.weight"], config.rms_norm_eps)
    return Forward(post_norm @ weights["output.weight"].T, inputs, post_norm, latents)


def head_forward(
    config: Mistral4Config, head: Tensors, target: Tensors, tokens: Sequence[int], features: Tensor
) -> Forward:
    """Run a head over pairs (token, feature before it) at positions 0, 1, ... features: [T, hidden]."""
    embedded = target["tok_embeddings.weight"][list(tokens)]
    inputs, latents = layers(config, head, torch.cat([embedded, features], 1) @ head["eagle_linear.weight"].T)
    last = inputs[-1]
    if "norm.weight" in head:
        last = rms_norm(last, head["norm.weight"], config.rms_norm_eps)
    return Forward(last @ target["output.weight"].T, inputs, last, latents)
