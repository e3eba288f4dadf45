"""The engine on a thread of its own, and the bridge between it and the event loop.

Commands go down through a queue on which the idle engine sleeps; deltas come up, one call per step, into one
mailbox per submission. A mailbox that nobody reads merges: its reader takes all that has gathered, so a slow
client gets fewer and larger events, and its memory is bounded by the length of its answer.

Whatever happens, nobody waits for ever: a request that the engine refuses fails alone, a step that raises
fails every request in flight, and from then on new requests are refused (code ``engine_dead``).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from engine.canary import CanaryCounts
from engine.config import EngineConfig
from engine.core import Delta, Request
from engine.errors import CapacityError, EngineError, RequestError
from engine.server.metrics import StampedDelta

log = logging.getLogger(__name__)

STALLED_AFTER = 300.0  # seconds in one step after which the engine counts as stuck


class SteppingEngine(Protocol):
    """What the runner needs of ``engine.step.Engine``; only the engine thread calls it."""

    @property
    def config(self) -> EngineConfig: ...
    @property
    def has_work(self) -> bool: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    def kv_usage(self) -> float: ...
    def prefix_counts(self) -> tuple[int, int]: ...
    def canary_counts(self) -> CanaryCounts: ...
    def vocab_coverage(self) -> float | None: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: int) -> None: ...
    def step(self) -> list[Delta]: ...


class EngineFailedError(EngineError):
    """The engine broke while it worked on the request: our bug (HTTP 500)."""

    code = "engine_failed"


class Ticket:
    """The event loop's end of one submission: one request, or several that are answered together."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.unfinished = {request.id for request in requests}
        self._pending: list[StampedDelta] = []
        self._error: EngineError | None = None
        self._accepted = False
        self._news = asyncio.Event()

    async def accepted(self) -> None:
        """Wait until the engine took the requests; raises the EngineError with which it refused them."""
        while not self._accepted:
            if self._error is not None:
                raise self._error
            await self._wait(None)

    async def next(self, timeout: float | None = None) -> list[StampedDelta]:
        """All deltas since the last call, oldest first; an empty list after ``timeout`` seconds of silence.

        Raises the EngineError that ended the submission, once what came before it has been read.
        """
        if not self._pending and self._error is None:
            await self._wait(timeout)
        if not self._pending and self._error is not None:
            raise self._error
        pending, self._pending = self._pending, []
        return pending

    def accept(self) -> None:
        self._accepted = True
        self._news.set()

    def put(self, stamped: StampedDelta) -> None:
        self._pending.append(stamped)
        if stamped.delta.finish_reason is not None:
            self.unfinished.discard(stamped.delta.request_id)
        self._news.set()

    def fail(self, error: EngineError) -> None:
        self._error = error
        self._news.set()

    async def _wait(self, timeout: float | None) -> None:
        """Wait for something new. Callers have just looked and found nothing, so what the event still says is
        old: news that were read without waiting."""
        self._news.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._news.wait()


@dataclass(frozen=True, slots=True)
class _Add:
    ticket: Ticket
    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class _Abort:
    request_ids: tuple[int, ...]


@dataclass(slots=True)
class Totals:
    """Counters since the start, for the log."""

    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_spec_steps: int = 0
    num_accepted: int = 0
    num_unknown_fields: int = 0  # of request bodies


