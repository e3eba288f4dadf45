"""Weights put together as the products of ``kernels`` take them.

    below one another     matrices that read the same input: one product, their outputs side by side
    behind one another    stacks of experts: one stack of more

    stack([q, k, v])                three matrices as one
    stack([w1, w3], [s1, s3])       gate [E, I, H] above up [E, I, H], and behind them those of shared experts

Codes stay what they are, and every matrix keeps its own scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.nn.weight import Fp8Weight, Nvfp4Weight, Weight
from kernels import Stored


def kind_of(weight: Weight) -> str:
    """How a weight is stored: fp8, nvfp4, or the name of its dtype."""
    match weight:
        case Fp8Weight():
            return "fp8"
        case Nvfp4Weight():
            return "nvfp4"
        case Tensor():
            return str(weight.dtype).removeprefix("torch.")


def stack(*behind: Sequence[Weight]) -> Stored:
    """Stacks behind one another, each of matrices [.., out, in] below one another; all of one kind.

    A single weight is not copied. Scales belong to matrices, or to rows where these differ in size.
    """
    weights = [weight for below in behind for weight in below]
    assert len({kind_of(weight) for weight in weights}) == 1, [kind_of(weight) for weight in weights]
    parts = [[_alone(weight) for weight in below] for below in behind]
    codes = _together([[part.codes for part in below] for below in parts])
    if parts[0][0].scale is None:
        return Stored(codes)
    blocks = [[part.block_scales for part in below if part.block_scales is not None] for below in parts]
    scales = [_scales(below) for below in parts]
    scale = scales[0] if len(scales) == 1 else torch.cat(scales)
    return Stored(codes, scale, _together(blocks) if blocks[0] else None)


def split_experts(w1: Weight, w3: Weight, w2: Weight, num: int) -> tuple[list[Weight], list[Weight]]:
    """A SwiGLU block of matrices [num * I, H], twice, and [H, num * I] as ``num`` experts: a block is a sum
    over its inner width. Returns gate and up [num, I, H] each, and down [num, H, I] alone."""

    def rows(codes: Tensor) -> Tensor:
        return codes.view(num, -1, codes.shape[1])

    def columns(codes: Tensor) -> Tensor:
        return codes.view(codes.shape[0], num, -1).transpose(0, 1)

    def split(weight: Weight, cut: Callable[[Tensor], Tensor]) -> Weight:
        match weight:
            case Fp8Weight(codes, scale):
                return Fp8Weight(cut(codes), scale.expand(num))
            case Nvfp4Weight(codes, block_scales, divisor):
                return Nvfp4Weight(cut(codes), cut(block_scales), divisor.expand(num))
            case Tensor():
                return cut(weight)

    return [split(w1, rows), split(w3, rows)], [split(w2, columns)]


def _alone(weight: Weight) -> Stored:
    match weight:
        case Fp8Weight(codes, scale):
            # One for each matrix, or for each row of a single one.
            return Stored(codes, scale.reshape(*codes.shape[:-2], -1))
        case Nvfp4Weight(codes, block_scales, divisor):
            return Stored(codes, divisor[..., None], block_scales)
        case Tensor():
            return Stored(weight)


def _scales(below: Sequence[Stored]) -> Tensor:
    """[.., G]: one of each matrix, or of each row."""
    scales = [(part.shape[-2], part.scale) for part in below if part.scale is not None]
    if len({num_rows for num_rows, _ in scales}) > 1:
        scales = [(1, scale.expand(*scale.shape[:-1], num_rows)) for num_rows, scale in scales]
    return torch.cat([scale for _, scale in scales], dim=-1)


def _together(grid: Sequence[Sequence[Tensor]]) -> Tensor:
    """Tensors [.., rows, width]: those of a line below one another, the lines behind one another."""
    first = grid[0][0]
    if len(grid) == len(grid[0]) == 1:
        return first.contiguous()
    shape = (sum(line[0].shape[0] for line in grid),) if first.dim() == 3 else ()
    whole = first.new_empty(*shape, sum(part.shape[-2] for part in grid[0]), first.shape[-1])
    done = 0
    for line in grid:
        place = whole if first.dim() == 2 else whole[done : done + len(line[0])]
        done += len(line[0])
        row = 0
        for part in line:
            num_rows = part.shape[-2]
            _as_bytes(place.narrow(-2, row, num_rows)).copy_(_as_bytes(part))
            row += num_rows
    return whole


def _as_bytes(codes: Tensor) -> Tensor:
    """FP8 tensors know few operations, bytes all of them."""
    return codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes
