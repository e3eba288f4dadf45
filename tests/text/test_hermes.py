"""Calls between tags, read as they come: equal however the tokens arrive, nothing raised, lost or made up."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.text.hermes import CLOSE, OPEN, CallTextParser
from engine.text.output_parser import (
    Answer,
    Event,
    TextDelta,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
    assemble,
    call_id,
)
from tests.text.hermes import hermes_tokenizer

WEATHER = ("weather", '{"city": "Rome"}')
ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def parse(text: str, size: int = 1, stop: tuple[str, ...] = (), special_tags: bool = False) -> list[Event]:
    """Events of a text that comes ``size`` tokens at a time."""
    tokenizer = hermes_tokenizer(special_tags)
    ours = CallTextParser(tokenizer, "key", stop)
    ids = tokenizer.encode(text)
    events = [event for at in range(0, len(ids), size) for event in ours.push(ids[at : at + size])]
    return events + ours.flush()


def read(text: str, size: int = 1, stop: tuple[str, ...] = ()) -> Answer:
    found = [assemble(parse(text, size, stop, special_tags)) for special_tags in (False, True)]
    assert found[0] == found[1]
    return found[0]


def answer(text: str, *calls: tuple[str, str]) -> Answer:
    return Answer(text, "", tuple(ToolCall(call_id("key", n), *call) for n, call in enumerate(calls)))


CASES = [
    ("Hello.", answer("Hello.")),
    (ROME, answer("", WEATHER)),
    (f"I look.\n{ROME}", answer("I look.", WEATHER)),
    (f"{ROME}\n{ROME}", answer("", *[WEATHER] * 2)),
    (f"{ROME}\n\nDone.", answer("Done.", WEATHER)),
    (f"a\n\n{ROME} b {ROME} c", answer("a\nb c", *[WEATHER] * 2)),
    (f'{OPEN}{{"name":"f","arguments":{{}}}}{CLOSE}', answer("", ("f", "{}"))),
    (f'{OPEN} {{ "name" : "f" , "arguments" : [1, "}}"] }} {CLOSE}', answer("", ("f", '[1, "}"]'))),
    (f'{OPEN}{{"name": "f", "arguments": "{CLOSE} \\" }}"}}{CLOSE}', answer("", ("f", f'"{CLOSE} \\" }}"'))),
    (f'{OPEN}{{"name": "f", "arguments": 17}}{CLOSE}', answer("", ("f", "17"))),
    (f'{OPEN}{{"name": "f", "arguments": {{"a": 1}}, "id": 3}}{CLOSE}', answer("", ("f", '{"a": 1}'))),
    (f'{OPEN}{{"arguments": {{"a": "é"}}, "name": "f"}}{CLOSE}!', answer("!", ("f", '{"a": "é"}'))),
    (f'{OPEN}{{"name": "f"}}{CLOSE}', answer("", ("f", "{}"))),
    (f'{OPEN}{{"name": "\\u0066\\"", "arguments": {{}}}}{CLOSE}', answer("", ('f"', "{}"))),
    (f'{OPEN}{{"name": "\\q", "arguments": {{}}}}{CLOSE}', answer("", ("\\q", "{}"))),
    # cut short
    (f'{OPEN}\n{{"name": "f", "arguments": {{"a": "b', answer("", ("f", '{"a": "b'))),
    (f'{OPEN}\n{{"name": "f", "arguments": {{"a": 1}}}}', answer("", ("f", '{"a": 1}'))),
    (f'{OPEN}\n{{"name": "f", "argu', answer(f'{OPEN}\n{{"name": "f", "argu')),
    (f"so {OPEN}", answer(f"so {OPEN}")),
    ("so\n<tool_", answer("so\n<tool_")),
    # no calls, or broken ones
    (f"The tag {OPEN} begins a call.", answer(f"The tag {OPEN} begins a call.")),
    (f"{OPEN}{{broken}}{CLOSE} on", answer(f"{OPEN}{{broken}}{CLOSE} on")),
    (f"{OPEN}{{}}{CLOSE}", answer(f"{OPEN}{{}}{CLOSE}")),
    (f"{OPEN}{CLOSE}", answer(f"{OPEN}{CLOSE}")),
    (f"{CLOSE} {{}}", answer(f"{CLOSE} {{}}")),
    (f'{OPEN}{{"name": "f", "arguments": {{"a": {CLOSE}{ROME}', answer("", ("f", '{"a": '), WEATHER)),
    (f'{OPEN}{{"name": "f", "arguments": {{}} {ROME}', answer("", ("f", "{}"), WEATHER)),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_answers_are_read_as_written(text: str, expected: Answer, size: int) -> None:
    assert read(text, size) == expected


PIECES = [
    OPEN,
    CLOSE,
    "\n",
    '{"name": "f", "arguments": ',
    '{"a": "x"}',
    "}",
    "{",
    '"',
    "\\",
    "é",
    "END",
    ROME,
]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=8), st.integers(1, 9), st.sampled_from([(), ("END", "<tool")])
)
@example([ROME, "END", ROME], 2, ("END",))
@example([OPEN, OPEN, '{"name": "f", "arguments": '], 1, ())
@example([OPEN, '{"name": "', CLOSE, '", "arguments": {}}', CLOSE], 1, ())
def test_the_size_of_steps_changes_nothing(pieces: list[str], size: int, stop: tuple[str, ...]) -> None:
    text = "".join(pieces)
    whole = read(text, 10_000, stop)
    assert read(text, size, stop) == whole
    for event in parse(text, size, stop):
        assert isinstance(event, ToolCallStart) or event.text
    if OPEN not in text and not stop:
        assert whole == answer(text)


def test_arguments_stream_as_they_come() -> None:
    events = parse(ROME + "\nok", size=1)
    start = ToolCallStart(0, call_id("key", 0), "weather")
    letters = [ToolCallArguments(0, char) for char in '{"city": "Rome"}']
    assert events == [start, *letters, TextDelta("o"), TextDelta("k")]


def test_stop_strings_are_looked_for_in_the_text_only() -> None:
    text = 'EN\n<tool_call>{"name": "END", "arguments": {"a": "END"}}</tool_call> D so END no'
    for size in (1, 4, 1000):
        assert read(text, size, ("END",)) == answer("END so ", ("END", '{"a": "END"}'))
        assert assemble(parse("aENDb", size, ("END",))).text == "a"
    assert read(ROME, 1, (OPEN,)) == answer("")  # a stop string wins over a tag
    with pytest.raises(RequestError, match="empty string"):
        CallTextParser(hermes_tokenizer(), "key", ("a", ""))


def test_half_a_character_is_not_let_out() -> None:
    tokenizer = hermes_tokenizer()
    ours = CallTextParser(tokenizer, "key")
    first, second = "é".encode()
    assert ours.push([first]) == []
    assert ours.push([second]) == [TextDelta("é")]
    ours.push([first])
    assert ours.flush() == [TextDelta("\ufffd")]


def test_deeply_nested_arguments_are_a_matter_of_bytes() -> None:
    deep = '{"a":' * 5000 + "1" + "}" * 5000
    assert read(f'{OPEN}{{"name": "f", "arguments": {deep}}}{CLOSE}', 500) == answer("", ("f", deep))
    reversed_order = f'{OPEN}{{"arguments": {"[" * 100_000}, "name": "f"}}{CLOSE}'
    assert assemble(parse(reversed_order, 10_000)) == answer(reversed_order)
