"""Rotary embedding of queries and keys, and the new KV rows written to the pool: one launch a layer.

A program turns one head of one token, or writes what a token leaves in the pool. Angles come as cosines and
sines of the token's position; slots are read on the device. What is written are finite numbers whatever was
computed: see ``kernels.paged``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.errors import require
from kernels.triton.host import FLOATS, FP8, check_contiguous, check_dtype, power_of_two
from kernels.triton.pdl import launch, release, wait


@triton.jit
def _turn_halves(
    heads: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    k_pool: tl.tensor,
    v_pool: tl.tensor,
    slots: tl.tensor,
    queries: tl.tensor,
    num_slots: tl.tensor,
    inverse_k_scale: tl.tensor,
    inverse_v_scale: tl.tensor,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block: tl.constexpr,
    largest: tl.constexpr,
    dependent: tl.constexpr = False,
) -> None:
    """One head of one token: a query is turned, a key is turned and stored, a value is stored."""
    release(dependent)
    wait(dependent)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, block)
    inside = column < head_dim
    row = heads + (token * (num_heads + 2 * num_kv_heads) + head) * head_dim
    value = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
    if head < num_heads + num_kv_heads:
        partner = tl.where(column < head_dim // 2, column + head_dim // 2, column - head_dim // 2)
        other = tl.load(row + partner, mask=inside, other=0.0).to(tl.float32)
        angle = token * head_dim + column
        value = value * tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        value += other * tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    if head < num_heads:
        query = queries + (token * num_heads + head) * head_dim
        tl.store(query + column, value.to(queries.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots + token)
        kv_head = head - num_heads
        if kv_head < num_kv_heads:
            key = _within(value * inverse_k_scale, largest)
            key_row = k_pool + (kv_head.to(tl.int64) * num_slots + slot) * head_dim
            tl.store(key_row + column, key.to(k_pool.dtype.element_ty), mask=inside)
        else:
            kept = _within(value * inverse_v_scale, largest)
            value_row = v_pool + ((kv_head - num_kv_heads).to(tl.int64) * num_slots + slot) * head_dim
            tl.store(value_row + column, kept.to(v_pool.dtype.element_ty), mask=inside)


@triton.jit
def _within(value: tl.tensor, largest: tl.constexpr) -> tl.tensor:
    """Saturated at the largest number of the pool's type, and 0 for what is none."""
    value = tl.where(value == value, value, 0.0)
    return tl.minimum(tl.maximum(value, -largest), largest)


@triton.jit
def _turn_pairs(
    q: tl.tensor,
    latents: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    query_scale: tl.tensor,
    pool: tl.tensor,
    slots: tl.tensor,
    out: tl.tensor,
    latent_stride: tl.tensor,
    inverse_scale: tl.tensor,
    eps: tl.tensor,
    num_heads: tl.constexpr,
    content_dim: tl.constexpr,
    rank: tl.constexpr,
    pairs: tl.constexpr,
    content_block: tl.constexpr,
    rank_block: tl.constexpr,
    pair_block: tl.constexpr,
    scales: tl.constexpr,
    largest: tl.constexpr,
    dependent: tl.constexpr = False,
) -> None:
    """One query head of one token, or behind the heads, its latent row."""
    release(dependent)
    wait(dependent)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    pair = tl.arange(0, pair_block)
    is_pair = pair < pairs
    cosine = tl.load(cos + token * pairs + pair, mask=is_pair, other=0.0)
    sine = tl.load(sin + token * pairs + pair, mask=is_pair, other=0.0)
    if head < num_heads:
        start = (token * num_heads + head) * (content_dim + 2 * pairs)
        factor = tl.load(query_scale + token) if scales else 1.0
        column = tl.arange(0, content_block)
        content = tl.load(q + start + column, mask=column < content_dim, other=0.0).to(tl.float32) * factor
        tl.store(out + start + column, content.to(out.dtype.element_ty), mask=column < content_dim)
        start += content_dim
        even, odd = _turned(q + start, pair, is_pair, cosine, sine)
        tl.store(out + start + 2 * pair, (even * factor).to(out.dtype.element_ty), mask=is_pair)
        tl.store(out + start + 2 * pair + 1, (odd * factor).to(out.dtype.element_ty), mask=is_pair)
    else:
        row = latents + token * latent_stride
        place = pool + tl.load(slots + token) * (rank + 2 * pairs)
        number = tl.arange(0, rank_block)
        is_rank = number < rank
        latent = tl.load(row + number, mask=is_rank, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(latent * latent, axis=0) / rank + eps) * inverse_scale
        latent = latent * inverse * tl.load(weight + number, mask=is_rank, other=0.0).to(tl.float32)
        tl.store(place + number, _within(latent, largest).to(pool.dtype.element_ty), mask=is_rank)
        one, other = _turned(row + rank, pair, is_pair, cosine, sine)
        one, other = _within(one * inverse_scale, largest), _within(other * inverse_scale, largest)
        tl.store(place + rank + 2 * pair, one.to(pool.dtype.element_ty), mask=is_pair)
        tl.store(place + rank + 2 * pair + 1, other.to(pool.dtype.element_ty), mask=is_pair)


