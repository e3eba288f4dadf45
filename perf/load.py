"""A load generator: sends requests to an OpenAI-compatible server and notes when what came back.

Two ways to send, and they answer different questions:

    closed loop    ``max_concurrency`` requests are always under way, the next one starts when one ends
    open loop      requests start at times that were drawn before, whatever the server does

In an open loop nothing may hold a request back: each has a task and a connection of its own, is due at a time
counted from the start and not from the request before, and a server that stalls sees all that are due
meanwhile. (Were they held back, the stall would hide from the very requests that it hurts.) Both may be
combined, then a request that is due waits for a free place; that time is its ``delay``, part of no latency.

Nothing is sent twice: a request that fails is a failed request. One failure ends a run early, a connection
that cannot be made; requests under way are still awaited, what was due later is not sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
import numpy as np

from engine.cli.client import ServerError, UnreachableError, error_message, stream_data
from perf.workload import Ask


@dataclass(slots=True)
class Trace:
    """One request as the client saw it. Times in seconds of one clock, the loop's.

    due: when it should have been sent, sent: when it was. chunks: when the events came that brought a piece
    of the answer; what speculation emits in one step comes as one of them. Numbers of tokens are the
    server's; None if it did not tell.
    """

    ask: Ask
    due: float
    sent: float
    chunks: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    error: ServerError | None = None

    @property
    def delay(self) -> float:
        """Seconds it was sent late: it had no free place, or the client was busy."""
        return self.sent - self.due

    @property
    def ttft(self) -> float:
        """Seconds to the first piece of the answer."""
        return self.chunks[0] - self.sent

    @property
    def latency(self) -> float:
        """Seconds to its last piece."""
        return self.chunks[-1] - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None where there is no such token or their number is unknown."""
        if self.completion_tokens is None or self.completion_tokens < 2:
            return None
        return (self.latency - self.ttft) / (self.completion_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between the pieces."""
        return [late - early for early, late in zip(self.chunks, self.chunks[1:], strict=False)]


Send = Callable[[Ask, float], Awaitable[Trace]]  # an ask and when it was due


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None

    def has_begun(self) -> bool:
        """Whether there is more than the role, which some servers send before there is any token."""
        delta = self.delta or _Delta()
        return bool(
            self.text
            or self.finish_reason
            or delta.content
            or delta.reasoning_content
            or delta.reasoning
            or delta.tool_calls
        )


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Event(msgspec.Struct):
    """What is read of an event; all else is skipped unseen, to be quick."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    metrics: dict[str, Any] | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(_Event)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how requests are sent. fields: of every body, the model and sampling; timeout: seconds."""

    http: aiohttp.ClientSession
    path: str
    fields: Mapping[str, object]
    timeout: float

    def body(self, ask: Ask) -> dict[str, object]:
        """The request. ``max_tokens`` is the name of the limit that every server knows."""
        asked: dict[str, object] = (
            {"messages": [{"role": "user", "content": ask.prompt}]}
            if self.path.endswith("chat/completions")
            else {"prompt": ask.prompt}
        )
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return asked | {"max_tokens": ask.output_len} | stream | dict(self.fields)

    async def send(self, ask: Ask, due: float) -> Trace:
        """Ask once and read the answer. What goes wrong is the trace's ``error``."""
        body, clock = self.body(ask), asyncio.get_running_loop().time
        trace = Trace(ask, due, clock())
        try:
            async with asyncio.timeout(self.timeout):
                async with aclosing(stream_data(self.http, self.path, body)) as events:
                    async for data in events:
                        _note(trace, data, clock())
            if trace.finish_reason is None:
                raise ServerError("the server ended the stream before the end of the answer")
        except TimeoutError:
            trace.error = ServerError(f"no complete answer within {self.timeout:g} s")
        except ServerError as error:
            trace.error = error
        return trace


def _note(trace: Trace, data: bytes, now: float) -> None:
    """Add an event to a trace. Raises ServerError for one that is an error, or none that we understand."""
    try:
        event = _DECODER.decode(data)
    except msgspec.DecodeError as error:
        raise ServerError(f"the server sent an event that is none of OpenAI's: {error}") from error
    if event.error is not None:
        raise ServerError(f"the server failed: {error_message(data)}")
    if event.usage is not None:
        trace.prompt_tokens = event.usage.prompt_tokens
        trace.completion_tokens = event.usage.completion_tokens
    if event.metrics is not None:
        trace.metrics = event.metrics
    for choice in (event.choices or ())[:1]:
        if trace.chunks or choice.has_begun():
            trace.chunks.append(now)
        trace.text += choice.text or (choice.delta.content if choice.delta else None) or ""
        trace.finish_reason = choice.finish_reason or trace.finish_reason


def arrivals(num: int, rate: float, burstiness: float, rng: np.random.Generator) -> list[float]:
    """Seconds from the start at which ``num`` requests are due, ascending.

    rate: requests per second, infinite for all at once. burstiness: shape of the gamma distribution of the
    gaps, 1 for a Poisson process, below for bursts, above for regularity, infinite for a clockwork. The times
    are scaled so that the last is ``num / rate``: what is offered does not depend on the seed.
    """
    if np.isinf(rate):
        return [0.0] * num
    gaps = np.ones(num) if np.isinf(burstiness) else rng.gamma(burstiness, size=num)
    times = np.cumsum(gaps)
    return [float(time) for time in times * (num / rate / times[-1])]


async def drive(
    asks: Sequence[Ask],
    times: Sequence[float],
    send: Send,
    max_concurrency: int | None = None,
    on_end: Callable[[Trace], object] = lambda trace: None,
) -> list[Trace]:
    """Send every ask at its time, seconds from now; return the traces of those that were sent, in order.

    Fewer come back than were asked when the server could not be reached any more. on_end is called with each
    trace as it is complete.
    """
    loop = asyncio.get_running_loop()
    start, is_gone = loop.time(), asyncio.Event()
    places = nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)

    async def one(ask: Ask, due: float) -> Trace | None:
        async with places:
            if is_gone.is_set():
                return None
            trace = await send(ask, due)
        if isinstance(trace.error, UnreachableError):
            is_gone.set()
        on_end(trace)
        return trace

    tasks = []
    async with asyncio.TaskGroup() as group:
        for ask, time in zip(asks, times, strict=True):
            if await _happens_before(is_gone, start + time):
                break
            tasks.append(group.create_task(one(ask, start + time)))
    return [trace for task in tasks if (trace := task.result()) is not None]


