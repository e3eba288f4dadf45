"""Grouped-query attention with rotary embeddings over paged KV rows; shared by targets and heads."""

from __future__ import annotations

from torch import Tensor

from engine.nn.linear import Linear
from engine.nn.norm import Norm
from engine.rows import Part, RowPlan
from kernels import mha_tree_attention, rope_write, tree_attention


class Attention:
    """qkv projection (one product), rope, write the new rows, attend, output projection."""

    def __init__(self, qkv: Linear, out: Linear, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        self.qkv, self.out = qkv, out
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = head_dim**-0.5

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None,
        residual: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        pool: tuple[Tensor, Tensor],
        plan: RowPlan,
    ) -> Tensor:
        """residual + attention of (x, normed). x: [T, input size]; residual: [T, hidden] -> the same. K and V
        of all rows are written before they are read."""
        heads = self.qkv(x, norm).view(len(x), -1, self.head_dim)
        q = rope_write(heads, self.num_heads, *cos_sin, *pool, plan.write)

        def attention(q: Tensor, part: Part) -> Tensor:
            if part.tree is not None:
                return mha_tree_attention(q, *pool, part.tree, self.scale)
            return tree_attention(q, *pool, part.read, part.bias, self.scale)

        return self.out(plan.attend(q, attention), residual=residual)
