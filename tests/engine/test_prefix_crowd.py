"""A crowd of requests on a small prefix cache: nobody writes what others read, and no page is lost.

Deliberate mistakes that this is seen to catch are at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engine.prefix
from draft.head import FeatureDraft
from engine.core import Request, SamplingParams, Speculation
from engine.pages import PagePool
from engine.prefix import PrefixCache, extend_keys
from tests.engine.prefixes import MODEL, OTHER, PAGE, TEXT, alone, sampled, share, unwritten
from tests.engine.rig import PLAIN, TREE, assert_idle, make_engine, record
from tests.engine.state import TOLERANCE, state_error
from tests.engine.test_scheduler import check_pages

add_op = st.tuples(
    st.just("add"), st.integers(1, 40), st.integers(0, 10), st.integers(1, 14), st.integers(0, 11)
)
step_op = st.tuples(st.just("step"), st.integers(1, 8), st.just(0), st.just(0), st.just(0))
abort_op = st.tuples(st.just("abort"), st.integers(0, 8), st.just(0), st.just(0), st.just(0))
SPECS = [None, PLAIN, Speculation(4, 3, 1)]


def crowd(
    draft: str,
    page_size: int,
    num_rows: int,
    budget: int,
    ops: list[tuple[str, int, int, int, int]],
    shares: bool = True,
) -> None:
    """Requests whose prompts begin with the same text, on a cache that is too small for all.

    Whatever is cut short, every stream is the one that the request gets alone, and no page is lost or written
    by strangers.
    """
    engine = make_engine(
        MODEL,
        draft,
        num_pages=1 + max(2, num_rows // page_size),
        page_size=page_size,
        max_num_batched_tokens=budget,
        max_num_seqs=4,
        max_model_len=num_rows // page_size * page_size,
    )
    if shares:
        share(engine)
    requests: dict[int, Request] = {}
    emitted: dict[int, list[int]] = {}

    def step() -> None:
        with unwritten(engine):
            for delta in engine.step():
                emitted[delta.request_id] += delta.token_ids
        check_pages(engine)

    for op, number, tail, max_tokens, kind in ops:
        if op == "add":
            prompt = TEXT[:number] + OTHER[number : number + tail]
            if len(prompt) + max_tokens > engine.config.max_model_len:
                continue
            params = SamplingParams(temperature=0.8 * (kind % 2), seed=kind, max_tokens=max_tokens)
            salt = "salt" if kind == 11 else ""
            request = Request(len(requests), tuple(prompt), params, SPECS[kind % 3], cache_salt=salt)
            engine.add(request)
            requests[request.id], emitted[request.id] = request, []
        elif op == "abort":
            engine.abort(number)
            check_pages(engine)
        else:
            for _ in range(number):
                step()
    for _ in range(2000):
        if not engine.has_work:
            break
        step()
    assert_idle(engine)
    for request_id, request in requests.items():
        expected, got = alone(request.prompt, request.sampling), tuple(emitted[request_id])
        was_aborted = ("abort", request_id, 0, 0, 0) in ops
        assert got == (expected[: len(got)] if was_aborted else expected)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    st.sampled_from(["eagle3", "eagle", "ngram", "none"]),
    st.integers(1, 5),
    st.integers(40, 110),
    st.integers(2, 20),
    st.lists(st.one_of(add_op, add_op, step_op, abort_op), min_size=4, max_size=12),
    st.booleans(),
)
def test_a_crowd_with_one_prefix(
    draft: str,
    page_size: int,
    num_rows: int,
    budget: int,
    ops: list[tuple[str, int, int, int, int]],
    shares: bool,
) -> None:
    crowd(draft, page_size, num_rows, budget, ops, shares)


# --- deliberate mistakes

Mutate = Callable[[pytest.MonkeyPatch], None]


def hash_without_parent(patch: pytest.MonkeyPatch) -> None:
    def wrong(keys: list[bytes], tokens: Sequence[int], page_size: int, salt: str) -> None:
        for start in range(len(keys) * page_size, len(tokens) - page_size + 1, page_size):
            single: list[bytes] = []
            extend_keys(single, tokens[start : start + page_size], page_size, salt)
            keys += single

    patch.setattr(engine.prefix, "extend_keys", wrong)


def head_rows_not_checked(patch: pytest.MonkeyPatch) -> None:
    find = PagePool.find
    patch.setattr(PagePool, "find", lambda self, key, _: find(self, key, False))


def copy_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefixCache, "_copy", lambda *_: None)


def shared_page_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PagePool, "own_last", lambda *_: [])


def published_too_early(patch: pytest.MonkeyPatch) -> None:
    """The head's rows are taken for granted."""
    patch.setattr(FeatureDraft, "num_rows", lambda self, seq: seq.kv_len)


def reference_leaked(patch: pytest.MonkeyPatch) -> None:
    hold = PagePool.hold

    def wrong(self: PagePool, page: int) -> None:
        hold(self, page)
        self._num_holders[page] += self._num_holders[page] > 1

    patch.setattr(PagePool, "hold", wrong)


def scenario(draft: str) -> None:
    """Requests with a common prefix, plain and speculating, one behind the other and at once."""
    adds = [("add", 20, 0, 10, 1), ("step", 8, 0, 0, 0), ("add", 20, 5, 10, 0), ("add", 16, 9, 10, 2)]
    again = [("step", 6, 0, 0, 0), ("add", 20, 8, 10, 0), ("add", 20, 8, 10, 4), ("step", 8, 0, 0, 0)]
    crowd(draft, PAGE, 120, 16, adds + again)
    engine = make_engine(MODEL, draft, page_size=PAGE)
    for prompt in (TEXT[:20], OTHER[:8] + TEXT[8:20], TEXT[:27]):
        for speculation in (PLAIN, TREE, TREE):
            recording = record(engine, [prompt], [sampled(12)], [speculation])
            assert recording.completions[0].token_ids == alone(prompt, sampled(12))
            assert state_error(MODEL, recording, draft) < TOLERANCE


@pytest.mark.parametrize("draft", ["none", "eagle"])
def test_the_scenario_without_a_mistake(draft: str) -> None:
    scenario(draft)


@pytest.mark.parametrize(
    ("mutate", "draft"),
    [
        (hash_without_parent, "none"),
        (head_rows_not_checked, "eagle"),
        (copy_left_out, "none"),
        (shared_page_written, "none"),
        (published_too_early, "eagle"),
        (reference_leaked, "none"),
    ],
)
def test_mistakes_are_seen(mutate: Mutate, draft: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        with pytest.raises(AssertionError):
            scenario(draft)
