"""Memory on large pages, for matrices that every step of a model on a CPU reads whole.

With pages of 4 KiB a step that reads hundreds of megabytes looks up an address every few dozen nanoseconds,
and a product that is bound by memory waits for it: on one machine a seventh of its time. Linux gives pages of
2 MiB to memory that asks for them (``madvise``) and that is private: what could be shared with a forked
process gets them only where an administrator has said so. It must start at a multiple of their size, and a
small matrix would waste most of one, so matrices are laid side by side in chunks. Matrices alone keep their
memory: a chunk is returned with the last one in it.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref

import torch
from torch import Tensor

_PAGE = 2 << 20
_CHUNK = 64 << 20  # of addresses: what is not used takes no memory
_LINE = 64

_lock = threading.Lock()
_newest: weakref.ref[mmap.mmap] | None = None  # the newest chunk: dead when nothing lies in it any more
_taken = 0  # its first free byte


def on_large_pages(x: Tensor) -> Tensor:
    """A copy of a CPU tensor, contiguous; where the system has no large pages to give, on its usual ones."""
    num_bytes = x.numel() * x.element_size()
    if num_bytes == 0:
        return x.contiguous()
    return _take(num_bytes).view(x.dtype).view(x.shape).copy_(x)


def _take(num_bytes: int) -> Tensor:
    """[num_bytes] uint8, at a multiple of a cache line. What would fill a chunk has its memory alone."""
    global _newest, _taken
    room = -(-num_bytes // _LINE) * _LINE
    if room >= _CHUNK:
        memory, start = _mapping(room)
        return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=start)
    with _lock:
        chunk = None if _newest is None else _newest()
        if chunk is None or _taken + room > len(chunk):
            chunk, _taken = _mapping(_CHUNK)
            _newest = weakref.ref(chunk)
        taken = torch.frombuffer(chunk, dtype=torch.uint8, count=num_bytes, offset=_taken)
        _taken += room
    return taken


def _mapping(num_bytes: int) -> tuple[mmap.mmap, int]:
    """Zeros, and the offset of a large page from which on there are ``num_bytes`` of them."""
    memory = mmap.mmap(-1, num_bytes + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # of a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _PAGE
