"""What all trials share: the server, the questions with their true answers, and who judges.

A question's true answer is what it got alone, without speculation, before anything else happened.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from perf.hardship.census import Observer
from perf.hardship.client import Outcome, Question, Said, ask
from perf.hardship.process import ServerProcess

_MOST_TOLD: Final = 20  # problems of one trial that are told; all count


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything. Seconds are those of the trial, not of what comes before and after."""

    num_seqs: int = 4  # that the server runs at once
    num_queued: int = 12
    num_questions: int = 48
    most_tokens: int = 24  # of an answer
    overload_s: float = 15.0
    num_leavers: int = 500
    slow_s: float = 75.0  # more than it takes to fill the buffers, and the server's write timeout
    slow_tokens: int = 400  # of the answers that are read slowly
    num_nonsense: int = 600

    @property
    def capacity(self) -> int:
        return self.num_seqs + self.num_queued

    def small(self) -> Scale:
        """A little of everything, for the same server and the same questions."""
        return dataclasses.replace(
            self, overload_s=0.2, num_leavers=20, slow_s=0.3, slow_tokens=10, num_nonsense=40
        )


QUICK: Final = Scale(num_seqs=2, num_queued=4, num_questions=8, most_tokens=10).small()


@dataclass(slots=True)
class Findings:
    """What a trial showed."""

    figures: dict[str, Any] = field(default_factory=dict)
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)  # the first ones

    def complain(self, problem: str) -> None:
        self.num_problems += 1
        if self.num_problems <= _MOST_TOLD:
            self.problems.append(problem)

    def expect(self, holds: bool, problem: str) -> None:
        """Note a problem unless something holds."""
        if not holds:
            self.complain(problem)


@dataclass(slots=True)
class Stage:
    """A server, and what is known of it.

    truth: the answers to each question, in their order. lone_s: seconds that one takes alone, on average.
    """

    server: ServerProcess
    observer: Observer
    scale: Scale
    seed: int
    questions: Sequence[Question]
    truth: list[dict[int, Said]] = field(default_factory=list)
    lone_s: float = 0.0
    http: aiohttp.ClientSession = field(init=False)  # of the trial under way

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.server.url)
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    def dice(self, name: str) -> random.Random:
        """The chance of one trial."""
        return random.Random(f"{name}/{self.seed}")

    def draws(self, name: str) -> Iterator[int]:
        """Numbers of questions without end: all in a random order, then in another."""
        dice = self.dice(name)
        while True:
            yield from dice.sample(range(len(self.questions)), len(self.questions))

    async def ask(self, number: int, stream: bool = True) -> Outcome:
        return await ask(self.http, self.questions[number], stream)

    async def learn_truth(self, findings: Findings) -> None:
        """Ask every question alone and plainly."""
        started = time.perf_counter()
        for number, question in enumerate(self.questions):
            outcome = await ask(self.http, question.altered(speculation="off"), stream=False)
            self.truth.append(outcome.answers)
            if not outcome.is_complete:
                findings.complain(
                    f"{self.describe(number)}: not answered alone: {outcome.status} {outcome.code}"
                )
        self.lone_s = (time.perf_counter() - started) / len(self.questions)

    def describe(self, number: int) -> str:
        return f"question {number} ({', '.join(self.questions[number].kinds) or 'plain'})"

    def judge(self, number: int, outcome: Outcome, findings: Findings) -> None:
        """Complain of an answer that is not complete, or not the true one."""
        if not outcome.is_complete:
            findings.complain(
                f"{self.describe(number)}: not complete: status {outcome.status}, code {outcome.code}, "
                f"{outcome.num_tokens} tokens"
            )
        elif outcome.answers != self.truth[number]:
            findings.complain(
                f"{self.describe(number)}: differs from its lone run: found {outcome.answers}, expected "
                f"{self.truth[number]}"
            )


class Users:
    """Some users in a closed loop: each asks its next question when its last answer has ended.

    ``async with`` them around what they are to be witnesses of. Refusals are counted and tried again.
    """

    def __init__(self, stage: Stage, num: int, name: str, findings: Findings) -> None:
        self._stage, self._num, self._findings = stage, num, findings
        self._draws = stage.draws(name)
        self.num_answered = self.num_refused = 0
        self.tpots: list[float] = []
        self._over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Users:
        self._tasks = [asyncio.create_task(self._use()) for _ in range(self._num)]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Everybody gets the answer that is under way."""
        self._over.set()
        await asyncio.gather(*self._tasks)

    async def _use(self) -> None:
        while not self._over.is_set():
            number = next(self._draws)
            outcome = await self._stage.ask(number)
            if outcome.status == 503 and outcome.code == "queue_full":
                self.num_refused += 1
                await asyncio.sleep(0.05)
                continue
            self.num_answered += 1
            self._stage.judge(number, outcome, self._findings)
            if outcome.tpot is not None:
                self.tpots.append(outcome.tpot)

    @property
    def median_tpot_ms(self) -> float | None:
        return median_ms(self.tpots)


def median_ms(seconds: Sequence[float]) -> float | None:
    """The median in milliseconds; None of nothing."""
    return round(1e3 * median(seconds), 3) if seconds else None
