"""The HTTP API over a real socket, with an engine that answers from a script."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import msgspec
import pytest

from engine.config import EngineConfig
from engine.core import SPECULATION_OFF, Speculation
from engine.errors import RequestError
from tests.server.fakes import EOS, FakeEngine, Server, script, server, until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0}


def usage_of(prompt: int, completion: int, *, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def test_whole_chat_answer() -> None:
    async def scenario() -> None:
        async with server() as api:
            status, reply, headers = await api.post(CHAT, BODY)
            assert (status, headers["Content-Type"]) == (200, "application/json")
            assert reply["object"] == "chat.completion"
            assert reply["model"] == "fake"
            assert reply["id"].startswith("chatcmpl-")
            assert reply["choices"] == [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Hello"},
                    "finish_reason": "stop",
                    "logprobs": None,
                }
            ]
            assert reply["usage"] == usage_of(5, 6, cached=4)
            spec = reply["metrics"]["speculative_decoding"]
            assert spec["acceptance_histogram"] == [0, 0, 1, 0, 0]
            assert spec["num_spec_tokens"] == 4
            assert reply["metrics"]["time_to_first_token_ms"] > 0
            [request] = api.engine.added
            assert bytes(request.prompt) == b"u:Hi;"
            assert request.sampling.max_tokens == 64 - 5
            assert api.engine.aborted == []

    asyncio.run(scenario())


def test_stream_has_one_event_per_step() -> None:
    async def scenario() -> None:
        engine = FakeEngine(script(b"He", b"llo", b" \xc3", b"\xa9", b"", finish="length"), step_time=0.03)
        async with server(engine) as api:
            *events, done = await api.stream(BODY)
            assert done == "data: [DONE]"
            assert [event["choices"][0]["delta"] for event in events] == [
                {"role": "assistant", "content": "He"},
                {"content": "llo"},
                {"content": " "},
                {"content": "\u00e9"},
                {},
            ]
            assert [event["choices"][0]["finish_reason"] for event in events] == [None] * 4 + ["length"]
            assert len({event["id"] for event in events}) == 1
            assert all(event["object"] == "chat.completion.chunk" for event in events)
            assert ["metrics" in event for event in events] == [False] * 4 + [True]
            assert all("usage" not in event for event in events)

    asyncio.run(scenario())


def test_salt_and_cached_tokens() -> None:
    """Without a cache nothing is said of it."""

    async def scenario() -> None:
        async with server() as api:
            await api.post(TEXT, {"prompt": ["a", "b"], "cache_salt": "mine"})
            await api.post(TEXT, {"prompt": "a"})
            assert [request.cache_salt for request in api.engine.added] == ["mine", "mine", ""]
        engine = FakeEngine(config=EngineConfig(max_model_len=64, prefix_caching=False))
        async with server(engine) as api:
            _, reply, _ = await api.post(TEXT, {"prompt": "ab"})
            assert "prompt_tokens_details" not in reply["usage"]

    asyncio.run(scenario())


def test_usage_chunk_is_last_and_carries_the_metrics() -> None:
    async def scenario() -> None:
        async with server(FakeEngine(script(b"He", b"llo"), step_time=0.03)) as api:
            first, second, usage, _ = await api.stream({**BODY, "stream_options": {"include_usage": True}})
            assert "metrics" not in first | second
            assert "usage" not in first | second
            assert usage["choices"] == []
            assert usage["usage"] == usage_of(5, 6, cached=4)
            assert usage["metrics"]["speculative_decoding"]["num_spec_steps"] == 1
            first, *_ = await api.stream({**BODY, "stream_options": {"continuous_usage_stats": True}})
            assert first["usage"] == usage_of(5, 2, cached=4)

    asyncio.run(scenario())


def test_answer_without_text() -> None:
    async def scenario() -> None:
        async with server(FakeEngine(script(b""))) as api:
            event, _ = await api.stream(BODY)
            assert event["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            assert event["choices"][0]["finish_reason"] == "stop"

    asyncio.run(scenario())


def test_stop_string_ends_the_answer_and_the_request() -> None:
    async def scenario() -> None:
        engine = FakeEngine(script(b"one ", b"two E", b"ND ", b"more", b"more", b"more"), step_time=0.02)
        async with server(engine) as api:
            events = await api.stream({**BODY, "stop": ["END"]})
            texts = [event["choices"][0]["delta"].get("content") for event in events[:-1]]
            assert "".join(text or "" for text in texts) == "one two "
            assert events[-2]["choices"][0]["finish_reason"] == "stop"
            await until(lambda: engine.aborted)
            assert engine.aborted == [engine.added[0].id]
            assert not api.state.serving.runner.in_flight  # type: ignore[union-attr]

    asyncio.run(scenario())


def test_completions_of_text_ids_and_lists() -> None:
    async def scenario() -> None:
        async with server() as api:
            status, reply, _ = await api.post(TEXT, {"prompt": "ab"})
            assert (status, reply["object"]) == (200, "text_completion")
            assert reply["choices"] == [
                {"index": 0, "text": "Hello", "finish_reason": "stop", "logprobs": None}
            ]
            await api.post(TEXT, {"prompt": [1, 2, 3]})
            status, reply, _ = await api.post(TEXT, {"prompt": ["x", "yz"]})
            assert [choice["index"] for choice in reply["choices"]] == [0, 1]
            assert reply["usage"] == usage_of(3, 12, cached=1)
            assert [request.prompt for request in api.engine.added] == [
                (97, 98),
                (1, 2, 3),
                (120,),
                (121, 122),
            ]
            events = await api.stream({"prompt": ["x", "y"]}, TEXT)
            choices = [event["choices"][0] for event in events[:-1]]
            for index in (0, 1):
                assert "".join(choice["text"] for choice in choices if choice["index"] == index) == "Hello"
            assert ["metrics" in event for event in events[:-1]].count(True) == 1
            assert "metrics" in events[-2]

    asyncio.run(scenario())


def test_parameters_reach_the_engine() -> None:
    async def scenario() -> None:
        async with server() as api:
            await api.post(
                CHAT,
                {
                    **BODY,
                    "temperature": 0.5,
                    "top_p": 0.9,
                    "top_k": 7,
                    "min_p": 0.1,
                    "seed": 3,
                    "stop": ["x"],
                    "stop_token_ids": [9],
                    "ignore_eos": True,
                    "max_tokens": 4,
                    "speculation": {"nodes": 6, "depth": 2, "top_k": 3},
                },
            )
            reply = (await api.post(CHAT, {**BODY, "speculation": "off"}))[1]
            assert reply["metrics"]["speculative_decoding"] is None
            first, second = api.engine.added
            params = first.sampling
            assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (
                0.5,
                0.9,
                7,
                0.1,
                3,
            )
            assert (params.stop, params.stop_token_ids, params.ignore_eos, params.max_tokens) == (
                ("x",),
                (9,),
                True,
                4,
            )
            assert first.speculation == Speculation(6, 2, 3)
            assert second.speculation == SPECULATION_OFF

    asyncio.run(scenario())


def test_without_a_head_there_are_no_speculation_metrics() -> None:
    async def scenario() -> None:
        async with server(draft_name="none") as api:
            assert (await api.post(CHAT, BODY))[1]["metrics"]["speculative_decoding"] is None

    asyncio.run(scenario())


def test_models_health_version() -> None:
    async def scenario() -> None:
        async with server(served_names=("org/alias", "other")) as api:
            _, models, _ = await api.get("/v1/models")
            assert [card["id"] for card in models["data"]] == ["org/alias", "other"]
            card = (await api.get("/v1/models/org/alias"))[1]
            assert (card["root"], card["max_model_len"], card["object"]) == ("/models/fake", 64, "model")
            assert (await api.get("/v1/models/fake"))[0] == 404
            for path in ("/health", "/ready"):
                assert (await api.get(path))[0] == 200
            assert (await api.get("/version"))[1]["version"]
            for model in ("other", "/models/fake", "", None):
                assert (await api.post(CHAT, {**BODY, "model": model}))[0] == 200
            status, reply, _ = await api.post(CHAT, {**BODY, "model": "gpt-9"})
            assert (status, reply["error"]["code"], reply["error"]["param"]) == (
                404,
                "model_not_found",
                "model",
            )

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        (CHAT, b"{", 400, None, "invalid_json"),
        (CHAT, {**BODY, "temperature": 3}, 400, "temperature", "invalid_value"),
        (CHAT, {**BODY, "n": 9}, 400, "n", "invalid_value"),
        (CHAT, {**BODY, "tools": [{"function": {"name": "f"}}]}, 400, "tools", "unsupported_parameter"),
        (CHAT, {**BODY, "stop_token_ids": [257]}, 400, "stop_token_ids[0]", "invalid_value"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "x" * 61}]},
            400,
            "messages",
            "context_length_exceeded",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "x" * 999_999}]},
            400,
            "messages",
            "context_length_exceeded",
        ),
        (TEXT, {"prompt": ""}, 400, "prompt", "invalid_value"),
        (TEXT, {"prompt": []}, 400, "prompt", "invalid_value"),
        (TEXT, {"prompt": [1, 257]}, 400, "prompt[1]", "invalid_value"),
        (TEXT, {"prompt": [-1]}, 400, "prompt[0]", "invalid_value"),
        (TEXT, {"prompt": [1] * 64}, 400, "prompt", "context_length_exceeded"),
        (TEXT, {"prompt": "a", "echo": True}, 400, "echo", "unsupported_parameter"),
        ("/v1/nothing", BODY, 404, None, "not_found"),
        ("/v1/models", BODY, 405, None, "method_not_allowed"),
    ],
)
def test_errors_have_one_shape(path: str, body: Any, status: int, param: str | None, code: str) -> None:
    async def scenario() -> None:
        async with server() as api:
            found, reply, headers = await api.post(path, body)
            error = reply["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert (found, error["param"], error["code"]) == (status, param, code)
            assert error["type"] == "invalid_request_error"
            assert len(msgspec.json.encode(reply)) < 1024
            assert headers["X-Request-Id"]
            if status == 405:
                assert "GET" in headers["Allow"]
            assert api.engine.added == []
            assert api.state.serving.runner.in_flight == 0  # type: ignore[union-attr]

    asyncio.run(scenario())


def test_too_long_a_prompt_names_both_numbers() -> None:
    async def scenario() -> None:
        async with server() as api:
            _, reply, _ = await api.post(TEXT, {"prompt": [1] * 70})
            assert "70 tokens" in reply["error"]["message"]
            assert "max_model_len is 64" in reply["error"]["message"]

    asyncio.run(scenario())


def test_body_limits() -> None:
    async def scenario() -> None:
        async with server() as api:
            huge = io.BytesIO(msgspec.json.encode({"prompt": "x" * (33 << 20)}))
            json_type = {"Content-Type": "application/json"}
            async with api.http.post(TEXT, data=huge, headers=json_type) as response:
                status, reply = response.status, await response.json()
            assert (status, reply["error"]["code"]) == (413, "body_too_large")
            for headers in ({"Content-Type": "text/plain"}, {"Content-Encoding": "gzip"}):
                status, reply, _ = await api.post(TEXT, b"{}", **headers)
                assert (status, reply["error"]["code"]) == (415, "unsupported_media_type")

    asyncio.run(scenario())


def test_refusal_by_the_engine_fails_one_request() -> None:
    async def scenario() -> None:
        engine = FakeEngine(refusal=RequestError("more rows than the cache holds", "max_tokens"))
        async with server(engine) as api:
            for stream in (False, True):  # a refusal comes before the headers of a stream
                status, reply, _ = await api.post(CHAT, {**BODY, "stream": stream})
                assert (status, reply["error"]["param"]) == (400, "max_tokens")
            engine.refusal = None
            assert (await api.post(CHAT, BODY))[0] == 200

    asyncio.run(scenario())


def test_request_id_is_validated_and_echoed() -> None:
    async def scenario() -> None:
        async with server() as api:
            assert (await api.post(CHAT, BODY, **{"X-Request-Id": "a.B-9_"}))[2]["X-Request-Id"] == "a.B-9_"
            assert (await api.get("/nothing", **{"X-Request-Id": "mine"}))[2]["X-Request-Id"] == "mine"
            for bad in ("x" * 65, "a b", "<script>"):
                assert (await api.get("/health", **{"X-Request-Id": bad}))[2]["X-Request-Id"] != bad

    asyncio.run(scenario())


def test_keys() -> None:
    async def scenario() -> None:
        async with server(api_keys=("first", "second")) as api:
            for key in ("first", "second"):
                assert (await api.get("/v1/models", Authorization=f"Bearer {key}"))[0] == 200
            for headers in (
                {},
                {"Authorization": "Bearer third"},
                {"Authorization": "Basic first"},
                {"Authorization": "Bearer "},
                {"Authorization": "Bearer f\u00efrst"},
            ):
                status, reply, _ = await api.get("/v1/models", **headers)
                assert (status, reply["error"]["code"]) == (401, "invalid_api_key")
            assert (await api.get("/no/such/route"))[0] == 401
            assert (await api.get("/version"))[0] == 401
            for path in ("/health", "/ready"):
                assert (await api.get(path))[0] == 200

    asyncio.run(scenario())


def test_starting() -> None:
    async def scenario() -> None:
        async with server(is_loaded=False) as api:
            for path in ("/health", "/ready", "/v1/models"):
                status, reply, headers = await api.get(path)
                assert (status, reply["error"]["code"]) == (503, "starting")
                assert headers["Retry-After"]
            status, reply, _ = await api.post(CHAT, BODY)
            assert (status, reply["error"]["code"]) == (503, "starting")
            assert reply["error"]["type"] == "server_error"

    asyncio.run(scenario())


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_unknown_fields_are_ignored_logged_and_counted(path: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "engine.server.app")

    async def scenario() -> None:
        async with server() as api:
            body = BODY if path == CHAT else {"prompt": "a"}
            assert (await api.post(path, body))[0] == 200
            assert "unknown" not in caplog.text
            assert (await api.post(path, {**body, "user": "me", "wi\ndth": 3}))[0] == 200
            assert (await api.post(path, {**body, **{f"f{i}": i for i in range(5000)}}))[0] == 200
            assert api.state.serving.runner.totals.num_unknown_fields == 5002  # type: ignore[union-attr]
            status, reply, _ = await api.post(path, msgspec.json.encode(body)[:-1] + b',"\xff":1}')
            assert (status, reply["error"]["code"]) == (400, "invalid_json")

    asyncio.run(scenario())
    first, second = [record.message for record in caplog.records if "unknown" in record.message]
    assert first.endswith("ignores unknown fields: 'user', 'wi\\ndth' (2 since the start)")
    assert len(second) < 800


def test_end_of_text_by_token_is_not_shown() -> None:
    async def scenario() -> None:
        async with server(FakeEngine(script(bytes([104, 105])))) as api:
            reply = (await api.post(TEXT, {"prompt": "a"}))[1]
            assert (reply["choices"][0]["text"], reply["usage"]["completion_tokens"]) == ("hi", 3)
            assert api.engine.answer[-1].token_ids[-1] == EOS

    asyncio.run(scenario())


def test_many_at_once() -> None:
    async def scenario() -> None:
        engine = FakeEngine(config=EngineConfig(max_model_len=64, max_num_seqs=4))
        async with server(engine) as api:

            async def one(api: Server) -> str:
                return str((await api.post(CHAT, BODY))[1]["choices"][0]["message"]["content"])

            assert await asyncio.gather(*(one(api) for _ in range(50))) == ["Hello"] * 50

    asyncio.run(scenario())
