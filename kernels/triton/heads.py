"""Products of every head with its own small matrix: into the latent space of MLA, and out of it.

A program takes some columns of one head's matrix, all of its depth at once, and a tile of tokens. The numbers
of a query that stay what they are, its rotated ones, are carried over in the same launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.errors import require
from kernels.triton.host import FLOATS, INTERPRETED, check_contiguous, check_dtype, power_of_two
from kernels.triton.pdl import launch, release, wait

_WIDEST = 512  # numbers of a head that are summed over: all of them are held at once
_COLUMNS = 32


@triton.jit(do_not_specialize=["all_tokens"])
def _by_head(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    all_tokens: tl.tensor,
    num_heads: tl.tensor,
    depth: tl.tensor,
    columns: tl.tensor,
    carried: tl.tensor,
    depth_stride: tl.tensor,
    column_stride: tl.tensor,
    num_tokens: tl.constexpr,
    depth_block: tl.constexpr,
    column_block: tl.constexpr,
    carried_block: tl.constexpr,
    operand: tl.constexpr,
    dependent: tl.constexpr = False,
) -> None:
    """x: [tokens, heads, depth + carried]; weight: by head, depth and columns apart as the strides say; out:
    [tokens, heads, columns + carried]."""
    head = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, depth_block)
    column = tl.program_id(1) * column_block + tl.arange(0, column_block)
    release(dependent)
    at = head * depth * columns + inner[:, None] * depth_stride + column[None, :] * column_stride
    inside = (inner < depth)[:, None] & (column < columns)[None, :]
    matrix = tl.load(weight + at, mask=inside, other=0.0)
    wait(dependent)
    token = tl.program_id(2) * num_tokens + tl.arange(0, num_tokens)
    live = (token < all_tokens)[:, None]
    row = (token.to(tl.int64) * num_heads + head)[:, None]
    x_row, out_row = x + row * (depth + carried), out + row * (columns + carried)
    given = tl.load(x_row + inner[None, :], mask=live & (inner < depth)[None, :], other=0.0)
    precision: tl.constexpr = "ieee" if operand == tl.float32 else "tf32"
    product = tl.dot(given.to(operand), matrix.to(operand), input_precision=precision)
    tl.store(
        out_row + column[None, :], product.to(out.dtype.element_ty), mask=live & (column < columns)[None, :]
    )
    if carried_block > 0 and tl.program_id(1) == 0:
        beside = tl.arange(0, carried_block)
        there = live & (beside < carried)[None, :]
        kept = tl.load(x_row + depth + beside[None, :], mask=there, other=0.0)
        tl.store(out_row + columns + beside[None, :], kept, mask=there)


def absorb_queries(q: Tensor, key_up: Tensor) -> Tensor:
    """Queries of absorbed MLA: see ``kernels.mla.absorb_queries``."""
    num_heads, depth, columns = key_up.shape
    _check("absorb_queries", q, key_up, num_heads, depth, most_carried=q.shape[-1])
    return _run(q, key_up, depth, columns, columns, 1)


def expand_values(latents: Tensor, value_up: Tensor) -> Tensor:
    """Outputs of absorbed MLA: see ``kernels.mla.expand_values``."""
    num_heads, columns, depth = value_up.shape
    _check("expand_values", latents, value_up, num_heads, depth, most_carried=0)
    return _run(latents, value_up, depth, columns, 1, depth)


def _check(operation: str, x: Tensor, weight: Tensor, num_heads: int, depth: int, most_carried: int) -> None:
    check_dtype(operation, "x", x.dtype, FLOATS)
    check_dtype(operation, "the matrices", weight.dtype, (x.dtype,))
    shape = f"x has shape {list(x.shape)}, matrices {list(weight.shape)}"
    fits = x.dim() == 4 and x.shape[2] == num_heads and depth <= x.shape[3] <= depth + most_carried
    require(fits, operation, f"{shape}, expected [B, N, {num_heads}, {depth}] and what is carried over")
    require(depth <= _WIDEST, operation, f"{depth} numbers are summed over, expected at most {_WIDEST}")
    check_contiguous(operation, x=x, weight=weight)


def _run(
    x: Tensor, weight: Tensor, depth: int, columns: int, depth_stride: int, column_stride: int
) -> Tensor:
    num_seqs, num_nodes, num_heads, width = x.shape
    carried, num_tokens = width - depth, num_seqs * num_nodes
    out = x.new_empty(num_seqs, num_nodes, num_heads, columns + carried)
    if num_tokens:
        tile = min(max(power_of_two(num_tokens), 16), 64)
        exact = INTERPRETED or x.dtype == torch.float32
        _by_head[(num_heads, triton.cdiv(columns, _COLUMNS), triton.cdiv(num_tokens, tile))](
            *(x, weight, out, num_tokens, num_heads, depth, columns, carried, depth_stride, column_stride),
            num_tokens=tile,
            depth_block=max(power_of_two(depth), 16),
            column_block=_COLUMNS,
            carried_block=power_of_two(carried) if carried else 0,
            operand=tl.float32 if exact else tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16,
            num_warps=4,
            **launch(),
        )
    return out
