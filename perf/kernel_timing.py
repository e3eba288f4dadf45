"""Timing of single operations: the device's own ceilings, and medians of calls whose inputs are not cached.

On a GPU calls are captured in a graph, as an engine launches them, so that what is timed is the device and
not Python; a call that cannot be captured (it asks the device something) is timed as it is, and marked. Calls
take turns on several sets of arguments, together larger than the L2 cache, or the cache would be measured.

Whether a call can be captured is found out before: a capture that breaks leaves torch's allocator as if it
went on, and memory could not be given back any more.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]

_REPLAYS = 11
_CALLS = 24  # captured in a graph, at least
_COPIED = 1 << 30  # bytes
_MATRIX = 8192


@dataclass(frozen=True, slots=True)
class Timing:
    """Median seconds of a call; captured: in a graph, without the host's share."""

    seconds: float
    captured: bool


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a device reaches: bytes per second moved by a copy (each read and each write counts), flops per
    second of large matrix products."""

    bandwidth: float
    flops: float
    flops_fp8: float
    source: str

    def seconds(self, num_bytes: int, flops: int, fp8: bool) -> float:
        """The least time for that much of both."""
        return max(num_bytes / self.bandwidth, flops / (self.flops_fp8 if fp8 else self.flops))


def timed(calls: Sequence[Call], device: str, repeats: int = _REPLAYS) -> Timing:
    """Median time of one of the calls, taken in turns."""
    calls = list(calls) * -(-_CALLS // len(calls)) if device == "cuda" else list(calls)
    if device != "cuda":
        return Timing(_median(lambda: [call() for call in calls], len(calls), 1, _on_host), False)
    for call in calls[: len(set(calls))]:  # compile, and let allocations settle
        call()
    torch.cuda.synchronize()
    if waits(calls[0]):
        return Timing(_median(lambda: [call() for call in calls], len(calls), repeats, _on_device), False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return Timing(_median(graph.replay, len(calls), repeats, _on_device), True)


def waits(call: Call) -> bool:
    """Whether a call asks the GPU for something, which no graph can hold. Runs it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def _median(run: Call, num_calls: int, repeats: int, clock: Callable[[Call], float]) -> float:
    return statistics.median(clock(run) for _ in range(repeats)) / num_calls


def _on_host(run: Call) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _on_device(run: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def measured_ceilings(device: str) -> Ceilings:
    """By copying a gibibyte and multiplying square matrices of random numbers (constant ones take a GPU less
    power and so less time); much smaller ones on a CPU."""
    on_gpu = device == "cuda"
    num_bytes, side = (_COPIED, _MATRIX) if on_gpu else (1 << 22, 128)
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = timed([lambda: target.copy_(source)], device).seconds
    flops = 2 * side**3
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = timed([lambda: left @ right], device).seconds
    fp8 = product
    if on_gpu and torch.cuda.get_device_capability() >= (8, 9):
        one = torch.ones((), device=device)
        codes, other = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
        fp8 = timed(
            [lambda: torch._scaled_mm(codes, other, one, one, out_dtype=torch.bfloat16)], device
        ).seconds
    return Ceilings(2 * num_bytes / copy, flops / product, flops / fp8, "measured")


def launch_seconds(device: str) -> float:
    """Between two launches that do next to nothing."""
    one = torch.zeros(1, device=device)
    return timed([one.zero_], device).seconds


def cache_bytes(device: str) -> int:
    """Of the last cache before memory."""
    return int(torch.cuda.get_device_properties(0).L2_cache_size) if device == "cuda" else 0
