"""Copies on large pages: they are copies, they do not overlap, they outlive their neighbours, and nothing is
left of the last one."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

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
    monkeypatch.setattr(large_pages, "_newest", None)
    sources = [torch.full((count,), number, dtype=torch.int32) for number, count in enumerate((300_000,) * 4)]
    copies = [on_large_pages(source) for source in (*sources, torch.arange(2_000_000))]
    gc.collect()
    assert all(torch.equal(copy, source) for copy, source in zip(copies, sources, strict=False))
    assert torch.equal(copies[-1], torch.arange(2_000_000))


def test_nothing_and_a_system_without_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_large_pages(torch.zeros(0, 16)).shape == (0, 16)
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    monkeypatch.setattr(large_pages, "_newest", None)
    assert torch.equal(on_large_pages(torch.arange(50)), torch.arange(50))


MAPS = Path("/proc/self/maps")


def mapping_at(address: int) -> tuple[int, str] | None:
    """Size and permissions of what is mapped at an address, if anything is."""
    for line in MAPS.read_text().splitlines():
        bounds, permissions = line.split()[:2]
        first, last = (int(bound, 16) for bound in bounds.split("-"))
        if first <= address < last:
            return last - first, permissions
    return None


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not say what is mapped")
@pytest.mark.parametrize("num_bytes", [5 << 20, 70 << 20])
def test_memory_may_get_large_pages_and_goes_with_its_last_copy(
    monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    """In a chunk, and alone. Only private memory gets large pages on every machine that has them."""
    monkeypatch.setattr(large_pages, "_newest", None)
    first = on_large_pages(torch.zeros(100, dtype=torch.uint8))
    copy = on_large_pages(torch.ones(num_bytes, dtype=torch.uint8))
    address, others = copy.data_ptr() + num_bytes // 2, first.data_ptr()
    mapped = mapping_at(address)
    assert mapped is not None
    assert mapped[0] >= num_bytes
    assert mapped[1] == "rw-p"
    part = copy[:10]
    del first, copy
    assert mapping_at(address) is not None
    assert torch.equal(part, torch.ones(10, dtype=torch.uint8))
    del part
    assert mapping_at(address) is None
    assert mapping_at(others) is None
    assert torch.equal(on_large_pages(torch.arange(50)), torch.arange(50))
