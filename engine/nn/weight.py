"""Weights as checkpoints store them: plain tensors, or quantised ones with their scales.

A quantised weight stays what it is on its way from a file to the layer that multiplies it; only there is it
decided whether the device has a kernel for it or gets it dequantised. Leading dimensions stack weights of one
shape, as the experts of a layer, and every scale is one number (or one row of numbers) per stacked matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import dequantise_fp8, dequantise_nvfp4


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """Per-tensor static FP8: matrix = codes * scale. A Linear takes one scale for every row of a matrix,
    [out], as well.

    input_scale is what activations are divided by before they are rounded to FP8; None where the checkpoint
    has none, and products that keep activations wide ignore it.
    """

    codes: Tensor  # [.., out, in] float8_e4m3fn
    scale: Tensor  # [..] float32
    input_scale: Tensor | None = None  # [..] float32

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


@dataclass(frozen=True, slots=True)
class Nvfp4Weight:
    """NVFP4: matrix = e2m1(codes) * block_scale / divisor, blocks of 16 columns.

    The low nibble of a byte is the even column; bit 3 of a nibble is the sign.
    """

    codes: Tensor  # [.., out, in / 2] uint8
    block_scales: Tensor  # [.., out, in / 16] float8_e4m3fn
    divisor: Tensor  # [..] float32

    @property
    def shape(self) -> torch.Size:
        """Of the matrix, [.., out, in]."""
        return torch.Size((*self.codes.shape[:-1], 2 * self.codes.shape[-1]))


Weight = Tensor | Fp8Weight | Nvfp4Weight
Weights = dict[str, Tensor] | dict[str, Weight]  # by name; models consume them


def dequantise(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The matrix [.., out, in] that a weight stands for, in ``dtype``; a plain tensor is only converted.

    For what is not a product with activations (absorbing one matrix into another) and for comparisons;
    ``Linear`` multiplies a weight as it is stored.
    """
    match weight:
        case Fp8Weight(codes, scale):
            return dequantise_fp8(codes, scale, dtype)
        case Nvfp4Weight(codes, block_scales, divisor):
            return dequantise_nvfp4(codes, block_scales, divisor, dtype)
        case Tensor():
            return weight.to(dtype)


def select(weight: Weight, index: Tensor) -> Weight:
    """Some matrices of a stack, with their scales: [E, .., out, in] by index [n] int -> [n, .., out, in].

    A copy; duplicates and any order are allowed.
    """
    match weight:
        case Fp8Weight(codes, scale, input_scale):
            return Fp8Weight(
                _pick(codes, index),
                scale.index_select(0, index),
                None if input_scale is None else input_scale.index_select(0, index),
            )
        case Nvfp4Weight(codes, block_scales, divisor):
            return Nvfp4Weight(
                codes.index_select(0, index), _pick(block_scales, index), divisor.index_select(0, index)
            )
        case Tensor():
            return weight.index_select(0, index)


def _pick(codes: Tensor, index: Tensor) -> Tensor:
    """index_select for any one-byte dtype: FP8 tensors know few operations, bytes all of them."""
    return codes.view(torch.uint8).index_select(0, index).view(codes.dtype)


def tensors_only(weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """The same weights, of a format that has no quantised ones."""
    plain = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}
    assert len(plain) == len(weights), f"quantised: {sorted(weights.keys() - plain.keys())[:3]}"
    return plain
