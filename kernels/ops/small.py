"""The small operations around attention and experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import ref
from kernels.ops.base import BFLOAT16, FLOAT32, Arguments, Case, Cost, Operation, Source, size_of

_HIDDEN = 4096  # of Mistral Small 4
_EPS = 1e-6


def _norm(source: Source, num_rows: int, width: int, dtype: torch.dtype, adds: bool) -> Arguments:
    x = source.normal(num_rows, width, dtype=dtype)
    weight = source.normal(width, dtype=dtype)
    return (x, source.normal(num_rows, width, dtype=dtype), weight, _EPS) if adds else (x, weight, _EPS)


def _norm_cases(adds: bool) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    def case(num_rows: int, width: int, dtype: torch.dtype) -> Case:
        tolerance = FLOAT32 if dtype == torch.float32 else BFLOAT16
        return Case(
            f"{num_rows}x{width}", lambda source: _norm(source, num_rows, width, dtype, adds), tolerance
        )

    tiny = case(3, 40, torch.float32), case(1, 64, torch.float32)
    return tiny, tuple(case(rows, _HIDDEN, torch.bfloat16) for rows in (1, 4, 8, 64))


def _norm_cost(*arguments: Any) -> Cost:
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    return Cost(size_of(*tensors) + size_of(*tensors[:-1]))  # everything but the weight is written as well


OPERATIONS = (
    Operation("rms_norm", ref.rms_norm, "norm:rms_norm", *_norm_cases(adds=False), _norm_cost),
    Operation("add_rms_norm", ref.add_rms_norm, "norm:add_rms_norm", *_norm_cases(adds=True), _norm_cost),
)
