"""What clients may ask: typed requests, decoded and checked in one go.

A field that we know is checked for type and range while it is decoded; a field that we do not know is
ignored, as OpenAI's clients expect (``unknown_fields`` says which, for the log); a field that we know but do
not honour is refused when its value would change the answer. Every refusal is a RequestError that names the
field by its path in the client's JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import msgspec
from msgspec import Meta, Struct

from engine.core import SPECULATION_OFF, Speculation
from engine.errors import RequestError
from engine.server import sampling_fields
from engine.server.sampling_fields import NumLogprobs, SamplingFields
from engine.server.structured import (
    RENAMED,
    ResponseFormat,
    StructuredOutputs,
    Wanted,
    refuse_renamed,
    wanted,
)
from engine.server.tool_fields import MAX_TOOLS, ToolChoice, ToolSpec

MAX_PROMPTS = 16
MAX_MESSAGES = 4096
MAX_PARTS = 1024  # of one message
MAX_NESTING = 64
MAX_MESSAGE_LEN = 600  # characters of an error message: an answer must not amplify its question

Neutral = dict[str, tuple[object, ...]]

# Fields whose effect we do not implement yet, with the values that, like null, ask for nothing.
_NOT_HONOURED: Neutral = {
    "prompt_logprobs": (),
    "functions": ([],),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "audio": (),
    "use_beam_search": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
}
_NOT_HONOURED_IN_COMPLETIONS: Neutral = {"tools": ([],), "top_logprobs": (0,)}


class StreamOptions(Struct):
    """Usage on a last chunk of its own, or running usage on every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SpeculationOptions(Struct, forbid_unknown_fields=True):
    """The tree to draft for this request; what is not given is the server's default."""

    nodes: Annotated[int, Meta(ge=1, le=64)] | None = None
    depth: Annotated[int, Meta(ge=1, le=16)] | None = None
    top_k: Annotated[int, Meta(ge=1, le=16)] | None = None
    lookup: Annotated[int, Meta(ge=0, le=16)] | None = None


class ContentPart(Struct, omit_defaults=True):
    """A piece of a message: a text or, in an assistant's turn, a thought; either has the name of its type."""

    type: str
    text: str | None = None
    thinking: str | None = None


class FunctionCall(Struct):
    """What an assistant called; ``arguments`` should be a JSON object."""

    name: str
    arguments: str


class ToolCall(Struct):
    """A call in an earlier turn, which a message of role 'tool' answers by its id."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class Message(Struct, omit_defaults=True):
    """One turn of a conversation. ``reasoning`` is another name of ``reasoning_content``."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Meta(max_length=MAX_PARTS)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class GenerationRequest(SamplingFields, kw_only=True):
    """What both endpoints share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    speculation: Literal["off", "auto"] | SpeculationOptions | None = None
    cache_salt: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._~+/=:-]{1,128}\Z")] | None = None
    priority: Annotated[int, Meta(ge=-(1 << 31), lt=1 << 31)] | None = None
    return_token_ids: bool | None = None

    prompt_logprobs: Any = None
    response_format: ResponseFormat | None = None
    functions: Any = None
    echo: Any = None
    best_of: Any = None
    suffix: Any = None
    audio: Any = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    regex: Any = None
    ebnf: Any = None
    json_schema: Any = None
    use_beam_search: Any = None
    add_generation_prompt: Any = None
    continue_final_message: Any = None
    chat_template: Any = None

    @property
    def num_answers(self) -> int:
        """How many answers it asks for in all."""
        return self.num_choices


class ChatRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    tools: Annotated[list[ToolSpec], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offers_tools(self) -> bool:
        """Whether the model gets to see tools, and may call them."""
        return bool(self.tools) and self.tool_choice != "none"


class CompletionRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/completions. A prompt is text or token ids; a list of either asks for several
    answers."""

    prompt: str | list[str | int | list[int]]
    logprobs: NumLogprobs | None = None
    tools: Any = None
    top_logprobs: Any = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_answers(self) -> int:
        return len(prompts(self)) * self.num_choices


StructT = TypeVar("StructT", bound=Struct)
RequestT = TypeVar("RequestT", bound=GenerationRequest)


def decode_chat(body: bytes) -> ChatRequest:
    """Read a chat request. Raises RequestError naming the field."""
    return checked_chat(_decode(body, ChatRequest))


def checked_chat(call: ChatRequest) -> ChatRequest:
    """The call itself. Raises RequestError for what its types cannot say about conversation and tools."""
    if call.top_logprobs and not call.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
    for turn, message in enumerate(call.messages):
        _check_message(message, f"messages[{turn}]")
    return call


def decode_completion(body: bytes) -> CompletionRequest:
    """Read a completion request. Raises RequestError naming the field."""
    call = _decode(body, CompletionRequest)
    _check_neutral(call, _NOT_HONOURED_IN_COMPLETIONS)
    prompts(call)
    return call


def unknown_fields(body: bytes, call: GenerationRequest) -> list[str]:
    """The top-level fields of a body that its decoded ``call`` ignored, in the client's order.

    Raises RequestError for a name that is not UTF-8: decoding compares unknown names only as bytes.
    """
    try:
        given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])  # skips over the values
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error
    return [name for name in given if name not in call.__struct_fields__]


