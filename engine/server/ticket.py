"""A submission's mailbox: the engine's thread reports into it (through the event loop), its handler reads it.

A mailbox that nobody reads merges: its reader takes all that has gathered, so a slow client gets fewer and
larger events, and its memory is bounded by the length of its answer.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from contextlib import suppress

from engine.core import Request
from engine.errors import EngineError
from engine.server.metrics import StampedDelta


class EngineFailedError(EngineError):
    """The engine broke while it worked on the request: our bug (HTTP 500)."""

    code = "engine_failed"

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class Ticket:
    """The event loop's end of one submission: one request, or several that are answered together."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.unfinished = {request.id for request in requests}
        self.error: EngineError | None = None  # what ended the submission
        self._pending: list[StampedDelta] = []
        self._accepted = False
        self._news = asyncio.Event()

    async def accepted(self) -> None:
        """Wait until the engine took the requests; raises the EngineError with which it refused them."""
        while not self._accepted:
            if self.error is not None:
                raise self.error
            await self._wait(None)

    async def next(self, timeout: float | None = None) -> list[StampedDelta]:
        """All deltas since the last call, oldest first; an empty list after ``timeout`` seconds of silence.

        Raises the EngineError that ended the submission, once what came before it has been read.
        """
        if not self._pending and self.error is None:
            await self._wait(timeout)
        if not self._pending and self.error is not None:
            raise self.error
        pending, self._pending = self._pending, []
        return pending

    def accept(self) -> None:
        self._accepted = True
        self._news.set()

    def put(self, stamped: StampedDelta) -> None:
        """One step's news of one request. One that failed fails the submission, behind its last tokens."""
        delta = stamped.delta
        if delta.finish_reason is not None:
            self.unfinished.discard(delta.request_id)
        if delta.error is not None:
            stamped = dataclasses.replace(stamped, delta=dataclasses.replace(delta, finish_reason=None))
            self.error = EngineFailedError(f"the request failed: {delta.error}", "request_failed")
        self._pending.append(stamped)
        self._news.set()

    def fail(self, error: EngineError) -> None:
        self.error = error
        self._news.set()

    async def _wait(self, timeout: float | None) -> None:
        """Wait for something new. Callers have just looked and found nothing, so what the event still says is
        old: news that were read without waiting."""
        self._news.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._news.wait()
