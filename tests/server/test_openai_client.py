"""OpenAI's own client package against the server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.server.fakes import FakeEngine, script, server
from tests.server.mistral import THOUGHTFUL, TWO_CALLS, WEATHER
from tests.server.mistral import engine as mistral_engine
from tests.text.tekken import tekken_tokenizer

openai = pytest.importorskip("openai")


def test_whole_answer_and_errors() -> None:
    async def scenario() -> None:
        async with (
            server(api_keys=("secret",)) as api,
            openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="secret", max_retries=0) as client,
        ):
            reply = await client.chat.completions.create(
                model="fake", messages=[{"role": "user", "content": "Hi"}], temperature=0, max_tokens=20
            )
            assert reply.choices[0].message.content == "Hello"
            assert reply.choices[0].finish_reason == "stop"
            assert reply.usage.completion_tokens == 6
            assert [model.id async for model in client.models.list()] == ["fake"]
            text = await client.completions.create(model="fake", prompt="Hi")
            assert text.choices[0].text == "Hello"
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(
                    model="fake", messages=[{"role": "user", "content": "Hi"}], n=9
                )
            assert (caught.value.param, caught.value.code) == ("n", "invalid_value")
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(
                    model="other", messages=[{"role": "user", "content": "Hi"}]
                )
            with pytest.raises(openai.AuthenticationError):
                await client.with_options(api_key="wrong").models.retrieve("fake")

    asyncio.run(scenario())


def test_stream() -> None:
    async def scenario() -> None:
        engine = FakeEngine(script(b"He", b"llo"), step_time=0.02)
        async with (
            server(engine) as api,
            openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0) as client,
        ):
            stream = await client.chat.completions.create(
                model="fake",
                messages=[{"role": "user", "content": "Hi"}],
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"speculation": {"depth": 3}},
            )
            chunks = [chunk async for chunk in stream]
            assert chunks[0].choices[0].delta.role == "assistant"
            assert "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices) == "Hello"
            assert chunks[-1].usage.total_tokens == 11
            assert chunks[-1].model_extra["metrics"]["speculative_decoding"]["num_spec_tokens"] == 3

    asyncio.run(scenario())


def test_error_inside_a_stream_reaches_the_client() -> None:
    async def scenario() -> None:
        engine = FakeEngine(script(*[b"tick"] * 50), fail_at=3, step_time=0.02)
        async with (
            server(engine) as api,
            openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0) as client,
        ):
            stream = await client.chat.completions.create(
                model="fake", messages=[{"role": "user", "content": "Hi"}], stream=True
            )
            with pytest.raises(openai.APIError, match="the engine failed"):
                [chunk async for chunk in stream]

    asyncio.run(scenario())


def test_reasoning_and_calls_are_parsed_from_streams() -> None:
    async def scenario() -> None:
        asked: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
        thoughtful = mistral_engine(*THOUGHTFUL, step_time=0.02)
        async with (
            server(thoughtful, tokenizer=tekken_tokenizer()) as api,
            openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0) as client,
        ):
            stream = await client.chat.completions.create(**asked, stream=True)
            deltas = [chunk.choices[0].delta async for chunk in stream]
            assert "".join(delta.content or "" for delta in deltas) == "Hello there"
            thoughts = "".join(delta.model_extra.get("reasoning_content", "") for delta in deltas)
            assert thoughts == "Let me see."
            reply = await client.chat.completions.create(**asked, reasoning_effort="high")
            assert reply.choices[0].message.model_extra == {"reasoning_content": "Let me see."}
        calling = mistral_engine(*TWO_CALLS, step_time=0.02)
        async with (
            server(calling, tokenizer=tekken_tokenizer()) as api,
            openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0) as client,
        ):
            async with client.chat.completions.stream(**asked, tools=[WEATHER]) as events:
                done = [event.arguments async for event in events if event.type.endswith("arguments.done")]
                final = await events.get_final_completion()
            assert done == ['{"city": "Rome"}', '{"city": "Oslo"}']
            [choice] = final.choices
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
            assert [call.function.name for call in choice.message.tool_calls] == ["weather"] * 2
            assert len({call.id for call in choice.message.tool_calls}) == 2
            whole = await client.chat.completions.create(**asked, tools=[WEATHER])
            message = whole.choices[0].message
            assert [call.function.arguments for call in message.tool_calls] == done
            results = [
                {"role": "tool", "tool_call_id": call.id, "content": "sun"} for call in message.tool_calls
            ]
            await client.chat.completions.create(
                model="fake", messages=[*asked["messages"], message, *results], tools=[WEATHER]
            )
            assert tekken_tokenizer().decode(api.engine.added[-1].prompt).endswith("sunsun")

    asyncio.run(scenario())
