"""From start to stop: bind, load, serve, drain.

The port is bound before the model is loaded, so that a second server fails at once; until then every request
gets 503 ``starting``. The first SIGTERM or SIGINT drains: new requests get 503 ``draining``, running ones
have the shutdown timeout to finish, what is left ends with an error. A second signal ends everything at once.
An engine that died ends the server as well, with exit code 1, as soon as everybody has been told; for one
that is merely stuck /health says 503, and it is for whoever asks to decide: it may go on.
A server that another process started for itself also takes that process's end for the first signal.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterable

from aiohttp import web
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy

from engine.build import Served
from engine.canary import CanaryCounts
from engine.errors import ConfigError
from engine.server.app import create_app
from engine.server.framing import ApiRunner
from engine.server.held import rehearse
from engine.server.runner import EngineRunner
from engine.server.state import ServerOptions, ServerState

log = logging.getLogger(__name__)

REPORT_INTERVAL = 10.0  # seconds between lines about throughput, while there is any
_SEND_BUFFER = 128 << 10  # bytes of a connection in the kernel, which takes twice that for its books
_CLOSE_TIMEOUT = 5.0  # seconds that handlers get to send their error event after an abort


async def serve(options: ServerOptions, load: Callable[[], Served], parent: int | None = None) -> int:
    """Run the server until a signal, or the end of its engine; returns the exit code, 1 if the engine died or
    did not stop.

    load is called once, on a thread of its own, and returns the model. parent is the descriptor of a pipe
    that the parent process holds open; its closing counts as a signal. Raises ConfigError if the port cannot
    be bound or aiohttp lacks its compiled parser, and whatever load raises.
    """
    started = time.perf_counter()
    if HttpRequestParser is HttpRequestParserPy:
        raise ConfigError(
            "aiohttp was installed without its compiled HTTP parser, and requests could be smuggled past the "
            "other: install a wheel of it, and unset AIOHTTP_NO_EXTENSIONS"
        )
    state = ServerState(options)
    signals = _Signals()
    if parent is not None:
        signals.watch(parent)
    runner = app_runner(state)
    await runner.setup()
    try:
        listening = _bind(options)
        await web.SockSite(runner, listening).start()
        url = _url(options.host, listening.getsockname()[1])
        log.info("Listening on %s, loading the model", url)
        served = await signals.unless_stopped(_on_thread(lambda: _rehearsed(load())))
        if served is None:
            return 0
        serving = state.begin(served)
        log.info(
            "Ready on %s (API /openapi.json, metrics /metrics) after %.1f s",
            url,
            time.perf_counter() - started,
        )
        reporter = asyncio.create_task(report(serving.runner))
        try:
            await _first((signals.stop.wait(), serving.runner.dead.wait()))
            await drain(state, serving.runner, signals.again)
        finally:
            reporter.cancel()
            ended_well = await serving.runner.stop()
            serving.close()
        return 0 if ended_well else 1
    finally:
        await runner.cleanup()


def app_runner(state: ServerState) -> web.AppRunner:
    """The application with the settings it needs."""
    return ApiRunner(create_app(state), shutdown_timeout=_CLOSE_TIMEOUT)


async def drain(state: ServerState, runner: EngineRunner, hurry: asyncio.Event) -> None:
    """Take nothing new and let what runs finish; after the shutdown timeout, or when ``hurry`` is set, abort
    it."""
    state.is_draining = True
    timeout = state.options.shutdown_timeout
    if runner.in_flight:
        log.info("Shutting down: %d requests have up to %.0f s to finish", runner.in_flight, timeout)
    await _first((runner.idle(), hurry.wait()), timeout)
    if runner.in_flight:
        log.warning("Shutting down: %d requests are aborted", runner.in_flight)
        runner.abort_all()


async def _first(waits: Iterable[Coroutine[None, None, object]], timeout: float | None = None) -> None:
    """Wait until one of several waits is over, or for ``timeout`` seconds."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


