"""Which implementation an operation takes: the compiled CPU kernels where they apply, else plain torch.

Every function has the signature and meaning of its twin in ``kernels.ref``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import cpu, ref

# Past this many multiply-adds of one attention, torch's products on all cores beat ours on one.
_MUCH_ATTENTION = 1 << 24


def _is_plain(x: Tensor) -> bool:
    """Whether the compiled kernels may touch a tensor: float32 on a CPU, contiguous, without gradients."""
    return (
        x.dtype is torch.float32
        and x.is_cpu
        and x.is_contiguous()
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension."""
    lib = cpu.library() if _is_plain(x) and _is_plain(weight) else None
    return ref.rms_norm(x, weight, eps) if lib is None else cpu.rms_norm(lib, x, weight, eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, rms_norm of it)."""
    lib = cpu.library() if _is_plain(x) and _is_plain(delta) and _is_plain(weight) else None
    if lib is None:
        return ref.add_rms_norm(x, delta, weight, eps)
    return cpu.add_rms_norm(lib, x, delta, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[.., 2I] holding gate then up -> silu(gate) * up, [.., I]."""
    lib = cpu.library() if gate_up.shape[-1] % 16 == 0 and _is_plain(gate_up) else None
    return ref.silu_mul(gate_up) if lib is None else cpu.silu_mul(lib, gate_up)


def rope_write(
    heads: Tensor,
    num_heads: int,
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor | slice,
) -> Tensor:
    """Rotate queries and keys, store keys and values; returns the queries [B, N, H, D]."""
    lib = None
    if _is_plain(heads) and _is_plain(cos) and _is_plain(sin) and _is_plain(k_pool) and _is_plain(v_pool):
        lib = cpu.library()
    if lib is None:
        return ref.rope_write(heads, num_heads, cos, sin, k_pool, v_pool, slots)
    return cpu.rope_write(lib, heads, num_heads, cos, sin, k_pool, v_pool, slots)


def tree_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor | tuple[slice, ...],
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention of tree nodes over their rows of the pool."""
    lib = cpu.library() if _attention_applies(q, k_pool, v_pool, slots, bias) else None
    if lib is None:
        return ref.tree_attention(q, k_pool, v_pool, slots, bias, scale)
    return cpu.tree_attention(lib, q, k_pool, v_pool, slots, bias, scale)


def _attention_applies(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, slots: Tensor | tuple[slice, ...], bias: Tensor | None
) -> bool:
    """Whether the compiled attention takes these, and is the faster one."""
    head_dim = q.shape[3]
    rows_apart = q.dtype is torch.float32 and q.is_cpu and q.stride(3) == 1 and q.stride(2) == head_dim
    if isinstance(slots, Tensor):
        longest, readable = slots.shape[1], slots.is_contiguous()
    else:
        longest, readable = max(run.stop - run.start for run in slots), True
    return (
        rows_apart
        and readable
        and head_dim % 8 == 0
        and q.numel() * longest <= _MUCH_ATTENTION
        and _is_plain(k_pool)
        and _is_plain(v_pool)
        and (bias is None or _is_plain(bias))
        and not (q.requires_grad and torch.is_grad_enabled())
    )
