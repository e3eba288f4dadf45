"""Reasoning, tools and their results over HTTP, with Mistral's tokenizer and a scripted engine."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from engine.server.sse import EventStream
from engine.text.mistral_chat import encode_chat
from tests.server.fakes import server, until
from tests.server.mistral import QUESTION, THOUGHTFUL, TWO_CALLS, WEATHER, engine, spell
from tests.text.tekken import tekken_tokenizer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WITH_TOOLS = {**QUESTION, "tools": [WEATHER]}
STEP = 0.03  # seconds; long enough that no two steps are merged


def deltas(events: list[Any]) -> list[Any]:
    """The deltas of a stream's events, without the end mark."""
    assert events[-1] == "data: [DONE]"
    return [event["choices"][0]["delta"] for event in events[:-1]]


def reasons(events: list[Any]) -> list[Any]:
    return [event["choices"][0]["finish_reason"] for event in events[:-1]]


def assembled(pieces: list[Any]) -> dict[str, Any]:
    """What a client makes of deltas: every field added up on its own, calls by their index."""
    calls: dict[int, dict[str, Any]] = {}
    whole: dict[str, Any] = {"content": "", "reasoning_content": ""}
    for piece in pieces:
        for name in whole:
            whole[name] += piece.get(name, "")
        for part in piece.get("tool_calls", ()):
            function = part["function"]
            if part["index"] in calls:
                assert part.keys() == {"index", "function"}
                assert function.keys() == {"arguments"}
                calls[part["index"]]["function"]["arguments"] += function["arguments"]
            else:
                assert part.keys() == {"index", "id", "type", "function"}
                assert part["index"] == len(calls)
                calls[part["index"]] = part
    return whole | {"tool_calls": list(calls.values())}


def test_reasoning_is_told_from_text() -> None:
    async def scenario() -> None:
        async with server(engine(*THOUGHTFUL), tokenizer=tekken_tokenizer()) as api:
            status, reply, _ = await api.post(CHAT, QUESTION)
            assert status == 200
            [choice] = reply["choices"]
            assert choice["message"] == {
                "role": "assistant",
                "content": "Hello there",
                "reasoning_content": "Let me see.",
            }
            assert choice["finish_reason"] == "stop"
            num_tokens = sum(len(spell(*step)) for step in THOUGHTFUL) + 1
            assert reply["usage"]["completion_tokens"] == num_tokens
            assert reply["metrics"]["speculative_decoding"]["num_spec_steps"] == 3

    asyncio.run(scenario())


def test_reasoning_streams_one_event_per_step() -> None:
    async def scenario() -> None:
        async with server(engine(*THOUGHTFUL, step_time=STEP), tokenizer=tekken_tokenizer()) as api:
            events = await api.stream({**QUESTION, "stream_options": {"continuous_usage_stats": True}})
            assert deltas(events) == [
                {"role": "assistant", "reasoning_content": "Let me"},
                {"reasoning_content": " see.", "content": "Hel"},
                {"content": "lo"},
                {"content": " there"},
            ]
            assert reasons(events) == [None, None, None, "stop"]
            counts = [event["usage"]["completion_tokens"] for event in events[:-1]]
            assert counts[0] == len(spell(*THOUGHTFUL[0]))
            assert counts[-1] == sum(len(spell(*step)) for step in THOUGHTFUL) + 1
            assert ["metrics" in event for event in events[:-1]] == [False, False, False, True]

    asyncio.run(scenario())


def test_two_calls_whole() -> None:
    async def scenario() -> None:
        async with server(engine(*TWO_CALLS), tokenizer=tekken_tokenizer()) as api:
            ids = set()
            for _ in range(2):
                [choice] = (await api.post(CHAT, WITH_TOOLS))[1]["choices"]
                message = choice["message"]
                assert choice["finish_reason"] == "tool_calls"
                assert (message["content"], message["reasoning_content"]) == (None, "Two.")
                assert [(call["type"], call["function"]) for call in message["tool_calls"]] == [
                    ("function", {"name": "weather", "arguments": '{"city": "Rome"}'}),
                    ("function", {"name": "weather", "arguments": '{"city": "Oslo"}'}),
                ]
                ids |= {call["id"] for call in message["tool_calls"]}
            assert len(ids) == 4  # no two calls of a conversation share one
            assert all(re.fullmatch("[a-zA-Z0-9]{9}", identity) for identity in ids)

    asyncio.run(scenario())


def test_two_calls_stream_as_they_come() -> None:
    async def scenario() -> None:
        async with server(engine(*TWO_CALLS, step_time=STEP), tokenizer=tekken_tokenizer()) as api:
            events = await api.stream(WITH_TOOLS)
            found = deltas(events)
            ids = [part["id"] for piece in found for part in piece.get("tool_calls", ()) if "id" in part]
            start = {"type": "function", "function": {"name": "weather", "arguments": ""}}
            second = {"type": "function", "function": {"name": "weather", "arguments": '{"city": '}}
            assert found == [
                {"role": "assistant", "reasoning_content": "Two."},  # the name of a call is no event yet
                {"tool_calls": [{"index": 0, "id": ids[0], **start}]},
                {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]},
                {
                    "tool_calls": [
                        {"index": 0, "function": {"arguments": ' "Rome"}'}},
                        {"index": 1, "id": ids[1], **second},
                    ]
                },
                {"tool_calls": [{"index": 1, "function": {"arguments": '"Oslo"}'}}]},
            ]
            assert reasons(events) == [None] * 4 + ["tool_calls"]

    asyncio.run(scenario())


