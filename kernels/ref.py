"""The operations of a step in plain torch: the specification, and the CPU path.

A pool of KV rows is ``[Hkv, S, D]``: heads first, so that one sequence's rows of all heads form a batch of
matrices without a copy. A row is addressed by its slot. Rows to read are either a tensor of slots or, where
every sequence's pages happen to be consecutive (the usual case), one slice per sequence, which reads the pool
in place.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Past this many query rows per sequence, the blocked SDPA kernel beats two plain matrix products.
_FEW_QUERIES = 64


@functools.cache
def _constant(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, device=device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019).

    On a CPU in float32 four small calls take 60% of the time of torch's composite operator.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return torch.rms_norm(x, (x.shape[-1],), weight, eps)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    mean_square = torch.addcmul(_constant(eps, x.device), norm, norm, value=1.0 / x.shape[-1])
    return torch.mul(x, mean_square.rsqrt_()).mul_(weight)


def silu_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's elementwise part: [.., 2I] holding gate then up -> silu(gate) * up, [.., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the rotate-half layout. x: [.., H, D]; cos, sin: [.., 1, D].

    The first half of ``sin`` carries the minus sign of the rotation, so that a roll by half does the rest:
    out[i] = x[i] cos - x[i + D/2] sin for i < D/2, x[i] cos + x[i - D/2] sin behind.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def write_rows(pool: Tensor, slots: Tensor | slice, rows: Tensor) -> None:
    """Store rows [M, Hkv, D] in the pool [Hkv, S, D] at M slots."""
    rows = rows.transpose(0, 1)
    if isinstance(slots, slice):
        pool[:, slots] = rows
    else:
        pool.index_copy_(1, slots, rows)


def rope_write(
    heads: Tensor,
    num_heads: int,
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor | slice,
) -> Tensor:
    """Rotate queries and keys of a qkv product, store keys and values in the pools, return the queries.

    heads: [.., H + 2 Hkv, D], queries, then keys, then values, and the caller's no longer: it may be
    written to; cos, sin: [.., 1, D]; pools: [Hkv, S, D]; slots: one for every row, or a slice of as many.
    Returns [.., H, D].
    """
    num_kv_heads, head_dim = k_pool.shape[0], heads.shape[-1]
    rotated = rope(heads[..., : num_heads + num_kv_heads, :], cos, sin)
    write_rows(k_pool, slots, rotated[..., num_heads:, :].reshape(-1, num_kv_heads, head_dim))
    write_rows(v_pool, slots, heads[..., num_heads + num_kv_heads :, :].reshape(-1, num_kv_heads, head_dim))
    return rotated[..., :num_heads, :]


def compact_rows(pools: Tensor, source: Tensor, destination: Tensor) -> None:
    """Move KV rows of all layers at once. pools: [layers, 2, Hkv, S, D]; source, destination: [M] slots.

    Everything is gathered before anything is written, so overlapping moves are safe.
    """
    if pools.dtype == torch.float8_e4m3fn:  # torch has no copies by index for this type
        pools = pools.view(torch.uint8)
    pools.index_copy_(3, destination, pools.index_select(3, source))


def tree_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor | tuple[slice, ...],
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention of tree nodes over their rows of the pool, grouped-query heads.

    q: [B, N, H, D]; k_pool, v_pool: [Hkv, S, D]; slots: [B, L], or one slice per sequence of at most L slots;
    bias: [B, N, L] added to the scaled scores (0 or -inf), None where everything is visible. Returns [B, N,
    H, D].

    The H / Hkv query heads that share a KV head are packed as rows of one matrix, so K and V are read once.
    Slices are read in place, one sequence after the other: on a CPU that beats gathering rows of all
    sequences.
    """
    num_seqs, num_nodes, num_heads, head_dim = q.shape
    num_kv_heads = k_pool.shape[0]
    group = num_heads // num_kv_heads
    if isinstance(slots, tuple):
        if num_seqs > 1:
            return torch.cat(
                [
                    tree_attention(
                        q[i : i + 1],
                        k_pool,
                        v_pool,
                        (run,),
                        None if bias is None else bias[i : i + 1, :, : run.stop - run.start],
                        scale,
                    )
                    for i, run in enumerate(slots)
                ]
            )
        k, v = k_pool[:, slots[0]], v_pool[:, slots[0]]
    else:
        flat = slots.reshape(-1)
        k = k_pool.index_select(1, flat).view(num_kv_heads * num_seqs, -1, head_dim)
        v = v_pool.index_select(1, flat).view(num_kv_heads * num_seqs, -1, head_dim)
    k_len = k.shape[1]
    # [B, N, Hkv, G, D] -> [Hkv, B, G, N, D] -> [Hkv * B, G * N, D]
    q = q.view(num_seqs, num_nodes, num_kv_heads, group, head_dim).permute(2, 0, 3, 1, 4)
    if num_nodes > _FEW_QUERIES:
        kv_shape = (num_kv_heads, num_seqs, 1, k_len, head_dim)
        mask = None if bias is None else bias[None, :, None].to(q.dtype)
        out = torch.stack(
            [
                F.scaled_dot_product_attention(
                    q[head],
                    k.view(kv_shape)[head].expand(-1, group, -1, -1),
                    v.view(kv_shape)[head].expand(-1, group, -1, -1),
                    attn_mask=None if mask is None else mask[0],
                    scale=scale,
                )
                for head in range(num_kv_heads)
            ]
        )
    else:
        rows = q.reshape(num_kv_heads * num_seqs, group * num_nodes, head_dim)
        scores = torch.bmm(rows, k.transpose(1, 2)).float().mul_(scale)
        if bias is not None:
            scores.view(num_kv_heads, num_seqs, group, num_nodes, k_len).add_(bias[None, :, None])
        out = torch.bmm(torch.softmax(scores, dim=-1).to(v.dtype), v)
        out = out.view(num_kv_heads, num_seqs, group, num_nodes, head_dim)
    return out.permute(1, 3, 0, 2, 4).reshape(num_seqs, num_nodes, num_heads, head_dim)


