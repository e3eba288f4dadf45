"""Who may ask: the names the server answers to, its keys, and the web pages that may use it.

What is not opened is closed. With a key every route wants it but those in ``OPEN_ROUTES``, routes that do not
exist included. A server on a loopback address answers to names of this machine only, or any page could have
a name of its own point there and be taken for one of ours (DNS rebinding). No page of another origin may read
answers unless ``--cors-origin`` says so.

A prompt whose beginning somebody asked before is answered sooner. Where there are several keys, that says
nothing about those who have another one: every key has its own rows in the prefix cache.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable

from aiohttp import web

from engine.errors import RequestError
from engine.server.state import STATE, ServerOptions

OPEN_ROUTES = ("/health", "/ready")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_DIGEST = web.RequestKey("key_digest", bytes)
_HEADER_NAMES = re.compile(r"[A-Za-z0-9_, -]{1,1024}")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def check_host(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse requests to a loopback address under a name that is not this machine's."""
    options, name = request.app[STATE].options, _host_name(request.headers.get("Host", ""))
    if options.host in LOOPBACK and not _is_ours(name, options):
        raise RequestError(
            f"the host {name[:100]!r} is not served here; if it should be, start the server with "
            "--allowed-host NAME",
            None,
            "host_not_allowed",
        )
    return await handler(request)


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    return (host.partition("]")[0][1:] if host.startswith("[") else host.rpartition(":")[0] or host).lower()


def _is_ours(name: str, options: ServerOptions) -> bool:
    """Nobody can make an address point elsewhere, nor localhost; no name at all is no browser's."""
    if not name or name == "localhost" or name.endswith(".localhost") or name in options.allowed_hosts:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@web.middleware
async def answer_preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Tell browsers what pages of an allowed origin may send; they ask without a key."""
    asked = request.headers.get("Access-Control-Request-Method")
    if request.method != "OPTIONS" or asked is None or allowed_origin(request) is None:
        return await handler(request)
    names = request.headers.get("Access-Control-Request-Headers", "")
    return web.Response(
        status=204,
        headers={
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": names if _HEADER_NAMES.fullmatch(names) else "",
            "Access-Control-Max-Age": "600",
        },
    )


def allowed_origin(request: web.Request) -> str | None:
    """The origin to name in the answer, None if the page that asks is of no allowed one."""
    origins, origin = request.app[STATE].options.cors_origins, request.headers.get("Origin")
    if "*" in origins:
        return "*"
    return origin if origin in origins else None


def add_cors_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Let pages of an allowed origin read the answer. Says nothing where none is allowed."""
    if not request.app[STATE].options.cors_origins:
        return
    response.headers["Vary"] = "Origin"
    origin = allowed_origin(request)
    if origin is not None:
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"


@web.middleware
async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse whoever has none of the keys; compares hashes in constant time, all of them."""
    keys = request.app[STATE].options.api_keys
    if keys and request.path not in OPEN_ROUTES:
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys]
        if kind.lower() != "bearer" or not any(matches):
            raise RequestError(
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                None,
                "invalid_api_key",
            )
        if len(keys) > 1:
            request[_DIGEST] = digest
    return await handler(request)


def private_salt(request: web.Request, salt: str) -> str:
    """The cache salt of a request as the engine gets it; one key can say nothing that makes it another's."""
    digest = request.get(_DIGEST)
    return salt if digest is None else hmac.new(digest, salt.encode(), hashlib.sha256).hexdigest()
