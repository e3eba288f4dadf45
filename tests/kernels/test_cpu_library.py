"""The library of compiled CPU kernels: when it is built, when it is loaded, and what runs without it."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels import cpu, cpu_choose, ref
from kernels import dispatch as ops
from tests.kernels.compiled import needs_compiler, normal


def forget_library() -> None:
    for remembered in (cpu._library, cpu._load, cpu.panel_kernels, cpu_choose.choose_kernel):
        remembered.cache_clear()


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache directory, and no library remembered from before. What is compiled into it need not be
    fast, but soon there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in cpu.FLAGS))
    forget_library()
    yield tmp_path / "haast" / "kernels"
    forget_library()


class TestLibrary:
    def test_is_turned_off_by_the_environment(
        self, fresh_library: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HAAST_CPU_KERNELS", "0")
        assert cpu.kernels_for(torch.float32) is None
        x, weight = normal(1, 2, 16), normal(16, seed=1)
        assert torch.equal(ops.rms_norm(x, weight, 1e-5), ref.rms_norm(x, weight, 1e-5))
        assert not fresh_library.exists()

    @pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "cc 'open quote"])
    def test_without_a_compiler_torch_runs_and_the_log_says_so(
        self,
        compiler: str,
        fresh_library: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setenv("CC", compiler)
        with caplog.at_level(logging.INFO, "haast"):
            assert cpu.kernels_for(torch.float32) is None
        assert "plain torch" in caplog.text
        assert ops.silu_mul(normal(1, 1, 16)).shape == (1, 1, 8)

    def test_a_compiler_may_fail_in_any_language(
        self,
        fresh_library: Path,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        compiler = tmp_path / "compiler"
        compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { printf "\\344rger\\n" >&2; exit 1; }\n')
        compiler.chmod(0o755)
        monkeypatch.setenv("CC", str(compiler))
        with caplog.at_level(logging.INFO, "haast"):
            assert cpu.kernels_for(torch.float32) is None
        assert "rger" in caplog.text

    def test_without_a_home_torch_runs(
        self, fresh_library: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As in a container whose user is a bare number."""

        def unknown(uid: int) -> None:
            raise KeyError(uid)

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr("pwd.getpwuid", unknown)
        with caplog.at_level(logging.INFO, "haast"):
            assert cpu.kernels_for(torch.float32) is None
        assert "plain torch" in caplog.text

    @needs_compiler
    def test_an_empty_choice_of_compiler_is_none(
        self, fresh_library: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CC", "")
        assert cpu.kernels_for(torch.float32) is not None

    @needs_compiler
    @pytest.mark.parametrize(
        ("folder", "mode"), [(".", 0o777), (".", 0o770), ("..", 0o777)], ids=["open", "group", "open parent"]
    )
    def test_nothing_is_loaded_from_where_others_may_write(
        self, folder: str, mode: int, fresh_library: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert cpu.kernels_for(torch.float32) is not None
        forget_library()
        (fresh_library / folder).chmod(mode)
        with caplog.at_level(logging.INFO, "haast"):
            assert cpu.kernels_for(torch.float32) is None
        assert "others may write" in caplog.text

    @needs_compiler
    def test_nothing_is_loaded_from_somebody_elses_directory(
        self, fresh_library: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert cpu.kernels_for(torch.float32) is not None
        forget_library()
        owner = fresh_library.stat().st_uid
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
        if owner == 0:  # what root owns is trusted: give it away
            os.chown(fresh_library, 4711, -1)
        assert cpu.kernels_for(torch.float32) is None

    @needs_compiler
    def test_is_compiled_once_and_found_again(
        self, fresh_library: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert cpu.kernels_for(torch.float32) is not None
        (built,) = fresh_library.iterdir()
        assert stat.S_IMODE(fresh_library.stat().st_mode) == 0o700
        forget_library()
        changed = built.stat().st_mtime_ns
        assert cpu.kernels_for(torch.float32) is not None
        assert [file.stat().st_mtime_ns for file in fresh_library.iterdir()] == [changed]

    @needs_compiler
    def test_one_that_does_not_load_is_compiled_anew(self, fresh_library: Path) -> None:
        """As a crash leaves it before its bytes have reached the disk."""
        built = cpu._compiled()
        built.write_bytes(b"")
        assert cpu.kernels_for(torch.float32) is not None
        assert list(fresh_library.iterdir()) == [built]
        assert built.stat().st_size > 0

    @needs_compiler
    def test_a_changed_source_is_compiled_anew(
        self, fresh_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        assert cpu.kernels_for(torch.float32) is not None
        files = (cpu.SOURCE, *cpu.INCLUDED)
        copies = [tmp_path / file.name for file in files]
        for file, copy in zip(files, copies, strict=True):
            copy.write_text(file.read_text())
        copies[-1].write_text(copies[-1].read_text() + "\n/* more */\n")
        monkeypatch.setattr(cpu, "SOURCE", copies[0])
        monkeypatch.setattr(cpu, "INCLUDED", tuple(copies[1:]))
        forget_library()
        assert cpu.kernels_for(torch.float32) is not None
        assert len(list(fresh_library.iterdir())) == 2

    @needs_compiler
    def test_a_compiler_without_openmp_compiles_the_rest(
        self, fresh_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        compiler = tmp_path / "cc"
        compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec cc "$@"\n')
        compiler.chmod(0o755)
        monkeypatch.setenv("CC", str(compiler))
        assert cpu.kernels_for(torch.float32) is not None
        assert cpu.panel_kernels() is None
        assert not isinstance(ops.pack_half(torch.zeros(8, 8)), cpu.PanelMatrix)

    @needs_compiler
    def test_beside_another_openmp_the_product_is_torchs(
        self, fresh_library: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cpu, "_shares_openmp", lambda: False)
        assert cpu.kernels_for(torch.float32) is not None
        assert cpu.panel_kernels() is None

    def test_a_directory_that_cannot_be_written_means_torch(
        self, fresh_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        file = tmp_path / "file"
        file.write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(file))
        assert cpu.kernels_for(torch.float32) is None
