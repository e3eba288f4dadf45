"""Which implementation an operation takes: the kernel registered for GPUs where the tensors lie on one, the
compiled CPU kernels where they apply, else plain torch.

Every function has the signature and meaning of its twin in ``kernels.ref`` or ``kernels.paged``. What a GPU's
kernel does not take it refuses (``kernels.errors``); plain torch does not step in behind the caller's back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import cpu, cpu_choose, device, paged, ref
from kernels.cpu_layer import FusedLayer, LayerRows, Part

# Past this many multiply-adds of one sequence's attention, torch's products on all cores beat ours. A tree
# gets there at a shorter context than its tokens alone; between the two their results agree but for rounding.
_MUCH_ATTENTION = 1 << 25


def _kernels_for(x: Tensor) -> cpu.Kernels | None:
    """The compiled kernels, if they may touch this tensor: on a CPU, contiguous, without gradients."""
    if not (x.is_cpu and x.is_contiguous()) or (x.requires_grad and torch.is_grad_enabled()):
        return None
    return cpu.kernels_for(x.dtype)


def _is_plain(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor may be handed on together with others of a dtype."""
    return (
        x.dtype is dtype
        and x.is_cpu
        and x.is_contiguous()
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension."""
    if device.on_gpu(x):
        normed: Tensor = device.registered("rms_norm")(x, weight, eps)
        return normed
    kernels = _kernels_for(x)
    if kernels is None or not _is_plain(weight, x.dtype):
        return ref.rms_norm(x, weight, eps)
    return cpu.rms_norm(kernels, x, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[.., 2I] holding gate then up -> silu(gate) * up, [.., I]."""
    if device.on_gpu(gate_up):
        activated: Tensor = device.registered("silu_mul")(gate_up)
        return activated
    kernels = _kernels_for(gate_up) if gate_up.shape[-1] % 16 == 0 else None
    return ref.silu_mul(gate_up) if kernels is None else cpu.silu_mul(kernels, gate_up)


def rope_write(
    heads: Tensor,
    num_heads: int,
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor | slice,
) -> Tensor:
    """Rotate queries and keys, store keys and values; returns the queries [.., H, D]."""
    if device.on_gpu(heads):
        given = cos, sin, k_pool, v_pool, _listed(slots, heads.device)
        queries: Tensor = device.registered("rope_write")(heads, num_heads, *given)
        return queries
    kernels = _kernels_for(heads)
    if kernels is None or not _rotation_applies(heads, num_heads, cos, sin, k_pool, v_pool, slots):
        return ref.rope_write(heads, num_heads, cos, sin, k_pool, v_pool, slots)
    return cpu.rope_write(kernels, heads, num_heads, cos, sin, k_pool, v_pool, slots)


def _listed(slots: Tensor | slice, where: torch.device) -> Tensor:
    """Slots one by one."""
    return torch.arange(slots.start, slots.stop, device=where) if isinstance(slots, slice) else slots


def tree_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor | tuple[slice, ...],
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention of tree nodes over their rows of the pool."""
    kernels = cpu.kernels_for(q.dtype) if _attention_applies(q, k_pool, v_pool, slots, bias) else None
    if kernels is None:
        return ref.tree_attention(q, k_pool, v_pool, slots, bias, scale)
    return cpu.tree_attention(kernels, q, k_pool, v_pool, slots, bias, scale)


def pack_half(weight: Tensor) -> Any | None:
    """Round a [out, in] float32 CPU weight to float16 and pack it for ``half_linear``.

    None where nothing here multiplies it, or the weight's range does not allow it.
    """
    kernels = cpu.panel_kernels()
    if kernels is None or not ref.fits_half(weight):
        return ref.pack_half(weight)
    return cpu.pack_half(kernels, weight)


def half_linear(x: Tensor, packed: Any) -> Tensor:
    """x [.., in] float32 times a weight from ``pack_half`` -> [.., out] float32."""
    return panel_linear(x, packed) if isinstance(packed, cpu.PanelMatrix) else ref.half_linear(x, packed)


def pack_bytes(weight: Tensor) -> Any | None:
    """Round every row of a [out, in] float32 CPU weight to 255 values and pack it for ``panel_linear``; None
    where nothing here multiplies it."""
    kernels = cpu.panel_kernels()
    return None if kernels is None or not ref.fits_half(weight) else cpu.pack_bytes(kernels, weight)


def panel_linear(x: Tensor, packed: cpu.PanelMatrix) -> Tensor:
    """x [.., in] float32 times a weight from ``pack_bytes`` -> [.., out] float32."""
    assert x.is_cpu
    assert x.dtype is torch.float32
    assert x.shape[-1] == packed.num_inputs
    assert not (x.requires_grad and torch.is_grad_enabled()), "the product has no gradient"
    return cpu.panel_linear(x.contiguous(), packed)


def choose(
    logits: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_p: Tensor | None,
    floors: Tensor | None,
    seeds: Tensor,
) -> Tensor:
    """The tokens chosen after some nodes, [B, R]; see the reference."""
    if device.on_gpu(logits):
        choice: Tensor = device.registered("choose")(logits, positions, temperature, top_p, floors, seeds)
        return choice
    kernel = cpu_choose.choose_kernel() if _is_plain(logits, torch.float32) else None
    if top_p is None:
        top_p = torch.ones_like(temperature)
    given = (logits, positions, temperature, top_p, floors, seeds)
    return ref.choose(*given) if kernel is None else cpu_choose.choose(kernel, *given)


# --- over paged rows, as a GPU takes them


mha_tree_attention = device.with_kernel(paged.mha_tree_attention)
mla_tree_attention = device.with_kernel(paged.mla_tree_attention)
compact_path = device.with_kernel(paged.compact_path)
ancestor_words = device.with_kernel(paged.ancestor_words)


def rope_latent_write(
    q: Tensor,
    latents: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    query_scale: Tensor | None,
    pool: Tensor,
    slots: Tensor | slice,
    pool_scale: float = 1.0,
) -> Tensor:
    """Rotate MLA's queries, norm and rotate its latent rows and store them; returns the queries."""
    run = paged.rope_latent_write
    if device.on_gpu(q):
        run, slots = device.registered("rope_latent_write"), _listed(slots, q.device)
    queries: Tensor = run(q, latents, weight, eps, cos, sin, query_scale, pool, slots, pool_scale)
    return queries


def best(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest of logits [.., V], and the logarithm of their mass; see the reference."""
    if device.on_gpu(logits):
        values, columns, mass = device.registered("best")(logits, count)
        return values, columns, mass
    kernel = cpu_choose.best_kernel() if _is_plain(logits, torch.float32) else None
    return ref.best(logits, count) if kernel is None else cpu_choose.best(kernel, logits, count)


def layer_rows(
    layer: FusedLayer,
    rotation: tuple[Tensor, Tensor] | None,
    write: Tensor | slice,
    parts: Sequence[Part],
    pool: tuple[Tensor, Tensor],
) -> LayerRows | None:
    """The rows of one forward for fused layers, or None where their operations do better one by one.

    As ``LayerRows``; pool: K and V of any of the layers, [Hkv, S, D].
    """
    sizes, num_slots = layer.sizes, pool[0].shape[1]
    row_size = sizes.num_heads * sizes.head_dim
    applies = (
        all(_is_plain(part, torch.float32) for part in (*(rotation or ()), *pool))
        and (isinstance(write, slice) or _are_slots(write))
        and all(_part_applies(part, row_size, num_slots) for part in parts)
    )
    return LayerRows(sizes, rotation, write, parts, num_slots) if applies else None


def _part_applies(part: Part, row_size: int, num_slots: int) -> bool:
    """Whether a fused layer takes the rows of a part."""
    if isinstance(part.read, Tensor):
        longest, readable = part.read.shape[1], _are_slots(part.read)
    else:
        longest = max(run.stop - run.start for run in part.read)
        readable = all(run.start >= 0 and run.stop <= num_slots for run in part.read)
    seen = part.bias is None or (_is_plain(part.bias, torch.float32) and part.bias.shape[2] >= longest)
    return readable and seen and part.num_nodes * row_size * longest <= _MUCH_ATTENTION


def _rotation_applies(
    heads: Tensor,
    num_heads: int,
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor | slice,
) -> bool:
    """Whether the compiled rotation takes these. It checks no bounds, and does not broadcast."""
    num_all, head_dim = heads.shape[-2:]
    num_rows, (num_kv_heads, num_slots, _) = heads.shape[:-2].numel(), k_pool.shape
    if isinstance(slots, Tensor):
        reachable = _are_slots(slots) and slots.numel() == num_rows
    else:
        reachable = 0 <= slots.start == slots.stop - num_rows and slots.stop <= num_slots
    return (
        reachable
        and head_dim % 2 == 0
        and num_all == num_heads + 2 * num_kv_heads
        and cos.numel() == sin.numel() == num_rows * head_dim
        and _is_plain(cos, heads.dtype)
        and _is_plain(sin, heads.dtype)
        and _is_plain(k_pool, heads.dtype)
        and _is_plain(v_pool, heads.dtype)
    )


def _are_slots(slots: Tensor) -> bool:
    """Whether a list of slots can be read as it lies. That all are within the pool is its maker's promise."""
    return slots.dtype is torch.int64 and slots.is_cpu and slots.is_contiguous()


def _attention_applies(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, slots: Tensor | tuple[slice, ...], bias: Tensor | None
) -> bool:
    """Whether the compiled attention takes these, and is the faster one. It checks no bounds, and does not
    broadcast."""
    num_seqs, num_nodes, _, head_dim = q.shape
    rows_apart = q.is_cpu and q.stride(3) == 1 and q.stride(2) == head_dim
    if isinstance(slots, Tensor):
        longest, readable = slots.shape[1], slots.shape[0] == num_seqs and _are_slots(slots)
    else:
        longest, num_slots = max(run.stop - run.start for run in slots), k_pool.shape[1]
        readable = len(slots) == num_seqs and all(run.start >= 0 and run.stop <= num_slots for run in slots)
    if bias is not None:
        bias_len = bias.shape[-1]
        readable = readable and bias_len >= longest and bias.numel() == num_seqs * num_nodes * bias_len
    return (
        rows_apart
        and readable
        and head_dim % 8 == 0
        and q[0].numel() * longest <= _MUCH_ATTENTION
        and _is_plain(k_pool, q.dtype)
        and _is_plain(v_pool, q.dtype)
        and (bias is None or _is_plain(bias, torch.float32))
        and not (q.requires_grad and torch.is_grad_enabled())
    )
