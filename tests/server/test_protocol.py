"""Requests: what is accepted, what is refused, and which field the refusal names."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from engine.core import SPECULATION_OFF, Grammar, Speculation
from engine.errors import RequestError
from engine.server import protocol
from engine.server.sampling_fields import choice_seed, sampling_params
from tests.server.fakes import ByteTokenizer

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def chat(**fields: Any) -> protocol.ChatRequest:
    return protocol.decode_chat(msgspec.json.encode({"messages": MESSAGES, **fields}))


def sampling(**fields: Any) -> Any:
    return sampling_params(chat(**fields), 10, 64, ByteTokenizer())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.01}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"seed": 1 << 63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": ["x", "x" * 257]}, "stop[1]"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": 3}, "cache_salt"),
        ({"speculation": "on"}, "speculation"),
        ({"speculation": {"nodes": 65}}, "speculation.nodes"),
        ({"speculation": {"depth": 17}}, "speculation.depth"),
        ({"speculation": {"top_k": 0}}, "speculation.top_k"),
        ({"speculation": {"width": 3}}, "speculation.width"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "pope", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": None, "tool_call_id": "a"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "reasoning_content": "x"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].content"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL] * 129}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "thinking"}]}]},
            "messages[0].content[0].thinking",
        ),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1000}, "repetition_penalty"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]"),
        ({"logit_bias": {"5": None}}, "logit_bias[...]"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": "json_object"}, "response_format"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [{}]}, "tools[0].function"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [TOOL, {"function": {"name": "f g"}}]}, "tools[1].function.name"),
        ({"tools": [TOOL, {"function": {"name": "f", "parameters": []}}]}, "tools[1].function.parameters"),
        ({"tools": [{"function": {"name": "f", "strict": 1}}]}, "tools[0].function.strict"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "custom", "function": {"name": "f"}}}, "tool_choice.type"),
        ({"tool_choice": {"type": "function", "function": "f"}}, "tool_choice.function"),
        ({"tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice.allowed_tools"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"reasoning_effort": 3}, "reasoning_effort"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"bad_words": ["x", " "]}, "bad_words[1]"),
        ({"bad_words": ["x" * 257]}, "bad_words[0]"),
        ({"bad_words": ["x"] * 129}, "bad_words"),
        ({"include_stop_str_in_output": "yes"}, "include_stop_str_in_output"),
        ({"echo": True}, "echo"),
        ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a"] * 1025}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs.grammar"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs.regex",
        ),
    ],
)
def test_refusal_names_the_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("name", "value", "now"),
    [
        ("guided_json", {}, "json"),
        ("guided_regex", "a", "regex"),
        ("guided_choice", ["a"], "choice"),
        ("guided_grammar", "a", "grammar"),
        ("json_schema", "{}", "json"),
        ("regex", "a", "regex"),
        ("ebnf", "a", "grammar"),
    ],
)
def test_older_names_of_structured_output_are_refused_with_todays(name: str, value: Any, now: str) -> None:
    with pytest.raises(RequestError, match=f"structured_outputs with the field '{now}'") as caught:
        chat(**{name: value})
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object", "")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"x": 1}}}},
            Grammar("json_schema", '{"x": 1}'),
        ),
        ({"structured_outputs": {}}, None),
        ({"structured_outputs": {"json": {"x": 1}}}, Grammar("json_schema", '{"x": 1}')),
        ({"structured_outputs": {"json": '{"x": 1}'}}, Grammar("json_schema", '{"x": 1}')),
        ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Grammar("choice", '["a", "b"]')),
        ({"structured_outputs": {"grammar": "start: x"}}, Grammar("lark", "start: x")),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_object", "")),
    ],
)
def test_what_an_answer_must_match(fields: dict[str, Any], grammar: Grammar | None) -> None:
    wanted = protocol.grammar_of(chat(**fields))
    assert (None if wanted is None else wanted.grammar) == grammar


@pytest.mark.parametrize(
    "fields",
    [
        {
            "presence_penalty": 0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "logit_bias": {},
            "tools": [],
        },
        {"logprobs": False, "top_logprobs": 0, "response_format": {"type": "text"}, "min_tokens": 0, "n": 1},
        {
            "temperature": None,
            "top_p": None,
            "stop": None,
            "max_tokens": None,
            "stream_options": None,
            "n": None,
        },
        {"tools": None, "tool_choice": "auto", "parallel_tool_calls": True, "reasoning_effort": None},
        {"user": "me", "metadata": {"a": [1, {"b": None}]}, "store": True, "unheard_of": 7},
    ],
)
def test_what_asks_for_nothing_is_accepted(fields: dict[str, Any]) -> None:
    chat(**fields)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b'{"messages": NaN}',
        b'{"messages": "\xff"}',
        b'{"messages": "\\ud800"}',
        b'{"x": ' + b"[" * 100_000,
        b'{"tools": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e400}',
        b'{"messages": [{"role": "user", "content": "x"}], "top_k": ' + b"9" * 5000 + b"}",
    ],
)
def test_broken_bodies_are_refused_shortly(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        protocol.decode_chat(body)
    assert len(str(caught.value)) < 700


def test_what_edits_mean_to_the_engine() -> None:
    found = sampling(
        presence_penalty=-2,
        frequency_penalty=0.5,
        repetition_penalty=1.2,
        logit_bias={"5": -100, "7": 2.5},
        bad_words=["ab", " ab", "c"],
        min_tokens=3,
        logprobs=True,
        top_logprobs=4,
        include_stop_str_in_output=True,
    )
    assert (found.presence_penalty, found.frequency_penalty, found.repetition_penalty) == (-2, 0.5, 1.2)
    assert found.logit_bias == ((5, -100.0), (7, 2.5))
    assert found.bad_words == (tuple(b"ab"), tuple(b" ab"), tuple(b"c"), tuple(b" c"))
    assert (found.min_tokens, found.logprobs, found.include_stop_str_in_output) == (3, 4, True)
    assert sampling(logprobs=True).logprobs == 0
    assert sampling(logprobs=False, top_logprobs=0).logprobs is None
    text = protocol.decode_completion(b'{"prompt": "a", "logprobs": 2}')
    assert sampling_params(text, 1, 64, ByteTokenizer()).logprobs == 2
    for fields, param in (
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"min_tokens": 55}, "min_tokens"),
        ({"bad_words": ["x", "y" * 65]}, "bad_words[1]"),
    ):
        with pytest.raises(RequestError) as caught:
            sampling(**fields)
        assert caught.value.param == param


def test_every_choice_has_a_seed_of_its_own() -> None:
    """The first that of the request; neighbouring requests share none."""
    seeds = [choice_seed(seed, choice) for seed in (0, 1, 2, 2**63 - 1, -(2**63)) for choice in range(8)]
    assert len(set(seeds)) == len(seeds)
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert choice_seed(-5, 0) == -5


def test_sampling_defaults_and_limits() -> None:
    default = sampling()
    assert (default.temperature, default.top_p, default.top_k, default.min_p) == (1.0, 1.0, 0, 0.0)
    assert default.max_tokens == 54  # the rest of the context
    assert sampling(max_tokens=1000).max_tokens == 54
    assert sampling(max_tokens=7).max_tokens == 7
    assert sampling(max_tokens=7, max_completion_tokens=3).max_tokens == 3
    assert sampling(top_k=-1).top_k == 0
    assert sampling(top_k=10**9).top_k == ByteTokenizer.vocab_size
    assert sampling(temperature=1e-30).temperature == 0.0
    assert sampling(stop="a").stop == ("a",)
    assert sampling(stop=["a", "b"]).stop == ("a", "b")
    assert sampling(seed=-5).seed == -5
    assert sampling().seed != sampling().seed


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, None),
        ("auto", None),
        ("off", SPECULATION_OFF),
        ({"nodes": 4, "depth": 2, "top_k": 3}, Speculation(4, 2, 3)),
        ({"nodes": 16}, Speculation(16, 5, 2)),
    ],
)
def test_speculation(wanted: Any, expected: Speculation | None) -> None:
    assert protocol.speculation(chat(speculation=wanted), default=Speculation(9, 5, 2)) == expected


@pytest.mark.parametrize(("fields", "limit"), [({"max_tokens": 7}, 7), ({"max_completion_tokens": 3}, 3)])
def test_completions_take_both_limits(fields: dict[str, int], limit: int) -> None:
    for given in (fields, {"max_tokens": 7, **fields}):
        call = protocol.decode_completion(msgspec.json.encode({"prompt": "a", **given}))
        assert call.token_limit() == limit
    with pytest.raises(RequestError) as caught:
        protocol.decode_completion(b'{"prompt": "a", "max_completion_tokens": 0}')
    assert caught.value.param == "max_completion_tokens"


def test_unknown_fields_are_named() -> None:
    body = msgspec.json.encode({"user": "me", "messages": MESSAGES, "top_k": 3, "lo\ng": [{"seed": 1}]})
    call = protocol.decode_chat(body)
    assert protocol.unknown_fields(body, call) == ["user", "lo\ng"]
    assert protocol.unknown_fields(msgspec.json.encode(call), call) == []
    with pytest.raises(RequestError, match="not valid JSON"):
        protocol.unknown_fields(b'{"\xff": 1}', call)


def test_messages_keep_what_is_known_and_given() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    calls = {"role": "assistant", "reasoning_content": "hm", "tool_calls": [CALL]}
    given: list[dict[str, Any]] = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts, "name": "me"},
        calls,
        {"role": "tool", "content": "x", "tool_call_id": "a"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "so"}], "reasoning": "hm"},
    ]
    noisy = [{**message, "refusal": None, "annotations": []} for message in given]
    noisy[2] |= {"content": None, "tool_calls": [{**CALL, "index": 0}]}
    assert protocol.messages(chat(messages=noisy)) == given


@pytest.mark.parametrize(
    ("fields", "offers"),
    [
        ({}, False),
        ({"tools": []}, False),
        ({"tools": [TOOL]}, True),
        ({"tools": [TOOL], "tool_choice": "auto"}, True),
        ({"tools": [TOOL], "tool_choice": "none"}, False),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, True),
    ],
)
def test_which_requests_offer_tools(fields: dict[str, Any], offers: bool) -> None:
    assert chat(**fields).offers_tools is offers


@pytest.mark.parametrize("tools", [[{}], "f", {}])
def test_completions_know_no_tools(tools: object) -> None:
    protocol.decode_completion(b'{"prompt": "a", "tools": []}')
    with pytest.raises(RequestError) as caught:
        protocol.decode_completion(msgspec.json.encode({"prompt": "a", "tools": tools}))
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts(prompt: Any, expected: Any) -> None:
    assert protocol.prompts(protocol.decode_completion(msgspec.json.encode({"prompt": prompt}))) == expected


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([], "prompt"),
        (["a"] * 17, "prompt"),
        ([1, "a"], "prompt"),
        ([[1], 2], "prompt"),
        (5, "prompt"),
        ([[1.5]], "prompt[0][0]"),
        (None, "prompt"),
    ],
)
def test_bad_prompts(prompt: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        protocol.decode_completion(msgspec.json.encode({"prompt": prompt}))
    assert caught.value.param == param
