"""The SwiGLU feed-forward block."""

from __future__ import annotations

from torch import Tensor

from engine.nn.linear import Linear
from engine.nn.norm import Norm
from kernels import silu_mul


class SwiGLU:
    """down(silu(gate x) * up x), gate and up in one product."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up, self.down = gate_up, down

    def __call__(self, x: Tensor, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        """residual + block of (x, normed); x: [T, H] -> the same."""
        return self.down(silu_mul(self.gate_up(x, norm)), residual=residual)
