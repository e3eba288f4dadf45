"""Products of few tokens: the reference against the layers it stands for, and what kernels refuse."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import moe, stored
from kernels.errors import UnsupportedError
from kernels.moe import most_tiles
from kernels.quant import fp8_linear, nvfp4_linear
from kernels.stored import Stored

BF16 = torch.bfloat16


def test_promises_in_the_interpreter() -> None:
    interpreted("tests/kernels/promises.py")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_promises_on_a_gpu() -> None:
    interpreted("tests/kernels/promises.py", "0")


def interpreted(file: str, switch: str = "1") -> None:
    """Run the tests of a file in Triton's interpreter, or without. Triton reads the switch when a kernel is
    decorated, so each setting has a process of its own."""
    done = subprocess.run(
        # Triton's interpreter makes numpy warn
        [sys.executable, "-m", "pytest", "-q", "-o", "filterwarnings=", file],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": switch, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def stack(generator: torch.Generator, *shape: int) -> Tensor:
    drawn: Tensor = torch.randn(shape, generator=generator)
    return drawn / math.sqrt(shape[-1])


@pytest.mark.parametrize("num_tokens", [1, 5, 40])
def test_three_operations_are_the_layer(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    w1, w3 = stack(generator, 9, 24, 32), stack(generator, 9, 24, 32)
    w2, gate = stack(generator, 9, 32, 24), torch.randn(8, 32, generator=generator)
    x, residual = (torch.randn(num_tokens, 32, generator=generator) for _ in range(2))

    routing = moe.route(x, gate, 3, 1.5, num_shared=1)
    y = moe.gate_up(x, Stored(torch.cat((w1, w3), dim=1)), routing)
    found = moe.down(y, Stored(w2), routing, residual)
    expected = residual.clone()
    for token, row in enumerate(x):
        best, ids = (gate @ row).sort(descending=True)
        shares = [*(1.5 * best[:3].softmax(0)), 1.0]
        for share, expert in zip(shares, [*ids[:3].tolist(), 8], strict=True):
            inner = F.silu(w1[expert] @ row) * (w3[expert] @ row)
            expected[token] += share * (w2[expert] @ inner)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_routing_written_out_by_hand() -> None:
    """The example of the module's docstring."""
    gate = torch.eye(3)
    x = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 2.0]])
    routing = moe.route(x, gate, 2, num_shared=1)
    assert routing.ids.tolist() == [[2, 0, 3], [2, 1, 3]]
    assert routing.entries.tolist() == [1, 4, 0, 3, 2, 5]
    used = routing.tiles[: int(routing.num_tiles)]
    assert used.tolist() == [[0, 0, 1], [1, 1, 2], [2, 2, 4], [3, 4, 6]]
    high, low = torch.softmax(torch.tensor([2.0, 1.0]), 0).tolist()
    torch.testing.assert_close(routing.weights, torch.tensor([[high, low, 1.0]]).expand(2, 3))


