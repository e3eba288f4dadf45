"""Every registered operation against its reference: tiny shapes in Triton's interpreter, real ones on a GPU.

Triton reads TRITON_INTERPRET when a kernel is decorated, so the tiny shapes run in a process of their own,
one for all of them; what it found comes back by case. Memory that an operation allocates is filled with NaN
first, so that a row it forgets shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.ops import OPERATIONS, Case, Operation
from tests.kernels.agreement import disagreement, poisoned

TINY = [(operation, case) for operation in OPERATIONS for case in operation.tiny]
REAL = [(operation, case) for operation in OPERATIONS for case in operation.real]


def name_of(operation: Operation, case: Case) -> str:
    return f"{operation.name} {case.name}"


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What is wrong with each tiny case, empty where nothing is."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.agreement"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(("operation", "case"), TINY, ids=[name_of(*pair) for pair in TINY])
def test_in_the_interpreter(operation: Operation, case: Case, interpreted: dict[str, str]) -> None:
    assert interpreted[name_of(operation, case)] == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("operation", "case"), REAL, ids=[name_of(*pair) for pair in REAL])
def test_on_a_gpu(operation: Operation, case: Case, seed: int) -> None:
    assert disagreement(operation, case, "cuda", seed) == ""


def test_memory_is_poisoned_whatever_runs_on_it() -> None:
    """Among a kernel's own operations are torch's, and some of those are never deterministic."""
    with poisoned():
        fresh = torch.empty(3)
        found = torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))
    assert bool(fresh.isnan().all())
    assert found.tolist() == [0.0, 1.0, 0.0]
    assert not torch.are_deterministic_algorithms_enabled()


def test_names_are_unique() -> None:
    for pairs in (TINY, REAL):
        names = [name_of(*pair) for pair in pairs]
        assert len(set(names)) == len(names)
