"""Everything at once: priorities, shared prefixes, salts, short pages, cut trees, aborts.

Every stream is the one that its request gets alone, what the pools hold is what a computation from scratch
gives, no page is lost or written by strangers, and nobody waits for ever: whoever is first gets on in every
step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.core import Request, SamplingParams, Speculation
from engine.errors import RequestError
from engine.step import Engine
from tests.engine.prefixes import unwritten
from tests.engine.rig import (
    CHAIN,
    PLAIN,
    TREE,
    Model,
    Recording,
    assert_idle,
    echo_model,
    make_engine,
    prompts_of,
    snapshots,
)
from tests.engine.state import TOLERANCE, state_error
from tests.engine.test_scheduler import check_pages

MODEL: Model = echo_model(11)
TEXT, OTHER = prompts_of([60, 60], seed=5)
EOS = (5, 40)
_CHECKED_EVERY = 7  # steps, from scratch


@dataclass(frozen=True)
class Add:
    """A request whose prompt begins with ``shared`` tokens that others have too."""

    shared: int
    own: int
    sampling: SamplingParams
    speculation: Speculation | None
    priority: int
    salt: str

    @property
    def prompt(self) -> tuple[int, ...]:
        return tuple(TEXT[: self.shared] + OTHER[self.shared : self.shared + self.own])


@dataclass(frozen=True)
class Abort:
    number: int


@dataclass(frozen=True)
class Steps:
    count: int


Op = Add | Abort | Steps

ADDS = st.builds(
    Add,
    shared=st.sampled_from([0, 8, 12, 20]),
    own=st.integers(1, 12),
    sampling=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.8]),
        seed=st.integers(0, 1),
        max_tokens=st.sampled_from([1, 5, 12, 20]),
    ),
    speculation=st.sampled_from([None, PLAIN, CHAIN, TREE, Speculation(3, 2, 1, lookup=5)]),
    priority=st.integers(-1, 1),
    salt=st.sampled_from(["", "", "", "salt"]),
)
OPS: st.SearchStrategy[Op] = st.one_of(
    ADDS, ADDS, ADDS, st.builds(Steps, st.integers(1, 4)), st.builds(Abort, st.integers(0, 8))
)
ALONE: dict[tuple[tuple[int, ...], SamplingParams], tuple[int, ...]] = {}


def alone(request: Request) -> tuple[int, ...]:
    """What a request gets on an engine of its own, without cache and speculation."""
    key = request.prompt, request.sampling
    if key not in ALONE:
        engine = make_engine(MODEL, eos=EOS, prefix_caching=False)
        ALONE[key] = engine.generate([request.prompt], request.sampling)[0].token_ids
    return ALONE[key]


class Crowd:
    """An engine, what its requests have got so far, and what must hold after every step."""

    def __init__(self, draft: str, engine: Engine) -> None:
        self.draft, self.engine = draft, engine
        self.requests: dict[int, Request] = {}
        self.emitted: dict[int, tuple[int, ...]] = {}
        self.reasons: dict[int, str] = {}
        self.num_steps = 0

    def carry_out(self, op: Op) -> None:
        if isinstance(op, Add):
            request = Request(
                len(self.requests), op.prompt, op.sampling, op.speculation, op.priority, op.salt
            )
            try:
                self.engine.add(request)
            except RequestError:
                return  # could never run in so small a cache
            self.requests[request.id], self.emitted[request.id] = request, ()
        elif isinstance(op, Abort):
            self.engine.abort(op.number)
            check_pages(self.engine)
        else:
            for _ in range(op.count):
                self.step()

    def step(self) -> None:
        scheduler = self.engine.scheduler
        unfinished = [*scheduler.running, *scheduler.waiting]
        first = min(unfinished, key=lambda seq: seq.order).request.id if unfinished else None
        if self.engine._next is not None:
            first = None  # a step is under way already, and may be without it
        with unwritten(self.engine):
            deltas = self.engine.step()
        check_pages(self.engine)
        assert first is None or first in {delta.request_id for delta in deltas}, "the first does not get on"
        for delta in deltas:
            assert delta.request_id not in self.reasons, "a delta after the last"
            self.emitted[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                self.reasons[delta.request_id] = delta.finish_reason
        self.num_steps += 1
        if self.num_steps % _CHECKED_EVERY == 0:
            held = Recording([], snapshots(self.engine))
            assert state_error(MODEL, held, self.draft) < TOLERANCE

    def finish(self) -> None:
        for _ in range(2000):
            if not self.engine.has_work:
                break
            self.step()
        assert_idle(self.engine)
        assert set(self.reasons) == set(self.requests)
        for request_id, request in self.requests.items():
            expected, got = alone(request), self.emitted[request_id]
            if self.reasons[request_id] == "abort":
                assert got == expected[: len(got)]
            else:
                assert got == expected


def run(draft: str, page_size: int, num_rows: int, budget: int, max_seqs: int, ops: Sequence[Op]) -> Crowd:
    engine = make_engine(
        MODEL,
        draft,
        num_pages=1 + max(2, num_rows // page_size),
        page_size=page_size,
        eos=EOS,
        max_num_batched_tokens=budget,
        max_num_seqs=max_seqs,
        max_model_len=100,
    )
    crowd = Crowd(draft, engine)
    for op in ops:
        crowd.carry_out(op)
    crowd.finish()
    return crowd


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    st.sampled_from(["eagle3", "eagle", "ngram", "none"]),
    st.integers(1, 5),
    st.integers(44, 80),
    st.integers(2, 24),
    st.integers(1, 5),
    st.lists(OPS, min_size=8, max_size=16),
)
def test_whatever_happens(
    draft: str, page_size: int, num_rows: int, budget: int, max_seqs: int, ops: list[Op]
) -> None:
    run(draft, page_size, num_rows, budget, max_seqs, ops)
