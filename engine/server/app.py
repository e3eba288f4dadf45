"""The HTTP application: routes, keys, request ids and errors around the engine.

Requests are decoded on the event loop, rendered and tokenised in a small thread pool, run by the engine's
thread and streamed as server-sent events, one per step. A client that leaves cancels its handler, and with it
its request, whether that is queued, in prefill or decoding.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from aiohttp import web

from engine.core import Request
from engine.errors import EngineError
from engine.server import access, bodies, faults, protocol, side
from engine.server.access import Handler
from engine.server.generation import Generation
from engine.server.replies import ChatForm, Form, TextForm
from engine.server.sse import ClientGoneError
from engine.server.state import STATE, ServerState, Serving

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ID = web.RequestKey("request_id", str)


def create_app(state: ServerState) -> web.Application:
    """The application. Run it with ``framing.ApiRunner``, or clients that leave go unnoticed."""
    app = web.Application(
        middlewares=[_envelope, access.check_host, access.answer_preflight, access.check_key],
        client_max_size=bodies.MAX_BODY,
    )
    app[STATE] = state
    app.on_response_prepare.append(_sign)
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat_completions),
            web.post("/v1/completions", completions),
            *side.routes,
        ]
    )
    return app


# --- handlers -----------------------------------------------------------------------------------------------


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions"""
    arrival = time.perf_counter()
    serving = request.app[STATE].ready()
    body = await bodies.json_body(request)
    call = protocol.decode_chat(body)
    _note_unknown_fields(request, serving, protocol.unknown_fields(body, call))
    name = serving.check_model(call.model)
    with serving.runner.admit(call.num_choices):
        requests = await serving.prepare(lambda: serving.preparer.chat(call))
        return await _answer(request, serving, call, requests, ChatForm(call.offers_tools), name, arrival)


async def completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions"""
    arrival = time.perf_counter()
    serving = request.app[STATE].ready()
    body = await bodies.json_body(request)
    call = protocol.decode_completion(body)
    _note_unknown_fields(request, serving, protocol.unknown_fields(body, call))
    name = serving.check_model(call.model)
    with serving.runner.admit(len(protocol.prompts(call)) * call.num_choices):
        requests = await serving.prepare(lambda: serving.preparer.completion(call))
        return await _answer(request, serving, call, requests, TextForm(), name, arrival)


def _note_unknown_fields(request: web.Request, serving: Serving, names: list[str]) -> None:
    """Count fields that are ignored and name them in the log. Only their sum is kept: the names are the
    clients' to choose, and there is no end to them."""
    if names:
        totals = serving.runner.totals
        totals.num_unknown_fields += len(names)
        log.debug(
            "%s ignores unknown fields: %s (%d since the start)",
            request[_ID],
            protocol.shorten(", ".join(map(repr, names))),
            totals.num_unknown_fields,
        )


async def _answer(
    request: web.Request,
    serving: Serving,
    call: protocol.GenerationRequest,
    requests: list[Request],
    form: Form,
    name: str,
    arrival: float,
) -> web.StreamResponse:
    options = request.app[STATE].options
    generation = await Generation.start(
        serving.runner,
        serving.served,
        requests,
        call.num_choices,
        form,
        name,
        arrival,
        bool(call.return_token_ids),
    )
    try:
        if call.stream:
            return await generation.stream(
                request,
                call.stream_options or protocol.StreamOptions(),
                options.keep_alive_interval,
                request[_ID],
            )
        return faults.json_response(await generation.collect())
    finally:
        generation.release()
        log.info("%s %s: %s", request[_ID], request.path, generation.describe())


# --- around every handler -----------------------------------------------------------------------------------


@web.middleware
async def _envelope(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Name the request; turn every error into OpenAI's shape, and count it."""
    given = request.headers.get("X-Request-Id", "")
    request[_ID] = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    try:
        return await handler(request)
    except EngineError as error:
        log.debug("%s %s: %s", request[_ID], request.rel_url.raw_path, error)
        serving = request.app[STATE].serving
        if serving is not None:
            serving.runner.totals.refused[error.code] += 1
        return faults.response_of(error)
    except web.HTTPException as error:
        return faults.response_of_http(error)
    except (ClientGoneError, asyncio.CancelledError):
        log.info("%s %s: 499, the client left", request[_ID], request.rel_url.raw_path)
        raise
    except Exception:
        log.exception("%s %s failed", request[_ID], request.rel_url.raw_path)
        return faults.json_response(faults.internal_error(request[_ID]), 500)


async def _sign(request: web.Request, response: web.StreamResponse) -> None:
    """Every response says which request it belongs to, and not which library sent it."""
    access.add_cors_headers(request, response)
    response.headers["X-Request-Id"] = request.get(_ID, "-")
    response.headers["Server"] = "haast"
