"""The experts of a few tokens: gate and up with SiLU in one launch, down with the combination in another.

A program takes one tile of a routing (some tokens of one expert) and some rows of that expert's matrix, so an
expert that nobody chose costs nothing, and one that several tokens chose is read once. The grid has room for
the most tiles that a routing can have; programs past those in use leave at once, so its size need not be
known on the host. Gate's rows and up's are taken half and half, and meet in the program that multiplies them.

Down stores each entry's part in float32. Whichever program is the last of a block of rows adds them up, token
by token in the order of the token's choices: the same sum every time, whoever is last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.errors import require
from kernels.moe import TILE_TOKENS, Routing
from kernels.stored import Stored
from kernels.triton.host import check_contiguous, check_dtype, power_of_two
from kernels.triton.pdl import launch, release, wait
from kernels.triton.product import arrived_last, fetch_matrix, multiply
from kernels.triton.scratch import counters
from kernels.triton.stored import Operands, check_norm, check_rows, check_stored
from kernels.triton.tiles import Tile, tile_for


@triton.jit
def _gate_up(
    x: tl.tensor,
    norm: tl.tensor,
    weight: tl.tensor,
    block_scales: tl.tensor,
    scale: tl.tensor,
    input_scale: tl.tensor,
    entries: tl.tensor,
    tiles: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    inner: tl.tensor,
    num_groups: tl.tensor,
    eps: tl.tensor,
    num_choices: tl.constexpr,
    word: tl.constexpr,
    num_tokens: tl.constexpr,
    num_rows: tl.constexpr,
    step: tl.constexpr,
    normed: tl.constexpr,
    nvfp4: tl.constexpr,
    rounded: tl.constexpr,
    scaled: tl.constexpr,
    swap: tl.constexpr,
    operand: tl.constexpr,
    dependent: tl.constexpr = False,
) -> None:
    wait(dependent)
    release(dependent)  # now the router has ended, and ``_down`` may ask it for experts
    tile = tl.program_id(1)
    expert = tl.load(tiles + tile * 3).to(tl.int64)
    if expert < 0:
        return
    place = tl.load(tiles + tile * 3 + 1) + tl.arange(0, num_tokens)
    live = place < tl.load(tiles + tile * 3 + 2)
    token = (tl.load(entries + place, mask=live, other=0) // num_choices).to(tl.int64)
    half: tl.constexpr = num_rows // 2
    column = tl.program_id(0) * half + tl.arange(0, num_rows) % half
    row = (tl.arange(0, num_rows) // half) * inner + column
    inverse = 1.0
    if rounded:
        inverse = 1.0 / tl.load(input_scale + expert)
    both, squares = multiply(
        x, norm, weight, block_scales, token * (width // word), live, expert * (2 * inner) + row, width, 0,
        width, inverse, num_tokens, num_rows, step, normed, nvfp4, rounded, swap, operand,
    )  # fmt: skip
    if scaled:
        factor = tl.load(scale + expert * num_groups + row // (2 * inner // num_groups))
        both = both / factor[None, :] if nvfp4 else both * factor[None, :]
    if rounded:
        both /= inverse
    if normed:
        both *= tl.rsqrt(squares / width + eps)[:, None]
    gate, up = both.reshape(num_tokens, 2, half).permute(0, 2, 1).split()
    activated = (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty)
    at = tl.program_id(0) * half + tl.arange(0, half)
    tl.store(out + place.to(tl.int64)[:, None] * inner + at[None, :], activated, mask=live[:, None])


@triton.jit(do_not_specialize=["all_tokens"])
def _down(
    y: tl.tensor,
    weight: tl.tensor,
    block_scales: tl.tensor,
    scale: tl.tensor,
    input_scale: tl.tensor,
    entries: tl.tensor,
    tiles: tl.tensor,
    num_tiles: tl.tensor,
    weights: tl.tensor,
    residual: tl.tensor,
    parts: tl.tensor,
    counter: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    hidden: tl.tensor,
    num_experts: tl.tensor,
    num_groups: tl.tensor,
    all_tokens: tl.tensor,
    num_choices: tl.constexpr,
    word: tl.constexpr,
    num_tokens: tl.constexpr,
    num_rows: tl.constexpr,
    step: tl.constexpr,
    nvfp4: tl.constexpr,
    rounded: tl.constexpr,
    scaled: tl.constexpr,
    swap: tl.constexpr,
    operand: tl.constexpr,
    dependent: tl.constexpr = False,
) -> None:
    tile = tl.program_id(1)
    row = tl.program_id(0) * num_rows + tl.arange(0, num_rows)
    release(dependent)
    if dependent:
        # Whose matrix will be read is known since the router ended. But that is not waited for here, so this
        # is a guess: nothing but what is fetched follows from it, and it bypasses the cache of the processor.
        guess = tl.load(tiles + tile * 3, cache_modifier=".cg").to(tl.int64)
        if (guess >= 0) & (guess < num_experts):
            fetch_matrix(weight, block_scales, guess * hidden + row, width, 0, width, num_rows, nvfp4)
    wait(dependent)
    expert = tl.load(tiles + tile * 3).to(tl.int64)
    if expert < 0:
        return
    place = tl.load(tiles + tile * 3 + 1) + tl.arange(0, num_tokens)
    live = place < tl.load(tiles + tile * 3 + 2)
    entry = tl.load(entries + place, mask=live, other=0).to(tl.int64)
    inverse = 1.0
    if rounded:
        inverse = 1.0 / tl.load(input_scale + expert)
    y_rows = place.to(tl.int64) * (width // word)
    part, _ = multiply(
        y, y, weight, block_scales, y_rows, live, expert * hidden + row, width, 0, width, inverse, num_tokens,
        num_rows, step, False, nvfp4, rounded, swap, operand,
    )  # fmt: skip
    if scaled:
        factor = tl.load(scale + expert * num_groups + row // (hidden // num_groups))
        part = part / factor[None, :] if nvfp4 else part * factor[None, :]
    if rounded:
        part /= inverse
    tl.store(parts + entry[:, None] * hidden + row[None, :], part, mask=live[:, None])

    if arrived_last(counter + tl.program_id(0), tl.load(num_tiles)):
        for start in range(0, all_tokens, num_tokens):
            token = (start + tl.arange(0, num_tokens)).to(tl.int64)
            there = (token < all_tokens)[:, None]
            at = token[:, None] * hidden + row[None, :]
            total = tl.zeros([num_tokens, num_rows], tl.float32)
            if residual is not None:
                total += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
            for choice in range(num_choices):
                entry = token * num_choices + choice
                share = tl.load(weights + entry, mask=token < all_tokens, other=0.0)
                from_part = parts + entry[:, None] * hidden + row[None, :]
                value = tl.load(from_part, mask=there, other=0.0, cache_modifier=".cg")
                total += share[:, None] * value
            tl.store(out + at, total.to(out.dtype.element_ty), mask=there)


def gate_up(
    x: Tensor,
    weight: Stored,
    routing: Routing,
    norm: Tensor | None = None,
    eps: float = 0.0,
    tile_tokens: int = TILE_TOKENS,
) -> Tensor:
    """silu(gate x) * up x of every entry. See ``kernels.moe.gate_up``."""
    operands = check_stored("gate_up", weight, 3, x.dtype)
    num_experts, num_rows, width = weight.shape
    check_rows("gate_up", "x", x, width, x.dtype)
    check_norm("gate_up", norm, width, x.dtype)
    require(not (operands.rounded and norm is not None), "gate_up", "a norm together with an input scale")
    require(num_rows % 32 == 0, "gate_up", f"the weight has {num_rows} rows, expected a multiple of 32")
    _check_routing("gate_up", routing, len(x), tile_tokens)
    inner = num_rows // 2
    out = torch.empty(len(routing.entries), inner, dtype=x.dtype, device=x.device)
    if not len(x):
        return out
    tile = tile_for(x.device, "gate_up", operands.kind, len(x), x.dtype).fitted(num_rows, width)
    _gate_up[2 * inner // tile.rows, len(routing.tiles)](
        operands.seen(x),
        operands.seen(norm),
        operands.codes(weight),
        weight.block_scales,
        weight.scale,
        weight.input_scale,
        routing.entries,
        routing.tiles,
        out,
        width,
        inner,
        _groups(weight),
        eps,
        num_choices=routing.ids.shape[1],
        normed=norm is not None,
        **_constants(tile, operands, weight, tile_tokens),
    )
    return out


def down(
    y: Tensor,
    weight: Stored,
    routing: Routing,
    residual: Tensor | None = None,
    tile_tokens: int = TILE_TOKENS,
) -> Tensor:
    """residual + the weighted sum of down y over each token's choices. See ``kernels.moe.down``."""
    operands = check_stored("down", weight, 3, y.dtype)
    num_experts, hidden, width = weight.shape
    num_tokens, num_choices = routing.ids.shape
    check_rows("down", "y", y, width, y.dtype)
    _check_routing("down", routing, num_tokens, tile_tokens)
    found = f"y has {len(y)} rows, expected one for each of {len(routing.entries)} entries"
    require(len(y) == len(routing.entries), "down", found)
    if residual is not None:
        check_rows("down", "residual", residual, hidden, y.dtype)
        found = f"residual has {len(residual)} rows, expected {num_tokens}"
        require(len(residual) == num_tokens, "down", found)
    out = torch.empty(num_tokens, hidden, dtype=y.dtype, device=y.device)
    if not num_tokens:
        return out
    tile = tile_for(y.device, "down", operands.kind, num_tokens, y.dtype).fitted(hidden, width)
    num_blocks = hidden // tile.rows
    parts = torch.empty(len(y), hidden, dtype=torch.float32, device=y.device)
    _down[num_blocks, len(routing.tiles)](
        operands.seen(y),
        operands.codes(weight),
        weight.block_scales,
        weight.scale,
        weight.input_scale,
        routing.entries,
        routing.tiles,
        routing.num_tiles,
        routing.weights,
        residual,
        parts,
        counters(y.device, num_blocks),
        out,
        width,
        hidden,
        num_experts,
        _groups(weight),
        num_tokens,
        num_choices=num_choices,
        **_constants(tile, operands, weight, tile_tokens),
    )
    return out


