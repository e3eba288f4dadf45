"""Parsing an answer as it comes: equal to a reader who has it all; nothing raised, lost or held too long."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.text.detokenizer import Detokenizer
from engine.text.mistral_chat import encode_chat
from engine.text.output_parser import (
    Answer,
    Event,
    OutputParser,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
    assemble,
    call_id,
)
from tests.text.tekken import tekken_tokenizer
from tests.text.test_detokenizer import first_stop

END, CALLS, ARGS, THINK, UNTHINK, OTHER = 256, 257, 258, 259, 260, 261
NAMES = {
    "</s>": END,
    "[TOOL_CALLS]": CALLS,
    "[ARGS]": ARGS,
    "[THINK]": THINK,
    "[/THINK]": UNTHINK,
    "[INST]": OTHER,
}


class Bytes:
    """A tokenizer whose token n is byte n; control tokens from 256."""

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        self.special_tokens = special_tokens

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


def parser(*stop: str, tools: bool = True) -> OutputParser:
    return OutputParser(Bytes(NAMES), "key", stop, tools)


def ids(*pieces: str | int) -> list[int]:
    """Tokens of some text and control tokens."""
    return [token for piece in pieces for token in ([piece] if isinstance(piece, int) else piece.encode())]


def parse(ours: OutputParser, pushes: Iterable[Iterable[int]]) -> list[Event]:
    return [event for push in pushes for event in ours.push(push)] + ours.flush()


def whole(*pieces: str | int) -> Answer:
    return assemble(parse(parser(), [ids(*pieces)]))


def calls(*pairs: tuple[str, str]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(call_id("key", index), *pair) for index, pair in enumerate(pairs))


# --- the oracle: the table of the module's docstring over the whole list, one segment at a time ---

TABLE = {
    ("text", THINK): "reasoning",
    ("name", THINK): "reasoning",
    ("arguments", THINK): "reasoning",
    ("reasoning", UNTHINK): "text",
    ("text", CALLS): "name",
    ("reasoning", CALLS): "name",
    ("name", CALLS): "name",
    ("arguments", CALLS): "name",
    ("name", ARGS): "arguments",
    ("reasoning", END): "text",
    ("name", END): "text",
    ("arguments", END): "text",
}


def oracle(tokens: Sequence[int], stop: tuple[str, ...] = ()) -> tuple[list[tuple[str, str]], str | None]:
    """((kind, text) of everything that is told, the stop string that ended it).

    Kinds are text, reasoning, call (its name) and arguments; neighbours of one kind are joined.
    """
    segments: list[tuple[str, bytes]] = [("text", b"")]
    for token in tokens:
        kind, held = segments[-1]
        if token < 256:
            segments[-1] = kind, held + bytes([token])
        elif (kind, token) in TABLE:
            if kind == "name":
                segments[-1] = "call" if token == ARGS else "text", held
            segments.append((TABLE[kind, token], b""))
    kind, held = segments[-1]
    segments[-1] = "text" if kind == "name" else kind, held
    told: list[tuple[str, str]] = []
    for kind, held in segments:
        text, stopped = held.decode(errors="replace"), None
        if kind == "text":
            text, stopped = first_stop(text, stop)
        if kind == "call":
            told.append((kind, text.strip()))
        elif told and told[-1][0] == kind:
            told[-1] = kind, told[-1][1] + text
        elif text:
            told.append((kind, text))
        if stopped is not None:
            return told, stopped
    return told, None


def told(events: Iterable[Event]) -> list[tuple[str, str]]:
    """Events as the oracle tells them; deltas of one kind joined."""
    found: list[tuple[str, str]] = []
    number = -1
    for event in events:
        match event:
            case ToolCallStart(index, identity, name):
                number += 1
                assert (index, identity) == (number, call_id("key", index))
                found.append(("call", name))
                continue
            case ToolCallArguments(index, text):
                assert index == number
                kind = "arguments"
            case TextDelta(text):
                kind = "text"
            case ReasoningDelta(text):
                kind = "reasoning"
        assert text
        if found and found[-1][0] == kind:
            found[-1] = kind, found[-1][1] + text
        else:
            found.append((kind, text))
    return found


tokens = st.lists(
    st.one_of(
        st.sampled_from([END, CALLS, ARGS, THINK, UNTHINK, OTHER]),
        st.sampled_from(list(b'ab {"')),
        st.sampled_from(list("é日🦅".encode())),
    ),
    max_size=40,
)
whole_segments = st.lists(
    st.one_of(
        st.sampled_from([[END], [CALLS], [ARGS], [THINK], [UNTHINK], [OTHER]]),
        st.text("ab日🦅", max_size=4).map(lambda text: list(text.encode())),
        st.just(ids(CALLS, "f", ARGS, "{}")),
        st.just(ids(THINK, "é", UNTHINK)),
    ),
    max_size=20,
).map(lambda parts: [token for part in parts for token in part])


@settings(max_examples=250, deadline=None)
@given(tokens | whole_segments, st.data())
def test_any_split_tells_what_the_oracle_tells(token_ids: list[int], data: st.DataObject) -> None:
    expected, _ = oracle(token_ids)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(token_ids)), max_size=6)))
    bounds = [0, *cuts, len(token_ids)]
    for pushes in (
        [token_ids],
        [[token] for token in token_ids],
        [token_ids[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)],
    ):
        events = parse(parser(), pushes)
        assert told(events) == expected
        answer = assemble(events)
        assert answer.text == "".join(text for kind, text in expected if kind == "text")
        assert answer.reasoning == "".join(text for kind, text in expected if kind == "reasoning")
        assert [call.name for call in answer.calls] == [text for kind, text in expected if kind == "call"]


@settings(max_examples=200, deadline=None)
@given(tokens)
def test_no_text_is_lost(token_ids: list[int]) -> None:
    """Every character comes out once and in order, wherever it comes out; only names lose outer spaces."""
    said = (
        "".join(text for _, text in told(parse(parser(), [token_ids]))).replace(" ", "").replace("\ufffd", "")
    )
    pieces = bytes(token for token in token_ids if token < 256).decode(errors="replace")
    assert set(said) <= set(pieces)
    ascii_only = [token for token in token_ids if token < 128]
    assert [char for char in said if char < "\x80"] == [chr(token) for token in ascii_only if token != 32]


@settings(max_examples=200, deadline=None)
@given(tokens, st.lists(st.text("ab\ufffd日", min_size=1, max_size=3), max_size=2).map(tuple), st.data())
@example(ids("xa", 0xE6, THINK, "b"), ("a\ufffd",), None)
def test_stop_strings_end_the_same_answer_in_any_split(
    token_ids: list[int], stop: tuple[str, ...], data: st.DataObject | None
) -> None:
    expected, stopped = oracle(token_ids, stop)
    size = 1 if data is None else data.draw(st.integers(1, 9))
    for step in {1, size}:
        ours = parser(*stop)
        pushes = [token_ids[begin : begin + step] for begin in range(0, len(token_ids), step)]
        assert told(parse(ours, pushes)) == expected
        assert ours.stopped == stopped
        if stopped is not None:
            assert ours.push(ids("more", THINK, "more")) == ours.flush() == []


@settings(max_examples=200, deadline=None)
@given(tokens, st.lists(st.text("ab{", min_size=1, max_size=2), max_size=2).map(tuple))
def test_a_model_without_control_tokens_yields_the_detokenizers_text(
    token_ids: list[int], stop: tuple[str, ...]
) -> None:
    vocabularies: list[dict[str, int]] = [
        {},
        {"</s>": END},
        {"[THINK]": THINK, "[TOOL_CALLS]": CALLS, "</s>": END},
    ]
    for special_tokens in vocabularies:
        plain = Detokenizer(Bytes(special_tokens), stop)
        ours = OutputParser(Bytes(special_tokens), "key", stop)
        for token in token_ids:
            text = plain.push((token,))
            assert ours.push((token,)) == ([TextDelta(text)] if text else [])
        text = plain.flush()
        assert ours.flush() == ([TextDelta(text)] if text else [])
        assert ours.stopped == plain.stopped


# --- by example ---


def test_a_whole_answer() -> None:
    assert whole(
        *(THINK, "Zwei Städte.", UNTHINK, "Moment."),
        *(CALLS, "get_weather", ARGS, '{"city": "Zürich"}', CALLS, "now", ARGS, "{}", END),
    ) == Answer("Moment.", "Zwei Städte.", calls(("get_weather", '{"city": "Zürich"}'), ("now", "{}")))


def test_events_come_as_soon_as_they_are_certain() -> None:
    ours = parser()
    first, second, third = "日".encode()
    assert ours.push([THINK]) == []
    assert ours.push([first, second]) == []
    assert ours.push([third, ord("a")]) == [ReasoningDelta("日a")]
    assert ours.push(ids(UNTHINK, "So")) == [TextDelta("So")]
    assert ours.push(ids(CALLS, "get")) == []
    assert ours.push(ids("_it")) == []
    assert ours.push([ARGS]) == [ToolCallStart(0, call_id("key", 0), "get_it")]
    assert ours.push(ids("{")) == [ToolCallArguments(0, "{")]
    assert ours.push(ids("}", CALLS, "f", ARGS, "{", "}", END)) == [
        ToolCallArguments(0, "}"),
        ToolCallStart(1, call_id("key", 1), "f"),
        ToolCallArguments(1, "{}"),
    ]
    assert ours.num_calls == 2
    assert ours.flush() == []


@pytest.mark.parametrize(
    ("pieces", "answer"),
    [
        ((THINK, "a", THINK, "b", UNTHINK, "c"), Answer("c", "ab", ())),
        ((THINK, 0xE6, THINK, 0x97, 0xA5, UNTHINK), Answer("", "日", ())),
        (("a", UNTHINK, "b", ARGS, "c"), Answer("abc", "", ())),
        ((THINK, "a", END), Answer("", "a", ())),
        ((THINK, "a"), Answer("", "a", ())),
        ((THINK, "a", CALLS, "f", ARGS, "{}"), Answer("", "a", calls(("f", "{}")))),
        ((CALLS, "f", ARGS, '{"a', END), Answer("", "", calls(("f", '{"a')))),
        ((CALLS, "f", ARGS, '{"a'), Answer("", "", calls(("f", '{"a')))),
        ((CALLS, "f", ARGS, "1", ARGS, "2", UNTHINK, "3"), Answer("", "", calls(("f", "123")))),
        ((CALLS, "f", ARGS, "1", THINK, "a", UNTHINK, "b"), Answer("b", "a", calls(("f", "1")))),
        ((CALLS, "f", END), Answer("f", "", ())),
        ((CALLS, "f", END, "g", ARGS, "h"), Answer("fgh", "", ())),
        ((CALLS, "f"), Answer("f", "", ())),
        (("a", CALLS, "f", CALLS, "g", ARGS), Answer("af", "", calls(("g", "")))),
        ((CALLS, "f", THINK, "a"), Answer("f", "a", ())),
        ((CALLS, " f\n", ARGS, "{}"), Answer("", "", calls(("f", "{}")))),
        ((CALLS, ARGS, "{}"), Answer("", "", calls(("", "{}")))),
        ((CALLS, "f", ARGS, "{}", END, "more", END), Answer("more", "", calls(("f", "{}")))),
        (("a", OTHER, "b"), Answer("ab", "", ())),
        ((0xE6, THINK, 0x97, UNTHINK, 0xA5), Answer("\ufffd\ufffd", "\ufffd", ())),
        ((0xE6, UNTHINK, 0x97, OTHER, 0xA5, END), Answer("日", "", ())),
    ],
)
def test_malformed_answers(pieces: tuple[str | int, ...], answer: Answer) -> None:
    assert whole(*pieces) == answer


def test_a_stream_does_not_wait_for_a_name_that_never_ends() -> None:
    ours = parser()
    text = '[{"name": "é' + "日" * 60
    events = [event for token in ids(CALLS, text) for event in ours.push([token])]
    assert assemble(events) == Answer(text, "", ())
    assert ours.num_calls == 0
    assert ours.push([ARGS]) == []  # too late
    rest = ours.push(ids("!"))
    assert assemble([*events, *rest]) == Answer(text + "!", "", ())
    name = "n" * 64
    assert whole(CALLS, "  ", name, ARGS, "{}").calls == calls((name, "{}"))


def test_stop_strings_are_for_text() -> None:
    ours = parser("END", "}")
    events = parse(ours, [ids(THINK, "END", UNTHINK, CALLS, "f", ARGS, "{}", THINK, UNTHINK, "a E", "ND b")])
    assert assemble(events) == Answer("a ", "END", calls(("f", "{}")))
    assert ours.stopped == "END"
    ours = parser("END")
    assert ours.push(ids("a E")) == [TextDelta("a ")]
    assert ours.push(ids(THINK, "x")) == [TextDelta("E"), ReasoningDelta("x")]
    assert ours.push(ids(UNTHINK, "ND")) == [TextDelta("ND")]
    assert ours.stopped is None
    ours = parser("f")
    assert assemble(parse(ours, [ids("a", CALLS, "ef", END, "b")])) == Answer("ae", "", ())
    assert ours.stopped == "f"
    with pytest.raises(RequestError, match="stop contains an empty string"):
        parser("")


def test_calls_are_text_where_no_tools_were_offered() -> None:
    events = parse(parser(tools=False), [ids(THINK, "a", CALLS, "b", UNTHINK, "c", CALLS, "f", ARGS, "{}")])
    assert assemble(events) == Answer("cf{}", "ab", ())


def test_call_ids_are_nine_letters_or_digits_and_depend_on_both() -> None:
    made = [call_id(key, index) for key in ("a", "b", "chatcmpl-1", "1", "11") for index in range(20)]
    assert len(set(made)) == len(made)
    assert all(len(each) == 9 and each.isascii() and each.isalnum() for each in made)
    assert made[0] == call_id("a", 0) == "9wJDKCg7J"


def test_ids_are_looked_up_by_name_in_mistrals_vocabulary() -> None:
    """What the model answers goes back into the next prompt as it was: parse, then encode."""
    tokenizer = tekken_tokenizer()
    text = tokenizer.encode
    arguments = json.dumps({"city": "日本 🎉"}, ensure_ascii=False)
    answer_ids = [
        *(34, *text("Die Frage: [TOOL_CALLS]?"), 35, *text("Moment 🎉.")),
        *(9, *text("get_weather"), 32, *text(arguments), 9, *text("now"), 32, *text("{}"), 2),
    ]
    ours = OutputParser(tokenizer, "key")
    answer = assemble(parse(ours, [[token] for token in answer_ids]))
    assert answer == Answer(
        "Moment 🎉.", "Die Frage: [TOOL_CALLS]?", calls(("get_weather", arguments), ("now", "{}"))
    )
    question = {"role": "user", "content": "Wetter?"}
    turn = {
        "role": "assistant",
        "content": answer.text,
        "reasoning_content": answer.reasoning,
        "tool_calls": [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls
        ],
    }
    results = [{"role": "tool", "tool_call_id": call.id, "content": "x"} for call in answer.calls]
    prompt = encode_chat(tokenizer, [question])
    assert encode_chat(tokenizer, [question, turn, *results])[: len(prompt) + len(answer_ids)] == [
        *prompt,
        *answer_ids,
    ]
