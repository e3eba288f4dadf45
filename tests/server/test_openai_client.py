"""OpenAI's own client package against the server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine.errors import CapacityError
from tests.server.fakes import FakeEngine, script, server
from tests.server.mistral import THOUGHTFUL, TWO_CALLS, WEATHER
from tests.server.mistral import engine as mistral_engine
from tests.server.test_template_tools import TWO_CALLS as TAGGED_CALLS
from tests.server.test_template_tools import engine as tagged_engine
from tests.text.hermes import hermes_tokenizer
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
            with pytest.raises(openai.APIError, match="the request failed"):
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


HI: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x" * 100}]}, "messages", "context_length_exceeded"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters.type",
            "invalid_value",
        ),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
    ],
)
def test_bad_requests_name_the_field(fields: dict[str, Any], param: str, code: str) -> None:
    async def scenario() -> None:
        async with (
            server() as api,
            openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0) as client,
        ):
            for stream in (False, True):
                with pytest.raises(openai.BadRequestError) as caught:
                    await client.chat.completions.create(
                        **{"model": "fake", "messages": HI, "stream": stream, **fields}
                    )
                assert (caught.value.param, caught.value.code) == (param, code)
                assert caught.value.request_id

    asyncio.run(scenario())


def test_other_errors_have_their_classes_and_codes() -> None:
    async def scenario() -> None:
        full = FakeEngine(refusal=CapacityError("the queue is full"))
        async with (
            server(full, api_keys=("secret",)) as api,
            server(is_loaded=False) as loading,
            openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="secret", max_retries=0) as client,
        ):
            elsewhere = client.with_options(base_url=f"{loading.url}/v1")
            for ours, kind, status, code in (
                (client, openai.InternalServerError, 503, "queue_full"),
                (elsewhere, openai.InternalServerError, 503, "starting"),
                (client.with_options(api_key="x"), openai.AuthenticationError, 401, "invalid_api_key"),
            ):
                with pytest.raises(kind) as caught:
                    await ours.chat.completions.create(model="fake", messages=HI)
                assert (caught.value.status_code, caught.value.code) == (status, code)
            with pytest.raises(openai.NotFoundError) as caught:
                await client.chat.completions.create(model="other", messages=HI)
            assert (caught.value.param, caught.value.code) == ("model", "model_not_found")

    asyncio.run(scenario())


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_parallel_calls_whole_and_streamed(choice: Any) -> None:
    async def scenario() -> None:
        tagged = tagged_engine(*TAGGED_CALLS, step_time=0.02)
        async with (
            server(tagged, tokenizer=hermes_tokenizer()) as api,
            openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0) as client,
        ):
            asked = {"model": "fake", "messages": HI, "tools": [WEATHER], "tool_choice": choice}
            [whole] = (await client.chat.completions.create(**asked, parallel_tool_calls=True)).choices
            assert (whole.finish_reason, whole.message.content) == ("tool_calls", "I look.")
            given = [call.function.arguments for call in whole.message.tool_calls]
            assert given == ['{"city": "Rome"}', '{"city": "Oslo"}']
            async with client.chat.completions.stream(**asked) as events:
                async for _ in events:
                    pass
                [final] = (await events.get_final_completion()).choices
            assert final.finish_reason == "tool_calls"
            assert [call.function.arguments for call in final.message.tool_calls] == given
            assert [call.function.name for call in final.message.tool_calls] == ["weather"] * 2

    asyncio.run(scenario())


def test_a_pydantic_function_tool_is_parsed() -> None:
    pydantic = pytest.importorskip("pydantic")
    weather = pydantic.create_model("weather", city=(str, ...))

    async def scenario() -> None:
        tagged = tagged_engine(*TAGGED_CALLS)
        async with (
            server(tagged, tokenizer=hermes_tokenizer()) as api,
            openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0) as client,
        ):
            tool = openai.pydantic_function_tool(weather)  # a strict function
            reply = await client.chat.completions.parse(model="fake", messages=HI, tools=[tool])
            calls = reply.choices[0].message.tool_calls
            assert [call.function.parsed_arguments.city for call in calls] == ["Rome", "Oslo"]

    asyncio.run(scenario())


def test_an_answer_is_parsed_into_a_pydantic_model() -> None:
    pydantic = pytest.importorskip("pydantic")
    city = pydantic.create_model("City", name=(str, ...), days=(int, ...))

    async def scenario() -> None:
        answer = FakeEngine(script(b'{"name": "Rome", ', b'"days": 3}'))
        async with (
            server(answer) as api,
            openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0) as client,
        ):
            asked = {"model": "fake", "messages": HI}
            reply = await client.chat.completions.parse(**asked, response_format=city)
            assert reply.choices[0].message.parsed == city(name="Rome", days=3)
            [request] = api.engine.added
            assert request.sampling.grammar is not None
            broken = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "strng"}}}
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(**asked, response_format=broken)
            assert caught.value.param == "response_format.json_schema.schema"

    asyncio.run(scenario())
