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
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from aiohttp import web

from engine.core import Request
from engine.errors import EngineError
from engine.server import access, faults, protocol, side
from engine.server.access import Handler
from engine.server.generation import Generation
from engine.server.prepare import Preparer
from engine.server.replies import ChatForm, Form, TextForm
from engine.server.sse import ClientGoneError
from engine.server.state import STATE, ServerState, Serving

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ID = web.RequestKey("request_id", str)

CallT = TypeVar("CallT", bound=protocol.GenerationRequest)


def create_app(state: ServerState) -> web.Application:
    """The application. Run it with ``framing.ApiRunner``, or clients that leave go unnoticed."""
    app = web.Application(
        middlewares=[_envelope, access.check_host, access.answer_preflight, access.check_key]
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
    return await _answer(request, _CHAT)


async def completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions"""
    return await _answer(request, _TEXT)


@dataclass(frozen=True, slots=True)
class _Kind(Generic[CallT]):
    """What tells the two ways of asking apart."""

    decode: Callable[[bytes], CallT]
    prepare: Callable[[Preparer, CallT], list[Request]]
    form_of: Callable[[CallT], Form]


_CHAT = _Kind(protocol.decode_chat, Preparer.chat, lambda call: ChatForm(call.offers_tools))
_TEXT = _Kind(protocol.decode_completion, Preparer.completion, lambda _: TextForm())


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is left of a body once its texts are tokens: they may be large, and an answer takes long."""

    requests: list[Request]
    num_choices: int
    form: Form
    model: str
    with_token_ids: bool
    stream: protocol.StreamOptions | None  # None for a whole answer


async def _answer(request: web.Request, kind: _Kind[CallT]) -> web.StreamResponse:
    arrival = time.perf_counter()
    state = request.app[STATE]
    serving = state.ready()
    with ExitStack() as places:  # of the queue, held from before tokenising until the answer is out
        asked = await _asked(request, serving, kind, places)
        generation = await Generation.start(
            serving.runner,
            serving.served,
            asked.requests,
            asked.num_choices,
            asked.form,
            asked.model,
            arrival,
            asked.with_token_ids,
        )
        try:
            if asked.stream is not None:
                return await generation.stream(
                    request, asked.stream, state.options.keep_alive_interval, request[_ID]
                )
            return faults.json_response(await generation.collect())
        finally:
            generation.release()
            log.info("%s %s: %s", request[_ID], request.path, generation.describe())


async def _asked(request: web.Request, serving: Serving, kind: _Kind[CallT], places: ExitStack) -> _Asked:
    """Read a request. Neither its body nor what was decoded from it outlives this call."""
    async with request.app[STATE].bodies.json(request) as body:
        call = kind.decode(body)
        _note_unknown_fields(request, serving, protocol.unknown_fields(body, call))
        model = serving.check_model(call.model)
        places.enter_context(serving.runner.admit(call.num_answers))
        requests = await serving.prepare(lambda: kind.prepare(serving.preparer, call))
    return _Asked(
        [replace(each, cache_salt=access.private_salt(request, each.cache_salt)) for each in requests],
        call.num_choices,
        kind.form_of(call),
        model,
        bool(call.return_token_ids),
        call.stream_options or protocol.StreamOptions() if call.stream else None,
    )


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
    except (ClientGoneError, asyncio.CancelledError) as error:
        log.info("%s %s: 499, the client left", request[_ID], request.rel_url.raw_path)
        if isinstance(error, ClientGoneError):
            return web.Response(status=499)  # to a closed connection; raised, it would be logged as a failure
        raise
    except Exception:
        log.exception("%s %s failed", request[_ID], request.rel_url.raw_path)
        return faults.json_response(faults.internal_error(request[_ID]), 500)


async def _sign(request: web.Request, response: web.StreamResponse) -> None:
    """Every response says which request it belongs to, and not which library sent it."""
    access.add_cors_headers(request, response)
    response.headers["X-Request-Id"] = request.get(_ID, "-")
    response.headers["Server"] = "haast"
