"""Server-sent events over one aiohttp response: framing, keep-alive comments, and clients that do not
read."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

from aiohttp import web

from engine.server.replies import ErrorReply, Reply, encoder

WRITE_TIMEOUT = 30.0  # seconds a client may leave its socket full

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would collect events otherwise
}


class ClientGoneError(ConnectionError):
    """The client closed the connection, or does not read what it is sent."""


class EventStream:
    """An open stream; every method raises ClientGoneError once the client has left."""

    def __init__(self) -> None:
        self._response = web.StreamResponse(headers=_HEADERS)
        self._transport: asyncio.Transport | None = None
        self._written_at = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since the last byte was sent."""
        return time.monotonic() - self._written_at

    async def open(self, request: web.Request) -> None:
        """Send the status and the headers."""
        self._transport = request.transport
        with _unless_gone():
            await self._response.prepare(request)

    async def send(self, event: Reply | ErrorReply) -> None:
        """Send one event."""
        await self._write(b"data: " + encoder.encode(event) + b"\n\n")

    async def keep_alive(self) -> None:
        """Send a comment, which clients ignore and proxies count as life."""
        await self._write(b": keep-alive\n\n")

    async def close(self) -> web.StreamResponse:
        """Send the end mark."""
        await self._write(b"data: [DONE]\n\n")
        with _unless_gone():
            await self._response.write_eof()
        return self._response

    async def _write(self, data: bytes) -> None:
        try:
            with _unless_gone():
                async with asyncio.timeout(WRITE_TIMEOUT):
                    await self._response.write(data)
                    self._written_at = time.monotonic()
        except TimeoutError as error:
            if self._transport is not None:
                self._transport.abort()  # closing politely would wait for the client to read
            raise ClientGoneError(f"the client did not read for {WRITE_TIMEOUT:.0f} s") from error


@contextlib.contextmanager
def _unless_gone() -> Iterator[None]:
    """Says ClientGoneError of a connection that turns out to be closed."""
    try:
        yield
    except ConnectionError as error:
        raise ClientGoneError("the client closed the connection") from error
