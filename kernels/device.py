"""Where tensors lie, and the kernels that are registered for GPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.ops import OPERATIONS


def on_gpu(x: Tensor) -> bool:
    """Whether a tensor lies on a GPU and needs no gradient, which no kernel there has."""
    return x.is_cuda and not (x.requires_grad and torch.is_grad_enabled())


@functools.cache
def registered(name: str) -> Callable[..., Any]:
    """The kernel of a registered operation. The first one imports triton."""
    (operation,) = (operation for operation in OPERATIONS if operation.name == name)
    return operation.load()
