"""Pages and turns: whatever happens around a request, its stream is the one it would have had alone."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.core import Delta, Request, SamplingParams, Sequence, Speculation
from engine.errors import ContextLengthError, RequestError
from engine.pages import PagePool
from engine.step import Engine
from tests.engine.rig import PLAIN, TREE, Model, assert_idle, echo_model, make_engine, prompts_of

MODEL: Model = echo_model(11)
SPECS = [None, PLAIN, Speculation(4, 3, 1), Speculation(9, 3, 4), Speculation(3, 2, 1, lookup=5)]
EOS = (5, 40)
ALONE: dict[tuple[int, SamplingParams], tuple[int, ...]] = {}


def alone(prompt_len: int, params: SamplingParams) -> tuple[int, ...]:
    key = (prompt_len, params)
    if key not in ALONE:
        ALONE[key] = make_engine(MODEL, eos=EOS).generate(prompts_of([prompt_len]), params)[0].token_ids
    return ALONE[key]


def check_pages(engine: Engine) -> None:
    """Every page is free, cached or held, every holder has enough, and none is the dummy; what several hold
    or others may find, nobody will write."""
    pages = engine.scheduler.pages
    held = Counter(page for seq in engine.scheduler.running for page in seq.pages)
    assert 0 not in held
    assert all(pages._num_holders[page] == held[page] for page in range(pages.num_pages))
    assert pages.num_free + pages.num_cached + len(held) == pages.num_usable
    assert not any(pages._is_free[page] for page in (*held, *pages._entries))
    for seq in engine.scheduler.running:
        writable = seq.pages[seq.kv_len // pages.page_size :]
        assert not any(page in pages._entries or held[page] > 1 for page in writable)
    assert not any(seq.pages for seq in engine.scheduler.waiting)
    for seq in engine.scheduler.running:
        assert len(seq.pages) * pages.page_size >= seq.kv_len
        assert engine.scheduler.pages.pages_for(seq.kv_len + 1) >= len(seq.pages)


add_op = st.tuples(
    st.just("add"), st.integers(1, 30), st.integers(1, 16), st.sampled_from([0.0, 1.0]), st.integers(0, 3)
)
abort_op = st.tuples(st.just("abort"), st.integers(0, 8), st.just(0), st.just(0.0), st.just(0))
step_op = st.tuples(st.just("step"), st.integers(1, 6), st.just(0), st.just(0.0), st.just(0))


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    st.sampled_from(["eagle3", "eagle", "ngram", "none"]),
    st.integers(1, 5),
    st.integers(30, 90),
    st.integers(2, 20),
    st.integers(1, 5),
    st.lists(st.one_of(add_op, add_op, step_op, abort_op), min_size=3, max_size=12),
)
def test_streams_survive_a_crowd(
    draft: str,
    page_size: int,
    num_rows: int,
    max_tokens_per_step: int,
    max_seqs: int,
    ops: list[tuple[str, int, int, float, int]],
) -> None:
    """Adds, aborts and steps at random on a cache that is too small for all: preemption is the rule here."""
    engine = make_engine(
        MODEL,
        draft,
        num_pages=1 + max(2, num_rows // page_size),
        page_size=page_size,
        eos=EOS,
        max_num_batched_tokens=max_tokens_per_step,
        max_num_seqs=max_seqs,
        max_model_len=100,
    )
    requests: dict[int, Request] = {}
    emitted: dict[int, list[int]] = {}
    reasons: dict[int, str] = {}
    aborted: set[int] = set()

    def take(deltas: list[Delta]) -> None:
        for delta in deltas:
            assert delta.request_id not in reasons, "a delta after the last"
            emitted[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                reasons[delta.request_id] = delta.finish_reason
        check_pages(engine)

    for op, first, max_tokens, temperature, spec in ops:
        if op == "add":
            params = SamplingParams(temperature=temperature, seed=first, max_tokens=max_tokens)
            request = Request(len(requests), tuple(prompts_of([first])[0]), params, SPECS[spec])
            try:
                engine.add(request)
            except RequestError:
                continue  # could never run in so small a cache
            requests[request.id], emitted[request.id] = request, []
        elif op == "abort":
            if first in requests and first not in reasons:
                aborted.add(first)
            engine.abort(first)
            check_pages(engine)
        else:
            for _ in range(first):
                take(engine.step())
    for _ in range(2000):
        if not engine.has_work:
            break
        take(engine.step())
    assert_idle(engine)
    assert set(reasons) == set(requests)
    for request_id, request in requests.items():
        expected = alone(len(request.prompt), request.sampling)
        got = tuple(emitted[request_id])
        if request_id in aborted:
            assert reasons[request_id] == "abort"
            assert got == expected[: len(got)]
        else:
            assert got == expected
            assert reasons[request_id] == ("stop" if expected[-1] in EOS else "length")


@pytest.mark.parametrize("draft", ["none", "ngram", "eagle3", "eagle"])
def test_preemption_really_happens_and_changes_nothing(draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(MODEL, draft, num_pages=14, page_size=4, eos=EOS, speculation=Speculation(5, 3, 2))
    preempted: list[int] = []
    preempt = engine.scheduler._preempt

    def watched(seq: Sequence) -> None:
        preempted.append(seq.request.id)
        preempt(seq)

    monkeypatch.setattr(engine.scheduler, "_preempt", watched)
    lengths = [7, 3, 12, 5]
    params = [SamplingParams(temperature=0.8, seed=n, max_tokens=16, ignore_eos=True) for n in lengths]
    got = engine.generate([prompts_of([n])[0] for n in lengths], params)
    assert [c.token_ids for c in got] == [alone(n, p) for n, p in zip(lengths, params, strict=True)]
    assert preempted
    assert 0 not in preempted  # the oldest always gets on
    assert_idle(engine)


def test_prompts_and_answers_share_every_step() -> None:
    """A long prompt in small chunks does not stop a running answer, nor the other way round."""
    engine = make_engine(MODEL, max_num_batched_tokens=4)
    engine.add(Request(0, (1, 2), SamplingParams(temperature=0, max_tokens=30)))
    engine.step()
    engine.add(Request(1, tuple(prompts_of([40])[0]), SamplingParams(temperature=0, max_tokens=3)))
    steps = [[(delta.request_id, len(delta.token_ids)) for delta in engine.step()] for _ in range(15)]
    assert steps[:14] == [[(0, 1), (1, 0)]] * 13 + [[(0, 1), (1, 1)]]  # 13 chunks of 3, then the last token
    assert steps[14] == [(0, 1), (1, 1)]


def test_a_request_that_can_never_run_is_refused() -> None:
    engine = make_engine(MODEL, num_pages=6, page_size=4, max_model_len=50, speculation=TREE)
    with pytest.raises(RequestError, match="prompt is empty"):
        engine.add(Request(0, (), SamplingParams()))
    with pytest.raises(ContextLengthError, match="50 tokens, but at most 49 fit"):
        engine.add(Request(0, (1,) * 50, SamplingParams()))
    with pytest.raises(RequestError, match="max_tokens is 0, expected at least 1") as caught:
        engine.add(Request(0, (1,), SamplingParams(max_tokens=0)))
    assert caught.value.param == "max_tokens"
    with pytest.raises(RequestError, match="needs up to 21 KV rows, but the cache holds 20"):
        engine.add(Request(0, (1,) * 11, SamplingParams(max_tokens=10), PLAIN))
    engine.add(Request(0, (1,) * 11, SamplingParams(max_tokens=9), PLAIN))
    assert not engine.scheduler.running
    assert engine.num_waiting == 1


def test_aborts_in_every_state() -> None:
    engine = make_engine(MODEL, "eagle3", max_num_batched_tokens=4, max_num_seqs=2)
    for i, n in enumerate((2, 20, 5)):
        engine.add(Request(i, tuple(prompts_of([n])[0]), SamplingParams(temperature=0, max_tokens=20)))
    for _ in range(4):
        engine.step()
    assert engine.num_running == 2
    assert engine.kv_usage() > 0
    for request in (2, 1, 0, 0, 77):  # waiting, in its prompt, answering; twice; unknown
        engine.abort(request)
    assert engine.has_work
    assert engine.step() == [Delta(2, (), "abort"), Delta(1, (), "abort"), Delta(0, (), "abort")]
    assert engine.step() == []
    assert_idle(engine)
    assert engine.kv_usage() == 0


@given(
    st.integers(1, 6),
    st.integers(2, 30),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=30),
)
@settings(max_examples=50, deadline=None)
def test_page_pool(page_size: int, num_pages: int, ops: list[tuple[int, int]]) -> None:
    """Four owners grow and shrink: all or nothing, no page twice, on into the next page if it is free."""
    pool = PagePool(num_pages, page_size)
    owners: list[list[int]] = [[], [], [], []]
    for owner, rows in ops:
        mine, before = owners[owner], pool.num_free
        free = set(range(1, num_pages)) - {page for pages in owners for page in pages}
        need = -(-rows // page_size) - len(mine)
        if need > 0:
            old = list(mine)
            assert pool.extend(mine, rows) == (need <= before)
            new = mine[len(old) :]
            assert mine[: len(old)] == old
            assert len(new) == len(set(new)) == (need if need <= before else 0)
            assert free.issuperset(new)
            for last, page in zip(mine[max(len(old) - 1, 0) :], new if old else new[1:], strict=False):
                assert page == last + 1 or last + 1 not in free or last + 1 in new
        else:
            pool.shrink(mine, rows)
            assert len(mine) == pool.pages_for(rows)
        owned = [page for pages in owners for page in pages]
        assert len(set(owned)) == len(owned)
        assert pool.num_free + len(owned) == pool.num_usable == num_pages - 1


@pytest.mark.parametrize(
    ("spec", "num_tokens", "expected"),
    [
        (Speculation(8, 4, 2), 4, Speculation(8, 4, 2)),
        (Speculation(8, 4, 2), 3, Speculation(8, 3, 2)),
        (Speculation(8, 4, 2, lookup=9), 9, Speculation(8, 4, 2, lookup=9)),
        (Speculation(8, 4, 2, lookup=9), 6, Speculation(8, 4, 2, lookup=6)),
        (Speculation(8, 4, 2, lookup=9), 1, Speculation(8, 1, 2, lookup=1)),
        (Speculation(8, 4, 2, lookup=9), 0, PLAIN),
        (PLAIN, 5, PLAIN),
    ],
)
def test_no_more_is_drafted_than_may_be_emitted(
    spec: Speculation, num_tokens: int, expected: Speculation
) -> None:
    assert spec.limited(num_tokens) == expected
    assert spec.limited(num_tokens).most_accepted <= num_tokens
