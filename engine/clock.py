"""When the phases of a step begin and end, on the device that works on them.

A host that hands work to a GPU does not know when it is done, and must not wait to find out. So a mark on a
GPU is an event in its stream, and is read when the step is over and everything before it has long happened.
"""

from __future__ import annotations

import time

import torch

Mark = float | torch.cuda.Event


class Clock:
    """Marks of one device."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device.startswith("cuda")

    def mark(self) -> Mark:
        """Now, or on a GPU when it gets here."""
        if not self._on_gpu:
            return time.perf_counter()
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def seconds_between(start: Mark, end: Mark) -> float:
    """Seconds from one mark to another of the same clock. On a GPU both must have been reached, or are waited
    for."""
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
