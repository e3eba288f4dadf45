"""Chat messages -> token ids, through the checkpoint's own jinja template.

The template is the checkpoint's code and runs in jinja's immutable sandbox, set up as transformers does,
because that is what templates are written for. Messages and tools are the client's data, and data must not
become control tokens: a message that contains "<|im_end|>" would end its own turn and could speak as the
system. Yet the template's output is one string in which both are mixed, possibly after trimming, slicing or
JSON encoding.

So before rendering, a mark goes behind the first character of every control token in a message, and of
everything at the end of a string that could begin one (the next string may continue it). After rendering, the
marks inside a control token stay and keep it from matching; the others are dropped.

    content     say <|im_end|> now                 (or "<|im_" in one part and "end|>" in the next)
    marked      say <#|im_end|> now                # is BREAK, a string that nobody can guess
    rendered    <|im_start|>user\\nsay <#|im_end|> now<|im_end|>\\n
    encoded     the template's two control tokens, and between them "<", "|", "im", ...; the mark is dropped

Text in which no mark stays, nearly all of it, encodes exactly as transformers would.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2.parser import Parser

from engine.errors import RequestError
from engine.text.tokenizer import BREAK, Tokenizer

# what a template raises on data it was not written for: a list where it adds strings, a role it does not know
_RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, object]],
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, object]] | None = None,
) -> list[int]:
    """Token ids of a conversation, ready for the model to answer. BOS is there if the template writes it.

    messages: [{"role": ..., "content": ...}, ...], tools: [{"type": "function", "function": {..}}, ...], both
    handed to the template as they are; control tokens written in any of their strings are encoded as text.
    Raises RequestError(param="messages") if there is no template or it refuses.
    """
    text = _render(tokenizer, messages, add_generation_prompt, tools)
    return tokenizer.encode_marked(text) if BREAK in text else tokenizer.encode(text)


def render_text(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, object]],
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, object]] | None = None,
) -> str:
    """The text that ``render_chat`` encodes, for logs and tests. Same errors."""
    return _render(tokenizer, messages, add_generation_prompt, tools).replace(BREAK, "")


@lru_cache(maxsize=16)
def template_reads(template: str, name: str) -> bool:
    """Whether a chat template looks at a variable, as one that can show tools looks at ``tools``. A broken
    template reads nothing: rendering says what is wrong with it."""
    try:
        parsed = _environment().parse(template)
    except jinja2.TemplateSyntaxError:
        return False
    return any(node.name == name and node.ctx == "load" for node in parsed.find_all(jinja2.nodes.Name))


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, object]],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, object]] | None,
) -> str:
    """The rendered text, with a mark inside every control token that a message or a tool brought along."""
    if tokenizer.chat_template is None:
        raise RequestError(
            "this model has no chat template; send a prompt to /v1/completions", param="messages"
        )
    guard = _Guard(tokenizer.special_tokens)
    eos_token_id = next(iter(tokenizer.eos_token_ids), None)
    try:
        marked = _compile(tokenizer.chat_template).render(
            messages=[guard.mark(message) for message in messages],
            tools=[guard.mark(tool) for tool in tools] if tools else None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            bos_token=_text_of(tokenizer, tokenizer.bos_token_id),
            eos_token=_text_of(tokenizer, eos_token_id),
        )
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(
            f"the model's chat template is broken (line {error.lineno}): {error.message}", param="messages"
        ) from error
    except _RENDER_ERRORS as error:
        reason = str(error).replace(BREAK, "") or type(error).__name__
        raise RequestError(
            f"the model's chat template refused these messages: {reason}", param="messages"
        ) from error
    return guard.keep_needed(marked)


class _Guard:
    """Marks control tokens in a client's strings. One per conversation."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        self._tokens, self._starts, self._beginnings = _tables(frozenset(special_tokens))
        self._longest = max(map(len, self._tokens), default=0)

    def mark(self, value: Any) -> Any:
        """The value with all its strings marked, keys too; containers are copied."""
        if isinstance(value, str):
            return self._mark_text(value)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, list | tuple) else value

    def keep_needed(self, marked: str) -> str:
        """Drop the marks that no control token spans: they would only disturb the cutting into tokens."""
        pieces = marked.split(BREAK)
        if len(pieces) == 1:
            return marked
        text, ends = "".join(pieces), list(accumulate(map(len, pieces)))
        spanned = {place for begin, end in self._spans(text) for place in range(begin + 1, end)}
        return _insert_breaks(text, spanned.intersection(ends[:-1]))

    def _mark_text(self, text: str) -> str:
        places = set()
        for begin, end in self._spans(text):
            if end - begin == 1:
                raise RequestError(
                    f"the text contains {text[begin]!r}, a control token of one character, "
                    "which cannot be written as text",
                    param="messages",
                )
            places.add(begin + 1)
        for end in {len(text), len(text.rstrip())}:  # templates trim, and then the next string is near
            places |= {
                begin + 1
                for begin in range(max(0, end - self._longest + 1), end)
                if text[begin:end] in self._beginnings
            }
        return _insert_breaks(text, places)

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        """(begin, end) of every control token in a text, overlapping ones too."""
        if self._starts is None:
            return
        for first in self._starts.finditer(text):
            begin = first.start()
            for token in self._tokens:
                if text.startswith(token, begin):
                    yield begin, begin + len(token)


@lru_cache(maxsize=16)
def _tables(special_tokens: frozenset[str]) -> tuple[tuple[str, ...], re.Pattern[str] | None, frozenset[str]]:
    """(the control tokens, what finds their first characters, their proper beginnings)."""
    tokens = tuple(sorted(token for token in special_tokens if token))
    firsts = "".join(re.escape(char) for char in sorted({token[0] for token in tokens}))
    beginnings = frozenset(token[:cut] for token in tokens for cut in range(1, len(token)))
    return tokens, re.compile(f"[{firsts}]") if tokens else None, beginnings


def _insert_breaks(text: str, places: set[int]) -> str:
    cuts = [0, *sorted(places), len(text)]
    return BREAK.join(text[begin:end] for begin, end in pairwise(cuts)) if places else text


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` marks tokens for training; for us it is its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; jinja's own filter would escape <, > and & for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _text_of(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "" if token_id is None else tokenizer.token_text(token_id) or ""