class EngineRunner:
    """Owns the engine thread. All methods belong to the event loop's thread.

    At most ``max_num_seqs`` running plus ``max_num_queued`` waiting requests are admitted at once.
    """

    def __init__(self, engine: SteppingEngine, max_num_queued: int = 128) -> None:
        self.engine = engine
        self.capacity = engine.config.max_num_seqs + max_num_queued
        self.in_flight = 0
        self.totals = Totals()
        self.failure: str | None = None
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        self._tickets: dict[int, Ticket] = {}
        self._ids = itertools.count(1)
        self._commands: queue.SimpleQueue[_Add | _Abort | None] = queue.SimpleQueue()
        self._step_started: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- the event loop's side ------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    async def stop(self, timeout: float = 10.0) -> None:
        """End the engine thread after its current step; what is still in flight fails with
        ``shutting_down``."""
        self.abort_all()
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, timeout)
        if self._thread.is_alive():
            log.error("the engine thread did not end within %.0f s", timeout)

    @property
    def is_stalled(self) -> bool:
        """Whether the current step has taken implausibly long."""
        started = self._step_started
        return started is not None and time.perf_counter() - started > STALLED_AFTER

    def new_id(self) -> int:
        """A request id that was never used."""
        return next(self._ids)

    @contextmanager
    def admit(self, count: int = 1) -> Iterator[None]:
        """Hold ``count`` places, one per answer, from before tokenising until the answer is out.

        Raises CapacityError if they are taken or the engine is dead, RequestError if there never are as many.
        """
        self._check_alive()
        if count > self.capacity:
            raise RequestError(
                f"found {count} answers to give (prompts times n), but this server admits at most "
                f"{self.capacity} at once (--max-num-seqs plus --max-num-queued-reqs); ask for fewer",
                "prompt",
            )
        if self.in_flight + count > self.capacity:
            raise CapacityError(
                f"the queue is full: {self.in_flight} requests in flight, at most {self.capacity} admitted"
            )
        self.in_flight += count
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= count
            if self.in_flight == 0:
                self._idle.set()

    async def idle(self) -> None:
        """Wait until no admitted request is left."""
        await self._idle.wait()

    async def submit(self, requests: Sequence[Request]) -> Ticket:
        """Hand requests with new ids to the engine and wait until it took all of them (at most a step).

        Raises the EngineError with which it refused one, in which case none of them runs. The caller must
        ``release`` the ticket.
        """
        self._check_alive()
        ticket = Ticket(requests)
        self._tickets.update((request.id, ticket) for request in requests)
        self._commands.put(_Add(ticket, tuple(requests)))
        try:
            await ticket.accepted()
        except BaseException:  # refused, or the client left meanwhile: undo, then tell the caller
            self.release(ticket)
            raise
        self.totals.num_prompt_tokens += sum(len(request.prompt) for request in requests)
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Forget a submission; what is unfinished is aborted before the next step."""
        self.abort(ticket, tuple(ticket.unfinished))

    def abort(self, ticket: Ticket, request_ids: Sequence[int]) -> None:
        """End some requests of a submission; nothing more of them is delivered."""
        running = tuple(request_id for request_id in request_ids if self._tickets.pop(request_id, None))
        ticket.unfinished.difference_update(request_ids)
        if running:
            self._commands.put(_Abort(running))

    def abort_all(self) -> None:
        """Fail everything in flight because the server stops."""
        for ticket in set(self._tickets.values()):
            self.release(ticket)
            ticket.fail(CapacityError("the server is shutting down", "shutting_down"))

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise CapacityError(f"the engine is dead: {self.failure}", "engine_dead")

    def _deliver(self, deltas: list[Delta], started: float, ended: float) -> None:
        for delta in deltas:
            self.totals.num_generated_tokens += len(delta.token_ids)
            self.totals.num_spec_steps += delta.num_draft_tokens > 0
            self.totals.num_accepted += delta.num_accepted
            ticket = self._tickets.get(delta.request_id)
            if ticket is None:
                continue  # released while its last step ran
            if delta.finish_reason is not None:
                del self._tickets[delta.request_id]
            ticket.put(StampedDelta(delta, started, ended))

    def _fail_all(self, failure: str) -> None:
        self.failure = failure
        for ticket in set(self._tickets.values()):
            ticket.fail(EngineFailedError(f"the engine failed: {failure}"))
        self._tickets.clear()

    # --- the engine's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._obey():
                if self.engine.has_work:
                    self._step()
        except Exception as error:
            log.exception(
                "the engine failed: all requests in flight end with an error, new ones get 503 until the "
                "server is restarted"
            )
            self._post(self._fail_all, type(error).__name__)
        finally:
            self._step_started = None

    def _step(self) -> None:
        self._step_started = started = time.perf_counter()
        deltas = self.engine.step()
        self._step_started = None
        if deltas:
            self._post(self._deliver, deltas, started, time.perf_counter())

    def _obey(self) -> bool:
        """Carry out all commands; sleeps for one while there is nothing to do. False means to end."""
        try:
            command = self._commands.get(block=not self.engine.has_work)
            while command is not None:
                if isinstance(command, _Add):
                    self._add(command)
                else:
                    for request_id in command.request_ids:
                        self.engine.abort(request_id)
                command = self._commands.get(block=not self.engine.has_work)
        except queue.Empty:
            return True
        return False

    def _add(self, command: _Add) -> None:
        for count, request in enumerate(command.requests):
            try:
                self.engine.add(request)
            except EngineError as error:
                for earlier in command.requests[:count]:
                    self.engine.abort(earlier.id)
                self._post(command.ticket.fail, error)
                return
        self._post(command.ticket.accept)

    def _post(self, call: Callable[..., None], *args: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: a step outlived the wait for its end
            self._loop.call_soon_threadsafe(call, *args)
