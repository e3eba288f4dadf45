"""An engine that answers from a script, a byte-level tokenizer, and a server around them on a real socket."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import aiohttp
import msgspec
from aiohttp import web

from engine.build import Served
from engine.canary import CanaryCounts
from engine.config import EngineConfig
from engine.core import Delta, Request
from engine.server.lifecycle import app_runner
from engine.server.state import ServerOptions, ServerState
from engine.text.conversation import AnyTokenizer
from tests.text.hermes import compiler

EOS = 256
TEMPLATE = "{% for message in messages %}{{ message.role[0] }}:{{ message.content }};{% endfor %}"


class ByteTokenizer:
    """Token i is byte i; 256 ends an answer."""

    vocab_size = 257
    eos_token_ids = (EOS,)
    bos_token_id = None
    special_tokens: dict[str, int] = {}
    chat_template = TEMPLATE

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def token_text(self, token_id: int) -> str | None:
        return None


BYTES = ByteTokenizer()


def script(*steps: bytes, finish: str = "stop", accepted: int | None = None) -> list[Delta]:
    """One delta per step: the first from prefill, the others from trees of 3 nodes of which all but one token
    were accepted. An answer that ends by 'stop' ends with the EOS token."""
    deltas = []
    for number, text in enumerate(steps):
        is_decode = number > 0
        deltas.append(
            Delta(
                0,
                tuple(text),
                None,
                num_draft_tokens=3 if is_decode else 0,
                draft_depth=3 if is_decode else 0,
                num_accepted=(len(text) - 1 if accepted is None else accepted) if is_decode else 0,
                is_decode=is_decode,
            )
        )
    last = deltas[-1]
    tokens = (*last.token_ids, EOS) if finish == "stop" else last.token_ids
    deltas[-1] = replace(last, token_ids=tokens, finish_reason=cast(Any, finish))
    return deltas


@dataclass
class FakeEngine:
    """Gives every request the same answer, a delta per step, and notes what it is told. All tokens of a
    prompt but the last are cached.

    hold: while it is set, steps do nothing; fail_at: the step (from 0) that raises; refusal: what add raises;
    step_time: seconds that a step takes.
    """

    answer: Sequence[Delta] = field(default_factory=lambda: script(b"He", b"llo"))
    config: EngineConfig = field(default_factory=lambda: EngineConfig(max_model_len=64, max_num_seqs=2))
    fail_at: int | None = None
    refusal: Exception | None = None
    step_time: float = 0.0
    hold: threading.Event = field(default_factory=threading.Event)
    canary: CanaryCounts = field(default_factory=CanaryCounts)
    added: list[Request] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    num_steps: int = 0

    def __post_init__(self) -> None:
        self._live: dict[int, deque[Delta]] = {}
        self._farewells: list[Delta] = []

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._farewells)

    @property
    def num_running(self) -> int:
        return len(self._live)

    @property
    def num_waiting(self) -> int:
        return 0

    def vocab_coverage(self) -> float | None:
        return 0.975

    def kv_usage(self) -> float:
        return 0.0

    def prefix_counts(self) -> tuple[int, int]:
        return sum(len(r.prompt) for r in self.added), sum(len(r.prompt) - 1 for r in self.added)

    def canary_counts(self) -> CanaryCounts:
        return self.canary

    def add(self, request: Request) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.added.append(request)
        self._live[request.id] = deque(
            replace(delta, request_id=request.id, num_cached=len(request.prompt) - 1) for delta in self.answer
        )

    def abort(self, request_id: int) -> None:
        self.aborted.append(request_id)
        if self._live.pop(request_id, None) is not None:
            self._farewells.append(Delta(request_id, (), "abort"))

    def fail_running(self, why: str) -> list[Delta]:
        failed, self._live = list(self._live), {}
        return [Delta(request_id, (), "error", error=why) for request_id in failed]

    def step(self) -> list[Delta]:
        if self.fail_at == self.num_steps:
            raise RuntimeError("the step broke")
        farewells, self._farewells = self._farewells, []
        if self.hold.is_set():
            time.sleep(0.001)
            return farewells
        time.sleep(self.step_time)
        self.num_steps += 1
        deltas = [rest.popleft() for rest in self._live.values()]
        for delta in deltas:
            if delta.finish_reason is not None:
                del self._live[delta.request_id]
        return farewells + deltas


def serve_fake(
    engine: FakeEngine, draft_name: str = "fake-head", tokenizer: AnyTokenizer | None = None
) -> Served:
    """The fake as a model called 'fake'."""
    tokenizer = tokenizer or BYTES
    grammars = compiler(cast(Any, tokenizer))
    return Served(cast(Any, engine), tokenizer, "fake", "/models/fake", draft_name, grammars)


@dataclass
class Server:
    """A running server and a session to it."""

    engine: FakeEngine
    state: ServerState
    url: str
    http: aiohttp.ClientSession

    async def post(self, path: str, body: object, **headers: str) -> tuple[int, dict[str, Any], Any]:
        """Status, JSON and headers of a POST; bytes are sent as they are."""
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        headers = {"Content-Type": "application/json", **headers}
        async with self.http.post(path, data=data, headers=headers) as reply:
            return reply.status, msgspec.json.decode(await reply.read()), reply.headers

    async def get(self, path: str, **headers: str) -> tuple[int, dict[str, Any], Any]:
        async with self.http.get(path, headers=headers) as reply:
            return reply.status, msgspec.json.decode(await reply.read()), reply.headers

    async def stream(self, body: dict[str, object], path: str = "/v1/chat/completions") -> list[Any]:
        """The events of a stream in order; the end mark and comments as strings."""
        data = msgspec.json.encode({**body, "stream": True})
        async with self.http.post(path, data=data, headers={"Content-Type": "application/json"}) as reply:
            assert reply.status == 200, await reply.text()
            assert reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            blocks = (await reply.text()).split("\n\n")
        assert blocks.pop() == ""
        return [msgspec.json.decode(block[6:]) if block.startswith("data: {") else block for block in blocks]


@asynccontextmanager
async def server(
    engine: FakeEngine | None = None,
    is_loaded: bool = True,
    draft_name: str = "fake-head",
    tokenizer: AnyTokenizer | None = None,
    **options: Any,
) -> AsyncIterator[Server]:
    """A server on a free port; without is_loaded it stays in its starting state."""
    engine = engine or FakeEngine()
    state = ServerState(ServerOptions(**options))
    runner = app_runner(state)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    url = f"http://{host}:{port}"
    if is_loaded:
        state.begin(serve_fake(engine, draft_name, tokenizer))
    try:
        async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=20)) as http:
            yield Server(engine, state, url, http)
    finally:
        if isinstance(engine, FakeEngine):  # not a real one, which tests may bring as well
            engine.hold.clear()
        if state.serving is not None:
            await state.serving.runner.stop()
            state.serving.close()
        await runner.cleanup()


async def until(condition: Any, timeout: float = 5.0) -> None:
    """Wait until condition() is true; fails after the timeout."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)
