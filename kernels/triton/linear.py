"""y = x @ weight.T for a few tokens, with the norm before it and the residual behind it in the same launch.

A norm costs no pass of its own: x / rms(x) * w times a matrix is (x * w) times the matrix, over rms(x), and
the squares are summed beside the products. Where a matrix has too few rows to fill a GPU, its columns are
divided among several programs; the last of a block of rows adds their partial sums in order.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.errors import require
from kernels.stored import Stored
from kernels.triton.host import num_processors, power_of_two
from kernels.triton.pdl import launch, release, wait
from kernels.triton.product import arrived_last, fetch_matrix, multiply
from kernels.triton.scratch import counters
from kernels.triton.stored import check_norm, check_row_shape, check_rows, check_stored
from kernels.triton.tiles import Tile, tile_for


@triton.jit(do_not_specialize=["all_tokens"])
def _linear(
    x: tl.tensor,
    norm: tl.tensor,
    weight: tl.tensor,
    block_scales: tl.tensor,
    scale: tl.tensor,
    input_scale: tl.tensor,
    residual: tl.tensor,
    partial: tl.tensor,
    partial_squares: tl.tensor,
    counter: tl.tensor,
    out: tl.tensor,
    all_tokens: tl.tensor,
    x_stride: tl.tensor,
    width: tl.tensor,
    all_rows: tl.tensor,
    num_groups: tl.tensor,
    eps: tl.tensor,
    num_tokens: tl.constexpr,
    num_rows: tl.constexpr,
    num_splits: tl.constexpr,
    step: tl.constexpr,
    normed: tl.constexpr,
    nvfp4: tl.constexpr,
    rounded: tl.constexpr,
    scaled: tl.constexpr,
    swap: tl.constexpr,
    operand: tl.constexpr,
    dependent: tl.constexpr = False,
) -> None:
    token = (tl.program_id(1) * num_tokens + tl.arange(0, num_tokens)).to(tl.int64)
    live = token < all_tokens
    row = tl.program_id(0) * num_rows + tl.arange(0, num_rows)
    split = tl.program_id(2)
    share = width // num_splits
    release(dependent)
    if dependent:
        fetch_matrix(
            weight, block_scales, row.to(tl.int64), width, split * share, (split + 1) * share, num_rows, nvfp4
        )  # fmt: skip
    wait(dependent)
    inverse = 1.0
    if rounded:
        inverse = 1.0 / tl.load(input_scale)
    y, squares = multiply(
        x, norm, weight, block_scales, token * x_stride, live, row.to(tl.int64), width, split * share,
        (split + 1) * share, inverse, num_tokens, num_rows, step, normed, nvfp4, rounded, swap, operand,
    )  # fmt: skip
    if num_splits > 1:
        block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        place = tl.arange(0, num_tokens)
        mine = (block * num_splits).to(tl.int64) * num_tokens
        at = (mine + place)[:, None] * num_rows + tl.arange(0, num_rows)[None, :]
        tl.store(partial + at + split * num_tokens * num_rows, y)
        tl.store(partial_squares + mine + split * num_tokens + place, squares)
        if not arrived_last(counter + block, num_splits):
            return
        y = tl.zeros([num_tokens, num_rows], tl.float32)
        squares = tl.zeros([num_tokens], tl.float32)
        for number in range(num_splits):
            y += tl.load(partial + at + number * num_tokens * num_rows, cache_modifier=".cg")
            squares += tl.load(partial_squares + mine + number * num_tokens + place, cache_modifier=".cg")
    if scaled:
        factor = tl.load(scale + row // (all_rows // num_groups))
        y = y / factor[None, :] if nvfp4 else y * factor[None, :]
    if rounded:
        y /= inverse
    if normed:
        y *= tl.rsqrt(squares / width + eps)[:, None]
    at = token[:, None] * all_rows + row[None, :]
    if residual is not None:
        y += tl.load(residual + at, mask=live[:, None], other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=live[:, None])


def linear(
    x: Tensor, weight: Stored, norm: Tensor | None = None, eps: float = 0.0, residual: Tensor | None = None
) -> Tensor:
    """residual + (x, normed) @ weight.T for rows x [T, in], which may lie apart. See
    ``kernels.stored.linear``.

    Takes any number of tokens, in tiles of at most 64; past a few hundred, matrix products made for many
    rows are faster.
    """
    operands = check_stored("linear", weight, 2, x.dtype)
    num_rows, width = weight.shape
    check_row_shape("linear", "x", x, width, x.dtype)
    check_norm("linear", norm, width, x.dtype)
    apart = f"rows of x lie {x.stride(0)} numbers apart, expected a multiple of {operands.word}"
    require(x.stride(0) % operands.word == 0, "linear", apart)
    require(not (operands.rounded and norm is not None), "linear", "a norm together with an input scale")
    if residual is not None:
        check_rows("linear", "residual", residual, num_rows, x.dtype)
        require(len(residual) == len(x), "linear", f"residual has {len(residual)} rows, expected {len(x)}")
    num_tokens, device = len(x), x.device
    out = torch.empty(num_tokens, num_rows, dtype=x.dtype, device=device)
    if not num_tokens:
        return out
    tile = _split(tile_for(device, "linear", operands.kind, num_tokens, x.dtype), num_rows, width, device)
    padded = min(tile.tokens, max(16, power_of_two(num_tokens)))
    blocks = num_rows // tile.rows, -(-num_tokens // padded)
    partial = partial_squares = counter = out  # none of them is touched by a program alone with its rows
    if tile.splits > 1:
        places = blocks[0] * blocks[1] * tile.splits * padded
        partial = torch.empty(places, tile.rows, dtype=torch.float32, device=device)
        partial_squares = torch.empty(places, dtype=torch.float32, device=device)
        counter = counters(device, blocks[0] * blocks[1])
    _linear[*blocks, tile.splits](
        operands.seen(x),
        operands.seen(norm),
        operands.codes(weight),
        weight.block_scales,
        weight.scale,
        weight.input_scale,
        residual,
        partial,
        partial_squares,
        counter,
        out,
        num_tokens,
        x.stride(0) // operands.word,
        width,
        num_rows,
        1 if weight.scale is None else weight.scale.shape[-1],
        eps,
        num_tokens=padded,
        num_rows=tile.rows,
        num_splits=tile.splits,
        step=tile.step,
        normed=norm is not None,
        nvfp4=operands.nvfp4,
        rounded=operands.rounded,
        scaled=weight.scale is not None,
        swap=tile.swap,
        operand=operands.operand,
        **tile.launch,
        **launch(),
    )
    return out


def _split(tile: Tile, num_rows: int, width: int, device: torch.device) -> Tile:
    """A tile that fits; its columns are divided no more than gives every processor two programs."""
    fitted = tile.fitted(num_rows, width)
    wanted = 2 * num_processors(device) * fitted.rows // num_rows
    return replace(tile, splits=max(1, min(tile.splits, power_of_two(wanted)))).fitted(num_rows, width)
