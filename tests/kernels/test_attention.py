"""Tree attention over a pool against a loop in float64; moving and writing rows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from engine.nn.rope import RopeTable
from kernels import ref
from tests.oracles import llama
from tests.oracles.attention import ancestors_of, tree_attention


def random_tree(num_nodes: int, generator: torch.Generator, padding: int = 0) -> list[int]:
    parents = [-1] + [
        int(torch.randint(0, i, (), generator=generator)) for i in range(1, num_nodes - padding)
    ]
    return parents + [-1] * (num_nodes - len(parents))


def bias_of(parents: list[int], past: int, length: int) -> Tensor:
    """[N, L]: 0 on the first ``past`` rows and on ancestors behind them, -inf elsewhere."""
    bias = torch.full((len(parents), length), -math.inf)
    bias[:, :past] = 0
    for node in range(len(parents)):
        bias[node, [past + other for other in ancestors_of(parents, node)]] = 0
    return bias


@pytest.mark.parametrize("num_nodes", [1, 5, 64, 66])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("in_place", [True, False], ids=["slices", "slots"])
def test_tree_attention(num_nodes: int, heads: int, kv_heads: int, in_place: bool) -> None:
    """Both code paths (few and many queries), rows in place and gathered, ragged past lengths."""
    generator = torch.Generator().manual_seed(num_nodes)
    dim = 8
    pasts = [7, 3, 0] if num_nodes < 60 else [2, 5]
    length = max(pasts) + num_nodes
    num_slots = 3 * length + 11
    k_pool, v_pool = (torch.randn(kv_heads, num_slots, dim, generator=generator) for _ in range(2))
    slots: Tensor | tuple[slice, ...]
    if in_place:
        rows = torch.stack([torch.arange(4 + 9 * i, 4 + 9 * i + length) for i in range(len(pasts))])
        slots = tuple(slice(4 + 9 * i, 4 + 9 * i + past + num_nodes) for i, past in enumerate(pasts))
    else:
        slots = rows = torch.stack([torch.randperm(num_slots, generator=generator)[:length] for _ in pasts])
    q = torch.randn(len(pasts), num_nodes, heads, dim, generator=generator)
    parents = [random_tree(num_nodes, generator, padding=2 if num_nodes > 4 else 0) for _ in pasts]
    bias = torch.stack([bias_of(p, past, length) for p, past in zip(parents, pasts, strict=True)])
    got = ref.tree_attention(q, k_pool, v_pool, slots, bias, 1.3 / math.sqrt(dim))
    assert got.shape == q.shape
    for seq, past in enumerate(pasts):
        keys, values = k_pool[:, rows[seq]].transpose(0, 1), v_pool[:, rows[seq]].transpose(0, 1)
        nodes = slice(past, past + num_nodes)
        expected = tree_attention(
            q[seq], keys[:past], values[:past], keys[nodes], values[nodes], parents[seq], 1.3 / math.sqrt(dim)
        )
        torch.testing.assert_close(got[seq].double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("num_nodes", [3, 70])
def test_no_bias_means_all_is_visible(num_nodes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    k_pool, v_pool = (torch.randn(2, 100, 8, generator=generator) for _ in range(2))
    q = torch.randn(1, num_nodes, 4, 8, generator=generator)
    rows = torch.arange(5, 80)[None]
    got = ref.tree_attention(q, k_pool, v_pool, (slice(5, 80),), None, 0.3)
    zeros = ref.tree_attention(q, k_pool, v_pool, rows, torch.zeros(1, num_nodes, 75), 0.3)
    torch.testing.assert_close(got, zeros, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        ref.tree_attention(q, k_pool, v_pool, rows, None, 0.3), zeros, atol=1e-6, rtol=1e-5
    )
    expected = F.scaled_dot_product_attention(
        q[0].transpose(0, 1),
        k_pool[:, 5:80].repeat_interleave(2, 0),
        v_pool[:, 5:80].repeat_interleave(2, 0),
        scale=0.3,
    )
    torch.testing.assert_close(got[0].transpose(0, 1), expected, atol=1e-5, rtol=1e-5)


def test_moves_may_overlap() -> None:
    """Rows 3, 4, 6 move to 2, 3, 4: each destination is another move's source. Nothing else changes."""
    pools = torch.arange(2 * 2 * 3 * 10 * 4, dtype=torch.float32).view(2, 2, 3, 10, 4)
    before = pools.clone()
    kernels.compact_rows(pools, torch.tensor([3, 4, 6]), torch.tensor([2, 3, 4]))
    expected = before.clone()
    expected[:, :, :, [2, 3, 4]] = before[:, :, :, [3, 4, 6]]
    assert torch.equal(pools, expected)


@pytest.mark.parametrize("slots", [slice(2, 5), torch.tensor([7, 0, 3])], ids=["slice", "slots"])
def test_write_rows(slots: Tensor | slice) -> None:
    pool, rows = torch.zeros(2, 9, 4), torch.randn(3, 2, 4)
    kernels.write_rows(pool, slots, rows)
    assert torch.equal(pool[:, slots], rows.transpose(0, 1))
    assert int((pool != 0).any(-1).sum()) == 6


def test_norm_and_activation_and_rope() -> None:
    x, weight = torch.randn(2, 5, 16), torch.randn(16)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-3), llama.rms_norm(x, weight, 1e-3))
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(kernels.silu_mul(x), gate * torch.sigmoid(gate) * up)
    torch.testing.assert_close(kernels.rms_norm(torch.zeros(1, 16), weight, 1e-5), torch.zeros(1, 16))
    heads = torch.randn(2, 5, 3, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [90, 7, 7, 11, 0]])
    turned = kernels.rope(heads, *RopeTable(8, 500.0, None, 100, torch.float32, "cpu")(positions))
    freqs = 500.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    for seq in range(2):
        torch.testing.assert_close(turned[seq], llama.rotate(heads[seq], positions[seq].tolist(), freqs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 7, 33])
def test_a_packed_linear_is_a_linear(dtype: torch.dtype, num_rows: int) -> None:
    weight, x = torch.randn(40, 24).to(dtype), torch.randn(2, num_rows, 24).to(dtype)
    packed = kernels.pack_linear(weight, 8)
    if packed is None:
        pytest.skip(f"this build cannot pack {dtype}")
    tolerance = 1e-4 if dtype == torch.float32 else 0.06
    got = kernels.packed_linear(x, packed)
    assert got.shape == (2, num_rows, 40)
    torch.testing.assert_close(got.float(), x.float() @ weight.float().T, atol=tolerance, rtol=tolerance / 4)


def test_what_cannot_be_packed_is_none() -> None:
    assert kernels.pack_linear(torch.randn(4, 4).double(), 8) is None
    assert kernels.pack_linear(torch.empty(4, 4, device="meta"), 8) is None
