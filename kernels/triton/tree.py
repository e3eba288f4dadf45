"""What follows from a tree's shape on the device: which nodes see which, and where accepted rows move.

Both are known there only, and computing them there spares the step a wait.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.errors import require
from kernels.paged import MOST_OWN
from kernels.triton.host import check_contiguous, check_dtype, power_of_two
from kernels.triton.pdl import launch, release, wait

_COLUMNS = 128  # of a row, moved by one program


@triton.jit
def _move(
    rows: tl.tensor,
    path: tl.tensor,
    slots: tl.tensor,
    num_slots: tl.tensor,
    num_nodes: tl.tensor,
    width: tl.constexpr,
    block_nodes: tl.constexpr,
    block: tl.constexpr,
    dependent: tl.constexpr = False,
) -> None:
    """Some columns of one sequence's accepted rows, in one layer, kind and head."""
    release(dependent)
    wait(dependent)
    seq = tl.program_id(1).to(tl.int64)
    order = tl.arange(0, block_nodes)
    column = tl.program_id(2) * block + tl.arange(0, block)
    source = tl.load(path + seq * num_nodes + order, mask=order < num_nodes, other=-1)
    moves = source > order  # an accepted node never lies before its place; padding is -1
    from_slot = tl.load(slots + seq * num_nodes + source, mask=moves, other=0)
    to_slot = tl.load(slots + seq * num_nodes + order, mask=moves, other=0)
    inside = moves[:, None] & (column < width)[None, :]
    base = rows + tl.program_id(0).to(tl.int64) * num_slots * width + column[None, :]
    moved = tl.load(base + from_slot[:, None] * width, mask=inside, other=0.0)
    tl.debug_barrier()  # one row's place is another's source: all are read before any is written
    tl.store(base + to_slot[:, None] * width, moved, mask=inside)


@triton.jit
def _ancestors(
    parents: tl.tensor,
    words: tl.tensor,
    num_nodes: tl.tensor,
    block: tl.constexpr,
    dependent: tl.constexpr = False,
) -> None:
    """One tree: every node walks up to its root, by itself."""
    release(dependent)
    wait(dependent)
    first = tl.program_id(0).to(tl.int64) * num_nodes
    node = tl.arange(0, block)
    is_node = node < num_nodes
    one = tl.full([block], 1, tl.int64)
    word = one << node.to(tl.int64)
    up = tl.load(parents + first + node, mask=is_node, other=-1)
    while tl.max(up, axis=0) >= 0:
        word |= tl.where(up >= 0, one << tl.maximum(up, 0), 0)
        up = tl.load(parents + first + up, mask=up >= 0, other=-1)
    tl.store(words + first + node, word, mask=is_node)


def compact_path(pools: Tensor, path: Tensor, slots: Tensor) -> None:
    """Move the accepted rows of all layers: see ``kernels.paged``."""
    operation = "compact_path"
    require(pools.dim() == 5, operation, f"pools have shape {list(pools.shape)}, expected [L, K, Hkv, S, D]")
    shapes = f"path {list(path.shape)} and slots {list(slots.shape)}, expected the same [B, N]"
    require(path.dim() == 2 and path.shape == slots.shape, operation, shapes)
    check_dtype(operation, "path", path.dtype, (torch.int64,))
    check_dtype(operation, "slots", slots.dtype, (torch.int64,))
    check_contiguous(operation, pools=pools, path=path, slots=slots)
    num_seqs, num_nodes = path.shape
    nodes = f"paths of {num_nodes} nodes, expected at most {MOST_OWN}"
    require(num_nodes <= MOST_OWN, operation, nodes)
    num_slots, width = pools.shape[3:]
    if num_seqs == 0 or num_nodes < 2:
        return
    block = min(power_of_two(width), _COLUMNS)
    _move[(pools.shape[:3].numel(), num_seqs, triton.cdiv(width, block))](
        *(pools, path, slots, num_slots, num_nodes),
        width=width,
        block_nodes=power_of_two(num_nodes),
        block=block,
        num_warps=4,
        **launch(),
    )


def ancestor_words(parents: Tensor) -> Tensor:
    """Which nodes every node of a tree sees: see ``kernels.paged``."""
    operation = "ancestor_words"
    require(parents.dim() == 2, operation, f"parents have shape {list(parents.shape)}, expected [B, N]")
    num_seqs, num_nodes = parents.shape
    require(num_nodes <= MOST_OWN, operation, f"{num_nodes} nodes, expected at most {MOST_OWN}")
    check_dtype(operation, "parents", parents.dtype, (torch.int64,))
    check_contiguous(operation, parents=parents)
    words = torch.empty_like(parents)
    if words.numel():
        _ancestors[(num_seqs,)](
            parents, words, num_nodes, block=power_of_two(num_nodes), num_warps=1, **launch()
        )
    return words
