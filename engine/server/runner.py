"""The engine on a thread of its own, and the bridge between it and the event loop.

Commands go down through a queue on which the idle engine sleeps; deltas come up, one call per step, into one
mailbox per submission (``Ticket``). Nobody but the engine's thread touches the engine: what else is to be
known of it, it lays down as an EngineState.

Whatever happens, nobody waits for ever. A request that the engine refuses, or cannot go on with, fails alone.
A step that raises fails the requests that ran; those that waited go on. If one raises again and again, or
what is left does not add up, the engine is dead: every request in flight fails, new ones are refused (code
``engine_dead``), and whoever waits for ``dead`` hears of it. If a step does not end, the requests in flight
fail too (``engine_stalled``), and new ones are refused until it does.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from engine.canary import CanaryCounts
from engine.config import EngineConfig
from engine.core import Delta, Request
from engine.errors import CapacityError, EngineError, RequestError
from engine.server.metrics import StampedDelta
from engine.server.ticket import EngineFailedError, Ticket
from engine.server.totals import Totals
from engine.server.watchdog import Watchdog

log = logging.getLogger(__name__)

_MOST_FAILURES = 3  # steps that may raise one after another before the engine counts as dead
_STATE_AGE = 0.1  # seconds after which an EngineState is made anew


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
    def fail_running(self, why: str) -> list[Delta]: ...


@dataclass(frozen=True, slots=True)
class _Add:
    ticket: Ticket
    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class _Abort:
    request_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineState:
    """The engine as it was a moment ago: what the event loop may know of it without touching it."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    num_asked: int = 0  # tokens of all prompts
    num_found: int = 0  # of them in the prefix cache
    vocab_coverage: float | None = None
    canary: CanaryCounts = field(default_factory=CanaryCounts)

    @classmethod
    def of(cls, engine: SteppingEngine) -> EngineState:
        return cls(
            engine.num_running,
            engine.num_waiting,
            engine.kv_usage(),
            *engine.prefix_counts(),
            engine.vocab_coverage(),
            dataclasses.replace(engine.canary_counts()),
        )


