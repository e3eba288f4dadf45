"""What the registry says of an operation.

    Operation    a name, the plain torch function that specifies it, the kernel that must agree with it
      Case       one shape of its arguments: how to make them, and how close the two have to come
        Source   where arguments come from: fresh random tensors of one device
      Cost       the least an operation has to move and compute, from its arguments

Tests run ``tiny`` cases in Triton's interpreter and ``real`` ones on a GPU; ``perf.kernels`` times the real
ones, and ``perf.compile`` compiles them for GPUs that nobody has at hand.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Arguments = tuple[Any, ...]


class Source:
    """Fresh random tensors on one device, the same for the same seed and kind of device.

    On the device ``meta`` a tensor is its shape and type alone, which is all that a compiler looks at.
    """

    def __init__(self, device: str | torch.device, seed: int = 0) -> None:
        self.device = torch.device(device)
        self._generator = None
        if self.device.type != "meta":
            self._generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Normally distributed with a standard deviation of ``scale``, rounded to ``dtype`` (FP8 too)."""
        drawn = torch.randn(shape, device=self.device, generator=self._generator)
        return drawn.mul_(scale).to(dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """In [0, 1)."""
        return torch.rand(shape, device=self.device, generator=self._generator).to(dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """In [low, high)."""
        return torch.randint(low, high, shape, device=self.device, generator=self._generator, dtype=dtype)

    def permutation(self, num: int) -> Tensor:
        """0 .. num - 1 in any order, [num] int64."""
        if self._generator is None:
            return torch.empty(num, dtype=torch.int64, device=self.device)
        return torch.randperm(num, device=self.device, generator=self._generator)

    def tensor(self, values: Sequence[Any], dtype: torch.dtype = torch.int64) -> Tensor:
        """Numbers that are not random."""
        return torch.tensor(values, dtype=dtype).to(self.device)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a kernel may be from its reference: as ``torch.testing.assert_close`` takes it."""

    atol: float
    rtol: float


EXACT = Tolerance(0.0, 0.0)
FLOAT32 = Tolerance(1e-5, 1e-5)
BFLOAT16 = Tolerance(2e-2, 2e-2)


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of an operation's arguments.

    wgmma: names of jitted functions whose matrix products must run on a whole warp group's matrix unit
    (wgmma on sm_90, tcgen05 on sm_100) at this shape; a compiler falls back to something slower silently.
    """

    name: str
    make: Callable[[Source], Arguments]
    tolerance: Tolerance
    wgmma: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cost:
    """The least that must be moved through a GPU's memory, and computed. flops: of matrix products alone."""

    num_bytes: int
    flops: int = 0


class CostOf(Protocol):
    def __call__(self, *arguments: Any) -> Cost: ...


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation with a kernel.

    reference: what it means, in plain torch. kernel: ``module:function`` within ``kernels.triton``, of the
    same signature. changes: indices of arguments that it writes to, besides what it returns. cost: from the
    arguments; only of real ones, whose values it may look at.
    """

    name: str
    reference: Callable[..., Any]
    kernel: str
    tiny: tuple[Case, ...]
    real: tuple[Case, ...]
    cost: CostOf
    changes: tuple[int, ...] = ()

    def load(self) -> Callable[..., Any]:
        """The kernel; imports triton."""
        module, _, function = self.kernel.partition(":")
        loaded: Callable[..., Any] = getattr(importlib.import_module(f"kernels.triton.{module}"), function)
        return loaded


def size_of(*tensors: Tensor | None) -> int:
    """Bytes of tensors that are read or written once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
