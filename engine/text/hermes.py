"""Tool calls as Hermes, Qwen and their kin write them: JSON between tags, in the text of an answer.

    I will look.
    <tool_call>
    {"name": "weather", "arguments": {"city": "Rome"}}
    </tool_call>
    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

A chat template that mentions both ``tools`` and ``<tool_call>`` teaches this format. In some vocabularies the
tags are control tokens, in others plain text; here a control token is read as its name, so that there is one
way to look for them.

``CallTextParser`` reads what the model wrote with no grammar to hold it, hence takes what it can get:

    white space anywhere in the JSON        as it should be
    text that is no object after a tag      text, the tag too
    "arguments" before "name", more keys    a call once the tag is closed; what is neither of both is dropped
    the end before the closing tag          the call is reported as far as it came
    "</tool_call>" inside an argument       part of the argument
    white space after a call                dropped, for it belongs to the format; so is a line break before

``answer_grammar`` is the same format with nothing left to chance.
"""

from __future__ import annotations

import codecs
import enum
import json
import re
from collections.abc import Iterable, Mapping

from engine.errors import RequestError
from engine.text.detokenizer import StopSearch
from engine.text.output_parser import (
    Event,
    TextDelta,
    ToolCallArguments,
    ToolCallStart,
    Vocabulary,
    call_id,
    joined,
)
from engine.text.tools import Function, ToolUse

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_OPENINGS = ("\n" + OPEN, OPEN)
_NO_OBJECT = re.compile(rf"\s*{OPEN}\s*(?=[^\s{{])")
_HEAD = re.compile(rf'\s*{OPEN}\s*\{{\s*"name"\s*:\s*("(?:[^"\\<]|\\[^<])*")\s*,\s*"arguments"\s*:\s*')


def answer_grammar(use: ToolUse, special_tokens: Mapping[str, int], answer: str | None = None) -> str:
    """Lark grammar (llguidance's) of an answer that calls functions as ``use`` says.

    special_tokens: ids by name; tags among them are those tokens. answer: JSON schema of an answer that is no
    call, None for any text.
    """
    opening, closing = (_tag(tag, special_tokens) for tag in (OPEN, CLOSE))
    names = [f"function_{index}" for index in range(len(use.functions))]
    calls = "first_call more_calls*" if use.parallel else "first_call"
    rules = {
        "more_calls": f'"\\n" {opening} call',
        "call": f'"\\n" ({" | ".join(names)}) "\\n" {closing}',
        **dict(zip(names, map(_call_rule, use.functions), strict=True)),
    }
    if use.must_call:
        rules = {"start": calls, "first_call": f"{opening} call", **rules}
    elif answer is not None:
        rules = {"start": f"%json {answer} | {calls}", "first_call": f"{opening} call", **rules}
    elif OPEN in special_tokens:
        rules = {"start": f"TEXT | {calls}", "first_call": f"TEXT {opening} call", **rules}
    else:  # lazy: the first tag in a text begins a call, it cannot be part of the text
        rules = {
            "start": f"TEXT | {calls}",
            "first_call": "text_and_tag call",
            "text_and_tag[lazy]": f"TEXT {opening}",
            **rules,
        }
    return "\n".join(f"{name}: {body}" for name, body in (rules | {"TEXT": r"/(.|\n)*/"}).items()) + "\n"


def _tag(name: str, special_tokens: Mapping[str, int]) -> str:
    return f"<[{special_tokens[name]}]>" if name in special_tokens else json.dumps(name)


def _call_rule(function: Function) -> str:
    head = f'{{"name": {json.dumps(function.name)}, "arguments": '
    return f'{json.dumps(head)} %json {json.dumps(function.arguments_schema())} "}}"'


class _State(enum.Enum):
    TEXT = enum.auto()
    HEAD = enum.auto()  # of a call, up to the value of its arguments
    ARGUMENTS = enum.auto()
    TAIL = enum.auto()  # of a call, behind its arguments


