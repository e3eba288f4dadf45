"""Whether a kernel agrees with its reference on a case; as a program, of every tiny case, in JSON."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.ops import OPERATIONS, Case, Operation, Source


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch allocates meanwhile is filled with NaN, or the largest integer.

    It is when algorithms are to be deterministic. Those of torch that are not, as sums along the rows on a
    GPU, are used all the same.
    """
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.set_deterministic_debug_mode(before)


def disagreement(operation: Operation, case: Case, device: str, seed: int = 0) -> str:
    """What is wrong, or an empty string. Both run on the device; each gets its own, equal arguments."""
    kernel = operation.load()
    expected = _run(operation.reference, operation, case.make(Source(device, seed)))
    arguments = case.make(Source(device, seed))
    with poisoned():
        found = _run(kernel, operation, arguments)
    if len(found) != len(expected):
        return f"{len(found)} results, expected {len(expected)}"
    try:
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(
                _plain(one), _plain(other), atol=case.tolerance.atol, rtol=case.tolerance.rtol
            )
            assert one.dtype == other.dtype, f"{one.dtype}, expected {other.dtype}"
    except AssertionError as error:
        return str(error)
    return ""


def _run(function: Any, operation: Operation, arguments: tuple[Any, ...]) -> list[Tensor]:
    """What a function returns, then what it changes."""
    returned = function(*arguments)
    results = [returned] if isinstance(returned, Tensor) else list(returned or ())
    return results + [arguments[index] for index in operation.changes]


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for operation in OPERATIONS:
        for case in operation.tiny:
            try:
                wrong = disagreement(operation, case, "cpu")
            except Exception:  # noqa: BLE001 - whatever it is, it is this case's result
                wrong = traceback.format_exc()
            found[f"{operation.name} {case.name}"] = wrong
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
