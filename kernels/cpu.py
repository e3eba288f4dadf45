"""The operations of ``cpu.c`` and what it includes: compiled once for this machine, called on CPU tensors.

A decoder layer of a small model is some thirty torch calls of a few microseconds each, half as long as its
matrix products take; here it is ten calls. The C compiler is the system's (``$CC`` or ``cc``); the library is
kept in ``$XDG_CACHE_HOME/haast`` under a name that depends on source, flags and CPU. Without a compiler, or
with ``HAAST_CPU_KERNELS=0``, ``kernels_for`` returns None and the torch reference runs instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import ref
from kernels.large_pages import on_large_pages

log = logging.getLogger("haast")

SOURCE = Path(__file__).with_name("cpu.c")
INCLUDED = tuple(
    Path(__file__).with_name(f"cpu_{name}.h")
    for name in ("ops", "choose", "best", "crew", "product", "tiles", "layer", "head")
)
FLAGS = (
    *("-O3", "-march=native", "-std=c11", "-ffp-contract=fast", "-fno-math-errno"),
    *("-shared", "-fPIC"),
)
_OPENMP = "-fopenmp"
WIDTH = 8  # floats of a vector in cpu.c
PANEL = 16  # outputs of a panel in cpu_product.h
FEW_ROWS = 32  # up to here a call is over too soon to hand over the interpreter's lock meanwhile
_COMPILE_SECONDS = 60

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "rms_norm": (_POINTER,) * 3 + (_LONG,) * 2 + (_FLOAT,),
    "silu_mul": (_POINTER,) * 2 + (_LONG,) * 2,
    "rope_write": (_POINTER,) * 6 + (_LONG,) * 6,
    "tree_attention": (*(_POINTER,) * 4, _LONG, *(_POINTER,) * 3, *(_LONG,) * 8, _FLOAT),
}
_PANEL_LINEAR = (_POINTER,) * 4 + (_LONG,) * 4


@dataclass(frozen=True, slots=True)
class Kernels:
    """The compiled operations for tensors of one dtype."""

    dtype: torch.dtype
    rms_norm: Callable[..., None]
    silu_mul: Callable[..., None]
    rope_write: Callable[..., None]
    tree_attention: Callable[..., None]


@dataclass(frozen=True, slots=True)
class PanelKernels:
    """Products with a matrix in panels: the same function twice."""

    short: Callable[..., None]  # keeps the interpreter's lock
    long: Callable[..., None]  # hands it over, so that other threads go on meanwhile


def kernels_for(dtype: torch.dtype) -> Kernels | None:
    """The operations for a dtype, or None where there are none."""
    path = _library()
    return None if path is None else _load(path).get(dtype)


@functools.cache
def panel_kernels() -> PanelKernels | None:
    """The products, or None where they were not compiled for this machine or have no threads to run on."""
    functions = threaded("panel_linear", _PANEL_LINEAR)
    return None if functions is None else PanelKernels(*functions)


def threaded(name: str, signature: Sequence[Any]) -> tuple[Callable[..., None], Callable[..., None]] | None:
    """A function that runs on all threads, or None if there is none: once keeping the interpreter's lock,
    which is cheaper for calls of microseconds, and once handing it over."""
    path = _library()
    if path is None:
        return None
    found = []
    for library in (ctypes.PyDLL, ctypes.CDLL):
        function = getattr(library(str(path)), f"haast_{name}", None)
        if function is None:
            return None
        function.argtypes, function.restype = signature, None
        found.append(function)
    return found[0], found[1]


@functools.cache
def _load(path: Path) -> dict[torch.dtype, Kernels]:
    loaded = ctypes.PyDLL(str(path))  # see ``threaded``: none of these takes longer than microseconds

    def function(name: str, dtype: str) -> Callable[..., None]:
        found = getattr(loaded, f"haast_{name}_{dtype}")
        found.argtypes, found.restype = _SIGNATURES[name], None
        compiled: Callable[..., None] = found
        return compiled

    return {
        dtype: Kernels(dtype, **{name: function(name, str(dtype)[len("torch.") :]) for name in _SIGNATURES})
        for dtype in (torch.float32, torch.bfloat16)
    }


@functools.cache
def _library() -> Path | None:
    """What could be compiled; None, and a line in the log, where that is impossible."""
    if os.environ.get("HAAST_CPU_KERNELS", "1") == "0":
        return None
    try:
        path = _compiled()
        ctypes.PyDLL(str(path))
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # ValueError: $CC has an open quote
        failed = isinstance(error, subprocess.CalledProcessError) and error.stderr.strip()
        reason = (failed or str(error)).strip().splitlines()
        log.info("CPU kernels: plain torch, which is slower (%s)", reason[0] if reason else "no C compiler")
        return None
    return path


def _compiled() -> Path:
    """The library's file, compiled if this machine has none that loads. Raises OSError, ValueError or
    SubprocessError."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    flags = (*FLAGS, _OPENMP) if _shares_openmp() else FLAGS
    version = _output([*compiler, "--version"])
    sources = [file.read_text() for file in (SOURCE, *INCLUDED)]
    key = "\0".join((*sources, version, *flags, platform.machine(), _cpu_flags()))
    directory = _directory()
    path = directory / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if path.exists():
        with contextlib.suppress(OSError):  # cut short when the machine went down, or linked for another
            ctypes.PyDLL(str(path))
            return path
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        built = Path(scratch) / "cpu.so"
        command = [*compiler, str(SOURCE), "-o", str(built), "-lm"]
        try:
            _output([*command, *flags])
        except subprocess.CalledProcessError:
            if flags == FLAGS:
                raise
            _output([*command, *FLAGS])  # a compiler without OpenMP: everything but the product
        built.replace(path)  # at once: another process may be doing the same
    return path


