"""Choosing among the columns of long rows of logits: one token with its noise, or the best few.

A row is cut into blocks, each of which leaves its best columns; a second launch picks among those. A column
and its score are one 64-bit number, the score's bits made monotonic above the column's complement: the
largest such number is the best score, of equals the lowest column, and no two are equal. What is not a number
never wins.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import ref
from kernels.errors import require
from kernels.triton.host import check_contiguous, check_dtype, check_shape, power_of_two
from kernels.triton.pdl import launch, release, wait

_BLOCK = 4096  # columns of a block
_MOST = 64  # best columns of a row, and no more than a block has
_GOLDEN: tl.constexpr = tl.constexpr(ref.GOLDEN)
_ODD_1: tl.constexpr = tl.constexpr(ref.ODD_1)
_ODD_2: tl.constexpr = tl.constexpr(ref.ODD_2)
_LOWEST: tl.constexpr = tl.constexpr(-(2**63 - 1))
_LN_2_HIGH: tl.constexpr = tl.constexpr(0.693359375)
_LN_2_LOW: tl.constexpr = tl.constexpr(-2.12194440e-4)


@triton.jit
def _packed(score: tl.tensor, column: tl.tensor) -> tl.tensor:
    """Score and column as one number, the larger the better."""
    score = tl.where(score == score, score, float("-inf"))
    score = tl.where(score == 0.0, 0.0, score)  # -0 equals 0
    bits = score.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)


@triton.jit
def _column_of(packed: tl.tensor) -> tl.tensor:
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF)


@triton.jit
def _score_of(packed: tl.tensor) -> tl.tensor:
    bits = (packed >> 32).to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _mix(x: tl.tensor, key: tl.tensor) -> tl.tensor:
    """``ref._finalise`` on int32: products wrap, right shifts are logical."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _ODD_1
    x = x ^ key ^ ((x >> 15) & 0x1FFFF)
    x = x * _ODD_2
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def _log(x: tl.tensor) -> tl.tensor:
    """Natural logarithm of positive normal numbers to about an ulp.

    A GPU's own has an absolute error only: near 1, where the largest noise comes from, that is all of the
    result. Cody and Waite's reduction to sqrt(1/2) .. sqrt(2), and the series of the inverse hyperbolic
    tangent: log m = 2 s (1 + s^2 / 3 + s^4 / 5 ..) with s = (m - 1) / (m + 1), |s| < 0.1716.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # of sqrt(1/2)
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    z = s * s
    tail = z * (0.33333333 + z * (0.2 + z * (0.14285715 + z * (0.11111111 + z * 0.09090909))))
    power = exponent.to(tl.float32)
    return power * _LN_2_HIGH + (power * _LN_2_LOW + (2.0 * s + 2.0 * s * tail))


@triton.jit
def _gumbel(seed: tl.tensor, position: tl.tensor, column: tl.tensor) -> tl.tensor:
    """``ref.gumbel_noise``: seed, position int64 scalars; column int32 [block]."""
    key = _mix(seed.to(tl.int32) * _GOLDEN, (seed >> 32).to(tl.int32))
    first = _mix(position.to(tl.int32) * _GOLDEN + 1, key)
    second = _mix(first + _GOLDEN, ~key)
    bits = _mix(column * _GOLDEN + first, second)
    uniform = (((bits >> 9) & 0x7FFFFF).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return -_log(-_log(uniform))


@triton.jit
def _best_noisy(
    logits: tl.tensor,
    positions: tl.tensor,
    temperature: tl.tensor,
    floors: tl.tensor,
    seeds: tl.tensor,
    best: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    has_floors: tl.constexpr,
    block: tl.constexpr,
    dependent: tl.constexpr = False,
) -> None:
    """The best column of one block of one row, after temperature, floor and noise. num_rows: of a
    sequence."""
    release(dependent)
    wait(dependent)
    row = tl.program_id(0).to(tl.int64)
    seq = row // num_rows
    column = tl.program_id(1) * block + tl.arange(0, block)
    score = tl.load(logits + row * width + column, mask=column < width, other=float("-inf"))
    heat = tl.load(temperature + seq)
    if heat > 0:
        score = tl.div_rn(score, tl.zeros_like(score) + heat)
        if has_floors:
            score = tl.where(score < tl.load(floors + row), float("-inf"), score)
        score += _gumbel(tl.load(seeds + seq), tl.load(positions + row), column)
    tl.store(best + row * tl.num_programs(1) + tl.program_id(1), tl.max(_packed(score, column), axis=0))


@triton.jit
def _best_of_blocks(
    best: tl.tensor,
    choice: tl.tensor,
    num_blocks: tl.tensor,
    block: tl.constexpr,
    dependent: tl.constexpr = False,
) -> None:
    release(dependent)
    wait(dependent)
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, block)
    packed = tl.load(best + row * num_blocks + place, mask=place < num_blocks, other=_LOWEST)
    tl.store(choice + row, _column_of(tl.max(packed, axis=0)))


@triton.jit
def _best_few(
    logits: tl.tensor,
    best: tl.tensor,
    highest: tl.tensor,
    mass: tl.tensor,
    width: tl.tensor,
    num: tl.constexpr,
    block: tl.constexpr,
    dependent: tl.constexpr = False,
) -> None:
    """The best columns of one block of one row, its highest score, and its sum of exponentials below that."""
    release(dependent)
    wait(dependent)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    score = tl.load(logits + row * width + column, mask=column < width, other=float("-inf")).to(tl.float32)
    place = row * tl.num_programs(1) + tl.program_id(1)
    most = tl.max(score, axis=0)
    base = tl.where(most == float("-inf"), 0.0, most)
    tl.store(highest + place, most)
    tl.store(mass + place, tl.sum(tl.exp(score - base), axis=0))
    packed = _packed(score, column)
    for order in range(num):
        top = tl.max(packed, axis=0)
        tl.store(best + place * num + order, top)
        packed = tl.where(packed == top, _LOWEST, packed)


@triton.jit
def _few_of_blocks(
    best: tl.tensor,
    highest: tl.tensor,
    mass: tl.tensor,
    values: tl.tensor,
    columns: tl.tensor,
    logsumexp: tl.tensor,
    num_blocks: tl.tensor,
    num: tl.constexpr,
    blocks: tl.constexpr,
    block: tl.constexpr,
    dependent: tl.constexpr = False,
) -> None:
    release(dependent)
    wait(dependent)
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, blocks)
    peaks = tl.load(highest + row * num_blocks + place, mask=place < num_blocks, other=float("-inf"))
    sums = tl.load(mass + row * num_blocks + place, mask=place < num_blocks, other=0.0)
    peak = tl.max(peaks, axis=0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(sums * tl.exp(tl.where(peaks == float("-inf"), base, peaks) - base), axis=0)
    tl.store(logsumexp + row, base + _log(total))
    listed = tl.arange(0, block)
    packed = tl.load(best + row * num_blocks * num + listed, mask=listed < num_blocks * num, other=_LOWEST)
    for order in range(num):
        top = tl.max(packed, axis=0)
        tl.store(values + row * num + order, _score_of(top))
        tl.store(columns + row * num + order, _column_of(top))
        packed = tl.where(packed == top, _LOWEST, packed)


def choose(
    logits: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_p: Tensor | None,
    floors: Tensor | None,
    seeds: Tensor,
) -> Tensor:
    """The token with the largest logit / temperature + noise: see ``kernels.ref``.

    A nucleus is a floor, which torch finds by sorting the rows; top_p None spares that.
    """
    operation = "choose"
    require(logits.dim() == 3, operation, f"logits have shape {list(logits.shape)}, expected [B, R, V]")
    num_seqs, num_rows, width = logits.shape
    require(0 < width < 1 << 31, operation, f"{width} columns, expected 1 to {(1 << 31) - 1}")
    check_dtype(operation, "logits", logits.dtype, (torch.float32,))
    check_dtype(operation, "positions", positions.dtype, (torch.int64,))
    check_dtype(operation, "seeds", seeds.dtype, (torch.int64,))
    check_dtype(operation, "temperature", temperature.dtype, (torch.float32,))
    if floors is not None:
        check_dtype(operation, "floors", floors.dtype, (torch.float32,))
    check_shape(operation, (num_seqs,), temperature=temperature, top_p=top_p, seeds=seeds)
    check_shape(operation, (num_seqs, num_rows), positions=positions, floors=floors)
    check_contiguous(operation, logits=logits, temperature=temperature, seeds=seeds)
    if top_p is not None:
        floors = ref.nucleus_floors(logits, temperature, top_p, floors)
    num_blocks = triton.cdiv(width, _BLOCK)
    best = torch.empty(num_seqs * num_rows, num_blocks, dtype=torch.int64, device=logits.device)
    choice = torch.empty(num_seqs, num_rows, dtype=torch.int64, device=logits.device)
    if choice.numel():
        _best_noisy[(num_seqs * num_rows, num_blocks)](
            logits,
            positions.contiguous(),
            temperature,
            None if floors is None else floors.contiguous(),
            *(seeds, best, num_rows, width),
            has_floors=floors is not None,
            block=_BLOCK,
            num_warps=8,
            **launch(),
        )
        _best_of_blocks[(num_seqs * num_rows,)](
            best, choice, num_blocks, block=power_of_two(num_blocks), num_warps=1, **launch()
        )
    return torch.where(logits.amax(dim=-1).isfinite(), choice, -1)


def best(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best columns of every row, and what their scores are relative to: see ``kernels.ref``."""
    operation = "best"
    require(logits.dim() >= 1, operation, "logits without columns")
    width, shape = logits.shape[-1], logits.shape[:-1]
    check_dtype(operation, "logits", logits.dtype, (torch.float32,))
    check_contiguous(operation, logits=logits)
    require(0 < count <= min(width, _MOST), operation, f"{count} columns of {width}, expected 1 to {_MOST}")
    num_rows, num_blocks = shape.numel(), triton.cdiv(width, _BLOCK)
    merged = f"the best {count} of {width} columns, expected fewer of both: they are merged in one block"
    require(num_blocks * count <= _BLOCK, operation, merged)
    empty = logits.new_empty
    found = empty(num_rows, num_blocks, count, dtype=torch.int64)
    highest, mass = (empty(num_rows, num_blocks, dtype=torch.float32) for _ in range(2))
    values, logsumexp = empty(*shape, count, dtype=torch.float32), empty(shape, dtype=torch.float32)
    columns = empty(*shape, count, dtype=torch.int64)
    if num_rows:
        _best_few[(num_rows, num_blocks)](
            logits, found, highest, mass, width, num=count, block=_BLOCK, num_warps=8, **launch()
        )
        _few_of_blocks[(num_rows,)](
            *(found, highest, mass, values, columns, logsumexp, num_blocks),
            num=count,
            blocks=power_of_two(num_blocks),
            block=power_of_two(num_blocks * count),
            num_warps=4,
            **launch(),
        )
    return values, columns, logsumexp
