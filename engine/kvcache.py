"""Pools of KV rows, and the plan of where one forward writes and reads them.

Example: page size 4, a sequence with pages [7, 2] and kv_len 5 scores a tree of 3 nodes. Node i is written to
row 5 + i, so to slots 2*4 + 1, 2*4 + 2, 2*4 + 3 = 9, 10, 11. It reads rows 0..7, slots 28..31 and 8..11,
where the last three are masked by ancestry. After acceptance of nodes 0 and 2, row 7 moves to row 6 and
kv_len becomes 7.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.core import Batch, DraftTree, Verdict
from kernels import compact_rows


class KVPool:
    """The K and V rows of one model: ``rows[layer, 0 or 1]`` is a pool [Hkv, S, D]."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_slots: int,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.rows = torch.zeros(num_layers, 2, num_kv_heads, num_slots, head_dim, dtype=dtype, device=device)
        self._layers = [
            (rows[0], rows[1]) for rows in self.rows
        ]  # views, made once: a step asks for them all

    @staticmethod
    def bytes_per_slot(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return num_layers * 2 * num_kv_heads * head_dim * dtype.itemsize

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self._layers[index]


class LatentPool:
    """The rows of multi-head latent attention: one per token and layer, which is key and value of all heads.

    ``rows`` is [layers, 1, 1, S, D], a KVPool's layout with one kind of row and one head, so that rows of
    both pools are moved by the same operation.
    """

    def __init__(
        self, num_layers: int, latent_dim: int, num_slots: int, dtype: torch.dtype, device: str
    ) -> None:
        self.rows = torch.zeros(num_layers, 1, 1, num_slots, latent_dim, dtype=dtype, device=device)

    @staticmethod
    def bytes_per_slot(num_layers: int, latent_dim: int, dtype: torch.dtype) -> int:
        return num_layers * latent_dim * dtype.itemsize

    def layer(self, index: int) -> Tensor:
        """[S, D], contiguous."""
        return self.rows[index, 0, 0]


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Made once per forward, used by every layer.

    write: [B * N] slots, or a slice; read: [B, L] slots, or one slice per sequence; bias: [B, N, L] of 0 and
    -inf, or None where every node sees every row it reads.
    """

    write: Tensor | slice
    read: Tensor | tuple[slice, ...]
    bias: Tensor | None


def make_plan(write: Tensor, read: Tensor, read_lens: list[int], visible: Tensor) -> RowPlan:
    """The plan of one forward.

    write: [B, N] slots; read: [B, L] slots, of which the first read_lens[b] concern sequence b; visible: [B,
    N, L] bool. On a CPU, runs of consecutive slots become slices and an all-visible mask is dropped; a device
    is never waited for.
    """
    flat = write.reshape(-1)
    if write.device.type != "cpu":
        return RowPlan(flat, read, _bias(visible))
    slots = read.numpy()
    lens = np.array(read_lens)
    rows = np.arange(len(lens))
    # Pages ascend within a run only, so slots are consecutive exactly if every step between neighbours is
    # one.
    steps_ok = (np.diff(slots, axis=1) == 1) | (np.arange(1, slots.shape[1])[None] >= lens[:, None])
    runs: Tensor | tuple[slice, ...] = read
    if steps_ok.all():
        firsts = slots[rows, 0]
        runs = tuple(
            slice(int(first), int(first) + length) for first, length in zip(firsts, read_lens, strict=True)
        )
    inside = torch.arange(read.shape[1])[None] < torch.from_numpy(lens)[:, None]
    needed = visible if isinstance(runs, Tensor) else visible | ~inside[:, None]
    bias = None if bool(needed.all()) else _bias(visible)
    written = flat.numpy()
    if len(written) == 1 or (np.diff(written) == 1).all():
        return RowPlan(slice(int(written[0]), int(written[0]) + len(written)), runs, bias)
    return RowPlan(flat, runs, bias)


def _bias(visible: Tensor) -> Tensor:
    """[B, N, L] bool -> additive float32 mask."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, float("-inf"))


def first_slot(pages: list[int], page_size: int) -> int | None:
    """Where row 0 of a sequence lies if its pages are consecutive, as they usually are, else None."""
    if not pages or pages != list(range(pages[0], pages[0] + len(pages))):
        return None
    return pages[0] * page_size


def tree_bias(parents: list[int], kv_len: int) -> Tensor:
    """Mask of nodes that see ``kv_len`` rows and, behind them, themselves and their ancestors.

    parents: of every node, -1 for none. Returns [1, N, kv_len + N] of 0 and -inf.
    """
    num_nodes = len(parents)
    hidden = [[float("-inf")] * num_nodes]  # of "no parent"
    for node, parent in enumerate(parents):
        own = hidden[parent + 1].copy()
        own[node] = 0.0
        hidden.append(own)
    bias = torch.zeros(1, num_nodes, kv_len + num_nodes)
    bias[0, :, kv_len:] = torch.tensor(hidden[1:])
    return bias


def _plan_of_one(batch: Batch, tree: DraftTree) -> RowPlan | None:
    """The plan for a single sequence on a CPU whose rows lie side by side, made without tensor arithmetic."""
    if len(batch.seqs) != 1 or batch.prompt is not None or tree.tokens.device.type != "cpu":
        return None
    seq, num_nodes = batch.seqs[0], tree.tokens.shape[1]
    start = first_slot(seq.pages, batch.page_size)
    if start is None or num_nodes > len(seq.pages) * batch.page_size - seq.kv_len:
        return None
    end = start + seq.kv_len + num_nodes
    bias = None if num_nodes == 1 else tree_bias(tree.parents[0].tolist(), seq.kv_len)
    return RowPlan(slice(end - num_nodes, end), (slice(start, end),), bias)


def plan_rows(batch: Batch, tree: DraftTree) -> RowPlan:
    """Where the nodes of a tree are written, and what each of them reads: the committed rows and its
    ancestors."""
    plan = _plan_of_one(batch, tree)
    if plan is not None:
        return plan
    num_nodes = tree.tokens.shape[1]
    device = tree.tokens.device
    node = torch.arange(num_nodes, device=device)
    rows = batch.kv_lens[:, None] + node
    write = torch.where(
        tree.real(), batch.slots(rows), node % batch.page_size
    )  # padding goes to the dummy page
    read_lens = [seq.kv_len + num_nodes for seq in batch.seqs]
    row = torch.arange(max(read_lens), device=device)
    offset = row[None] - batch.kv_lens[:, None]  # [B, L]: which node a row belongs to
    if batch.prompt is not None:  # a chain of hundreds of nodes: ancestry is order
        visible = offset[:, None] <= node[:, None]
    else:
        is_node = (offset >= 0) & (offset < num_nodes)
        of_node = offset.clamp(0, num_nodes - 1)[:, None].expand(-1, num_nodes, -1)
        visible = (offset < 0)[:, None] | (tree.ancestors().gather(2, of_node) & is_node[:, None])
    return make_plan(write, batch.slots(row[None].expand(len(batch.seqs), -1)), read_lens, visible)


def accepted_slots(batch: Batch, verdict: Verdict) -> tuple[Tensor, Tensor]:
    """Slots that accepted rows move from and to: ([M], [M]); only rows that move, in order."""
    order = torch.arange(verdict.path.shape[1], device=verdict.path.device)[None]
    moves = verdict.path > order  # an accepted node never lies before its place; padding is -1
    source = batch.slots(batch.kv_lens[:, None] + verdict.path.clamp(min=0))
    destination = batch.slots(batch.kv_lens[:, None] + order)
    return source[moves], destination[moves]


def compact(pool: KVPool | LatentPool, batch: Batch, verdict: Verdict) -> None:
    """Move the accepted rows of every sequence to the front of its scratch rows."""
    source, destination = accepted_slots(batch, verdict)
    if source.numel():
        compact_rows(pool.rows, source, destination)