# --- linear layers packed once for oneDNN


def pack_linear(weight: Tensor, num_rows: int) -> Tensor | None:
    """Reorder a [out, in] CPU weight into oneDNN's blocked layout, or None where this build or CPU cannot.

    num_rows: how many rows a call will usually have; a hint, any number works. A plain ``F.linear`` repacks
    the weight inside every call, which costs more than the product itself for a few rows.
    """
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    hint = (num_rows,) if weight.dtype == torch.float32 else ()
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, *hint)
    except (RuntimeError, AttributeError):  # a build without oneDNN, or bfloat16 without AVX-512
        return None
    return packed


def has_fast_bfloat16() -> bool:
    """Whether this build and CPU multiply bfloat16 with packed weights; without, float32 is several times
    faster."""
    return pack_linear(torch.zeros(32, 32, dtype=torch.bfloat16), 8) is not None


def packed_linear(x: Tensor, packed: Tensor) -> Tensor:
    """x [.., in] times a weight from ``pack_linear`` -> [.., out]."""
    out: Tensor = _direct("mkldnn", "_linear_pointwise")(x, packed, None, "none", [], "")
    return out


@functools.cache
def _direct(library: str, name: str) -> Any:
    """An operator without the layer that looks for fake tensors at every call, where this torch has it so:
    that costs a tenth of a small product."""
    operator = getattr(getattr(torch.ops, library), name).default
    return getattr(operator, "_op", operator)


_LARGEST_FLOAT16 = 65504.0


