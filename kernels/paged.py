"""Operations over paged KV rows as a GPU takes them, in plain torch: the specification of what
``kernels.triton`` has beyond ``kernels.ref``.

Nothing here has the size of queries times keys. What the nodes of a tree see is

    every row of their sequence that is committed       found through the page table
    and of the rows behind those, the sequence's *own*  the bits of one 64-bit word per node

Own row j of a sequence is row ``kv_len + j``; bit j of a node's word says that the node sees it. For a tree
that is scored, own rows are its nodes, and a word is a node and its ancestors (``ancestor_words``). A head
that grows a tree level by level has its scratch rows there. A chain of any length needs no words: node i sees
own rows 0 to i.

Rows of a pool are finite numbers, whatever was computed: what attention reads beside the rows that a node
sees has no weight, but nought times infinity is no number, and those rows may be another request's.

Example: kv_len 5, page size 4, pages [7, 2], a root with two children. Words are 0b001, 0b011 and 0b101; the
nodes see rows 0 to 4, in slots 28 to 31 and 8, and of slots 9, 10 and 11 what their bits say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.mla import mla_tree_attention as latent_attention
from kernels.mla import rope_pairs
from kernels.ref import compact_rows, rms_norm, rope, tree_attention, write_rows

MOST_OWN = 64  # bits of a word


@dataclass(frozen=True, slots=True)
class TreeRows:
    """What the nodes of B sequences see.

    page_table: [B, P] int64 or int32; row r lies in slot ``table[r // page_size] * page_size + r %
    page_size``; kv_lens: [B] int64 or int32; words: [B, N] int64, or None for chains; num_own: rows behind
    the committed ones that a word may name, N for chains; start: the first row that exists, 1 for a head.
    """

    page_table: Tensor
    page_size: int
    kv_lens: Tensor
    words: Tensor | None
    num_own: int
    start: int = 0

    @property
    def most_rows(self) -> int:
        """Rows that a sequence can have, known without asking the device."""
        return self.page_table.shape[1] * self.page_size


def ancestor_words(parents: Tensor) -> Tensor:
    """Which nodes every node of a tree sees, itself and its ancestors: parents [B, N] int64, -1 for none ->
    [B, N] int64. At most 64 nodes, parents before their children."""
    num_nodes = parents.shape[1]
    assert num_nodes <= MOST_OWN, num_nodes
    words = torch.ones_like(parents) << torch.arange(num_nodes, device=parents.device)
    up = parents
    for _ in range(num_nodes - 1):
        words = words | torch.where(up >= 0, torch.ones_like(up) << up.clamp(min=0), 0)
        up = torch.where(up >= 0, parents.gather(1, up.clamp(min=0)), -1)
    return words


def mha_tree_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    rows: TreeRows,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Grouped-query attention of tree nodes over paged K and V.

    q: [B, N, H, D]; k_pool, v_pool: [Hkv, S, D] in q's dtype, or float8_e4m3fn and to be multiplied by
    ``k_scale`` and ``v_scale``. Returns [B, N, H, D] in q's dtype.
    """
    slots, bias = seen_rows(rows, q.shape[1])
    keys, values = k_pool.float() * k_scale, v_pool.float() * v_scale
    return tree_attention(q.float(), keys, values, slots, bias, scale).to(q.dtype)


def mla_tree_attention(
    q: Tensor, pool: Tensor, rows: TreeRows, scale: float, value_dim: int, pool_scale: float = 1.0
) -> Tensor:
    """Attention of tree nodes over paged latent rows, absorbed.

    q: [B, N, H, R + P] from ``kernels.mla.absorb_queries``; pool: [S, R + P] in q's dtype, or float8_e4m3fn
    and to be multiplied by ``pool_scale``; value_dim: R. Returns [B, N, H, R] in q's dtype.
    """
    slots, bias = seen_rows(rows, q.shape[1])
    out = latent_attention(q.float(), pool.float() * pool_scale, slots, bias, scale, value_dim)
    return out.to(q.dtype)


def seen_rows(rows: TreeRows, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Slots of all rows of the table, [B, L], and what every node sees of them: 0 or -inf, [B, N, L]."""
    device = rows.page_table.device
    within = torch.arange(rows.page_size, device=device)
    slots = (rows.page_table[..., None] * rows.page_size + within).flatten(1)
    row = torch.arange(rows.most_rows, device=device)
    own = (row - rows.kv_lens[:, None])[:, None]  # [B, 1, L]: which own row a row is
    if rows.words is None:
        seen = own <= torch.arange(num_nodes, device=device)[:, None]
    else:
        bit = (rows.words[..., None] >> own.clamp(0, MOST_OWN - 1)) & 1
        seen = (own < 0) | ((own < rows.num_own) & (bit == 1))
    seen = seen & (row >= rows.start)
    return slots, torch.zeros(seen.shape, device=device).masked_fill_(~seen, float("-inf"))


# --- rows that are written, rows that are moved


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
    """As ``ref.rope_write``, for pools of FP8 too: these take keys and values divided by their scales.

    heads: [.., H + 2 Hkv, D]; slots: [T] int64, one for every token. Returns [.., H, D].
    """
    num_kv_heads, head_dim = k_pool.shape[0], heads.shape[-1]
    turned = rope(heads[..., : num_heads + num_kv_heads, :].float(), cos.float(), sin.float())
    keys = turned[..., num_heads:, :].reshape(-1, num_kv_heads, head_dim)
    values = heads[..., num_heads + num_kv_heads :, :].reshape(-1, num_kv_heads, head_dim).float()
    for pool, rows, scale in ((k_pool, keys, k_scale), (v_pool, values, v_scale)):
        _store(pool, slots, (rows / scale).transpose(0, 1))
    return turned[..., :num_heads, :].to(heads.dtype)


def rope_latent_write(
    q: Tensor,
    latents: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    query_scale: Tensor | None,
    pool: Tensor,
    slots: Tensor | slice,
    pool_scale: float = 1.0,
) -> Tensor:
    """What lies between MLA's projections and its attention: queries are rotated and scaled, latent rows are
    normed and rotated and stored.

    q: [T, H, K + P]; latents: [T, R + P], not yet normed, rows may lie apart; weight: [R] of the norm; cos,
    sin: [T, 1, P / 2] float32; query_scale: [T, 1, 1] float32 or None; pool: [S, R + P] in q's dtype, or
    float8_e4m3fn, which takes rows divided by ``pool_scale``; slots: [T] int64, or a run of T. Returns
    [T, H, K + P].
    """
    rank, turned_dim = len(weight), 2 * cos.shape[-1]
    row = torch.cat(
        (
            rms_norm(latents[:, :rank].float(), weight.float(), eps),
            rope_pairs(latents[:, None, rank:], cos, sin)[:, 0],
        ),
        dim=-1,
    )
    _store(pool[None], slots, row[None] / pool_scale)
    turned = torch.cat((q[..., :-turned_dim].float(), rope_pairs(q[..., -turned_dim:], cos, sin)), dim=-1)
    return (turned if query_scale is None else turned * query_scale).to(q.dtype)


def _store(pool: Tensor, slots: Tensor | slice, rows: Tensor) -> None:
    """Float32 rows [Hkv, T, D] in a pool [Hkv, S, D] of any dtype: saturated, 0 for what is no number."""
    most = torch.finfo(pool.dtype).max
    rows = rows.nan_to_num(0.0).clamp(-most, most).to(pool.dtype)
    if pool.dtype == torch.float8_e4m3fn:  # torch has no copies by index for this type
        rows, pool = rows.view(torch.uint8), pool.view(torch.uint8)
    write_rows(pool, slots, rows.transpose(0, 1))


def compact_path(pools: Tensor, path: Tensor, slots: Tensor) -> None:
    """Move the accepted rows of every sequence to the front of its own rows, in all layers.

    pools: [layers, kinds, Hkv, S, D]; path: [B, N] int64, accepted nodes in order, -1 padded; slots: [B, N]
    int64, of own rows 0 to N - 1. Node ``path[i]`` moves to row i, and never lies before it.
    """
    order = torch.arange(path.shape[1], device=path.device)
    moves = path > order
    compact_rows(pools, slots.gather(1, path.clamp(min=0))[moves], slots[moves])