def _groups(weight: Stored) -> int:
    return 1 if weight.scale is None else weight.scale.shape[-1]


def _constants(tile: Tile, operands: Operands, weight: Stored, tile_tokens: int) -> dict[str, object]:
    """What both kernels are compiled for."""
    return {
        "word": operands.word,
        "num_tokens": tile_tokens,
        "num_rows": tile.rows,
        "step": tile.step,
        "nvfp4": operands.nvfp4,
        "rounded": operands.rounded,
        "scaled": weight.scale is not None,
        "swap": tile.swap,
        "operand": operands.operand,
        **tile.launch,
        **launch(),
    }


def _check_routing(operation: str, routing: Routing, num_tokens: int, tile_tokens: int) -> None:
    """Raises Unsupported for a routing of other tokens, or of another layout than ``route`` returns."""
    ids, weights, entries, tiles, num_tiles = routing
    check_contiguous(operation, weights=weights, entries=entries, tiles=tiles)
    for name, tensor in (("entries", entries), ("tiles", tiles), ("num_tiles", num_tiles)):
        check_dtype(operation, name, tensor.dtype, (torch.int32,))
    check_dtype(operation, "weights", weights.dtype, (torch.float32,))
    found = f"the routing is of {len(ids)} tokens, expected {num_tokens}"
    require(len(ids) == num_tokens and entries.numel() == weights.numel() == ids.numel(), operation, found)
    sizes = f"tile_tokens is {tile_tokens}, expected a power of two of at least 16"
    require(tile_tokens >= 16 and power_of_two(tile_tokens) == tile_tokens, operation, sizes)
