"""Whether a GPU's kernels are launched dependently, a switch for whoever launches a chain of them.

Ordinarily no program of a kernel begins before the last one of the kernel before it has ended. With
programmatic dependent launch (PDL, from sm_90 on) they are there earlier, and fetch weights meanwhile; see
``kernels.triton.pdl`` for what kernels must do then.

An operation has no argument for it: its result is the same, and what matters is the neighbour of its launch.
The switch belongs to the thread that launches, and to nobody else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

import torch

LEAST_CAPABILITY: Final = (9, 0)  # of a GPU that launches dependently

_DEPENDENT: ContextVar[bool] = ContextVar("dependent launches", default=False)


@contextmanager
def dependent_launches(on: bool = True) -> Iterator[None]:
    """Kernels called meanwhile are launched dependently, or not.

    Weights must have been written before the chain began: by a kernel that is not the last before it.
    """
    token = _DEPENDENT.set(on)
    try:
        yield
    finally:
        _DEPENDENT.reset(token)


def are_dependent() -> bool:
    """Whether a kernel that is called now is."""
    return _DEPENDENT.get()


def can_be_dependent(device: str) -> bool:
    """Whether a device launches dependently."""
    if torch.device(device).type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
