"""Bytes that are no HTTP: answered in OpenAI's shape like everything else, and logged as what they are.

aiohttp would send back what it could not read, tens of kilobytes of it, and log a traceback. Whoever sends
garbage gets one line instead, and the log gets one where somebody debugs.

Nor is it any HTTP to say nothing, or half a head: such a connection ends after ``PATIENCE``, as does one that
is kept open for a next request. Descriptors are few, and whoever holds them all shuts out everybody else.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

from aiohttp import web
from aiohttp.http import HttpProcessingError
from aiohttp.web_request import BaseRequest

from engine.server import faults

log = logging.getLogger(__name__)

PATIENCE: Final = 75.0  # seconds, more than proxies keep a connection that they do not use
_SETTINGS: Final[dict[str, Any]] = {
    "access_log": None,
    "auto_decompress": False,
    "keepalive_timeout": PATIENCE,
}


class ApiRunner(web.AppRunner):
    """Runs the application on connections of our own kind, whose handlers are cancelled when their client
    leaves, and which decompress no bodies."""

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(made.request_handler, request_factory=made.request_factory, handler_cancellation=True)


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=asyncio.get_running_loop(), **_SETTINGS)


class _Connection(web.RequestHandler):
    __slots__ = ()

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to a request that could not be read."""
        if not isinstance(exc, HttpProcessingError):
            return super().handle_error(request, status, exc, message)
        reason = (message or "").partition("\n")[0].rstrip(" :") or type(exc).__name__
        log.debug("%s sent what is no HTTP: %s", request.remote, reason)
        response = faults.unreadable(status, reason)
        response.force_close()
        return response
