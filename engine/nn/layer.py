"""A Llama-style decoder layer, shared by targets and heads.

Where matrices are packed in float16 for a CPU, layers behind one another are one call
(``kernels.cpu_layer``); elsewhere, and for long chunks of prompts, each is its operations one by one. Both
have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.nn.attention import Attention
from engine.nn.mlp import SwiGLU
from engine.rows import RowPlan
from kernels import FusedStack, LayerSizes, add_rms_norm, fused_layer, rms_norm


class DecoderLayer:
    """x + attention(norm x), then that + mlp(norm of that).

    input_norm: None if attention always reads something else.
    """

    def __init__(
        self, input_norm: Tensor | None, attention: Attention, post_norm: Tensor, mlp: SwiGLU, eps: float
    ) -> None:
        self.input_norm, self.attention, self.post_norm, self.mlp = input_norm, attention, post_norm, mlp
        self.eps = eps
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
        if given is None:
            assert self.input_norm is not None
            given = rms_norm(x, self.input_norm, self.eps)
        attended = self.attention(given, rotation, pool, plan)
        x, normed = add_rms_norm(x, attended, self.post_norm, self.eps)
        return x + self.mlp(normed)


class LayerStack:
    """Layers behind one another, and their rows of the pool."""

    def __init__(self, layers: Sequence[DecoderLayer], pools: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._layers, self._pools = tuple(layers), tuple(pools)
        fused = [layer.fused for layer in layers if layer.fused is not None]
        self._fused = FusedStack(fused, pools) if fused and len(fused) == len(layers) else None

    def __call__(self, x: Tensor, rotation: tuple[Tensor, Tensor], plan: RowPlan) -> Tensor:
        """x: [T, H] -> [T, H]."""
        if self._fused is not None:
            rows = plan.for_layers(self._fused.first, rotation, self._pools[0])
            if rows is not None:
                return self._fused(x, rows)
        for layer, pool in zip(self._layers, self._pools, strict=True):
            x = layer(x, rotation, pool, plan)
        return x
