"""Pools of KV rows, and moving the accepted ones to the front.

Example: page size 4, a sequence with pages [7, 2] and kv_len 5 scores a tree of 3 nodes. Node i is written to
row 5 + i, so to slots 2*4 + 1, 2*4 + 2, 2*4 + 3 = 9, 10, 11. After acceptance of nodes 0 and 2, row 7 moves
to row 6 and kv_len becomes 7. What a forward writes and reads is planned in engine.rows.

On a GPU rows may be e4m3, half the bytes of bfloat16, and are stored as they are: keys, values and normed
latents are some units large, well within its 448, and its steps grow with the numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.core import Batch, Verdict
from kernels import MOST_OWN, compact_path, compact_rows


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


def own_slots(batch: Batch, verdict: Verdict) -> Tensor:
    """Slots of the rows that the nodes were written to, [B, N]."""
    return batch.slots(
        batch.kv_lens[:, None] + torch.arange(verdict.path.shape[1], device=verdict.path.device)
    )


def accepted_slots(batch: Batch, verdict: Verdict) -> tuple[Tensor, Tensor]:
    """Slots that accepted rows move from and to: ([M], [M]); only rows that move, in order."""
    order = torch.arange(verdict.path.shape[1], device=verdict.path.device)[None]
    moves = verdict.path > order  # an accepted node never lies before its place; padding is -1
    source = batch.slots(batch.kv_lens[:, None] + verdict.path.clamp(min=0))
    destination = batch.slots(batch.kv_lens[:, None] + order)
    return source[moves], destination[moves]


def compact(pool: KVPool | LatentPool, batch: Batch, verdict: Verdict) -> None:
    """Move the accepted rows of every sequence to the front of its scratch rows."""
    num_nodes = verdict.path.shape[1]
    if verdict.path.device.type != "cpu" and num_nodes <= MOST_OWN:
        compact_path(pool.rows, verdict.path, own_slots(batch, verdict))
    elif verdict.path.device.type != "cpu" or _moves_any(verdict):
        source, destination = accepted_slots(batch, verdict)
        compact_rows(pool.rows, source, destination)


def _moves_any(verdict: Verdict) -> bool:
    """Whether some accepted row does not lie in its place already; asked on the host only."""
    return any(node > place for path in verdict.path.tolist() for place, node in enumerate(path))