def _shares_openmp() -> bool:
    """Whether torch runs on GCC's OpenMP, which our library then finds loaded under the same name. A second
    runtime would bring a second pool of threads, and each would wait on the cores that the other needs."""
    try:
        ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
    except (OSError, AttributeError):  # AttributeError: not a system with such libraries
        return False
    return True


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
    space = torch.empty(WIDTH * (longest + 2 * head_dim) + widened, dtype=torch.float32)
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


class Matrix(ctypes.Structure):
    """``matrix`` of ``cpu_product.h``."""

    _fields_ = (("panels", _POINTER), ("scales", _POINTER))


class PanelMatrix:
    """A matrix [out, in] as ``cpu_product.h`` reads it.

    panels: [ceil(out / PANEL), in, PANEL] float16 or, with scales, int8, padded with zeros; scales: float32,
    one for every output of the panels.
    """

    def __init__(
        self, kernels: PanelKernels, panels: Tensor, scales: Tensor | None, num_outputs: int
    ) -> None:
        self.kernels, self.panels, self.scales, self.num_outputs = kernels, panels, scales, num_outputs
        self.num_inputs = panels.shape[1]
        self.struct = Matrix(panels.data_ptr(), None if scales is None else scales.data_ptr())
        self.address = ctypes.addressof(self.struct)


def pack_half(kernels: PanelKernels, weight: Tensor) -> PanelMatrix:
    """Round a matrix [out, in] to float16 and lay it out in panels."""
    return PanelMatrix(kernels, _in_panels(weight.half()), None, len(weight))


def pack_bytes(kernels: PanelKernels, weight: Tensor) -> PanelMatrix:
    """Round a matrix [out, in] as ``ref.quantise_rows`` does and lay it out in panels."""
    codes, scales = ref.quantise_rows(weight)
    panels = _in_panels(codes)
    padded = scales.new_zeros(len(panels) * PANEL)
    padded[: len(scales)] = scales
    return PanelMatrix(kernels, panels, padded, len(weight))


def _in_panels(weight: Tensor) -> Tensor:
    """[out, in] -> [ceil(out / PANEL), in, PANEL], padded with zeros."""
    num_outputs, num_inputs = weight.shape
    num_panels = -(-num_outputs // PANEL)
    padded = weight.new_zeros(num_panels * PANEL, num_inputs)
    padded[:num_outputs] = weight
    return on_large_pages(padded.view(num_panels, PANEL, num_inputs).transpose(1, 2))


def panel_linear(x: Tensor, matrix: PanelMatrix) -> Tensor:
    """x [.., in] float32, contiguous, times a matrix -> [.., out]: as ``ref.half_linear``, or the product
    with ``ref.quantise_rows``' codes and scales."""
    num_rows, num_outputs = x.numel() // matrix.num_inputs, matrix.num_outputs
    out = x.new_empty((*x.shape[:-1], num_outputs))
    space = None if num_outputs % PANEL == 0 else x.new_empty(num_rows * PANEL)
    multiply = matrix.kernels.short if num_rows <= FEW_ROWS else matrix.kernels.long
    multiply(
        x.data_ptr(),
        matrix.address,
        out.data_ptr(),
        None if space is None else space.data_ptr(),
        num_rows,
        matrix.num_inputs,
        num_outputs,
        torch.get_num_threads(),
    )
    return out
