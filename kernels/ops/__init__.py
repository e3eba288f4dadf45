"""Every operation that has a kernel for GPUs: name, reference, kernel, shapes, tolerance, cost.

What reads the registry (tests, ``perf.kernels``, ``perf.compile``) needs no list of its own: an operation
that is registered is tested, timed and compiled.
"""

from __future__ import annotations

from kernels.ops import attention, products, small
from kernels.ops.base import (
    BFLOAT16,
    EXACT,
    FLOAT32,
    Arguments,
    Case,
    Cost,
    Operation,
    Source,
    Tolerance,
    size_of,
)

OPERATIONS: tuple[Operation, ...] = (*attention.OPERATIONS, *products.OPERATIONS, *small.OPERATIONS)

__all__ = [
    "BFLOAT16",
    "EXACT",
    "FLOAT32",
    "OPERATIONS",
    "Arguments",
    "Case",
    "Cost",
    "Operation",
    "Source",
    "Tolerance",
    "size_of",
]
