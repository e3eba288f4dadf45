"""A norm that is handed to the product that reads what it norms."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kernels import rms_norm


class Norm(NamedTuple):
    """x / rms(x) * weight. Products take one beside x: where they can, they fuse it."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
