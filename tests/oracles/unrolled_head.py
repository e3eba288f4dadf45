"""The unrolled EAGLE-3 forward, one chain and one row at a time: slow, and hard to get wrong.

A chain is an explicit Python list of rows, each with its key and value. Nothing is batched, masked or padded,
so there is no mask that could be wrong. Works on a plain dict of weights under the published names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadShape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    rope_theta: float


@dataclass
class Rows:
    keys: list[Tensor] = field(default_factory=list)  # each [Hkv, D]
    values: list[Tensor] = field(default_factory=list)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean() + eps).sqrt() * weight


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """x: [heads, D]; pair i is (i, i + D / 2)."""
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    for i in range(half):
        angle = torch.tensor(position * theta ** (-2 * i / x.shape[-1]), dtype=x.dtype)
        out[:, i] = x[:, i] * angle.cos() - x[:, i + half] * angle.sin()
        out[:, i + half] = x[:, i + half] * angle.cos() + x[:, i] * angle.sin()
    return out


def add_row(
    weights: Mapping[str, Tensor], shape: HeadShape, embedded: Tensor, g: Tensor, position: int, rows: Rows
) -> Tensor:
    """Append one row's key and value, then run its query over all rows. Returns the row's hidden state
    [H]."""
    layer = "midlayer"
    mixed = torch.cat(
        [
            norm(embedded, weights[f"{layer}.input_layernorm.weight"], shape.eps),
            norm(g, weights[f"{layer}.hidden_norm.weight"], shape.eps),
        ]
    )

    def project(name: str) -> Tensor:
        return (weights[f"{layer}.self_attn.{name}.weight"] @ mixed).view(-1, shape.head_dim)

    rows.keys.append(rotate(project("k_proj"), position, shape.rope_theta))
    rows.values.append(project("v_proj"))
    query = rotate(project("q_proj"), position, shape.rope_theta)
    outs = []
    for head in range(shape.num_heads):
        kv = head * shape.num_kv_heads // shape.num_heads
        scores = torch.stack([query[head] @ key[kv] for key in rows.keys]) / shape.head_dim**0.5
        probs = scores.softmax(0)
        outs.append(sum(p * value[kv] for p, value in zip(probs, rows.values, strict=True)))
    hidden = g + weights[f"{layer}.self_attn.o_proj.weight"] @ torch.cat(outs)
    normed = norm(hidden, weights[f"{layer}.post_attention_layernorm.weight"], shape.eps)
    gate = weights[f"{layer}.mlp.gate_proj.weight"] @ normed
    up = weights[f"{layer}.mlp.up_proj.weight"] @ normed
    return hidden + weights[f"{layer}.mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)


def chain(
    weights: Mapping[str, Tensor],
    shape: HeadShape,
    embedding: Tensor,
    tokens: Sequence[int],
    features: Tensor,
    start: int,
    num_steps: int,
) -> list[Tensor]:
    """Hidden states [H] of one chain: row ``start`` on true features, then ``num_steps - 1`` rows on its own
    output.

    Row r takes token r + 1 and the feature of token r. Steps whose token does not exist are left out.
    """
    rows = Rows()
    hidden = torch.empty(0)
    for row in range(start + 1):
        hidden = add_row(
            weights, shape, embedding[tokens[row + 1]], weights["fc.weight"] @ features[row], row, rows
        )
    states = [hidden]
    for row in range(start + 1, start + num_steps):
        if row + 1 >= len(tokens):
            break
        hidden = add_row(weights, shape, embedding[tokens[row + 1]], hidden, row, rows)
        states.append(hidden)
    return states


def logits(weights: Mapping[str, Tensor], shape: HeadShape, hidden: Tensor) -> Tensor:
    return weights["lm_head.weight"] @ norm(hidden, weights["norm.weight"], shape.eps)
