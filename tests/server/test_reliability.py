"""What happens when clients leave, the engine breaks, the queue is full or the server is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from typing import Any

import aiohttp
import msgspec
import pytest

from engine.build import Served
from engine.core import Delta, Request, SamplingParams
from engine.errors import CheckpointError, ConfigError
from engine.server import lifecycle, runner, sse
from engine.server.app import ServerOptions
from engine.server.metrics import StampedDelta
from tests.server.fakes import ByteTokenizer, FakeEngine, Server, script, serve_fake, server, until

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
        ticket = runner.Ticket([Request(0, (1,), SamplingParams())])
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
            assert "found 16 prompts" in error["message"]
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


def test_a_broken_step_fails_everybody_and_the_health() -> None:
    async def scenario() -> None:
        engine = FakeEngine(LONG, fail_at=3, step_time=0.02)
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


def test_a_broken_add_does_not_hang() -> None:
    async def scenario() -> None:
        async with server(FakeEngine(refusal=ZeroDivisionError("bug"))) as api:
            assert (await api.post(CHAT, BODY))[0] == 500
            assert (await api.get("/health"))[0] == 503

    asyncio.run(scenario())


def test_a_stalled_engine_is_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "STALLED_AFTER", 0.05)

    async def scenario() -> None:
        engine = FakeEngine(step_time=0.4)
        async with server(engine) as api:
            asking = asyncio.create_task(api.post(CHAT, BODY))
            await until(lambda: engine.added)
            await asyncio.sleep(0.1)
            status, reply, _ = await api.get("/health")
            assert (status, reply["error"]["code"]) == (503, "engine_stalled")
            await asking
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
        ticket = runner.Ticket([Request(0, (1,), SamplingParams())])
        for number, delta in enumerate(deltas):
            ticket.put(StampedDelta(delta, float(number), number + 1.0))
        gathered = await ticket.next()
        assert [one.delta for one in gathered] == deltas
        assert not ticket.unfinished
        assert await ticket.next(timeout=0.01) == []

    asyncio.run(scenario())


def test_a_client_that_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "WRITE_TIMEOUT", 0.2)
    monkeypatch.setattr(ByteTokenizer, "token_bytes", lambda self, token: b"x" * 50_000)

    async def scenario() -> None:
        engine = FakeEngine(script(*[b"x"] * 2000, finish="length"), step_time=0.0005)
        async with server(engine) as api:
            host, port = api.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
            content = msgspec.json.encode({**BODY, "stream": True})
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content)
            )
            writer.write(content)
            await until(lambda: engine.added)
            await until(lambda: in_flight(api) == 0, timeout=10)
            assert engine.aborted == [engine.added[0].id]
            with contextlib.suppress(ConnectionError):  # the server cut the connection
                await reader.read(1)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    asyncio.run(scenario())


def run_lifecycle(
    engine: FakeEngine,
    during: Any,
    load_error: Exception | None = None,
    load_time: float = 0.0,
    parent: int | None = None,
    **options: Any,
) -> int:
    """lifecycle.serve with the fake model, while ``during(url)`` acts as a client."""

    async def scenario() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]

        def load() -> Served:
            time.sleep(load_time)
            if load_error is not None:
                raise load_error
            return serve_fake(engine)

        serving = asyncio.create_task(lifecycle.serve(ServerOptions(port=port, **options), load, parent))
        client = asyncio.create_task(during(f"http://127.0.0.1:{port}"))
        await asyncio.wait((serving, client), return_when=asyncio.FIRST_EXCEPTION, timeout=20)
        engine.hold.clear()
        if not serving.done() or serving.exception() is None:
            await client
        else:
            client.cancel()
        return await asyncio.wait_for(serving, 20)

    return asyncio.run(scenario())


async def get_ready(http: aiohttp.ClientSession) -> None:
    async def is_ready() -> bool:
        try:
            async with http.get("/ready") as reply:
                return reply.status == 200
        except aiohttp.ClientConnectionError:
            return False

    while not await is_ready():
        await asyncio.sleep(0.01)


def test_port_answers_while_the_model_loads_and_signal_ends_it() -> None:
    async def during(url: str) -> None:
        async with aiohttp.ClientSession(url) as http:
            await asyncio.sleep(0.1)
            async with http.get("/ready") as reply:
                assert reply.status == 503
                assert (await reply.json())["error"]["code"] == "starting"
            await get_ready(http)
        os.kill(os.getpid(), signal.SIGTERM)

    assert run_lifecycle(FakeEngine(), during, load_time=0.3) == 0


def test_signal_while_loading_ends_at_once() -> None:
    async def during(url: str) -> None:
        await asyncio.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    started = time.monotonic()
    assert run_lifecycle(FakeEngine(), during, load_time=1.5) == 0
    assert time.monotonic() - started < 1.2


def test_drain_finishes_what_runs_and_refuses_what_comes() -> None:
    engine = FakeEngine()
    engine.hold.set()

    async def during(url: str) -> None:
        async with aiohttp.ClientSession(url) as http, aiohttp.ClientSession(url) as late:
            await get_ready(http)
            asking = asyncio.create_task(http.post(CHAT, json=BODY))
            await until(lambda: engine.added)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.05)
            for reply in (await late.get("/ready"), await late.post(CHAT, json=BODY)):
                assert reply.status == 503
                assert (await reply.json())["error"]["code"] == "draining"
            assert (await late.get("/health")).status == 200
            engine.hold.clear()
            reply = await asking
            assert (await reply.json())["choices"][0]["message"]["content"] == "Hello"

    assert run_lifecycle(engine, during) == 0


@pytest.mark.parametrize("is_second_signal", [False, True])
def test_drain_ends_by_deadline_or_second_signal(is_second_signal: bool) -> None:
    engine = FakeEngine()
    engine.hold.set()

    async def during(url: str) -> None:
        async with aiohttp.ClientSession(url) as http:
            await get_ready(http)
            stream = await http.post(CHAT, json={**BODY, "stream": True})
            whole = asyncio.create_task(http.post(CHAT, json=BODY))
            await until(lambda: len(engine.added) == 2)
            os.kill(os.getpid(), signal.SIGTERM)
            if is_second_signal:
                await asyncio.sleep(0.05)
                os.kill(os.getpid(), signal.SIGTERM)
            text = await stream.text()
            assert '"code":"shutting_down"' in text
            assert text.endswith("data: [DONE]\n\n")
            reply = await whole
            assert (reply.status, (await reply.json())["error"]["code"]) == (503, "shutting_down")

    assert run_lifecycle(engine, during, shutdown_timeout=60 if is_second_signal else 0.1) == 0


def test_dead_engine_is_an_exit_code_and_one_line_of_log(caplog: pytest.LogCaptureFixture) -> None:
    async def during(url: str) -> None:
        async with aiohttp.ClientSession(url) as http:
            await get_ready(http)
            assert (await http.post(CHAT, json=BODY)).status == 500
            assert [(await http.post(CHAT, json=BODY)).status for _ in range(3)] == [503] * 3
        os.kill(os.getpid(), signal.SIGTERM)

    assert run_lifecycle(FakeEngine(fail_at=0), during) == 1
    [line] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert line.message.startswith("the engine failed")
    assert "503 until the server is restarted" in line.message
    assert line.exc_info is not None


@pytest.mark.parametrize("load_time", [0.0, 1.5])
def test_the_end_of_the_parent_is_a_signal(load_time: float) -> None:
    """When the model is ready and while it loads; what the parent writes is not its end."""
    read, write = os.pipe()

    async def during(url: str) -> None:
        async with aiohttp.ClientSession(url) as http:
            os.write(write, b"x")
            await (asyncio.sleep(0.1) if load_time else get_ready(http))
            assert (await http.get("/ready")).status == (503 if load_time else 200)
        os.close(write)

    started = time.monotonic()
    assert run_lifecycle(FakeEngine(), during, load_time=load_time, parent=read) == 0
    assert time.monotonic() - started < 1.2
    os.close(read)


def test_what_loading_raises_ends_the_server() -> None:
    async def during(url: str) -> None:
        await asyncio.sleep(5)

    with pytest.raises(CheckpointError, match="no such file"):
        run_lifecycle(FakeEngine(), during, load_error=CheckpointError("no such file"))


def test_a_second_server_fails_at_once() -> None:
    def load() -> Served:
        raise AssertionError("must not load")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*is another server running"):
            asyncio.run(lifecycle.serve(ServerOptions(port=port), load))


def test_report_is_silent_when_idle(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def scenario() -> None:
        async with server() as api:
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
    assert "acceptance length 3.00" in lines[0]