@triton.jit
def _turned(
    row: tl.tensor, pair: tl.tensor, is_pair: tl.tensor, cosine: tl.tensor, sine: tl.tensor
) -> tl.tensor:
    """Components 2i and 2i + 1 of a row, turned by angle i."""
    even = tl.load(row + 2 * pair, mask=is_pair, other=0.0).to(tl.float32)
    odd = tl.load(row + 2 * pair + 1, mask=is_pair, other=0.0).to(tl.float32)
    return even * cosine - odd * sine, odd * cosine + even * sine


def rope_write(
    heads: Tensor,
    num_heads: int,
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Rotate queries and keys of a qkv product, store keys and values: see ``kernels.paged``."""
    operation = "rope_write"
    num_all, head_dim = heads.shape[-2:]
    num_kv_heads, num_slots, _ = k_pool.shape
    num_tokens = heads.shape[:-2].numel()
    require(head_dim % 2 == 0, operation, f"heads have {head_dim} numbers, expected an even number")
    counts = f"{num_all} heads, expected {num_heads} + 2 * {num_kv_heads}"
    require(num_all == num_heads + 2 * num_kv_heads, operation, counts)
    pools = f"pools {list(k_pool.shape)} and {list(v_pool.shape)}, expected [Hkv, S, {head_dim}]"
    require(k_pool.shape == v_pool.shape and k_pool.shape[2] == head_dim, operation, pools)
    angles = f"{cos.numel()} cosines and {sin.numel()} sines, expected {num_tokens} x {head_dim}"
    require(cos.numel() == sin.numel() == num_tokens * head_dim, operation, angles)
    check_dtype(operation, "heads", heads.dtype, FLOATS)
    check_dtype(operation, "the pool", k_pool.dtype, (heads.dtype, FP8))
    check_dtype(operation, "V's pool", v_pool.dtype, (k_pool.dtype,))
    _check_slots(operation, slots, num_tokens)
    check_contiguous(operation, heads=heads, cos=cos, sin=sin, k_pool=k_pool, v_pool=v_pool)
    queries = heads.new_empty(*heads.shape[:-2], num_heads, head_dim)
    if num_tokens:
        _turn_halves[(num_tokens, num_all)](
            *(heads, cos, sin, k_pool, v_pool, slots, queries),
            *(num_slots, 1.0 / k_scale, 1.0 / v_scale),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block=power_of_two(head_dim),
            largest=_largest(k_pool),
            num_warps=1,
            **launch(),
        )
    return queries


def rope_latent_write(
    q: Tensor,
    latents: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    query_scale: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    pool_scale: float = 1.0,
) -> Tensor:
    """Rotate MLA's queries, norm and rotate its latent rows and store them: see ``kernels.paged``."""
    operation = "rope_latent_write"
    num_tokens, num_heads, query_dim = q.shape
    rank, pairs = weight.shape[0], cos.shape[-1]
    widths = f"latents {list(latents.shape)}, expected [{num_tokens}, {rank} + 2 * {pairs}]"
    require(latents.shape == (num_tokens, rank + 2 * pairs), operation, widths)
    require(query_dim > 2 * pairs, operation, f"queries of {query_dim}, expected more than {2 * pairs}")
    pools = f"pool {list(pool.shape)}, expected [S, {rank + 2 * pairs}]"
    require(pool.dim() == 2 and pool.shape[1] == rank + 2 * pairs, operation, pools)
    angles = f"{cos.numel()} cosines and {sin.numel()} sines, expected {num_tokens} x {pairs}"
    require(cos.numel() == sin.numel() == num_tokens * pairs, operation, angles)
    check_dtype(operation, "q", q.dtype, FLOATS)
    check_dtype(operation, "latents", latents.dtype, (q.dtype,))
    check_dtype(operation, "the pool", pool.dtype, (q.dtype, FP8))
    check_dtype(operation, "cos", cos.dtype, (torch.float32,))
    check_dtype(operation, "sin", sin.dtype, (torch.float32,))
    if query_scale is not None:
        check_dtype(operation, "query_scale", query_scale.dtype, (torch.float32,))
        scales = f"{query_scale.numel()} scales of queries, expected {num_tokens}"
        require(query_scale.numel() == num_tokens, operation, scales)
    _check_slots(operation, slots, num_tokens)
    check_contiguous(operation, q=q, weight=weight, cos=cos, sin=sin, query_scale=query_scale, pool=pool)
    require(latents.stride(1) == 1, operation, f"latents of stride {latents.stride(1)}, expected 1")
    out = torch.empty_like(q)
    if num_tokens:
        content_dim = query_dim - 2 * pairs
        _turn_pairs[(num_tokens, num_heads + 1)](
            *(q, latents, weight, cos, sin, query_scale, pool, slots, out),
            *(latents.stride(0), 1.0 / pool_scale, eps),
            num_heads=num_heads,
            content_dim=content_dim,
            rank=rank,
            pairs=pairs,
            content_block=power_of_two(content_dim),
            rank_block=power_of_two(rank),
            pair_block=power_of_two(pairs),
            scales=query_scale is not None,
            largest=_largest(pool),
            num_warps=1,
            **launch(),
        )
    return out


def _largest(pool: Tensor) -> float:
    return torch.finfo(pool.dtype).max


def _check_slots(operation: str, slots: Tensor, num_tokens: int) -> None:
    check_dtype(operation, "slots", slots.dtype, (torch.int64,))
    check_contiguous(operation, slots=slots)
    require(slots.numel() == num_tokens, operation, f"{slots.numel()} slots, expected {num_tokens}")
