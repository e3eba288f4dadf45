"""The small operations around attention and experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import mla, paged, ref
from kernels.ops.base import (
    BFLOAT16,
    EXACT,
    FLOAT32,
    Arguments,
    Case,
    Cost,
    Operation,
    Source,
    Tolerance,
    size_of,
)

_HIDDEN = 4096  # of Mistral Small 4
_EPS = 1e-6


def _case(name: str, tolerance: Tolerance, make: Callable[..., Arguments], *arguments: Any) -> Case:
    return Case(name, lambda source: make(source, *arguments), tolerance)


def _norm(source: Source, num_rows: int, width: int, dtype: torch.dtype) -> Arguments:
    return source.normal(num_rows, width, dtype=dtype), source.normal(width, dtype=dtype), _EPS


def _norm_cost(x: Tensor, weight: Tensor, eps: float) -> Cost:
    return Cost(2 * size_of(x) + size_of(weight))


def _silu(source: Source, num_rows: int, inner: int, dtype: torch.dtype) -> Arguments:
    return (source.normal(num_rows, 2 * inner, dtype=dtype, scale=2.0),)


def _silu_cost(gate_up: Tensor) -> Cost:
    return Cost(size_of(gate_up) * 3 // 2)


def _slots(source: Source, num: int, num_slots: int) -> Tensor:
    """Some of a pool's slots, in any order, each once."""
    return source.permutation(num_slots)[:num]


