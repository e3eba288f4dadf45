"""Kernels compiled for a GPU that is not there, and what is complained about."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from kernels.ops import FLOAT32, OPERATIONS, Case
from kernels.triton.offline import Binary
from perf.compile import compiled, complaints


@pytest.mark.parametrize(
    ("spilled", "shared", "uses_warp_groups", "said"),
    [
        (0, 227 * 1024, True, []),
        (3, 0, True, ["3 instructions move spilled registers"]),
        (0, 227 * 1024 + 1, True, ["232449 bytes of shared memory, expected at most 232448"]),
        (0, 0, False, ["no product on a warp group's matrix unit"]),
    ],
)
def test_complaints(spilled: int, shared: int, uses_warp_groups: bool, said: list[str]) -> None:
    binary = Binary("_attend", 100, 0, spilled, shared, uses_warp_groups)
    case = Case("any", lambda source: (), FLOAT32, wgmma=("_attend",))
    assert list(complaints(binary, case)) == said
    other = Case("any", lambda source: (), FLOAT32, wgmma=("_merge",))
    assert [one for one in complaints(binary, other) if "matrix unit" in one] == []


def test_an_operation_is_compiled_for_a_gpu_that_is_not_there() -> None:
    (norm,) = (operation for operation in OPERATIONS if operation.name == "rms_norm")
    found = list(compiled(90, [norm]))
    assert [one.binary.kernel for one in found] == ["_norm_rows"] * 2  # one build serves every number of rows
    assert [(one.dependent, one.binary.waits) for one in found] == [(False, False), (True, True)]
    for one in found:
        assert 0 < one.binary.registers < 256
        assert one.complaints == ()
        assert not one.binary.uses_warp_groups
