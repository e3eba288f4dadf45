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
from kernels.moe import TILE_TOKENS, Routing
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


def absorb_queries(q: Tensor, key_up: Tensor) -> Tensor:
    """Queries into MLA's latent space, [B, N, H, R + P]; see ``kernels.mla.absorb_queries``."""
    run = device.registered("absorb_queries") if _is_few(q) else mla.absorb_queries
    absorbed: Tensor = run(q, key_up)
    return absorbed


def expand_values(latents: Tensor, value_up: Tensor) -> Tensor:
    """Results out of it, [B, N, H, V]; see ``kernels.mla.expand_values``."""
    run = device.registered("expand_values") if _is_few(latents) else mla.expand_values
    values: Tensor = run(latents, value_up)
    return values


def _is_few(x: Tensor) -> bool:
    """Whether a GPU holds the heads of few tokens, [B, N, H, D]."""
    return device.on_gpu(x) and x.shape[:2].numel() <= FEW


def route(
    x: Tensor,
    gate: Tensor,
    num_chosen: int,
    scale: float = 1.0,
    num_shared: int = 0,
    norm: Tensor | None = None,
    eps: float = 0.0,
    tile_tokens: int = TILE_TOKENS,
) -> Routing:
    """The best experts of every token; see ``kernels.moe.route``."""
    given = x, gate, num_chosen, scale, num_shared, norm, eps, tile_tokens
    if device.on_gpu(x) and len(x) <= FEW:
        routing: Routing = device.registered("route")(*given)
        return routing
    return moe.route(*given)


def gate_up(
    x: Tensor,
    weight: Stored,
    routing: Routing,
    norm: Tensor | None = None,
    eps: float = 0.0,
    tile_tokens: int = TILE_TOKENS,
) -> Tensor:
    """silu(gate x) * up x of every token and each of its experts; see ``kernels.moe.gate_up``."""
    run = device.registered("gate_up") if device.on_gpu(x) else moe.gate_up
    y: Tensor = run(x, weight, routing, norm, eps, tile_tokens)
    return y


def down(
    y: Tensor,
    weight: Stored,
    routing: Routing,
    residual: Tensor | None = None,
    tile_tokens: int = TILE_TOKENS,
) -> Tensor:
    """residual + the weighted sum of down y over each token's experts; see ``kernels.moe.down``."""
    run = device.registered("down") if device.on_gpu(y) else moe.down
    out: Tensor = run(y, weight, routing, residual, tile_tokens)
    return out
