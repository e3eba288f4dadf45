"""Pools of KV rows, and the plan of where one forward writes and reads them.

Example: page size 4, a sequence with pages [7, 2] and kv_len 5 scores a tree of 3 nodes. Node i is written to row
5 + i, so to slots 2*4 + 1, 2*4 + 2, 2*4 + 3 = 9, 10, 11. It reads rows 0..7, slots 28..31 and 8..11, where the last
three are masked by ancestry. After acceptance of nodes 0 and 2, row 7 moves to row 6 and kv_len becomes 7.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.core import Batch, DraftTree, Verdict
from kernels import compact_rows


class KVPool:
    """The K and V rows of one model: ``rows[layer, 0 or 1]`` is a pool [Hkv, S, D]."""

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int, num_slots: int,
                 dtype: torch.dtype, device: str) -> None:
        self.rows = torch.zeros(num_layers, 2, num_kv_heads, num_slots, head_dim, dtype=dtype, device=device)

    @staticmethod
    def bytes_per_slot(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return num_layers * 2 * num_kv_heads * head_dim * dtype.itemsize

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self.rows[index, 0], self.rows[index, 1]


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Made once per forward, used by every layer.

    write: [B * N] slots or a slice; read: [B, L] slots or a slice; bias: [B, N, L] of 0 and -inf, or None.
    """

    write: Tensor | slice
    read: Tensor | slice
    bias: Tensor | None


def as_run(slots: Tensor) -> Tensor | slice:
    """Slots [n] or [1, n] as a slice where they are consecutive (host tensors only: a device would have to wait)."""
    if slots.device.type != "cpu" or (slots.dim() == 2 and slots.shape[0] != 1):
        return slots
    flat = slots.reshape(-1)
    first, count = int(flat[0]), flat.shape[0]
    if int(flat[-1]) != first + count - 1 or (count > 2 and not bool((flat[1:] - flat[:-1] == 1).all())):
        return slots
    return slice(first, first + count)


def visible_bias(visible: Tensor) -> Tensor | None:
    """[B, N, L] bool -> additive float32 bias, None where all is visible (checked on the host only)."""
    if visible.device.type == "cpu" and bool(visible.all()):
        return None
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, float("-inf"))


def plan_rows(batch: Batch, tree: DraftTree) -> RowPlan:
    """Where the nodes of a tree are written, and what each of them reads: the committed rows and its ancestors."""
    num_nodes = tree.tokens.shape[1]
    device = tree.tokens.device
    node = torch.arange(num_nodes, device=device)
    rows = batch.kv_lens[:, None] + node
    write = torch.where(tree.real(), batch.slots(rows), node % batch.page_size)  # padding goes to the dummy page
    longest = max(seq.kv_len for seq in batch.seqs) + num_nodes
    row = torch.arange(longest, device=device)
    offset = row[None] - batch.kv_lens[:, None]                                  # [B, L]: node number of a row
    is_node = (offset >= 0) & (offset < num_nodes)
    by_ancestry = tree.ancestors().gather(2, offset.clamp(0, num_nodes - 1)[:, None].expand(-1, num_nodes, -1))
    visible = (offset < 0)[:, None] | (by_ancestry & is_node[:, None])
    read = batch.slots(row[None].expand(len(batch.seqs), -1))
    return RowPlan(as_run(write.reshape(-1)), as_run(read), visible_bias(visible))


def accepted_slots(batch: Batch, verdict: Verdict) -> tuple[Tensor, Tensor]:
    """Slots that accepted rows move from and to: ([M], [M]); only rows that move, in order."""
    order = torch.arange(verdict.path.shape[1], device=verdict.path.device)[None]
    moves = (verdict.path > order)  # an accepted node never lies before its place; padding is -1
    source = batch.slots(batch.kv_lens[:, None] + verdict.path.clamp(min=0))
    destination = batch.slots(batch.kv_lens[:, None] + order)
    return source[moves], destination[moves]


def compact(pool: KVPool, batch: Batch, verdict: Verdict) -> None:
    """Move the accepted rows of every sequence to the front of its scratch rows."""
    source, destination = accepted_slots(batch, verdict)
    if source.numel():
        compact_rows(pool.rows, source, destination)
