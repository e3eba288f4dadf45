"""Tree attention over paged rows: grouped-query heads over K and V, and absorbed MLA over latents.

Both are one kernel. MLA's rows are K and V of a single head that all query heads share: the leading numbers
of a row are its value, and the rotated ones behind them only take part in the scores.

    rows        the nodes of a sequence times the query heads of one KV head, packed: node by node, so that
                K and V are read once for all of them, and a tile is full where one node has few heads
    splits      a sequence's keys are cut into as many pieces as fill the GPU. Each piece leaves its result
                in float32 and the logarithm of its sum of exponentials; ``_merge`` weighs them
    visibility  committed rows are seen by every node; only tiles that reach beyond them look at words

Lengths, page table and words are read on the device. How many splits there are follows from the width of the
page table; pieces have at least ``_LEAST_KEYS`` keys, and those behind a sequence's end do nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.errors import require
from kernels.paged import MOST_OWN, TreeRows
from kernels.triton.host import (
    FLOATS,
    FP8,
    INTERPRETED,
    check_contiguous,
    check_dtype,
    num_processors,
    power_of_two,
)
from kernels.triton.pdl import launch, release, wait

_LEAST_KEYS = 256  # of a split
_LOG2_E = 1.4426950408889634
_WIDEST = 256  # numbers of a head, of a latent, of what is rotated
_INDICES = (torch.int64, torch.int32)


@triton.jit
def _load_rows(row: tl.tensor, is_row: tl.tensor, dim: tl.constexpr, block: tl.constexpr) -> tl.tensor:
    """[rows, block]: ``dim`` numbers from every pointer, zeros behind them and where there is no row."""
    column = tl.arange(0, block)
    inside = is_row[:, None]
    if block != dim:
        inside = inside & (column < dim)[None, :]
    return tl.load(row[:, None] + column[None, :], mask=inside, other=0.0)


@triton.jit
def _attend(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    page_table: tl.tensor,
    kv_lens: tl.tensor,
    words: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    scale: tl.tensor,
    value_scale: tl.tensor,
    table_stride: tl.tensor,
    num_slots: tl.tensor,
    num_nodes: tl.tensor,
    num_own: tl.tensor,
    start: tl.tensor,
    most_rows: tl.tensor,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    page_size: tl.constexpr,
    value_dim: tl.constexpr,
    rotated_dim: tl.constexpr,
    value_block: tl.constexpr,
    rotated_block: tl.constexpr,
    block_rows: tl.constexpr,
    block_keys: tl.constexpr,
    least_keys: tl.constexpr,
    is_chain: tl.constexpr,
    is_split: tl.constexpr,
    compute: tl.constexpr,
    dependent: tl.constexpr = False,
) -> None:
    """One tile of rows over one split. Scores are in base 2: ``scale`` holds the factor."""
    release(dependent)
    wait(dependent)
    key_dim: tl.constexpr = value_dim + rotated_dim
    seq = (tl.program_id(2) // num_kv_heads).to(tl.int64)
    kv_head = tl.program_id(2) % num_kv_heads
    split = tl.program_id(1)
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    is_row = row < num_nodes * group
    node = tl.minimum(row // group, num_nodes - 1)
    head = kv_head * group + row % group
    place = (seq * num_nodes + node) * (num_kv_heads * group) + head  # of a row in q and out

    kv_len = tl.load(kv_lens + seq).to(tl.int32)
    if is_chain:  # no row of this tile sees anything behind its last node
        last = tl.minimum(((tl.program_id(0) + 1) * block_rows - 1) // group, num_nodes - 1)
        end = kv_len + last + 1
    else:
        end = kv_len + num_own
    end = tl.minimum(end, most_rows)  # padding may reach past the pages of a sequence, and of the table
    length = tl.cdiv(tl.cdiv(end - start, tl.num_programs(1)), block_keys) * block_keys
    length = tl.maximum(length, least_keys)
    first = start + split * length
    if is_split:
        all_rows = tl.num_programs(2).to(tl.int64) * num_nodes * group
        lse += split * all_rows
        out += split * all_rows * value_dim
        if first >= end:
            tl.store(lse + place, tl.full([block_rows], float("-inf"), tl.float32), mask=is_row)
            return

    q_row = q + place * key_dim
    q_content = _load_rows(q_row, is_row, value_dim, value_block).to(compute)
    if rotated_dim > 0:
        q_turned = _load_rows(q_row + value_dim, is_row, rotated_dim, rotated_block).to(compute)
    head_start = kv_head.to(tl.int64) * num_slots
    most = tl.full([block_rows], float("-inf"), tl.float32)
    total = tl.zeros([block_rows], tl.float32)
    result = tl.zeros([block_rows, value_block], tl.float32)
    for begin in range(first, tl.minimum(first + length, end), block_keys):
        key = begin + tl.arange(0, block_keys)
        is_key = key < end
        page = tl.load(page_table + seq * table_stride + key // page_size, mask=is_key, other=0)
        slot = head_start + page.to(tl.int64) * page_size + key % page_size
        key_row = keys + slot * key_dim
        content = _load_rows(key_row, is_key, value_dim, value_block).to(compute)
        scores = tl.dot(q_content, tl.trans(content), input_precision="ieee")
        if rotated_dim > 0:
            beside = _load_rows(key_row + value_dim, is_key, rotated_dim, rotated_block).to(compute)
            scores = tl.dot(q_turned, tl.trans(beside), scores, input_precision="ieee")
            value = content
        else:
            value = _load_rows(values + slot * value_dim, is_key, value_dim, value_block).to(compute)
        scores *= scale
        if begin + block_keys > kv_len:  # one loop and a branch: a loop of its own would spill registers
            own = key - kv_len
            if is_chain:
                seen = own[None, :] <= node[:, None]
            else:  # loaded where it is needed: held all along, words cost registers that the products lack
                word = tl.load(words + seq * num_nodes + node)
                bit = (word[:, None] >> tl.minimum(tl.maximum(own, 0), 63)[None, :].to(tl.int64)) & 1
                seen = ((own < 0)[None, :] | (bit != 0)) & is_key[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(most, tl.max(scores, axis=1))
        base = tl.where(highest == float("-inf"), 0.0, highest)  # a row that has seen nothing yet
        weight = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(most - base)
        total = total * rescale + tl.sum(weight, axis=1)
        result = tl.dot(weight.to(compute), value, result * rescale[:, None], input_precision="ieee")
        most = highest
    result = result * (value_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    column = tl.arange(0, value_block)
    where = out + place[:, None] * value_dim + column[None, :]
    tl.store(where, result.to(out.dtype.element_ty), mask=is_row[:, None] & (column < value_dim)[None, :])
    if is_split:
        tl.store(lse + place, most + tl.log2(total), mask=is_row)


@triton.jit
def _merge(
    parts: tl.tensor,
    lse: tl.tensor,
    out: tl.tensor,
    kv_lens: tl.tensor,
    num_rows: tl.tensor,
    rows_of_seq: tl.tensor,
    num_own: tl.tensor,
    num_splits: tl.tensor,
    least_keys: tl.constexpr,
    value_dim: tl.constexpr,
    value_block: tl.constexpr,
    block: tl.constexpr,
    dependent: tl.constexpr = False,
) -> None:
    """One row: parts [splits, rows, D] weighed by lse [splits, rows]. A split that saw nothing has -inf
    there, and its part was never written. Those that would begin behind the sequence's last key, however
    short splits are, are not looked at: a page table may be wide for all."""
    release(dependent)
    wait(dependent)
    row = tl.program_id(0).to(tl.int64)
    num_keys = tl.load(kv_lens + row // rows_of_seq).to(tl.int32) + num_own
    num_splits = tl.minimum(num_splits, tl.cdiv(num_keys, least_keys))
    column = tl.arange(0, value_block)
    most = -float("inf")
    total = 0.0
    result = tl.zeros([value_block], tl.float32)
    for begin in range(0, num_splits, block):
        place = (begin + tl.arange(0, block)).to(tl.int64) * num_rows + row
        logs = tl.load(lse + place, mask=begin + tl.arange(0, block) < num_splits, other=float("-inf"))
        saw = logs > float("-inf")
        part = _load_rows(parts + place * value_dim, saw, value_dim, value_block)
        highest = tl.maximum(most, tl.max(logs, axis=0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp2(logs - base)
        rescale = tl.exp2(most - base)
        total = total * rescale + tl.sum(weight, axis=0)
        result = result * rescale + tl.sum(part * weight[:, None], axis=0)
        most = highest
    result = (result / total).to(out.dtype.element_ty)
    tl.store(out + row * value_dim + column, result, mask=column < value_dim)


@dataclass(frozen=True, slots=True)
class _Tile:
    """rows x keys of a tile, and how many such programs a processor holds at once."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    per_processor: int


