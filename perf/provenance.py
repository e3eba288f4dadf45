"""Where a number came from: commit, machine, software, command. Every result file carries this.

Paths of the machine are left out on purpose; what is kept identifies the hardware and the code, not a user's
disk.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from engine.cli.driver import driver_version

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "i8mm", "sve")
ROOT = Path(__file__).parent.parent


def commit() -> str:
    """The checkout's commit, with ``-dirty`` if tracked files differ; "unknown" outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, list[str]]:
    """(model name, those of CPU_FLAGS that it has). Without /proc/cpuinfo: what ``platform`` knows."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                model = value
            elif key in ("flags", "Features"):
                flags = set(value.split())
    return model, [flag for flag in CPU_FLAGS if flag in flags]


def device_name(device: str) -> str:
    """What a reader would call the device: the GPU's or the CPU's model name."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu()[0]


def file_hash(path: Path) -> str:
    """First 16 hex digits of a file's SHA-256: enough to tell two prompt sets apart."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def command(argv: Sequence[str] | None = None) -> str:
    """The command line, the program without its directory."""
    program, *arguments = sys.argv if argv is None else argv
    return " ".join([Path(program).name, *arguments])


def provenance(device: str, dtype: str) -> dict[str, Any]:
    """Keys for a result's JSON object."""
    return {
        "device": device_name(device),
        "device_type": device.partition(":")[0],
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver_version() if device.startswith("cuda") else None,
    } | machine()


def machine() -> dict[str, Any]:
    """The part of it that holds for a program that computes nothing itself."""
    model, flags = cpu()
    return {
        "cpu": model,
        "cpu_flags": flags,
        "python": platform.python_version(),
        "commit": commit(),
        "command": command(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