async def _happens_before(event: asyncio.Event, when: float) -> bool:
    """Wait for an event, but not past a time of the loop. Whether it happened."""
    left = when - asyncio.get_running_loop().time()
    if left > 0 and not event.is_set():
        try:
            async with asyncio.timeout(left):
                await event.wait()
        except TimeoutError:
            return False
    return event.is_set()


@dataclass(frozen=True, slots=True)
class Part:
    """A block of asks on one server: the traces of those that were sent, and how long it took in seconds."""

    traces: Sequence[Trace]
    duration: float


async def alternate(
    blocks: Sequence[Sequence[Ask]],
    servers: Sequence[Send],
    times: Callable[[int], Sequence[float]],
    rng: np.random.Generator,
    max_concurrency: int | None = None,
    on_end: Callable[[Trace], object] = lambda trace: None,
) -> list[list[Part]]:
    """Send every block to every server; return the parts of each server, in the order of the blocks.

    Servers take turns block by block, in an order drawn anew, so that a drift of the machine hits them alike.
    Within a block they are sent the same at the same times, ``times(number of asks)``. One server at most is
    busy at any time. A server that cannot be reached any more ends the run.
    """
    clock = asyncio.get_running_loop().time
    parts: list[list[Part]] = [[] for _ in servers]
    for asks in blocks:
        due = times(len(asks))
        for number in rng.permutation(len(servers)):
            started = clock()
            traces = await drive(asks, due, servers[number], max_concurrency, on_end)
            parts[number].append(Part(traces, clock() - started))
            if len(traces) < len(asks):
                return parts
    return parts


async def patiently(
    action: Callable[[], Awaitable[Any]], patience: float, note: Callable[[str], object]
) -> Any:
    """The result of an action on a server that may still be starting: unreachable, or answering 503.

    It is tried once a second for ``patience`` seconds; ``note`` hears why it is tried again. Raises its last
    ServerError.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + patience
    said = ""
    while True:
        try:
            return await action()
        except ServerError as error:
            is_starting = isinstance(error, UnreachableError) or error.status == 503
            if not is_starting or clock() >= deadline:
                raise
            if said != (said := str(error)):
                note(f"waiting up to {patience:g} s: {error}")
        await asyncio.sleep(min(1.0, max(deadline - clock(), 0.0)))
