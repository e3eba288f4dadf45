"""Reasoning and calls in answers over HTTP, with Mistral's tokenizer and a scripted engine."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from engine.server.sse import EventStream
from engine.text.mistral_chat import encode_chat
from tests.server.calls import assembled, deltas, reasons
from tests.server.fakes import server, until
from tests.server.mistral import QUESTION, THOUGHTFUL, TWO_CALLS, WEATHER, engine
from tests.text.tekken import spell, tekken_tokenizer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WITH_TOOLS = {**QUESTION, "tools": [WEATHER]}
STEP = 0.03  # seconds; long enough that no two steps are merged


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
