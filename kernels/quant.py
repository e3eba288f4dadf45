"""Quantised matrices in plain torch: the specification of FP8 and NVFP4, their products, and the CPU path.

Two formats, as the published checkpoints of Mistral Small 4 store them:

FP8      per-tensor static. codes: float8_e4m3fn (OCP "8-bit Floating Point Specification" E4M3: bias 7, no
         infinities, largest 448); matrix = codes * scale.
NVFP4    codes: e2m1 (OCP "Microscaling Formats" element type: bias 1, magnitudes 0 .5 1 1.5 2 3 4 6), two to
         a byte, the low nibble is the even column, bit 3 of a nibble the sign. Every 16 columns of a row
         share a block scale in e4m3, and the matrix shares one float32 divisor, 448 * 6 / amax when written:
         matrix = codes * (block_scale / divisor).

One row of NVFP4 with the bytes 0x21 0xE7 .., block scale 2 and divisor 4: the nibbles 1, 2, 7, 14 are .5, 1,
6, -4, so the row starts .25, .5, 3, -2.

Products are W8A16 and W4A16: activations stay in their dtype and no activation scale is read. Only what is
constant along the summed dimension is taken out of the sum, and what remains (codes; codes * block_scale) is
exact in float16, bfloat16 and float32 alike: at most 6 significant bits between 2^-10 and 2688. So a product
rounds as a dense one of that dtype does, plus once at the end, and never rounds a weight; multiplying by a
matrix dequantised to bfloat16 would round every element. It also spares a pass over the matrix.

The writers are for synthetic checkpoints and tests. Leading dimensions stack matrices of one shape, each with
its own scale. Nothing here checks what a file may contain (NaN codes, zero divisors): readers do.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 16  # columns that share an NVFP4 block scale
_E4M3_MAX = 448.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Where one magnitude ends and the next begins. A tie goes to the even code: up at 0.75, 1.75 and 3.5.
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def dequantise_fp8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes [.., out, in] float8_e4m3fn, scale [..] float32 -> [.., out, in].

    The product is taken in float32 and rounded to dtype once.
    """
    assert codes.dtype == torch.float8_e4m3fn, codes.dtype
    assert scale.shape == codes.shape[:-2], (scale.shape, codes.shape)
    return codes.to(torch.float32).mul_(scale[..., None, None]).to(dtype)


def dequantise_nvfp4(codes: Tensor, block_scales: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    """codes [.., out, in / 2] uint8, block_scales [.., out, in / 16] float8_e4m3fn, divisor [..] float32 ->
    [.., out, in].

    code * block_scale is exact, so the division is the only rounding in float32; then once to dtype.
    """
    assert divisor.shape == codes.shape[:-2], (divisor.shape, codes.shape)
    return undivided(codes, block_scales, torch.float32).div_(divisor[..., None, None]).to(dtype)


def undivided(codes: Tensor, block_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """code * block_scale, [.., out, in]; exact in every dtype of at least 6 significant bits."""
    assert codes.dtype == torch.uint8, codes.dtype
    assert block_scales.dtype == torch.float8_e4m3fn, block_scales.dtype
    pairs = _nibble_pairs(dtype, codes.device).index_select(0, codes.reshape(-1).int())
    blocks = pairs.view(*block_scales.shape, BLOCK)
    return blocks.mul_(block_scales.to(dtype)[..., None]).flatten(-2)


@functools.cache
def _nibble_pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 2]: what a byte holds, even column first."""
    values = torch.tensor(_E2M1 + tuple(-magnitude for magnitude in _E2M1))
    byte = torch.arange(256)
    return torch.stack((values[byte & 15], values[byte >> 4]), dim=1).to(device, dtype)


# --- products


def fp8_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x [.., in] times one FP8 matrix -> [.., out] in x's dtype.

    codes: [out, in] float8_e4m3fn; scale: float32, [] or [out], one for every row: rows of several matrices
    may be multiplied as one, each with its own scale.
    """
    assert codes.dtype == torch.float8_e4m3fn, codes.dtype
    if x.dtype == torch.float16:  # a sum of unscaled codes would leave its range
        weight = codes.to(torch.float32).mul_(scale.reshape(-1, 1))
        return F.linear(x, weight.to(x.dtype))
    return (F.linear(x, codes.to(x.dtype)).float() * scale).to(x.dtype)


def nvfp4_linear(x: Tensor, codes: Tensor, block_scales: Tensor, divisor: Tensor) -> Tensor:
    """x [.., in] times one NVFP4 matrix -> [.., out] in x's dtype.

    codes: [out, in / 2] uint8; block_scales: [out, in / 16] float8_e4m3fn; divisor: float32, [] or [out], as
    the scale of ``fp8_linear``.
    """
    if x.dtype == torch.float16:  # see fp8_linear
        weight = undivided(codes, block_scales, torch.float32).div_(divisor.reshape(-1, 1))
        return F.linear(x, weight.to(x.dtype))
    return (F.linear(x, undivided(codes, block_scales, x.dtype)).float() / divisor).to(x.dtype)


# --- writers


def quantise_fp8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[.., out, in] finite, any floating dtype -> (codes [.., out, in] float8_e4m3fn, scale [..] float32).

    scale = amax / 448; to the nearest code, ties to even. A matrix of zeros has scale 1.
    """
    wide = matrix.to(torch.float32)
    scale = wide.abs().amax(dim=(-2, -1)) / _E4M3_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    # The quotient of the largest may round past 448, where a cast need not saturate on every device.
    codes = (wide / scale[..., None, None]).clamp_(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return codes, scale


def quantise_nvfp4(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[.., out, in] finite, any floating dtype, in a multiple of 16 -> (codes [.., out, in / 2] uint8,
    block_scales [.., out, in / 16] float8_e4m3fn, divisor [..] float32).

    divisor = 448 * 6 / amax, block scale = block amax / 6 * divisor in e4m3; then each element goes to the
    nearest code of its block, ties to even, saturating at 6 (a block scale may have been rounded down). A
    block too small for e4m3 becomes zeros, a matrix of zeros has divisor 1.
    """
    assert matrix.shape[-1] % BLOCK == 0, matrix.shape
    *rows, columns = matrix.shape
    blocks = matrix.to(torch.float32).reshape(*rows, columns // BLOCK, BLOCK)
    block_amax = blocks.abs().amax(dim=-1)  # [.., out, in / 16]
    amax = block_amax.amax(dim=(-2, -1))
    largest = _E4M3_MAX * _E2M1[-1]
    divisor = torch.where(amax > 0, largest / amax, 1.0).clamp_(max=torch.finfo(torch.float32).max)
    over = divisor[..., None, None]
    block_scales = (block_amax / _E2M1[-1] * over).clamp_(max=_E4M3_MAX).to(torch.float8_e4m3fn)
    steps = block_scales.float()[..., None]
    scaled = torch.where(steps > 0, blocks * over[..., None] / steps, 0.0)
    nibbles = _nearest_e2m1(scaled).flatten(-2)
    codes = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    return codes, block_scales, divisor


def _nearest_e2m1(values: Tensor) -> Tensor:
    """float32 -> e2m1 codes in uint8, same shape; nearest, ties to the even code, saturating."""
    limits = torch.tensor(_MIDPOINTS, device=values.device)
    # bucketize counts the limits strictly below a value. To count a limit where a tie goes up, lower it by
    # one ulp.
    limits[1::2] = torch.nextafter(limits[1::2], torch.zeros_like(limits[1::2]))
    magnitude = torch.bucketize(values.abs(), limits)
    return (magnitude + 8 * torch.signbit(values)).to(torch.uint8)
