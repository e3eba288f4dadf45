"""Copies on large pages: they are copies, they do not overlap, and they outlive their neighbours."""

from __future__ import annotations

import gc
import mmap

import pytest
import torch

from kernels import large_pages
from kernels.large_pages import on_large_pages


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.float32])
def test_copies_side_by_side(dtype: torch.dtype) -> None:
    sources = [torch.randint(-99, 99, (1 + 7 * i, 5)).to(dtype) for i in range(20)]
    copies = [on_large_pages(source.T) for source in sources]
    for source, copy in zip(sources, copies, strict=True):
        assert torch.equal(copy, source.T)
        assert copy.is_contiguous()
        assert copy.dtype is dtype
        assert copy.data_ptr() % 64 == 0
    copies[3].fill_(1)
    assert torch.equal(copies[2], sources[2].T)
    assert torch.equal(copies[4], sources[4].T)


def test_a_full_chunk_makes_room_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in the old one stays; what is larger than a chunk gets one of its own size."""
    monkeypatch.setattr(large_pages, "_CHUNK", large_pages._PAGE)
    monkeypatch.setattr(large_pages, "_chunk", torch.empty(0, dtype=torch.uint8))
    sources = [torch.full((count,), number, dtype=torch.int32) for number, count in enumerate((300_000,) * 4)]
    copies = [on_large_pages(source) for source in (*sources, torch.arange(2_000_000))]
    gc.collect()
    assert all(torch.equal(copy, source) for copy, source in zip(copies, sources, strict=False))
    assert torch.equal(copies[-1], torch.arange(2_000_000))


def test_nothing_and_a_system_without_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_large_pages(torch.zeros(0, 16)).shape == (0, 16)
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    monkeypatch.setattr(large_pages, "_chunk", torch.empty(0, dtype=torch.uint8))
    assert torch.equal(on_large_pages(torch.arange(50)), torch.arange(50))
