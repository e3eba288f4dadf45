"""The HTTP application: routes, keys, request ids and errors around the engine.

Requests are decoded on the event loop, rendered and tokenised in a small thread pool, run by the engine's
thread and streamed as server-sent events, one per step. A client that leaves cancels its handler, and with it
its request, whether that is queued, in prefill or decoding.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from aiohttp import web

from engine.build import Served
from engine.core import Request
from engine.errors import CapacityError, EngineError, RequestError
from engine.server import faults, protocol
from engine.server.generation import Generation
from engine.server.prepare import Preparer
from engine.server.replies import ChatForm, Form, ModelCard, ModelList, TextForm
from engine.server.runner import EngineRunner
from engine.server.sse import ClientGoneError
from engine.server.version import version

log = logging.getLogger(__name__)

MAX_BODY = 32 << 20  # bytes
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN_ROUTES = ("/health", "/ready")  # everything else needs the key, routes that do not exist included
_ID = web.RequestKey("request_id", str)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How to serve. Times in seconds; port 0 picks a free one; without names the model's own is served."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    served_names: tuple[str, ...] = ()
    max_num_queued_reqs: int = 128
    keep_alive_interval: float = 15.0
    shutdown_timeout: float = 30.0


@dataclass(slots=True)
class Serving:
    """The loaded model and all that serves it; exists from 'ready' on."""

    served: Served
    runner: EngineRunner
    names: tuple[str, ...]
    preparer: Preparer
    created: int = field(default_factory=lambda: int(time.time()))
    threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(max_workers=2, thread_name_prefix="prepare")
    )

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


@dataclass(slots=True)
class ServerState:
    """Where the server stands: starting (no ``serving`` yet), ready, or draining."""

    options: ServerOptions
    serving: Serving | None = None
    is_draining: bool = False

    def begin(self, served: Served) -> Serving:
        """Start the engine's thread and become ready. Call on the event loop."""
        runner = EngineRunner(served.engine, self.options.max_num_queued_reqs)
        names = self.options.served_names or (served.name,)
        self.serving = Serving(
            served, runner, names, Preparer(served.tokenizer, served.engine.config, served.grammar_compiler)
        )
        runner.start()
        return self.serving

    def alive(self) -> Serving:
        """The model, once it is loaded and as long as its engine works. Raises CapacityError."""
        if self.serving is None:
            raise CapacityError("the model is still loading", "starting")
        runner = self.serving.runner
        if runner.failure is not None:
            raise CapacityError(f"the engine is dead: {runner.failure}", "engine_dead")
        if runner.is_stalled:
            raise CapacityError("the engine makes no progress", "engine_stalled")
        return self.serving

    def ready(self) -> Serving:
        """The model, if new requests may come. Raises CapacityError."""
        if self.is_draining:
            raise CapacityError("the server is shutting down and takes no new requests", "draining")
        return self.alive()


STATE = web.AppKey("STATE", ServerState)


def create_app(state: ServerState) -> web.Application:
    """The application. Run it with ``handler_cancellation=True``, or clients that leave go unnoticed."""
    app = web.Application(middlewares=[_envelope, _authorise], client_max_size=MAX_BODY)
    app[STATE] = state
    app.on_response_prepare.append(_sign)
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat_completions),
            web.post("/v1/completions", completions),
            web.get("/v1/models", list_models),
            web.get("/v1/models/{id:.+}", show_model),
            web.get("/health", health),
            web.get("/ready", ready),
            web.get("/version", show_version),
        ]
    )
    return app


# --- handlers -----------------------------------------------------------------------------------------------


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions"""
    arrival = time.perf_counter()
    serving = request.app[STATE].ready()
    body = await _json_body(request)
    call = protocol.decode_chat(body)
    _note_unknown_fields(request, serving, protocol.unknown_fields(body, call))
    name = serving.check_model(call.model)
    with serving.runner.admit(call.num_choices):
        requests = await _in_thread(serving, lambda: serving.preparer.chat(call))
        return await _answer(request, serving, call, requests, ChatForm(call.offers_tools), name, arrival)


async def completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/completions"""
    arrival = time.perf_counter()
    serving = request.app[STATE].ready()
    body = await _json_body(request)
    call = protocol.decode_completion(body)
    _note_unknown_fields(request, serving, protocol.unknown_fields(body, call))
    name = serving.check_model(call.model)
    with serving.runner.admit(len(protocol.prompts(call)) * call.num_choices):
        requests = await _in_thread(serving, lambda: serving.preparer.completion(call))
        return await _answer(request, serving, call, requests, TextForm(), name, arrival)


async def list_models(request: web.Request) -> web.Response:
    """GET /v1/models"""
    return faults.json_response(ModelList(request.app[STATE].alive().cards()))


async def show_model(request: web.Request) -> web.Response:
    """GET /v1/models/{id}"""
    serving = request.app[STATE].alive()
    name = serving.check_model(request.match_info["id"])
    return faults.json_response(next(card for card in serving.cards() if card.id == name))


async def health(request: web.Request) -> web.Response:
    """GET /health: 503 while the model loads and once the engine is dead or stuck; 200 otherwise, draining
    too."""
    request.app[STATE].alive()
    return faults.json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """GET /ready: 200 if a request sent now would be taken."""
    request.app[STATE].ready()
    return faults.json_response({"status": "ready"})


async def show_version(request: web.Request) -> web.Response:
    """GET /version"""
    return faults.json_response({"version": version()})


async def _json_body(request: web.Request) -> bytes:
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise RequestError("compressed bodies are not accepted", None, "unsupported_media_type")
    if request.content_type != "application/json":
        raise RequestError(
            f"the content type is {request.content_type[:60]!r}, expected 'application/json'",
            None,
            "unsupported_media_type",
        )
    return await request.read()


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


async def _in_thread(serving: Serving, work: Callable[[], list[Request]]) -> list[Request]:
    return await asyncio.get_running_loop().run_in_executor(serving.threads, work)


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
        serving.runner, serving.served, requests, call.num_choices, form, name, arrival
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
    """Name the request; turn every error into OpenAI's shape."""
    given = request.headers.get("X-Request-Id", "")
    request[_ID] = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    try:
        return await handler(request)
    except EngineError as error:
        log.debug("%s %s: %s", request[_ID], request.rel_url.raw_path, error)
        return faults.response_of(error)
    except web.HTTPException as error:
        return faults.response_of_http(error)
    except (ClientGoneError, asyncio.CancelledError):
        log.info("%s %s: 499, the client left", request[_ID], request.rel_url.raw_path)
        raise
    except Exception:
        log.exception("%s %s failed", request[_ID], request.rel_url.raw_path)
        return faults.json_response(faults.internal_error(request[_ID]), 500)


@web.middleware
async def _authorise(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse whoever has none of the keys; compares hashes in constant time, all of them."""
    keys = request.app[STATE].options.api_keys
    if keys and request.path not in _OPEN_ROUTES:
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys]
        if kind.lower() != "bearer" or not any(matches):
            raise RequestError(
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                None,
                "invalid_api_key",
            )
    return await handler(request)


async def _sign(request: web.Request, response: web.StreamResponse) -> None:
    """Every response says which request it belongs to, and not which library sent it."""
    response.headers["X-Request-Id"] = request.get(_ID, "-")
    response.headers["Server"] = "haast"