def _angles(source: Source, num_rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of angles at random, [rows, 1, width] each."""
    angles = source.normal(num_rows, 1, width, scale=3.0)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rope(
    source: Source, num_rows: int, heads: tuple[int, int], dim: int, dtype: torch.dtype, pool: torch.dtype
) -> Arguments:
    given = source.normal(num_rows, heads[0] + 2 * heads[1], dim, dtype=dtype)
    pools = [source.normal(heads[1], 2 * num_rows + 16, dim, dtype=pool) for _ in range(2)]
    slots = _slots(source, num_rows, 2 * num_rows + 16)
    scales = (0.05, 0.1) if pool == torch.float8_e4m3fn else (1.0, 1.0)
    return (given, heads[0], *_angles(source, num_rows, dim, dtype), *pools, slots, *scales)


def _rope_cost(heads: Tensor, num_heads: int, cos: Tensor, sin: Tensor, *rest: Any) -> Cost:
    stored = (heads.shape[-2] - num_heads) * heads[..., 0, :].numel() * rest[0].element_size()
    return Cost(size_of(heads, heads[..., :num_heads, :], cos, sin) + stored)


def _latent(
    source: Source,
    num_rows: int,
    heads: int,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    pool_dtype: torch.dtype,
    scales: bool = True,
) -> Arguments:
    content, rank, turned = sizes
    q = source.normal(num_rows, heads, content + turned, dtype=dtype)
    beside = source.normal(num_rows, 24 + rank + turned, dtype=dtype)  # as the projections leave them
    pool = source.normal(2 * num_rows + 16, rank + turned, dtype=pool_dtype)
    return (
        *(q, beside[:, 24:], source.normal(rank, dtype=dtype), _EPS),
        *_angles(source, num_rows, turned // 2, torch.float32),
        source.uniform(num_rows, 1, 1) + 1.0 if scales else None,
        *(pool, _slots(source, num_rows, len(pool)), 0.05 if pool_dtype == torch.float8_e4m3fn else 1.0),
    )


def _latent_cost(q: Tensor, latents: Tensor, *rest: Any) -> Cost:
    return Cost(2 * size_of(q) + size_of(latents) + latents.numel() * rest[5].element_size())


def _absorbed(source: Source, num_nodes: int, sizes: tuple[int, ...], dtype: torch.dtype) -> Arguments:
    """Queries of so many heads, content and rotated, and the matrices into a latent space."""
    heads, content, turned, rank = sizes
    q = source.normal(2, num_nodes, heads, content + turned, dtype=dtype)
    return q, source.normal(heads, content, rank, dtype=dtype, scale=content**-0.5)


def _absorb_cost(q: Tensor, key_up: Tensor) -> Cost:
    _, content, rank = key_up.shape
    written = q[..., 0].numel() * (rank + q.shape[-1] - content) * q.element_size()
    return Cost(size_of(q, key_up) + written, 2 * q.shape[:2].numel() * key_up.numel())


def _expanded(source: Source, num_nodes: int, sizes: tuple[int, ...], dtype: torch.dtype) -> Arguments:
    """Latents of so many heads, and the matrices out of their space."""
    heads, rank, value = sizes
    latents = source.normal(2, num_nodes, heads, rank, dtype=dtype)
    return latents, source.normal(heads, value, rank, dtype=dtype, scale=rank**-0.5)


def _expand_cost(latents: Tensor, value_up: Tensor) -> Cost:
    written = latents[..., 0].numel() * value_up.shape[1] * latents.element_size()
    return Cost(size_of(latents, value_up) + written, 2 * latents.shape[:2].numel() * value_up.numel())


def _paths(source: Source, num_seqs: int, num_nodes: int, accepted: int, pools: tuple[int, ...]) -> Arguments:
    """The last ``accepted`` nodes of a tree and its root; every other sequence accepts the root alone."""
    last = range(num_nodes - accepted, num_nodes)
    path = [[0, *(last if seq % 2 == 0 else ())] for seq in range(num_seqs)]
    padded = [nodes + [-1] * (num_nodes - len(nodes)) for nodes in path]
    layers, kinds, heads, width = pools
    num_slots = 2 * num_seqs * num_nodes + 16
    rows = source.normal(layers, kinds, heads, num_slots, width, dtype=torch.bfloat16)
    slots = _slots(source, num_seqs * num_nodes, num_slots).view(num_seqs, num_nodes)
    return rows, source.tensor(padded), slots


def _path_cost(pools: Tensor, path: Tensor, slots: Tensor) -> Cost:
    order = torch.arange(path.shape[1], device=path.device)
    row = pools[..., 0, :].numel() * pools.element_size()
    return Cost(2 * row * int((path > order).sum()) + size_of(path, slots))


def _parents(source: Source, num_seqs: int, num_nodes: int) -> Arguments:
    """Random trees, the last two nodes of each being padding."""
    parents = (source.uniform(num_seqs, num_nodes) * source.tensor(range(num_nodes))).long()
    parents[:, -2:] = -1
    parents[:, 0] = -1
    return (parents,)


def _logits(source: Source, num_seqs: int, num_rows: int, width: int, filters: bool) -> Arguments:
    """Every third sequence is greedy. Few different logits, so that many are equal, where they are."""
    logits = source.normal(num_seqs, num_rows, width, scale=3.0)
    logits[::3] = (logits[::3] * 0.5).round()
    temperature = source.uniform(num_seqs) + 0.5
    temperature[::3] = 0.0
    return (
        logits,
        source.integers(0, 1 << 40, num_seqs, num_rows),
        temperature,
        source.uniform(num_seqs) if filters else None,
        source.normal(num_seqs, num_rows) if filters else None,
        source.integers(-(1 << 62), 1 << 62, num_seqs),
    )


def _scores(source: Source, shape: tuple[int, ...], count: int) -> Arguments:
    return source.normal(*shape, scale=3.0), count


def _first_cost(*arguments: Any) -> Cost:
    return Cost(size_of(arguments[0]))


_FP8, _BF16, _F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
_CODES = Tolerance(0.0, 0.15)  # of FP8: the next code where both round from nearly the same number
_TURNED = Tolerance(1e-5, 1e-4)

_NORM_TINY = tuple(
    _case(f"{rows}x{width}", FLOAT32, _norm, rows, width, _F32) for rows, width in ((3, 40), (1, 64))
)
_NORM_REAL = tuple(
    _case(f"{rows}x{_HIDDEN}", BFLOAT16, _norm, rows, _HIDDEN, _BF16) for rows in (1, 4, 8, 64)
)
_SILU_TINY = (
    _case("3 of 40", FLOAT32, _silu, 3, 40, _F32),
    _case("2 of 1100", FLOAT32, _silu, 2, 1100, _F32),
)
# inner widths of SmolLM2's and of Llama's larger MLPs
_SILU_REAL = tuple(
    _case(f"{rows} of {inner}", BFLOAT16, _silu, rows, inner, _BF16)
    for rows, inner in ((1, 1536), (8, 14336), (512, 14336))
)
_ROPE_TINY = (
    _case("3 tokens", _TURNED, _rope, 3, (4, 2), 16, _F32, _F32),
    _case("wide of 24", _TURNED, _rope, 2, (3, 1), 24, _F32, _F32),
)
_ROPE_REAL = (
    *(_case(f"{rows} tokens", BFLOAT16, _rope, rows, (32, 8), 128, _BF16, _BF16) for rows in (1, 8, 512)),
    _case("fp8, 8 tokens", _CODES, _rope, 8, (32, 8), 128, _BF16, _FP8),
)
_SIZES = 64, 256, 64  # of Mistral Small 4
_LATENT_TINY = (
    _case("3 tokens", _TURNED, _latent, 3, 2, (8, 32, 8), _F32, _F32),
    _case("odd sizes", _TURNED, _latent, 2, 3, (6, 20, 4), _F32, _F32, False),
)
_LATENT_REAL = (
    *(_case(f"{rows} tokens", BFLOAT16, _latent, rows, 32, _SIZES, _BF16, _BF16) for rows in (1, 8, 512)),
    _case("fp8, 8 tokens", _CODES, _latent, 8, 32, _SIZES, _BF16, _FP8),
)
_ABSORB_TINY = (
    _case("3 nodes", _TURNED, _absorbed, 3, (2, 16, 8, 40), _F32),
    _case("odd sizes", _TURNED, _absorbed, 9, (3, 6, 10, 20), _F32),
)
_ABSORB_REAL = tuple(
    _case(f"2 x {nodes} nodes", BFLOAT16, _absorbed, nodes, (32, 64, 64, 256), _BF16) for nodes in (1, 4, 32)
)
_EXPAND_TINY = (
    _case("3 nodes", _TURNED, _expanded, 3, (2, 32, 40), _F32),
    _case("odd sizes", _TURNED, _expanded, 9, (3, 20, 10), _F32),
)
_EXPAND_REAL = tuple(
    _case(f"2 x {nodes} nodes", BFLOAT16, _expanded, nodes, (32, 256, 128), _BF16) for nodes in (1, 4, 32)
)
_PATH_TINY = (
    _case("overlapping", EXACT, _paths, 3, 5, 3, (2, 1, 1, 20)),
    _case("wide rows", EXACT, _paths, 2, 9, 4, (1, 2, 2, 130)),
)
_PATH_REAL = (
    _case("latents", EXACT, _paths, 1, 8, 3, (36, 1, 1, 320)),
    _case("K and V", EXACT, _paths, 8, 64, 5, (32, 2, 8, 128)),
)
_CHOOSE_TINY = (
    _case("no filters", EXACT, _logits, 4, 3, 5000, False),
    _case("filters", EXACT, _logits, 5, 2, 700, True),
)
_CHOOSE_REAL = (
    _case("1x4", EXACT, _logits, 1, 4, 131072, False),
    _case("8x8", EXACT, _logits, 8, 8, 131072, False),
    _case("8x8, filters", EXACT, _logits, 8, 8, 131072, True),
)
_BEST_TINY = (
    _case("3 of 5000", FLOAT32, _scores, (2, 2, 5000), 3),
    _case("all of 8", FLOAT32, _scores, (3, 8), 8),
)
_BEST_REAL = (
    _case("4 of 32k", FLOAT32, _scores, (1, 1, 32768), 4),
    _case("8 of 32k", FLOAT32, _scores, (8, 8, 32768), 8),
    _case("64 of 131k", FLOAT32, _scores, (4, 131072), 64),
)

OPERATIONS = (
    Operation("rms_norm", ref.rms_norm, "norm:rms_norm", _NORM_TINY, _NORM_REAL, _norm_cost),
    Operation("silu_mul", ref.silu_mul, "swiglu:silu_mul", _SILU_TINY, _SILU_REAL, _silu_cost),
    Operation(
        *("rope_write", paged.rope_write, "rope:rope_write", _ROPE_TINY, _ROPE_REAL, _rope_cost),
        changes=(4, 5),
    ),
    Operation(
        *("rope_latent_write", paged.rope_latent_write, "rope:rope_latent_write"),
        *(_LATENT_TINY, _LATENT_REAL, _latent_cost),
        changes=(7,),
    ),
    Operation(
        *("absorb_queries", mla.absorb_queries, "heads:absorb_queries"),
        *(_ABSORB_TINY, _ABSORB_REAL, _absorb_cost),
    ),
    Operation(
        *("expand_values", mla.expand_values, "heads:expand_values"),
        *(_EXPAND_TINY, _EXPAND_REAL, _expand_cost),
    ),
    Operation(
        *("compact_path", paged.compact_path, "tree:compact_path", _PATH_TINY, _PATH_REAL, _path_cost),
        changes=(0,),
    ),
    Operation(
        *("ancestor_words", paged.ancestor_words, "tree:ancestor_words"),
        tuple(_case(f"{num} nodes", EXACT, _parents, 3, num) for num in (2, 9, 64)),
        tuple(_case(f"{num} nodes", EXACT, _parents, 8, num) for num in (8, 64)),
        _first_cost,
    ),
    Operation("choose", ref.choose, "choose:choose", _CHOOSE_TINY, _CHOOSE_REAL, _first_cost),
    Operation("best", ref.best, "choose:best", _BEST_TINY, _BEST_REAL, _first_cost),
)
