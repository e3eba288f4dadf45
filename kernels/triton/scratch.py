"""Counters by which the programs of a launch tell who of them is the last."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_MOST = 1 << 14


@functools.cache
def _zeros(device: torch.device) -> Tensor:
    return torch.zeros(_MOST, dtype=torch.int32, device=device)


def counters(device: torch.device, num: int) -> Tensor:
    """At least ``num`` zeros [.] int32. Whoever counts with them leaves them at zero.

    One buffer for all operations of a device: launches on one stream follow one another. Two streams must
    not run operations that count at the same time.
    """
    assert num <= _MOST, f"{num} counters"
    return torch.empty(num, dtype=torch.int32, device=device) if device.type == "meta" else _zeros(device)