def test_slow_readers_get_merged_deltas_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    send = EventStream.send

    async def slowly(self: EventStream, event: Any) -> None:
        await asyncio.sleep(0.05)
        await send(self, event)

    steps: list[tuple[str, ...]] = [("[THINK]", "a")]
    steps += [("b",), ("c",)] * 10 + [("[/THINK]", "d"), *[("e",), ("f",)] * 10]
    for city in ("Rome", "Oslo", "Bern"):
        steps += [("[TOOL_CALLS]", "weather", "[ARGS]", "{"), *[('"', city, '"', ":")] * 10, ("}",)]
    expected = {
        "content": "d" + "ef" * 10,
        "reasoning_content": "a" + "bc" * 10,
        "tool_calls": ["{" + f'"{city}":' * 10 + "}" for city in ("Rome", "Oslo", "Bern")],
    }

    async def scenario() -> None:
        async with server(engine(*steps, step_time=0.005), tokenizer=tekken_tokenizer()) as api:
            monkeypatch.setattr(EventStream, "send", slowly)
            events = await api.stream(WITH_TOOLS)
            found = deltas(events)
            assert len(found) < len(steps) / 2
            assert max(len(piece.get("tool_calls", ())) for piece in found) <= 3
            whole = assembled(found)
            arguments = [call["function"]["arguments"] for call in whole["tool_calls"]]
            assert whole | {"tool_calls": arguments} == expected
            assert [piece.get("role") for piece in found] == ["assistant"] + [None] * (len(found) - 1)
            assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"

    asyncio.run(scenario())


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": []}])
def test_tools_that_were_not_offered_are_not_called(fields: dict[str, Any]) -> None:
    steps = (("Use ",), ("[TOOL_CALLS]", "weather", "[ARGS]", "{}"))

    async def scenario() -> None:
        async with server(engine(*steps), tokenizer=tekken_tokenizer()) as api:
            [choice] = (await api.post(CHAT, {**QUESTION, **fields}))[1]["choices"]
            assert choice["message"] == {"role": "assistant", "content": "Use weather{}"}
            assert choice["finish_reason"] == "stop"
            [request] = api.engine.added
            assert list(request.prompt) == encode_chat(tekken_tokenizer(), QUESTION["messages"])

    asyncio.run(scenario())


def test_what_the_length_cuts_is_reported_as_far_as_it_came() -> None:
    async def scenario() -> None:
        cut = engine(("[TOOL_CALLS]", "weather", "[ARGS]"), ('{"ci',), finish="length")
        async with server(cut, tokenizer=tekken_tokenizer()) as api:
            [choice] = (await api.post(CHAT, WITH_TOOLS))[1]["choices"]
            assert choice["finish_reason"] == "length"
            assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"ci'
        cut = engine(("[THINK]", "Well"), finish="length")
        async with server(cut, tokenizer=tekken_tokenizer()) as api:
            [choice] = (await api.post(CHAT, QUESTION))[1]["choices"]
            assert choice["message"] == {"role": "assistant", "content": None, "reasoning_content": "Well"}
            event, _ = await api.stream(QUESTION)
            assert event["choices"][0]["delta"] == {"role": "assistant", "reasoning_content": "Well"}

    asyncio.run(scenario())


def test_stop_strings_are_looked_for_in_the_text_only() -> None:
    steps = (("[THINK]", "END?"), ("[/THINK]", "so"), (" E",), ("ND", " more"), ("more",), ("more",))

    async def scenario() -> None:
        async with server(engine(*steps, step_time=STEP), tokenizer=tekken_tokenizer()) as api:
            events = await api.stream({**QUESTION, "stop": ["END"]})
            assert assembled(deltas(events)) == {
                "content": "so ",
                "reasoning_content": "END?",
                "tool_calls": [],
            }
            assert reasons(events)[-1] == "stop"
            await until(lambda: api.engine.aborted)

    asyncio.run(scenario())


def test_completions_are_text_whatever_the_tokens() -> None:
    async def scenario() -> None:
        async with server(engine(*TWO_CALLS), tokenizer=tekken_tokenizer()) as api:
            reply = (await api.post(TEXT, {"prompt": "Hi", "tools": []}))[1]
            text = 'Two.weather{"city": "Rome"}weather{"city": "Oslo"}'
            assert reply["choices"] == [{"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}]
            [request] = api.engine.added
            assert list(request.prompt) == [1, *tekken_tokenizer().encode("Hi")]

    asyncio.run(scenario())


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
            results = [
                {"role": "tool", "tool_call_id": call["id"], "content": "sun"}
                for call in message["tool_calls"]
            ]
            messages = [*QUESTION["messages"], message, *results]
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


def named(name: str) -> dict[str, Any]:
    """A tool_choice: this function and no other."""
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    """A tool_choice: some of the functions."""
    return {
        "type": "allowed_tools",
        "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]},
    }


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


def test_answers_of_other_models_are_as_they_were_to_the_byte() -> None:
    async def scenario() -> None:
        async with server() as api:
            async with api.http.post(CHAT, json=QUESTION) as response:
                body = await response.read()
            assert (
                b'"choices":[{"index":0,"message":{"content":"Hello","role":"assistant"},'
                b'"finish_reason":"stop","logprobs":null}],"usage":{"prompt_tokens":5,' in body
            )
            async with api.http.post(CHAT, json={**QUESTION, "stream": True}) as response:
                first = (await response.read()).split(b"\n\n")[0]
            assert b'"delta":{"role":"assistant","content":"He' in first

    asyncio.run(scenario())
