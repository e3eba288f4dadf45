"""Compile kernels for a GPU that is not there.

Triton asks a *driver* which GPU it compiles for, and hands it the binary to load and launch. The driver here
names any GPU, takes note of every binary it is given, and launches nothing: so the ordinary functions of this
package, called with tensors on the device ``meta``, compile exactly what they would launch.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_THREADS = 1024  # that a block may have
SHARED_MEMORY = 227 * 1024  # bytes that a block may have, on sm_90 and sm_100

# In machine code. Products of a whole warp group: wgmma of sm_90 (HGMMA, QGMMA for FP8), tcgen05 of sm_100.
_WARP_GROUP = re.compile(r"\b(?:HGMMA|QGMMA|UTC[A-Z]*MMA)\b")
_SPILL = re.compile(r"\b(?:STL|LDL)\b")
_WAIT = re.compile(r"\bACQBULK\b")  # griddepcontrol.wait
_WRITE = re.compile(r"\b(?:STG?|ATOMG?|REDG?)\b")  # to memory that other kernels see


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel as it would have been launched. shared: bytes; dependent: before the one before it has ended
    (``kernels.triton.pdl``)."""

    kernel: str
    code: bytes
    shared: int
    dependent: bool


@dataclass(frozen=True, slots=True)
class Binary:
    """One compiled kernel and what a compiler's report says of it. Bytes are per thread but for ``shared``,
    which is per block. waits: for the kernel before; writes_early: before that, or without."""

    kernel: str
    registers: int
    stack: int
    spilled: int  # loads and stores of registers that did not fit, as instructions
    shared: int
    uses_warp_groups: bool
    waits: bool = False
    writes_early: bool = True


@dataclass(slots=True)
class _Utilities:
    loaded: list[Launch] = field(default_factory=list)
    dependent: bool = False  # what is loaded next

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": 132}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        self.loaded.append(Launch(name, binary, shared, self.dependent))
        return None, None, 0, 0, _THREADS  # without a module, a kernel is loaded again at its next launch


class _Driver:
    """As much of a driver as launching a kernel asks for."""

    def __init__(self, arch: int) -> None:
        self._arch = arch
        self.utils = _Utilities()

    def get_current_device(self) -> int:
        return self._arch  # whatever names a device: what was compiled is kept by it

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self._arch, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        self.utils.dependent = metadata.launch_pdl  # asked for just before the kernel is loaded
        return lambda *arguments: None


@contextlib.contextmanager
def compiling_for(arch: int) -> Iterator[list[Launch]]:
    """Kernels called meanwhile are compiled for sm_``arch`` (90, 100) and not run. Yields the list of their
    launches."""
    stand_in = _Driver(arch)
    driver.set_active(stand_in)
    try:
        yield stand_in.utils.loaded
    finally:
        driver._active = None


def inspect(launch: Launch) -> Binary:
    """What a kernel's binary uses, by the tools that come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(launch.code)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", "-ndf", file.name)  # without dataflow analysis, which takes long
    numbers = {key: int(value) for key, value in re.findall(r"\b([A-Z]+(?:\[\d\])?):(\d+)", usage)}
    wait, write = _WAIT.search(code), _WRITE.search(code)
    return Binary(
        launch.kernel,
        numbers["REG"],
        numbers["STACK"],
        len(_SPILL.findall(code)),
        launch.shared,
        _WARP_GROUP.search(code) is not None,
        wait is not None,
        write is not None and (wait is None or write.start() < wait.start()),
    )


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True)
    return done.stdout
