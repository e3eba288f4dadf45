"""What happens when clients leave, the engine breaks or the queue is full."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

import aiohttp
import msgspec
import pytest

from engine.canary import CanaryCounts
from engine.core import Delta, Request, SamplingParams
from engine.server import framing, lifecycle, sse
from engine.server.metrics import StampedDelta
from engine.server.ticket import Ticket
from tests.server.fakes import ByteTokenizer, FakeEngine, Server, script, server, until

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
LONG = script(*[b"tick "] * 1000, finish="length")


def in_flight(api: Server) -> int:
    assert api.state.serving is not None
    return api.state.serving.runner.in_flight


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_held", [False, True])
def test_leaving_aborts_at_once(stream: bool, is_held: bool) -> None:
    """While decoding, and (held) while queued or in prefill, with nothing sent yet."""

    async def scenario() -> None:
        engine = FakeEngine(LONG, step_time=0.01)
        if is_held:
            engine.hold.set()
        async with server(engine) as api:
            async with aiohttp.ClientSession(api.url) as leaver:
                asking = asyncio.create_task(leaver.post(CHAT, json={**BODY, "stream": stream}))
                await until(lambda: engine.added)
                if stream:
                    reply = await asking
                    if not is_held:
                        await reply.content.readline()
                    reply.close()
                else:
                    asking.cancel()
            await until(lambda: engine.aborted, timeout=1.0)
            await until(lambda: in_flight(api) == 0)
            assert engine.aborted == [engine.added[0].id]
            assert not engine.has_work or is_held

    asyncio.run(scenario())


def test_keep_alive_comments_while_silent() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        engine.hold.set()
        async with server(engine, keep_alive_interval=0.02) as api:
            asking = asyncio.create_task(api.stream(BODY))
            await asyncio.sleep(0.15)
            engine.hold.clear()
            blocks = await asking
            comments = [block for block in blocks if block == ": keep-alive"]
            assert len(comments) >= 2
            assert blocks[: len(comments)] == comments  # silence was before the first token
            assert blocks[-1] == "data: [DONE]"

    asyncio.run(scenario())


def test_steps_without_text_are_silence_too() -> None:
    """Chunks of a long prompt report progress to the server, but no byte to the client."""

    async def scenario() -> None:
        chunks = [Delta(0, (), None, is_decode=False)] * 40
        engine = FakeEngine([*chunks, *script(b"end", finish="length")], step_time=0.01)
        async with server(engine, keep_alive_interval=0.05) as api:
            blocks = await api.stream(BODY)
            assert blocks.count(": keep-alive") >= 2
            assert blocks[-1] == "data: [DONE]"

    asyncio.run(scenario())


def test_news_that_were_read_at_once_are_not_news_again() -> None:
    async def scenario() -> None:
        first, second = script(b"ab", b"cd", finish="length")
        ticket = Ticket([Request(0, (1,), SamplingParams())])
        ticket.accept()
        await ticket.accepted()
        ticket.put(StampedDelta(first, 0.0, 1.0))
        assert [one.delta for one in await ticket.next(5)] == [first]  # was there; nothing was waited for
        waiting = asyncio.create_task(ticket.next(5))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        ticket.put(StampedDelta(second, 1.0, 2.0))
        assert [one.delta for one in await waiting] == [second]

    asyncio.run(scenario())


def test_more_prompts_than_are_ever_admitted() -> None:
    async def scenario() -> None:
        async with server(max_num_queued_reqs=1) as api:  # the engine runs 2 at once
            status, reply, headers = await api.post("/v1/completions", {"prompt": ["x"] * 16})
            error = reply["error"]
            assert (status, error["param"], error["code"]) == (400, "prompt", "invalid_value")
            assert "found 16 answers" in error["message"]
            assert "at most 3 " in error["message"]
            assert "Retry-After" not in headers
            assert (await api.post("/v1/completions", {"prompt": ["x"] * 3}))[0] == 200

    asyncio.run(scenario())


def test_queue_full() -> None:
    async def scenario() -> None:
        engine = FakeEngine()  # runs 2 at once
        engine.hold.set()
        async with server(engine, max_num_queued_reqs=1) as api:
            asking = [asyncio.create_task(api.post(CHAT, BODY)) for _ in range(3)]
            await until(lambda: len(engine.added) == 3)
            status, reply, headers = await api.post(CHAT, BODY)
            assert (status, reply["error"]["code"], headers["Retry-After"]) == (503, "queue_full", "1")
            engine.hold.clear()
            assert [status for status, _, _ in await asyncio.gather(*asking)] == [200, 200, 200]
            assert (await api.post(CHAT, BODY))[0] == 200

    asyncio.run(scenario())


def test_an_engine_that_cannot_be_mended_fails_everybody_and_the_health() -> None:
    def broken(why: str) -> list[Delta]:
        raise AssertionError("pages are missing")

    async def scenario() -> None:
        engine = FakeEngine(LONG, fail_at=3, step_time=0.02)
        engine.fail_running = broken  # type: ignore[method-assign]
        async with server(engine) as api:
            streaming = asyncio.create_task(api.stream(BODY))
            status, reply, _ = await api.post(CHAT, BODY)
            assert (status, reply["error"]["code"], reply["error"]["type"]) == (
                500,
                "engine_failed",
                "server_error",
            )
            *_, error, done = await streaming
            assert error["error"]["code"] == "engine_failed"
            assert done == "data: [DONE]"
            for status, reply, headers in (
                await api.get("/health"),
                await api.get("/ready"),
                await api.post(CHAT, BODY),
            ):
                assert (status, reply["error"]["code"]) == (503, "engine_dead")
                assert "Retry-After" not in headers

    asyncio.run(scenario())


def test_a_broken_step_fails_who_ran() -> None:
    """Twice; at the third time in a row the engine is dead."""

    async def scenario() -> None:
        engine = FakeEngine(LONG, fail_at=3)
        async with server(engine) as api:
            *_, error, done = await api.stream(BODY)
            assert (error["error"]["code"], done) == ("request_failed", "data: [DONE]")
            assert "RuntimeError" in error["error"]["message"]
            engine.fail_at, engine.answer = None, script(b"fine")
            assert (await api.post(CHAT, BODY))[0] == 200
            engine.fail_at = engine.num_steps
            for code, health in (("request_failed", 200), ("request_failed", 200), ("engine_failed", 503)):
                status, reply, _ = await api.post(CHAT, BODY)
                assert (status, reply["error"]["code"]) == (500, code)
                assert (await api.get("/health"))[0] == health
            assert api.state.serving.runner.totals.num_failed_steps == 4  # type: ignore[union-attr]

    asyncio.run(scenario())


def test_whatever_ends_the_engines_thread_is_told() -> None:
    """Not only exceptions that are errors: nobody waits for an answer that no thread will give."""

    def leave() -> list[Delta]:
        raise SystemExit(3)

    async def scenario() -> None:
        engine = FakeEngine(LONG)
        engine.step = leave  # type: ignore[method-assign]
        async with server(engine) as api:
            status, reply, _ = await api.post(CHAT, BODY)
            assert (status, reply["error"]["code"]) == (500, "engine_failed")
            status, reply, _ = await api.get("/health")
            assert (status, reply["error"]["code"]) == (503, "engine_dead")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nno colon" + b"x" * 50_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + b"z" * 50_000 + b"\r\n",
    ],
)
def test_what_is_no_http_gets_our_error_and_is_not_sent_back(
    sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    async def scenario() -> None:
        async with server() as api:
            host, port = api.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(sent)
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            assert head.split()[1] == b"400"
            assert b"aiohttp" not in head
            error = msgspec.json.decode(body)["error"]
            assert (error["code"], error["type"]) == ("invalid_http", "invalid_request_error")
            assert len(body) < 300

    asyncio.run(scenario())
    assert [record.name for record in caplog.records if record.name.startswith("aiohttp")] == []


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HT",
    ],
    ids=["nothing", "half a head", "a request", "one and a half"],
)
def test_a_connection_that_asks_nothing_ends(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert framing._SETTINGS["keepalive_timeout"] == framing.PATIENCE < 120
    monkeypatch.setitem(framing._SETTINGS, "keepalive_timeout", 0.2)

    async def scenario() -> None:
        async with server() as api:
            host, port = api.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(sent)
            answer = await asyncio.wait_for(reader.read(), 5)  # to the end: the server closes it
            writer.close()
            assert answer.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")

    asyncio.run(scenario())


def test_a_request_that_fails_alone() -> None:
    """Its tokens so far arrive, then the error; the engine goes on."""

    async def scenario() -> None:
        failing = [*script(b"so ", b"far", finish="length")]
        failing[-1] = replace(failing[-1], finish_reason="error", error="no number")
        async with server(FakeEngine(failing, step_time=0.01)) as api:
            *events, error, done = await api.stream(BODY)
            assert "".join(event["choices"][0]["delta"]["content"] for event in events) == "so far"
            assert error["error"]["message"] == "the request failed: no number"
            assert (error["error"]["code"], done) == ("request_failed", "data: [DONE]")
            status, reply, _ = await api.post(CHAT, BODY)
            assert (status, reply["error"]["code"]) == (500, "request_failed")
            assert (await api.get("/health"))[0] == 200
            assert api.state.serving.runner.totals.finished == {"error": 2}  # type: ignore[union-attr]
            assert in_flight(api) == 0

    asyncio.run(scenario())


def test_a_broken_add_fails_one_request() -> None:
    async def scenario() -> None:
        engine = FakeEngine(refusal=ZeroDivisionError("bug"))
        async with server(engine) as api:
            assert (await api.post(CHAT, BODY))[0] == 500
            engine.refusal = None
            assert (await api.post(CHAT, BODY))[0] == 200

    asyncio.run(scenario())


@pytest.mark.parametrize("is_spinning", [False, True])
def test_a_stalled_engine_is_unhealthy(is_spinning: bool) -> None:
    """In a step that does not end, and in steps that do nothing; until it goes on."""

    async def scenario() -> None:
        engine = FakeEngine(step_time=0.0 if is_spinning else 0.5)
        if is_spinning:
            engine.hold.set()
        async with server(engine, stalled_after=0.1) as api:
            assert (await api.get("/health"))[0] == 200
            status, reply, _ = await api.post(CHAT, BODY)
            assert (status, reply["error"]["code"]) == (500, "engine_stalled")
            for path in ("/health", "/ready"):
                status, reply, _ = await api.get(path)
                assert (status, reply["error"]["code"]) == (503, "engine_stalled")
            assert api.state.serving is not None
            engine.hold.clear()
            engine.step_time = 0.0
            await until(lambda: not api.state.serving.runner.is_stalled)
            assert (await api.post(CHAT, BODY))[0] == 200
            await asyncio.sleep(0.2)  # idle is not stalled
            assert (await api.get("/health"))[0] == 200

    asyncio.run(scenario())


def test_a_mistake_of_ours_is_a_500_with_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("bug")

    async def scenario() -> None:
        async with server() as api:
            monkeypatch.setattr("engine.server.generation.Generation.collect", broken)
            status, reply, _ = await api.post(CHAT, BODY, **{"X-Request-Id": "abc"})
            assert (status, reply["error"]["code"]) == (500, "internal_error")
            assert "abc" in reply["error"]["message"]
            monkeypatch.setattr("engine.server.generation.Generation._chunks", broken)
            error, done = await api.stream(BODY)
            assert (error["error"]["code"], done) == ("internal_error", "data: [DONE]")
            assert in_flight(api) == 0

    asyncio.run(scenario())


def test_slow_readers_get_merged_events_and_lose_nothing() -> None:
    async def scenario() -> None:
        deltas = script(b"ab", b"cd", b"ef", finish="length")
        ticket = Ticket([Request(0, (1,), SamplingParams())])
        for number, delta in enumerate(deltas):
            ticket.put(StampedDelta(delta, float(number), number + 1.0))
        gathered = await ticket.next()
        assert [one.delta for one in gathered] == deltas
        assert not ticket.unfinished
        assert await ticket.next(timeout=0.01) == []

    asyncio.run(scenario())


def test_a_client_that_does_not_read_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sse, "WRITE_TIMEOUT", 0.2)
    monkeypatch.setattr(ByteTokenizer, "token_bytes", lambda self, token: b"x" * 50_000)

    async def scenario() -> None:
        engine = FakeEngine(script(*[b"x"] * 2000, finish="length"), step_time=0.0005)
        async with server(engine) as api:
            host, port = api.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
            content = msgspec.json.encode({**BODY, "stream": True})
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content)
            )
            writer.write(content)
            await until(lambda: engine.added)
            await until(lambda: in_flight(api) == 0, timeout=10)
            # The engine's thread may hear of it a moment later.
            await until(lambda: engine.aborted == [engine.added[0].id], timeout=10)
            with contextlib.suppress(ConnectionError):  # the server cut the connection
                await reader.read(1)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    with caplog.at_level("INFO"):
        asyncio.run(scenario())
    assert not [record for record in caplog.records if record.levelname == "ERROR"], "it is nobody's error"
    assert "499, the client left" in caplog.text


@pytest.mark.parametrize(
    ("canary", "said"),
    [
        (CanaryCounts(), ""),
        (CanaryCounts(12, 0, 2, 0), ", canary steps 12, ties 2, bugs 0"),
        (CanaryCounts(12, 3, 2, 1), ", canary steps 12 (3 not, for want of pages), ties 2, bugs 1"),
        (CanaryCounts(0, 3), ", canary steps 0 (3 not, for want of pages), ties 0, bugs 0"),
    ],
)
def test_report_is_silent_when_idle(
    canary: CanaryCounts, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    async def scenario() -> None:
        async with server(FakeEngine(canary=canary)) as api:
            assert api.state.serving is not None
            reporter = asyncio.create_task(lifecycle.report(api.state.serving.runner, interval=0.05))
            await asyncio.sleep(0.12)
            assert "tok/s" not in caplog.text
            await api.post(CHAT, BODY)
            await asyncio.sleep(0.12)
            reporter.cancel()

    asyncio.run(scenario())
    lines = [record.message for record in caplog.records if record.message.startswith("prompt ")]
    assert len(lines) == 1
    assert "KV use 0.0%, prefix cache hits 80.0%, acceptance length 3.00" in lines[0]
    assert lines[0].endswith(f"draft vocabulary covers 97.5%{said}")
