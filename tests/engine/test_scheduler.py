"""Pages and turns: whatever happens around a request, its stream is the one it would have had alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.budget import chunk_sizes
from engine.core import Batch, Delta, DraftTree, Request, SamplingParams, Scores, Sequence, Speculation
from engine.errors import ContextLengthError, RequestError
from engine.pages import PagePool
from engine.step import Engine
from tests.engine import mistral_rig
from tests.engine.rig import PLAIN, TREE, Model, assert_idle, echo_model, make_engine, prompts_of, record
from tests.engine.state import TOLERANCE, state_error

MODEL: Model = echo_model(11)
PAIR = mistral_rig.echo_pair(11)
SPECS = [None, PLAIN, Speculation(4, 3, 1), Speculation(9, 3, 4), Speculation(3, 2, 1, lookup=5)]
EOS = (5, 40)
ALONE: dict[tuple[str, int, SamplingParams], tuple[int, ...]] = {}


def engine_of(family: str, draft: str, **kwargs: Any) -> Engine:
    """An engine around a tiny llama or a tiny Mistral Small 4."""
    if family == "llama":
        return make_engine(MODEL, draft, eos=EOS, **kwargs)
    return mistral_rig.make_engine(PAIR, draft, eos=EOS, **kwargs)


def alone(prompt_len: int, params: SamplingParams, family: str = "llama") -> tuple[int, ...]:
    key = (family, prompt_len, params)
    if key not in ALONE:
        engine = engine_of(family, "none", speculation=PLAIN)
        ALONE[key] = engine.generate(prompts_of([prompt_len]), params)[0].token_ids
    return ALONE[key]


def check_pages(engine: Engine) -> None:
    """Every page is free, cached or held, every holder has enough, but no more than for the step that is
    launched ahead if there is one, and none is the dummy; what several hold or others may find, nobody will
    write."""
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
    for queue in (engine.scheduler.running, list(engine.scheduler.waiting)):
        assert [seq.order for seq in queue] == sorted(seq.order for seq in queue)
    for seq in engine.scheduler.running:
        assert len(seq.pages) * pages.page_size >= seq.kv_len
        most_rows = seq.kv_len + 1 + (0 if engine._next is None else 2 * engine.draft.scratch_rows(TREE) + 1)
        assert engine.scheduler.pages.pages_for(most_rows) >= len(seq.pages)


# (what, prompt length or request or number of steps, max_tokens, temperature, speculation, priority)
add_op = st.tuples(
    st.just("add"),
    st.integers(1, 30),
    st.integers(1, 16),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 4),
    st.integers(-1, 1),
)
other = (st.just(0), st.just(0.0), st.just(0), st.just(0))
abort_op = st.tuples(st.just("abort"), st.integers(0, 8), *other)
step_op = st.tuples(st.just("step"), st.integers(1, 6), *other)
FAMILIES = [("llama", draft) for draft in ("eagle3", "eagle", "ngram", "none")]
FAMILIES += [("mistral4", draft) for draft in ("eagle", "none")]


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    st.sampled_from(FAMILIES),
    st.integers(1, 5),
    st.integers(30, 90),
    st.integers(2, 40),
    st.integers(1, 5),
    st.lists(st.one_of(add_op, add_op, step_op, abort_op), min_size=3, max_size=12),
)
def test_streams_survive_a_crowd(
    kind: tuple[str, str],
    page_size: int,
    num_rows: int,
    budget: int,
    max_seqs: int,
    ops: list[tuple[str, int, int, float, int, int]],
) -> None:
    """Adds, aborts and steps at random on a cache that is too small for all: preemption is the rule here, and
    no step has more nodes than it may."""
    family, draft = kind
    engine = engine_of(
        family,
        draft,
        num_pages=1 + max(2, num_rows // page_size),
        page_size=page_size,
        max_num_batched_tokens=budget,
        max_num_seqs=max_seqs,
    )
    nodes: list[int] = []
    score = engine.target.score

    def watched(batches: Items[Batch], trees: Items[DraftTree]) -> tuple[Scores, ...]:
        nodes.append(sum(int(tree.real().sum()) for tree in trees))
        return score(batches, trees)

    engine.target.score = watched  # type: ignore[method-assign]
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

    for op, first, max_tokens, temperature, spec, priority in ops:
        if op == "add":
            params = SamplingParams(temperature=temperature, seed=first, max_tokens=max_tokens)
            request = Request(len(requests), tuple(prompts_of([first])[0]), params, SPECS[spec], priority)
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
    assert max(nodes, default=0) <= budget
    assert set(reasons) == set(requests)
    for request_id, request in requests.items():
        expected = alone(len(request.prompt), request.sampling, family)
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


def greedy(number: int, prompt_len: int, max_tokens: int, priority: int = 0) -> Request:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return Request(number, tuple(prompts_of([prompt_len])[0]), params, PLAIN, priority)


def finishing_order(engine: Engine) -> list[int]:
    order = []
    while engine.has_work:
        order += [delta.request_id for delta in engine.step() if delta.finish_reason is not None]
    return order


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    engine = make_engine(MODEL, max_num_batched_tokens=8, prefix_caching=False)
    engine.add(greedy(0, 90, 2))
    for _ in range(2):
        assert [delta.request_id for delta in engine.step()] == [0]
    engine.add(greedy(1, 4, 1))
    engine.add(greedy(2, 5, 1))
    deltas = engine.step()
    assert [(delta.request_id, len(delta.token_ids)) for delta in deltas] == [(0, 0), (1, 1)]
    assert len(engine.scheduler.running[0].tokens) == 1 + 8 + 8 + 4  # the long one kept the rest
    assert finishing_order(engine) == [0, 2]  # 5 tokens are more than half of the budget


@pytest.mark.parametrize("budget", [2, 8])
def test_trees_leave_prompts_their_share(budget: int) -> None:
    """Trees want more nodes than there are: in every step the prompt gets a quarter, and at least one."""
    engine = make_engine(
        MODEL,
        "eagle3",
        max_num_batched_tokens=budget,
        speculation=Speculation(30, 4, 3),
        prefix_caching=False,
    )
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    engine.add(Request(0, tuple(prompts_of([2])[0]), params))
    engine.step()
    engine.add(greedy(1, 30, 1))
    drafted = 0
    for step in range(10):
        first, second = engine.step()
        drafted += first.num_draft_tokens
        assert (first.request_id, second.request_id) == (0, 1)
        assert len(engine.scheduler.running[1].tokens) == 1 + (step + 1) * max(budget // 4, 1)
    assert bool(drafted) == (budget == 8)


def test_the_lower_priority_number_runs_first() -> None:
    """Admission, chunks, decodes: with one place, and with all of them."""
    for places in (1, 8):
        engine = make_engine(MODEL, max_num_seqs=places, max_num_batched_tokens=6, prefix_caching=False)
        for number, priority in enumerate((2, 0, 1, 0, -1)):
            engine.add(greedy(number, 12, 1, priority))
        assert finishing_order(engine) == [4, 1, 3, 2, 0]


@pytest.mark.parametrize("short_of", ["places", "pages"])
def test_an_urgent_request_takes_the_place_of_the_last(short_of: str) -> None:
    """The last in order makes room, starts over, and emits what it would have emitted."""
    limits: dict[str, Any] = {"max_num_seqs": 2} if short_of == "places" else {"num_pages": 1 + 11}
    engine = make_engine(MODEL, max_num_batched_tokens=32, prefix_caching=False, **limits)
    got: dict[int, list[int]] = {0: [], 1: [], 2: []}

    def step() -> None:
        for delta in engine.step():
            got[delta.request_id] += delta.token_ids

    engine.add(greedy(0, 12, 10))
    engine.add(greedy(1, 10, 12))
    for _ in range(4):
        step()
    engine.add(greedy(2, 15, 8, priority=-1))
    step()
    assert [seq.request.id for seq in engine.scheduler.running] == [2, 0]
    assert [seq.request.id for seq in engine.scheduler.waiting] == [1]
    while engine.has_work:
        step()
    for number, prompt_len, max_tokens in ((0, 12, 10), (1, 10, 12), (2, 15, 8)):
        params = greedy(number, prompt_len, max_tokens).sampling
        assert tuple(got[number]) == alone(prompt_len, params)
    assert_idle(engine)


def test_an_equal_priority_takes_nobodys_place() -> None:
    engine = make_engine(MODEL, max_num_seqs=1)
    engine.add(greedy(0, 3, 5))
    engine.step()
    engine.add(greedy(1, 3, 1))
    assert finishing_order(engine) == [0, 1]


def test_a_step_has_a_node_for_everyone_who_runs() -> None:
    """Fewer nodes than places: no more sequences run than all of them can decode at once."""
    engine = make_engine(MODEL, max_num_seqs=8, max_num_batched_tokens=3, speculation=TREE)
    for number in range(6):
        engine.add(greedy(number, 2, 6))
    while engine.has_work:
        decoding = [seq.request.id for seq in engine.scheduler.running if not seq.forced]
        deltas = engine.step()
        assert engine.num_running <= 3
        assert {delta.request_id for delta in deltas if delta.is_decode} == set(decoding)


@pytest.mark.parametrize("draft", ["eagle3", "eagle"])
def test_a_head_whose_first_trees_found_no_room_still_follows(draft: str) -> None:
    """A prompt of one token decodes at once; its first steps leave it no nodes, and later ones do."""
    engine = make_engine(MODEL, draft, max_num_batched_tokens=4, speculation=Speculation(4, 3, 1))
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompts = [prompts_of([n])[0] for n in (1, 1, 1)]
    params_of = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (4, 4, 24)]
    recording = record(engine, prompts, params_of)
    assert recording.completions[2].token_ids == alone(1, params)
    assert recording.completions[2].num_draft_tokens > 0
    assert state_error(MODEL, recording, draft) < TOLERANCE


@pytest.mark.parametrize(
    ("needs", "priorities", "budget", "expected"),
    [
        ([100, 900, 50, 300], [0] * 4, 512, [100, 362, 50, 0]),  # the docstring's
        ([900, 50], [0, 1], 512, [512, 0]),  # what is less urgent does not slow it down
        ([900, 50, 7], [0, 0, 1], 512, [462, 50, 0]),
        ([3, 4, 5], [0] * 3, 12, [3, 4, 5]),
        ([3, 4, 5], [0] * 3, 7, [3, 4, 0]),
        ([3, 2], [0] * 2, 1, [1, 0]),
        ([9, 3, 3], [0] * 3, 7, [4, 3, 0]),
        ([], [], 5, []),
    ],
)
def test_how_prompts_share_what_is_left(
    needs: list[int], priorities: list[int], budget: int, expected: list[int]
) -> None:
    assert chunk_sizes(needs, priorities, budget) == expected


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


@pytest.mark.parametrize(
    ("spec", "num_nodes", "expected"),
    [
        (Speculation(8, 4, 2), 8, Speculation(8, 4, 2)),
        (Speculation(8, 4, 2), 7, Speculation(7, 4, 2)),
        (Speculation(8, 4, 2), 3, Speculation(3, 2, 2)),
        (Speculation(8, 4, 2, lookup=5), 13, Speculation(8, 4, 2, lookup=5)),
        (Speculation(8, 4, 2, lookup=5), 10, Speculation(8, 4, 2, lookup=2)),
        (Speculation(8, 4, 2, lookup=5), 6, Speculation(6, 4, 2)),
        (Speculation(8, 4, 2, lookup=5), 1, Speculation(1, 4, 2)),
        (PLAIN, 1, PLAIN),
    ],
)
def test_a_tree_is_cut_to_the_nodes_that_are_left(
    spec: Speculation, num_nodes: int, expected: Speculation
) -> None:
    cut = spec.within(num_nodes)
    assert cut == expected
    assert cut.is_off == (num_nodes == 1)
    assert cut.may_resume == (spec != PLAIN)
