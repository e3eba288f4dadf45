"""Tools over HTTP with a model whose chat template teaches calls in tags, and a scripted engine."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.core import Delta
from engine.text.conversation import conversation_ids
from tests.server.calls import assembled, deltas, reasons, with_results
from tests.server.fakes import FakeEngine, server
from tests.server.mistral import QUESTION, WEATHER
from tests.text.hermes import END, hermes_tokenizer

CHAT = "/v1/chat/completions"
WITH_TOOLS = {**QUESTION, "tools": [WEATHER]}
TWO_CALLS = (
    "I look.",
    '\n<tool_call>\n{"name": "wea',
    'ther", "arguments": {"city"',
    ': "Rome"}}\n</tool_call>\n<tool_call>\n{"name": "weather", "arguments": {"ci',
    'ty": "Oslo"}}\n</tool_call>',
)


def engine(*steps: str, step_time: float = 0.0, special_tags: bool = False) -> FakeEngine:
    """An engine that gives this answer to everybody, one step per piece."""
    encode = hermes_tokenizer(special_tags).encode
    answer = [Delta(0, tuple(encode(step)), None, is_decode=number > 0) for number, step in enumerate(steps)]
    ids = (*answer[-1].token_ids, *encode(END))
    answer[-1] = replace(answer[-1], token_ids=ids, finish_reason="stop")
    return FakeEngine(answer, config=EngineConfig(max_model_len=1024, max_num_seqs=2), step_time=step_time)


@pytest.mark.parametrize("special_tags", [False, True])
def test_two_calls_whole(special_tags: bool) -> None:
    async def scenario() -> None:
        tokenizer = hermes_tokenizer(special_tags)
        async with server(engine(*TWO_CALLS, special_tags=special_tags), tokenizer=tokenizer) as api:
            status, reply, _ = await api.post(CHAT, WITH_TOOLS)
            [choice] = reply["choices"]
            assert (status, choice["finish_reason"]) == (200, "tool_calls")
            assert choice["message"]["content"] == "I look."
            calls = choice["message"]["tool_calls"]
            assert [(call["type"], call["function"]) for call in calls] == [
                ("function", {"name": "weather", "arguments": '{"city": "Rome"}'}),
                ("function", {"name": "weather", "arguments": '{"city": "Oslo"}'}),
            ]
            assert len({call["id"] for call in calls if re.fullmatch("[a-zA-Z0-9]{9}", call["id"])}) == 2
            [request] = api.engine.added
            shown = conversation_ids(tokenizer, QUESTION["messages"], tools=[WEATHER])
            assert list(request.prompt) == shown

    asyncio.run(scenario())


def test_two_calls_stream_as_they_come() -> None:
    async def scenario() -> None:
        async with server(engine(*TWO_CALLS, step_time=0.03), tokenizer=hermes_tokenizer()) as api:
            events = await api.stream(WITH_TOOLS)
            found = deltas(events)
            pieces = [piece.get("tool_calls") for piece in found]
            ids = [part["id"] for parts in pieces if parts for part in parts if "id" in part]
            second = {"name": "weather", "arguments": '{"ci'}
            assert found[0] == {"role": "assistant", "content": "I look."}
            assert pieces[1:] == [
                [
                    {
                        "index": 0,
                        "id": ids[0],
                        "type": "function",
                        "function": {"name": "weather", "arguments": '{"city"'},
                    }
                ],
                [
                    {"index": 0, "function": {"arguments": ': "Rome"}'}},
                    {"index": 1, "id": ids[1], "type": "function", "function": second},
                ],
                [{"index": 1, "function": {"arguments": 'ty": "Oslo"}'}}],
            ]
            assert reasons(events) == [None] * 3 + ["tool_calls"]

    asyncio.run(scenario())


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": []}])
def test_tools_that_were_not_offered_are_not_called(fields: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with server(engine(*TWO_CALLS), tokenizer=hermes_tokenizer()) as api:
            [choice] = (await api.post(CHAT, {**QUESTION, **fields}))[1]["choices"]
            assert choice["message"] == {"role": "assistant", "content": "".join(TWO_CALLS)}
            assert choice["finish_reason"] == "stop"
            [request] = api.engine.added
            assert list(request.prompt) == conversation_ids(hermes_tokenizer(), QUESTION["messages"])

    asyncio.run(scenario())


def test_an_answer_can_be_sent_back_with_its_results() -> None:
    async def scenario() -> None:
        async with server(engine(*TWO_CALLS), tokenizer=hermes_tokenizer()) as api:
            message = (await api.post(CHAT, WITH_TOOLS))[1]["choices"][0]["message"]
            messages = with_results(QUESTION["messages"], message)
            assert (await api.post(CHAT, {**WITH_TOOLS, "messages": messages}))[0] == 200
            first, second = (list(request.prompt) for request in api.engine.added)
            encode = hermes_tokenizer().encode
            result = "<|im_start|>user\n<tool_response>\nsun\n</tool_response><|im_end|>\n"
            rest = "".join(TWO_CALLS) + "<|im_end|>\n" + result * 2 + "<|im_start|>assistant\n"
            assert second == first + encode(rest)

    asyncio.run(scenario())


def test_stop_strings_and_calls_in_a_stream() -> None:
    async def scenario() -> None:
        steps = ("one E", "ND two", "never")
        async with server(engine(*steps, step_time=0.02), tokenizer=hermes_tokenizer()) as api:
            events = await api.stream({**WITH_TOOLS, "stop": ["END"]})
            assert assembled(deltas(events))["content"] == "one "
            assert reasons(events)[-1] == "stop"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"reasoning_effort": "high"}, "reasoning_effort", "does not support it"),
        (
            {"tools": [{"function": {"name": "f", "parameters": {"properties": 1}}}]},
            "tools[0].function.parameters",
            "properties must be an object",
        ),
        (
            {"tools": [{"function": {"name": "f", "description": "x" * (1 << 16)}}]},
            "tools",
            "bytes, hence at least",
        ),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], param: str, message: str) -> None:
    async def scenario() -> None:
        async with server(engine("ok"), tokenizer=hermes_tokenizer()) as api:
            status, reply, _ = await api.post(CHAT, {**WITH_TOOLS, **fields})
            assert (status, reply["error"]["param"]) == (400, param)
            assert message in reply["error"]["message"]
            assert api.engine.added == []

    asyncio.run(scenario())
