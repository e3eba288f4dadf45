"""The compiled CPU kernels against the torch reference, and row by row against themselves.

A machine without a C compiler has no such kernels; the rest of the suite then runs on the reference alone.
"""

from __future__ import annotations

import logging
import math
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import cpu, cpu_choose, ref
from kernels import dispatch as ops

needs_compiler = pytest.mark.skipif(cpu.kernels_for(torch.float32) is None, reason="no C compiler")

WIDTHS = st.sampled_from([1, 3, 8, 15, 16, 40, 576])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def forget_library() -> None:
    for remembered in (cpu._library, cpu._load, cpu.panel_kernels, cpu_choose.choose_kernel):
        remembered.cache_clear()


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache directory, and no library remembered from before. What is compiled into it need not be
    fast, but soon there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in cpu.FLAGS))
    forget_library()
    yield tmp_path / "haast" / "kernels"
    forget_library()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor) -> None:
    """Whether a result is that of float32 arithmetic on the same numbers, rounded once to its own dtype.

    expected: computed by the reference in float32.
    """
    step = torch.finfo(found.dtype).eps if found.dtype != torch.float32 else 4e-6
    torch.testing.assert_close(found.float(), expected, rtol=step, atol=step)


def rotation(num_nodes: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angles = normal(1, num_nodes, 1, head_dim // 2, seed=5)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


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


needs_panels = pytest.mark.skipif(
    cpu.panel_kernels() is None, reason="no C compiler with OpenMP, or no float16"
)


def in_bytes(weight: Tensor) -> Tensor:
    codes, scales = ref.quantise_rows(weight)
    return codes.double() * scales.double()[:, None]


# How a matrix is packed, and what it is rounded to.
KINDS: list[tuple[Callable[[Tensor], object], Callable[[Tensor], Tensor]]] = [
    (ops.pack_half, lambda weight: weight.half().double()),
    (ops.pack_bytes, in_bytes),
]


@needs_panels
class TestPanels:
    @settings(deadline=None)
    @given(
        num_rows=st.one_of(st.integers(1, 14), st.sampled_from([33, 97, 200])),
        num_inputs=st.sampled_from([1, 7, 64, 576]),
        num_outputs=st.sampled_from([1, 15, 16, 17, 64, 80, 200]),
        threads=st.sampled_from([1, 2, 3]),
        kind=st.sampled_from(KINDS),
    )
    def test_is_the_product_and_its_rows_stand_alone(
        self,
        num_rows: int,
        num_inputs: int,
        num_outputs: int,
        threads: int,
        kind: tuple[Callable[[Tensor], object], Callable[[Tensor], Tensor]],
    ) -> None:
        weight, x = normal(num_outputs, num_inputs), normal(num_rows, num_inputs, seed=1)
        packed = kind[0](weight)
        assert isinstance(packed, cpu.PanelMatrix)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = ops.panel_linear(x, packed)
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(found.double(), x.double() @ kind[1](weight).T, rtol=1e-5, atol=1e-4)
        alone = torch.cat([ops.panel_linear(row[None], packed) for row in x[-7:]])
        assert torch.equal(alone, found[-7:])

    def test_every_float16_is_widened_exactly(self) -> None:
        bits = torch.arange(-(1 << 15), 1 << 15).short().view(torch.float16)
        weight = bits[bits.isfinite()].float()[:, None]
        packed = ops.pack_half(weight)
        assert torch.equal(ops.half_linear(torch.ones(1, 1), packed)[0], weight[:, 0])

    def test_every_byte_is_widened_exactly(self) -> None:
        """Each output has all the codes, so that its largest is 127; a row of zeros stays one."""
        codes = torch.arange(-127, 128).float()
        weight = torch.stack([codes * 0.5, codes.flip(0), torch.zeros(255)])
        packed = ops.pack_bytes(weight)
        assert isinstance(packed, cpu.PanelMatrix)
        assert torch.equal(ops.panel_linear(torch.eye(255), packed), weight.T)

    def test_any_shape_and_layout_of_rows(self) -> None:
        weight, x = normal(40, 24), normal(24, 3, 5, seed=1).permute(1, 2, 0)
        packed = ops.pack_half(weight)
        found = ops.half_linear(x, packed)
        assert found.shape == (3, 5, 40)
        torch.testing.assert_close(found, x @ weight.half().float().T, rtol=1e-5, atol=1e-5)
        assert ops.half_linear(x[:0], packed).shape == (0, 5, 40)

    def test_what_is_not_a_number_does_not_vanish(self) -> None:
        x = normal(2, 16)
        x[1, 3] = math.nan
        found = ops.half_linear(x, ops.pack_half(normal(32, 16, seed=1)))
        assert found[0].isfinite().all()
        assert found[1].isnan().all()

    def test_gradients_are_not_dropped_in_silence(self) -> None:
        packed = ops.pack_half(normal(16, 8))
        with pytest.raises(AssertionError, match="gradient"):
            ops.half_linear(normal(1, 8).requires_grad_(), packed)


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


class TestLibrary:
    def test_is_turned_off_by_the_environment(
        self, fresh_library: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HAAST_CPU_KERNELS", "0")
        assert cpu.kernels_for(torch.float32) is None
        x, weight = normal(1, 2, 16), normal(16, seed=1)
        assert torch.equal(ops.rms_norm(x, weight, 1e-5), ref.rms_norm(x, weight, 1e-5))
        assert not fresh_library.exists()

    @pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "cc 'open quote"])
    def test_without_a_compiler_torch_runs_and_the_log_says_so(
        self,
        compiler: str,
        fresh_library: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setenv("CC", compiler)
        with caplog.at_level(logging.INFO, "haast"):
            assert cpu.kernels_for(torch.float32) is None
        assert "plain torch" in caplog.text
        assert ops.silu_mul(normal(1, 1, 16)).shape == (1, 1, 8)

    def test_a_compiler_may_fail_in_any_language(
        self,
        fresh_library: Path,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        compiler = tmp_path / "compiler"
        compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { printf "\\344rger\\n" >&2; exit 1; }\n')
        compiler.chmod(0o755)
        monkeypatch.setenv("CC", str(compiler))
        with caplog.at_level(logging.INFO, "haast"):
            assert cpu.kernels_for(torch.float32) is None
        assert "rger" in caplog.text

    def test_without_a_home_torch_runs(
        self, fresh_library: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As in a container whose user is a bare number."""

        def unknown(uid: int) -> None:
            raise KeyError(uid)

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr("pwd.getpwuid", unknown)
        with caplog.at_level(logging.INFO, "haast"):
            assert cpu.kernels_for(torch.float32) is None
        assert "plain torch" in caplog.text

    @needs_compiler
    def test_an_empty_choice_of_compiler_is_none(
        self, fresh_library: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CC", "")
        assert cpu.kernels_for(torch.float32) is not None

    @needs_compiler
    @pytest.mark.parametrize(
        ("folder", "mode"), [(".", 0o777), (".", 0o770), ("..", 0o777)], ids=["open", "group", "open parent"]
    )
    def test_nothing_is_loaded_from_where_others_may_write(
        self, folder: str, mode: int, fresh_library: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert cpu.kernels_for(torch.float32) is not None
        forget_library()
        (fresh_library / folder).chmod(mode)
        with caplog.at_level(logging.INFO, "haast"):
            assert cpu.kernels_for(torch.float32) is None
        assert "others may write" in caplog.text

    @needs_compiler
    def test_nothing_is_loaded_from_somebody_elses_directory(
        self, fresh_library: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert cpu.kernels_for(torch.float32) is not None
        forget_library()
        owner = fresh_library.stat().st_uid
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
        if owner == 0:  # what root owns is trusted: give it away
            os.chown(fresh_library, 4711, -1)
        assert cpu.kernels_for(torch.float32) is None

    @needs_compiler
    def test_is_compiled_once_and_found_again(
        self, fresh_library: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert cpu.kernels_for(torch.float32) is not None
        (built,) = fresh_library.iterdir()
        assert stat.S_IMODE(fresh_library.stat().st_mode) == 0o700
        forget_library()
        changed = built.stat().st_mtime_ns
        assert cpu.kernels_for(torch.float32) is not None
        assert [file.stat().st_mtime_ns for file in fresh_library.iterdir()] == [changed]

    @needs_compiler
    def test_one_that_does_not_load_is_compiled_anew(self, fresh_library: Path) -> None:
        """As a crash leaves it before its bytes have reached the disk."""
        built = cpu._compiled()
        built.write_bytes(b"")
        assert cpu.kernels_for(torch.float32) is not None
        assert list(fresh_library.iterdir()) == [built]
        assert built.stat().st_size > 0

    @needs_compiler
    def test_a_changed_source_is_compiled_anew(
        self, fresh_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        assert cpu.kernels_for(torch.float32) is not None
        files = (cpu.SOURCE, *cpu.INCLUDED)
        copies = [tmp_path / file.name for file in files]
        for file, copy in zip(files, copies, strict=True):
            copy.write_text(file.read_text())
        copies[-1].write_text(copies[-1].read_text() + "\n/* more */\n")
        monkeypatch.setattr(cpu, "SOURCE", copies[0])
        monkeypatch.setattr(cpu, "INCLUDED", tuple(copies[1:]))
        forget_library()
        assert cpu.kernels_for(torch.float32) is not None
        assert len(list(fresh_library.iterdir())) == 2

    @needs_compiler
    def test_a_compiler_without_openmp_compiles_the_rest(
        self, fresh_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        compiler = tmp_path / "cc"
        compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec cc "$@"\n')
        compiler.chmod(0o755)
        monkeypatch.setenv("CC", str(compiler))
        assert cpu.kernels_for(torch.float32) is not None
        assert cpu.panel_kernels() is None
        assert not isinstance(ops.pack_half(torch.zeros(8, 8)), cpu.PanelMatrix)

    @needs_compiler
    def test_beside_another_openmp_the_product_is_torchs(
        self, fresh_library: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cpu, "_shares_openmp", lambda: False)
        assert cpu.kernels_for(torch.float32) is not None
        assert cpu.panel_kernels() is None

    def test_a_directory_that_cannot_be_written_means_torch(
        self, fresh_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        file = tmp_path / "file"
        file.write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(file))
        assert cpu.kernels_for(torch.float32) is None
