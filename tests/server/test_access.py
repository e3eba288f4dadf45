"""Who may ask: host names, origins and keys; and how large, deep and many a question may be."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import msgspec
import pytest

from engine.errors import RequestError
from engine.server import bodies
from engine.server.access import OPEN_ROUTES
from tests.server.fakes import FakeEngine, Server, script, server, until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


# --- names


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("box.localhost", 200),
        ("my.proxy", 200),
        ("My.Proxy:443", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example:8000", 403),
        ("evil.example:80@localhost", 403),
        ("notlocalhost", 403),
    ],
)
def test_cve_2024_28224_a_loopback_address_answers_to_its_own_names(host: str, status: int) -> None:
    """A page whose name was made to point here is none of ours."""

    async def scenario() -> None:
        async with server(allowed_hosts=("my.proxy",)) as api:
            found, reply, _ = await api.get("/v1/models", Host=host)
            assert found == status
            if status == 403:
                assert reply["error"]["code"] == "host_not_allowed"
                assert (await api.post(CHAT, BODY, Host=host))[0] == 403
                assert api.engine.added == []

    asyncio.run(scenario())


def test_other_addresses_answer_to_any_name() -> None:
    async def scenario() -> None:
        async with server(host="0.0.0.0") as api:
            assert (await api.get("/v1/models", Host="models.example"))[0] == 200

    asyncio.run(scenario())


# --- origins


async def preflight(api: Server, origin: str, headers: str = "authorization, x-stainless-os") -> Any:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": headers,
    }
    async with api.http.options(CHAT, headers=asked) as reply:
        return reply.status, reply.headers


def test_no_page_may_read_unless_told() -> None:
    async def scenario() -> None:
        async with server() as api:
            status, _, headers = await api.get("/v1/models", Origin="https://page.example")
            assert status == 200
            assert not [name for name in headers if name.startswith("Access-Control")]
            status, headers = await preflight(api, "https://page.example")
            assert status == 405
            assert not [name for name in headers if name.startswith("Access-Control")]

    asyncio.run(scenario())


def test_pages_of_an_allowed_origin_may() -> None:
    """Preflights come without a key; streams and errors carry the headers too."""

    async def scenario() -> None:
        async with server(cors_origins=("https://page.example",), api_keys=("key",)) as api:
            status, headers = await preflight(api, "https://page.example")
            assert status == 204
            assert headers["Access-Control-Allow-Origin"] == "https://page.example"
            assert headers["Access-Control-Allow-Headers"] == "authorization, x-stainless-os"
            status, headers = await preflight(api, "https://page.example", "x" * 2000)
            assert (status, headers["Access-Control-Allow-Headers"]) == (204, "")
            for origin, allowed in (("https://page.example", True), ("https://page.example.evil", False)):
                sent = {"Origin": origin, "Authorization": "Bearer key"}
                for path, body in ((CHAT, BODY), (CHAT, {**BODY, "stream": True}), (CHAT, {})):
                    async with api.http.post(path, json=body, headers=sent) as reply:
                        await reply.read()
                        assert ("Access-Control-Allow-Origin" in reply.headers) == allowed
                        assert reply.headers["Vary"] == "Origin"
                        assert "Access-Control-Allow-Credentials" not in reply.headers
            assert (await preflight(api, "https://page.example.evil"))[0] == 401
        async with server(cors_origins=("*",)) as api:
            _, _, headers = await api.get("/v1/models", Origin="null")
            assert headers["Access-Control-Allow-Origin"] == "*"

    asyncio.run(scenario())


# --- keys


def test_every_route_but_the_open_ones_wants_the_key() -> None:
    """Whatever is added to the application, and what does not exist."""

    async def scenario() -> None:
        async with server(api_keys=("key",)) as api:
            paths = ["/", "/no/such/route", "/v1", "/v1//models", "/health/", "/HEALTH"]
            for path in {*paths, *described_paths()} - set(OPEN_ROUTES):
                for method in ("GET", "POST", "OPTIONS", "DELETE"):
                    async with api.http.request(method, path) as reply:
                        assert reply.status == 401, (method, path)

    asyncio.run(scenario())


def described_paths() -> set[str]:
    from engine.server.openapi import OPERATIONS

    return {operation.path.replace("{id}", "fake") for operation in OPERATIONS}


# --- limits


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def tool(schema: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": {"enum": schema}}}


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        (CHAT, {**BODY, "tools": [tool(nested(70))]}, 400, "nested_too_deeply"),
        (CHAT, {**BODY, "prompt_logprobs": {"a": nested(70)}}, 400, "nested_too_deeply"),
        (CHAT, {**BODY, "unknown": nested(70)}, 200, None),  # is never looked at
        (TEXT, b'{"prompt": ' + b"[" * 100_000, 400, "invalid_value"),
        (CHAT, b'{"unknown": ' + b"[" * 100_000, 400, "invalid_json"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}] * 4097}, 400, "invalid_value"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}] * 1025}]}, 400, "invalid_value"),
        (CHAT, {**BODY, "stop": ["a"] * 17}, 400, "invalid_value"),
        (CHAT, {**BODY, "stop_token_ids": [1] * 129}, 400, "invalid_value"),
        (TEXT, {"prompt": ["a"] * 17}, 400, "invalid_value"),
        (CHAT, {**BODY, "cache_salt": "x" * 129}, 400, "invalid_value"),
        (CHAT, {**BODY, "cache_salt": ""}, 400, "invalid_value"),
        (CHAT, {**BODY, "cache_salt": "a\n"}, 400, "invalid_value"),
        (CHAT, {**BODY, "cache_salt": "\u00e9"}, 400, "invalid_value"),
        (CHAT, {**BODY, "priority": 1 << 31}, 400, "invalid_value"),
        (CHAT, {**BODY, "priority": 0.5}, 400, "invalid_value"),
        (CHAT, {**BODY, "seed": 1 << 64}, 400, "invalid_value"),
        (CHAT, b'{"temperature": NaN}', 400, "invalid_json"),
        (CHAT, b'{"temperature": Infinity}', 400, "invalid_json"),
        (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_json"),
        (CHAT, b'{"messages": [{"role": "user", "content": "\xff"}]}', 400, "invalid_json"),
        (CHAT, b"", 400, "invalid_json"),
        (CHAT, b"null", 400, "invalid_value"),
    ],
)
def test_what_is_too_much_is_refused_shortly(path: str, body: Any, status: int, code: str | None) -> None:
    async def scenario() -> None:
        async with server() as api:
            found, reply, _ = await api.post(path, body)
            assert (found, reply.get("error", {}).get("code")) == (status, code)
            if status != 200:
                assert len(msgspec.json.encode(reply)) <= 1024
                assert api.engine.added == []
                assert (await api.post(CHAT, BODY))[0] == 200

    asyncio.run(scenario())


def test_the_number_of_values_is_bounded_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_VALUES", 100)

    async def scenario() -> None:
        async with server() as api:
            status, reply, _ = await api.post(TEXT, {"prompt": [1] * 101})
            assert (status, reply["error"]["code"]) == (413, "body_too_large")
            status, reply, _ = await api.post(TEXT, {"prompt": [1] * 100})
            assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")

    asyncio.run(scenario())


@pytest.mark.parametrize("headers", [{"X": "a" * 9000}, {f"X-{number}": "a" for number in range(300)}])
def test_cve_2025_48956_too_many_headers(headers: dict[str, str]) -> None:
    async def scenario() -> None:
        async with server() as api:
            async with api.http.get("/v1/models", headers=headers) as reply:
                assert reply.status == 400
                assert len(await reply.read()) < 1024
            assert (await api.get("/v1/models"))[0] == 200

    asyncio.run(scenario())


def test_priority_and_salt_reach_the_engine() -> None:
    async def scenario() -> None:
        async with server() as api:
            await api.post(CHAT, {**BODY, "priority": -3, "cache_salt": "tenant/1+a=="})
            await api.post(CHAT, BODY)
            asked = [(request.priority, request.cache_salt) for request in api.engine.added]
            assert asked == [(-3, "tenant/1+a=="), (0, "")]

    asyncio.run(scenario())


def test_the_queue_is_bounded_by_tokens_too() -> None:
    """What has begun does not count; a prompt that comes alone is taken, however long."""

    async def scenario() -> None:
        engine = FakeEngine(script(*[b"x"] * 400, finish="length"), step_time=0.005)
        engine.hold.set()
        async with server(engine, max_num_queued_tokens=10) as api:
            first = asyncio.create_task(api.post(TEXT, {"prompt": "a" * 20}))
            await until(lambda: engine.added)
            status, reply, headers = await api.post(TEXT, {"prompt": "b"})
            assert (status, reply["error"]["code"], headers["Retry-After"]) == (503, "queue_full", "1")
            assert "20 tokens wait" in reply["error"]["message"]
            assert api.state.serving is not None
            runner = api.state.serving.runner
            engine.hold.clear()
            await until(lambda: runner.num_queued_tokens == 0)
            engine.hold.set()
            second = asyncio.create_task(api.post(TEXT, {"prompt": ["b" * 5, "c" * 5]}))
            await until(lambda: len(engine.added) == 3)
            assert runner.num_queued_tokens == 10
            second.cancel()  # who leaves makes room
            await until(lambda: runner.num_queued_tokens == 0)
            engine.hold.clear()
            assert (await first)[0] == 200
            engine.refusal = RequestError("too many rows", "max_tokens")
            assert (await api.post(TEXT, {"prompt": "a"}))[0] == 400
            assert (runner.in_flight, runner.num_queued_tokens) == (0, 0)

    asyncio.run(scenario())


def test_leaving_while_the_prompt_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reaches the engine, and the place is free again."""

    async def scenario() -> None:
        async with server() as api:
            assert api.state.serving is not None
            serving = api.state.serving
            begun = asyncio.Event()

            async def slow(work: Any) -> Any:
                begun.set()
                await asyncio.sleep(60)

            monkeypatch.setattr(type(serving), "prepare", lambda self, work: slow(work))
            async with aiohttp.ClientSession(api.url) as leaver:
                asking = asyncio.create_task(leaver.post(CHAT, json=BODY))
                await asyncio.wait_for(begun.wait(), 5)
                asking.cancel()
            await until(lambda: serving.runner.in_flight == 0)
            assert api.engine.added == []

    asyncio.run(scenario())
