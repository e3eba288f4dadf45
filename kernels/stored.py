"""A matrix as it is stored, or a stack of them: the one argument that says how a weight is multiplied.

    plain    codes in a floating dtype          matrix = codes
    FP8      codes in e4m3                      matrix = codes * scale
    NVFP4    two codes to a byte, block scales  matrix = e2m1(codes) * block_scale / scale

Scales belong to groups of rows: one group for a matrix, two where gate and up lie below one another, as many
as rows where matrices were fused. Row r of a matrix of R rows and G groups has scale number r // (R / G).
What it means to multiply by one is written here in plain torch; kernels for GPUs agree with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.quant import undivided

E4M3_MAX = 448.0


@dataclass(frozen=True, slots=True)
class Stored:
    """[out, in], or a stack [E, out, in].

    input_scale: where there is one, activations are divided by it, rounded to e4m3 and multiplied as such
    (W8A8, static); without, they keep their dtype (W8A16, W4A16).
    """

    codes: Tensor  # [.., out, in]; NVFP4: [.., out, in / 2] uint8
    scale: Tensor | None = None  # [.., G] float32; of NVFP4 the divisor
    block_scales: Tensor | None = None  # [.., out, in / 16] float8_e4m3fn
    input_scale: Tensor | None = None  # [..] float32

    @property
    def shape(self) -> torch.Size:
        """Of the matrices, [.., out, in]."""
        *rows, width = self.codes.shape
        return torch.Size((*rows, width if self.block_scales is None else 2 * width))

    @property
    def kind(self) -> str:
        """plain, fp8 or nvfp4."""
        if self.block_scales is not None:
            return "nvfp4"
        return "plain" if self.scale is None else "fp8"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that is held, for counting bytes."""
        held = self.codes, self.scale, self.block_scales, self.input_scale
        return tuple(tensor for tensor in held if tensor is not None)

    def __getitem__(self, index: int) -> Stored:
        """One matrix of a stack, without a copy."""
        scales = self.scale, self.block_scales, self.input_scale
        return Stored(self.codes[index], *(None if part is None else part[index] for part in scales))


def product(x: Tensor, weight: Stored) -> Tensor:
    """x [.., in] float32 times a stored matrix [out, in] -> [.., out] float32, nothing rounded but by sums.

    With an input scale x is rounded to e4m3 first.
    """
    assert weight.codes.dim() == 2, weight.shape
    if weight.input_scale is not None:
        codes = (x / weight.input_scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        x = codes.float() * weight.input_scale
    if weight.block_scales is not None:
        matrix = undivided(weight.codes, weight.block_scales, torch.float32)
    else:
        matrix = weight.codes.float()
    y = F.linear(x, matrix)
    if weight.scale is None:
        return y
    scale = weight.scale.repeat_interleave(matrix.shape[0] // weight.scale.shape[-1])
    return y * scale if weight.block_scales is None else y / scale


def linear(
    x: Tensor, weight: Stored, norm: Tensor | None = None, eps: float = 0.0, residual: Tensor | None = None
) -> Tensor:
    """residual + (x, normed) @ weight.T -> [T, out] in x's dtype, rounded once.

    x: [T, in]; weight: [out, in]; norm: [in], x is divided by its root mean square and multiplied by it;
    residual: [T, out].
    """
    y = product(normed(x, norm, eps), weight)
    return (y if residual is None else y + residual.float()).to(x.dtype)


def normed(x: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    """x [.., in] in float32, divided by its root mean square and times ``norm`` [in], if there is one."""
    wide = x.float()
    return wide if norm is None else torch.rms_norm(wide, (x.shape[-1],), norm.float(), eps)
