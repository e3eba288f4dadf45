"""FP8 and NVFP4 against their bit layouts, and weights that stay what they were stored as."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

import kernels
from engine.nn.weight import Fp8Weight, Nvfp4Weight, Weight, dequantise, select
from tests.oracles import quant

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
E4M3_BYTES = [byte for byte in range(256) if byte & 0x7F != 0x7F]


def fp8(byte_values: list[int]) -> Tensor:
    return torch.tensor(byte_values, dtype=torch.uint8).view(torch.float8_e4m3fn)


def raw(codes: Tensor) -> Tensor:
    """Bytes, which torch can compare where it cannot compare FP8."""
    return codes.view(torch.uint8)


def random_nvfp4(generator: torch.Generator, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every nibble, block scales of all sizes and signs, divisors that are not powers of two."""
    *stack, rows, columns = shape
    codes = torch.randint(0, 256, (*stack, rows, columns // 2), generator=generator, dtype=torch.uint8)
    picks = torch.randint(0, len(E4M3_BYTES), (*stack, rows, columns // 16), generator=generator)
    block_scales = fp8(E4M3_BYTES)[picks.flatten()].view(picks.shape)
    divisor = torch.rand(stack, generator=generator) * 3000 + 0.1
    return codes, block_scales, divisor


# --- reading


def test_the_oracle_knows_the_published_tables() -> None:
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert [float(quant.e2m1(nibble)) for nibble in range(8)] == magnitudes
    assert [float(quant.e2m1(nibble)) for nibble in range(8, 16)] == [-m for m in magnitudes]
    known = {0x7E: 448.0, 0xFE: -448.0, 0x38: 1.0, 0x08: 2.0**-6, 0x07: 0.875 * 2**-6, 0x01: 2.0**-9}
    assert {byte: float(quant.e4m3(byte)) for byte in known} == known


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_fp8_code_reads_as_the_specification_says(dtype: torch.dtype) -> None:
    got = kernels.dequantise_fp8(fp8(E4M3_BYTES).view(2, -1), torch.tensor(0.25), dtype)
    assert got.dtype == dtype
    expected = [float(quant.e4m3(byte) / 4) for byte in E4M3_BYTES]
    assert got.flatten().tolist() == expected  # powers of two: exact in every dtype
    nan = kernels.dequantise_fp8(fp8([0x7F, 0xFF]).view(1, 2), torch.tensor(1.0), dtype)
    assert bool(nan.isnan().all()), "a NaN stays one"


def test_a_row_of_nvfp4_written_out_by_hand() -> None:
    # low nibble first: 0x21 is .5 then 1; 0xE7 is 6 then -4; 0x98 is -0 then -.5; 0x43 is 1.5 then 2
    codes = torch.tensor([[0x21, 0xE7, 0x98, 0x43, 0x65, 0xFA, 0x00, 0x11] + [0x22] * 8], dtype=torch.uint8)
    block_scales = fp8([0x40, 0xB8]).view(1, 2)  # 2 and -1
    got = kernels.dequantise_nvfp4(codes, block_scales, torch.tensor(4.0), torch.float32)
    first = [0.25, 0.5, 3.0, -2.0, -0.0, -0.25, 0.75, 1.0, 1.5, 2.0, -0.5, -3.0, 0.0, 0.0, 0.25, 0.25]
    assert got.tolist() == [first + [-0.25] * 16]


@pytest.mark.parametrize("stack", [(), (3,), (2, 2)])
def test_nvfp4_equals_the_oracle(stack: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(stack))
    codes, block_scales, divisor = random_nvfp4(generator, *stack, 5, 48)
    got = kernels.dequantise_nvfp4(codes, block_scales, divisor, torch.float32)
    assert got.shape == (*stack, 5, 48)
    matrices = zip(
        codes.view(-1, 5, 24),
        block_scales.view(-1, 5, 3),
        divisor.flatten(),
        got.view(-1, 5, 48),
        strict=True,
    )
    for its_codes, its_scales, its_divisor, values in matrices:
        for row in range(5):
            args = its_codes[row].tolist(), raw(its_scales[row]).tolist(), Fraction(float(its_divisor))
            exact = torch.tensor([float(value) for value in quant.nvfp4_row(*args)], dtype=torch.float64)
            assert torch.equal(values[row], exact.float()), "rounded once: the nearest float32"


def test_a_stack_has_a_scale_per_matrix() -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randn(2, 3, 5, 7, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3, generator=generator)
    got = kernels.dequantise_fp8(codes, scale, torch.float32)
    for i in range(2):
        for j in range(3):
            assert torch.equal(got[i, j], codes[i, j].float() * float(scale[i, j]))


def test_dequantising_rounds_to_bfloat16_once() -> None:
    generator = torch.Generator().manual_seed(4)
    codes = torch.randn(40, 32, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.tensor(0.0123)
    expected = (codes.double() * float(scale)).to(torch.float32).to(torch.bfloat16)
    assert torch.equal(kernels.dequantise_fp8(codes, scale, torch.bfloat16), expected)
    assert not torch.equal(codes.to(torch.bfloat16) * scale.to(torch.bfloat16), expected)


# --- writing


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_goes_to_the_nearest_code(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    codes, scale = kernels.quantise_fp8(matrix)
    assert (codes.dtype, codes.shape) == (torch.float8_e4m3fn, matrix.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, matrix.shape[:-2])
    amax = matrix.float().abs().amax((-2, -1))
    torch.testing.assert_close(scale * 448, amax)
    values = [quant.e4m3(byte) for byte in E4M3_BYTES]
    scaled = matrix.float() / scale[..., None, None]
    for value, byte in zip(scaled.flatten().tolist(), raw(codes).flatten().tolist(), strict=True):
        clamped = max(min(Fraction(value), Fraction(448)), Fraction(-448))
        assert byte in {E4M3_BYTES[index] for index in quant.nearest(clamped, values)}


def test_fp8_written_again_is_the_same() -> None:
    codes = fp8(E4M3_BYTES).view(2, 127)
    scale = torch.tensor(0.0371)
    again, its_scale = kernels.quantise_fp8(kernels.dequantise_fp8(codes, scale, torch.float32))
    assert torch.equal(raw(again), raw(codes))
    torch.testing.assert_close(its_scale, scale, rtol=1e-6, atol=0)


def test_nvfp4_goes_to_the_nearest_code_and_ties_to_the_even_one() -> None:
    # a block scale of 1 and a divisor of 1: the 448 * 6 of the last block is the matrix's amax
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]
    to_even = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    up = [float(torch.nextafter(torch.tensor(tie), torch.tensor(9.0))) for tie in ties[:-1]] + [-6.0]
    down = [float(torch.nextafter(torch.tensor(tie), torch.tensor(0.0))) for tie in ties[:-1]] + [5.1]
    rows = [ties + [-tie for tie in ties], up + down, [448 * 6.0] + [0.0] * 15]
    matrix = torch.tensor([sum(rows, [])])
    codes, block_scales, divisor = kernels.quantise_nvfp4(matrix)
    assert divisor.shape == ()
    assert float(divisor) == 1.0
    assert block_scales.float().tolist() == [[1.0, 1.0, 448.0]]
    got = kernels.dequantise_nvfp4(codes, block_scales, divisor, torch.float32)[0].tolist()
    assert got[:16] == to_even + [-value for value in to_even]
    assert got[16:24] == [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -6.0]
    assert got[24:32] == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert got[32] == 448 * 6


@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (2, 5, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_is_the_best_its_scales_allow(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    matrix = torch.randn(shape, generator=generator) * torch.rand(*shape[:-1], 1, generator=generator)
    matrix = matrix.to(dtype)
    codes, block_scales, divisor = kernels.quantise_nvfp4(matrix)
    assert (codes.dtype, codes.shape) == (torch.uint8, (*shape[:-1], shape[-1] // 2))
    assert block_scales.shape == (*shape[:-1], shape[-1] // 16)
    assert (divisor.dtype, divisor.shape) == (torch.float32, matrix.shape[:-2])
    amax = matrix.float().abs().amax((-2, -1))
    torch.testing.assert_close(divisor * amax, torch.full_like(amax, 448.0 * 6), rtol=1e-6, atol=0)
    # the block scale is its block's amax over 6, to the three mantissa bits of e4m3
    block_amax = matrix.float().reshape(block_scales.shape + (16,)).abs().amax(-1)
    stored = block_scales.float() / divisor[..., None, None]
    torch.testing.assert_close(stored, block_amax / 6, rtol=2**-4, atol=0)
    got = kernels.dequantise_nvfp4(codes, block_scales, divisor, torch.float32)
    steps = stored.repeat_interleave(16, dim=-1)
    grid = torch.tensor([float(quant.e2m1(nibble)) for nibble in range(16)])
    best = (matrix.float()[..., None] - grid * steps[..., None]).abs().amin(-1)
    assert bool(((matrix.float() - got).abs() <= best * (1 + 1e-5) + 1e-7).all())


def test_nvfp4_written_again_is_the_same() -> None:
    generator = torch.Generator().manual_seed(7)
    codes, _, _ = random_nvfp4(generator, 2, 6, 64)
    codes[..., ::8] = 0x7F  # a 6 and a -6 in every block, else its scale would shrink
    block_scales = fp8([byte for byte in E4M3_BYTES if 0x20 <= byte < 0x7E][:47] + [0x7E]).repeat(2)
    block_scales = block_scales.view(2, 6, 8)[..., :4].contiguous()
    block_scales.view(torch.uint8)[:, 0, 0] = 0x7E  # 448 in each matrix, else its divisor would grow
    divisor = torch.tensor([0.37, 1700.0])
    matrix = kernels.dequantise_nvfp4(codes, block_scales, divisor, torch.float32)
    again, its_scales, its_divisor = kernels.quantise_nvfp4(matrix)
    assert torch.equal(raw(its_scales), raw(block_scales))
    assert torch.equal(again, codes)
    torch.testing.assert_close(its_divisor, divisor, rtol=1e-6, atol=0)


def test_zeros_and_vanishing_blocks_stay_finite() -> None:
    zeros = torch.zeros(2, 3, 32)
    zeros[1] = 2.0
    zeros[1, 2, 16:] = 1e-30  # far below the smallest block scale of this matrix
    codes, scale = kernels.quantise_fp8(zeros)
    assert float(scale[0]) == 1.0
    assert torch.equal(kernels.dequantise_fp8(codes, scale, torch.float32)[0], zeros[0])
    packed = kernels.quantise_nvfp4(zeros)
    assert float(packed[2][0]) == 1.0
    assert not bool(packed[0][0].any()), "zeros have the code zero, not any code times a zero block scale"
    assert not bool(packed[0][1, 2, 8:].any())
    got = kernels.dequantise_nvfp4(*packed, torch.float32)
    expected = torch.where(zeros > 1, zeros, 0.0)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


# --- weights


def quantised(kind: str, matrix: Tensor) -> Weight:
    if kind == "fp8":
        return Fp8Weight(*kernels.quantise_fp8(matrix), torch.rand(matrix.shape[:-2]))
    return Nvfp4Weight(*kernels.quantise_nvfp4(matrix)) if kind == "nvfp4" else matrix


@pytest.mark.parametrize("kind", ["plain", "fp8", "nvfp4"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_weight_dequantises_to_its_matrix(kind: str, dtype: torch.dtype) -> None:
    matrix = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(8))
    weight = quantised(kind, matrix)
    assert weight.shape == matrix.shape
    got = dequantise(weight, dtype)
    assert got.dtype == dtype
    tolerance = {"plain": 0.004, "fp8": 0.04, "nvfp4": 0.18}[kind]  # half the widest gap between codes
    assert float((got.float() - matrix).abs().max()) <= tolerance * float(matrix.abs().max())


@pytest.mark.parametrize("kind", ["plain", "fp8", "nvfp4"])
def test_select_takes_matrices_with_their_scales(kind: str) -> None:
    matrix = torch.randn(5, 4, 32, generator=torch.Generator().manual_seed(9))
    matrix *= torch.tensor([1.0, 10.0, 0.1, 3.0, 100.0])[:, None, None]  # scales of their own
    weight = quantised(kind, matrix)
    whole = dequantise(weight, torch.float32)
    for index in ([4, 0, 4, 2], [3], []):
        some = select(weight, torch.tensor(index, dtype=torch.int64))
        assert type(some) is type(weight)
        assert torch.equal(dequantise(some, torch.float32), whole[index])
        if isinstance(some, Fp8Weight):
            assert isinstance(weight, Fp8Weight)
            assert some.input_scale is not None
            assert weight.input_scale is not None
            assert torch.equal(some.input_scale, weight.input_scale[index])
            assert torch.equal(raw(some.codes), raw(weight.codes)[index])


def test_select_needs_no_input_scale() -> None:
    weight = Fp8Weight(*kernels.quantise_fp8(torch.ones(2, 3, 4)))
    some = select(weight, torch.tensor([1]))
    assert isinstance(some, Fp8Weight)
    assert some.input_scale is None
