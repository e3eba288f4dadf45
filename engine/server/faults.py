"""From exceptions to OpenAI's error objects: one shape, in responses and inside streams."""

from __future__ import annotations

from aiohttp import web

from engine.errors import CapacityError, EngineError, RequestError
from engine.server.protocol import shorten
from engine.server.replies import ErrorBody, ErrorReply, encoder

RETRY_AFTER = "1"  # seconds, sent with every 503 that may pass
_STATUS_OF_CODE = {
    "model_not_found": 404,
    "invalid_api_key": 401,
    "host_not_allowed": 403,
    "body_too_slow": 408,
    "body_too_large": 413,
    "unsupported_media_type": 415,
}
_CODE_OF_STATUS = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


def status_of(error: EngineError) -> int:
    """The HTTP status of an error: 4xx for the client's, 503 for no room, 500 for ours."""
    if isinstance(error, RequestError):
        return _STATUS_OF_CODE.get(error.code, 400)
    return 503 if isinstance(error, CapacityError) else 500


def reply_of(error: EngineError) -> ErrorReply:
    """The body of an error."""
    param = error.param if isinstance(error, RequestError) else None
    return _reply(status_of(error), str(error), param, error.code)


def response_of(error: EngineError) -> web.Response:
    """A whole response for an error."""
    status = status_of(error)
    headers = {}
    if status == 503 and error.code != "engine_dead":
        headers["Retry-After"] = RETRY_AFTER
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(reply_of(error), status, headers)


def response_of_http(error: web.HTTPException) -> web.Response:
    """A whole response for an error that aiohttp raised (no such route, wrong method, body too large)."""
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    text = error.text if error.status == 413 and error.text else error.reason
    reply = _reply(error.status, text, None, _CODE_OF_STATUS.get(error.status))
    return json_response(reply, error.status, headers)


def unreadable(status: int, reason: str) -> web.Response:
    """A whole response to what is no HTTP."""
    reply = _reply(status, f"the request cannot be read: {reason}", None, "invalid_http")
    return json_response(reply, status, {"Server": "haast"})


def internal_error(request_id: str) -> ErrorReply:
    """A mistake of ours; the details are in the log under the id."""
    message = f"internal error; the server's log has it under request id {request_id}"
    return _reply(500, message, None, "internal_error")


def json_response(body: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A JSON response, encoded by msgspec."""
    return web.Response(
        body=encoder.encode(body), status=status, headers=headers, content_type="application/json"
    )


def _reply(status: int, message: str, param: str | None, code: str | None) -> ErrorReply:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return ErrorReply(ErrorBody(shorten(message), kind, param, code))
