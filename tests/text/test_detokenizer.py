"""Streaming text: whatever the pushes, the pieces make the whole, and stop strings cut at one place."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.text.detokenizer import Detokenizer
from tests.text.test_tokenizer import default_tokenizer


class Bytes:
    """A tokenizer whose token n is byte n; 256 is special."""

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


def detokenizer(*stop: str) -> Detokenizer:
    return Detokenizer(Bytes(), stop)


def run(detokenizer: Detokenizer, pushes: Iterable[Iterable[int]]) -> str:
    return "".join(detokenizer.push(push) for push in pushes) + detokenizer.flush()


def first_stop(text: str, stops: tuple[str, ...], num_safe: int = 0) -> tuple[str, str | None]:
    """(text before the stop, the stop), found by reading one character at a time; none ends in the first
    ``num_safe``."""
    for end in range(num_safe + 1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


tokens = st.lists(
    st.one_of(st.sampled_from(list(b"aab\n")), st.integers(0, 256), st.sampled_from(list("é日🦅".encode()))),
    max_size=40,
)
stops = st.lists(st.text("ab\né日\ufffd", min_size=1, max_size=4), max_size=3).map(tuple)


@settings(max_examples=400, deadline=None)
@given(tokens, stops, st.data())
@example(list(b"abcd"), ("bc", "abcd"), None)
def test_any_split_gives_the_same_text(
    token_ids: list[int], stop: tuple[str, ...], data: st.DataObject
) -> None:
    whole = b"".join(map(Bytes().token_bytes, token_ids)).decode("utf-8", errors="replace")
    expected, expected_stop = first_stop(whole, stop)
    cuts = [] if data is None else sorted(data.draw(st.lists(st.integers(0, len(token_ids)), max_size=6)))
    bounds = [0, *cuts, len(token_ids)]
    splits = [
        [token_ids],
        [[token] for token in token_ids],
        [token_ids[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)],
    ]
    for pushes in splits:
        ours = detokenizer(*stop)
        assert run(ours, pushes) == expected
        assert ours.stopped == expected_stop


@settings(max_examples=400, deadline=None)
@given(tokens, stops, st.integers(0, 12))
@example(list(b"abcx"), ("abcd", "bc"), 3)  # a stop in what is held for another
@example(list(b"abcd"), ("bcd",), 3)
@example(list(b"aab"), ("ab",), 3)
@example([*b"xa", 0xE6], ("a\ufffd",), 3)
def test_no_stop_ends_in_the_first_tokens(token_ids: list[int], stop: tuple[str, ...], num_safe: int) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pieces = [decoder.decode(Bytes().token_bytes(token)) for token in token_ids]
    # What is no character yet at the end belongs to the last token.
    pieces = [*pieces[:-1], pieces[-1] + decoder.decode(b"", final=True)] if pieces else []
    expected = first_stop("".join(pieces), stop, len("".join(pieces[:num_safe])))
    ours = detokenizer(*stop)
    text = "".join(ours.push((token,), number >= num_safe) for number, token in enumerate(token_ids))
    assert (text + ours.flush(), ours.stopped) == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=30), st.integers(1, 7))
def test_the_default_models_tokens_make_the_same_text_as_decode(token_ids: list[int], step: int) -> None:
    ours = Detokenizer(default_tokenizer())
    pushes = [token_ids[begin : begin + step] for begin in range(0, len(token_ids), step)]
    assert run(ours, pushes) == default_tokenizer().decode(token_ids)


def test_half_a_character_waits_for_the_other_half() -> None:
    ours = detokenizer()
    first, second, third = "日".encode()
    assert ours.push([first]) == ""
    assert ours.push([second, 256]) == ""
    assert ours.push([third, ord("!")]) == "日!"
    assert ours.push([first]) == ""
    assert ours.flush() == "\ufffd"


def test_what_may_begin_a_stop_string_is_held_and_no_more() -> None:
    ours = detokenizer("\n\nUser", "END")
    assert ours.push(b"Hi.\n") == "Hi."
    assert ours.push(b"\nUs") == ""
    assert ours.push(b"ing E") == "\n\nUsing "
    assert ours.push(b"N") == ""
    assert ours.stopped is None
    assert ours.push(b"D and more") == ""
    assert str(ours.stopped) == "END"
    assert ours.push(b"more") == ""
    assert ours.flush() == ""


def test_text_before_a_stop_comes_out_with_it_and_held_text_with_the_end() -> None:
    ours = detokenizer("stop")
    assert ours.push(b"go sto") == "go "
    assert ours.push(b"p") == ""
    assert ours.stopped == "stop"
    ours = detokenizer("stop")
    assert ours.push(b"go sto") + ours.flush() == "go sto"
    assert ours.stopped is None
    assert ours.flush() == ""


def test_flush_can_complete_a_stop() -> None:
    ours = detokenizer("a\ufffd")
    assert ours.push(b"xa\xe6") == "x"
    assert ours.flush() == ""
    assert ours.stopped == "a\ufffd"


def test_the_first_stop_to_be_complete_wins() -> None:
    ours = detokenizer("abcd", "bc")
    assert ours.push(b"xabcd") == "xa"
    assert ours.stopped == "bc"
    ours = detokenizer("bc", "abc")
    assert ours.push(b"xabcd") == "x"
    assert ours.stopped == "abc"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="stop contains an empty string") as refused:
        detokenizer("a", "")
    assert refused.value.param == "stop"
