"""Products with stored matrices, wherever they lie: linear layers, the router, and the experts it chooses.

    few tokens on a GPU     the kernels, made for reading every matrix once
    many of them            torch's matrix products for linear layers, whose cost is arithmetic; an expert
                            gets few tokens even then, so experts stay the kernels', only the routing is
                            torch's
    a CPU                   plain torch

``kernels.stored`` and ``kernels.moe`` specify them.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import device, mla, moe
from kernels.dispatch import rms_norm
from kernels.quant import fp8_linear, nvfp4_linear
from kernels.stored import Stored

FEW: Final = 64  # tokens, the most that one program multiplies, and that one program sorts by expert


def linear(
    x: Tensor, weight: Stored, norm: Tensor | None = None, eps: float = 0.0, residual: Tensor | None = None
) -> Tensor:
    """residual + (x, normed) @ weight.T -> [.., out] in x's dtype; see ``kernels.stored.linear``.

    x: [.., in], residual: [.., out]. Where tokens are few on a GPU, and its kernel takes the matrix, a norm
    and a residual cost no launch of their own.
    """
    *shape, width = x.shape
    if device.on_gpu(x) and math.prod(shape) <= FEW and _has_kernel(x.dtype, weight):
        beside = None if residual is None else residual.reshape(-1, weight.shape[0])
        rows = x if x.dim() == 2 else x.reshape(-1, width)
        y: Tensor = device.registered("linear")(rows, weight, norm, eps, beside)
        return y.view(*shape, -1)
    y = _by_torch(x if norm is None else rms_norm(x, norm, eps), weight)
    return y if residual is None else residual + y


def _has_kernel(dtype: torch.dtype, weight: Stored) -> bool:
    """Whether the kernel takes activations of a dtype and a matrix of these sizes. Torch's products do, which
    are as good for what it does not: heads of odd vocabularies, float16."""
    num_rows, width = weight.shape
    return dtype in (torch.bfloat16, torch.float32) and num_rows % 16 == 0 and width % 32 == 0


def _by_torch(x: Tensor, weight: Stored) -> Tensor:
    """x @ weight.T in x's dtype, whatever stands still during the sum taken out of it."""
    assert weight.input_scale is None, "activations are not rounded here"
    if weight.scale is None:
        return F.linear(x, weight.codes)
    scale = weight.scale.repeat_interleave(weight.shape[0] // weight.scale.shape[-1])
    if weight.block_scales is None:
        return fp8_linear(x, weight.codes, scale)
    return nvfp4_linear(x, weight.codes, weight.block_scales, scale)


def _few_heads(x: Tensor) -> bool:
    """Whether these are the heads of few tokens, [B, N, H, D]."""
    return x.shape[:2].numel() <= FEW


def _few_rows(x: Tensor) -> bool:
    """Whether these are few tokens, [T, H]."""
    return len(x) <= FEW


absorb_queries = device.with_kernel(mla.absorb_queries, _few_heads)
expand_values = device.with_kernel(mla.expand_values, _few_heads)
route = device.with_kernel(moe.route, _few_rows)
gate_up = device.with_kernel(moe.gate_up)
down = device.with_kernel(moe.down)
