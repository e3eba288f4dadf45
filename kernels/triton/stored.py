"""What kernels ask of a stored matrix and its activations, and the arguments that they make of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from kernels.errors import require
from kernels.stored import Stored
from kernels.triton.host import FP8, INTERPRETED, check_contiguous, check_dtype
from kernels.triton.tiles import Kind

_PAIRS = {torch.bfloat16: torch.int32, torch.float32: torch.int64}  # what two of them are
_LARGEST = 1 << 31  # numbers of one matrix: columns and rows of it are counted in 32 bits


@dataclass(frozen=True, slots=True)
class Operands:
    """Arguments of ``kernels.triton.product.multiply`` that follow from the weight; ``kind`` of the table."""

    kind: Kind
    nvfp4: bool
    rounded: bool
    dtype: torch.dtype  # of activations

    @property
    def operand(self) -> Any:
        """What is multiplied; the interpreter is wrong in bfloat16."""
        return tl.float32 if INTERPRETED or self.dtype == torch.float32 else tl.bfloat16

    def seen(self, x: Tensor | None) -> Tensor | None:
        """Activations or a norm's weight as the product reads them: two at a time for NVFP4."""
        return x.view(_PAIRS[self.dtype]) if x is not None and self.nvfp4 else x

    def codes(self, weight: Stored) -> Tensor:
        """A weight's codes as the product reads them: NVFP4's by 32-bit words."""
        return weight.codes.view(torch.int32) if self.nvfp4 else weight.codes

    @property
    def word(self) -> int:
        """Activations to a word that is read."""
        return 2 if self.nvfp4 else 1


def check_stored(operation: str, weight: Stored, dims: int, dtype: torch.dtype) -> Operands:
    """Raises Unsupported for a weight that no kernel multiplies. dims: 2 for a matrix, 3 for a stack; dtype:
    of the activations."""
    check_dtype(operation, "x", dtype, tuple(_PAIRS))
    codes, scale, blocks, inputs = weight.codes, weight.scale, weight.block_scales, weight.input_scale
    check_contiguous(operation, codes=codes, scale=scale, block_scales=blocks, input_scale=inputs)
    shape = f"the weight has shape {list(weight.shape)}, expected {dims} dimensions"
    require(len(weight.shape) == dims, operation, shape)
    num_rows, width = weight.shape[-2:]
    sizes = f"the weight is {num_rows} x {width}, expected multiples of 16 and 32"
    require(num_rows > 0 and width > 0 and num_rows % 16 == 0 and width % 32 == 0, operation, sizes)
    require(
        num_rows * width < _LARGEST, operation, f"the weight is {num_rows} x {width}, expected less than 2^31"
    )
    if blocks is not None:
        check_dtype(operation, "codes", codes.dtype, (torch.uint8,))
        check_dtype(operation, "block_scales", blocks.dtype, (FP8,))
        found = f"block_scales have shape {list(blocks.shape)} for a weight of {list(weight.shape)}"
        require(blocks.shape == (*weight.shape[:-1], width // 16), operation, found)
    elif scale is not None:
        check_dtype(operation, "codes", codes.dtype, (FP8,))
    else:
        check_dtype(operation, "weight", codes.dtype, (dtype,))
    if scale is None:
        require(blocks is None, operation, "an NVFP4 weight has no divisor")
    else:
        check_dtype(operation, "scale", scale.dtype, (torch.float32,))
        groups = scale.shape[-1] if scale.dim() else 0
        stack = list(weight.shape[:-2])
        found = f"scale has shape {list(scale.shape)}, expected {stack} and groups of {num_rows} rows"
        fits = scale.shape[:-1] == weight.shape[:-2] and groups > 0 and num_rows % groups == 0
        require(fits, operation, found)
    if inputs is not None:
        require(
            weight.kind == "fp8", operation, f"a {weight.kind} weight has an input scale, expected fp8 alone"
        )
        check_dtype(operation, "input_scale", inputs.dtype, (torch.float32,))
        found = f"input_scale has shape {list(inputs.shape)}, expected {list(weight.shape[:-2])}"
        require(inputs.shape == weight.shape[:-2], operation, found)
    kind: Kind = "nvfp4" if blocks is not None else "plain" if scale is None else "fp8"
    return Operands("e4m3" if inputs is not None else kind, blocks is not None, inputs is not None, dtype)


def check_rows(operation: str, name: str, x: Tensor, width: int, dtype: torch.dtype) -> None:
    """Raises Unsupported unless x is contiguous rows [T, width] of a dtype."""
    check_row_shape(operation, name, x, width, dtype)
    check_contiguous(operation, **{name: x})


def check_row_shape(operation: str, name: str, x: Tensor, width: int, dtype: torch.dtype) -> None:
    """Raises Unsupported unless x is rows [T, width] of a dtype, each of them contiguous."""
    check_dtype(operation, name, x.dtype, (dtype,))
    found = f"{name} has shape {list(x.shape)}, expected [tokens, {width}]"
    require(x.dim() == 2 and x.shape[1] == width, operation, found)
    strides = f"{name} has strides {list(x.stride())}, expected rows of contiguous numbers"
    require(x.stride(1) == 1 or width == 1, operation, strides)


def check_norm(operation: str, norm: Tensor | None, width: int, dtype: torch.dtype) -> None:
    """Raises Unsupported unless a norm's weight is [width] of a dtype."""
    if norm is not None:
        check_dtype(operation, "norm", norm.dtype, (dtype,))
        found = f"norm has shape {list(norm.shape)}, expected [{width}]"
        require(norm.shape == (width,), operation, found)
        check_contiguous(operation, norm=norm)
