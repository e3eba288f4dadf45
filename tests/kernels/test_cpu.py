"""The compiled CPU kernels against the torch reference, and row by row against themselves.

A machine without a C compiler has no such kernels; the rest of the suite then runs on the reference alone.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import dispatch as ops
from kernels import ref
from tests.kernels.compiled import close, needs_compiler, normal, rotation

WIDTHS = st.sampled_from([1, 3, 8, 15, 16, 40, 576])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@needs_compiler
class TestAgainstReference:
    @settings(deadline=None)
    @given(num_rows=st.integers(1, 5), width=WIDTHS, dtype=DTYPES)
    def test_norms(self, num_rows: int, width: int, dtype: torch.dtype) -> None:
        x, weight = normal(1, num_rows, width).to(dtype), normal(width, seed=2).to(dtype)
        close(ops.rms_norm(x, weight, 1e-5), ref.rms_norm(x.float(), weight.float(), 1e-5))

    def test_a_row_of_zeros_is_not_divided_by_zero(self) -> None:
        assert torch.equal(ops.rms_norm(torch.zeros(1, 1, 16), torch.ones(16), 1e-5), torch.zeros(1, 1, 16))

    @settings(deadline=None)
    @given(
        num_rows=st.integers(1, 4),
        width=st.sampled_from([8, 16, 72]),
        scale=st.sampled_from([1.0, 30.0, 1e4]),
        dtype=DTYPES,
    )
    def test_silu_mul(self, num_rows: int, width: int, scale: float, dtype: torch.dtype) -> None:
        gate_up = (normal(2, num_rows, 2 * width) * scale).to(dtype)
        close(ops.silu_mul(gate_up), ref.silu_mul(gate_up.float()))

    def test_silu_of_large_and_infinite_gates(self) -> None:
        gate = torch.tensor([200.0, -200.0, 1e30, -1e30, math.inf, 0.0, -88.0, 88.0])
        gate_up = torch.cat((gate, torch.full((8,), 2.0)))[None, None]
        torch.testing.assert_close(ops.silu_mul(gate_up), ref.silu_mul(gate_up))

    @settings(deadline=None)
    @given(
        num_seqs=st.integers(1, 3),
        num_nodes=st.integers(1, 5),
        heads=st.sampled_from([(1, 1), (4, 2), (9, 3)]),
        head_dim=st.sampled_from([2, 8, 64]),
        in_place=st.booleans(),
        dtype=DTYPES,
    )
    def test_rope_write(
        self,
        num_seqs: int,
        num_nodes: int,
        heads: tuple[int, int],
        head_dim: int,
        in_place: bool,
        dtype: torch.dtype,
    ) -> None:
        num_heads, num_kv_heads = heads
        product = normal(num_seqs, num_nodes, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
        cos, sin = (
            part.expand(num_seqs, -1, -1, -1).contiguous().to(dtype) for part in rotation(num_nodes, head_dim)
        )
        pools = normal(2, num_kv_heads, 40, head_dim, seed=1).to(dtype)
        count = num_seqs * num_nodes
        slots = slice(7, 7 + count) if in_place else torch.randperm(40)[:count]
        ours, theirs = pools.clone(), pools.float()
        found = ops.rope_write(product.clone(), num_heads, cos, sin, ours[0], ours[1], slots)
        wide = (product.float(), num_heads, cos.float(), sin.float())
        close(found, ref.rope_write(*wide, theirs[0], theirs[1], slots))
        close(ours, theirs)

    @settings(deadline=None)
    @given(
        lens=st.lists(st.integers(1, 70), min_size=1, max_size=3),
        num_nodes=st.integers(1, 9),
        heads=st.sampled_from([(1, 1), (4, 2), (9, 3), (16, 1)]),
        head_dim=st.sampled_from([8, 64]),
        in_place=st.booleans(),
        masked=st.booleans(),
        dtype=DTYPES,
    )
    def test_tree_attention(
        self,
        lens: list[int],
        num_nodes: int,
        heads: tuple[int, int],
        head_dim: int,
        in_place: bool,
        masked: bool,
        dtype: torch.dtype,
    ) -> None:
        num_heads, num_kv_heads = heads
        # queries are a slice of a wider product
        product = normal(len(lens), num_nodes, num_heads + 3, head_dim).to(dtype)
        pools = normal(2, num_kv_heads, 300, head_dim, seed=1).to(dtype)
        longest = max(lens)
        bias = None
        if masked:
            hidden = normal(len(lens), num_nodes, longest, seed=2) > 0.5
            hidden[..., 0] = False
            bias = torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)
        slots: Tensor | tuple[slice, ...]
        if in_place:
            slots = tuple(slice(90 * i + 3, 90 * i + 3 + length) for i, length in enumerate(lens))
        else:
            slots = torch.stack([torch.randperm(300)[:longest] for _ in lens])
        queries, scale = product[:, :, :num_heads], head_dim**-0.5
        assert ops._attention_applies(queries, pools[0], pools[1], slots, bias)
        close(
            ops.tree_attention(queries, pools[0], pools[1], slots, bias, scale),
            ref.tree_attention(queries.float(), pools[0].float(), pools[1].float(), slots, bias, scale),
        )

    def test_a_node_that_sees_nothing_gets_zeros_and_hurts_nobody(self) -> None:
        q, pools = normal(1, 2, 3, 8), normal(2, 1, 20, 8, seed=1)
        bias = torch.zeros(1, 2, 6)
        bias[0, 1] = -math.inf
        out = ops.tree_attention(q, pools[0], pools[1], (slice(4, 10),), bias, 1.0)
        alone = ref.tree_attention(q[:, :1], pools[0], pools[1], (slice(4, 10),), None, 1.0)
        torch.testing.assert_close(out[:, :1], alone)
        assert torch.equal(out[:, 1], torch.zeros(1, 3, 8))

    def test_what_is_not_a_number_does_not_vanish(self) -> None:
        """A broken weight must be seen in the answer, as it is with torch."""
        q, pools = normal(1, 2, 3, 8), normal(2, 1, 20, 8, seed=1).abs()
        for broken in (math.nan, math.inf):
            q[0, 1, 1, 3] = broken
            given_to = (q, pools[0], pools[1], (slice(4, 10),), None, 1.0)
            found, expected = ops.tree_attention(*given_to).isnan(), ref.tree_attention(*given_to).isnan()
            assert torch.equal(found, expected)
            assert found.any(-1).sum() == 1

    def test_the_default_dtype_is_none_of_ours(self) -> None:
        q, pools = normal(1, 2, 3, 8), normal(2, 1, 20, 8, seed=1)
        expected = ref.tree_attention(q, pools[0], pools[1], (slice(4, 10),), None, 1.0)
        torch.set_default_dtype(torch.bfloat16)
        try:
            found = ops.tree_attention(q, pools[0], pools[1], (slice(4, 10),), None, 1.0)
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(found, expected)


@needs_compiler
class TestBfloat16:
    def test_rounding_is_that_of_torch(self) -> None:
        """To nearest even; infinities and NaN included."""
        special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38, 1.0, 2.0])
        x = torch.cat((normal(4000) * 10, special)).bfloat16().view(1, -1, 1, 8)
        num_rows = x.shape[1]
        cos = torch.full((1, num_rows, 1, 8), 4 / 3).bfloat16()
        pools = torch.zeros(2, 1, num_rows, 8, dtype=torch.bfloat16)
        heads = torch.cat((x, torch.zeros(1, num_rows, 2, 8, dtype=torch.bfloat16)), dim=2)
        found = ops.rope_write(heads, 1, cos, torch.zeros_like(cos), pools[0], pools[1], slice(0, num_rows))
        exact = x.float() * cos.float() + x.roll(4, -1).float() * 0
        torch.testing.assert_close(found, exact.bfloat16(), rtol=0, atol=0, equal_nan=True)
        assert not torch.equal(found.float(), exact), "the test is idle without rounding"


@needs_compiler
class TestRowsStandAlone:
    """A token has the same bits alone and among others: what makes speculative and plain decoding equal."""

    def test_norm_silu_and_rope(self) -> None:
        x, weight, gate_up = normal(1, 7, 40), normal(40, seed=1), normal(1, 7, 48, seed=2)
        cos, sin = rotation(7, 8)
        heads, pools = normal(1, 7, 4, 8, seed=3), torch.zeros(2, 1, 7, 8)
        together = ops.rope_write(heads.clone(), 2, cos, sin, pools[0], pools[1], slice(0, 7))
        for row in range(7):
            at = slice(row, row + 1)
            assert torch.equal(ops.rms_norm(x[:, at], weight, 1e-5), ops.rms_norm(x, weight, 1e-5)[:, at])
            assert torch.equal(ops.silu_mul(gate_up[:, at]), ops.silu_mul(gate_up)[:, at])
            own = torch.zeros(2, 1, 7, 8)
            alone = ops.rope_write(heads[:, at].clone(), 2, cos[:, at], sin[:, at], own[0], own[1], at)
            assert torch.equal(alone, together[:, at])
            assert torch.equal(own[:, :, at], pools[:, :, at])

    @settings(deadline=None)
    @given(num_nodes=st.integers(2, 9), kv_len=st.integers(1, 50))
    def test_attention_of_a_chain_equals_one_node_after_the_other(self, num_nodes: int, kv_len: int) -> None:
        q, pools = normal(1, num_nodes, 9, 8), normal(2, 3, 80, 8, seed=1)
        end = kv_len + num_nodes
        order = torch.arange(end)[None] - kv_len
        bias = torch.zeros(1, num_nodes, end).masked_fill(order > torch.arange(num_nodes)[:, None], -math.inf)
        chain = ops.tree_attention(q, pools[0], pools[1], (slice(5, 5 + end),), bias, 0.3)
        for node in range(num_nodes):
            seen = (slice(5, 5 + kv_len + node + 1),)
            alone = ops.tree_attention(q[:, node : node + 1], pools[0], pools[1], seen, None, 0.3)
            assert torch.equal(alone[:, 0], chain[:, node])


class TestWhatIsLeftToTorch:
    def test_other_dtypes(self) -> None:
        x, weight = normal(1, 2, 16).double(), normal(16).double()
        assert ops.rms_norm(x, weight, 1e-5).dtype == torch.float64
        assert ops.silu_mul(normal(1, 2, 16).half()).dtype == torch.float16
        mixed = (normal(1, 2, 16), normal(16).bfloat16(), 1e-5)
        assert torch.equal(ops.rms_norm(*mixed), ref.rms_norm(*mixed))

    def test_strided_input(self) -> None:
        x, weight = normal(1, 4, 32)[..., ::2], normal(16, seed=1)
        torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), ref.rms_norm(x, weight, 1e-5))

    def test_widths_that_fill_no_vector(self) -> None:
        gate_up = normal(1, 2, 20)
        torch.testing.assert_close(ops.silu_mul(gate_up), ref.silu_mul(gate_up))

    def test_slots_that_are_no_list_of_64_bits(self) -> None:
        """Read as addresses they would lead anywhere."""
        heads, (cos, sin) = normal(1, 4, 4, 8), rotation(4, 8)
        strided = torch.arange(16)[::2]
        pools = normal(2, 1, 20, 8, seed=1)
        ours, theirs = pools.clone(), pools.clone()
        ops.rope_write(heads.clone(), 2, cos, sin, ours[0], ours[1], strided[:4])
        ref.rope_write(heads.clone(), 2, cos, sin, theirs[0], theirs[1], strided[:4])
        torch.testing.assert_close(ours, theirs)
        for slots in (strided[None], strided[None].int()):
            given_to = (heads[:, :, :2], pools[0], pools[1], slots, None, 1.0)
            torch.testing.assert_close(ops.tree_attention(*given_to), ref.tree_attention(*given_to))

    @pytest.mark.parametrize("slots", [slice(18, 22), slice(4, 7), torch.arange(3)], ids=str)
    def test_rows_that_do_not_fit_are_refused(self, slots: Tensor | slice) -> None:
        """Past the pool's end, or not as many as there are nodes: nothing may be written past an end."""
        heads, (cos, sin), pools = normal(1, 4, 4, 8), rotation(4, 8), torch.zeros(3, 1, 20, 8)
        with pytest.raises((RuntimeError, IndexError)):
            ops.rope_write(heads, 2, cos, sin, pools[0], pools[1], slots)
        assert torch.equal(pools[2], torch.zeros(1, 20, 8))

    def test_broadcast_rotations_and_masks(self) -> None:
        heads, (cos, sin) = normal(2, 3, 4, 8), rotation(3, 8)
        pools = normal(2, 1, 20, 8, seed=1)
        ours, theirs = pools.clone(), pools.clone()
        found = ops.rope_write(heads.clone(), 2, cos, sin, ours[0], ours[1], slice(4, 10))
        expected = ref.rope_write(heads.clone(), 2, cos, sin, theirs[0], theirs[1], slice(4, 10))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(ours, theirs)
        bias = torch.zeros(1, 3, 6).masked_fill(normal(1, 3, 6, seed=3) > 0.5, -math.inf)
        slots = torch.arange(12).view(2, 6)
        given_to = (heads[:, :, :2], pools[0], pools[1], slots, bias, 1.0)
        torch.testing.assert_close(ops.tree_attention(*given_to), ref.tree_attention(*given_to))

    def test_gradients(self) -> None:
        x = normal(1, 2, 16).requires_grad_()
        (slope,) = torch.autograd.grad(ops.rms_norm(x, torch.ones(16), 1e-5).sum(), x)
        assert slope.abs().sum() > 0

    def test_very_much_attention(self) -> None:
        q, pools = torch.empty(1, 600, 16, 64), torch.empty(2, 1, 1000, 64)
        assert not ops._attention_applies(q, pools[0], pools[1], (slice(0, 1000),), None)
