"""Compile every registered kernel at every real shape for GPUs that are not here: ``python -m perf.compile``.

What a compiler says of a kernel needs no GPU: registers, stack, shared memory, and whether its matrix
products run on a warp group's unit. Fails, naming the kernel, where registers were spilled, where a block
takes more shared memory than a processor has, and where an operation's matrix unit is gone.

The first shape of every operation is built once more for dependent launches (``kernels.triton.pdl``), with
``--pdl`` all shapes are: there a kernel fails that does not wait for the one before, or writes before it has.
Triton keeps what it has compiled in its own cache ($TRITON_CACHE_DIR).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kernels.launches import dependent_launches
from kernels.ops import OPERATIONS, Case, Operation, Source
from kernels.triton.host import INTERPRETED
from kernels.triton.offline import SHARED_MEMORY, Binary, Launch, compiling_for, inspect

ARCHITECTURES = (90, 100)


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel of one operation, and where it was first met."""

    operation: str
    case: str
    dependent: bool
    binary: Binary
    complaints: tuple[str, ...]


def complaints(binary: Binary, case: Case, dependent: bool = False) -> tuple[str, ...]:
    """What is wrong with a kernel compiled for a case. dependent: it is launched so."""
    found = []
    if binary.spilled:
        found.append(f"{binary.spilled} instructions move spilled registers")
    if binary.shared > SHARED_MEMORY:
        found.append(f"{binary.shared} bytes of shared memory, expected at most {SHARED_MEMORY}")
    if binary.kernel in case.wgmma and not binary.uses_warp_groups:
        found.append("no product on a warp group's matrix unit")
    if dependent and not binary.waits:
        found.append("launched dependently, and does not wait for the kernel before")
    if dependent and binary.writes_early:
        found.append("launched dependently, and writes before it waits")
    if not dependent and binary.waits:
        found.append("launched ordinarily, and waits for the kernel before all the same")
    return tuple(found)


def compiled(arch: int, operations: Sequence[Operation], pdl: bool = False) -> Iterator[Compiled]:
    """Every kernel that the real shapes of the operations launch, each build of it once. pdl: all of them for
    dependent launches, instead of the first."""
    known: dict[str, Binary] = {}
    for operation in operations:
        ordinary, dependent = ((), operation.real) if pdl else (operation.real, operation.real[:1])
        for case, launch in _launches(arch, operation, ordinary, dependent):
            key = f"{launch.kernel} {hashlib.sha256(launch.code).hexdigest()}"
            is_new = key not in known
            if is_new:
                known[key] = inspect(launch)
            wrong = complaints(known[key], case, launch.dependent)
            if is_new or wrong:
                yield Compiled(operation.name, case.name, launch.dependent, known[key], wrong)


def _launches(
    arch: int, operation: Operation, ordinary: Sequence[Case], dependent: Sequence[Case]
) -> Iterator[tuple[Case, Launch]]:
    """What an operation launches for cases of both kinds."""
    function = operation.load()
    for on, cases in ((False, ordinary), (True, dependent)):
        for case in cases:
            with compiling_for(arch) as launches, dependent_launches(on):
                function(*case.make(Source("meta")))
            for launch in launches:
                yield case, launch


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--pdl", action="store_true", help="all shapes for dependent launches, and no others")
    options = parser.parse_args()
    if INTERPRETED:
        sys.stderr.write("TRITON_INTERPRET is set, and the interpreter compiles nothing\n")
        return 2
    chosen = [operation for operation in OPERATIONS if options.only in operation.name]
    failed = 0
    for arch in options.arch:
        for one in compiled(arch, chosen, options.pdl):
            failed += bool(one.complaints)
            sys.stdout.write(_line(arch, one) + os.linesep)
            sys.stdout.flush()
    return 1 if failed else 0


def _line(arch: int, one: Compiled) -> str:
    binary = one.binary
    facts = (
        f"{binary.registers:>4} registers {binary.stack:>4} B stack {binary.shared / 1024:>6.1f} KB shared"
    )
    unit = "warp group" if binary.uses_warp_groups else ""
    case = one.case + (", pdl" if one.dependent else "")
    wrong = f"  FAILED: {'; '.join(one.complaints)}" if one.complaints else ""
    return f"sm_{arch:<4}{one.operation:<20}{case:<34}{binary.kernel:<18}{facts}  {unit}{wrong}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
