"""Servers that answer from a script, and a loop whose time is only as long as what is waited for."""

from __future__ import annotations

import asyncio
import json
import selectors
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields, ensure_ascii=False).encode() + b"\n\n"


def piece(text: str | None, finish: str | None = None, **fields: Any) -> bytes:
    """A chunk of a chat answer."""
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": finish}], **fields)


def usage(completion_tokens: int, prompt_tokens: int = 7, **fields: Any) -> bytes:
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return event(choices=[], usage=counts, **fields)


PLAIN = (piece("Hel"), piece("lo", "stop"), usage(5), DONE)


@dataclass(frozen=True)
class Reply:
    """What one request gets. pieces are written one by one, each in a packet of its own as far as the network
    goes along; is_cut: the connection ends without the end of the response."""

    pieces: Sequence[bytes] = PLAIN
    status: int = 200
    is_cut: bool = False


@dataclass
class Scripted:
    """A server's address and what it was asked. replies: one per request to a POST route, the last for ever;
    dies_after: number of answers after which it stops to listen and cuts all connections."""

    replies: Sequence[Reply] = (Reply(),)
    models: bytes = b'{"data": [{"id": "scripted"}]}'
    dies_after: int | None = None
    url: str = ""
    asked: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.path, await request.json(), dict(request.headers)))
        reply = self.replies[min(len(self.asked), len(self.replies)) - 1]
        if self.dies_after is not None and len(self.asked) > self.dies_after:
            await self._site.stop()
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if reply.status != 200:
            return web.Response(status=reply.status, body=b"".join(reply.pieces))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for part in reply.pieces:
            await response.write(part)
            await asyncio.sleep(0.001)  # so that parts are rarely joined; no answer depends on it
        if reply.is_cut:
            assert request.transport is not None
            request.transport.abort()
        return response

    async def list_models(self, request: web.Request) -> web.Response:
        return web.Response(body=self.models)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Scripted]:
        app = web.Application()
        app.router.add_post("/{path:.*}", self.answer)
        app.router.add_get("/v1/models", self.list_models)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        self._site = web.TCPSite(runner, "127.0.0.1", 0)
        await self._site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        try:
            yield self
        finally:
            await runner.cleanup()


@contextmanager
def in_background(manager: Callable[[], AbstractAsyncContextManager[T]]) -> Iterator[T]:
    """What an async context gives, held open on a thread and a loop of its own."""
    opened: Future[tuple[T, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def hold() -> None:
        async with manager() as thing:
            end = asyncio.Event()
            opened.set_result((thing, asyncio.get_running_loop(), end))
            await end.wait()

    thread = threading.Thread(target=lambda: asyncio.run(hold()))
    thread.start()
    thing, loop, end = opened.result(20)
    try:
        yield thing
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(20)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Nothing takes time but sleeping, and sleeping takes none: the clock jumps to the next timer."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self.now


class _Jumping(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everything waits and no timer runs"
        self._loop.now += max(timeout, 0.0)
        return super().select(0)