async def report(runner: EngineRunner, interval: float = REPORT_INTERVAL) -> None:
    """Log throughput, load, acceptance and prefix cache hits every ``interval`` seconds; silent while nothing
    happens."""
    before = _snapshot(runner)
    while True:
        await asyncio.sleep(interval)
        now = _snapshot(runner)
        prompt, generated, steps, accepted, asked, found = (
            new - old for new, old in zip(now, before, strict=True)
        )
        before = now
        if not (prompt or generated):
            continue
        state = runner.state
        acceptance = f", acceptance length {1 + accepted / steps:.2f}" if steps else ""
        coverage = state.vocab_coverage
        if coverage is not None and coverage < 1:
            acceptance += f", draft vocabulary covers {100 * coverage:.1f}%"
        hits = f", prefix cache hits {100 * found / asked:.1f}%" if asked else ""
        log.info(
            "prompt %.1f tok/s, generation %.1f tok/s, running %d, waiting %d, KV use %.1f%%%s%s%s",
            prompt / interval,
            generated / interval,
            state.num_running,
            state.num_waiting,
            100 * state.kv_usage,
            hits,
            acceptance,
            _canary_text(state.canary),
        )


def _canary_text(counts: CanaryCounts) -> str:
    """The end of a line on what the canary saw since the start; empty if it has not been at work."""
    if not counts.num_steps and not counts.num_skipped:
        return ""
    skipped = f" ({counts.num_skipped} not, for want of pages)" if counts.num_skipped else ""
    return f", canary steps {counts.num_steps}{skipped}, ties {counts.num_ties}, bugs {counts.num_bugs}"


def _snapshot(runner: EngineRunner) -> tuple[int, ...]:
    totals = runner.totals
    return (
        totals.num_prompt_tokens,
        totals.num_generated_tokens,
        totals.num_spec_steps,
        totals.num_accepted,
        runner.state.num_asked,
        runner.state.num_found,
    )


class _Signals:
    """SIGTERM and SIGINT as events: the first sets ``stop``, the second ``again``."""

    def __init__(self) -> None:
        self.stop, self.again = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._arrived)

    def _arrived(self) -> None:
        (self.again if self.stop.is_set() else self.stop).set()

    def watch(self, parent: int) -> None:
        """Take the closing of a pipe for a signal; however the process at its other end ends, it closes."""
        loop = asyncio.get_running_loop()

        def readable() -> None:
            with contextlib.suppress(ConnectionError):
                if os.read(parent, 4096):
                    return
            loop.remove_reader(parent)
            self._arrived()

        loop.add_reader(parent, readable)

    async def unless_stopped(self, work: asyncio.Future[Served]) -> Served | None:
        """The result of ``work``, or None if a signal came first."""
        stop = asyncio.ensure_future(self.stop.wait())
        await asyncio.wait((work, stop), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        return await work if work.done() else None


def _on_thread(load: Callable[[], Served]) -> asyncio.Future[Served]:
    """Run load on a daemon thread, so that a signal can end the process while it works."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Served] = loop.create_future()

    def settle(result: Served | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        elif result is not None:
            future.set_result(result)

    def work() -> None:
        try:
            outcome: tuple[Served | None, BaseException | None] = load(), None
        except BaseException as error:  # noqa: BLE001 - raised again where the future is awaited
            outcome = None, error
        with contextlib.suppress(RuntimeError):  # the loop is closed: a signal ended the server meanwhile
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, name="load", daemon=True).start()
    return future


def _rehearsed(served: Served) -> Served:
    rehearse(served.tokenizer, served.grammar_compiler)
    return served


def _bind(options: ServerOptions) -> socket.socket:
    """A listening socket. Raises ConfigError that names address and reason."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"cannot use --host {options.host}: {error}") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted sockets inherit it. The kernel would else hold megabytes that nobody reads, for everybody.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        listening.bind(address)
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"cannot listen on {options.host}:{options.port}: {error.strerror or error}; is another server "
            "running? --port 0 picks a free port"
        ) from error
    return listening


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
