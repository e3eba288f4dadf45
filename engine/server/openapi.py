"""The OpenAPI 3.1 document of the API, made from the types that requests are decoded into and answers from.

Types, ranges and lengths are therefore those that are checked. What only code checks (which fields exclude
each other, what the model has room for) is not in it: such a request gets 400.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec

from engine.server import protocol, replies, tokens
from engine.server.access import OPEN_ROUTES
from engine.server.logprobs import ChatLogprobs, TextLogprobs

_REFUSALS = {
    400: "The request is wrong; the error's param says where",
    401: "The API key is missing or wrong",
    403: "The server may not be called by this host name",
    404: "No such model",
    408: "The body does not arrive",
    413: "The body is too large",
    415: "The body is not plain application/json",
    500: "A mistake of the server's",
    503: "Starting, draining, full, stalled or dead: the error's code says which",
}
_OF_BODIES = (400, 404, 408, 413, 415)  # only where there is one


class ChatAnswer(replies.ChatChoice):
    """One of the answers, with log-probabilities as chat has them."""

    logprobs: ChatLogprobs | None = None


class TextAnswer(replies.TextChoice):
    """One of the answers, with log-probabilities as completions have them."""

    logprobs: TextLogprobs | None = None


class ChatCompletion(replies.Reply, kw_only=True):
    """A whole chat answer."""

    choices: list[ChatAnswer]


class Completion(replies.Reply, kw_only=True):
    """A whole completion, or several."""

    choices: list[TextAnswer]


@dataclass(frozen=True, slots=True)
class Operation:
    """One route. answer: a type, or the media type of what is no JSON."""

    method: str
    path: str
    summary: str
    answer: Any
    body: Any = None
    streams: bool = False


OPERATIONS = (
    Operation(
        "post", "/v1/chat/completions", "Answer a conversation", ChatCompletion, protocol.ChatRequest, True
    ),
    Operation("post", "/v1/completions", "Go on with texts", Completion, protocol.CompletionRequest, True),
    Operation("get", "/v1/models", "The models served", replies.ModelList),
    Operation("get", "/v1/models/{id}", "One of them", replies.ModelCard),
    Operation("post", "/tokenize", "Tokens of a text", tokens.TokenizeReply, tokens.TokenizeRequest),
    Operation("post", "/detokenize", "Text of tokens", tokens.DetokenizeReply, tokens.DetokenizeRequest),
    Operation("get", "/health", "Whether the engine works", replies.StatusReply),
    Operation("get", "/ready", "Whether a request would be taken", replies.StatusReply),
    Operation("get", "/version", "The version", replies.VersionReply),
    Operation("get", "/server_info", "Sizes, defaults and limits", dict[str, Any]),
    Operation("get", "/metrics", "Metrics for Prometheus", "text/plain"),
    Operation("get", "/openapi.json", "This document", dict[str, Any]),
)


@cache
def document(version: str) -> dict[str, Any]:
    """The document, as JSON's types."""
    bodies = [operation.body for operation in OPERATIONS if operation.body is not None]
    answers = [operation.answer for operation in OPERATIONS if not isinstance(operation.answer, str)]
    kinds = [*bodies, *answers, replies.ErrorReply]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(map(str, kinds), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "haast",
            "version": version,
            "description": "OpenAI's API, answered with speculative decoding.",
        },
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(operation: Operation, schema_of: dict[str, Any]) -> dict[str, Any]:
    answer = operation.answer
    if isinstance(answer, str):
        content: dict[str, Any] = {answer: {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": schema_of[str(answer)]}}
    if operation.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    error = {"application/json": {"schema": schema_of[str(replies.ErrorReply)]}}
    found: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": operation.path.strip("/").replace("/", "_").replace("{id}", "one").replace(".", "_"),
        "responses": {"200": {"description": "The answer", "content": content}}
        | {
            str(status): {"description": why, "content": error}
            for status, why in _REFUSALS.items()
            if operation.body is not None or status not in _OF_BODIES or "{" in operation.path
        },
    }
    if operation.path in OPEN_ROUTES:
        found["security"] = [{}]
    if operation.body is not None:
        body = {"application/json": {"schema": schema_of[str(operation.body)]}}
        found["requestBody"] = {"required": True, "content": body}
    if "{id}" in operation.path:
        found["parameters"] = [
            {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    return found
