"""What all kernels do on the host: ask whether they run at all, look at their arguments, pick a tile."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from kernels.errors import require

# Triton reads TRITON_INTERPRET when a kernel is decorated, so importing this module settles it.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn


def rows_of(x: Tensor, operation: str, name: str) -> Tensor:
    """x [.., W] as rows [n, W] one stride apart, without a copy. Raises UnsupportedError where they do not
    lie so."""
    require(x.dim() >= 2, operation, f"{name} has shape {list(x.shape)}, expected rows [.., width]")
    require(x.stride(-1) == 1, operation, f"{name} has rows of stride {x.stride(-1)}, expected 1")
    if x.dim() == 2:
        return x
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        strides = f"strides {list(x.stride())} of shape {list(x.shape)}"
        require(False, operation, f"{name} has {strides}, expected rows one stride apart")
        raise


def check_contiguous(operation: str, **tensors: Tensor | None) -> None:
    """Raises UnsupportedError for a tensor whose numbers do not lie side by side."""
    for name, tensor in tensors.items():
        if tensor is not None:
            strides = f"strides {list(tensor.stride())} of shape {list(tensor.shape)}"
            require(tensor.is_contiguous(), operation, f"{name} has {strides}, expected a contiguous tensor")


def check_shape(operation: str, expected: tuple[int, ...], **tensors: Tensor | None) -> None:
    """Raises UnsupportedError for a tensor of another shape."""
    for name, tensor in tensors.items():
        if tensor is not None:
            found = f"{name} has shape {list(tensor.shape)}, expected {list(expected)}"
            require(tensor.shape == expected, operation, found)


def check_dtype(operation: str, name: str, found: torch.dtype, expected: tuple[torch.dtype, ...]) -> None:
    """Raises UnsupportedError for a dtype that is not among those expected."""
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in expected)
    require(found in expected, operation, f"{name} is {str(found).removeprefix('torch.')}, expected {names}")


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; of none at hand, as many as an H100 has."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def power_of_two(number: int) -> int:
    """The least power of two that is not below a number."""
    return 1 << max(number - 1, 0).bit_length()
