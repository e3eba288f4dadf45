"""Tree attention: over paged K and V, and over paged latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels import paged
from kernels.ops.base import FLOAT32, Arguments, Case, Cost, Operation, Source, Tolerance, size_of
from kernels.paged import TreeRows, ancestor_words

_PAGE_SIZE = 16
_KERNEL = "_attend"  # the one with matrix products


def tree_rows(
    source: Source, contexts: tuple[int, ...], num_nodes: int, page_size: int, chain: bool
) -> TreeRows:
    """Sequences of these lengths on pages in any order, each with a random tree or a chain."""
    num_pages = -(-(max(contexts) + num_nodes) // page_size)
    pages = source.permutation(len(contexts) * num_pages).view(len(contexts), num_pages) + 1
    words = None
    if not chain:
        node = source.tensor(range(num_nodes))
        parents = (source.uniform(len(contexts), num_nodes) * node).long()
        parents[:, 0] = -1
        words = ancestor_words(parents)
    return TreeRows(pages, page_size, source.tensor(contexts), words, num_nodes)


def head_rows(
    source: Source, contexts: tuple[int, ...], num_nodes: int, num_own: int, page_size: int
) -> TreeRows:
    """As a head grows a level of its tree: no row 0, and more own rows than nodes. Every node sees own row
    0."""
    rows = tree_rows(source, contexts, num_own, page_size, chain=True)
    words = source.integers(0, 1 << num_own, len(contexts), num_nodes) | 1
    return replace(rows, words=words, start=1)


def _num_slots(rows: TreeRows) -> int:
    return (rows.page_table.numel() + 1) * rows.page_size


def _mla(
    source: Source,
    contexts: tuple[int, ...],
    num_nodes: int,
    heads: int = 32,
    sizes: tuple[int, int] = (256, 64),
    dtype: torch.dtype = torch.bfloat16,
    pool_dtype: torch.dtype | None = None,
    chain: bool = False,
    page_size: int = _PAGE_SIZE,
    num_own: int | None = None,
) -> Arguments:
    if num_own is None:
        rows = tree_rows(source, contexts, num_nodes, page_size, chain)
    else:
        rows = head_rows(source, contexts, num_nodes, num_own, page_size)
    width = sum(sizes)
    q = source.normal(len(contexts), num_nodes, heads, width, dtype=dtype)
    pool = source.normal(_num_slots(rows), width, dtype=pool_dtype or dtype)
    return q, pool, rows, 1 / math.sqrt(width), sizes[0], 1.0 if pool_dtype is None else 0.75


def _cut(source: Source, contexts: tuple[int, ...], *sizes: Any, **options: Any) -> Arguments:
    """As where only some sequences draft: the table has the rows that exist, padding reaches past it."""
    q, pool, rows, *rest = _mla(source, contexts, *sizes, **options)
    table = rows.page_table[:, : max(contexts) // rows.page_size + 1]
    return (q, pool, replace(rows, page_table=table.contiguous()), *rest)


def _mha(
    source: Source,
    contexts: tuple[int, ...],
    num_nodes: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    pool_dtype: torch.dtype | None = None,
    chain: bool = False,
    page_size: int = _PAGE_SIZE,
    num_own: int | None = None,
) -> Arguments:
    if num_own is None:
        rows = tree_rows(source, contexts, num_nodes, page_size, chain)
    else:
        rows = head_rows(source, contexts, num_nodes, num_own, page_size)
    q = source.normal(len(contexts), num_nodes, heads[0], head_dim, dtype=dtype)
    shape = heads[1], _num_slots(rows), head_dim
    pools = [source.normal(*shape, dtype=pool_dtype or dtype) for _ in range(2)]
    scales = (1.0, 1.0) if pool_dtype is None else (0.75, 1.5)
    return (q, *pools, rows, 1 / math.sqrt(head_dim), *scales)


def _seen(rows: TreeRows) -> int:
    """Rows of all sequences that anything is read of."""
    return int(rows.kv_lens.sum()) + rows.num_own * len(rows.kv_lens)


def _mla_cost(
    q: Tensor, pool: Tensor, rows: TreeRows, scale: float, value_dim: int, pool_scale: float
) -> Cost:
    num_rows, key_dim, seen = q.shape[:3].numel(), pool.shape[-1], _seen(rows)
    moved = size_of(q) * (key_dim + value_dim) // key_dim + seen * key_dim * pool.element_size()
    return Cost(moved, 2 * seen * num_rows // len(q) * (key_dim + value_dim))


def _mha_cost(q: Tensor, k_pool: Tensor, v_pool: Tensor, rows: TreeRows, *scales: float) -> Cost:
    num_kv_heads, _, dim = k_pool.shape
    num_rows, seen = q.shape[:3].numel(), _seen(rows)
    moved = 2 * size_of(q) + 2 * seen * num_kv_heads * dim * k_pool.element_size()
    return Cost(moved, 2 * seen * num_rows // len(q) * 2 * dim)


_FLOAT32 = {"dtype": torch.float32, "page_size": 4}
_ATTENTION = Tolerance(1e-2, 2e-2)  # of averages over many keys, in bfloat16


def _case(
    make: Callable[..., Arguments], name: str, *arguments: Any, tolerance: Tolerance, **options: Any
) -> Case:
    wgmma = (_KERNEL,) if options.pop("wgmma", False) else ()
    return Case(name, lambda source: make(source, *arguments, **options), tolerance, wgmma)


def _tiny(make: Callable[..., Arguments], name: str, *arguments: Any, **options: Any) -> Case:
    return _case(make, name, *arguments, tolerance=FLOAT32, **_FLOAT32, **options)


def _real(make: Callable[..., Arguments], name: str, *arguments: Any, **options: Any) -> Case:
    return _case(make, name, *arguments, tolerance=_ATTENTION, **options)


_RAGGED = (32768, 0, 257, 4000)
_MLA_TINY = (
    _tiny(_mla, "one node", (5,), 1, 4, (16, 16)),
    _tiny(_mla, "ragged", (300, 0, 33), 9, 3, (32, 16)),
    _tiny(_mla, "all bits", (20,), 64, 2, (16, 16)),
    _tiny(_mla, "chain", (40, 3), 70, 1, (16, 16), chain=True),
    _tiny(_mla, "odd sizes", (290,), 2, 3, (12, 6)),
    _tiny(_mla, "head", (290, 1), 4, 2, (16, 16), num_own=12),
    _tiny(_cut, "padding past the table", (7, 2), 5, 4, (16, 16)),
    _tiny(_mla, "fp8", (300,), 5, 4, (32, 16), pool_dtype=torch.float8_e4m3fn),
)
_MLA_REAL = (
    _real(_mla, "1 node 1k", (1024,), 1, wgmma=True),
    _real(_mla, "4 nodes 32k", (32768,), 4, wgmma=True),
    _real(_mla, "4 nodes 256k", (262144,), 4, wgmma=True),
    _real(_mla, "8 nodes ragged", _RAGGED, 8, wgmma=True),
    _real(_mla, "64 nodes 4k", (4096,), 64, wgmma=True),
    _real(_mla, "chunk of 512", (2000,), 512, chain=True, wgmma=True),
    _real(_mla, "fp8 4 nodes 32k", (32768,), 4, pool_dtype=torch.float8_e4m3fn, wgmma=True),
    _real(_mla, "fp8 8 nodes ragged", _RAGGED, 8, pool_dtype=torch.float8_e4m3fn, wgmma=True),
)
_MHA_TINY = (
    _tiny(_mha, "one node", (5,), 1, (2, 2), 16),
    _tiny(_mha, "ragged", (300, 0, 33), 9, (6, 2), 16),
    _tiny(_mha, "all bits", (20,), 64, (2, 1), 16),
    _tiny(_mha, "chain", (40, 3), 70, (1, 1), 16, chain=True),
    _tiny(_mha, "odd sizes", (290,), 2, (3, 1), 10),
    _tiny(_mha, "head", (290, 1), 4, (4, 2), 16, num_own=12),
    _tiny(_mha, "fp8", (300,), 5, (4, 2), 16, pool_dtype=torch.float8_e4m3fn),
)
_MHA_REAL = (
    _real(_mha, "64 wide, 1 node 1k", (1024,), 1, (9, 3), 64),
    _real(_mha, "64 wide, 8 nodes ragged", _RAGGED, 8, (32, 4), 64, wgmma=True),
    _real(_mha, "128 wide, 1 node 32k", (32768,), 1, (32, 8), 128),
    _real(_mha, "128 wide, 4 nodes 32k", (32768,), 4, (32, 8), 128),
    _real(_mha, "128 wide, 64 nodes 4k", (4096,), 64, (32, 8), 128, wgmma=True),
    _real(_mha, "128 wide, chunk of 512", (2000,), 512, (32, 8), 128, chain=True, wgmma=True),
    _real(_mha, "fp8 128 wide, 4 nodes 32k", (32768,), 4, (32, 8), 128, pool_dtype=torch.float8_e4m3fn),
    _real(_mha, "fp8 64 nodes", (4096,), 64, (32, 8), 128, pool_dtype=torch.float8_e4m3fn, wgmma=True),
)

OPERATIONS = (
    Operation(
        "mla_tree_attention",
        paged.mla_tree_attention,
        "attention:mla_tree_attention",
        _MLA_TINY,
        _MLA_REAL,
        _mla_cost,
    ),
    Operation(
        "mha_tree_attention",
        paged.mha_tree_attention,
        "attention:mha_tree_attention",
        _MHA_TINY,
        _MHA_REAL,
        _mha_cost,
    ),
)
