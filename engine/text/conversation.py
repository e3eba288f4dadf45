"""Conversations -> token ids, for whichever kind of tokenizer the model has.

Two formats exist, and everybody who has messages comes here rather than to one of them:

    a vocabulary of tekken.json       mistral-common's code     engine.text.mistral_chat
    a vocabulary with a template      the checkpoint's jinja    engine.text.chat

Messages have the shape of OpenAI's chat API. Mistral's format takes all of it. A template gets roles and
texts, for that is what every template was written for; it gets tools, calls and results only if it shows
tools to the model and teaches the format that ``engine.text.hermes`` reads. Else these, and reasoning_effort
always, are refused by the name of their field. What an earlier turn thought is dropped there, as templates do
themselves.

The way back has two formats as well: what grammar holds an answer, and what reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import msgspec

from engine.errors import RequestError
from engine.text import hermes, mistral_grammar
from engine.text.chat import render_chat, template_reads
from engine.text.hermes import CallTextParser
from engine.text.mistral import MistralTokenizer
from engine.text.mistral_chat import encode_chat
from engine.text.output_parser import OutputParser
from engine.text.tokenizer import Tokenizer
from engine.text.tools import ToolUse

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
    def chat_template(self) -> str | None:
        """The checkpoint's jinja template; None where there is none, or the format is code."""
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
    reasoning_effort: str | None = None,
) -> list[int]:
    """Token ids of a conversation, ready for the model to answer.

    messages, tools: as in OpenAI's chat API. reasoning_effort: None is the model's own default.

    Raises RequestError naming the field, also for what the model's format has no place for.
    """
    if isinstance(tokenizer, MistralTokenizer):
        return encode_chat(tokenizer, messages, tools=tools, reasoning_effort=reasoning_effort)
    if reasoning_effort is not None:
        raise _no_place("reasoning_effort", "reasoning_effort")
    templated = cast(Tokenizer, tokenizer)
    return render_chat(templated, _for_template(tokenizer, messages, tools), tools=tools)


def conversation_size(
    tokenizer: AnyTokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
) -> int:
    """UTF-8 bytes of everything that will be tokens, tools as JSON, for a cheap bound before encoding.

    Raises RequestError for what the model's format has no place for.
    """
    if not isinstance(tokenizer, MistralTokenizer):
        messages = _for_template(tokenizer, messages, tools)
    size = sum(len(text.encode()) for message in messages for text in _texts(message))
    return size + len(msgspec.json.encode(tools)) if tools else size


def answer_grammar(tokenizer: AnyTokenizer, use: ToolUse | None, answer: str | None = None) -> str | None:
    """Lark grammar (llguidance's) that holds an answer to its format, to ``use`` of tools, and to ``answer``,
    a JSON schema of what is no call; one of the two is given.

    None if the format adds nothing to the JSON of ``answer``.
    """
    if isinstance(tokenizer, MistralTokenizer):
        return mistral_grammar.answer_grammar(tokenizer, use, answer)
    return None if use is None else hermes.answer_grammar(use, tokenizer.special_tokens, answer)


def answer_parser(
    tokenizer: AnyTokenizer, call_key: str, stop: tuple[str, ...] = (), tools: bool = False
) -> OutputParser | CallTextParser:
    """What reads the tokens of an answer. call_key: what ids of calls are made from, unique per answer;
    tools: whether the model was offered any. Raises RequestError for an empty stop string."""
    if tools and _writes_calls(tokenizer):
        return CallTextParser(tokenizer, call_key, stop)
    return OutputParser(tokenizer, call_key, stop, tools)


def _writes_calls(tokenizer: AnyTokenizer) -> bool:
    """Whether a chat template shows tools to the model and teaches it to call them as ``hermes`` reads it."""
    template = tokenizer.chat_template
    return template is not None and hermes.OPEN in template and template_reads(template, "tools")


def _for_template(
    tokenizer: AnyTokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Messages as templates know them: role and text, and with a template for tools the calls, whose
    arguments are objects there, and their results. Parts are joined by line breaks; 'developer' is
    'system'."""
    knows_calls = _writes_calls(tokenizer)
    if tools and not knows_calls:
        raise _no_place("tools", "tools")
    plain = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        calls = message.get("tool_calls")
        if message["role"] == "tool" and not knows_calls:
            raise _no_place("messages of role 'tool'", f"{where}.role")
        if calls and not knows_calls:
            raise _no_place("tool_calls", f"{where}.tool_calls")
        content = message.get("content")
        if content is None and not calls:
            raise RequestError(f"{where}.content is null, this model needs a text", f"{where}.content")
        role = "system" if message["role"] == "developer" else message["role"]
        turn = {"role": role, "content": _plain_content(content or "", f"{where}.content")}
        if calls:
            turn["tool_calls"] = [
                _plain_call(call, f"{where}.tool_calls[{number}].function")
                for number, call in enumerate(calls)
            ]
        if role == "tool":
            turn |= {key: message[key] for key in ("tool_call_id", "name") if message.get(key)}
        plain.append(turn)
    return plain


def _plain_call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A call with its arguments decoded, as templates encode them again."""
    function = call["function"]
    try:
        arguments = msgspec.json.decode(function["arguments"] or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(
            f"{where}.arguments: {error}; this model's chat template needs a JSON object",
            f"{where}.arguments",
        ) from error
    return {"id": call["id"], "type": "function", "function": {**function, "arguments": arguments}}


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
        arguments = call["function"]["arguments"]
        yield arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()


def _no_place(what: str, param: str) -> RequestError:
    return RequestError(
        f"{what}: this model's chat template does not support it; leave it out",
        param,
        "unsupported_parameter",
    )