class EngineRunner:
    """Owns the engine thread. All methods belong to the event loop's thread.

    At most ``max_num_seqs`` running plus ``max_num_queued`` waiting requests are admitted at once. Prompts
    that have not begun may have ``max_queued_tokens`` tokens together; one that comes alone may have more.
    patience: seconds without progress after which the engine counts as stalled; 0 never.
    """

    def __init__(
        self,
        engine: SteppingEngine,
        max_num_queued: int = 128,
        max_queued_tokens: int = 1 << 20,
        patience: float = 0.0,
    ) -> None:
        self.engine = engine
        self.state = EngineState.of(engine)
        self.capacity = engine.config.max_num_seqs + max_num_queued
        self.in_flight = 0
        self.totals = Totals()
        self.failure: str | None = None
        self.dead = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        self._tickets: dict[int, Ticket] = {}
        self._ids = itertools.count(1)
        self._commands: queue.SimpleQueue[_Add | _Abort | None] = queue.SimpleQueue()
        self._max_queued_tokens = max_queued_tokens
        self._queued: dict[int, int] = {}  # tokens of prompts that have not begun, by request
        self._num_beats, self._is_idle, self._num_failures, self._state_at = 0, True, 0, 0.0
        self._watchdog = Watchdog(self._pulse, patience, self._stalled)
        self._watching: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- the event loop's side ------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine thread and its watchdog."""
        self._thread.start()
        self._watching = self._loop.create_task(self._watchdog.run())

    async def stop(self, timeout: float = 10.0) -> bool:
        """End the engine thread after its current step; what is still in flight fails with
        ``shutting_down``. False if it did not end, or had died before."""
        self.abort_all()
        if self._watching is not None:
            self._watching.cancel()
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, timeout)
        if self._thread.is_alive():
            log.error("the engine thread did not end within %.0f s", timeout)
        return self.failure is None and not self._thread.is_alive()

    @property
    def is_stalled(self) -> bool:
        """Whether the engine has work and has made no progress for too long."""
        return self._watchdog.is_stalled

    @property
    def num_queued_tokens(self) -> int:
        """Tokens of prompts that have not begun."""
        return sum(self._queued.values())

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
        num_tokens, num_queued = sum(len(request.prompt) for request in requests), self.num_queued_tokens
        if num_queued and num_queued + num_tokens > self._max_queued_tokens:
            raise CapacityError(
                f"the queue is full: prompts of {num_queued} tokens wait, this one has {num_tokens}, at most "
                f"{self._max_queued_tokens} may wait"
            )
        ticket = Ticket(requests)
        self._tickets.update((request.id, ticket) for request in requests)
        self._queued.update((request.id, len(request.prompt)) for request in requests)
        self._commands.put(_Add(ticket, tuple(requests)))
        try:
            await ticket.accepted()
        except BaseException:  # refused, or the client left meanwhile: undo, then tell the caller
            self.release(ticket)
            raise
        self.totals.num_prompt_tokens += num_tokens
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Forget a submission; what is unfinished is aborted before the next step."""
        self.abort(ticket, tuple(ticket.unfinished))

    def abort(self, ticket: Ticket, request_ids: Sequence[int]) -> None:
        """End some requests of a submission; nothing more of them is delivered."""
        running = tuple(request_id for request_id in request_ids if self._tickets.pop(request_id, None))
        ticket.unfinished.difference_update(request_ids)
        for request_id in request_ids:
            self._queued.pop(request_id, None)
        if running:
            self._commands.put(_Abort(running))

    def abort_all(self) -> None:
        """Fail everything in flight because the server stops."""
        self._end_all(CapacityError("the server is shutting down", "shutting_down"))

    def _end_all(self, error: EngineError) -> None:
        for ticket in set(self._tickets.values()):
            self.release(ticket)
            ticket.fail(error)

    def _pulse(self) -> int | None:
        return None if self._is_idle else self._num_beats

    def _stalled(self) -> None:
        log.error(
            "the engine makes no progress: all requests in flight end with an error, new ones get 503 until "
            "it does"
        )
        self._end_all(EngineFailedError("the engine makes no progress", "engine_stalled"))

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise CapacityError(f"the engine is dead: {self.failure}", "engine_dead")

    def _deliver(self, deltas: list[Delta], started: float, ended: float) -> None:
        for delta in deltas:
            self.totals.add_step(delta)
            self._queued.pop(delta.request_id, None)
            ticket = self._tickets.get(delta.request_id)
            if ticket is None:
                continue  # released while its last step ran
            if delta.finish_reason is not None:
                del self._tickets[delta.request_id]
            ticket.put(StampedDelta(delta, started, ended))

    def _count_failed_step(self) -> None:
        self.totals.num_failed_steps += 1

    def _fail_all(self, failure: str) -> None:
        self.failure = failure
        self.dead.set()
        for ticket in set(self._tickets.values()):
            ticket.fail(EngineFailedError(f"the engine failed: {failure}"))
        self._tickets.clear()
        self._queued.clear()

    # --- the engine's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._obey():
                if self.engine.has_work:
                    self._step()
        except BaseException as error:  # SystemExit too: clients have to hear of whatever ends this thread
            log.exception(
                "the engine failed: all requests in flight end with an error, and new ones get 503 until the "
                "server ends"
            )
            self._post(self._fail_all, type(error).__name__)
        finally:
            self._is_idle = True

    def _step(self) -> None:
        started = time.perf_counter()
        try:
            deltas = self.engine.step()
        except Exception as error:
            self._num_failures += 1
            self._post(self._count_failed_step)
            if self._num_failures == _MOST_FAILURES:
                raise
            log.exception("a step failed: the requests that ran end with an error, those that wait go on")
            deltas = self.engine.fail_running(f"a step failed ({type(error).__name__})")
        else:
            self._num_failures = 0
        ended = time.perf_counter()
        if deltas:
            self._num_beats += 1
            self._post(self._deliver, deltas, started, ended)
        if ended - self._state_at > _STATE_AGE:
            self._lay_down_state(ended)

    def _lay_down_state(self, now: float) -> None:
        self.state, self._state_at = EngineState.of(self.engine), now

    def _obey(self) -> bool:
        """Carry out all commands; sleeps for one while there is nothing to do. False means to end."""
        try:
            command = self._next_command()
            while command is not None:
                if isinstance(command, _Add):
                    self._add(command)
                else:
                    for request_id in command.request_ids:
                        self.engine.abort(request_id)
                command = self._next_command()
        except queue.Empty:
            return True
        return False

    def _next_command(self) -> _Add | _Abort | None:
        """Raises queue.Empty if there is none and the engine has work."""
        self._is_idle = not self.engine.has_work
        if self._is_idle:
            self._lay_down_state(time.perf_counter())
        command = self._commands.get(block=self._is_idle)
        self._is_idle = False
        return command

    def _add(self, command: _Add) -> None:
        for count, request in enumerate(command.requests):
            try:
                self.engine.add(request)
            except Exception as error:
                if isinstance(error, EngineError):
                    refusal = error
                else:
                    log.exception("a request could not be queued")
                    refusal = EngineFailedError(f"the engine failed: {type(error).__name__}")
                for earlier in command.requests[:count]:
                    self.engine.abort(earlier.id)
                self._post(command.ticket.fail, refusal)
                return
        self._post(command.ticket.accept)

    def _post(self, call: Callable[..., None], *args: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: a step outlived the wait for its end
            self._loop.call_soon_threadsafe(call, *args)
