"""What the tests of the compiled CPU kernels share: who can run them, and numbers for them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import cpu

needs_compiler = pytest.mark.skipif(cpu.kernels_for(torch.float32) is None, reason="no C compiler")
needs_panels = pytest.mark.skipif(
    cpu.panel_kernels() is None, reason="no C compiler with OpenMP, or no float16"
)


@dataclass(frozen=True)
class Part:
    """A ``cpu_layer.Part``."""

    num_seqs: int
    num_nodes: int
    read: Tensor | tuple[slice, ...]
    bias: Tensor | None


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> None:
    """Whether a result is that of float32 arithmetic on the same numbers, rounded once to its own dtype.

    expected: computed by the reference in float32.
    """
    step = torch.finfo(found.dtype).eps if found.dtype != torch.float32 else 4e-6
    torch.testing.assert_close(found.float(), expected, rtol=step, atol=step)


def rotation(num_nodes: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angles = normal(1, num_nodes, 1, head_dim // 2, seed=5)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
