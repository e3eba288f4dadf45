"""From start to end: the port answers while a model loads, and every way of stopping ends the server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from typing import Any

import aiohttp
import pytest
from llguidance import LLTokenizer

from engine.build import Served
from engine.core import Delta
from engine.errors import CheckpointError, ConfigError
from engine.server import lifecycle
from engine.server.runner import EngineRunner
from engine.server.state import ServerOptions
from engine.text import grammar
from engine.text.conversation import AnyTokenizer
from tests.server.fakes import ByteTokenizer, FakeEngine, script, serve_fake, until

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
LONG = script(*[b"tick "] * 1000, finish="length")


def run_lifecycle(
    engine: FakeEngine,
    during: Any,
    load_error: Exception | None = None,
    load_time: float = 0.0,
    parent: int | None = None,
    tokenizer: AnyTokenizer | None = None,
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
            return serve_fake(engine, tokenizer=tokenizer)

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


def test_what_grammars_need_is_made_before_the_server_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not on the event loop."""
    makers: list[str] = []

    def recorded(*args: Any, **more: Any) -> LLTokenizer:
        makers.append(threading.current_thread().name)
        return LLTokenizer(*args, **more)

    monkeypatch.setattr(grammar, "LLTokenizer", recorded)

    async def during(url: str) -> None:
        async with aiohttp.ClientSession(url) as http:
            await get_ready(http)
            assert makers == ["load"]
            asked = {**BODY, "structured_outputs": {"regex": "[a-z]+"}}
            assert (await http.post(CHAT, json=asked)).status == 200
            assert makers == ["load"]
        os.kill(os.getpid(), signal.SIGTERM)

    assert run_lifecycle(FakeEngine(), during, tokenizer=ByteTokenizer()) == 0


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
            assert [(await http.post(CHAT, json=BODY)).status for _ in range(3)] == [500] * 3

    assert run_lifecycle(FakeEngine(fail_at=0), during) == 1  # and no signal
    *steps, line = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [step.message.partition(":")[0] for step in steps] == ["a step failed"] * 2
    assert line.message.startswith("the engine failed")
    assert "503 until the server ends" in line.message
    assert line.exc_info is not None


def test_a_dead_engine_ends_the_server_once_everybody_is_told() -> None:
    """Streams have their error and their end mark, and nobody waits for the shutdown timeout."""
    engine = FakeEngine(LONG, fail_at=5, step_time=0.02)

    def broken(why: str) -> list[Delta]:
        raise AssertionError("pages are missing")

    engine.fail_running = broken  # type: ignore[method-assign]

    async def during(url: str) -> None:
        async with aiohttp.ClientSession(url) as http:
            await get_ready(http)
            streams = [await http.post(CHAT, json={**BODY, "stream": True}) for _ in range(2)]
            for text in [await stream.text() for stream in streams]:
                assert '"code":"engine_failed"' in text
                assert text.endswith("data: [DONE]\n\n")

    started = time.monotonic()
    assert run_lifecycle(engine, during, shutdown_timeout=60) == 1
    assert time.monotonic() - started < 10


def test_an_engine_that_does_not_stop_is_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step outlives the wait for its end; the client has had its error long before."""
    monkeypatch.setattr(EngineRunner.stop, "__defaults__", (0.05,))
    engine = FakeEngine(step_time=2.0)

    async def during(url: str) -> None:
        async with aiohttp.ClientSession(url) as http:
            await get_ready(http)
            reply = await http.post(CHAT, json=BODY)
            assert (reply.status, (await reply.json())["error"]["code"]) == (500, "engine_stalled")
        os.kill(os.getpid(), signal.SIGTERM)

    assert run_lifecycle(engine, during, stalled_after=0.1) == 1


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


def test_the_kernel_holds_little_for_readers_that_do_not_read() -> None:
    """A connection that nobody reads is full before a long answer is out, so that somebody notices."""
    with lifecycle._bind(ServerOptions(port=0)) as listening, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the kernel makes it its smallest
        client.connect(listening.getsockname())
        accepted, _ = listening.accept()
        with accepted:
            accepted.setblocking(False)
            num_bytes = 0
            with contextlib.suppress(BlockingIOError):
                while num_bytes < 64 << 20:
                    num_bytes += accepted.send(b"x" * 4096)
    assert num_bytes <= 4 * lifecycle._SEND_BUFFER


def test_a_second_server_fails_at_once() -> None:
    def load() -> Served:
        raise AssertionError("must not load")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*is another server running"):
            asyncio.run(lifecycle.serve(ServerOptions(port=port), load))
