"""The load generator: when it sends, in virtual time; what it reads, from servers that behave oddly."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import numpy as np
import pytest

from engine.cli.client import CHAT, COMPLETIONS, ServerError, UnreachableError, model_names, session
from perf import load
from perf.load import Endpoint, Trace
from perf.workload import Ask
from tests.perf.endpoints import DONE, PLAIN, Reply, Scripted, VirtualLoop, event, piece, usage
from tests.server.fakes import FakeEngine, script, server

T = TypeVar("T")


def virtually(coroutine: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """The result, and how long it took."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        found = runner.run(coroutine)
        return found, runner.get_loop().time()


def asks(num: int) -> list[Ask]:
    return [Ask(f"prompt {number}", "kind", 4) for number in range(num)]


class Slow:
    """Answers after a while, which may differ; notes how many it answers at once."""

    def __init__(self, *seconds: float, gone_from: int | None = None) -> None:
        self.seconds, self.gone_from = seconds, gone_from
        self.asked: list[str] = []
        self.running = self.most = 0

    async def send(self, ask: Ask, due: float) -> Trace:
        clock = asyncio.get_running_loop().time
        trace = Trace(ask, due, clock())
        number = len(self.asked)
        self.asked.append(ask.prompt)
        if self.gone_from is not None and number >= self.gone_from:
            trace.error = UnreachableError("gone")
            return trace
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.seconds[number % len(self.seconds)])
        self.running -= 1
        trace.chunks.append(clock())
        return trace


# --- when


def test_a_slow_server_delays_nobody_in_an_open_loop() -> None:
    slow = Slow(60.0, 0.5)
    times = [0.0, 0.25, 1.0, 1.0, 7.5]
    traces, took = virtually(load.drive(asks(5), times, slow.send))
    assert [trace.sent for trace in traces] == pytest.approx(times)
    assert [trace.delay for trace in traces] == pytest.approx([0] * 5, abs=1e-6)
    assert [trace.ttft for trace in traces] == pytest.approx([60, 0.5, 60, 0.5, 60])
    assert took == pytest.approx(67.5)


def test_a_closed_loop_keeps_its_number_under_way() -> None:
    slow = Slow(3.0, 1.0, 1.0, 1.0)
    traces, took = virtually(load.drive(asks(4), [0.0] * 4, slow.send, 2))
    assert slow.most == 2
    assert [trace.ask.prompt for trace in traces] == [ask.prompt for ask in asks(4)]
    assert [trace.sent for trace in traces] == pytest.approx([0, 0, 1, 2])
    assert took == pytest.approx(3)


def test_waiting_for_a_place_is_delay_and_not_latency() -> None:
    traces, _ = virtually(load.drive(asks(3), [1.0, 2.0, 3.0], Slow(10.0).send, 1))
    assert [trace.sent for trace in traces] == pytest.approx([1, 11, 21])
    assert [trace.delay for trace in traces] == pytest.approx([0, 9, 18])
    assert [trace.ttft for trace in traces] == pytest.approx([10, 10, 10])


@pytest.mark.parametrize("most", [None, 1])
def test_a_server_that_is_gone_ends_the_run(most: int | None) -> None:
    slow = Slow(0.5, gone_from=2)
    ended: list[Trace] = []
    traces, took = virtually(load.drive(asks(6), [0, 1, 2, 3, 400, 500], slow.send, most, ended.append))
    assert [trace.error is None for trace in traces] == [True, True, False]
    assert len(slow.asked) == 3
    assert ended == traces
    assert took == pytest.approx(2)  # what was due later is not waited for


def test_those_that_wait_for_a_place_are_not_sent_to_a_server_that_is_gone() -> None:
    slow = Slow(0.5, gone_from=2)
    traces, _ = virtually(load.drive(asks(6), [0.0] * 6, slow.send, 1))
    assert len(slow.asked) == len(traces) == 3


