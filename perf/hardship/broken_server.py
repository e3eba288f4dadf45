"""``haast serve`` with an engine that breaks when it is told to: by the seed of a request that runs.

    BREAK_STEP   the second step that works on the request raises, once: trees are drafted and pages reserved,
                 nothing is scored
    END_THREAD   the engine's thread ends before that step

Everything else is the server that users start: its loop, its routes, its way to end.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn, cast

import uvloop

from engine.build import Served
from engine.cli.loading import open_engine
from engine.cli.parser import Parser
from engine.cli.serve import add_arguments, server_options
from engine.core import Batch, Delta, DraftTree, Request
from engine.decoding import Decoding
from engine.server.lifecycle import serve
from engine.step import Engine

BREAK_STEP: Final = 7_000_001
END_THREAD: Final = 7_000_002


class BrokenEngine:
    """An engine, but for what those two seeds do to its steps (``runner.SteppingEngine``)."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._faults: dict[int, Callable[[], None]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def add(self, request: Request) -> None:
        self._engine.add(request)
        fault = {BREAK_STEP: self._break_step, END_THREAD: self._end_thread}.get(request.sampling.seed)
        if fault is not None:
            self._faults[request.id] = fault

    def step(self) -> list[Delta]:
        for seq in self._engine.scheduler.running:
            fault = self._faults.pop(seq.request.id, None)
            if fault is not None:
                fault()
        return self._engine.step()

    def _break_step(self) -> None:
        decoding = self._engine.decoding

        def breaks(batches: Sequence[Batch], trees: Sequence[DraftTree]) -> NoReturn:
            self._engine.decoding = decoding
            raise RuntimeError("a step that was told to break")

        self._engine.decoding = cast(Decoding, breaks)

    def _end_thread(self) -> None:
        raise SystemExit("a thread that was told to end")


def main() -> int:
    """Serve until a signal, as ``haast serve`` does. Returns its exit code."""
    parser: argparse.ArgumentParser = Parser(prog="python -m perf.hardship.broken_server")
    add_arguments(parser)
    args = parser.parse_args()
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(levelname)s %(message)s")

    def load() -> Served:
        served = open_engine(args)
        return dataclasses.replace(served, engine=cast(Engine, BrokenEngine(served.engine)))

    return uvloop.run(serve(server_options(args), load, sys.stdin.fileno()))


if __name__ == "__main__":
    sys.exit(main())
