"""What the server sends: OpenAI's response objects, plus ``metrics`` under vLLM's name.

``Form`` hides the difference between chat and plain completions: handlers ask it for chunks and whole
answers. The events of one step, or of several that a slow reader gets at once, share one chunk: a reader adds
up each field on its own, so the order between fields does not matter.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET, Struct, UnsetType

from engine.server.logprobs import ChatSpeller, Logprobs, Speller, TextSpeller
from engine.server.metrics import Metrics
from engine.server.output import Reading, text_of
from engine.text.conversation import AnyTokenizer
from engine.text.output_parser import (
    Answer,
    Event,
    ReasoningDelta,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
)

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


class PromptTokensDetails(Struct):
    """``cached_tokens`` of the prompt were not computed: the prefix cache had their rows."""

    cached_tokens: int


class Usage(Struct):
    """Tokens of a request; the end-of-text token counts as a completion token. Details are left out where
    prefix caching is off."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET


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


class StatusReply(Struct):
    """``status`` is "ok" or "ready"; everything else is an error."""

    status: str


class VersionReply(Struct):
    """Of the installed distribution."""

    version: str


class CalledFunction(Struct):
    """``arguments`` should be a JSON object, but are what the model wrote."""

    name: str
    arguments: str


class CalledTool(Struct):
    """A complete tool call."""

    id: str
    function: CalledFunction
    type: str = "function"

    @classmethod
    def of(cls, call: ToolCall) -> CalledTool:
        return cls(call.id, CalledFunction(call.name, call.arguments))


class ChatMessage(Struct):
    """A complete answer. Content is null if there is none but reasoning or calls."""

    content: str | None
    role: str = "assistant"
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CalledTool] | UnsetType = UNSET


class FunctionDelta(Struct, omit_defaults=True):
    """A piece of the arguments; the name comes with the first."""

    arguments: str
    name: str | None = None


class ToolCallDelta(Struct, omit_defaults=True):
    """The growth of call ``index`` of an answer; id and type come with its first piece."""

    index: int
    function: FunctionDelta
    id: str | None = None
    type: str | None = None


class ChatDelta(Struct, omit_defaults=True):
    """The growth of an answer; the role comes with the first piece only."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChoice(Struct):
    """One complete chat answer."""

    index: int
    message: ChatMessage
    finish_reason: str
    logprobs: Logprobs | None = None
    token_ids: list[int] | UnsetType = UNSET  # if asked for


class ChatChunkChoice(Struct):
    """One step of a chat answer."""

    index: int
    delta: ChatDelta
    finish_reason: str | None
    logprobs: Logprobs | None = None
    token_ids: list[int] | UnsetType = UNSET  # if asked for


class TextChoice(Struct):
    """A completion, whole or one step of it."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: Logprobs | None = None
    token_ids: list[int] | UnsetType = UNSET  # if asked for
    prompt_token_ids: list[int] | UnsetType = UNSET


Choice = ChatChoice | ChatChunkChoice | TextChoice


class Reply(Struct, kw_only=True):
    """A whole response or one event of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[Choice]
    usage: Usage | UnsetType = UNSET
    metrics: Metrics | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET  # of chat, if asked for


class Form(Protocol):
    """How one endpoint dresses its answers."""

    prefix: str
    whole_object: str
    chunk_object: str
    reading: Reading

    def piece(
        self,
        index: int,
        events: Sequence[Event],
        is_first: bool,
        finish_reason: str | None,
        logprobs: Logprobs | None,
    ) -> Choice:
        """The growth of answer ``index``."""
        ...

    def speller(self, tokenizer: AnyTokenizer) -> Speller:
        """What shapes the log-probabilities of one answer."""
        ...

    def whole(self, index: int, answer: Answer, finish_reason: str, logprobs: Logprobs | None) -> Choice:
        """A complete answer."""
        ...


class ChatForm:
    """POST /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, offers_tools: bool) -> None:
        self.reading = Reading.of_chat(offers_tools)

    def speller(self, tokenizer: AnyTokenizer) -> Speller:
        return ChatSpeller(tokenizer)

    def piece(
        self,
        index: int,
        events: Sequence[Event],
        is_first: bool,
        finish_reason: str | None,
        logprobs: Logprobs | None,
    ) -> Choice:
        text = text_of(events)
        delta = ChatDelta(
            role="assistant" if is_first else None,
            content=text if text or (is_first and not events) else None,
            reasoning_content="".join(event.text for event in events if isinstance(event, ReasoningDelta))
            or None,
            tool_calls=_call_deltas(events) or None,
        )
        return ChatChunkChoice(index, delta, finish_reason, logprobs)

    def whole(self, index: int, answer: Answer, finish_reason: str, logprobs: Logprobs | None) -> Choice:
        message = ChatMessage(
            content=answer.text if answer.text or not (answer.reasoning or answer.calls) else None,
            reasoning_content=answer.reasoning or UNSET,
            tool_calls=[CalledTool.of(call) for call in answer.calls] or UNSET,
        )
        return ChatChoice(index, message, finish_reason, logprobs)


class TextForm:
    """POST /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"
    reading = Reading.TEXT

    def speller(self, tokenizer: AnyTokenizer) -> Speller:
        return TextSpeller(tokenizer)

    def piece(
        self,
        index: int,
        events: Sequence[Event],
        is_first: bool,
        finish_reason: str | None,
        logprobs: Logprobs | None,
    ) -> Choice:
        return TextChoice(index, text_of(events), finish_reason, logprobs)

    def whole(self, index: int, answer: Answer, finish_reason: str, logprobs: Logprobs | None) -> Choice:
        return TextChoice(index, answer.text, finish_reason, logprobs)


def _call_deltas(events: Iterable[Event]) -> list[ToolCallDelta]:
    """The growth of calls, one entry for each call that grew."""
    deltas: dict[int, ToolCallDelta] = {}
    for event in events:
        match event:
            case ToolCallStart(index, identity, name):
                deltas[index] = ToolCallDelta(index, FunctionDelta("", name), identity, "function")
            case ToolCallArguments(index, text):
                delta = deltas.setdefault(index, ToolCallDelta(index, FunctionDelta("")))
                delta.function.arguments += text
    return list(deltas.values())


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
