"""Emitted token ids -> text, reasoning and tool calls, while they arrive.

The structure of an answer is in its control tokens, never in its text: a model that explains "[THINK]" to a
reader writes ordinary tokens. So ids decide, and bytes between them become text.

    [THINK] ..thoughts.. [/THINK] ..text.. [TOOL_CALLS] name [ARGS] {..} [TOOL_CALLS] name [ARGS] {..} </s>

Five control tokens move between four states; whatever is not in this table has no effect, and the text around
it flows on as if it were not there:

    token         in state                  does
    [THINK]       all but reasoning         ends what is open; reasoning begins
    [/THINK]      reasoning                 text goes on
    [TOOL_CALLS]  any                       ends what is open; the name of a call begins
    [ARGS]        name                      the call is known: its name is complete, its arguments begin
    </s>          all but text              ends what is open; text, should the engine be told to go on

Malformed output never raises and never loses text:

    [THINK] inside reasoning             no effect: the first [/THINK] ends it
    [/THINK] or [ARGS] out of place      no effect
    </s> inside reasoning or arguments   these are reported as far as they came
    [TOOL_CALLS] without [ARGS]          what should have been a name is text; so is a name of more than 128
                                         bytes, lest a stream waits for what never comes
    half a character, then a control     U+FFFD, if the token ends something
    arguments that are no JSON           streamed as they came; checking them is the client's

A tokenizer without these tokens, or with only one of a pair, yields the text alone, exactly as
``Detokenizer`` does. Stop strings are looked for in the text, not in reasoning or calls, and never across a
control token that ends something.
"""

from __future__ import annotations

import enum
import hashlib
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from engine.text.detokenizer import Detokenizer

_NAME_LIMIT = 128  # bytes; a name has at most 64 characters of ASCII, white space around it is forgiven
_ID_ALPHABET = string.digits + string.ascii_letters
_ID_LENGTH = 9  # what older Mistral formats demand of a call id, and clients expect


class Vocabulary(Protocol):
    """The part of a tokenizer that is needed here."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Ids of control tokens by their names."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Exact bytes of a token; none for special tokens."""
        ...


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the model thinks aloud."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """Call number ``index`` of this answer, counted from 0, whose arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of the arguments of call ``index``: a piece of what should become one JSON text."""

    index: int
    text: str


Event = TextDelta | ReasoningDelta | ToolCallStart | ToolCallArguments


class _Marker(enum.StrEnum):
    """Control tokens that have an effect, by their names."""

    THINK = "[THINK]"
    END_THINK = "[/THINK]"
    TOOL_CALLS = "[TOOL_CALLS]"
    ARGS = "[ARGS]"
    END = "</s>"


class _State(enum.Enum):
    TEXT = enum.auto()
    REASONING = enum.auto()
    NAME = enum.auto()
    ARGUMENTS = enum.auto()


class OutputParser:
    """One answer. The events of all pushes and the flush, with neighbours joined, do not depend on how the
    tokens were spread over the pushes.
    """

    def __init__(
        self, tokenizer: Vocabulary, call_key: str, stop: tuple[str, ...] = (), tools: bool = True
    ) -> None:
        """call_key: what call ids are made from, see ``call_id``; unique per answer, so that the calls of two
        turns never share an id.
        tools: False if the model was offered none; what it calls all the same becomes text.
        Raises RequestError for an empty stop string.
        """
        self.num_calls = 0
        self._markers = _markers(tokenizer.special_tokens, tools)
        self._tokenizer = tokenizer
        self._call_key = call_key
        self._state = _State.TEXT
        self._may_stop = True
        self._text = Detokenizer(tokenizer, stop)
        self._inner = Detokenizer(tokenizer)  # of reasoning or arguments, empty in between
        self._name: list[int] = []  # what may become a name; until then it may become text
        self._name_size = 0  # bytes

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, None so far. What comes after it is ignored."""
        return self._text.stopped

    def push(self, token_ids: Iterable[int], may_stop: bool = True) -> list[Event]:
        """Take new tokens; return what became certain, no event empty, neighbours of one kind joined.

        may_stop: whether stop strings count that end in these tokens.
        """
        self._may_stop = may_stop
        events: list[Event] = []
        for token in token_ids:
            if self.stopped is not None:
                break
            marker = self._markers.get(token)
            events += self._feed(token) if marker is None else self._mark(marker)
        return joined(events)

    def flush(self) -> list[Event]:
        """The answer is over: return what is still held, as ``push`` does."""
        return joined(self._enter(_State.TEXT))

    def _feed(self, token: int) -> list[Event]:
        """Take a token that is no marker."""
        match self._state:
            case _State.TEXT:
                return [TextDelta(self._push_text((token,)))]
            case _State.NAME:
                self._name.append(token)
                self._name_size += len(self._tokenizer.token_bytes(token))
                if self._name_size <= _NAME_LIMIT:
                    return []
                self._state = _State.TEXT
                return [TextDelta(self._push_text(self._take_name()))]
            case _:
                return [self._inner_delta(self._inner.push((token,)))]

    def _mark(self, marker: _Marker) -> list[Event]:
        """Follow the table above."""
        match marker, self._state:
            case _Marker.THINK, _State.TEXT | _State.NAME | _State.ARGUMENTS:
                return self._enter(_State.REASONING)
            case _Marker.END_THINK, _State.REASONING:
                return self._enter(_State.TEXT)
            case _Marker.TOOL_CALLS, _:
                return self._enter(_State.NAME)
            case _Marker.ARGS, _State.NAME:
                return [self._start_call()]
            case _Marker.END, _State.REASONING | _State.NAME | _State.ARGUMENTS:
                return self._enter(_State.TEXT)
            case _:
                return []

    def _enter(self, state: _State) -> list[Event]:
        """Complete what is open, then be in ``state``."""
        rest: Event
        match self._state:
            case _State.TEXT:
                rest = TextDelta(self._text.flush())
            case _State.NAME:  # no [ARGS] came, so it was none
                rest = TextDelta(self._push_text(self._take_name()) + self._text.flush())
            case _:
                rest = self._inner_delta(self._inner.flush())
        self._state = state
        return [rest]

    def _push_text(self, token_ids: Iterable[int]) -> str:
        return self._text.push(token_ids, self._may_stop)

    def _start_call(self) -> ToolCallStart:
        name = b"".join(map(self._tokenizer.token_bytes, self._take_name())).decode(errors="replace")
        index = self.num_calls
        self.num_calls += 1
        self._state = _State.ARGUMENTS
        return ToolCallStart(index, call_id(self._call_key, index), name.strip())

    def _take_name(self) -> list[int]:
        name, self._name, self._name_size = self._name, [], 0
        return name

    def _inner_delta(self, text: str) -> Event:
        """Text that belongs to the reasoning or to the latest call."""
        if self._state is _State.REASONING:
            return ReasoningDelta(text)
        return ToolCallArguments(self.num_calls - 1, text)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete call. ``arguments`` should be a JSON object, but are what the model wrote."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer; several stretches of text or reasoning are joined without anything between them."""

    text: str
    reasoning: str
    calls: tuple[ToolCall, ...]


