"""What the server sends: OpenAI's response objects, plus ``metrics`` under vLLM's name.

``Form`` hides the difference between chat and plain completions: handlers ask it for chunks and whole
answers.
"""

from __future__ import annotations

import time
import uuid
from typing import Protocol

import msgspec
from msgspec import UNSET, Struct, UnsetType

from engine.server.metrics import Metrics

encoder = msgspec.json.Encoder()


class ErrorBody(Struct):
    """OpenAI's error object; ``code`` is a stable string or null."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Struct):
    """The envelope of every error, in responses and in streams."""

    error: ErrorBody


class Usage(Struct):
    """Tokens of a request; the end-of-text token counts as a completion token."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ModelCard(Struct, kw_only=True):
    """An entry of /v1/models. ``root`` is the path or package the weights came from."""

    id: str
    root: str
    max_model_len: int
    created: int
    object: str = "model"
    owned_by: str = "haast"
    parent: str | None = None


class ModelList(Struct):
    """Answer of /v1/models."""

    data: list[ModelCard]
    object: str = "list"


class ChatMessage(Struct):
    """A complete answer."""

    content: str
    role: str = "assistant"


class ChatDelta(Struct, omit_defaults=True):
    """The growth of an answer; the role comes with the first piece only."""

    role: str | None = None
    content: str | None = None


class ChatChoice(Struct):
    """One complete chat answer."""

    index: int
    message: ChatMessage
    finish_reason: str
    logprobs: None = None


class ChatChunkChoice(Struct):
    """One step of a chat answer."""

    index: int
    delta: ChatDelta
    finish_reason: str | None
    logprobs: None = None


class TextChoice(Struct):
    """A completion, whole or one step of it."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: None = None


Choice = ChatChoice | ChatChunkChoice | TextChoice


class Reply(Struct, kw_only=True):
    """A whole response or one event of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | UnsetType = UNSET
    metrics: Metrics | UnsetType = UNSET


class Form(Protocol):
    """How one endpoint dresses its answers."""

    prefix: str
    whole_object: str
    chunk_object: str

    def piece(self, index: int, text: str, is_first: bool, finish_reason: str | None) -> Choice:
        """One step of answer ``index``."""
        ...

    def whole(self, index: int, text: str, finish_reason: str) -> Choice:
        """A complete answer."""
        ...


class ChatForm:
    """POST /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def piece(self, index: int, text: str, is_first: bool, finish_reason: str | None) -> Choice:
        delta = ChatDelta(role="assistant" if is_first else None, content=text if text or is_first else None)
        return ChatChunkChoice(index, delta, finish_reason)

    def whole(self, index: int, text: str, finish_reason: str) -> Choice:
        return ChatChoice(index, ChatMessage(text), finish_reason)


class TextForm:
    """POST /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def piece(self, index: int, text: str, is_first: bool, finish_reason: str | None) -> Choice:
        return TextChoice(index, text, finish_reason)

    def whole(self, index: int, text: str, finish_reason: str) -> Choice:
        return TextChoice(index, text, finish_reason)


class Envelope:
    """What all objects of one response have in common."""

    def __init__(self, form: Form, model: str) -> None:
        self.form, self.model = form, model
        self.id = form.prefix + uuid.uuid4().hex
        self.created = int(time.time())

    def chunk(
        self, choices: list[Choice], usage: Usage | UnsetType = UNSET, metrics: Metrics | UnsetType = UNSET
    ) -> Reply:
        """One event of a stream."""
        return Reply(
            id=self.id,
            object=self.form.chunk_object,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage,
            metrics=metrics,
        )

    def answer(self, choices: list[Choice], usage: Usage, metrics: Metrics) -> Reply:
        """The whole response."""
        return Reply(
            id=self.id,
            object=self.form.whole_object,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage,
            metrics=metrics,
        )
