"""Dependent launches without a GPU: who asks for them, and what a compiler makes of kernels that wait.

``perf.compile`` looks at every operation in the same way; here are those that are compiled quickly.
"""

from __future__ import annotations

import contextlib
import threading

import pytest

pytest.importorskip("triton")

from kernels import can_be_dependent, dependent_launches
from kernels.launches import are_dependent
from kernels.ops import FLOAT32, OPERATIONS, Case, Source
from kernels.triton.offline import Binary, compiling_for, inspect
from perf.compile import complaints

NAMED = {operation.name: operation for operation in OPERATIONS}
QUICK = ("silu_mul", "absorb_queries", "linear")


def test_the_switch_is_off_and_is_put_back() -> None:
    assert not are_dependent()
    with dependent_launches():
        with dependent_launches(False):
            assert not are_dependent()
        assert are_dependent()
    with contextlib.suppress(KeyError), dependent_launches():
        raise KeyError
    assert not are_dependent()


def test_the_switch_is_the_threads_own() -> None:
    """One thread captures while another one launches something else."""
    seen: list[bool] = []
    with dependent_launches():
        other = threading.Thread(target=lambda: seen.append(are_dependent()))
        other.start()
        other.join()
    assert seen == [False]


def test_a_cpu_launches_nothing() -> None:
    assert not can_be_dependent("cpu")


@pytest.mark.parametrize("name", QUICK)
def test_a_kernel_waits_where_it_is_launched_dependently_and_nowhere_else(name: str) -> None:
    case = NAMED[name].real[0]
    for dependent in (False, True):
        with compiling_for(90) as launches, dependent_launches(dependent):
            NAMED[name].load()(*case.make(Source("meta")))
        assert launches
        for launch in launches:
            assert launch.dependent == dependent
            binary = inspect(launch)
            assert binary.waits == dependent
            assert binary.writes_early != dependent
            assert complaints(binary, case, dependent) == ()


@pytest.mark.parametrize(
    ("waits", "writes_early", "dependent", "said"),
    [
        (True, False, True, []),
        (False, True, False, []),
        (False, False, True, ["launched dependently, and does not wait for the kernel before"]),
        (True, True, True, ["launched dependently, and writes before it waits"]),
        (True, False, False, ["launched ordinarily, and waits for the kernel before all the same"]),
    ],
)
def test_complaints_of_a_broken_chain(
    waits: bool, writes_early: bool, dependent: bool, said: list[str]
) -> None:
    binary = Binary("_any", 100, 0, 0, 0, False, waits, writes_early)
    assert list(complaints(binary, Case("any", lambda source: (), FLOAT32), dependent)) == said
