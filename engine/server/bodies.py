"""Bodies of requests: read whole, within limits, as JSON.

The size is bounded by ``MAX_BODY``, and the number of values by that of commas, which is counted before
anything is decoded: decoding holds the event loop, and a body of 32 MiB can hold 16 million numbers.

All bodies together are bounded too, from their first bytes until they are tokens: many clients that each send
a large body, and slowly, would else fill the memory. What does not fit gets 503 as it arrives, and a body may
not take longer than ``PATIENCE``. Short ones always fit, so that nobody's question waits for others' uploads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from engine.errors import CapacityError, RequestError

MAX_BODY = 32 << 20  # bytes
MAX_VALUES = 1_000_000  # decoding so many takes some 50 ms
MAX_TOTAL = 8 * MAX_BODY  # bytes of all bodies
PATIENCE = 60.0  # seconds
_SHORT = 64 << 10  # bytes of each body that are not counted: no more than the connection itself may hold


class Bodies:
    """Reads the bodies of a server. max_total: bytes of them that it may hold; patience: seconds for one to
    arrive."""

    def __init__(self, max_total: int = MAX_TOTAL, patience: float = PATIENCE) -> None:
        self.num_held = 0  # bytes
        self._max_total, self._patience = max_total, patience

    @asynccontextmanager
    async def json(self, request: web.Request) -> AsyncIterator[bytes]:
        """The bytes of a body that says it is JSON; they count until the context ends.

        Raises RequestError, CapacityError where there is no room for it now.
        """
        _check_headers(request)
        num_held, body = 0, bytearray()
        try:
            try:
                async with asyncio.timeout(self._patience):
                    while piece := await request.content.readany():
                        body += piece
                        _check_size(len(body))
                        more = max(len(body) - _SHORT, 0) - num_held
                        self._hold(more)
                        num_held += more
            except TimeoutError:
                raise RequestError(
                    f"after {self._patience:g} s the body is not there yet", None, "body_too_slow"
                ) from None
            _check_values(body)
            yield bytes(body)
        finally:
            self.num_held -= num_held

    def _hold(self, num_bytes: int) -> None:
        if self.num_held + num_bytes > self._max_total:
            raise CapacityError(
                f"the bodies of other requests fill the {self._max_total >> 20} MiB that there are for them"
            )
        self.num_held += num_bytes


def _check_headers(request: web.Request) -> None:
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise RequestError("compressed bodies are not accepted", None, "unsupported_media_type")
    if request.content_type != "application/json":
        raise RequestError(
            f"the content type is {request.content_type[:60]!r}, expected 'application/json'",
            None,
            "unsupported_media_type",
        )
    _check_size(request.content_length or 0)


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_BODY:
        raise RequestError(
            f"the body has {num_bytes} bytes or more, at most {MAX_BODY} are read", None, "body_too_large"
        )


def _check_values(body: bytearray) -> None:
    num_values = body.count(b",") + 1
    if num_values > MAX_VALUES:
        raise RequestError(
            f"the body has {num_values - 1} commas, at most {MAX_VALUES} are read", None, "body_too_large"
        )
