"""Chat messages -> token ids, through the checkpoint's own jinja template.

The template is the checkpoint's code and runs in jinja's immutable sandbox, set up as transformers does,
because that is what templates are written for. The messages are the client's data, and data must not become
control tokens: a message that contains "<|im_end|>" would end its own turn and could speak as the system. Yet
the template's output is one string in which both are mixed, possibly after trimming, slicing or JSON
encoding.

So every place in a message where a control token could begin is marked before rendering. A mark behind the
first character is enough to stop the match:

    content     say <|im_end|> now               (or "<|im_" in one part and "end|>" in the next)
    marked      say <#|im_end|> now              # is BREAK, a string nobody can guess
    rendered    <|im_start|>user\\nsay <#|im_end|> now<|im_end|>\\n
    encoded     the template's two control tokens, and between them "<", "|", "im", ...; the mark is dropped

Messages without such places, nearly all, are not touched and encode exactly as transformers would.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2.parser import Parser

from engine.errors import RequestError
from engine.text.tokenizer import BREAK, Tokenizer

# what a template raises on data it was not written for: a list where it adds strings, a role it does not know
_RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
                  RecursionError)
_NAMED_TOKENS = ("bos", "eos")


def render_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, object]],
                add_generation_prompt: bool = True) -> list[int]:
    """Token ids of a conversation, ready for the model to answer. BOS is there if the template writes it.

    messages: [{"role": ..., "content": ...}, ...], handed to the template as they are; control tokens written
    in any of their strings are encoded as text. Raises RequestError(param="messages") if there is no template
    or it refuses.
    """
    guarded, text = _guard_and_render(tokenizer, messages, add_generation_prompt)
    return tokenizer.encode_marked(text) if guarded else tokenizer.encode(text)


def render_text(tokenizer: Tokenizer, messages: Sequence[Mapping[str, object]],
                add_generation_prompt: bool = True) -> str:
    """The text that ``render_chat`` encodes, for logs and tests. Same errors."""
    return _guard_and_render(tokenizer, messages, add_generation_prompt)[1].replace(BREAK, "")


def _guard_and_render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, object]],
                      add_generation_prompt: bool) -> tuple[bool, str]:
    """(whether marks were set, the rendered text with marks)."""
    if tokenizer.chat_template is None:
        raise RequestError(
            "this model has no chat template; use /v1/completions with a prompt", param="messages")
    guard = _Guard(tokenizer.special_tokens)
    guarded = [guard(message) for message in messages]
    named = {f"{name}_token": token for name, token in
             zip(_NAMED_TOKENS, (_text_of(tokenizer, tokenizer.bos_token_id),
                                 _text_of(tokenizer, next(iter(tokenizer.eos_token_ids), None))), strict=True)}
    try:
        text = _compile(tokenizer.chat_template).render(
            messages=guarded, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **named)
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(f"the model's chat template is broken (line {error.lineno}): {error.message}",
                           param="messages") from error
    except _RENDER_ERRORS as error:
        reason = str(error).replace(BREAK, "") or type(error).__name__
        raise RequestError(
            f"the model's chat template refused these messages: {reason}", param="messages") from error
    return guard.used, text


class _Guard:
    """Marks the places in strings where a control token begins, or may if the next string continues it."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        tokens = sorted((token for token in special_tokens if token), key=len, reverse=True)
        self.used = False
        self._single = frozenset(token for token in tokens if len(token) == 1)
        self._tokens = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        self._beginnings = frozenset(token[:cut] for token in tokens for cut in range(1, len(token)))
        self._longest = max(map(len, tokens), default=0)

    def __call__(self, value: Any) -> Any:
        """The value with all its strings guarded, keys too; containers are copied."""
        if isinstance(value, str):
            return self._mark(value)
        if isinstance(value, Mapping):
            return {self(key): self(item) for key, item in value.items()}
        return [self(item) for item in value] if isinstance(value, list | tuple) else value

    def _mark(self, text: str) -> str:
        if self._tokens is None:
            return text
        places = {match.start() + 1 for match in re.finditer(f"(?=({self._tokens.pattern}))", text)}
        trimmed = text.rstrip()  # templates trim, and then the next string is near
        for end in {len(text), len(trimmed)}:
            places |= {start + 1 for start in range(max(0, end - self._longest + 1), end)
                       if text[start:end] in self._beginnings}
        if not places:
            return text
        if self._single and not self._single.isdisjoint(text):
            raise RequestError(
                f"the text contains the control token {min(self._single & set(text))!r}, which cannot "
                "be encoded as text", param="messages")
        self.used = True
        cuts = [0, *sorted(places), len(text)]
        return BREAK.join(text[begin:end] for begin, end in zip(cuts, cuts[1:], strict=False))


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
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock])
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """JSON as it is; jinja's own filter would escape <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _text_of(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "" if token_id is None else tokenizer.token_text(token_id) or ""
