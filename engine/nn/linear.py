"""One Linear with a scheme: how the weight is stored and multiplied.

dense    any dtype and device, ``F.linear``
packed   CPU: the weight reordered once for oneDNN
int8     CPU, drafts only: a quarter of the bytes, approximate
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import int8_linear, pack_int8, pack_linear, packed_linear

# Rows that a speculative step usually has: the hint for the packed layout.
_TYPICAL_ROWS = 8


class Linear:
    """y = x @ weight.T, without bias. weight: [out, in].

    approximate: the product may be rounded for speed. For drafts, whose guesses are verified; never for a
    target.
    """

    def __init__(self, weight: Tensor, *, approximate: bool = False) -> None:
        self.out_features, self.in_features = weight.shape
        self.int8: Any | None = pack_int8(weight) if approximate else None
        self.packed = pack_linear(weight, _TYPICAL_ROWS) if self.int8 is None else None
        # The packed copy replaces the plain one: two copies would double the memory of a CPU server.
        self.weight: Tensor | None = None if self.scheme != "dense" else weight

    @property
    def scheme(self) -> str:
        if self.int8 is not None:
            return "int8"
        return "dense" if self.packed is None else "packed"

    def __call__(self, x: Tensor) -> Tensor:
        if self.int8 is not None:
            return int8_linear(x, self.int8)
        if self.packed is not None:
            return packed_linear(x, self.packed)
        assert self.weight is not None
        return F.linear(x, self.weight)


def fuse(*weights: Tensor, approximate: bool = False) -> Linear:
    """One Linear for several weights that read the same input: fewer, larger products."""
    return Linear(torch.cat(weights, dim=0), approximate=approximate)
