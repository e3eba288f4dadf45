"""Mixture of experts with a few experts per token, chosen by a softmax router, and a shared expert.

    y = sum over the chosen e of weight_e * expert_e(x)  +  shared(x)

Experts are SwiGLU blocks whose weights are stacked, as the checkpoint stores them, quantised or not. A shared
expert is one more behind the routed ones, that every token takes with weight 1; three operations do the
whole (``kernels.moe``), and an expert that several tokens chose is read once, one that none chose never.
"""

from __future__ import annotations

from torch import Tensor

from engine.nn.mlp import SwiGLU
from engine.nn.norm import Norm
from kernels import Stored, down, gate_up, route
from kernels.moe import tile_tokens_for


class MixtureOfExperts:
    """gate: [E, H], of the router, which decides in float32; gate_up: [E + S, 2 I, H], of every expert gate's
    rows above up's; down: [E + S, H, I]; S of them are shared.

    scale: what a token's weights sum to; apart: a shared expert that is not in the stacks, because it is
    stored in another way.
    """

    def __init__(
        self,
        gate: Tensor,
        gate_up: Stored,
        down: Stored,
        num_chosen: int,
        scale: float,
        apart: SwiGLU | None = None,
    ) -> None:
        self.gate, self.gate_up, self.down, self.apart = gate, gate_up, down, apart
        self.num_chosen, self.scale = num_chosen, scale
        self.num_shared = gate_up.shape[0] - len(gate)

    def __call__(self, x: Tensor, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        """residual + mixture of (x, normed); x: [T, H] -> the same shape and dtype."""
        if self.apart is not None:
            residual = self.apart(x, norm, residual)
        weight, eps = (None, 0.0) if norm is None else norm
        tile = tile_tokens_for(len(x))
        routing = route(x, self.gate, self.num_chosen, self.scale, self.num_shared, weight, eps, tile)
        inner = gate_up(x, self.gate_up, routing, weight, eps, tile)
        return down(inner, self.down, routing, residual, tile)
