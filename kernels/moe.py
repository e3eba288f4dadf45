"""A mixture of experts in three operations, in plain torch: who goes where, gate and up, down and combine.

    route     token -> its experts, their weights, and its place among the tokens of each
    gate_up   silu(gate x) * up x, for every token and each of its experts
    down      sum over a token's experts of weight * (down y), in the router's order

A shared expert is one more: the experts behind the routed ones in a stack, which every token takes with
weight 1. (One that is n times as wide is n of them, since a SwiGLU block is a sum over its inner width.)

An entry is one choice of one token: token t's choice j is entry t * K + j. Entries are sorted by expert, and
an expert's are cut into tiles of at most ``tile_tokens``: what one program multiplies at once. Two tokens,
experts 0 to 3, two choices and expert 3 shared, tiles of 16:

    ids      [[2, 0, 3], [2, 1, 3]]         entry 0 is (token 0, expert 2), 5 is (token 1, expert 3)
    entries  [1, 4, 0, 3, 2, 5]             expert 0's, 1's, 2's, 3's
    tiles    [0, 0, 1] [1, 1, 2] [2, 2, 4] [3, 4, 6]      expert, first, end; -1, 0, 0 behind the last

No result depends on who else is in the batch: sums over a token's experts go by its own choices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.stored import Stored, normed, product

TILE_TOKENS = 16


def tile_tokens_for(num_tokens: int) -> int:
    """How many tokens a tile should have room for: about as many as an expert of Mistral Small 4 gets."""
    return TILE_TOKENS if num_tokens <= 512 else 32 if num_tokens <= 1024 else 64


class Routing(NamedTuple):
    """Who goes where. T tokens, K choices each, shared experts included."""

    ids: Tensor  # [T, K] int32, best first, shared ones last
    weights: Tensor  # [T, K] float32; the routed ones sum to the router's scale
    entries: Tensor  # [T * K] int32, sorted by expert, then by entry
    tiles: Tensor  # [most_tiles, 3] int32: expert, first, end in ``entries``; expert is -1 where unused
    num_tiles: Tensor  # [1] int32


def most_tiles(num_tokens: int, num_experts: int, num_chosen: int, num_shared: int, tile_tokens: int) -> int:
    """Tiles that a routing of so many tokens has at most."""
    per_expert = -(-num_tokens // tile_tokens)
    chosen = num_tokens * num_chosen
    routed = min(num_experts * per_expert, min(num_experts, chosen) + chosen // tile_tokens)
    return routed + num_shared * per_expert


def route(
    x: Tensor,
    gate: Tensor,
    num_chosen: int,
    scale: float = 1.0,
    num_shared: int = 0,
    norm: Tensor | None = None,
    eps: float = 0.0,
    tile_tokens: int = TILE_TOKENS,
) -> Routing:
    """The best experts of every token by x @ gate.T, weighted by a softmax over those, times ``scale``.

    x: [T, H]; gate: [E, H]; norm: [H], x is normed first. Products are taken in float32, since a flipped
    near-tie changes an expert; of equals the lower id wins. Nothing here waits for a device.
    """
    num_tokens, num_experts = len(x), len(gate)
    logits, order = F.linear(normed(x, norm, eps), gate.float()).sort(dim=-1, descending=True, stable=True)
    weights = torch.softmax(logits[:, :num_chosen], dim=-1) * scale
    shared = torch.arange(num_experts, num_experts + num_shared, device=x.device)
    ids = torch.cat((order[:, :num_chosen], shared.expand(num_tokens, -1)), dim=1)
    weights = torch.cat((weights, weights.new_ones(num_tokens, num_shared)), dim=1)

    flat = ids.flatten()
    counts = flat.new_zeros(num_experts + num_shared).index_add_(0, flat, torch.ones_like(flat))
    ends, tile_ends = counts.cumsum(0), (-(-counts // tile_tokens)).cumsum(0)
    rows = most_tiles(num_tokens, num_experts, num_chosen, num_shared, tile_tokens)
    tile = torch.arange(rows, device=x.device)
    expert = torch.searchsorted(tile_ends, tile, right=True).clamp_(max=len(counts) - 1)
    tile_of_expert = tile - (tile_ends - -(-counts // tile_tokens))[expert]
    first = (ends - counts)[expert] + tile_of_expert * tile_tokens
    end = torch.minimum(first + tile_tokens, ends[expert])
    used = tile < tile_ends[-1]
    return Routing(
        ids.int(),
        weights,
        flat.argsort(stable=True).int(),
        torch.stack((torch.where(used, expert, -1), first * used, end * used), dim=1).int(),
        tile_ends[-1:].int(),
    )


def gate_up(
    x: Tensor,
    weight: Stored,
    routing: Routing,
    norm: Tensor | None = None,
    eps: float = 0.0,
    tile_tokens: int = TILE_TOKENS,
) -> Tensor:
    """silu(gate x) * up x of every entry, [T * K, I] in x's dtype and in the order of ``entries``.

    x: [T, H]; weight: [E, 2 I, H], gate's rows above up's; norm: [H], x is normed first. Rounded once.
    """
    del tile_tokens  # the tiles of ``routing`` say it
    wide, num_choices = normed(x, norm, eps), routing.ids.shape[1]
    out = x.new_empty(len(routing.entries), weight.shape[1] // 2)
    for expert, first, end in routing.tiles[: int(routing.num_tiles)].tolist():
        tokens = routing.entries[first:end] // num_choices
        gate, up = product(wide[tokens], weight[expert]).chunk(2, dim=-1)
        out[first:end] = (F.silu(gate) * up).to(x.dtype)
    return out


def down(
    y: Tensor,
    weight: Stored,
    routing: Routing,
    residual: Tensor | None = None,
    tile_tokens: int = TILE_TOKENS,
) -> Tensor:
    """residual + sum over a token's choices, in their order, of weight * (down y) -> [T, H] in y's dtype.

    y: [T * K, I] from ``gate_up``; weight: [E, H, I]; residual: [T, H]. Summed in float32, rounded once.
    """
    del tile_tokens
    num_tokens, num_choices = routing.ids.shape
    parts = torch.empty(len(routing.entries), weight.shape[1], device=y.device)
    for expert, first, end in routing.tiles[: int(routing.num_tiles)].tolist():
        parts[routing.entries[first:end]] = product(y[first:end].float(), weight[expert])
    parts = parts.view(num_tokens, num_choices, -1)
    total = torch.zeros_like(parts[:, 0]) if residual is None else residual.float()
    for choice in range(num_choices):
        total = total + routing.weights[:, choice, None] * parts[:, choice]
    return total.to(y.dtype)
