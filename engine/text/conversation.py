"""Conversations -> token ids, for whichever kind of tokenizer the model has.

Two formats exist, and everybody who has messages comes here rather than to one of them:

    a vocabulary of tekken.json       mistral-common's code     engine.text.mistral_chat
    a vocabulary with a template      the checkpoint's jinja    engine.text.chat

Messages have the shape of OpenAI's chat API. Mistral's format takes all of it. A template gets roles and
texts only, for that is what every template was written for; tools, their results and reasoning_effort are
refused by the name of their field. What an earlier turn thought is dropped there, as templates do themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import msgspec

from engine.errors import RequestError
from engine.text.chat import render_chat
from engine.text.mistral import MistralTokenizer
from engine.text.mistral_chat import encode_chat
from engine.text.tokenizer import Tokenizer

Message = Mapping[str, Any]


class AnyTokenizer(Protocol):
    """What the engine needs of a model's tokenizer; ``Tokenizer`` and ``MistralTokenizer`` are the kinds."""

    @property
    def vocab_size(self) -> int:
        """Ids are less than this."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Ids of control tokens by their names."""
        ...

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Token ids of a text; with ``add_bos`` as the model expects texts to begin. Raises RequestError."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of some tokens, U+FFFD for what is no UTF-8."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of a token; none for special tokens and for ids past the vocabulary."""
        ...

    def token_text(self, token_id: int) -> str | None:
        """The token as text, special tokens by name; None for an unused id."""
        ...


def conversation_ids(
    tokenizer: AnyTokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | None = None,
    reasoning_effort: str | None = None,
) -> list[int]:
    """Token ids of a conversation, ready for the model to answer.

    messages, tools: as in OpenAI's chat API. tool_choice: "auto" or None keep the tools, "none" drops them.
    reasoning_effort: None is the model's own default.

    Raises RequestError naming the field, also for what the model's format has no place for.
    """
    if isinstance(tokenizer, MistralTokenizer):
        return encode_chat(
            tokenizer, messages, tools=tools, tool_choice=tool_choice, reasoning_effort=reasoning_effort
        )
    _refuse_tools(tools if tool_choice != "none" else None)
    if reasoning_effort is not None:
        raise _no_place("reasoning_effort", "reasoning_effort")
    return render_chat(cast(Tokenizer, tokenizer), _plain(messages))  # the kind that has a template


def conversation_size(
    tokenizer: AnyTokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
) -> int:
    """UTF-8 bytes of everything that will be tokens, tools as JSON, for a cheap bound before encoding.

    Raises RequestError for what the model's format has no place for.
    """
    if not isinstance(tokenizer, MistralTokenizer):
        _refuse_tools(tools)
        return sum(len(message["content"].encode()) for message in _plain(messages))
    size = sum(len(text.encode()) for message in messages for text in _texts(message))
    return size + len(msgspec.json.encode(tools)) if tools else size


def _refuse_tools(tools: Sequence[Mapping[str, Any]] | None) -> None:
    if tools:
        raise _no_place("tools", "tools")


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as templates know them: role and text. Parts are joined by line breaks; 'developer' is
    'system'."""
    plain = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message["role"] == "tool":
            raise _no_place("messages of role 'tool'", f"{where}.role")
        if message.get("tool_calls"):
            raise _no_place("tool_calls", f"{where}.tool_calls")
        content = message.get("content")
        if content is None:
            raise RequestError(f"{where}.content is null, this model needs a text", f"{where}.content")
        role = "system" if message["role"] == "developer" else message["role"]
        plain.append({"role": role, "content": _plain_content(content, f"{where}.content")})
    return plain


def _plain_content(content: str | Sequence[Mapping[str, Any]], where: str) -> str:
    if isinstance(content, str):
        return content
    for index, part in enumerate(content):
        if part["type"] != "text":
            raise _no_place(f"content parts of type {part['type']!r:.40}", f"{where}[{index}].type")
    return "\n".join(part["text"] for part in content)


def _texts(message: Message) -> Iterable[str]:
    """Every text of a message that Mistral's format has a place for."""
    content = message.get("content") or ""
    if isinstance(content, str):
        yield content
    else:
        for part in content:
            yield part[part["type"]]  # its text has the same name as its type
    yield message.get("reasoning_content") or message.get("reasoning") or ""
    for call in message.get("tool_calls") or ():
        yield call["function"]["name"]
        yield call["function"]["arguments"]


def _no_place(what: str, param: str) -> RequestError:
    return RequestError(
        f"{what}: this model's chat template does not support it; leave it out",
        param,
        "unsupported_parameter",
    )