def test_the_bound_on_tiles_is_reached_by_one_token_and_never_passed() -> None:
    assert most_tiles(1, 128, 4, 1, 16) == 5
    generator = torch.Generator().manual_seed(0)
    for num_tokens in (1, 2, 16, 17, 33, 64):
        for tile in (16, 32):
            x, gate = (torch.randn(n, 8, generator=generator) for n in (num_tokens, 16))
            x[: num_tokens // 2] = x[0]  # crowds at some experts
            routing = moe.route(x, gate, 3, num_shared=2, tile_tokens=tile)
            assert int(routing.num_tiles) <= len(routing.tiles)
            sizes = routing.tiles[:, 2] - routing.tiles[:, 1]
            assert int(sizes.sum()) == num_tokens * 5, "no entry is left out"


def test_a_stored_matrix_multiplies_as_the_engine_does() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix, x = stack(generator, 32, 64), torch.randn(3, 64, generator=generator)
    codes, scale = kernels.quantise_fp8(matrix)
    torch.testing.assert_close(stored.linear(x, Stored(codes, scale.view(1))), fp8_linear(x, codes, scale))
    packed, blocks, divisor = kernels.quantise_nvfp4(matrix)
    torch.testing.assert_close(
        stored.linear(x, Stored(packed, divisor.view(1), blocks)), nvfp4_linear(x, packed, blocks, divisor)
    )
    scales = torch.rand(4, generator=generator)
    by_group = F.linear(x, codes.float()) * scales.repeat_interleave(8)
    torch.testing.assert_close(stored.linear(x, Stored(codes, scales)), by_group)


# --- refusals: on the host, with the reason


def fp8(*shape: int, groups: int = 1) -> Stored:
    return Stored(torch.zeros(shape).to(torch.float8_e4m3fn), torch.ones(*shape[:-2], groups))


def x_of(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


LINEAR_REFUSALS: list[tuple[tuple[Any, ...], str]] = [
    ((x_of(2, 64, dtype=torch.float16), fp8(32, 64)), "x is float16, expected bfloat16, float32"),
    ((x_of(2, 128)[:, ::2], fp8(32, 64)), "x has strides"),
    ((x_of(2, 64, dtype=torch.float32), Stored(x_of(32, 64))), "weight is bfloat16, expected float32"),
    ((x_of(2, 64), fp8(32, 64), torch.zeros(64)), "norm is float32, expected bfloat16"),
    ((x_of(2, 32), fp8(32, 64)), r"x has shape \[2, 32\], expected \[tokens, 64\]"),
    ((x_of(2, 64), fp8(24, 64)), "24 x 64, expected multiples of 16 and 32"),
    ((x_of(2, 48), fp8(32, 48)), "32 x 48, expected multiples of 16 and 32"),
    ((x_of(2, 64), fp8(3, 32, 64)), "expected 2 dimensions"),
    ((x_of(2, 64), fp8(32, 64, groups=5)), r"scale has shape \[5\]"),
    ((x_of(2, 64), Stored(torch.zeros(32, 64))), "weight is float32"),
    ((x_of(2, 64), Stored(torch.zeros(32, 32, dtype=torch.uint8), None, torch.zeros(32, 4))), "block_scales"),
    ((x_of(2, 64), fp8(32, 64), x_of(32)), r"norm has shape \[32\], expected \[64\]"),
    ((x_of(2, 64), fp8(32, 64), None, 0.0, x_of(3, 32)), "residual has 3 rows, expected 2"),
]


@pytest.mark.parametrize(("given", "reason"), LINEAR_REFUSALS)
def test_linear_refuses(given: tuple[Any, ...], reason: str) -> None:
    linear = pytest.importorskip("kernels.triton.linear").linear
    with pytest.raises(UnsupportedError, match=reason):
        linear(*given)


def test_a_norm_is_not_fused_with_rounded_activations() -> None:
    linear = pytest.importorskip("kernels.triton.linear").linear
    weight = fp8(32, 64)
    rounded = Stored(weight.codes, weight.scale, None, torch.ones(()))
    with pytest.raises(UnsupportedError, match="a norm together with an input scale"):
        linear(x_of(2, 64), rounded, x_of(64))


def test_the_router_refuses() -> None:
    route = pytest.importorskip("kernels.triton.router").route
    for given, reason in (
        ((x_of(65, 64), x_of(16, 64), 2), "65 tokens, expected at most 64"),
        ((x_of(2, 64), x_of(16, 64), 17), "17 experts a token, expected 1 to 16"),
        ((x_of(2, 64), x_of(12, 64), 2), "12 x 64, expected multiples"),
        ((x_of(2, 64), x_of(256, 64), 2, 1.0, 1), "256 experts and 1 shared ones"),
    ):
        with pytest.raises(UnsupportedError, match=reason):
            route(*given)


def test_experts_refuse_another_batchs_routing() -> None:
    experts = pytest.importorskip("kernels.triton.experts")
    routing = moe.route(torch.randn(3, 64), torch.randn(16, 64), 2, num_shared=1)
    with pytest.raises(UnsupportedError, match="the routing is of 3 tokens, expected 2"):
        experts.gate_up(x_of(2, 64), fp8(17, 64, 64, groups=2), routing)
    with pytest.raises(UnsupportedError, match="y has 8 rows, expected one for each of 9 entries"):
        experts.down(x_of(8, 32), fp8(17, 64, 32), routing)
    with pytest.raises(UnsupportedError, match="tile_tokens is 24"):
        experts.gate_up(x_of(3, 64), fp8(17, 64, 64, groups=2), routing, tile_tokens=24)