def prompts(call: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a request, each a text or a list of token ids. Raises RequestError on mixtures or too
    many."""
    prompt = call.prompt
    if isinstance(prompt, str):
        return [prompt]
    ids = [part for part in prompt if isinstance(part, int)]
    if ids:
        if len(ids) != len(prompt):
            raise RequestError("the prompt mixes token ids with other prompts", "prompt")
        return [ids]
    several: list[str | list[int]] = [part for part in prompt if not isinstance(part, int)]
    if not 1 <= len(several) <= MAX_PROMPTS:
        raise RequestError(f"found {len(several)} prompts, expected 1 to {MAX_PROMPTS}", "prompt")
    return several


def messages(call: ChatRequest) -> list[dict[str, Any]]:
    """The conversation in OpenAI's shape, without what is null and what we do not know."""
    found: list[dict[str, Any]] = msgspec.to_builtins(call.messages)
    return found


def grammar_of(call: GenerationRequest) -> Wanted | None:
    """What the answer must match, and which field says so; None for anything. Raises RequestError."""
    return wanted(call.response_format, call.structured_outputs)


def speculation(call: GenerationRequest, default: Speculation) -> Speculation | None:
    """The tree a request asks for; None is the engine's default."""
    wanted = call.speculation
    if wanted is None or wanted == "auto":
        return None
    if isinstance(wanted, str):
        return SPECULATION_OFF
    lookup = 0 if wanted.nodes == 1 else default.lookup  # one node turns speculation off, or leaves a lookup
    return Speculation(
        wanted.nodes or default.nodes,
        wanted.depth or default.depth,
        wanted.top_k or default.top_k,
        lookup if wanted.lookup is None else wanted.lookup,
    )


def shorten(message: str) -> str:
    """A message short enough to be sent back."""
    return message if len(message) <= MAX_MESSAGE_LEN else message[:MAX_MESSAGE_LEN] + "..."


def _decode(body: bytes, kind: type[RequestT]) -> RequestT:
    call = decode(body, kind)
    _check(call)
    return call


def decode(body: bytes, kind: type[StructT]) -> StructT:
    """Read a body of any kind, not nested too deeply. Raises RequestError naming the field."""
    try:
        call = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        _refuse(str(error))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(shorten(f"the body is not valid JSON: {error}"), code="invalid_json") from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply", code="invalid_json") from error
    if body.count(b"[") + body.count(b"{") > MAX_NESTING:  # else there is no need to look
        check_nesting(call)
    return call


def check_nesting(call: Struct) -> None:
    """Refuse lists and objects that lie deeper in one another than anybody means, in whatever field: what
    comes after (templates, grammars) goes through them by recursion."""
    level: list[Any] = [getattr(call, name) for name in call.__struct_fields__]
    depth = 1
    while level := [value for value in level if isinstance(value, list | dict | Struct)]:
        depth += 1
        if depth > MAX_NESTING:
            raise RequestError(
                f"the body is nested more than {MAX_NESTING} levels deep", code="nested_too_deeply"
            )
        level = [inner for value in level for inner in _children(value)]


def _children(value: list[Any] | dict[str, Any] | Struct) -> Iterable[Any]:
    if isinstance(value, Struct):
        return (getattr(value, name) for name in value.__struct_fields__)
    return value.values() if isinstance(value, dict) else value


def _check(call: GenerationRequest) -> None:
    """What types and ranges of single fields cannot say."""
    _check_neutral(call, _NOT_HONOURED)
    refuse_renamed({name: getattr(call, name) for name in RENAMED})
    grammar_of(call)
    sampling_fields.check(call)
    if call.stream_options is not None and not call.stream:
        raise RequestError("stream_options needs stream to be true", "stream_options")


def _check_neutral(call: GenerationRequest, table: Neutral) -> None:
    """Refuse fields that ask for something we do not do."""
    for name, neutral in table.items():
        value = getattr(call, name)
        if value is not None and not any(  # 0 == False in Python, but not in JSON
            value == nothing and isinstance(value, bool) == isinstance(nothing, bool) for nothing in neutral
        ):
            raise RequestError(f"{name} is not supported yet; leave it out", name, "unsupported_parameter")


def _check_message(message: Message, where: str) -> None:
    """Refuse a turn without content, and parts that are not texts (or an assistant's thoughts)."""
    if message.content is None:
        is_answer = message.role == "assistant"
        if is_answer and (message.tool_calls or message.reasoning_content or message.reasoning):
            return  # of such turns the content may be null
        hint = " or tool_calls" if is_answer else ""
        raise RequestError(
            f"{where}: a message of role {message.role!r} needs content{hint}", f"{where}.content"
        )
    if isinstance(message.content, str):
        return
    kinds = ("text", "thinking") if message.role == "assistant" else ("text",)
    for number, part in enumerate(message.content):
        here = f"{where}.content[{number}]"
        if part.type not in kinds:
            raise RequestError(
                f"content parts of type {part.type[:40]!r} are not supported, "
                f"supported: {', '.join(map(repr, kinds))}",
                f"{here}.type",
                "unsupported_value",
            )
        if getattr(part, part.type) is None:
            raise RequestError(f"a {part.type} part needs a {part.type}", f"{here}.{part.type}")


def _refuse(problem: str) -> NoReturn:
    """Turn msgspec's ``what - at `$.path``` into a RequestError with the path as its param."""
    message, _, path = problem.replace(" - at `key` in `$", " - at `$").partition(" - at `$")
    param = path.rstrip("`").lstrip(".")
    field = re.search(r"(?:missing required|contains unknown) field `([^`]*)`", message)
    if field:
        param = f"{param}.{field[1]}" if param else field[1]
    raise RequestError(shorten(f"{param}: {message}" if param else message), param or None)
