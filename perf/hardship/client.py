"""Questions and their answers, whole or streamed, as the wire has them.

Unlike ``engine.cli.client`` this keeps what a refusal says, header and all, and every answer of several: an
answer is judged here, not shown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from engine.cli.client import CHAT, COMPLETIONS

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """A request: its path (CHAT or COMPLETIONS) and its body, without ``stream``."""

    path: str
    body: Body
    kinds: tuple[str, ...] = ()  # of what it asks of the sampler

    def altered(self, **fields: object) -> Question:
        """The same with other fields."""
        return Question(self.path, self.body | fields, self.kinds)


@dataclass(slots=True)
class Said:
    """One of the answers to a question."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(slots=True)
class Outcome:
    """What became of a question. code: of the error that came instead of an answer, or in its middle.

    chunks: times of the pieces of a stream, in seconds of the loop's clock. has_ended: the end mark was seen,
    or the body was whole. num_drafted, num_accepted: draft tokens.
    """

    status: int = 0
    code: str | None = None
    retry_after: str | None = None
    answers: dict[int, Said] = field(default_factory=dict)
    chunks: list[float] = field(default_factory=list)
    has_ended: bool = False
    num_drafted: int = 0
    num_accepted: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether every answer came to its end, and the response too."""
        reasons = [said.finish_reason for said in self.answers.values()]
        return self.has_ended and self.code is None and bool(reasons) and None not in reasons

    @property
    def num_tokens(self) -> int:
        return sum(len(said.token_ids) for said in self.answers.values())

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first piece, of a stream of one answer of at least two pieces."""
        if len(self.answers) != 1 or len(self.chunks) < 2 or self.num_tokens < 2:
            return None
        return (self.chunks[-1] - self.chunks[0]) / (self.num_tokens - 1)


async def ask(http: aiohttp.ClientSession, question: Question, stream: bool) -> Outcome:
    """Ask and read to the end. A connection that breaks leaves an outcome that is not complete."""
    outcome = Outcome()
    content = msgspec.json.encode({**question.body, "return_token_ids": True, "stream": stream})
    headers = {"Content-Type": "application/json"}
    try:
        async with http.post(question.path, data=content, headers=headers) as response:
            outcome.status = response.status
            outcome.retry_after = response.headers.get("Retry-After")
            if response.status == 200 and stream:
                await _read_stream(outcome, response)
            else:
                _note(outcome, msgspec.json.decode(await response.read()))
                outcome.has_ended = True
    except (aiohttp.ClientError, msgspec.DecodeError):
        outcome.has_ended = False
    return outcome


async def _read_stream(outcome: Outcome, response: aiohttp.ClientResponse) -> None:
    clock = asyncio.get_running_loop().time
    async for line in response.content:
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:"):
            continue  # blank lines and keep-alive comments
        if outcome.has_ended:
            outcome.has_ended = False  # something came after the end mark
            return
        if data == b"[DONE]":
            outcome.has_ended = True
        else:
            outcome.chunks.append(clock())
            _note(outcome, msgspec.json.decode(data))


def _note(outcome: Outcome, event: Mapping[str, Any]) -> None:
    """Add a body, or an event of a stream, to an outcome."""
    if "error" in event:
        outcome.code = event["error"].get("code") or "unnamed"
    speculation = (event.get("metrics") or {}).get("speculative_decoding")
    if speculation is not None:
        outcome.num_drafted = speculation["num_draft_tokens"]
        outcome.num_accepted = speculation["num_accepted_draft_tokens"]
    for choice in event.get("choices", ()):
        said = outcome.answers.setdefault(choice["index"], Said())
        part = choice.get("delta") or choice.get("message") or {}
        said.text += choice.get("text") or part.get("content") or ""
        said.token_ids += choice.get("token_ids") or []
        said.finish_reason = choice.get("finish_reason") or said.finish_reason


def chat(prompt: str, **fields: object) -> Question:
    """A question to the chat endpoint."""
    return Question(CHAT, {"messages": [{"role": "user", "content": prompt}], **fields})


def completion(prompt: str, **fields: object) -> Question:
    """A question to the completions endpoint."""
    return Question(COMPLETIONS, {"prompt": prompt, **fields})