def _tile(num_rows: int, key_dim: int, key_bytes: int) -> _Tile:
    """For sm_90 and sm_100, by what compiling says of registers and shared memory."""
    if key_bytes == 4:  # products in float32 run on no matrix unit
        return _Tile(16, 32, 4, 1, 2)
    if num_rows <= 16 and key_dim <= 128:
        return _Tile(16, 64, 4, 3, 4)
    if key_dim <= 128:
        return _Tile(64, 64, 4, 3, 2)
    return _Tile(64, 64, 8, 2, 1) if key_bytes == 2 else _Tile(64, 32, 8, 3, 1)


def mha_tree_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    rows: TreeRows,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Grouped-query attention of tree nodes over paged K and V: see ``kernels.paged``."""
    operation = "mha_tree_attention"
    require(q.dim() == 4, operation, f"q has shape {list(q.shape)}, expected [B, N, H, D]")
    num_kv_heads, head_dim = k_pool.shape[0], k_pool.shape[-1]
    require(
        k_pool.dim() == 3 and k_pool.shape == v_pool.shape and q.shape[3] == head_dim,
        operation,
        f"pools have shapes {list(k_pool.shape)} and {list(v_pool.shape)}, expected [Hkv, S, {q.shape[3]}]",
    )
    heads = f"{q.shape[2]} query heads, expected a multiple of {num_kv_heads} KV heads"
    require(num_kv_heads > 0 and q.shape[2] % num_kv_heads == 0, operation, heads)
    require(0 < head_dim <= _WIDEST, operation, f"heads have {head_dim} numbers, expected 1 to {_WIDEST}")
    require(k_pool.dtype == v_pool.dtype, operation, f"K is {k_pool.dtype}, V is {v_pool.dtype}")
    return _run(operation, q, k_pool, v_pool, rows, scale * k_scale, v_scale, head_dim)


def mla_tree_attention(
    q: Tensor, pool: Tensor, rows: TreeRows, scale: float, value_dim: int, pool_scale: float = 1.0
) -> Tensor:
    """Attention of tree nodes over paged latent rows, absorbed: see ``kernels.paged``."""
    operation = "mla_tree_attention"
    require(q.dim() == 4, operation, f"q has shape {list(q.shape)}, expected [B, N, H, R + P]")
    widths = f"pool has shape {list(pool.shape)}, expected [S, {q.shape[3]}]"
    require(pool.dim() == 2 and pool.shape[1] == q.shape[3], operation, widths)
    sizes = value_dim, q.shape[3] - value_dim
    require(
        all(0 < size <= _WIDEST for size in sizes),
        operation,
        f"rows have {sizes[0]} + {sizes[1]} numbers, expected 1 to {_WIDEST} each",
    )
    return _run(operation, q, pool[None], pool[None], rows, scale * pool_scale, pool_scale, value_dim)


def _run(
    operation: str,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: TreeRows,
    scale: float,
    value_scale: float,
    value_dim: int,
) -> Tensor:
    """q: [B, N, H, K]; keys: [Hkv, S, K]; values: the same, or [Hkv, S, D] where K is D."""
    _check(operation, q, keys, values, rows)
    num_seqs, num_nodes, num_heads, key_dim = q.shape
    num_kv_heads, num_slots, _ = keys.shape
    group = num_heads // num_kv_heads
    out = q.new_empty(num_seqs, num_nodes, num_heads, value_dim)
    if out.numel() == 0:
        return out
    tile = _tile(num_nodes * group, key_dim, keys.element_size())
    num_tiles = triton.cdiv(num_nodes * group, tile.rows)
    wanted = num_processors(q.device) * tile.per_processor // (num_tiles * num_seqs * num_kv_heads)
    num_splits = max(min(wanted, triton.cdiv(rows.most_rows, _LEAST_KEYS)), 1)
    num_rows = num_seqs * num_nodes * num_heads
    parts, lse = out, None
    if num_splits > 1:
        parts = torch.empty(num_splits, num_rows, value_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(num_splits, num_rows, dtype=torch.float32, device=q.device)
    _attend[(num_tiles, num_splits, num_seqs * num_kv_heads)](
        q,
        keys,
        values,
        rows.page_table,
        rows.kv_lens,
        rows.words,
        parts,
        lse,
        scale * _LOG2_E,
        value_scale,
        rows.page_table.stride(0),
        num_slots,
        num_nodes,
        rows.num_own,
        rows.start,
        rows.most_rows,
        num_kv_heads=num_kv_heads,
        group=group,
        page_size=rows.page_size,
        value_dim=value_dim,
        rotated_dim=key_dim - value_dim,
        value_block=_block(value_dim),
        rotated_block=_block(key_dim - value_dim),
        block_rows=tile.rows,
        block_keys=tile.keys,
        least_keys=_LEAST_KEYS,
        is_chain=rows.words is None,
        is_split=num_splits > 1,
        compute=_compute_type(q.dtype, keys.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch(),
    )
    if num_splits > 1:
        _merge[(num_rows,)](
            parts,
            lse,
            out,
            rows.kv_lens,
            num_rows,
            num_nodes * num_heads,
            rows.num_own,
            num_splits,
            least_keys=_LEAST_KEYS,
            value_dim=value_dim,
            value_block=_block(value_dim),
            block=min(power_of_two(num_splits), 8),
            num_warps=2,
            **launch(),
        )
    return out


def _block(dim: int) -> int:
    """Columns of a tile that holds rows of so many numbers."""
    return max(power_of_two(dim), 16)


def _compute_type(activations: torch.dtype, pool: torch.dtype) -> tl.dtype:
    """What is multiplied. FP8 becomes float16, which holds it exactly and which one instruction makes of it;
    the interpreter multiplies nothing shorter than float32 rightly."""
    if INTERPRETED or activations == torch.float32:
        return tl.float32
    return tl.bfloat16 if activations == torch.bfloat16 and pool != FP8 else tl.float16


def _check(operation: str, q: Tensor, keys: Tensor, values: Tensor, rows: TreeRows) -> None:
    """Raises UnsupportedError for what the kernel does not take of what both forms have in common."""
    num_seqs, num_nodes = q.shape[:2]
    table, lens, words = rows.page_table, rows.kv_lens, rows.words
    check_dtype(operation, "q", q.dtype, FLOATS)
    check_dtype(operation, "the pool", keys.dtype, (q.dtype, FP8))
    check_dtype(operation, "page_table", table.dtype, _INDICES)
    check_dtype(operation, "kv_lens", lens.dtype, _INDICES)
    check_contiguous(operation, q=q, keys=keys, values=values, kv_lens=lens, words=words)
    shapes = f"page_table {list(table.shape)} and kv_lens {list(lens.shape)}"
    require(
        table.dim() == 2 and len(table) == num_seqs and lens.shape == (num_seqs,) and table.stride(1) == 1,
        operation,
        f"{shapes}, expected [{num_seqs}, P] with rows of stride 1 and [{num_seqs}]",
    )
    require(rows.page_size > 0, operation, f"a page size of {rows.page_size}, expected at least 1")
    if words is None:
        chain = f"{rows.num_own} own rows of chains, expected one for each of {num_nodes} nodes"
        require(rows.num_own == num_nodes, operation, chain)
        return
    check_dtype(operation, "words", words.dtype, (torch.int64,))
    sizes = f"words of shape {list(words.shape)}, expected [{num_seqs}, {num_nodes}]"
    require(words.shape == (num_seqs, num_nodes), operation, sizes)
    own = f"{rows.num_own} own rows, expected 1 to {MOST_OWN}, the bits of a word"
    require(0 < rows.num_own <= MOST_OWN, operation, own)
