"""Bodies in flight: all together they stay within their memory, whatever clients send and how slowly."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from engine.server import bodies, protocol
from engine.server.bodies import Bodies
from engine.text.conversation import conversation_ids
from tests.server.fakes import FakeEngine, Server, server, until

CHAT, TOKENIZE = "/v1/chat/completions", "/tokenize"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
LARGE = BODY | {"ignored": "x" * 300_000}


@asynccontextmanager
async def sending(api: Server, num_bytes: int, promised: int, path: str = CHAT) -> AsyncIterator[Any]:
    """A client that has sent so many bytes of a body and goes no further; yields the answer's stream."""
    host, port = api.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {promised}\r\n\r\n".encode() + b"[" * num_bytes)
    try:
        yield reader
    finally:
        writer.close()


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bytes, dict[str, Any]]:
    """Status, head and error of an answer."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
    body = await asyncio.wait_for(reader.readexactly(int(length.split()[1])), 5)
    return int(head.split()[1]), head, msgspec.json.decode(body)["error"]


@pytest.mark.parametrize("path", [CHAT, TOKENIZE])
def test_bodies_that_come_slowly_do_not_fill_the_memory(path: str) -> None:
    async def scenario() -> None:
        async with server() as api:
            held = api.state.bodies = Bodies(max_total=400_000)
            async with sending(api, 230_000, 1 << 20, path), sending(api, 230_000, 1 << 20, path):
                await until(lambda: held.num_held == 2 * (230_000 - (64 << 10)))
                async with sending(api, 300_000, 1 << 20, path) as third:
                    status, head, error = await answer_of(third)
                assert (status, error["code"]) == (503, "queue_full")
                assert b"Retry-After: 1" in head
                assert held.num_held <= 400_000
                status, reply, headers = await api.post(CHAT, LARGE)
                assert (status, headers["Retry-After"]) == (503, "1")
                assert (await api.post(CHAT, BODY))[0] == 200  # a short question always has room
            await until(lambda: held.num_held == 0)  # they left
            assert (await api.post(CHAT, LARGE))[0] == 200
            assert held.num_held == 0

    asyncio.run(scenario())


def test_a_body_has_to_arrive_in_time() -> None:
    async def scenario() -> None:
        async with server() as api:
            held = api.state.bodies = Bodies(patience=0.1)
            async with sending(api, 100_000, 1 << 20) as reader:
                status, _, error = await answer_of(reader)
            assert (status, error["code"]) == (408, "body_too_slow")
            assert held.num_held == 0

    asyncio.run(scenario())


def test_a_body_that_promises_too_much_is_not_waited_for() -> None:
    async def scenario() -> None:
        async with server() as api, sending(api, 0, bodies.MAX_BODY + 1) as reader:
            status, _, error = await answer_of(reader)
            assert (status, error["code"]) == (413, "body_too_large")

    asyncio.run(scenario())


def test_a_body_counts_until_it_is_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many may wait to be tokenised; and while they are answered, nothing of them is left."""
    may_go_on = threading.Event()

    def slow(*args: Any, **more: Any) -> list[int]:
        may_go_on.wait(5)
        return conversation_ids(*args, **more)

    monkeypatch.setattr("engine.server.prepare.conversation_ids", slow)

    async def scenario() -> None:
        engine = FakeEngine()
        engine.hold.set()
        async with server(engine) as api:
            asking = asyncio.create_task(api.post(CHAT, LARGE))
            await until(lambda: api.state.bodies.num_held > 200_000)
            await asyncio.sleep(0.05)
            assert api.state.bodies.num_held > 200_000
            may_go_on.set()
            await until(lambda: engine.added)
            assert api.state.bodies.num_held == 0
            gc.collect()
            assert not [one for one in gc.get_objects() if type(one) is protocol.ChatRequest]
            engine.hold.clear()
            assert (await asking)[0] == 200

    asyncio.run(scenario())
