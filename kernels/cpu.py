"""The operations of ``cpu.c``: compiled once for this machine, called on float32 and bfloat16 CPU tensors.

A decoder layer of a small model is some thirty torch calls of a few microseconds each, half as long as its
matrix products take; here it is ten calls. The C compiler is the system's (``$CC`` or ``cc``); the library is
kept in ``$XDG_CACHE_HOME/haast`` under a name that depends on source, flags and CPU. Without a compiler, or
with ``HAAST_CPU_KERNELS=0``, ``kernels_for`` returns None and the torch reference runs instead.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger("haast")

SOURCE = Path(__file__).with_name("cpu.c")
INCLUDED = Path(__file__).with_name("cpu_ops.h")
FLAGS = (
    *("-O3", "-march=native", "-std=c11", "-ffp-contract=fast", "-fno-math-errno"),
    *("-shared", "-fPIC"),
)
_WIDTH = 8  # floats of a vector in cpu.c
_COMPILE_SECONDS = 60

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "rms_norm": (_POINTER,) * 3 + (_LONG,) * 2 + (_FLOAT,),
    "add_rms_norm": (_POINTER,) * 5 + (_LONG,) * 2 + (_FLOAT,),
    "silu_mul": (_POINTER,) * 2 + (_LONG,) * 2,
    "rope_write": (_POINTER,) * 6 + (_LONG,) * 6,
    "tree_attention": (*(_POINTER,) * 4, _LONG, *(_POINTER,) * 3, *(_LONG,) * 8, _FLOAT),
}


@dataclass(frozen=True, slots=True)
class Kernels:
    """The compiled operations for tensors of one dtype."""

    dtype: torch.dtype
    rms_norm: Callable[..., None]
    add_rms_norm: Callable[..., None]
    silu_mul: Callable[..., None]
    rope_write: Callable[..., None]
    tree_attention: Callable[..., None]


def kernels_for(dtype: torch.dtype) -> Kernels | None:
    """The operations for a dtype, or None where there are none."""
    return _load().get(dtype)


@functools.cache
def _load() -> dict[torch.dtype, Kernels]:
    """What could be compiled; nothing, and a line in the log, where that is impossible."""
    if os.environ.get("HAAST_CPU_KERNELS", "1") == "0":
        return {}
    try:
        path = _compiled()
        # Calls take microseconds: keeping the interpreter's lock is cheaper than handing it over and back.
        loaded = ctypes.PyDLL(str(path))
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # ValueError: $CC has an open quote
        failed = isinstance(error, subprocess.CalledProcessError) and error.stderr.strip()
        reason = (failed or str(error)).strip().splitlines()
        log.info("CPU kernels: plain torch, which is slower (%s)", reason[0] if reason else "no C compiler")
        return {}

    def function(name: str, dtype: str) -> Callable[..., None]:
        found = getattr(loaded, f"haast_{name}_{dtype}")
        found.argtypes, found.restype = _SIGNATURES[name], None
        compiled: Callable[..., None] = found
        return compiled

    return {
        dtype: Kernels(dtype, **{name: function(name, str(dtype)[len("torch.") :]) for name in _SIGNATURES})
        for dtype in (torch.float32, torch.bfloat16)
    }


def _compiled() -> Path:
    """The library's file, compiled if this machine has not done so. Raises OSError, ValueError or
    SubprocessError."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    version, sources = _output([*compiler, "--version"]), (SOURCE.read_text(), INCLUDED.read_text())
    key = "\0".join((*sources, version, *FLAGS, platform.machine(), _cpu_flags()))
    directory = _directory()
    path = directory / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        built = Path(scratch) / "cpu.so"
        _output([*compiler, *FLAGS, str(SOURCE), "-o", str(built), "-lm"])
        built.replace(path)  # at once: another process may be doing the same
    return path


def _output(command: list[str]) -> str:
    """What a command says; its bytes need not be text of this locale."""
    return subprocess.run(
        command, check=True, capture_output=True, text=True, errors="replace", timeout=_COMPILE_SECONDS
    ).stdout