class CallTextParser:
    """One answer; see ``engine.text.output_parser.OutputParser``, whose surface and promises it has."""

    def __init__(self, tokenizer: Vocabulary, call_key: str, stop: tuple[str, ...] = ()) -> None:
        """call_key: what call ids are made from; stop: strings that end the text. Raises RequestError for an
        empty one."""
        if not all(stop):
            raise RequestError("stop contains an empty string", param="stop")
        self.num_calls = 0
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        special = tokenizer.special_tokens
        self._tags = {special[tag]: tag.encode() for tag in (OPEN, CLOSE) if tag in special}
        self._call_key = call_key
        self._stop = stop
        self._may_stop = True
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._state = _State.TEXT
        self._is_margin = False  # right behind a call, where white space is the format's
        self._search = StopSearch((*stop, *_OPENINGS))
        self._head = ""  # of the open call, its tag included
        self._value = _ValueScanner()

    def push(self, token_ids: Iterable[int], may_stop: bool = True) -> list[Event]:
        """Take new tokens; return what became certain, no event empty, neighbours of one kind joined.

        may_stop: whether stop strings count that end in these tokens.
        """
        self._may_stop = may_stop
        return self._read(self._decoder.decode(b"".join(map(self._token_bytes, token_ids))))

    def flush(self) -> list[Event]:
        """The answer is over: return what is still held, as ``push`` does."""
        events = self._read(self._decoder.decode(b"", final=True))
        if self._state is _State.HEAD:
            events += self._whole_call(self._head)
        elif self._state is _State.TEXT and self.stopped is None:
            events.append(TextDelta(self._search.flush()))
        return joined(events)

    def _token_bytes(self, token: int) -> bytes:
        return self._tags.get(token) or self._tokenizer.token_bytes(token)

    def _read(self, text: str) -> list[Event]:
        """Follow the format through new text: each step reads as much as belongs to its state."""
        steps = {
            _State.TEXT: self._read_text,
            _State.HEAD: self._read_head,
            _State.ARGUMENTS: self._read_arguments,
            _State.TAIL: self._read_tail,
        }
        events: list[Event] = []
        while text and self.stopped is None:
            found, text = steps[self._state](text)
            events += found
        return joined(events)

    def _read_text(self, text: str) -> tuple[list[Event], str]:
        if self._is_margin:
            text = text.lstrip()
            self._is_margin = not text
        ignored = () if self._may_stop else set(self._stop).difference(_OPENINGS)
        events: list[Event] = [TextDelta(self._search.push(text, ignored))]
        tag = self._search.found
        if tag is None:
            return events, ""
        if tag in self._stop and self._may_stop:
            self.stopped = tag
            return events, ""
        self._state, self._head = _State.HEAD, tag
        return events, self._search.rest

    def _read_head(self, text: str) -> tuple[list[Event], str]:
        self._head += text
        match = _HEAD.match(self._head)
        if match is not None:
            self._state, self._value = _State.ARGUMENTS, _ValueScanner()
            return [self._start(_unquoted(match[1]))], self._head[match.end() :]
        no_object = _NO_OBJECT.match(self._head)
        if no_object is not None:
            self._open_text(is_margin=False)
            return [TextDelta(no_object[0])], self._head[no_object.end() :]
        end = self._head.find(CLOSE) + len(CLOSE)
        if end < len(CLOSE):
            return [], ""
        events = self._whole_call(self._head[:end])
        self._open_text(is_margin=not isinstance(events[0], TextDelta))
        return events, self._head[end:]

    def _read_arguments(self, text: str) -> tuple[list[Event], str]:
        value, rest = self._value.take(text)
        if self._value.is_complete:
            self._state, self._search = _State.TAIL, StopSearch((CLOSE, OPEN))
        return [ToolCallArguments(self.num_calls - 1, value)], rest

    def _read_tail(self, text: str) -> tuple[list[Event], str]:
        self._search.push(text)
        match self._search.found:
            case None:
                return [], ""
            case tag:
                rest = self._search.rest
                self._open_text()
                return [], rest if tag == CLOSE else tag + rest

    def _open_text(self, is_margin: bool = True) -> None:
        self._state, self._search = _State.TEXT, StopSearch((*self._stop, *_OPENINGS))
        self._is_margin = is_margin

    def _whole_call(self, text: str) -> list[Event]:
        """The events of a call that is there as a whole, tags included; it is text if it is none."""
        try:
            call = json.loads(text.strip().removeprefix(OPEN).removesuffix(CLOSE))
        except (ValueError, RecursionError):
            return [TextDelta(text)]
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return [TextDelta(text)]
        start = self._start(call["name"])
        return [
            start,
            ToolCallArguments(start.index, json.dumps(call.get("arguments", {}), ensure_ascii=False)),
        ]

    def _start(self, name: str) -> ToolCallStart:
        self.num_calls += 1
        index = self.num_calls - 1
        return ToolCallStart(index, call_id(self._call_key, index), name)


class _ValueScanner:
    """Finds the end of one JSON value in text that comes in pieces."""

    def __init__(self) -> None:
        self.is_complete = False
        self._has_begun = False
        self._depth = 0
        self._in_string = self._is_escaped = False

    def take(self, text: str) -> tuple[str, str]:
        """(what of a text belongs to the value, the rest), white space before it dropped."""
        begin = 0 if self._has_begun else len(text) - len(text.lstrip())
        for place in range(begin, len(text)):
            self._has_begun = True
            size = self._end(text[place])
            if size is not None:
                self.is_complete = True
                return text[begin : place + size], text[place + size :]
        return text[begin:], ""

    def _end(self, char: str) -> int | None:
        """How many characters the value still has here, 1 or 0, if it ends here; otherwise None."""
        if self._in_string:
            if self._is_escaped or char == "\\":
                self._is_escaped = not self._is_escaped
            elif char == '"':
                self._in_string = False
                return 1 if self._depth == 0 else None
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return None if self._depth > 0 else self._depth + 1  # 0: it closes what is around a number
        elif char == "<" or (self._depth == 0 and (char == "," or char.isspace())):
            return 0  # a tag is never JSON: something was left open
        return None


def _unquoted(text: str) -> str:
    """A JSON string's content, or what is between the quotes if it is none."""
    try:
        return str(json.loads(text))
    except ValueError:
        return text[1:-1]
