"""Deltas to text and figures: stop strings, held back text, counts and times."""

from __future__ import annotations

from typing import Any, cast

import pytest

from engine.core import SPECULATION_OFF, Delta, Request, SamplingParams, Speculation
from engine.server.metrics import RequestStats, StampedDelta, summarise
from engine.server.output import Output, Reading, text_of
from tests.server.fakes import EOS, ByteTokenizer, script
from tests.text.hermes import hermes_tokenizer

TREE = Speculation(nodes=4, depth=3, top_k=2)


def output(stop: tuple[str, ...] = (), speculation: Speculation = TREE, **more: Any) -> Output:
    request = Request(1, (1, 2), SamplingParams(stop=stop, **more))
    return Output(cast(Any, ByteTokenizer()), request, speculation, arrival=10.0)


def stamped(deltas: list[Delta]) -> list[StampedDelta]:
    """Step i runs from second 11 + i to 12 + i."""
    return [StampedDelta(delta, 11.0 + number, 12.0 + number) for number, delta in enumerate(deltas)]


def texts(out: Output, deltas: list[Delta]) -> list[str]:
    """What each step adds to the text."""
    return [text_of(out.push(one)) for one in stamped(deltas)]


def chunks(text: bytes, size: int) -> list[bytes]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def test_end_of_text_token_has_no_text_but_counts() -> None:
    out = output()
    assert texts(out, script(b"He", b"llo")) == ["He", "llo"]
    assert (out.answer.text, out.finish_reason, out.num_tokens) == ("Hello", "stop", 6)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 20])
def test_stop_string_does_not_depend_on_the_size_of_steps(size: int) -> None:
    out = output(stop=("END", "\n\n"))
    for one in stamped(script(*chunks("Caf\u00e9 ENTER END and more".encode(), size), finish="length")):
        out.push(one)
    assert (out.answer.text, out.finish_reason, out.num_tokens) == ("Caf\u00e9 ENTER ", "stop", 15)


def test_held_back_text_is_flushed_at_the_end() -> None:
    out = output(stop=("END",))
    assert texts(out, script(b"a E", b"N", finish="length")) == ["a ", "EN"]


def test_incomplete_characters_wait() -> None:
    out = output()
    assert texts(out, script(*chunks("\u00e9\u20ac".encode(), 1), finish="length")) == [
        "",
        "\u00e9",
        "",
        "",
        "\u20ac",
    ]


def test_nothing_follows_the_end() -> None:
    out = output(stop=("b",))
    assert texts(out, script(b"abc", b"def")) == ["a", ""]
    assert out.num_tokens == 2


def test_figures_of_one_answer() -> None:
    out = output()
    prefill = Delta(1, (), None, is_decode=False)
    for one in stamped([prefill, *script(b"a", b"bcd", b"e", b"fg", finish="length")]):
        out.push(one)
    metrics = summarise([out.stats])
    assert metrics.queue_time_ms == 1000.0  # arrived at 10, first worked on at 11
    assert metrics.time_to_first_token_ms == 3000.0
    assert metrics.generation_time_ms == 3000.0  # tokens came at 13, 14, 15 and 16
    assert metrics.mean_itl_ms == 500.0  # six tokens after the first
    assert metrics.tokens_per_second == 2.0
    spec = metrics.speculative_decoding
    assert spec is not None
    assert spec.acceptance_histogram == [1, 1, 1, 0]  # depth 3; 0, 1 and 2 accepted once each
    assert (spec.num_spec_steps, spec.num_draft_tokens, spec.num_accepted_draft_tokens) == (3, 9, 3)
    assert (spec.mean_acceptance_length, spec.num_spec_tokens) == (2.0, 3)
    assert spec.draft_acceptance_rate == pytest.approx(1 / 3, abs=1e-4)


@pytest.mark.parametrize(
    ("stop", "num_tokens", "histogram"),
    [("d", 4, [0, 0, 1, 0]), ("b", 2, [1, 0, 0, 0]), ("g", 7, [0, 0, 2, 0])],
)
def test_what_follows_a_stop_string_was_not_accepted(
    stop: str, num_tokens: int, histogram: list[int]
) -> None:
    out = output(stop=(stop,))
    for one in stamped(script(b"a", b"bcd", b"efg", finish="length")):
        out.push(one)
    spec = summarise([out.stats]).speculative_decoding
    assert spec is not None
    assert spec.acceptance_histogram == histogram
    assert (out.num_tokens, out.finish_reason) == (num_tokens, "stop")
    assert out.num_tokens == 1 + spec.num_spec_steps + spec.num_accepted_draft_tokens


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_an_end_among_the_accepted_tokens_counts_them_once(num_tokens: int) -> None:
    """The engine ends the answer at a token of the tree, so that no token of the target's own follows."""
    out = output()
    prefill, step = script(b"a", b"bcd"[:num_tokens], finish="length", accepted=num_tokens)
    for one in stamped([prefill, step]):
        out.push(one)
    spec = summarise([out.stats]).speculative_decoding
    assert spec is not None
    assert (spec.num_spec_steps, spec.num_accepted_draft_tokens) == (1, num_tokens - 1)
    assert out.num_tokens == 1 + spec.num_spec_steps + spec.num_accepted_draft_tokens


