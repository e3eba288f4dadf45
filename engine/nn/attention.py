"""Grouped-query attention with rotary embeddings over paged KV rows; shared by targets and heads."""

from __future__ import annotations

from torch import Tensor

from engine.kvcache import RowPlan
from engine.nn.linear import Linear
from kernels import rope_write, tree_attention


class Attention:
    """qkv projection (one product), rope, write the new rows, attend, output projection."""

    def __init__(self, qkv: Linear, out: Linear, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        self.qkv, self.out = qkv, out
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = head_dim**-0.5

    def __call__(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor], pool: tuple[Tensor, Tensor], plan: RowPlan
    ) -> Tensor:
        """x: [B, N, input size] -> [B, N, hidden]; K and V of the N nodes are written before they are
        read."""
        num_seqs, num_nodes = x.shape[:2]
        heads = self.qkv(x).view(num_seqs, num_nodes, -1, self.head_dim)
        q = rope_write(heads, self.num_heads, *cos_sin, *pool, plan.write)
        out = tree_attention(q, *pool, plan.read, plan.bias, self.scale)
        return self.out(out.reshape(num_seqs, num_nodes, -1))