def assemble(events: Iterable[Event]) -> Answer:
    """All events of one answer, in order, as a whole."""
    text: list[str] = []
    reasoning: list[str] = []
    starts: list[ToolCallStart] = []
    arguments: list[list[str]] = []
    for event in events:
        match event:
            case TextDelta(piece):
                text.append(piece)
            case ReasoningDelta(piece):
                reasoning.append(piece)
            case ToolCallStart():
                starts.append(event)
                arguments.append([])
            case ToolCallArguments(index, piece):
                arguments[index].append(piece)
    calls = (
        ToolCall(start.id, start.name, "".join(pieces))
        for start, pieces in zip(starts, arguments, strict=True)
    )
    return Answer("".join(text), "".join(reasoning), tuple(calls))


def call_id(key: str, index: int) -> str:
    """Id of call ``index`` of the answer ``key``: 9 letters or digits, always the same for the same pair."""
    digest = hashlib.blake2b(f"{index}:{key}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big")
    letters = []
    for _ in range(_ID_LENGTH):
        number, letter = divmod(number, len(_ID_ALPHABET))
        letters.append(_ID_ALPHABET[letter])
    return "".join(letters)


def _markers(special_tokens: Mapping[str, int], tools: bool) -> dict[int, _Marker]:
    """The control tokens that have an effect, by id. Both of a pair or neither: one that begins what nothing
    can end would swallow the rest."""
    pairs = [(_Marker.THINK, _Marker.END_THINK)] + ([(_Marker.TOOL_CALLS, _Marker.ARGS)] if tools else [])
    found = [marker for pair in pairs if all(each in special_tokens for each in pair) for marker in pair]
    if found and _Marker.END in special_tokens:
        found.append(_Marker.END)
    return {special_tokens[marker]: marker for marker in found}


def joined(events: list[Event]) -> list[Event]:
    """Without empty deltas, and with neighbours of one kind made one."""
    whole: list[Event] = []
    for event in events:
        if not isinstance(event, ToolCallStart) and not event.text:
            continue
        match whole[-1] if whole else None, event:
            case TextDelta(before), TextDelta(text):
                whole[-1] = TextDelta(before + text)
            case ReasoningDelta(before), ReasoningDelta(text):
                whole[-1] = ReasoningDelta(before + text)
            case ToolCallArguments(index, before), ToolCallArguments(
                _, text
            ):  # one call: else a start between
                whole[-1] = ToolCallArguments(index, before + text)
            case _:
                whole.append(event)
    return whole
