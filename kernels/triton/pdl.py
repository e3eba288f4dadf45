"""Programmatic dependent launch: a kernel begins while the one before it still runs, and waits inside.

    A   | .. work ............ |
    B          | fetch | wait  | work ............ |
    C                | fetch | wait .............. | work ..

A kernel releases the next one (``release``) when all of its own programs are there: the next then takes what
room they leave, fetches weights that it will multiply, which no kernel of a step writes, into the L2 cache,
and waits (``wait``) for the end of the one before.

The rule that keeps this right: every kernel launched so waits, in every program, before it reads what any
earlier kernel may have written, and before it writes anything. So its end comes after the end of the kernel
before it, and by that after the end of all before: C may begin while A still runs, if B released it early,
but C waits for B, and B has waited for A. A kernel that did not wait would break the chain for all behind
it. Kernels that know nothing of this (torch's) are launched as ever, after the end of everything before.

(What is read earlier only to guess what to fetch is no such read: the guess may be wrong.)

Releasing is safe at any time, for whoever is released waits. It costs room on a processor, so it comes once a
program of the kernel itself has that.

The interpreter knows none of this; there, and wherever launches are ordinary, ``dependent`` is false, and a
kernel is what it would be without these calls.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.launches import are_dependent
from kernels.triton.host import INTERPRETED

# What a program fetches ahead: enough for the microseconds between two kernels, and, times the programs that
# a GPU holds at once, a fraction of its L2 cache.
_AHEAD = tl.constexpr(32 * 1024)  # bytes
_LINE = tl.constexpr(128)  # bytes, of the L2 cache


@triton.jit
def release(dependent: tl.constexpr) -> None:
    """Let the next kernel begin, once all programs of this one have called this or ended."""
    if dependent:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(dependent: tl.constexpr) -> None:
    """Wait until the kernel before has ended, and all that it has written can be read."""
    if dependent:
        tl.extra.cuda.gdc_wait()


@triton.jit
def fetch_rows(first: tl.tensor, num_bytes: tl.tensor, num_rows: tl.constexpr) -> None:
    """Have the L2 cache fetch the first bytes of some rows. first: [num_rows] pointers; num_bytes: of each
    row, the most that is fetched."""
    lines: tl.constexpr = max(_AHEAD // _LINE // num_rows, 1)
    byte = tl.minimum(tl.arange(0, lines) * _LINE, num_bytes - 1)
    address = first.to(tl.int64)[:, None] + byte[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


def launch() -> dict[str, bool]:
    """Arguments of a kernel's launch that say how it is to be launched."""
    if not are_dependent():
        return {}
    assert not INTERPRETED, "the interpreter launches nothing"
    return {"dependent": True, "launch_pdl": True}
