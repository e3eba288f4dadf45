"""Multi-head latent attention in plain torch: the specification, and the CPU path.

A pool of latent rows is ``[S, R + P]``: R numbers of compressed key and value, after their norm, then P
rotated numbers of the key that all heads share. Two forms compute the same attention from it:

    absorbed    a head's query is mapped into the latent space (``absorb_queries``), so every head attends
                over the rows as they lie in the pool, like many query heads over one key head that is its
                own value; the result is mapped out once (``expand_values``). Reads each row once.
    unabsorbed  keys and values of every head are expanded from the rows, then attended to. Expanding costs
                as much as about a hundred and fifty queries save, so it is for chunks of a prompt.

Rows to read are slots, or one slice per sequence, exactly as in ``kernels.ref.tree_attention``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers of expanded keys and values held at a time, in the unabsorbed form.
_EXPANDED = 1 << 26


def rope_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs: components 2i and 2i + 1 turn by angle i.

    x: [.., H, D]; cos, sin: [.., 1, D / 2] float32. Returns [.., H, D] float32.
    """
    x = x.float()
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def absorb_queries(q: Tensor, key_up: Tensor) -> Tensor:
    """Queries of the absorbed form: q [B, N, H, K + P], key_up [H, K, R] -> [B, N, H, R + P].

    q . (key_up r) == (q key_up) . r, so the key never has to be expanded.
    """
    content_dim = key_up.shape[1]
    content = torch.einsum("bnhk,hkr->bnhr", q[..., :content_dim], key_up)
    return torch.cat((content, q[..., content_dim:]), dim=-1)


def expand_values(latents: Tensor, value_up: Tensor) -> Tensor:
    """Outputs of the absorbed form: latents [B, N, H, R], value_up [H, V, R] -> [B, N, H, V]."""
    return torch.einsum("bnhr,hvr->bnhv", latents, value_up)


def mla_tree_attention(
    q: Tensor,
    pool: Tensor,
    slots: Tensor | tuple[slice, ...],
    bias: Tensor | None,
    scale: float,
    value_dim: int,
) -> Tensor:
    """Attention of tree nodes over latent rows, absorbed.

    q: [B, N, H, D] from ``absorb_queries``; pool: [S, D]; slots: [B, L], or one slice per sequence of at most
    L slots; bias: [B, N, L] added to the scaled scores (0 or -inf), None where everything is visible;
    value_dim: how many leading numbers of a row are its value. Returns [B, N, H, value_dim].

    Nodes and heads are packed as rows of one matrix, since all of them read the same latents.
    """
    num_seqs, num_nodes, num_heads, dim = q.shape
    if isinstance(slots, tuple):
        if num_seqs > 1:
            return torch.cat(
                [
                    mla_tree_attention(
                        q[i : i + 1],
                        pool,
                        (run,),
                        None if bias is None else bias[i : i + 1, :, : run.stop - run.start],
                        scale,
                        value_dim,
                    )
                    for i, run in enumerate(slots)
                ]
            )
        rows = pool[slots[0]][None]
    else:
        rows = pool.index_select(0, slots.reshape(-1)).view(num_seqs, -1, dim)
    scores = torch.bmm(q.reshape(num_seqs, -1, dim), rows.transpose(1, 2)).float().mul_(scale)
    if bias is not None:
        scores.view(num_seqs, num_nodes, num_heads, -1).add_(bias[:, :, None])
    out = torch.bmm(torch.softmax(scores, dim=-1).to(rows.dtype), rows[..., :value_dim])
    return out.view(num_seqs, num_nodes, num_heads, value_dim)


def mla_prompt_attention(
    q: Tensor,
    pool: Tensor,
    key_up: Tensor,
    value_up: Tensor,
    slots: Tensor | tuple[slice, ...],
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention of many nodes over latent rows, unabsorbed.

    q: [B, N, H, K + P]; pool: [S, R + P]; key_up: [H, K, R]; value_up: [H, V, R]; slots and bias as in
    ``mla_tree_attention``. Returns [B, N, H, V].

    One sequence after the other, and as many heads at a time as keep the expanded rows small.
    """
    num_seqs, num_nodes, num_heads, qk_dim = q.shape
    value_dim, latent_dim = value_up.shape[1:]
    out = q.new_empty(num_seqs, num_heads, num_nodes, value_dim)
    for seq in range(num_seqs):
        run = slots[seq]
        rows = pool[run] if isinstance(run, slice) else pool.index_select(0, run)
        mask = None if bias is None else bias[seq, :, : len(rows)].to(q.dtype)
        latents, rotated = rows[:, :latent_dim], rows[:, latent_dim:]
        step = max(1, _EXPANDED // (max(len(rows), 1) * (qk_dim + value_dim)))
        for first in range(0, num_heads, step):
            heads = slice(first, min(first + step, num_heads))
            keys = torch.matmul(latents, key_up[heads].transpose(1, 2))
            keys = torch.cat((keys, rotated.expand(len(keys), -1, -1)), dim=-1)
            values = torch.matmul(latents, value_up[heads].transpose(1, 2))
            out[seq, heads] = F.scaled_dot_product_attention(
                q[seq, :, heads].transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, scale=scale
            )[0]
    return out.transpose(1, 2)
