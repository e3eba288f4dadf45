"""RMS norm of rows. One program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.errors import require
from kernels.triton.host import FLOATS, check_contiguous, check_dtype, power_of_two, rows_of
from kernels.triton.pdl import launch, release, wait

_WIDEST = 1 << 15  # numbers of a row, all held in registers


@triton.jit
def _norm_rows(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    width: tl.constexpr,
    block: tl.constexpr,
    dependent: tl.constexpr = False,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    release(dependent)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wait(dependent)
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    tl.store(out + row * width + column, (value * inverse * factor).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; rows of x may lie apart."""
    operation, width = "rms_norm", x.shape[-1]
    check_dtype(operation, "x", x.dtype, FLOATS)
    check_dtype(operation, "weight", weight.dtype, FLOATS)
    check_contiguous(operation, weight=weight)
    sizes = f"weight has shape {list(weight.shape)}, expected [{width}]"
    require(weight.shape == (width,), operation, sizes)
    require(0 < width <= _WIDEST, operation, f"rows have {width} numbers, expected 1 to {_WIDEST}")
    rows = rows_of(x, operation, "x")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(rows):
        block = power_of_two(width)
        _norm_rows[(len(rows),)](
            *(rows, weight, out, rows.stride(0), eps),
            width=width,
            block=block,
            num_warps=min(max(block // 512, 1), 8),
            **launch(),
        )
    return out
