"""The choice of tokens on a CPU: ``cpu_choose.h``, and a draft's best few: ``cpu_best.h``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels import cpu

_SIGNATURE = (ctypes.c_void_p,) * 7 + (ctypes.c_int64,) * 4
_BEST = (ctypes.c_void_p,) * 4 + (ctypes.c_int64,) * 3


@functools.cache
def choose_kernel() -> Callable[..., None] | None:
    """The compiled function, or None where there is none. It hands over the interpreter's lock: a vocabulary
    is long."""
    functions = cpu.threaded("choose", _SIGNATURE)
    return None if functions is None else functions[1]


def choose(
    kernel: Callable[..., None],
    logits: Tensor,
    positions: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    floors: Tensor | None,
    seeds: Tensor,
) -> Tensor:
    """As ``ref.choose``; logits contiguous."""
    num_seqs, num_nodes, vocab_size = logits.shape
    choice = torch.empty(num_seqs, num_nodes, dtype=torch.int64)
    positions, seeds = positions.contiguous(), seeds.contiguous()
    temperature, top_p = temperature.contiguous(), top_p.contiguous()
    floors = None if floors is None else floors.contiguous()
    kernel(
        logits.data_ptr(),
        temperature.data_ptr(),
        top_p.data_ptr(),
        None if floors is None else floors.data_ptr(),
        seeds.data_ptr(),
        positions.data_ptr(),
        choice.data_ptr(),
        num_seqs,
        num_nodes,
        vocab_size,
        torch.get_num_threads(),
    )
    return choice


@functools.cache
def best_kernel() -> Callable[..., None] | None:
    """The compiled function, or None where there is none."""
    functions = cpu.threaded("best", _BEST)
    return None if functions is None else functions[0]


def best(kernel: Callable[..., None], logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``ref.best``; logits contiguous."""
    shape, vocab_size = logits.shape[:-1], logits.shape[-1]
    values = torch.empty(*shape, count, dtype=torch.float32)
    columns = torch.empty(*shape, count, dtype=torch.int64)
    mass = torch.empty(shape, dtype=torch.float32)
    kernel(
        logits.data_ptr(),
        values.data_ptr(),
        columns.data_ptr(),
        mass.data_ptr(),
        mass.numel(),
        vocab_size,
        count,
    )
    return values, columns, mass
