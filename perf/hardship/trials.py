"""What happens to a server that works. Each trial notes its figures and what should not have been.

Everywhere the same two demands: an answer that was begun is complete and the true one, and a refusal says
that it may be tried again. What the server holds afterwards is looked at by who runs the trials.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

import msgspec
import numpy as np

from engine.server.sse import WRITE_TIMEOUT
from perf.hardship import nonsense
from perf.hardship.census import resident_bytes
from perf.hardship.client import completion
from perf.hardship.stage import Findings, Stage, Users, median_ms
from perf.load import arrivals

Trial = Callable[[Stage, Findings], Awaitable[None]]

_OVERLOAD: Final = 10  # times what the server can do
_NUM_SLOW: Final = 4
_SLOW_GROWTH: Final = 32 << 20  # bytes that slow readers may make the server hold, their answers included


async def fuzzing(stage: Stage, findings: Findings) -> None:
    """Every question, drafted, twice as many at once as the server runs; streamed and whole."""
    dice = stage.dice("fuzzing")
    order = dice.sample(range(len(stage.questions)), len(stage.questions))
    places = asyncio.Semaphore(2 * stage.scale.num_seqs)
    totals: Counter[str] = Counter()

    async def one(number: int, stream: bool) -> None:
        async with places:
            outcome = await stage.ask(number, stream)
        stage.judge(number, outcome, findings)
        totals.update(
            answers=len(outcome.answers),
            tokens=outcome.num_tokens,
            drafted=outcome.num_drafted,
            accepted=outcome.num_accepted,
        )

    await asyncio.gather(*(one(number, stream) for number in order for stream in (True, False)))
    kinds = Counter(kind for question in stage.questions for kind in question.kinds)
    findings.figures |= {**totals, "questions_by_kind": dict(kinds)}
    findings.expect(totals["drafted"] > 0, "nothing was drafted, so nothing was tried")


async def overload(stage: Stage, findings: Findings) -> None:
    """First as many users as the server runs at once: what it can do. Then ten times that, come what may."""
    clock, seconds = asyncio.get_running_loop().time, stage.scale.overload_s
    started = clock()
    async with Users(stage, stage.scale.num_seqs, "full house", findings) as users:
        await asyncio.sleep(seconds)
    rate = users.num_answered / (clock() - started)
    offered = _OVERLOAD * rate
    num = max(round(offered * seconds), 2 * stage.scale.capacity)  # enough to fill the queue in any case
    times = arrivals(num, offered, 1.0, np.random.default_rng(stage.seed))
    draws, begun = stage.draws("overload"), clock()
    tpots, counts = list[float](), Counter[str]()

    async def one(number: int, due: float) -> None:
        await asyncio.sleep(begun + due - clock())
        outcome = await stage.ask(number)
        if outcome.status == 503:
            counts["refused"] += 1
            findings.expect(
                outcome.code == "queue_full" and outcome.retry_after is not None,
                f"a refusal with code {outcome.code} and Retry-After {outcome.retry_after}",
            )
            return
        counts["admitted"] += 1
        stage.judge(number, outcome, findings)
        if outcome.tpot is not None:
            tpots.append(outcome.tpot)

    async with _pinging(stage, findings) as pings:
        await asyncio.gather(*(one(next(draws), due) for due in times))
    findings.expect(counts["refused"] > 0, "nobody was refused, so it was no overload")
    findings.expect(counts["admitted"] > 0, "nobody was admitted")
    findings.figures |= {
        "served_per_s": round(rate, 3),
        "offered_per_s": round(offered, 3),
        "offered": num,
        **counts,
        "median_tpot_ms_full_house": users.median_tpot_ms,
        "median_tpot_ms_overload": median_ms(tpots),
        "median_health_ms": median_ms(pings),
        "max_health_ms": round(1e3 * max(pings), 3),
    }


@asynccontextmanager
async def _pinging(stage: Stage, findings: Findings) -> AsyncIterator[list[float]]:
    """Seconds that /health takes, asked ten times a second meanwhile."""
    clock, pings = asyncio.get_running_loop().time, list[float]()

    async def ping() -> None:
        while True:
            sent = clock()
            status, _ = await stage.observer.get("health")
            pings.append(clock() - sent)
            findings.expect(status == 200, f"/health: found status {status}, expected 200")
            await asyncio.sleep(0.1)

    pinging = asyncio.create_task(ping())
    try:
        yield pings
    finally:
        while not pings and not pinging.done():
            await asyncio.sleep(0.01)
        pinging.cancel()


async def vanishing(stage: Stage, findings: Findings) -> None:
    """Clients that leave: in their header, their body, the queue, a prompt's prefill or an answer, with a
    farewell or a reset. Two users go on meanwhile."""
    dice, draws = stage.dice("vanishing"), stage.draws("vanishing")
    places = asyncio.Semaphore(stage.scale.num_queued)
    moments: Counter[str] = Counter()
    before = await stage.observer.metrics()

    async def one() -> None:
        async with places:
            moments[await _vanish(stage, next(draws), dice)] += 1

    async with Users(stage, 2, "witnesses", findings) as users:
        await asyncio.gather(*(one() for _ in range(stage.scale.num_leavers)))
    after = await stage.observer.metrics()
    name = "haast:request_success_total{abort}"
    findings.figures |= {
        "left": dict(sorted(moments.items())),
        "aborted": int(after.get(name, 0) - before.get(name, 0)),
        "witnesses_answered": users.num_answered,
        "witnesses_refused": users.num_refused,
    }
    findings.expect(findings.figures["aborted"] > 0, "no answer was aborted, so nobody left in time")


async def _vanish(stage: Stage, number: int, dice: random.Random) -> str:
    """Ask on a connection of its own and leave; returns where."""
    question, is_rude = stage.questions[number], dice.random() < 0.5
    body = msgspec.json.encode({**question.body, "stream": dice.random() < 0.7})
    head = (
        f"POST /{question.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    moment = dice.choices(["in its header", "in its body", "before its answer"], [1, 1, 8])[0]
    data = {"in its header": head[: dice.randrange(len(head))], "in its body": head + body[:-1]}
    patience = dice.uniform(0, 4 * stage.lone_s)
    reader, writer = await asyncio.open_connection(*stage.address)
    try:
        with suppress(ConnectionError, TimeoutError):
            writer.write(data.get(moment, head + body))
            await writer.drain()
            async with asyncio.timeout(patience):
                await reader.readuntil(b"\r\n\r\n")
                moment = "in its answer"
                while await reader.read(4096):
                    pass
                moment = "after its answer"
    finally:
        if is_rude:
            writer.transport.abort()
        writer.close()
    return moment


async def slow_reader(stage: Stage, findings: Findings) -> None:
    """Users alone, then beside readers of a byte a second who ask for long answers with everything on."""
    seconds, pid = stage.scale.slow_s, stage.server.pid
    async with Users(stage, stage.scale.num_seqs, "alone", findings) as alone:
        await asyncio.sleep(seconds / 2)
    at_start = most = resident_bytes(pid)
    readers = [asyncio.create_task(_read_slowly(stage)) for _ in range(_NUM_SLOW)]
    async with Users(stage, stage.scale.num_seqs, "beside", findings) as beside:
        for _ in range(round(seconds / 0.1)):
            await asyncio.sleep(0.1)
            most = max(most, resident_bytes(pid))
    # The server knows: what lies in their own kernel's buffers keeps such readers busy for minutes to come.
    held, tries = _NUM_SLOW, 20
    while held and tries:  # the users' places are free a moment after them
        await asyncio.sleep(0.1)
        held, tries = round((await stage.observer.take()).places), tries - 1
    num_dropped = _NUM_SLOW - held
    for reader in readers:
        reader.cancel()
    findings.figures |= {
        "slow_readers": _NUM_SLOW,
        "dropped": num_dropped,
        "median_tpot_ms_alone": alone.median_tpot_ms,
        "median_tpot_ms_beside": beside.median_tpot_ms,
        "answered_beside": beside.num_answered,
        "growth_bytes": most - at_start,
    }
    findings.expect(
        most - at_start <= _SLOW_GROWTH,
        f"the server grew by {most - at_start} bytes, expected at most {_SLOW_GROWTH}",
    )
    if seconds > 1.2 * WRITE_TIMEOUT:
        findings.expect(
            num_dropped == _NUM_SLOW,
            f"{num_dropped} of {_NUM_SLOW} slow readers were dropped within {seconds:g} s",
        )


async def _read_slowly(stage: Stage) -> None:
    """Read a long answer at a byte a second, to its end or the server's patience's."""
    loop = asyncio.get_running_loop()
    limit = {"max_tokens": stage.scale.slow_tokens, "ignore_eos": True, "logprobs": 20, "stream": True}
    question = completion("Count to one thousand.", **limit, temperature=0, speculation="off")
    body = msgspec.json.encode(question.body)
    head = f"POST /{question.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the kernel makes it its smallest
        connection.setblocking(False)
        await loop.sock_connect(connection, stage.address)
        await loop.sock_sendall(connection, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        with suppress(ConnectionError):
            while await loop.sock_recv(connection, 1):
                await asyncio.sleep(1.0)


async def bad_requests(stage: Stage, findings: Findings) -> None:
    """Nonsense of every sort, while two users go on."""
    statuses: Counter[str] = Counter()
    host, port = stage.address
    async with Users(stage, 2, "beside nonsense", findings) as users:
        for what in nonsense.nonsense(stage.scale.num_nonsense, stage.seed):
            try:
                found = await nonsense.send(host, port, what)
            except TimeoutError:
                findings.complain(f"{what.name}: the connection stayed open without an answer")
                continue
            statuses[str(found.status)] += 1
            problem = nonsense.problem(what, found)
            if problem is not None:
                findings.complain(problem)
    findings.figures |= {"statuses": dict(sorted(statuses.items())), "witnesses_answered": users.num_answered}


TRIALS: Final[dict[str, Trial]] = {
    "fuzzing": fuzzing,
    "overload": overload,
    "vanishing": vanishing,
    "slow reader": slow_reader,
    "nonsense": bad_requests,
}
