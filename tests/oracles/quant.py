"""FP8 and NVFP4 from their bit layouts, one element at a time, in exact fractions.

E4M3 (OCP 8-bit Floating Point Specification, table 1): sign, 4 exponent bits of bias 7, 3 mantissa bits;
exponent 0 is subnormal, S.1111.111 is NaN, there is no infinity. E2M1 (OCP Microscaling Formats, table 5):
sign, 2 exponent bits of bias 1, 1 mantissa bit, no NaN. NVFP4: CHECKPOINT.md section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def e4m3(byte: int) -> Fraction:
    """The value of an E4M3 byte that is not NaN."""
    assert byte & 0x7F != 0x7F, "NaN"
    return _minifloat(byte >> 7, byte >> 3 & 15, byte & 7, mantissa_bits=3, bias=7)


def e2m1(nibble: int) -> Fraction:
    """The value of an E2M1 nibble."""
    return _minifloat(nibble >> 3, nibble >> 1 & 3, nibble & 1, mantissa_bits=1, bias=1)


def _minifloat(sign: int, exponent: int, mantissa: int, mantissa_bits: int, bias: int) -> Fraction:
    fraction = Fraction(mantissa, 2**mantissa_bits)
    if exponent == 0:
        magnitude = fraction * Fraction(2) ** (1 - bias)
    else:
        magnitude = (1 + fraction) * Fraction(2) ** (exponent - bias)
    return -magnitude if sign else magnitude


def nvfp4_row(codes: Sequence[int], block_scales: Sequence[int], divisor: Fraction) -> list[Fraction]:
    """One row of a matrix from its bytes: codes [in / 2], block scales [in / 16] as E4M3 bytes."""
    row = []
    for column in range(2 * len(codes)):
        byte = codes[column // 2]
        nibble = byte >> 4 if column % 2 else byte & 15
        row.append(e2m1(nibble) * e4m3(block_scales[column // 16]) / divisor)
    return row


def nearest(value: Fraction, candidates: Sequence[Fraction]) -> set[int]:
    """Indices of the candidates closest to a value: two or more at a tie, or where values repeat (0, -0)."""
    distances = [abs(value - candidate) for candidate in candidates]
    least = min(distances)
    return {index for index, distance in enumerate(distances) if distance == least}
