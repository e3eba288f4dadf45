"""The SwiGLU feed-forward block."""

from __future__ import annotations

from torch import Tensor

from engine.nn.linear import Linear
from kernels import silu_mul


class SwiGLU:
    """down(silu(gate x) * up x), gate and up in one product."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up, self.down = gate_up, down

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(silu_mul(self.gate_up(x)))