def _directory() -> Path:
    """Where libraries are kept, made if missing. Raises OSError where others could put theirs there."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # neither $HOME nor an entry in the list of users, as in many containers
        raise FileNotFoundError("no home directory; set XDG_CACHE_HOME") from error
    directory = base / "haast" / "kernels"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    # The base may be open to everybody, like /tmp: then the names in it may be somebody else's.
    for folder, writable in ((directory, 0o022), (directory.parent, 0o002)):
        found = folder.stat()
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & writable:
            raise PermissionError(f"{folder}: others may write there, so nothing is loaded from it")
    return directory


def _cpu_flags() -> str:
    """What -march=native depends on: a cache directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def rms_norm(kernels: Kernels, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As ``ref.rms_norm``; x contiguous."""
    out, width = torch.empty_like(x), x.shape[-1]
    kernels.rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // width, width, eps)
    return out


def add_rms_norm(
    kernels: Kernels, x: Tensor, delta: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As ``ref.add_rms_norm``; x and delta contiguous."""
    total, out, width = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    kernels.add_rms_norm(
        x.data_ptr(),
        delta.data_ptr(),
        weight.data_ptr(),
        total.data_ptr(),
        out.data_ptr(),
        x.numel() // width,
        width,
        eps,
    )
    return total, out


def silu_mul(kernels: Kernels, gate_up: Tensor) -> Tensor:
    """As ``ref.silu_mul``; gate_up contiguous, its halves multiples of 8."""
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], width))
    kernels.silu_mul(gate_up.data_ptr(), out.data_ptr(), out.numel() // width, width)
    return out


def rope_write(
    kernels: Kernels,
    heads: Tensor,
    num_heads: int,
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor | slice,
) -> Tensor:
    """As ``ref.rope_write``; everything contiguous. Turns the query heads in place."""
    listed, first_slot = (None, slots.start) if isinstance(slots, slice) else (slots.data_ptr(), 0)
    kernels.rope_write(
        heads.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        k_pool.data_ptr(),
        v_pool.data_ptr(),
        listed,
        first_slot,
        heads.shape[:-2].numel(),
        num_heads,
        k_pool.shape[0],
        k_pool.shape[1],
        heads.shape[-1],
    )
    return heads[..., :num_heads, :]


def tree_attention(
    kernels: Kernels,
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor | tuple[slice, ...],
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """As ``ref.tree_attention``; q may be a slice of a wider [B, N, heads, D], the rest is contiguous."""
    num_seqs, num_nodes, num_heads, head_dim = q.shape
    num_kv_heads, num_slots = k_pool.shape[:2]
    # Per sequence: where its list of slots lies or None, the first slot of a run, and the number of keys.
    if isinstance(slots, tuple):
        reads = [(None, run.start, run.stop - run.start) for run in slots]
    else:
        reads = [(row.data_ptr(), 0, slots.shape[1]) for row in slots]
    longest = max(count for *_, count in reads)
    out = q.new_empty(num_seqs, num_nodes, num_heads, head_dim)
    widened = 0 if q.dtype is torch.float32 else 2 * longest * head_dim
    # The dtype is named: torch's default is whatever somebody has made it.
    space = torch.empty(_WIDTH * (longest + 2 * head_dim) + widened, dtype=torch.float32)
    q_at, out_at, bias_at = q.data_ptr(), out.data_ptr(), None if bias is None else bias.data_ptr()
    bias_stride, size = 0 if bias is None else bias.shape[2], q.element_size()
    for seq, (listed, first_slot, num_keys) in enumerate(reads):
        kernels.tree_attention(
            q_at + size * seq * q.stride(0),
            k_pool.data_ptr(),
            v_pool.data_ptr(),
            listed,
            first_slot,
            None if bias_at is None else bias_at + 4 * seq * num_nodes * bias_stride,
            out_at + size * seq * out.stride(0),
            space.data_ptr(),
            num_nodes,
            q.stride(1),
            num_heads,
            num_kv_heads,
            num_slots,
            num_keys,
            bias_stride,
            head_dim,
            scale,
        )
    return out
