"""A Llama-style decoder layer, shared by targets and heads.

Where its matrices are packed in float16 for a CPU, a whole layer is one call (``kernels.cpu_layer``);
elsewhere, and for long chunks of prompts, it is its operations one by one. Both have the same bits.
"""

from __future__ import annotations

from torch import Tensor

from engine.nn.attention import Attention
from engine.nn.mlp import SwiGLU
from engine.nn.norm import Norm
from engine.rows import RowPlan
from kernels import LayerSizes, fused_layer


class DecoderLayer:
    """x + attention(norm x), then that + mlp(norm of that).

    input_norm: None if attention always reads something else.
    """

    def __init__(
        self, input_norm: Tensor | None, attention: Attention, post_norm: Tensor, mlp: SwiGLU, eps: float
    ) -> None:
        self.attention, self.mlp = attention, mlp
        self.input_norm = None if input_norm is None else Norm(input_norm, eps)
        self.post_norm = Norm(post_norm, eps)
        sizes = LayerSizes(
            len(post_norm),
            attention.num_heads,
            attention.num_kv_heads,
            attention.head_dim,
            mlp.down.in_features,
        )
        matrices = (attention.qkv, attention.out, mlp.gate_up, mlp.down)
        self.fused = fused_layer(
            (input_norm, post_norm), [linear.packed for linear in matrices], sizes, eps, attention.scale
        )

    def __call__(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        pool: tuple[Tensor, Tensor],
        plan: RowPlan,
        given: Tensor | None = None,
    ) -> Tensor:
        """x: [T, H] -> [T, H]; given: [T, in] what attention reads instead of norm x."""
        if self.fused is not None:
            rows = plan.for_layers(self.fused, rotation, pool)
            if rows is not None:
                return self.fused(x, pool, rows, given)
        given, norm = (x, self.input_norm) if given is None else (given, None)
        x = self.attention(given, norm, x, rotation, pool, plan)
        return self.mlp(x, self.post_norm, residual=x)
