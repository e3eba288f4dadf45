"""Memory on large pages, for matrices that every step of a model on a CPU reads whole.

With pages of 4 KiB a step that reads hundreds of megabytes looks up an address every few dozen nanoseconds,
and a product that is bound by memory waits for it: on one machine a seventh of its time. Linux gives pages of
2 MiB to memory that asks for them (``madvise``). It must start at a multiple of their size, and a small
matrix would waste most of one, so matrices are laid side by side in chunks.
"""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch
from torch import Tensor

_PAGE = 2 << 20
_CHUNK = 64 << 20  # of addresses: what is not used takes no memory
_LINE = 64

_lock = threading.Lock()
_chunk = torch.empty(0, dtype=torch.uint8)  # what is left of the newest


def on_large_pages(x: Tensor) -> Tensor:
    """A copy of a CPU tensor, contiguous; where the system has no large pages to give, on its usual ones."""
    num_bytes = x.numel() * x.element_size()
    if num_bytes == 0:
        return x.contiguous()
    copy = _take(num_bytes).view(x.dtype).view(x.shape)
    return copy.copy_(x)


def _take(num_bytes: int) -> Tensor:
    """[num_bytes] uint8, at a multiple of a cache line."""
    global _chunk
    room = -(-num_bytes // _LINE) * _LINE
    with _lock:
        if room > len(_chunk):
            _chunk = _new_chunk(max(_CHUNK, -(-room // _PAGE) * _PAGE))
        taken, _chunk = _chunk[:num_bytes], _chunk[room:]
    return taken


def _new_chunk(num_bytes: int) -> Tensor:
    """Zeros from a multiple of a large page on. They live as long as any tensor in them."""
    memory = mmap.mmap(-1, num_bytes + _PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # of a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _PAGE
    return whole[start : start + num_bytes]
