"""One Linear with a scheme: how the weight is stored and multiplied.

Schemes today: ``dense`` (any dtype, ``F.linear``) and ``packed`` (CPU, the weight reordered once for oneDNN).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import pack_linear, packed_linear

# Rows that a speculative step usually has: the hint for the packed layout.
_TYPICAL_ROWS = 8


class Linear:
    """y = x @ weight.T, without bias. weight: [out, in]."""

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self.packed = pack_linear(weight, _TYPICAL_ROWS)
        # The packed copy replaces the plain one: two copies would double the memory of a CPU server.
        self.weight: Tensor | None = None if self.packed is not None else weight

    @property
    def scheme(self) -> str:
        return "dense" if self.packed is None else "packed"

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return packed_linear(x, self.packed)
        assert self.weight is not None
        return F.linear(x, self.weight)


def fuse(*weights: Tensor) -> Linear:
    """One Linear for several weights that read the same input: fewer, larger products."""
    return Linear(torch.cat(weights, dim=0))
