"""perf.kernels without a GPU: what must be moved is counted right, and the program runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.ops import OPERATIONS, Case, Operation, Source
from kernels.ops.products import weight
from kernels.stored import product
from perf import kernels as program
from perf.kernel_peers import TORCH, dense
from perf.kernel_timing import waits


def test_an_expert_counts_once_and_only_if_it_is_used() -> None:
    """One token, five experts of 4096 x 4096 bytes each, its scales, its input and five halves of output."""
    rows = list(
        program.floors(
            program.chosen(["gate_up"])[0], real("gate_up", "fp8, 1 tokens"), program.datasheet("H200")
        )
    )
    experts = 5 * (4096 * 4096 + 2 * 4)
    assert rows[0]["bytes"] == experts + 4096 * 2 + 5 * 2048 * 2
    assert rows[0]["flops"] == 2 * 5 * 4096 * 4096
    assert rows[0]["floor_us"] == pytest.approx(rows[0]["bytes"] / 4.8e6, rel=1e-3)


def test_many_tokens_are_bound_by_their_arithmetic() -> None:
    limits = program.datasheet("H200")
    assert limits.seconds(1, int(2e15), fp8=False) == pytest.approx(2e15 / 0.99e15)
    assert limits.seconds(1, int(2e15), fp8=True) == pytest.approx(2e15 / 1.98e15)


def real(name: str, case: str) -> list[Case]:
    operation = program.chosen([name])[0]
    return [one for one in operation.real if one.name == case]


@pytest.mark.parametrize("kind", ["plain", "fp8", "nvfp4"])
def test_a_dense_copy_is_the_same_matrix(kind: str) -> None:
    stored = weight(Source("cpu"), kind, 32, 64, groups=2)
    torch.testing.assert_close(
        dense(stored).float(), product(torch.eye(64), stored).t(), rtol=1e-2, atol=1e-3
    )


ATTENTION = [
    (operation, case) for operation in OPERATIONS if "attention" in operation.name for case in operation.tiny
]


@pytest.mark.parametrize(
    ("operation", "case"), ATTENTION, ids=[f"{operation.name} {case.name}" for operation, case in ATTENTION]
)
def test_torchs_attention_attends_alike(operation: Operation, case: Case) -> None:
    given = case.make(Source("cpu"))
    call = TORCH[operation.name](*given)
    assert call is not None
    torch.testing.assert_close(call(), operation.reference(*given), rtol=1e-4, atol=1e-4)


def test_a_kernel_that_fails_takes_no_figures_along(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "")  # the program sets it, for good

    def measured(operation: Operation, case: Case, *rest: object) -> dict[str, Any]:
        if operation.name == "rms_norm":
            raise RuntimeError("an illegal memory access\nwas encountered")
        return {"operation": operation.name, "case": case.name, "correct": True}

    monkeypatch.setattr(program, "measured", measured)
    assert program.main(["--dry-run", "rms_norm", "best"]) == 1
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {row["operation"]: row["correct"] for row in rows} == {"rms_norm": False, "best": True}
    assert rows[0]["error"] == "RuntimeError: an illegal memory access was encountered"


@pytest.mark.parametrize("error", [None, RuntimeError("called a synchronizing CUDA operation")])
def test_what_waits_for_a_gpu_is_known_before_it_is_captured(
    error: RuntimeError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int | str] = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call() -> None:
        assert modes[-1] == "error"
        if error is not None:
            raise error

    assert waits(call) == (error is not None)
    assert modes == [0, "error", 0]


def test_the_program_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--floor", "--cases", "1 tokens", "--json", str(tmp_path / "floor.json")]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((tmp_path / "floor.json").read_text())
    assert {row["operation"] for row in printed["rows"]} >= {"gate_up", "down"}
    assert program.main(["nothing"]) == 1
    assert f"expected some of {OPERATIONS[0].name}" in capsys.readouterr().err
    assert program.main(["--floor", "--gpu", "abacus"]) == 1
    assert "expected one of H100, H200, B200" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_measuring_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_a_dry_run_checks_and_times_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "perf.kernels", "--dry-run", "linear", "--cases", "plain, 1"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert row["correct"] is True
    assert row["us"] > 0
    assert row["torch_us"] > 0
