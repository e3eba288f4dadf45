"""``haast env``: versions and hardware, for a report of a problem. Loads no model and needs no GPU."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from engine.cli.driver import driver_version
from engine.cli.environment import PREFIX
from engine.cli.options import bfloat16_is_fast
from engine.server.version import version
from kernels import kernels_for

_PACKAGES = ("aiohttp", "msgspec", "llguidance", "tokenizers", "mistral-common", "safetensors", "triton")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> int:
    """Print one ``name: value`` a line. Returns 0."""
    sys.stdout.writelines(f"{name}: {value}\n" for name, value in facts())
    return 0


def facts() -> Iterator[tuple[str, str]]:
    """Names and values. Of variables only the names, for their values may be keys."""
    yield "haast", version()
    yield "Python", platform.python_version()
    yield "system", platform.platform()
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    for name in _PACKAGES:
        yield name, _package_version(name)
    yield "CPU", f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"
    yield "CPU kernels", "compiled" if kernels_for(torch.float32) is not None else "plain torch"
    yield "fast bfloat16 on the CPU", "yes" if bfloat16_is_fast("cpu") else "no"
    yield "GPU driver", driver_version() or "none"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size = f"{properties.total_memory / (1 << 30):.1f} GiB"
        yield (
            f"cuda:{index}",
            f"{properties.name}, {size}, compute capability {properties.major}.{properties.minor}",
        )
    yield "variables set", ", ".join(sorted(name for name in os.environ if name.startswith(PREFIX))) or "none"


def _package_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
