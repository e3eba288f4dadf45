"""C users at once, in process: each sends its next prompt when its last answer has ended.

    start            opened                                  closed
      |  all prompts   |  measured: all C users are busy       |  what still runs is aborted
      |  arrive at     |                                       |
      |  once          every user has seen a first token

The window in which figures are taken opens when every user has seen a first token, so the crowd at the
start counts nowhere, and it closes with every user busy, so there is no thinning out at the end. The first
answer of user i of C is cut to (i + 1) / C of the longest one, so that from the beginning users are as far
apart as they would be after a long time, and prompts arrive among decoding steps, not in a second crowd.

What users ask depends on (seed, user, number) alone: the same prompts, lengths and sampling seeds whatever
the engine is told to draft. So answers of two modes can be compared token by token, as far as both got.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.core import Delta, Request, SamplingParams, Speculation
from engine.step import Engine
from perf.latency import ratio
from verify.stats import StepTimes

MIN_STEPS = 8  # with tokens, in a window, however short it was meant to be
MIN_TOKENS = 8  # after an answer's first event in the window; time per token of fewer would be a step's whim


@dataclass(frozen=True, slots=True)
class Load:
    """What the users of one window ask."""

    prompts: Sequence[tuple[int, ...]]
    concurrency: int
    temperature: float
    max_tokens: int  # longest answer
    seed: int

    def requests(self, user: int) -> Iterator[tuple[tuple[int, ...], SamplingParams]]:
        """One user's prompts with their parameters, without end: all of them in a random order, then in
        another."""
        chance = random.Random(f"{self.seed}/{user}")
        max_tokens = max(1, self.max_tokens * (user + 1) // self.concurrency)
        while True:
            for prompt in chance.sample(self.prompts, len(self.prompts)):
                yield (
                    prompt,
                    SamplingParams(
                        temperature=self.temperature, max_tokens=max_tokens, seed=chance.getrandbits(32)
                    ),
                )
                max_tokens = self.max_tokens


@dataclass(slots=True)
class Answer:
    """One answer as its user saw it: when it was asked for, and the time and tokens of every event."""

    user: int
    number: int  # of the user's answers, from 0
    sent: float
    token_ids: list[int] = field(default_factory=list)
    events: list[tuple[float, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its end, its phases, and what its decoding part emitted."""

    ended: float
    times: StepTimes
    num_seqs: int
    num_tokens: int


@dataclass(slots=True)
class Trace:
    """What happened; times in seconds of one clock."""

    started: float
    opened: float = 0.0
    closed: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def contains(self, moment: float) -> bool:
        """Whether something that ended then belongs to the window; what opened it does not."""
        return self.opened < moment <= self.closed


def drive(
    engine: Engine,
    speculation: Speculation | None,
    load: Load,
    seconds: float,
    first_id: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Trace:
    """Let the users loose on an idle engine for so many seconds, and leave it idle.

    If it takes more than half of them until all are busy, the window stays open for half of them anyway, and
    until it holds MIN_STEPS steps. Request ids count up from first_id.
    """
    assert not engine.has_work, "a window begins on an idle engine"
    trace = Trace(clock())
    users = [load.requests(user) for user in range(load.concurrency)]
    active: dict[int, Answer] = {}
    waiting = set(range(load.concurrency))  # users who have not seen a token yet

    def ask(user: int, number: int) -> None:
        prompt, sampling = next(users[user])
        answer = Answer(user, number, clock())
        request_id = first_id + len(trace.answers)
        trace.answers.append(answer)
        active[request_id] = answer
        engine.add(Request(request_id, prompt, sampling, speculation))

    for user in range(load.concurrency):
        ask(user, 0)
    now, num_steps = trace.started, 0
    while num_steps < MIN_STEPS or now < max(trace.started + seconds, trace.opened + seconds / 2):
        deltas = engine.step()
        now = clock()
        trace.steps.append(_step(now, engine.last_times, deltas))
        for delta in deltas:
            answer = active[delta.request_id]
            if delta.token_ids:
                answer.token_ids += delta.token_ids
                answer.events.append((now, len(delta.token_ids)))
                waiting.discard(answer.user)
            if delta.finish_reason is not None:
                del active[delta.request_id]
                ask(answer.user, answer.number + 1)
        if not waiting and not trace.opened:
            trace.opened = now
        elif trace.opened:
            num_steps += any(delta.token_ids for delta in deltas)
    trace.closed = now
    clear(engine, active)
    return trace


def clear(engine: Engine, request_ids: Iterable[int]) -> None:
    """End all requests of an engine, so that it is idle."""
    for request_id in request_ids:
        engine.abort(request_id)
    while engine.has_work:
        engine.step()  # takes the farewells out


def _step(ended: float, times: StepTimes, deltas: Sequence[Delta]) -> Step:
    decoded = [len(delta.token_ids) for delta in deltas if delta.is_decode and delta.token_ids]
    return Step(ended, times, len(decoded), sum(decoded))


# --- arithmetic -----------------------------------------------------------------------------------------


def figures(trace: Trace) -> dict[str, Any]:
    """A window's own figures, rates in tokens/s, times in ms; None where there is no data."""
    seconds = trace.closed - trace.opened
    steps = [step for step in trace.steps if trace.contains(step.ended)]
    tokens = sum(
        count for answer in trace.answers for moment, count in answer.events if trace.contains(moment)
    )
    phases = {
        name: sum(getattr(step.times, f"{name}_s") for step in steps) for name in ("draft", "verify", "other")
    }
    decoded = sum(step.num_tokens for step in steps)
    found = {
        "seconds": seconds,
        "seconds_before": trace.opened - trace.started,
        "tokens": tokens,
        "tok_s": ratio(tokens, seconds),
        "steps": len(steps),
        "decoded_tokens": decoded,
        "decoded_seqs": sum(step.num_seqs for step in steps),
        **{f"{name}_share": ratio(spent, seconds) for name, spent in phases.items()},
        "ttft_ms": [round(1e3 * wait, 3) for wait in first_token_waits(trace)],
        "tpot_ms": [round(1e3 * gap, 3) for gap in token_gaps(trace)],
    }
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}


def first_token_waits(trace: Trace) -> list[float]:
    """TTFT in seconds of the answers that were asked for and begun inside the window."""
    begun = [answer for answer in trace.answers if answer.events and answer.sent >= trace.opened]
    return [answer.events[0][0] - answer.sent for answer in begun if trace.contains(answer.events[0][0])]


def token_gaps(trace: Trace) -> list[float]:
    """TPOT in seconds of each answer: of the part of it that lies in the window, from event to event."""
    gaps = []
    for answer in trace.answers:
        inside = [event for event in answer.events if trace.contains(event[0])]
        num_tokens = sum(count for _, count in inside[1:])
        if num_tokens >= MIN_TOKENS:
            gaps.append((inside[-1][0] - inside[0][0]) / num_tokens)
    return gaps


def equal_answers(trace: Trace, other: Trace) -> tuple[int, int]:
    """(answers that agree, answers compared): those that both began, token by token as far as both got."""
    theirs: Mapping[tuple[int, int], list[int]] = {
        (answer.user, answer.number): answer.token_ids for answer in other.answers
    }
    equal = compared = 0
    for answer in trace.answers:
        tokens = theirs.get((answer.user, answer.number), [])
        length = min(len(tokens), len(answer.token_ids))
        compared += length > 0
        equal += length > 0 and tokens[:length] == answer.token_ids[:length]
    return equal, compared