def test_requests_under_way_are_awaited_when_the_server_is_gone() -> None:
    traces, took = virtually(load.drive(asks(4), [0, 0, 1, 2], Slow(30.0, gone_from=2).send))
    assert [trace.error is None for trace in traces] == [True, True, False]
    assert took == pytest.approx(30)


def test_arrivals() -> None:
    def draw(num: int, rate: float, burstiness: float, seed: int = 3) -> np.ndarray:
        return np.array(load.arrivals(num, rate, burstiness, np.random.default_rng(seed)))

    assert list(draw(3, np.inf, 1.0)) == [0.0, 0.0, 0.0]
    assert draw(4, 2.0, np.inf) == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert list(draw(50, 2.0, 0.5)) == list(draw(50, 2.0, 0.5))
    assert list(draw(50, 2.0, 0.5)) != list(draw(50, 2.0, 0.5, seed=4))
    for burstiness in (0.25, 1.0, 4.0):  # of a gamma distribution: deviation / mean = shape ** -0.5
        times = draw(20000, 5.0, burstiness)
        gaps = np.diff(times, prepend=0.0)
        assert times[-1] == pytest.approx(4000)
        assert (gaps >= 0).all()
        assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_servers_alternate_and_never_work_at_once() -> None:
    first, second = Slow(1.0, 2.0), Slow(0.5)
    both_busy = []

    def watched(slow: Slow, other: Slow) -> load.Send:
        async def send(ask: Ask, due: float) -> Trace:
            both_busy.append(other.running > 0)
            return await slow.send(ask, due)

        return send

    blocks = [asks(30)[3 * number : 3 * number + 3] for number in range(10)]
    order: list[Trace] = []
    rng = np.random.default_rng(0)
    parts, took = virtually(
        load.alternate(
            blocks,
            [watched(first, second), watched(second, first)],
            lambda num: load.arrivals(num, 10.0, 1.0, rng),
            rng,
            None,
            order.append,
        )
    )
    assert not any(both_busy)
    assert first.asked == second.asked == [ask.prompt for ask in asks(30)]
    assert sum(part.duration for own in parts for part in own) == pytest.approx(took)
    goes_first = set()
    for one, two in zip(*parts, strict=True):
        assert [t.ask for t in one.traces] == [t.ask for t in two.traces]
        begun = [part.traces[0].due for part in (one, two)]
        gaps = [np.diff([trace.due for trace in part.traces]) for part in (one, two)]
        assert gaps[0] == pytest.approx(gaps[1])
        goes_first.add(begun[0] < begun[1])
    assert goes_first == {True, False}
    assert len(order) == 60


def test_a_server_that_is_gone_ends_the_comparison() -> None:
    blocks = [asks(2), asks(2), asks(2)]
    rng = np.random.default_rng(0)
    parts, _ = virtually(
        load.alternate(blocks, [Slow(1.0).send, Slow(1.0, gone_from=2).send], lambda num: [0.0, 1.0], rng)
    )
    assert len(parts[1]) == 2
    assert len(parts[1][1].traces) == 1
    assert len(parts[0]) <= 2


def test_patience() -> None:
    said: list[str] = []
    errors: list[ServerError] = [UnreachableError("no"), UnreachableError("no"), ServerError("busy", 503)]

    async def action() -> int:
        if errors:
            raise errors.pop(0)
        return 5

    found, took = virtually(load.patiently(action, 10, said.append))
    assert found == 5
    assert took == pytest.approx(3)
    assert said == ["waiting up to 10 s: no", "waiting up to 10 s: busy"]

    async def refuse() -> None:
        raise ServerError("bad", 400)

    async def absent() -> None:
        raise UnreachableError("absent")

    with pytest.raises(ServerError, match="bad"):
        virtually(load.patiently(refuse, 10, said.append))
    with pytest.raises(UnreachableError, match="absent"):
        virtually(load.patiently(absent, 2.5, said.append))


# --- what