def test_figures_without_speculation_or_tokens() -> None:
    off = output(speculation=SPECULATION_OFF)
    off.push(StampedDelta(Delta(1, (EOS,), "stop", is_decode=False), 11.0, 12.0))
    metrics = summarise([off.stats])
    assert metrics.speculative_decoding is None
    assert (metrics.mean_itl_ms, metrics.tokens_per_second, metrics.generation_time_ms) == (None, None, 0.0)
    nothing = summarise([RequestStats(arrival=1.0, most_accepted=2)])
    assert nothing.time_to_first_token_ms is None
    assert nothing.speculative_decoding is not None
    assert nothing.speculative_decoding.mean_acceptance_length is None


def test_figures_of_several_answers_add_up() -> None:
    outs = [output(), output()]
    for out in outs:
        for one in stamped(script(b"a", b"bcd", finish="length")):
            out.push(one)
    metrics = summarise([out.stats for out in outs])
    assert metrics.mean_itl_ms == pytest.approx(333.333)
    assert metrics.tokens_per_second == 6.0
    assert metrics.speculative_decoding is not None
    assert metrics.speculative_decoding.acceptance_histogram == [0, 0, 2, 0]


@pytest.mark.parametrize("size", [1, 2, 5, 20])
def test_stop_string_stays_if_it_is_asked_for(size: int) -> None:
    params = SamplingParams(stop=("END",), include_stop_str_in_output=True)
    out = Output(cast(Any, ByteTokenizer()), Request(1, (1,), params), TREE, arrival=10.0)
    grown = "".join(texts(out, script(*chunks(b"so ENTER END and more", size), finish="length")))
    assert grown == out.answer.text == "so ENTER END"
    assert (out.finish_reason, out.num_tokens) == ("stop", 12)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 20])
@pytest.mark.parametrize(
    ("min_tokens", "text", "num_tokens"),
    [
        (2, "a ", 5),  # ends with token 5
        (4, "a ", 5),  # min_tokens is what comes before it
        (5, "a END b ", 11),  # the next one
        (10, "a END b ", 11),
        (11, "a END b END c", 13),
    ],
)
def test_stop_strings_wait_for_min_tokens(size: int, min_tokens: int, text: str, num_tokens: int) -> None:
    out = output(stop=("END",), min_tokens=min_tokens)
    for one in stamped(script(*chunks(b"a END b END c", size), finish="length")):
        out.push(one)
    reason = "length" if min_tokens == 11 else "stop"
    assert (out.answer.text, out.finish_reason, out.num_tokens) == (text, reason, num_tokens)


@pytest.mark.parametrize(
    ("tokenizer", "reading"),
    [
        (ByteTokenizer(), Reading.TEXT),
        (ByteTokenizer(), Reading.CHAT),
        (hermes_tokenizer(), Reading.CHAT_WITH_TOOLS),
    ],
    ids=["text", "markers", "tags"],
)
@pytest.mark.parametrize(
    ("min_tokens", "text"), [(3, "a "), (4, "a "), (5, "a END "), (8, "a END "), (9, "a END ENDED")]
)
def test_every_reader_waits_for_min_tokens(
    tokenizer: Any, reading: Reading, min_tokens: int, text: str
) -> None:
    params = SamplingParams(stop=("EN", "END"), min_tokens=min_tokens)
    out = Output(tokenizer, Request(1, (1,), params), TREE, 10.0, reading)
    for one in stamped(script(b"a EN", b"D EN", b"DED", finish="length")):
        out.push(one)
    assert out.answer.text == text


@pytest.mark.parametrize("min_tokens", [0, 100])
def test_a_tag_that_may_not_stop_is_a_tag(min_tokens: int) -> None:
    call = b'<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    params = SamplingParams(stop=("<tool_call>",), min_tokens=min_tokens)
    out = Output(hermes_tokenizer(), Request(1, (1,), params), TREE, 10.0, Reading.CHAT_WITH_TOOLS)
    out.push(StampedDelta(Delta(1, (*call, EOS), "stop"), 11.0, 12.0))
    assert [found.name for found in out.answer.calls] == (["f"] if min_tokens else [])


@pytest.mark.parametrize(("min_tokens", "text"), [(2, "ab"), (3, "abc")])
def test_a_token_that_may_not_stop_has_its_text(min_tokens: int, text: str) -> None:
    """A grammar can be at its end with a stop token that comes too early to be one."""
    out = output(stop_token_ids=(ord("c"),), min_tokens=min_tokens)
    out.push(StampedDelta(Delta(1, tuple(b"abc"), "stop"), 11.0, 12.0))
    assert (out.answer.text, out.num_tokens) == (text, 3)


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abc")])
def test_a_stop_token_counts_but_is_left_out(include: bool, text: str) -> None:
    params = SamplingParams(stop_token_ids=(ord("c"),), include_stop_str_in_output=include)
    out = Output(cast(Any, ByteTokenizer()), Request(1, (1,), params), TREE, arrival=10.0)
    out.push(StampedDelta(Delta(1, tuple(b"abc"), "stop"), 11.0, 12.0))
    assert (out.answer.text, out.num_tokens) == (text, 3)
    long = Output(cast(Any, ByteTokenizer()), Request(1, (1,), params), TREE, arrival=10.0)
    long.push(StampedDelta(Delta(1, tuple(b"abc"), "length"), 11.0, 12.0))
    assert long.answer.text == "abc", "the length ended it"
