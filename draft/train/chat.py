"""The target's text side of the data phase: its own tokenizer and chat template (``collect.ChatFormat``)."""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import ConfigError
from engine.text.chat import render_chat, render_text
from engine.text.tokenizer import Tokenizer

_SENTINEL = "USER-TEXT"  # stands for the user's text, to see where a template puts it


class TemplateChat:
    """The checkpoint's chat template, whole or up to the user's text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises RequestError without a chat template, ConfigError if it does not show the user's text."""
        self._tokenizer = tokenizer
        text = render_text(tokenizer, [{"role": "user", "content": _SENTINEL}])
        before, found, _ = text.partition(_SENTINEL)
        if not found:
            raise ConfigError("the model's chat template does not contain the user's text")
        self._before = before

    def user_turn(self, opener: str) -> list[int]:
        return self._tokenizer.encode(self._before + opener)

    def question(self, user_text: str) -> list[int]:
        return render_chat(self._tokenizer, [{"role": "user", "content": user_text}])

    def text(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids)
