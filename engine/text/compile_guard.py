"""Grammars are compiled first where they can do no harm: in a process with bounded time and memory.

The compiler counts its own work and gives up in milliseconds on nearly everything that explodes, but not on
all: a string with a dozen ``pattern``s in an ``allOf`` keeps it busy for ever, and native code on a thread
cannot be stopped. A process can, and the kernel does it: past its share of processor time or of address space
it dies, which is the answer. Processor time, because a busy machine must not make a good grammar bad.

The process is this file, run alone: it reads one JSON object a line from its standard input and answers each
with one. It starts with the first grammar and stays.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Final

MOST_SECONDS: Final = 2.0  # of processor time for one grammar
MOST_MEMORY: Final = 2 << 30  # bytes of address space


class CompileGuard:
    """Tries grammars out. Safe to share between threads: they take turns."""

    def __init__(self, most_seconds: float = MOST_SECONDS) -> None:
        self._most_seconds = most_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def complaint(self, source: str) -> str:
        """Why a grammar in llguidance's form cannot be compiled; empty if it can."""
        with self._lock:
            process = self._process = self._process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps({"grammar": source}) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            if answer:
                complaint: str = json.loads(answer)["complaint"]
                return complaint
            self._process = None
            _end(process)
            return (
                f"it takes more than {self._most_seconds:g} s of processor time or {MOST_MEMORY >> 30} GiB "
                "to compile"
            )

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__)), str(self._most_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        weakref.finalize(self, _end, process)
        return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()  # closes the pipes and reaps it


def serve(most_seconds: float) -> None:
    """What the process does until its input ends."""
    import resource
    import signal

    from llguidance import LLMatcher, LLParserLimits

    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limits = LLParserLimits(verbose_errors=False)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, most_seconds)  # SIGPROF ends a process that does not expect it
        complaint = LLMatcher.validate_grammar(json.loads(line)["grammar"], None, limits=limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps({"complaint": complaint}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve(float(sys.argv[1]))
