"""What else computes the operations of the registry: torch's own best for each, and flashinfer where it can.

A peer is prepared outside the timing from an operation's arguments, and may prepare more than a model could
hold (bfloat16 copies of quantised matrices): it is what torch does best, not what it does from the same
bytes. ``None`` where a peer has nothing for these arguments. An operation without an entry has its reference
as peer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import flashinfer, ref
from kernels.moe import Routing, route
from kernels.paged import TreeRows, seen_rows
from kernels.quant import undivided
from kernels.stored import Stored
from perf.kernel_timing import Call

Peer = Callable[..., Call | None]


def dense(weight: Stored) -> Tensor:
    """A stored matrix or stack in bfloat16."""
    if weight.scale is None:
        return weight.codes
    scale = weight.scale.repeat_interleave(weight.shape[-2] // weight.scale.shape[-1], dim=-1)[..., None]
    if weight.block_scales is not None:
        return undivided(weight.codes, weight.block_scales, torch.bfloat16).div_(scale)
    return weight.codes.to(torch.bfloat16).mul_(scale)


def _linear(x: Tensor, weight: Stored, norm: Tensor | None, eps: float, residual: Tensor | None) -> Call:
    matrix = dense(weight)

    def call() -> Tensor:
        rows = x if norm is None else torch.rms_norm(x, (x.shape[-1],), norm, eps)
        return F.linear(rows, matrix) if residual is None else torch.addmm(residual, rows, matrix.t())

    return call


def _ends(routing: Routing, num_experts: int) -> Tensor:
    """Where each expert's entries end, [E] int32."""
    return routing.ids.flatten().long().bincount(minlength=num_experts).cumsum(0).int()


def _gate_up(
    x: Tensor, weight: Stored, routing: Routing, norm: Tensor | None, eps: float, tile_tokens: int
) -> Call | None:
    if x.device.type != "cuda":
        return None
    stack, ends = dense(weight).transpose(1, 2), _ends(routing, weight.shape[0])
    tokens = routing.entries // routing.ids.shape[1]

    def call() -> Tensor:
        rows = x if norm is None else torch.rms_norm(x, (x.shape[-1],), norm, eps)
        return ref.silu_mul(torch._grouped_mm(rows[tokens], stack, offs=ends))

    return call


def _down(
    y: Tensor, weight: Stored, routing: Routing, residual: Tensor | None, tile_tokens: int
) -> Call | None:
    if y.device.type != "cuda":
        return None
    stack, ends = dense(weight).transpose(1, 2), _ends(routing, weight.shape[0])
    shares = routing.weights.flatten()[routing.entries][:, None]
    tokens = (routing.entries // routing.ids.shape[1]).long()

    def call() -> Tensor:
        parts = torch._grouped_mm(y, stack, offs=ends).float() * shares
        total = parts.new_zeros(len(routing.ids), parts.shape[1]) if residual is None else residual.float()
        return total.index_add(0, tokens, parts).to(y.dtype)

    return call


def _mha(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    rows: TreeRows,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Call:
    """Torch's attention over rows that were gathered before; queries packed as ours are, nodes times the
    heads of one KV head."""
    slots, bias = seen_rows(rows, q.shape[1])
    keys, values = (
        (pool.to(q.dtype) * by)[:, slots].transpose(0, 1).contiguous()
        for pool, by in ((k_pool, k_scale), (v_pool, v_scale))
    )
    num_seqs, num_nodes, num_heads, dim = q.shape
    num_kv_heads = len(k_pool)
    split = num_seqs, num_nodes, num_kv_heads, num_heads // num_kv_heads
    mask = bias.to(q.dtype).repeat_interleave(split[3], dim=1)[:, None]

    def call() -> Tensor:
        packed = q.view(*split, dim).transpose(1, 2).reshape(num_seqs, num_kv_heads, -1, dim)
        out = F.scaled_dot_product_attention(packed, keys, values, mask, scale=scale)
        return out.view(num_seqs, num_kv_heads, num_nodes, split[3], -1).transpose(1, 2).flatten(2, 3)

    return call


def _mla(
    q: Tensor, pool: Tensor, rows: TreeRows, scale: float, value_dim: int, pool_scale: float = 1.0
) -> Call:
    return _mha(q, pool[None], pool[None, :, :value_dim], rows, scale, pool_scale, pool_scale)


def _route(*arguments: Any) -> Call:
    return lambda: route(*arguments)


def _latents(
    q: Tensor, pool: Tensor, rows: TreeRows, scale: float, value_dim: int, pool_scale: float = 1.0
) -> Call:
    attention = flashinfer.LatentAttention(q.device)
    latent = value_dim, q.shape[-1] - value_dim
    attention.plan(rows, q.shape[1], q.shape[2], latent, scale, q.dtype, pool.dtype)
    return lambda: attention.run(q, pool)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Call:
    return lambda: flashinfer.rms_norm(x, weight, eps)


# What it refuses it says when it is prepared, with the reason.
FLASHINFER: dict[str, Peer] = {"mla_tree_attention": _latents, "rms_norm": _norm}
TORCH: dict[str, Peer] = {
    "mla_tree_attention": _mla, "mha_tree_attention": _mha,
    "linear": _linear, "gate_up": _gate_up, "down": _down, "route": _route,
}  # fmt: skip
