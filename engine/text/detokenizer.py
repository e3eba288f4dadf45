"""Tokens -> text while they arrive: only what can no longer change is let out.

Two things can still change. The last bytes may be the beginning of a character, so an incremental UTF-8
decoder keeps them. And the last characters may be the beginning of a stop string, so the longest such suffix
is kept:

    stop ("\\n\\nUser",)    push "Hi.\\n" -> "Hi."    held "\\n"
                          push "\\nBye" -> "\\n\\nBye"  (it was no stop after all)

The first stop string to be *complete* ends the text, and of several that end at the same character the
longest. This is what a reader of the stream sees, so the text does not depend on how many tokens each push
brings. ``StopSearch`` is the second half of this and looks for other strings, too.

A stop string may be told not to count yet (``min_tokens``). What counts is where it ends: one that begins in
such text and ends behind it does.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable
from typing import Protocol

from engine.errors import RequestError


class TokenBytes(Protocol):
    """What a tokenizer must know for its tokens to become text."""

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of a token; none for special tokens."""
        ...


class StopSearch:
    """Lets text through up to the first of some strings to be complete; ``found`` is that string, ``rest``
    what came after it."""

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.found: str | None = None
        self.rest = ""
        self._strings = strings
        self._held = ""

    def push(self, text: str, ignored: Collection[str] = ()) -> str:
        """Take more text; return what became safe. Not to be used once a string was found.

        ignored: those of the strings that do not count where they end in this text.
        """
        assert self.found is None
        num_held, text = len(self._held), self._held + text
        ends = []
        for each in self._strings:
            # One that ends in what was held has been ignored.
            begin = -1 if each in ignored else text.find(each, max(num_held + 1 - len(each), 0))
            if begin >= 0:
                ends.append((begin + len(each), -len(each), each))
        if ends:
            end, _, self.found = min(ends)
            self.rest, self._held = text[end:], ""
            return text[: end - len(self.found)]
        safe = len(text) - self._held_len(text)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """No more text will come: return what is still held."""
        held, self._held = self._held, ""
        return held

    def _held_len(self, text: str) -> int:
        """Length of the longest suffix that begins one of the strings."""
        longest = max(map(len, self._strings), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            suffix = text[-size:]
            if any(each.startswith(suffix) for each in self._strings):
                return size
        return 0


class Detokenizer:
    """The text of one answer. ``stopped`` is the stop string that ended it, if one did."""

    def __init__(self, tokenizer: TokenBytes, stop: tuple[str, ...] = ()) -> None:
        if not all(stop):
            raise RequestError("stop contains an empty string", param="stop")
        self._tokenizer = tokenizer
        self._stop = stop
        self._ignored: tuple[str, ...] = ()  # in what was pushed last
        self._search = StopSearch(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def stopped(self) -> str | None:
        return self._search.found

    def push(self, token_ids: Iterable[int], may_stop: bool = True) -> str:
        """Take new tokens; return the text that became safe. Empty once stopped.

        may_stop: whether stop strings count that end in these tokens.
        """
        if self.stopped is not None:
            return ""
        self._ignored = () if may_stop else self._stop
        text = self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, token_ids)))
        return self._search.push(text, self._ignored)

    def flush(self) -> str:
        """The answer is over: return what is still held, an incomplete character as U+FFFD."""
        if self.stopped is not None:
            return ""
        rest = self._decoder.decode(b"", final=True)
        return self._search.push(rest, self._ignored) + self._search.flush()
