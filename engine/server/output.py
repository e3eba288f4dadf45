"""The answer side of one request: deltas in, text, reasoning and tool calls out.

The engine ends a request at an end-of-text token, a stop token or the length; stop strings are found here,
because only here are bytes put together to text. Used by the server on its event loop and by the command line
in process.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Iterable
from typing import Literal, Protocol

from engine.build import Served
from engine.core import SPECULATION_OFF, FinishReason, Request, Speculation
from engine.server.logprobs import ScoredToken
from engine.server.metrics import RequestStats, StampedDelta
from engine.text.conversation import AnyTokenizer, answer_parser
from engine.text.detokenizer import Detokenizer
from engine.text.output_parser import Answer, Event, TextDelta, Vocabulary, assemble

EndReason = FinishReason | Literal["tool_calls"]


class Reading(enum.Enum):
    """What the tokens of an answer are read as."""

    TEXT = enum.auto()  # bytes and nothing else
    CHAT = enum.auto()  # reasoning is told from text, if the vocabulary can say which is which
    CHAT_WITH_TOOLS = enum.auto()  # and so are calls of the tools that were offered

    @classmethod
    def of_chat(cls, offers_tools: bool) -> Reading:
        return cls.CHAT_WITH_TOOLS if offers_tools else cls.CHAT


class Reader(Protocol):
    """Makes events of tokens; what ``answer_parser`` returns is one."""

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, None so far."""
        ...

    def push(self, token_ids: Iterable[int], may_stop: bool = True) -> list[Event]:
        """Take new tokens; return what became certain, no event empty.

        may_stop: whether stop strings count that end in these tokens.
        """
        ...

    def flush(self) -> list[Event]:
        """The answer is over: return what is still held."""
        ...


class TextReader:
    """Everything is text."""

    def __init__(self, tokenizer: Vocabulary, stop: tuple[str, ...]) -> None:
        self._detokenizer = Detokenizer(tokenizer, stop)

    @property
    def stopped(self) -> str | None:
        return self._detokenizer.stopped

    def push(self, token_ids: Iterable[int], may_stop: bool = True) -> list[Event]:
        return _text_event(self._detokenizer.push(token_ids, may_stop))

    def flush(self) -> list[Event]:
        return _text_event(self._detokenizer.flush())


def output_for(served: Served, request: Request, arrival: float, reading: Reading = Reading.TEXT) -> Output:
    """The answer side of a request to a served model."""
    speculation = request.speculation or served.engine.config.speculation
    if served.draft_name == "none":
        speculation = SPECULATION_OFF
    return Output(served.tokenizer, request, speculation, arrival, reading)


def text_of(events: Iterable[Event]) -> str:
    """The text among some events."""
    return "".join(event.text for event in events if isinstance(event, TextDelta))


class Output:
    """Grows by ``push``; complete when ``finish_reason`` is set.

    If that happened before the engine's own end (a stop string), the owner has to abort the request in the
    engine. ``speculation`` is what the request will draft, ``arrival`` its time of arrival
    (``time.perf_counter`` seconds).
    """

    def __init__(
        self,
        tokenizer: AnyTokenizer,
        request: Request,
        speculation: Speculation,
        arrival: float,
        reading: Reading = Reading.TEXT,
    ) -> None:
        self.request = request
        self.finish_reason: EndReason | None = None
        self.token_ids: list[int] = []  # what made the answer, the end-of-text token included
        self.stats = RequestStats(arrival, speculation.most_accepted)
        self._reader = _reader(tokenizer, request.sampling.stop, reading)
        self._events: list[Event] = []
        self._scored: list[ScoredToken] = []

    def take_scored(self) -> list[ScoredToken]:
        """Tokens that made the answer since the last call, if their log-probabilities are asked for."""
        taken, self._scored = self._scored, []
        return taken

    @property
    def answer(self) -> Answer:
        """All so far, without what is held back."""
        return assemble(self._events)

    @property
    def num_tokens(self) -> int:
        """Tokens that made the answer, the end-of-text token included."""
        return self.stats.num_tokens

    def push(self, stamped: StampedDelta) -> list[Event]:
        """Take one step's delta; returns what became certain. What follows a stop string is not counted."""
        if self.finish_reason is not None:
            return []
        delta, sampling = stamped.delta, self.request.sampling
        reason: EndReason | None = delta.finish_reason
        is_silent = (  # a stop token has its text left out, as a stop string has
            reason == "stop"
            and self._may_stop(len(delta.token_ids))
            and delta.token_ids[-1] in sampling.stop_token_ids
            and not sampling.include_stop_str_in_output
        )
        events, num_tokens = self._read(delta.token_ids[:-1] if is_silent else delta.token_ids)
        if self._reader.stopped is not None:
            reason = "stop"
            if sampling.include_stop_str_in_output:
                events.append(TextDelta(self._reader.stopped))
        else:
            num_tokens += is_silent
            if reason is not None:
                events += self._reader.flush()
        self.stats.record(stamped, num_tokens)
        self.token_ids += delta.token_ids[:num_tokens]
        if sampling.logprobs is not None:
            of_tokens = zip(delta.token_ids, delta.logprobs, strict=True)
            self._scored += [ScoredToken(*of_token) for of_token in of_tokens][:num_tokens]
        self._events += events
        self.finish_reason = "tool_calls" if reason == "stop" and self.answer.calls else reason
        return events

    def _read(self, token_ids: tuple[int, ...]) -> tuple[list[Event], int]:
        """Events and number of tokens used. With stop strings it goes token by token, so that the count does
        not depend on how many tokens a step emitted."""
        if not self.request.sampling.stop:
            return self._reader.push(token_ids), len(token_ids)
        events: list[Event] = []
        for count, token in enumerate(token_ids, start=1):
            events += self._reader.push((token,), self._may_stop(count))
            if self._reader.stopped is not None:
                return events, count
        return events, len(token_ids)

    def _may_stop(self, count: int) -> bool:
        """Whether the token that comes as number ``count`` from now on may be the one that stops the answer,
        which has ``min_tokens`` before it, as in vLLM."""
        return self.num_tokens + count > self.request.sampling.min_tokens


def _reader(tokenizer: AnyTokenizer, stop: tuple[str, ...], reading: Reading) -> Reader:
    if reading is Reading.TEXT:
        return TextReader(tokenizer, stop)
    return answer_parser(tokenizer, uuid.uuid4().hex, stop, tools=reading is Reading.CHAT_WITH_TOOLS)


def _text_event(text: str) -> list[Event]:
    return [TextDelta(text)] if text else []
