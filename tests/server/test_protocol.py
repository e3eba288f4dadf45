"""Requests: what is accepted, what is refused, and which field the refusal names."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from engine.core import SPECULATION_OFF, Grammar, Speculation
from engine.errors import RequestError
from engine.server import protocol

MESSAGES = [{"role": "user", "content": "Hi"}]
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def chat(**fields: Any) -> protocol.ChatRequest:
    return protocol.decode_chat(msgspec.json.encode({"messages": MESSAGES, **fields}))


def sampling(**fields: Any) -> Any:
    return protocol.sampling_params(chat(**fields), prompt_len=10, max_model_len=64, vocab_size=100)


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
        ({"n": 2}, "n"),
        ({"seed": 1 << 63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
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
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 0}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": "json_object"}, "response_format"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [{}] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"reasoning_effort": 3}, "reasoning_effort"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"bad_words": ["x"]}, "bad_words"),
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
    assert protocol.sampling_params(chat(**fields), 1, 10, 100).grammar == grammar


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


def test_sampling_defaults_and_limits() -> None:
    default = sampling()
    assert (default.temperature, default.top_p, default.top_k, default.min_p) == (1.0, 1.0, 0, 0.0)
    assert default.max_tokens == 54  # the rest of the context
    assert sampling(max_tokens=1000).max_tokens == 54
    assert sampling(max_tokens=7).max_tokens == 7
    assert sampling(max_tokens=7, max_completion_tokens=3).max_tokens == 3
    assert sampling(top_k=-1).top_k == 0
    assert sampling(top_k=10**12).top_k == 100
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
        ({"tools": [{}]}, True),
        ({"tools": [{}], "tool_choice": "auto"}, True),
        ({"tools": [{}], "tool_choice": "none"}, False),
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
