"""OpenAI's own client package against the server."""

from __future__ import annotations

import asyncio

import pytest

from tests.server.fakes import FakeEngine, script, server

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
                    model="fake", messages=[{"role": "user", "content": "Hi"}], n=3
                )
            assert (caught.value.param, caught.value.code) == ("n", "unsupported_value")
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
