"""RMS norm of rows, alone or behind the addition that ends a residual block. One program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.errors import require
from kernels.triton.host import FLOATS, check_contiguous, check_dtype, power_of_two, rows_of

_WIDEST = 1 << 15  # numbers of a row, all held in registers


@triton.jit
def _norm_rows(
    x: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    delta_stride: tl.tensor,
    eps: tl.tensor,
    width: tl.constexpr,
    block: tl.constexpr,
    adds: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if adds:
        value += tl.load(delta + row * delta_stride + column, mask=inside, other=0.0).to(tl.float32)
        stored = value.to(total.dtype.element_ty)
        tl.store(total + row * width + column, stored, mask=inside)
        value = stored.to(tl.float32)  # what is normed is what the next block adds to
    inverse = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    scaled = value * inverse * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, scaled.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; rows of x may lie apart."""
    rows = _checked("rms_norm", x, weight)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(rows, None, weight, None, out, eps)
    return out


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, rms_norm of it); rows of both may lie apart."""
    rows, added = _checked("add_rms_norm", x, weight), rows_of(delta, "add_rms_norm", "delta")
    shapes = f"delta has shape {list(delta.shape)}, expected x's {list(x.shape)}"
    require(delta.shape == x.shape, "add_rms_norm", shapes)
    check_dtype("add_rms_norm", "delta", delta.dtype, (x.dtype,))
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(rows, added, weight, total, out, eps)
    return total, out


def _checked(operation: str, x: Tensor, weight: Tensor) -> Tensor:
    """The rows of x. Raises UnsupportedError for what the kernel does not take."""
    check_dtype(operation, "x", x.dtype, FLOATS)
    check_dtype(operation, "weight", weight.dtype, FLOATS)
    check_contiguous(operation, weight=weight)
    width = x.shape[-1]
    sizes = f"weight has shape {list(weight.shape)}, expected [{width}]"
    require(weight.shape == (width,), operation, sizes)
    require(0 < width <= _WIDEST, operation, f"rows have {width} numbers, expected 1 to {_WIDEST}")
    return rows_of(x, operation, "x")


def _launch(
    rows: Tensor, delta: Tensor | None, weight: Tensor, total: Tensor | None, out: Tensor, eps: float
) -> None:
    num_rows, width = rows.shape
    if num_rows == 0:
        return
    block = power_of_two(width)
    _norm_rows[(num_rows,)](
        rows,
        delta,
        weight,
        total,
        out,
        rows.stride(0),
        0 if delta is None else delta.stride(0),
        eps,
        width=width,
        block=block,
        adds=delta is not None,
        num_warps=min(max(block // 512, 1), 8),
    )