def ask_once(*pieces: bytes, path: str = CHAT, timeout: float = 20, **reply: Any) -> tuple[Trace, Scripted]:
    """The trace of one request to a server that answers with these pieces."""

    async def scenario() -> tuple[Trace, Scripted]:
        scripted = Scripted([Reply(pieces, **reply)])
        async with scripted.serving(), session(scripted.url) as http:
            endpoint = Endpoint(http, path, {"model": "m", "temperature": 0.0}, timeout)
            return await endpoint.send(Ask("Hi", "kind", 9), 0.0), scripted

    return asyncio.run(scenario())


def test_an_answer() -> None:
    trace, scripted = ask_once(*PLAIN)
    assert trace.error is None
    assert (trace.text, trace.finish_reason) == ("Hello", "stop")
    assert (trace.prompt_tokens, trace.completion_tokens) == (7, 5)
    assert len(trace.chunks) == 2
    assert trace.due < trace.sent <= trace.chunks[0] <= trace.chunks[1]
    assert trace.tpot == pytest.approx((trace.latency - trace.ttft) / 4)
    path, body, _ = scripted.asked[0]
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
    }


def test_a_completion() -> None:
    parts = [event(choices=[{"text": "a", "finish_reason": None}])]
    parts += [event(choices=[{"text": "", "finish_reason": "length"}]), usage(3), DONE]
    trace, scripted = ask_once(*parts, path=COMPLETIONS)
    assert (trace.error, trace.text, len(trace.chunks), trace.completion_tokens) == (None, "a", 2, 3)
    assert (scripted.asked[0][0], scripted.asked[0][1]["prompt"]) == ("/v1/completions", "Hi")
    assert "messages" not in scripted.asked[0][1]


def test_what_counts_as_the_first_piece() -> None:
    """Not the role alone, which some servers send at once; but thoughts and calls do, and an early end."""
    role = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
    assert len(ask_once(role, *PLAIN)[0].chunks) == 2
    thought = event(choices=[{"delta": {"reasoning_content": "hm"}}])
    call = event(choices=[{"delta": {"tool_calls": [{"index": 0, "id": "a"}]}}])
    assert len(ask_once(role, thought, call, *PLAIN)[0].chunks) == 4
    trace, _ = ask_once(role, piece(None, "stop"), usage(1), DONE)
    assert (trace.error, len(trace.chunks), trace.tpot) == (None, 1, None)
    # an event without text amid others is a step that only held text back
    assert len(ask_once(piece("a"), piece(""), piece("b", "stop"), DONE)[0].chunks) == 3


@pytest.mark.parametrize("cut_at", range(1, 12))
def test_events_may_be_cut_anywhere(cut_at: int) -> None:
    """Inside a character, a line and between the two line ends, which may be CR LF."""
    body = b": hi\r\n\r\n" + piece("Gr\u00fc\U0001f600").replace(b"\n", b"\r\n") + piece("\u00e9", "stop")
    body += usage(4) + DONE
    width = len(body) // 12 + 1
    parts = [body[: cut_at * 2], *(body[i : i + width] for i in range(cut_at * 2, len(body), width))]
    trace, _ = ask_once(*parts)
    assert (trace.error, trace.text, trace.completion_tokens) == (None, "Gr\u00fc\U0001f600\u00e9", 4)


def test_a_server_without_usage_leaves_the_number_of_tokens_open() -> None:
    trace, _ = ask_once(piece("a"), piece("b", "stop"), DONE)
    assert (trace.error, trace.completion_tokens, trace.tpot) == (None, None, None)


def test_a_missing_end_mark_does_no_harm_to_a_complete_answer() -> None:
    trace, _ = ask_once(*PLAIN[:-1])
    assert (trace.error, trace.completion_tokens) == (None, 5)


