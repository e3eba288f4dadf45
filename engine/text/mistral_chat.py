"""Messages, tools and reasoning effort -> token ids, in the format that Mistral Small 4 was trained on.

mistral-common does the work; it is the model's own reference:

    <s> [SYSTEM_PROMPT]..[/SYSTEM_PROMPT]                               if there is a system message
        [AVAILABLE_TOOLS][{"type": ..}, ..][/AVAILABLE_TOOLS]           if there are tools
        [MODEL_SETTINGS]{"reasoning_effort": "none"}[/MODEL_SETTINGS]   always
        [INST]user[/INST]
        [THINK]..[/THINK]text[TOOL_CALLS]name[ARGS]{..}</s>             the assistant's turn, any part absent
        [TOOL_RESULTS]..[/TOOL_RESULTS]                                 in the order of the calls

Every piece of a message is encoded on its own and as plain text, so no content can forge a control token. No
system prompt is added: the Hugging Face template of the same model adds one of 545 tokens, we do not.

What is done here is the edge. Images and audio are refused before mistral-common, which would fetch an image
from wherever the client says. What it finds wrong becomes a RequestError that names the field. Its validator
for serving also demands what a client may forget: every tool call is answered, and the last turn is not the
assistant's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.errors import RequestError
from engine.text.mistral import MistralTokenizer, check_unicode

if TYPE_CHECKING:
    from mistral_common.protocol.instruct.messages import ChatMessage
    from mistral_common.protocol.instruct.tool_calls import Tool

_PARTS = ("text", "thinking")
_REASONING = ("reasoning_content", "reasoning")
# what mistral-common raises on data of the wrong shape, besides its own exceptions (pydantic's: ValueError)
_SHAPE_ERRORS = (ValueError, TypeError, LookupError, AttributeError, AssertionError, RecursionError)


def encode_chat(
    tokenizer: MistralTokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    reasoning_effort: str | None = None,
) -> list[int]:
    """Token ids of a conversation, <s> included, ready for the model to answer.

    messages and tools: as in OpenAI's chat API. Content is a text or a list of parts, of type "text" or, in
    an assistant's turn, "thinking"; an earlier turn's thoughts may also come as ``reasoning_content`` (or
    ``reasoning``) and are encoded before its content. Keys of a message that we do not know are ignored.
    A function's ``strict`` has no effect on the tokens.
    reasoning_effort: None is the model's own default.

    Raises RequestError naming the field, as in ``messages[1].content[0].type``.
    """
    known = tools or ()
    _check_effort(tokenizer, reasoning_effort)
    if not messages:
        raise RequestError("found no messages, expected at least one", "messages")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")
    for index, tool in enumerate(known):
        _check_strings(tool, f"tools[{index}]")
    return _encode(tokenizer, messages, known, reasoning_effort)


def _check_effort(tokenizer: MistralTokenizer, effort: str | None) -> None:
    if effort is not None and effort not in tokenizer.reasoning_efforts:
        known = ", ".join(map(repr, tokenizer.reasoning_efforts)) or "only without it"
        raise RequestError(
            f"reasoning_effort is {effort!r:.80}, supported: {known}", "reasoning_effort", "unsupported_value"
        )


def _check_message(message: Mapping[str, Any], where: str) -> None:
    """Refuse what mistral-common must not see: parts that are no text, half surrogate pairs."""
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is a {type(message).__name__}, expected an object", where)
    _check_strings(message, where)
    content = message.get("content")
    for index, part in enumerate(content if isinstance(content, list | tuple) else ()):
        here = f"{where}.content[{index}]"
        if not isinstance(part, Mapping):
            raise RequestError(f"{here} is a {type(part).__name__}, expected an object", here)
        kind = part.get("type")
        if kind not in _PARTS:
            hint = "; images and audio are not served yet" if kind is not None else ""
            raise RequestError(
                f"{here}.type is {kind!r:.40}, supported: {', '.join(map(repr, _PARTS))}{hint}",
                f"{here}.type",
                "unsupported_value",
            )
        if not isinstance(part.get(kind), str):  # its text has the same name as its type
            raise RequestError(
                f"{here}.{kind} is {part.get(kind)!r:.40}, expected a string", f"{here}.{kind}"
            )


def _check_strings(value: Any, where: str) -> None:
    """Refuse half a surrogate pair anywhere, and nesting that no reader survives."""
    try:
        for text in _strings(value):
            check_unicode(text, where)
    except RecursionError as error:
        raise RequestError(f"{where} is nested too deeply", where) from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _encode(
    tokenizer: MistralTokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    effort: str | None,
) -> list[int]:
    """The crossing into mistral-common and back, with its errors translated."""
    from mistral_common.exceptions import (
        InvalidToolException,
        InvalidToolSchemaException,
        MistralCommonException,
    )
    from mistral_common.protocol.instruct.request import ChatCompletionRequest, ReasoningEffort

    turns = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    known = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    try:
        request: ChatCompletionRequest[Any] = ChatCompletionRequest(
            model="served",  # any name: the validator for serving wants one
            messages=turns,
            tools=known or None,
            reasoning_effort=None if effort is None else ReasoningEffort(effort),
        )
        ids: list[int] = tokenizer.common.encode_chat_completion(request).tokens
    except (InvalidToolException, InvalidToolSchemaException) as error:
        raise RequestError(f"tools: {error.message}", "tools") from error
    except MistralCommonException as error:
        raise RequestError(f"messages: {error.message}", "messages") from error
    except _SHAPE_ERRORS as error:
        raise RequestError(f"these messages cannot be encoded: {error!r:.200}", "messages") from error
    return ids


def _message(message: Mapping[str, Any], where: str) -> ChatMessage:
    from mistral_common.exceptions import MistralCommonException
    from mistral_common.protocol.instruct.converters import convert_openai_messages
    from mistral_common.protocol.instruct.tool_calls import ToolCall

    calls = message.get("tool_calls")
    for index, call in enumerate(calls if isinstance(calls, list) else ()):
        here = f"{where}.tool_calls[{index}]"
        try:
            ToolCall.from_openai(call)  # once more below, but here an error has its place
        except _SHAPE_ERRORS as error:
            raise _wrong_shape(error, call, here) from error
    # "" from a client that collected deltas is no thought; it would be encoded as an empty one
    given = {key: value for key, value in message.items() if value or key not in _REASONING}
    try:
        return convert_openai_messages([given])[0]
    except MistralCommonException as error:
        raise RequestError(f"{where}: {error.message}", where) from error
    except _SHAPE_ERRORS as error:
        raise _wrong_shape(error, given, where) from error


def _tool(tool: Mapping[str, Any], where: str) -> Tool:
    from mistral_common.protocol.instruct.tool_calls import Tool

    if not isinstance(tool, Mapping):
        raise RequestError(f"{where} is a {type(tool).__name__}, expected an object", where)
    try:
        return Tool.from_openai(dict(tool))
    except _SHAPE_ERRORS as error:
        raise _wrong_shape(error, tool, where) from error


def _wrong_shape(error: Exception, value: Any, where: str) -> RequestError:
    """The first complaint about ``value``, which is at ``where``. pydantic says which key, the others what
    they say."""
    from pydantic import ValidationError

    if isinstance(error, KeyError):
        return RequestError(f"{where}.{error.args[0]} is missing", f"{where}.{error.args[0]}")
    if not isinstance(error, ValidationError):
        return RequestError(f"{where}: {error}", where)
    first = error.errors()[0]
    steps = (("function",) if error.title == "Function" else ()) + first["loc"]  # validated before its tool
    for step in steps:
        if not isinstance(value, Mapping):
            break  # what follows are pydantic's names for the alternatives of a type
        where, value = f"{where}.{step}", value.get(step)
    return RequestError(f"{where}: {first['msg']}", where)
