"""A small client of the HTTP API, for the verbs that talk to a server."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
from aiohttp.http import HttpProcessingError

from engine.errors import ConfigError, EngineError
from engine.text.output_parser import Event, ReasoningDelta, TextDelta, ToolCallArguments, ToolCallStart

_MAX_LINE = 4 << 20  # bytes of one event


CHAT = "v1/chat/completions"  # paths have no slash in front: a URL may have a path of its own
COMPLETIONS = "v1/completions"
_MODELS = "v1/models"


class ServerError(EngineError):
    """The server refused, failed or could not be reached. status: of its answer, if there was one."""

    code = "server_error"

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class UnreachableError(ServerError):
    """No connection could be made: nothing listens there, or nothing answers."""

    code = "server_unreachable"


@dataclass(slots=True)
class StreamedAnswer:
    """One streamed answer as the client saw it; times in seconds since the request was sent."""

    text: str = ""
    finish_reason: str | None = None
    first_at: float | None = None
    last_at: float | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        count: int = self.usage.get("completion_tokens", 0)
        return count

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first."""
        if self.first_at is None or self.last_at is None or self.num_tokens < 2:
            return None
        return (self.last_at - self.first_at) / (self.num_tokens - 1)

    @property
    def acceptance_length(self) -> float | None:
        """The server's mean tokens per speculative step."""
        speculation = self.metrics.get("speculative_decoding") or {}
        return speculation.get("mean_acceptance_length")


def session(
    url: str, api_key: str | None = None, headers: Mapping[str, str] | None = None
) -> aiohttp.ClientSession:
    """A session for a server at ``url`` (with or without a trailing /v1); answers may take as long as they
    like, and as many requests as wanted may run at once: none waits here for another. Raises ConfigError."""
    if not re.match(r"https?://[^/@]+(/[^@]*)?$", url):  # a password in a URL would end up in results
        raise ConfigError(f"the server's URL is {url!r}, expected http://HOST:PORT or https://HOST")
    base = url.rstrip("/").removesuffix("/v1") + "/"
    sent = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return aiohttp.ClientSession(
        base,
        connector=aiohttp.TCPConnector(limit=0),
        headers={**sent, **(headers or {})},
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
        read_bufsize=_MAX_LINE,
    )


async def stream_chat(
    http: aiohttp.ClientSession, body: Mapping[str, object], show: Callable[[Event], object]
) -> StreamedAnswer:
    """Stream one chat answer; ``show`` gets each piece of it as it arrives. Raises ServerError."""
    return await stream_answer(http, CHAT, body, show)


async def stream_answer(
    http: aiohttp.ClientSession, path: str, body: Mapping[str, object], show: Callable[[Event], object]
) -> StreamedAnswer:
    """The same for either kind of answer; path: CHAT or COMPLETIONS."""
    answer = StreamedAnswer()
    sent = time.perf_counter()
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with aclosing(stream_data(http, path, body)) as events:
        async for data in events:
            now = time.perf_counter() - sent
            event = _event(data)
            answer.usage = event.get("usage") or answer.usage
            answer.metrics = event.get("metrics") or answer.metrics
            for choice in event.get("choices", ()):
                answer.first_at = now if answer.first_at is None else answer.first_at
                answer.last_at = now
                answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                for piece in _pieces(choice):
                    answer.events.append(piece)
                    if isinstance(piece, TextDelta):
                        answer.text += piece.text
                    show(piece)
    if answer.finish_reason is None:
        raise ServerError("the server ended the stream without a finish reason")
    return answer


def _pieces(choice: Mapping[str, Any]) -> Iterator[Event]:
    """What one event brings to an answer, as the server's own parser would tell it."""
    delta = choice.get("delta") or {}
    if choice.get("text"):
        yield TextDelta(choice["text"])
    if delta.get("reasoning_content"):
        yield ReasoningDelta(delta["reasoning_content"])
    if delta.get("content"):
        yield TextDelta(delta["content"])
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        if call.get("id"):
            yield ToolCallStart(call["index"], call["id"], function.get("name") or "")
        if function.get("arguments"):
            yield ToolCallArguments(call["index"], function["arguments"])


def _event(data: bytes) -> dict[str, Any]:
    try:
        event: dict[str, Any] = msgspec.json.decode(data, type=dict)
    except msgspec.DecodeError as error:
        raise ServerError(f"the server sent something that is not JSON: {error}") from error
    if "error" in event:
        raise ServerError(f"the server failed: {error_message(data)}")
    return event


async def stream_data(
    http: aiohttp.ClientSession, path: str, body: Mapping[str, object]
) -> AsyncGenerator[bytes, None]:
    """The data of each event of a stream up to its end mark, or up to its end if there is no mark.

    Raises ServerError when the server refuses or goes away.
    """
    content = msgspec.json.encode(body)
    try:
        async with http.post(path, data=content, headers={"Content-Type": "application/json"}) as response:
            await _check_status(response)
            async for line in response.content:
                if not line.startswith(b"data:"):
                    continue  # blank lines and keep-alive comments
                data = line[len(b"data:") :].strip()
                if data == b"[DONE]":
                    return
                yield data
    except _TRANSPORT_ERRORS as error:
        raise _unavailable(error) from error


async def model_names(http: aiohttp.ClientSession) -> list[str]:
    """What the server calls its models, the main one first. Raises ServerError."""
    try:
        async with http.get(_MODELS) as response:
            await _check_status(response)
            body = await response.read()
    except _TRANSPORT_ERRORS as error:
        raise _unavailable(error) from error
    try:
        return [model.id for model in msgspec.json.decode(body, type=_Models).data]
    except msgspec.DecodeError as error:
        raise ServerError(f"GET {_MODELS}: found something that is no list of models: {error}") from error


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


_TRANSPORT_ERRORS = (aiohttp.ClientError, HttpProcessingError, TimeoutError)


async def _check_status(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        message = error_message(await response.read())
        raise ServerError(f"the server answered {response.status}: {message}", response.status)


def _unavailable(error: Exception) -> ServerError:
    reason = str(error) or type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return UnreachableError(f"the server cannot be reached: {reason}")
    return ServerError(f"the server went away: {reason}")


def error_message(body: bytes) -> str:
    """The message of an error object, or the beginning of whatever else was sent."""
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return body[:300].decode("utf-8", "replace") or "(nothing)"
