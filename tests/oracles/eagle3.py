"""An EAGLE-3 head over a whole token list: no cache, no tree, weights by their published names.

Row i (i >= 1) joins the embedding of token i with feature i - 1, stands at position i - 1, attends to rows
1..i and predicts token i + 1:

    g = fc(features[i - 1])                                       three target layers side by side -> hidden
    x = [input_layernorm(embedding of token i), hidden_norm(g)]   twice as wide
    h = g + o_proj(attention(x))
    h = h + mlp(post_attention_layernorm(h))
    draft logits = lm_head(norm(h));   h itself stands in for g in the next row while drafting

A tree node is checked as the chain of its ancestors: ``path_rows`` with the tokens from the root's child
down to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.config import LlamaConfig
from tests.oracles.llama import causal_attention, frequencies, rms_norm, rotate, swiglu


@dataclass(frozen=True)
class HeadRows:
    """Rows 1, 2, ... of a head; entry 0 of every tensor is row 1."""

    logits: Tensor  # [R, draft vocabulary]
    hidden: Tensor  # [R, hidden] before the final norm: the next row's g while drafting
    keys: Tensor  # [R, Hkv, D] rotated
    values: Tensor  # [R, Hkv, D]


def head_rows(
    config: LlamaConfig,
    weights: Mapping[str, Tensor],
    embedding: Tensor,
    tokens: Sequence[int],
    fused: Tensor,
) -> HeadRows:
    """Run the head's layer from scratch.

    tokens: the tokens of rows 1..R (token 0 has no row); fused: [R, hidden], row i's g. embedding: [V,
    hidden].
    """
    w = {name: t.float() for name, t in weights.items() if t.is_floating_point()}
    assert len(tokens) == len(fused), f"{len(tokens)} tokens for {len(fused)} features"
    length, eps, layer = len(tokens), config.rms_norm_eps, "midlayer."
    embedded = rms_norm(embedding.float()[list(tokens)], w[layer + "input_layernorm.weight"], eps)
    rows = torch.cat([embedded, rms_norm(fused, w[layer + "hidden_norm.weight"], eps)], dim=-1)
    query = (rows @ w[layer + "self_attn.q_proj.weight"].T).view(length, config.num_heads, -1)
    keys = (rows @ w[layer + "self_attn.k_proj.weight"].T).view(length, config.num_kv_heads, -1)
    values = (rows @ w[layer + "self_attn.v_proj.weight"].T).view(length, config.num_kv_heads, -1)
    freqs = frequencies(config)
    query, keys = rotate(query, range(length), freqs), rotate(keys, range(length), freqs)
    hidden = fused + causal_attention(query, keys, values) @ w[layer + "self_attn.o_proj.weight"].T
    hidden = hidden + swiglu(
        rms_norm(hidden, w[layer + "post_attention_layernorm.weight"], eps),
        w[layer + "mlp.gate_proj.weight"],
        w[layer + "mlp.up_proj.weight"],
        w[layer + "mlp.down_proj.weight"],
    )
    logits = rms_norm(hidden, w["norm.weight"], eps) @ w["lm_head.weight"].T
    return HeadRows(logits, hidden, keys, values)


def true_rows(
    config: LlamaConfig,
    weights: Mapping[str, Tensor],
    embedding: Tensor,
    tokens: Sequence[int],
    features: Tensor,
) -> HeadRows:
    """All rows that true target features allow: what the head's KV pool must hold after every step.

    tokens: the whole committed list from token 0; features: [at least T - 1, 3 * hidden], feature i beside
    token i.
    """
    fused = features[: len(tokens) - 1].float() @ weights["fc.weight"].float().T
    return head_rows(config, weights, embedding, tokens[1:], fused)


def path_rows(
    config: LlamaConfig,
    weights: Mapping[str, Tensor],
    embedding: Tensor,
    tokens: Sequence[int],
    features: Tensor,
    drafted: Sequence[int],
) -> HeadRows:
    """The rows of ``tokens`` and then of the drafted tokens behind them, whose g is the row before's own
    hidden.

    The last row scores the children of the last drafted token (of the root, if ``drafted`` is empty).
    """
    fused = features[: len(tokens) - 1].float() @ weights["fc.weight"].float().T
    rows = list(tokens[1:])
    result = head_rows(config, weights, embedding, rows, fused)
    for token in drafted:
        fused = torch.cat([fused, result.hidden[-1:]])
        rows.append(token)
        result = head_rows(config, weights, embedding, rows, fused)
    return result


def to_target(draft_ids: Sequence[int], d2t: Tensor) -> list[int]:
    """Token ids of the target for ids of the draft vocabulary: ``target = draft + d2t[draft]``."""
    return [draft + int(d2t[draft]) for draft in draft_ids]


def head_config(raw: Mapping[str, Any]) -> LlamaConfig:
    """The shape of a head from its published config; the vocabulary is the target's."""
    heads = raw["num_attention_heads"]
    return LlamaConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=1,
        num_heads=heads,
        num_kv_heads=raw["num_key_value_heads"],
        head_dim=raw.get("head_dim", raw["hidden_size"] // heads),
        max_position_embeddings=raw["max_position_embeddings"],
        rms_norm_eps=raw["rms_norm_eps"],
        rope_theta=raw.get("rope_theta", 10000.0),
    )
