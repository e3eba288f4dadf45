"""Where tensors lie, and the kernels that are registered for GPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from kernels.ops import OPERATIONS

P = ParamSpec("P")
R = TypeVar("R")


def on_gpu(x: Tensor) -> bool:
    """Whether a tensor lies on a GPU and needs no gradient, which no kernel there has."""
    return x.is_cuda and not (x.requires_grad and torch.is_grad_enabled())


@functools.cache
def registered(name: str) -> Callable[..., Any]:
    """The kernel of a registered operation. The first one imports triton."""
    (operation,) = (operation for operation in OPERATIONS if operation.name == name)
    return operation.load()


def with_kernel(
    reference: Callable[P, R], takes: Callable[[Tensor], bool] = lambda first: True
) -> Callable[P, R]:
    """The operation that a reference specifies: by the kernel registered under its name where its first
    argument lies on a GPU and the kernel ``takes`` that, else by the reference itself."""

    @functools.wraps(reference)
    def operation(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        if not (on_gpu(first) and takes(first)):
            return reference(*args, **kwargs)
        result: R = registered(reference.__name__)(*args, **kwargs)
        return result

    return operation