def fits_half(weight: Tensor) -> bool:
    """Whether a weight is float32 on a CPU and within float16's range."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    return float(torch.linalg.vector_norm(weight, float("inf"))) <= _LARGEST_FLOAT16


def pack_half(weight: Tensor) -> Any | None:
    """Round a [out, in] float32 CPU weight to float16 and pack it.

    None where torch, the CPU or the weight's range do not allow it.

    For CPUs without bfloat16 units: products with it read half the bytes of float32 ones and are no less
    precise, since each element is widened again on its way into a float32 multiply-add (FBGEMM's FP16 GEMM).
    """
    if not fits_half(weight):
        return None
    try:
        return torch.ops.quantized.linear_prepack_fp16(weight, None)
    except (RuntimeError, AttributeError):  # a torch without FBGEMM, or a CPU without AVX2
        return None


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> codes [out, in] int8 of -127 to 127 and scales [out] float32, weight ~ codes x scale:
    every output's largest weight is 127."""
    scales = weight.abs().amax(dim=1) / 127
    codes = (weight / torch.where(scales == 0, 1.0, scales)[:, None]).round()
    return codes.to(torch.int8), scales


def half_linear(x: Tensor, packed: Any) -> Tensor:
    """x [.., in] float32 times a weight from ``pack_half`` -> [.., out] float32."""
    out: Tensor = _direct("quantized", "linear_dynamic_fp16")(x, packed)
    return out


# --- choosing a token

GOLDEN = -1640531527  # 0x9E3779B9 as int32
# multipliers and shifts of the low-bias 32-bit mixer published by C. Wellons (hash-prospector)
ODD_1 = 0x21F0AAAD
ODD_2 = 0x735A2D97


def _finalise(x: Tensor, key: Tensor) -> Tensor:
    """A keyed 32-bit mix on int32 tensors; multiplication wraps, right shifts are made logical by a mask."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * ODD_1
    x = x ^ key ^ ((x >> 15) & 0x1FFFF)
    x = x * ODD_2
    return x ^ ((x >> 16) & 0xFFFF)


def gumbel_noise(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise that is a function of (seed, position, token id) alone.

    seeds: [B] int64; positions: [B, R] int64; token_ids: [n] or [B, R, n] int64. Returns [B, R, n] float32.
    A counter-based 32-bit integer hash, the same on every device and in every batch shape. The largest of
    logits + noise is a draw from softmax(logits) (the Gumbel-max trick).
    """
    low, high = seeds.to(torch.int32), (seeds >> 32).to(torch.int32)
    key = _finalise(low * GOLDEN, high)[:, None].expand(positions.shape)
    first = _finalise(positions.to(torch.int32) * GOLDEN + 1, key)
    second = _finalise(first + GOLDEN, ~key)
    ids = token_ids.to(torch.int32) * GOLDEN
    bits = _finalise(ids + first[..., None], second[..., None])
    # 23 bits and the half fill a float32 mantissa: (0, 1) without its ends (of 24 bits the last would round
    # to 1)
    uniform = ((bits >> 9) & 0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


def nucleus(scaled: Tensor, ordered: Tensor, top_p: Tensor) -> Tensor:
    """-inf where tokens better than a token have ``top_p`` of the mass or more; the best stays.

    scaled: [B, R, V] float32; ordered: the same, sorted along V, best first; top_p: [B], 1 is off.
    """
    last = _last_kept(ordered, top_p)[..., None]  # what is tied with it stays too
    return torch.where((top_p < 1)[:, None, None], scaled.masked_fill(scaled < last, float("-inf")), scaled)


def _last_kept(ordered: Tensor, top_p: Tensor) -> Tensor:
    """[B, R]: the score of the last token of the nucleus; see ``nucleus``."""
    probs = ordered.softmax(dim=-1)
    kept = probs.cumsum(dim=-1) - probs < top_p[:, None, None]
    kept[..., 0] = True
    return ordered.gather(-1, kept.sum(-1, keepdim=True) - 1)[..., 0]


def nucleus_floors(logits: Tensor, temperature: Tensor, top_p: Tensor, floors: Tensor | None) -> Tensor:
    """The least logit / temperature that ``top_p`` keeps of what ``floors`` keep, [B, R]; as in ``choose``.

    For devices: nothing is asked of them, and rows without a nucleus are sorted with the others.
    """
    scaled = logits / torch.where(temperature > 0, temperature, 1.0)[:, None, None]
    if floors is None:
        floors = torch.full(scaled.shape[:2], float("-inf"), device=logits.device)
    ordered = (
        scaled.masked_fill(scaled < floors[..., None], float("-inf")).sort(dim=-1, descending=True).values
    )
    return torch.where((top_p < 1)[:, None], torch.maximum(floors, _last_kept(ordered, top_p)), floors)


def choose(
    logits: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_p: Tensor | None,
    floors: Tensor | None,
    seeds: Tensor,
) -> Tensor:
    """The token with the largest logit / temperature + noise, of those that the filters keep; where
    temperature is 0, with the largest logit. Of equals the lowest.

    logits: [B, R, V] float32; positions: [B, R] int64, of the tokens to be chosen; temperature, top_p: [B]
    float32, or None for a ``top_p`` of 1 everywhere; floors: [B, R] float32, the least logit / temperature
    that is kept, before ``top_p`` looks at what is left; seeds: [B] int64. Returns [B, R] int64, -1 where the
    largest logit is no finite number: a row with NaN or infinity in it says nothing, and in one that is -inf
    throughout nothing may be chosen.
    """
    choice = logits.argmax(dim=-1)
    rows = (temperature > 0).nonzero()[:, 0]
    scaled = logits[rows] / temperature[rows, None, None]
    if floors is not None:
        scaled = scaled.masked_fill(scaled < floors[rows][..., None], float("-inf"))
    if top_p is not None and bool((top_p[rows] < 1).any()):
        scaled = nucleus(scaled, scaled.sort(dim=-1, descending=True).values, top_p[rows])
    token_ids = torch.arange(logits.shape[-1], device=logits.device)
    choice[rows] = (scaled + gumbel_noise(seeds[rows], positions[rows], token_ids)).argmax(dim=-1)
    return torch.where(logits.amax(dim=-1).isfinite(), choice, -1)


def best(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` largest of logits [.., V] float32, best first: values and columns, [.., count], and the
    logarithm of the sum of all e^logit, [..]."""
    found = logits.topk(count, dim=-1)
    return found.values, found.indices, logits.logsumexp(dim=-1)
