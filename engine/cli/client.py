"""A small client of the HTTP API, for the verbs that talk to a server."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from engine.errors import EngineError
from engine.text.output_parser import Event, ReasoningDelta, TextDelta, ToolCallArguments, ToolCallStart

_MAX_LINE = 4 << 20  # bytes of one event


class ServerError(EngineError):
    """The server refused, failed or could not be reached."""

    code = "server_error"


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


def session(url: str, api_key: str | None = None) -> aiohttp.ClientSession:
    """A session for a server at ``url`` (with or without a trailing /v1); answers may take as long as they
    like."""
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    return aiohttp.ClientSession(base, headers=headers, timeout=timeout, read_bufsize=_MAX_LINE)


async def stream_chat(
    http: aiohttp.ClientSession, body: Mapping[str, object], show: Callable[[Event], object]
) -> StreamedAnswer:
    """Stream one chat answer; ``show`` gets each piece of it as it arrives. Raises ServerError."""
    answer = StreamedAnswer()
    sent = time.perf_counter()
    async for event in _events(http, {**body, "stream": True, "stream_options": {"include_usage": True}}):
        now = time.perf_counter() - sent
        answer.usage = event.get("usage") or answer.usage
        answer.metrics = event.get("metrics") or answer.metrics
        for choice in event.get("choices", ()):
            answer.first_at = now if answer.first_at is None else answer.first_at
            answer.last_at = now
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
            for piece in _pieces(choice.get("delta", {})):
                answer.events.append(piece)
                if isinstance(piece, TextDelta):
                    answer.text += piece.text
                show(piece)
    if answer.finish_reason is None:
        raise ServerError("the server ended the stream without a finish reason")
    return answer


def _pieces(delta: Mapping[str, Any]) -> Iterator[Event]:
    """What one delta brings, as the server's own parser would tell it."""
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


async def _events(http: aiohttp.ClientSession, body: Mapping[str, object]) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream up to its end mark. Raises ServerError, also for an error event."""
    content = msgspec.json.encode(body)
    headers = {"Content-Type": "application/json"}
    try:
        async with http.post("/v1/chat/completions", data=content, headers=headers) as response:
            if response.status != 200:
                raise ServerError(f"the server answered {response.status}: {_message(await response.read())}")
            async for line in response.content:
                if not line.startswith(b"data:"):
                    continue  # blank lines and keep-alive comments
                data = line[len(b"data:") :].strip()
                if data == b"[DONE]":
                    return
                event = msgspec.json.decode(data)
                if "error" in event:
                    raise ServerError(f"the server failed: {_message(data)}")
                yield event
    except (aiohttp.ClientError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        raise ServerError(f"the server cannot be reached or went away: {reason}") from error
    except msgspec.DecodeError as error:
        raise ServerError(f"the server sent something that is not JSON: {error}") from error
    raise ServerError("the server closed the stream before its end")


def _message(body: bytes) -> str:
    """The message of an error object, or the beginning of whatever else was sent."""
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return body[:300].decode("utf-8", "replace") or "(nothing)"
