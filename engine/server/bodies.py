"""Bodies of requests: read whole, within limits, as JSON.

The size is bounded by ``MAX_BODY``, and the number of values by that of commas, which is counted before
anything is decoded: decoding holds the event loop, and a body of 32 MiB can hold 16 million numbers.
"""

from __future__ import annotations

from aiohttp import web

from engine.errors import RequestError

MAX_BODY = 32 << 20  # bytes
MAX_VALUES = 1_000_000  # decoding so many takes some 50 ms


async def json_body(request: web.Request) -> bytes:
    """The bytes of a body that says it is JSON. Raises RequestError."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise RequestError("compressed bodies are not accepted", None, "unsupported_media_type")
    if request.content_type != "application/json":
        raise RequestError(
            f"the content type is {request.content_type[:60]!r}, expected 'application/json'",
            None,
            "unsupported_media_type",
        )
    body = await request.read()
    num_values = body.count(b",") + 1
    if num_values > MAX_VALUES:
        raise RequestError(
            f"the body has {num_values - 1} commas, at most {MAX_VALUES} are read", None, "body_too_large"
        )
    return body
