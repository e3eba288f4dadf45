"""SwiGLU's elementwise part, for dense MLPs, whose gate and up are one product. One program a piece of a row.

In experts it is the end of the product instead (``kernels.triton.experts``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.errors import require
from kernels.triton.host import FLOATS, check_dtype, power_of_two, rows_of
from kernels.triton.pdl import launch, release, wait

_COLUMNS = 1024  # of a row, by one program at most


@triton.jit
def _silu_mul(
    gate_up: tl.tensor,
    out: tl.tensor,
    stride: tl.tensor,
    inner: tl.tensor,
    block: tl.constexpr,
    dependent: tl.constexpr = False,
) -> None:
    release(dependent)
    wait(dependent)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < inner
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + inner + column, mask=inside, other=0.0).to(tl.float32)
    activated = gate * tl.sigmoid(gate) * up
    tl.store(out + row * inner + column, activated.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [.., 2I] holding gate then up: see ``kernels.ref.silu_mul``. Rounded once."""
    operation, width = "silu_mul", gate_up.shape[-1]
    check_dtype(operation, "gate_up", gate_up.dtype, FLOATS)
    require(width % 2 == 0, operation, f"gate_up has {width} columns, expected an even number")
    rows, inner = rows_of(gate_up, operation, "gate_up"), width // 2
    out = torch.empty(*gate_up.shape[:-1], inner, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(power_of_two(inner), _COLUMNS)
        _silu_mul[len(rows), triton.cdiv(inner, block)](
            *(rows, out, rows.stride(0), inner), block=block, num_warps=max(block // 256, 1), **launch()
        )
    return out