@pytest.mark.parametrize(
    ("pieces", "reply", "message"),
    [
        ([piece("a"), event(error={"message": "it broke"}), DONE], {}, "the server failed: it broke"),
        ([piece("a"), event(error="flat"), DONE], {}, "the server failed"),
        ([piece("a"), DONE], {}, "ended the stream before the end"),
        ([piece("a")], {}, "ended the stream before the end"),
        ([DONE], {}, "ended the stream before the end"),
        ([piece("a")], {"is_cut": True}, "the server went away"),
        ([b"data: {oops\n\n"], {}, "an event that is none of OpenAI's"),
        ([b"data: 5\n\n"], {}, "an event that is none of OpenAI's"),
        ([event(choices=[{"delta": "x"}])], {}, "an event that is none of OpenAI's"),
        ([b"data: \xff\xfe\n\n"], {}, "an event that is none of OpenAI's"),
        ([b"data: " + b"x" * (17 << 20)], {}, "the server went away"),
        ([b'{"error": {"message": "full"}}'], {"status": 503}, "the server answered 503: full"),
        ([b"<html>no</html>"], {"status": 404}, "the server answered 404: <html>no</html>"),
    ],
)
def test_what_fails_is_an_error_that_says_why(
    pieces: list[bytes], reply: dict[str, Any], message: str
) -> None:
    trace, _ = ask_once(*pieces, **reply)
    assert trace.error is not None
    assert message in str(trace.error)
    assert not isinstance(trace.error, UnreachableError)


def test_an_answer_may_take_too_long() -> None:
    async def scenario() -> Trace:
        engine = FakeEngine(script(b"tick"))
        engine.hold.set()
        async with server(engine) as api, session(api.url) as http:
            return await Endpoint(http, CHAT, {}, 0.05).send(asks(1)[0], 0.0)

    assert str(asyncio.run(scenario()).error) == "no complete answer within 0.05 s"


def test_nothing_listens() -> None:
    async def scenario() -> Trace:
        scripted = Scripted()
        async with scripted.serving():
            pass
        async with session(scripted.url) as http:
            return await Endpoint(http, CHAT, {}, 5).send(asks(1)[0], 0.0)

    assert isinstance(asyncio.run(scenario()).error, UnreachableError)


def test_more_requests_at_once_than_a_client_usually_opens_connections() -> None:
    """aiohttp's own limit of 100 would hold requests back, unseen, in an open loop."""

    async def scenario() -> tuple[list[Trace], int]:
        engine = FakeEngine(script(b"a", b"b"))
        engine.hold.set()
        async with server(engine, max_num_queued_reqs=1000) as api, session(api.url) as http:
            endpoint = Endpoint(http, CHAT, {}, 20)
            run = asyncio.create_task(load.drive(asks(120), [0.0] * 120, endpoint.send))
            while len(engine.added) < 120 and not run.done():
                await asyncio.sleep(0.01)
            at_once = len(engine.added)
            engine.hold.clear()
            return await run, at_once

    traces, at_once = asyncio.run(asyncio.wait_for(scenario(), 15))
    assert at_once == 120
    assert [trace.error for trace in traces] == [None] * 120


def test_our_server() -> None:
    async def scenario() -> tuple[list[Trace], list[str]]:
        engine = FakeEngine(script(b"He", b"llo", b" you"))
        async with server(engine) as api, session(api.url + "/v1/") as http:
            names = await model_names(http)
            endpoint = Endpoint(http, CHAT, {"model": names[0]}, 20)
            return await load.drive(asks(3), [0.0] * 3, endpoint.send, 1), names

    traces, names = asyncio.run(scenario())
    assert names == ["fake"]
    for trace in traces:
        assert (trace.error, trace.text, trace.completion_tokens) == (None, "Hello you", 10)
        assert 1 <= len(trace.chunks) <= 3  # steps that a slow reader gets at once come as one piece
        assert trace.metrics["speculative_decoding"]["num_spec_steps"] == 2


@pytest.mark.parametrize("models", [b"{}", b"[]", b"no", b'{"data": [{"name": 5}]}'])
def test_a_list_of_models_that_is_none(models: bytes) -> None:
    async def scenario() -> None:
        scripted = Scripted(models=models)
        async with scripted.serving(), session(scripted.url) as http:
            await model_names(http)

    with pytest.raises(ServerError, match="no list of models"):
        asyncio.run(scenario())
