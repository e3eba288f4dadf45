"""What handlers share: the options, and the model with all that serves it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import TypeVar

from aiohttp import web

from engine.build import Served
from engine.errors import CapacityError, RequestError
from engine.server.bodies import Bodies
from engine.server.prepare import Preparer
from engine.server.replies import ModelCard
from engine.server.runner import EngineRunner

_MOST_SIDE_JOBS = 16  # tokenisations for side routes, one at a time
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How to serve. Times in seconds; port 0 picks a free one; without names the model's own is served.

    allowed_hosts: names besides localhost that a server on a loopback address may be called by; cors_origins:
    web pages that may use it; stalled_after: 0 for never.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    served_names: tuple[str, ...] = ()
    max_num_queued_reqs: int = 128
    max_num_queued_tokens: int = 1 << 20
    keep_alive_interval: float = 15.0
    shutdown_timeout: float = 30.0
    stalled_after: float = 300.0
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()


def _threads(count: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads all exist from the start: what a server holds does not depend on what it met."""
    pool, all_there = ThreadPoolExecutor(max_workers=count, thread_name_prefix=name), Barrier(count)
    for _ in range(count):
        pool.submit(all_there.wait)
    return pool


@dataclass(slots=True)
class Serving:
    """The loaded model and all that serves it; exists from 'ready' on."""

    served: Served
    runner: EngineRunner
    names: tuple[str, ...]
    preparer: Preparer
    created: int = field(default_factory=lambda: int(time.time()))
    threads: ThreadPoolExecutor = field(default_factory=lambda: _threads(2, "prepare"))
    _side_thread: ThreadPoolExecutor = field(default_factory=lambda: _threads(1, "side"))
    _num_side_jobs: int = 0

    def cards(self) -> list[ModelCard]:
        """An entry of /v1/models for each name."""
        max_model_len = self.runner.engine.config.max_model_len
        return [
            ModelCard(id=name, root=self.served.root, max_model_len=max_model_len, created=self.created)
            for name in self.names
        ]

    def check_model(self, model: str | None) -> str:
        """The name to answer under. Raises RequestError (404) for a model that is not served."""
        if not model or model == self.served.root:
            return self.names[0]
        if model not in self.names:
            raise RequestError(
                f"the model {model[:100]!r} is not served here, served: {', '.join(self.names)}",
                "model",
                "model_not_found",
            )
        return model

    async def prepare(self, work: Callable[[], ResultT]) -> ResultT:
        """Render and tokenise off the event loop. For those who hold a place of the queue."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    async def beside(self, work: Callable[[], ResultT]) -> ResultT:
        """The same for those who do not, on a thread of their own. Raises CapacityError if too many wait."""
        if self._num_side_jobs == _MOST_SIDE_JOBS:
            raise CapacityError(f"{_MOST_SIDE_JOBS} other texts are being tokenised")
        self._num_side_jobs += 1
        job = asyncio.get_running_loop().run_in_executor(self._side_thread, work)
        job.add_done_callback(lambda _: self._side_job_ended())
        return await job

    def _side_job_ended(self) -> None:
        self._num_side_jobs -= 1

    def close(self) -> None:
        """Let go of the threads; what they have begun they end alone."""
        for threads in (self.threads, self._side_thread):
            threads.shutdown(wait=False, cancel_futures=True)


@dataclass(slots=True)
class ServerState:
    """Where the server stands: starting (no ``serving`` yet), ready, or draining."""

    options: ServerOptions
    serving: Serving | None = None
    is_draining: bool = False
    bodies: Bodies = field(default_factory=Bodies)

    def begin(self, served: Served) -> Serving:
        """Start the engine's thread and become ready. Call on the event loop."""
        options = self.options
        runner = EngineRunner(
            served.engine, options.max_num_queued_reqs, options.max_num_queued_tokens, options.stalled_after
        )
        names = options.served_names or (served.name,)
        preparer = Preparer(served.tokenizer, served.engine.config, served.grammar_compiler)
        self.serving = Serving(served, runner, names, preparer)
        runner.start()
        return self.serving

    def loaded(self) -> Serving:
        """The model, in whatever state its engine is. Raises CapacityError while it loads."""
        if self.serving is None:
            raise CapacityError("the model is still loading", "starting")
        return self.serving

    def alive(self) -> Serving:
        """The model, once it is loaded and as long as its engine works. Raises CapacityError."""
        runner = self.loaded().runner
        if runner.failure is not None:
            raise CapacityError(f"the engine is dead: {runner.failure}", "engine_dead")
        if runner.is_stalled:
            raise CapacityError("the engine makes no progress", "engine_stalled")
        return self.loaded()

    def ready(self) -> Serving:
        """The model, if new requests may come. Raises CapacityError."""
        serving = self.alive()
        if self.is_draining:
            raise CapacityError("the server is shutting down and takes no new requests", "draining")
        return serving


STATE = web.AppKey("STATE", ServerState)
