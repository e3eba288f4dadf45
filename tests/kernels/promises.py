"""What products of few tokens promise beyond agreeing with their reference. Run by ``test_products`` in a
process of its own, where Triton interprets, and on a GPU."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from kernels.moe import most_tiles
from kernels.ops import Source
from kernels.ops.products import routing, weight
from kernels.quant import undivided
from kernels.triton import experts, linear, rope, router
from kernels.triton.host import INTERPRETED
from kernels.triton.product import _two_nibbles
from kernels.triton.scratch import counters

SIZES = (16, 1, 2, 64, 32)  # experts, shared ones, chosen, hidden, inner
BF16 = torch.bfloat16
DEVICE = "cpu" if INTERPRETED else "cuda"


def mixture(x: torch.Tensor, kind: str = "fp8") -> torch.Tensor:
    """The three launches that make one layer's mixture, with a residual."""
    source = Source(DEVICE, 3)
    gate = source.normal(16, 64, dtype=BF16)
    up, low = weight(source, kind, 17, 64, 64, groups=2), weight(source, kind, 17, 64, 32, groups=1)
    routed = router.route(x, gate, 2, num_shared=1)
    return experts.down(experts.gate_up(x, up, routed), low, routed, x)


def test_a_token_that_is_no_number_harms_nobody() -> None:
    x = Source(DEVICE, 1).normal(3, 64, dtype=BF16)
    good = mixture(x)
    x[1] = float("nan")
    found = mixture(x)
    assert bool(found[1].isnan().all())
    others = [0, 2]
    torch.testing.assert_close(found[others], good[others], rtol=0, atol=0)


def test_the_routing_of_such_a_token_stays_within_its_bounds() -> None:
    source = Source(DEVICE, 2)
    x, gate = source.normal(20, 64, dtype=BF16), source.normal(16, 64, dtype=BF16)
    x[0], x[7], x[13] = float("nan"), float("inf"), float("-inf")
    routed = router.route(x, gate, 2, num_shared=1)
    assert sorted(routed.entries.tolist()) == list(range(60))
    assert all(len(set(row)) == 3 and max(row) == 16 and min(row) >= 0 for row in routed.ids.tolist())
    used = routed.tiles[: int(routed.num_tiles)]
    assert int((used[:, 2] - used[:, 1]).sum()) == 60
    assert len(routed.tiles) == most_tiles(20, 16, 2, 1, 16)


def test_logits_that_are_all_minus_infinity_choose_different_experts() -> None:
    """As low as the places of experts that do not exist: without a floor the first would be chosen twice, and
    a choice left as the memory was. So would NaN, on a GPU, whose comparisons with it are all false."""
    gate = Source(DEVICE, 6).uniform(16, 64, dtype=BF16) + 0.5
    x = torch.full((2, 64), -3e38, dtype=BF16, device=DEVICE)
    assert bool(torch.isneginf(x.float() @ gate.float().T).all())
    routed = router.route(x, gate, 2, num_shared=1)
    assert routed.ids.tolist() == [[0, 1, 16]] * 2
    assert sorted(routed.entries.tolist()) == list(range(6))


def test_a_token_does_not_feel_who_else_is_there() -> None:
    x = Source(DEVICE, 4).normal(4, 64, dtype=BF16)
    torch.testing.assert_close(mixture(x[2:3]), mixture(x)[2:3], rtol=0, atol=0)


def test_counters_are_left_at_zero_and_a_second_time_gives_the_same() -> None:
    source = Source(DEVICE, 5)
    x, matrix = source.normal(2, 64, dtype=BF16), weight(source, "nvfp4", 32, 64, groups=32)
    first, mixed = linear.linear(x, matrix), mixture(x)
    assert not bool(counters(x.device, 1 << 10).any())
    torch.testing.assert_close(linear.linear(x, matrix), first, rtol=0, atol=0)
    torch.testing.assert_close(mixture(x), mixed, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_rows_of_a_pool_are_finite(dtype: torch.dtype) -> None:
    """A row that a node does not see has no weight, but it is multiplied; and whose it was nobody asks."""
    source = Source(DEVICE, 7)
    bad = torch.tensor([float("nan"), float("inf"), float("-inf")], device=DEVICE)
    slots, pools = source.tensor([4, 2, 0]), [source.uniform(1, 5, 16).to(dtype) for _ in range(3)]
    heads, angles = bad[:, None, None].expand(3, 3, 16).contiguous(), source.uniform(3, 1, 16)
    rope.rope_write(heads, 1, angles, angles, pools[0], pools[1], slots)
    latents, half = bad[:, None].expand(3, 16).contiguous(), source.uniform(3, 1, 4)
    q, norm = heads[:, :1].contiguous(), torch.ones(8, device=DEVICE)
    rope.rope_latent_write(q, latents, norm, 1e-6, half, half, None, pools[2][0], slots)
    assert all(bool(pool.float().isfinite().all()) for pool in pools)


def test_no_tokens_are_no_work() -> None:
    x = torch.empty(0, 64, dtype=BF16, device=DEVICE)
    assert mixture(x).shape == (0, 64)
    assert linear.linear(x, weight(Source(DEVICE), "fp8", 32, 64, groups=1)).shape == (0, 32)


def test_tiles_hold_their_tokens() -> None:
    routed = routing(Source(DEVICE), 40, SIZES, 16)
    assert int((routed.tiles[:, 2] - routed.tiles[:, 1]).max()) <= 16
    assert routed.tiles[:, 0].tolist().count(16) == 3, "40 tokens of the shared expert in tiles of 16"


@triton.jit  # type: ignore[untyped-decorator]
def _all_nibbles(words: tl.tensor, out: tl.tensor, size: tl.constexpr) -> None:
    at = tl.arange(0, size)
    for number in tl.static_range(4):
        pair = _two_nibbles(tl.load(words + at), number, tl.bfloat16)
        column = tl.arange(0, 2) * 4 + number
        tl.store(out + at[:, None] * 8 + column[None, :], pair)


def test_nibbles_become_bfloat16_in_pairs() -> None:
    """Only a GPU multiplies in bfloat16, but how the bits are placed shows anywhere."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat(4)[torch.randperm(1024).to(DEVICE)]
    found = torch.empty(2048, dtype=BF16, device=DEVICE)
    _all_nibbles[1,](codes.view(torch.int32), found, size=256)
    ones = torch.ones(1, 128, device=DEVICE).to(torch.float8_e4m3fn)
    expected = undivided(codes.view(1, 1024), ones, torch.float32)[0]
    torch.testing.assert_close(found.double() * 2.0**126, expected.double(), rtol=0, atol=0)
