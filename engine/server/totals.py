"""What the server has done since its start: counters and histograms, written on the event loop only.

``exposition`` turns them into Prometheus' text, ``lifecycle.report`` into lines of the log.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from engine.core import Delta
from engine.server.metrics import RequestStats

# Upper bounds in seconds.
_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_WAITS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0)
_ANSWERS = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0)


class Histogram:
    """Counts of values up to each of some bounds, the last of which is infinity."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Add a value that was seen ``count`` times. What equals a bound counts as below it."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count


@dataclass(slots=True)
class Totals:
    """Everything that is counted."""

    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted: int = 0
    accepted_at_depth: list[int] = field(default_factory=list)  # steps that accepted a node at depth i + 1
    num_unknown_fields: int = 0  # of request bodies
    num_failed_steps: int = 0  # that raised
    finished: Counter[str] = field(default_factory=Counter)  # requests by reason
    refused: Counter[str] = field(default_factory=Counter)  # HTTP requests by the code of their error
    first_token: Histogram = field(default_factory=lambda: Histogram(_WAITS))  # seconds since arrival
    queued: Histogram = field(default_factory=lambda: Histogram(_WAITS))  # arrival to its first step
    between_tokens: Histogram = field(default_factory=lambda: Histogram(_STEPS))  # a mean within each answer
    answered: Histogram = field(default_factory=lambda: Histogram(_ANSWERS))  # arrival to its last token

    def add_step(self, delta: Delta) -> None:
        """Count what a step did for one request."""
        self.num_generated_tokens += len(delta.token_ids)
        self.num_draft_tokens += delta.num_draft_tokens
        self.num_spec_steps += delta.num_draft_tokens > 0
        self.num_accepted += delta.num_accepted
        self.accepted_at_depth.extend([0] * (delta.num_accepted - len(self.accepted_at_depth)))
        for depth in range(delta.num_accepted):
            self.accepted_at_depth[depth] += 1

    def add_request(self, stats: RequestStats, reason: str) -> None:
        """Count a request that is over; reason: "stop", "length", "abort" or "error"."""
        self.finished[reason] += 1
        if stats.scheduled is not None:
            self.queued.observe(stats.scheduled - stats.arrival)
        if stats.first_token is not None and stats.last_token is not None:
            self.first_token.observe(stats.first_token - stats.arrival)
            self.answered.observe(stats.last_token - stats.arrival)
            num_gaps = stats.num_tokens - 1
            if num_gaps:
                self.between_tokens.observe((stats.last_token - stats.first_token) / num_gaps, num_gaps)
