"""Who goes where, in one launch: router logits, the best experts, their weights, entries sorted by expert.

The products are cut by experts and by columns over enough programs to fill a GPU, since one could not read
the gate fast enough. The last of them adds the partial logits up in order and does the rest alone.

Nothing is sorted. A token chooses an expert once or not at all, so choices are a matrix of zeros and ones,
[tokens, experts]: the running sums down a column say how many entries of an expert come before a token's, the
column's sum how many it has, and the running sum of those where its entries begin.

Logits that are no numbers count as the lowest. Such a token's result is NaN anyhow, and its entries stay
within their bounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.errors import require
from kernels.moe import TILE_TOKENS, Routing, most_tiles
from kernels.triton.host import check_contiguous, check_dtype, power_of_two
from kernels.triton.pdl import launch, release, wait
from kernels.triton.product import arrived_last, fetch_matrix, multiply
from kernels.triton.scratch import counters
from kernels.triton.stored import check_norm, check_rows
from kernels.triton.tiles import tile_for

MOST_TOKENS = 64  # one program sorts them
_MOST_EXPERTS = 256  # shared ones included
# Tokens of a product, and those whose experts are chosen at once. From 64 on Triton 3.6 gives a float32
# product to sm_100's matrix unit, which rounds it to TF32 whatever precision was asked for.
_AT_ONCE = tl.constexpr(16)


@triton.jit(do_not_specialize=["all_tokens"])
def _route(
    x: tl.tensor,
    norm: tl.tensor,
    gate: tl.tensor,
    partial: tl.tensor,
    partial_squares: tl.tensor,
    counter: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    entries: tl.tensor,
    tiles: tl.tensor,
    num_tiles: tl.tensor,
    ranks: tl.tensor,
    first_places: tl.tensor,
    all_tokens: tl.tensor,
    width: tl.tensor,
    rows_of_tiles: tl.tensor,
    eps: tl.tensor,
    scale: tl.tensor,
    num_experts: tl.constexpr,
    num_chosen: tl.constexpr,
    num_shared: tl.constexpr,
    tile_tokens: tl.constexpr,
    num_tokens: tl.constexpr,
    num_rows: tl.constexpr,
    num_columns: tl.constexpr,
    num_splits: tl.constexpr,
    step: tl.constexpr,
    normed: tl.constexpr,
    dependent: tl.constexpr = False,
) -> None:
    token = tl.program_id(2) * _AT_ONCE + tl.arange(0, _AT_ONCE)
    live = token < all_tokens
    row = tl.program_id(0) * num_rows + tl.arange(0, num_rows)
    split = tl.program_id(1)
    share = width // num_splits
    release(dependent)
    if dependent:
        fetch_matrix(
            gate, gate, row.to(tl.int64), width, split * share, (split + 1) * share, num_rows, False
        )  # fmt: skip
    wait(dependent)
    product, squares = multiply(
        x, norm, gate, gate, token.to(tl.int64) * width, live, row.to(tl.int64), width, split * share,
        (split + 1) * share, 1.0, _AT_ONCE, num_rows, step, normed, False, False, False, tl.float32,
    )  # fmt: skip
    at = (split * num_tokens + token[:, None]) * num_experts + row[None, :]
    tl.store(partial + at, product)
    if tl.program_id(0) == 0:
        tl.store(partial_squares + split * num_tokens + token, squares)

    if arrived_last(counter, tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)):
        num_choices: tl.constexpr = num_chosen + num_shared
        expert = tl.arange(0, num_columns)
        counts = tl.zeros([num_columns], tl.int32)
        for start in range(0, all_tokens, _AT_ONCE):
            counts = _choose(
                start, expert, counts, partial, partial_squares, ids, weights, ranks, all_tokens, width, eps,
                scale, num_experts, num_chosen, num_shared, num_tokens, num_columns, num_splits, normed,
            )  # fmt: skip
        starts = tl.cumsum(counts, axis=0) - counts
        tl.store(first_places + expert, starts)
        tl.debug_barrier()  # what this program has stored can be read by all of its threads
        for start in range(0, all_tokens * num_choices, num_columns):
            entry = start + expert
            exists = entry < all_tokens * num_choices
            place = tl.load(first_places + tl.load(ids + entry, mask=exists, other=0), mask=exists, other=0)
            place += tl.load(ranks + entry, mask=exists, other=0)
            tl.store(entries + place, entry, mask=exists)

        of_expert = (counts + tile_tokens - 1) // tile_tokens
        tile_ends = tl.cumsum(of_expert, axis=0)
        used = tl.sum(of_expert, axis=0)
        tl.store(num_tiles, used)
        for number in range((num_tokens + tile_tokens - 1) // tile_tokens):
            tile = tiles + (tile_ends - of_expert + number) * 3
            first, is_one = starts + number * tile_tokens, number < of_expert
            tl.store(tile, expert, mask=is_one)
            tl.store(tile + 1, first, mask=is_one)
            tl.store(tile + 2, tl.minimum(first + tile_tokens, starts + counts), mask=is_one)
        for start in range(0, rows_of_tiles, num_columns):
            at_tile = start + expert
            unused = (at_tile >= used) & (at_tile < rows_of_tiles)
            tl.store(tiles + at_tile * 3, -1, mask=unused)
            tl.store(tiles + at_tile * 3 + 1, 0, mask=unused)
            tl.store(tiles + at_tile * 3 + 2, 0, mask=unused)


@triton.jit
def _choose(
    start: tl.tensor,
    expert: tl.tensor,
    counts: tl.tensor,
    partial: tl.tensor,
    partial_squares: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    ranks: tl.tensor,
    all_tokens: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    scale: tl.tensor,
    num_experts: tl.constexpr,
    num_chosen: tl.constexpr,
    num_shared: tl.constexpr,
    num_tokens: tl.constexpr,
    num_columns: tl.constexpr,
    num_splits: tl.constexpr,
    normed: tl.constexpr,
) -> tl.tensor:
    """Store the experts of some tokens, their weights, and how many entries of an expert come before; add to
    the entries of each expert."""
    token = start + tl.arange(0, _AT_ONCE)
    live = token < all_tokens
    routed = (expert < num_experts)[None, :]
    logits = tl.zeros([_AT_ONCE, num_columns], tl.float32)
    squares = tl.zeros([_AT_ONCE], tl.float32)
    for number in range(num_splits):
        at = (number * num_tokens + token[:, None]) * num_experts + expert[None, :]
        logits += tl.load(partial + at, mask=routed, other=0.0, cache_modifier=".cg")
        squares += tl.load(partial_squares + number * num_tokens + token, cache_modifier=".cg")
    if normed:
        logits *= tl.rsqrt(squares / width + eps)[:, None]
    lowest = -3.0e38
    logits = tl.where(logits > lowest, logits, lowest)
    logits = tl.where(routed, logits, float("-inf"))

    best = tl.max(logits, axis=1)
    left = logits
    chosen = ((expert >= num_experts) & (expert < num_experts + num_shared))[None, :] & live[:, None]
    order = tl.zeros([_AT_ONCE, num_columns], tl.int32) + (num_chosen + expert - num_experts)[None, :]
    total = tl.zeros([_AT_ONCE], tl.float32)
    for choice in tl.static_range(num_chosen):
        hit = expert[None, :] == tl.argmax(left, axis=1, tie_break_left=True)[:, None]
        total += tl.exp(tl.max(left, axis=1) - best)
        left = tl.where(hit, float("-inf"), left)
        order = tl.where(hit, choice, order)
        chosen = chosen | (hit & live[:, None])
    weight = tl.where(routed, tl.exp(logits - best[:, None]) / total[:, None] * scale, 1.0)

    entry = token[:, None] * (num_chosen + num_shared) + order
    ones = chosen.to(tl.int32)
    tl.store(ids + entry, tl.broadcast_to(expert[None, :], [_AT_ONCE, num_columns]), mask=chosen)
    tl.store(weights + entry, weight, mask=chosen)
    tl.store(ranks + entry, counts[None, :] + tl.cumsum(ones, axis=0) - ones, mask=chosen)
    return counts + tl.sum(ones, axis=0)


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
    """The best experts of up to 64 tokens. See ``kernels.moe.route``; x and gate in bfloat16 or float32."""
    for name, tensor in (("x", x), ("gate", gate)):
        check_dtype("route", name, tensor.dtype, (torch.bfloat16, torch.float32))
    check_contiguous("route", gate=gate)
    num_experts, width = gate.shape
    check_rows("route", "x", x, width, x.dtype)
    check_norm("route", norm, width, x.dtype)
    num_tokens, device = len(x), x.device
    require(num_tokens <= MOST_TOKENS, "route", f"{num_tokens} tokens, expected at most {MOST_TOKENS}")
    sizes = f"the gate is {num_experts} x {width}, expected multiples of 16 and 32"
    require(num_experts % 16 == 0 and width % 32 == 0, "route", sizes)
    found = f"{num_experts} experts and {num_shared} shared ones, expected at most {_MOST_EXPERTS}"
    require(num_experts + num_shared <= _MOST_EXPERTS, "route", found)
    found = f"{num_chosen} experts a token, expected 1 to {num_experts}"
    require(0 < num_chosen <= num_experts, "route", found)
    num_choices = num_chosen + num_shared
    num_rows = most_tiles(num_tokens, num_experts, num_chosen, num_shared, tile_tokens)

    def whole(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    weights = torch.empty(num_tokens, num_choices, dtype=torch.float32, device=device)
    routing = Routing(
        whole(num_tokens, num_choices), weights, whole(num_tokens * num_choices), whole(num_rows, 3), whole(1)
    )
    if num_tokens == 0:
        routing.num_tiles.zero_()
        return routing
    tile = tile_for(device, "route", "plain", num_tokens, torch.bfloat16).fitted(num_experts, width)
    padded, num_columns = max(16, power_of_two(num_tokens)), power_of_two(num_experts + num_shared)
    _route[num_experts // tile.rows, tile.splits, padded // _AT_ONCE.value](
        x,
        norm,
        gate,
        torch.empty(tile.splits, padded, num_experts, dtype=torch.float32, device=device),
        torch.empty(tile.splits, padded, dtype=torch.float32, device=device),
        counters(device, 1),
        *routing,
        whole(num_tokens * num_choices),
        whole(num_columns),
        num_tokens,
        width,
        num_rows,
        eps,
        scale,
        num_experts=num_experts,
        num_chosen=num_chosen,
        num_shared=num_shared,
        tile_tokens=tile_tokens,
        num_tokens=padded,
        num_rows=tile.rows,
        num_columns=num_columns,
        num_splits=tile.splits,
        step=tile.step,
        normed=norm is not None,
        **tile.launch,
        **launch(),
    )
    return routing
