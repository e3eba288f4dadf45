"""What one request cost and what speculation saved it, as reported on the last chunk of its answer.

The names are vLLM's, so that tools which read ``metrics`` from a response work. All times come from one
monotonic clock (``time.perf_counter``), so stamps of the engine thread and of the event loop can be
subtracted. Speculation is counted over the steps that drafted something; a drafted tree counts all its nodes,
and the position of the histogram is the depth reached: entry i is the number of steps in which i draft tokens
were accepted. Where an answer ends inside a step, only what it took of the step counts, its last token as the
target's own, so that the tokens of speculative steps are always steps + accepted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from engine.core import Delta


@dataclass(frozen=True, slots=True)
class StampedDelta:
    """A delta with the start and the end of the step that made it, in seconds of ``time.perf_counter``."""

    delta: Delta
    started: float
    ended: float


class SpeculationMetrics(msgspec.Struct, kw_only=True):
    """Acceptance of one request. Means are null as long as nothing was drafted."""

    mean_acceptance_length: float | None  # 1 + accepted / steps: tokens emitted by a speculative step
    draft_acceptance_rate: float | None  # accepted / drafted nodes
    acceptance_histogram: list[int]  # num_spec_tokens + 1 entries
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int  # the most that one step can accept: tree depth or lookup
    reasons: dict[str, int]  # decode steps by why they drafted what they drafted
    expected_ms_saved: float  # against plain decoding, as it was reckoned before each step


class Metrics(msgspec.Struct, kw_only=True):
    """Times in milliseconds; null where they do not exist (no gap between tokens if there was only one)."""

    time_to_first_token_ms: float | None  # arrival -> first token
    generation_time_ms: float | None  # first token -> last token
    queue_time_ms: float | None  # arrival -> start of the first step that worked on the request
    mean_itl_ms: float | None  # generation time per token after the first (our TPOT)
    tokens_per_second: float | None  # tokens after the first / generation time
    speculative_decoding: SpeculationMetrics | None  # null if speculation is off for the request


@dataclass(slots=True)
class RequestStats:
    """Running account of one request.

    most_accepted: draft tokens that a step can accept, 0 if the request does not speculate.
    """

    arrival: float
    most_accepted: int
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    num_tokens: int = 0
    num_draft_tokens: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    saved_ms: float = 0.0
    num_cached: int = 0  # tokens of the prompt
    histogram: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.histogram = [0] * (self.most_accepted + 1)

    def record(self, stamped: StampedDelta, num_tokens: int) -> None:
        """Count one step, of which the answer took ``num_tokens`` tokens."""
        if self.scheduled is None:
            self.scheduled = stamped.started
        if num_tokens:
            self.first_token = stamped.ended if self.first_token is None else self.first_token
            self.last_token = stamped.ended
            self.num_tokens += num_tokens
        delta = stamped.delta
        self.num_cached = delta.num_cached
        if delta.decision is not None and num_tokens:
            self.reasons[delta.decision.reason] += 1
            self.saved_ms += delta.decision.saved_ms * num_tokens
        if delta.num_draft_tokens:
            accepted = min(delta.num_accepted, max(num_tokens - 1, 0))
            self.num_draft_tokens += delta.num_draft_tokens
            self.histogram.extend([0] * (accepted + 1 - len(self.histogram)))
            self.histogram[accepted] += 1

    @property
    def num_spec_steps(self) -> int:
        return sum(self.histogram)

    @property
    def num_accepted(self) -> int:
        return sum(accepted * steps for accepted, steps in enumerate(self.histogram))


def summarise(stats: Sequence[RequestStats]) -> Metrics:
    """The metrics of one request, or of several that were answered in one response (tokens added, times
    spanned)."""
    arrival = min(one.arrival for one in stats)
    scheduled = [one.scheduled for one in stats if one.scheduled is not None]
    first = [one.first_token for one in stats if one.first_token is not None]
    last = [one.last_token for one in stats if one.last_token is not None]
    started = [one for one in stats if one.num_tokens]
    num_gaps = sum(one.num_tokens - 1 for one in started)
    generation = max(last) - min(first) if first else None
    timed = generation is not None and generation > 0 and num_gaps > 0
    gap_time = sum(
        one.last_token - one.first_token
        for one in started
        if one.last_token is not None and one.first_token is not None
    )
    return Metrics(
        time_to_first_token_ms=_ms(min(first) - arrival) if first else None,
        generation_time_ms=_ms(generation) if generation is not None else None,
        queue_time_ms=_ms(min(scheduled) - arrival) if scheduled else None,
        mean_itl_ms=_ms(gap_time / num_gaps) if timed else None,
        tokens_per_second=round(num_gaps / generation, 3) if timed and generation else None,
        speculative_decoding=_speculation(stats),
    )


def _speculation(stats: Sequence[RequestStats]) -> SpeculationMetrics | None:
    if all(one.most_accepted == 0 for one in stats):
        return None
    histogram = [0] * max(len(one.histogram) for one in stats)
    for one in stats:
        for accepted, steps in enumerate(one.histogram):
            histogram[accepted] += steps
    steps = sum(one.num_spec_steps for one in stats)
    accepted_tokens = sum(one.num_accepted for one in stats)
    drafted = sum(one.num_draft_tokens for one in stats)
    return SpeculationMetrics(
        mean_acceptance_length=round(1 + accepted_tokens / steps, 4) if steps else None,
        draft_acceptance_rate=round(accepted_tokens / drafted, 4) if drafted else None,
        acceptance_histogram=histogram,
        num_spec_steps=steps,
        num_accepted_draft_tokens=accepted_tokens,
        num_draft_tokens=drafted,
        num_spec_tokens=len(histogram) - 1,
        reasons=dict(sum((one.reasons for one in stats), Counter[str]()).most_common()),
        expected_ms_saved=round(sum(one.saved_ms for one in stats), 3),
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
