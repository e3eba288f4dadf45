"""Log-probabilities as clients get them, in OpenAI's two shapes: a list of tokens for chat, four parallel
lists for completions.

A token is named by its text; a control token by its name; and one whose bytes are no whole characters by
these bytes, as in ``bytes:\\xe2\\x80``, so that two different tokens never share a name.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from msgspec import Struct

from engine.core import TokenLogprob
from engine.text.conversation import AnyTokenizer

_LEAST = -9999.0  # for minus infinity, which JSON does not have


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of an answer and what the model thought of it."""

    token_id: int
    logprob: TokenLogprob


class NamedLogprob(Struct):
    """``bytes`` is null for control tokens."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(NamedLogprob):
    """A token of a chat answer and its likeliest alternatives, best first."""

    top_logprobs: list[NamedLogprob]


class ChatLogprobs(Struct):
    """Of all tokens of an answer or a chunk, those of reasoning and calls included."""

    content: list[ChatLogprob]
    refusal: None = None


class TextLogprobs(Struct):
    """Entry i of each list is about token i; ``text_offset`` counts characters from the answer's first."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]  # the token itself, too


Logprobs = ChatLogprobs | TextLogprobs


class Speller(Protocol):
    """Puts the tokens of one answer into words, chunk by chunk."""

    def __call__(self, tokens: Sequence[ScoredToken]) -> Logprobs: ...


class ChatSpeller:
    """For chat answers."""

    def __init__(self, tokenizer: AnyTokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, tokens: Sequence[ScoredToken]) -> ChatLogprobs:
        return ChatLogprobs([self._entry(token) for token in tokens])

    def _entry(self, token: ScoredToken) -> ChatLogprob:
        own = self._named(token.token_id, token.logprob.logprob)
        top = [self._named(token_id, logprob) for token_id, logprob in token.logprob.top]
        return ChatLogprob(own.token, own.logprob, own.bytes, top)

    def _named(self, token_id: int, logprob: float) -> NamedLogprob:
        content = list(self._tokenizer.token_bytes(token_id))
        return NamedLogprob(token_name(self._tokenizer, token_id), max(logprob, _LEAST), content or None)


class TextSpeller:
    """For completions."""

    def __init__(self, tokenizer: AnyTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_chars = 0

    def __call__(self, tokens: Sequence[ScoredToken]) -> TextLogprobs:
        found = TextLogprobs([], [], [], [])
        for token in tokens:
            name, logprob = (token_name(self._tokenizer, token.token_id), max(token.logprob.logprob, _LEAST))
            found.text_offset.append(self._num_chars)
            found.token_logprobs.append(logprob)
            found.tokens.append(name)
            top = {token_name(self._tokenizer, each): max(of, _LEAST) for each, of in token.logprob.top}
            found.top_logprobs.append(top | {name: logprob})
            self._num_chars += len(self._decoder.decode(self._tokenizer.token_bytes(token.token_id)))
        return found


def token_name(tokenizer: AnyTokenizer, token_id: int) -> str:
    """A token as a text that no other token of the vocabulary has, but for unused ones."""
    content = tokenizer.token_bytes(token_id)
    if not content:
        return tokenizer.token_text(token_id) or f"token:{token_id}"
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
