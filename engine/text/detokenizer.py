"""Tokens -> text while they arrive: only what can no longer change is let out.

Two things can still change. The last bytes may be the beginning of a character, so an incremental UTF-8
decoder keeps them. And the last characters may be the beginning of a stop string, so the longest such suffix
is kept:

    stop ("\\n\\nUser",)    push "Hi.\\n" -> "Hi."    held "\\n"
                          push "\\nBye" -> "\\n\\nBye"  (it was no stop after all)

The first stop string to be *complete* ends the text, and of several that end at the same character the
longest. This is what a reader of the stream sees, so the text does not depend on how many tokens each push
brings.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Protocol

from engine.errors import RequestError


class TokenBytes(Protocol):
    """What a tokenizer must know for its tokens to become text."""

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of a token; none for special tokens."""
        ...


class Detokenizer:
    """The text of one answer. ``stopped`` is the stop string that ended it, if one did."""

    def __init__(self, tokenizer: TokenBytes, stop: tuple[str, ...] = ()) -> None:
        if not all(stop):
            raise RequestError("stop contains an empty string", param="stop")
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token_ids: Iterable[int]) -> str:
        """Take new tokens; return the text that became safe. Empty once stopped."""
        if self.stopped is not None:
            return ""
        return self._release(self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, token_ids))))

    def flush(self) -> str:
        """The answer is over: return what is still held, an incomplete character as U+FFFD."""
        if self.stopped is not None:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if found:
            end, _, self.stopped = min(found)
            self._held = ""
            return text[: end - len(self.stopped)]
        safe = len(text) - self._held_len(text)
        self._held = text[safe:]
        return text[:safe]

    def _held_len(self, text: str) -> int:
        """Length of the longest suffix that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        return next(
            (
                size
                for size in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-size:]) for stop in self._stop)
            ),
            0,
        )
