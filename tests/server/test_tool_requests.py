"""Tools, their results and the reasoning effort in requests: what reaches the prompt, and what is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine.text.mistral_chat import encode_chat
from tests.server.calls import allowed, named, with_results
from tests.server.fakes import server
from tests.server.mistral import QUESTION, TWO_CALLS, WEATHER, engine
from tests.text.tekken import spell, tekken_tokenizer

CHAT = "/v1/chat/completions"
WITH_TOOLS = {**QUESTION, "tools": [WEATHER]}
RESULTS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "Rome"}, {"type": "text", "text": "?"}],
        "name": "me",
    },
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning_content": "Ask.",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city":"R"}'},
            },
            {
                "id": "call_2",
                "type": "function",
                "function": {"name": "weather", "arguments": "{}"},
                "index": 1,
            },
        ],
    },
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "rain"}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sun", "name": "weather"},
]


def test_results_reach_the_prompt() -> None:
    written_out = spell(
        *("<s>", "[SYSTEM_PROMPT]", "Be brief.", "[/SYSTEM_PROMPT]"),
        "[AVAILABLE_TOOLS]",
        '[{"type": "function", "function": {"name": "weather", "description": "Weather of a city", '
        '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'
        "}}]",
        *("[/AVAILABLE_TOOLS]", "[MODEL_SETTINGS]", '{"reasoning_effort": "high"}', "[/MODEL_SETTINGS]"),
        *("[INST]", "Rome?", "[/INST]", "[THINK]", "Ask.", "[/THINK]"),
        *("[TOOL_CALLS]", "weather", "[ARGS]", '{"city": "R"}', "[TOOL_CALLS]", "weather", "[ARGS]", "{}"),
        *("</s>", "[TOOL_RESULTS]", "sun", "[/TOOL_RESULTS]", "[TOOL_RESULTS]", "rain", "[/TOOL_RESULTS]"),
    )

    async def scenario() -> None:
        async with server(engine(("ok",)), tokenizer=tekken_tokenizer()) as api:
            body = {"messages": RESULTS, "tools": [WEATHER], "reasoning_effort": "high"}
            assert (await api.post(CHAT, body))[0] == 200
            assert (await api.post(CHAT, {**body, "tool_choice": "none"}))[0] == 200
            offered, kept_back = api.engine.added
            assert list(offered.prompt) == written_out
            assert list(offered.prompt) == encode_chat(
                tekken_tokenizer(), RESULTS, tools=[WEATHER], reasoning_effort="high"
            )
            assert list(kept_back.prompt) == encode_chat(tekken_tokenizer(), RESULTS, reasoning_effort="high")

    asyncio.run(scenario())


def test_an_answer_can_be_sent_back_with_its_results() -> None:
    async def scenario() -> None:
        async with server(engine(*TWO_CALLS), tokenizer=tekken_tokenizer()) as api:
            message = (await api.post(CHAT, WITH_TOOLS))[1]["choices"][0]["message"]
            messages = with_results(QUESTION["messages"], message)
            assert (await api.post(CHAT, {**WITH_TOOLS, "messages": messages}))[0] == 200
            first, second = (list(request.prompt) for request in api.engine.added)
            answer = spell(*(piece for step in TWO_CALLS for piece in step))
            assert tekken_tokenizer().decode(second[: len(first)]) == tekken_tokenizer().decode(first)
            sun = spell("[TOOL_RESULTS]", "sun", "[/TOOL_RESULTS]")
            rest = second[len(first) :]
            assert [index for index in rest if index < 1000] == [
                *(index for index in answer if index < 1000),
                *(2, 7, 8, 7, 8),
            ]
            assert rest[-2 * len(sun) :] == sun * 2

    asyncio.run(scenario())


@pytest.mark.parametrize("effort", [None, "none", "high"])
def test_reasoning_effort_reaches_the_prompt(effort: str | None) -> None:
    async def scenario() -> None:
        async with server(engine(("ok",)), tokenizer=tekken_tokenizer()) as api:
            assert (await api.post(CHAT, {**QUESTION, "reasoning_effort": effort}))[0] == 200
            [request] = api.engine.added
            settings = f'{{"reasoning_effort": "{effort or "none"}"}}'
            assert list(request.prompt) == spell(
                "<s>", "[MODEL_SETTINGS]", settings, "[/MODEL_SETTINGS]", "[INST]", "Hi", "[/INST]"
            )

    asyncio.run(scenario())


IMAGE = {"type": "image_url", "image_url": {"url": "http://example.org/cat.png"}}


@pytest.mark.parametrize(
    ("fields", "param", "code", "message"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]},
            "messages[0].content[1].type",
            "unsupported_value",
            "'image_url' are not supported",
        ),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "invalid_value", "there are no tools"),
        (
            {"tools": None, "tool_choice": named("weather")},
            "tool_choice",
            "invalid_value",
            "there are no tools",
        ),
        ({"tool_choice": named("whether")}, "tool_choice", "invalid_value", "'whether', expected one of"),
        ({"tool_choice": allowed("auto", "time")}, "tool_choice", "invalid_value", "'time', expected"),
        (
            {"reasoning_effort": "medium"},
            "reasoning_effort",
            "unsupported_value",
            "supported: 'none', 'high'",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "invalid_value", "missing required"),
        ({"tools": [{"function": {"name": "f g"}}]}, "tools[0].function.name", "invalid_value", "regex"),
        ({"messages": RESULTS[:3]}, "messages", "invalid_value", "Expected last role"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "messages",
            "invalid_value",
            "Expected last role",
        ),
        (
            {"messages": [*QUESTION["messages"], {"role": "tool", "content": "x"}]},
            "messages[1].tool_call_id",
            "invalid_value",
            "missing",
        ),
        ({"tools": [WEATHER] * 20}, "messages", "context_length_exceeded", "max_model_len is 512"),
        (
            {"tools": [{"function": {"name": "f", "description": "x" * (1 << 16)}}]},
            "tools",
            "context_length_exceeded",
            "bytes, hence at least",
        ),
        (
            {"messages": [{"role": "user", "content": "x" * (1 << 16)}]},
            "messages",
            "context_length_exceeded",
            "bytes, hence at least",
        ),
        (
            {"messages": [{**RESULTS[2], "reasoning_content": "x" * (1 << 16)}]},
            "messages",
            "context_length_exceeded",
            "bytes, hence at least",
        ),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], param: str, code: str, message: str) -> None:
    async def scenario() -> None:
        async with server(engine(("ok",)), tokenizer=tekken_tokenizer()) as api:
            for stream in (False, True):
                status, reply, _ = await api.post(CHAT, {**WITH_TOOLS, **fields, "stream": stream})
                error = reply["error"]
                assert (status, error["param"], error["code"]) == (400, param, code)
                assert error["type"] == "invalid_request_error"
                assert message in error["message"]
            assert api.engine.added == []

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER]}, "tools"),
        ({"reasoning_effort": "none"}, "reasoning_effort"),
        ({"messages": RESULTS}, "messages[2].tool_calls"),
        ({"messages": RESULTS[-1:]}, "messages[0].role"),
    ],
)
def test_models_with_a_template_refuse_what_it_has_no_place_for(fields: dict[str, Any], param: str) -> None:
    async def scenario() -> None:
        async with server() as api:
            status, reply, _ = await api.post(CHAT, {**QUESTION, **fields})
            error = reply["error"]
            assert (status, error["param"], error["code"]) == (400, param, "unsupported_parameter")
            assert "this model's chat template does not support it" in error["message"]
            for harmless in ({"tools": [WEATHER], "tool_choice": "none"}, {"parallel_tool_calls": True}):
                assert (await api.post(CHAT, {**QUESTION, **harmless}))[0] == 200
            assert [bytes(request.prompt) for request in api.engine.added] == [b"u:Hi;"] * 2

    asyncio.run(scenario())
