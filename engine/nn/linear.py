"""One Linear with a scheme: how the weight is stored and multiplied.

dense    any dtype and device, ``F.linear``
packed   CPU: the weight reordered once for oneDNN
half     CPU without bfloat16 units: float16 weight, float32 everything else; half the bytes of float32
int8     CPU, drafts only: a quarter of the bytes, approximate
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import half_linear, int8_linear, pack_half, pack_int8, pack_linear, packed_linear

# Rows that a speculative step usually has: the hint for the packed layout.
_TYPICAL_ROWS = 8


class Linear:
    """y = x @ weight.T, without bias. weight: [out, in].

    half: round the weight to float16 where the device then multiplies it faster; elsewhere without effect.
    approximate: the product may be rounded for speed. For drafts, whose guesses are verified; never for a
    target.
    """

    def __init__(self, weight: Tensor, *, half: bool = False, approximate: bool = False) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight: Tensor | None = None
        self._packed: Any | None = None
        for scheme, multiply, packed in _schemes(weight, half, approximate):
            if packed is not None:  # it replaces the weight: two copies would double a CPU server's memory
                self.scheme, self._multiply, self._packed = scheme, multiply, packed
                return
        self.scheme, self.weight = "dense", weight

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x, self._packed) if self.weight is None else F.linear(x, self.weight)


def _schemes(
    weight: Tensor, half: bool, approximate: bool
) -> Iterator[tuple[str, Callable[[Tensor, Any], Tensor], Any | None]]:
    """(name, product, packed weight or None) of what is worth trying, best first; packed when asked for."""
    if approximate:
        yield "int8", int8_linear, pack_int8(weight)
    if half:
        yield "half", half_linear, pack_half(weight)
    yield "packed", packed_linear, pack_linear(weight, _TYPICAL_ROWS)


def fuse(*weights: Tensor, half: bool = False, approximate: bool = False) -> Linear:
    """One Linear for several weights that read the same input: fewer, larger products."""
    return Linear(torch.cat(weights, dim=0), half=half, approximate=approximate)
