"""The prefix cache: a hit changes no token and no row, and nobody writes what others read.

Deliberate mistakes that these tests are seen to catch are at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import engine.prefix
from draft.head import FeatureDraft
from draft.train.recorder import FeatureRecorder
from engine.core import Delta, Request, SamplingParams, Speculation
from engine.pages import PagePool
from engine.prefix import PrefixCache, extend_keys
from engine.step import Engine
from tests.engine.rig import (
    CHAIN,
    PLAIN,
    TREE,
    Model,
    assert_idle,
    echo_model,
    make_engine,
    pool_rows,
    prompts_of,
    record,
)
from tests.engine.state import TOLERANCE, state_error
from tests.engine.test_scheduler import check_pages

MODEL: Model = echo_model(11)
TEXT = prompts_of([60], seed=5)[0]
OTHER = prompts_of([60], seed=6)[0]
PAGE = 4
DRAFTS = ["none", "ngram", "eagle3", "eagle"]


def sampled(max_tokens: int = 10, temperature: float = 0.8, seed: int = 3) -> SamplingParams:
    return SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens)


ALONE: dict[tuple[tuple[int, ...], SamplingParams], tuple[int, ...]] = {}


def alone(prompt: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
    """What a request gets on an engine of its own, without cache and speculation."""
    key = (tuple(prompt), params)
    if key not in ALONE:
        ALONE[key] = make_engine(MODEL, prefix_caching=False).generate([prompt], params)[0].token_ids
    return ALONE[key]


def run(
    engine: Engine,
    prompt: Sequence[int],
    params: SamplingParams,
    speculation: Speculation | None = None,
    salt: str = "",
) -> tuple[tuple[int, ...], int]:
    """The answer to one request on an idle engine, and how many tokens of its prompt were cached."""
    engine.add(Request(0, tuple(prompt), params, speculation, cache_salt=salt))
    tokens: list[int] = []
    deltas: list[Delta] = []
    while engine.has_work:
        deltas += engine.step()
        check_pages(engine)
    for delta in deltas:
        tokens += delta.token_ids
    assert len({delta.num_cached for delta in deltas}) == 1
    return tuple(tokens), deltas[-1].num_cached


@contextmanager
def unwritten(engine: Engine) -> Iterator[None]:
    """Pages that can be found now keep every byte, in both pools, as long as they can be found."""
    pages = engine.scheduler.pages
    entries = dict(pages._entries)
    pools = [pool_rows(engine)]
    if isinstance(engine.draft, FeatureDraft):
        pools.append(engine.draft.model.pool.rows)

    def rows_of(pool: Tensor, page: int) -> Tensor:
        return pool[:, :, :, page * pages.page_size : (page + 1) * pages.page_size]

    kept = {page: [rows_of(pool, page).clone() for pool in pools] for page in entries}
    yield
    for page, entry in entries.items():
        if pages._entries.get(page) is not entry:
            continue  # given up, or taken over, since then
        head_rows_too = entry.has_draft_rows
        for pool, before in list(zip(pools, kept[page], strict=True))[: 1 + head_rows_too]:
            assert torch.equal(rows_of(pool, page), before), f"page {page} was written"


# --- hits


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
def test_a_hit_changes_no_token_and_no_row(draft: str, temperature: float, shape: Speculation) -> None:
    """Prompts that share 0 to 20 tokens with an earlier one, in pages of 4; the state oracle checks the rows
    that were found as well as those that were computed behind them."""
    engine = make_engine(MODEL, draft, speculation=shape, page_size=PAGE)
    params = sampled(temperature=temperature)
    earlier, hit = run(engine, TEXT[:21], params)
    assert (earlier, hit) == (alone(TEXT[:21], params), 0)
    for shared, end, expected in ((3, 9, 0), (4, 4, 3), (8, 13, 7), (11, 30, 7), (20, 20, 19), (20, 33, 19)):
        prompt = TEXT[:shared] + OTHER[shared:end]
        with unwritten(engine):
            engine.add(Request(1, tuple(prompt), params))
            engine.step()
            assert engine.scheduler.running[0].num_cached == expected
            engine.abort(1)
            engine.step()
            recording = record(engine, [prompt], [params])
        assert recording.completions[0].token_ids == alone(prompt, params)
        assert state_error(MODEL, recording, draft) < TOLERANCE
        assert_idle(engine)


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_conversation_goes_on_behind_its_own_answer(draft: str) -> None:
    """Generated tokens are cached too, all but those of the last page, or with a head's lag the last two. And
    its rows stay where they are, side by side."""
    engine = make_engine(MODEL, draft, page_size=PAGE, speculation=Speculation(4, 3, 1))
    history = TEXT[:9]
    num_computed = 0
    for turn in range(3):
        answer, hit = run(engine, history, sampled(max_tokens=12))
        assert answer == alone(history, sampled(max_tokens=12))
        assert num_computed - hit <= PAGE * (1 + draft.startswith("eagle"))
        num_computed = len(history) + len(answer) - 1
        history = [*history, *answer, *OTHER[turn : turn + 5]]
    engine.add(Request(9, tuple(history), sampled()))
    engine.step()
    pages = engine.scheduler.running[0].pages
    assert pages == list(range(1, 1 + len(pages)))


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_prompt_that_is_cached_whole_needs_one_token(draft: str) -> None:
    engine = make_engine(MODEL, draft, page_size=PAGE)
    first = run(engine, TEXT[:16], sampled())
    assert run(engine, TEXT[:16], sampled()) == (first[0], 15)
    assert engine.prefix_counts() == (32, 15)


def share(engine: Engine) -> None:
    """Share pages as a GPU does, where rows need not lie side by side."""
    engine.scheduler.prefixes._side_by_side = False


@pytest.mark.parametrize("draft", ["none", "eagle3", "eagle"])
def test_pages_move_to_where_their_rows_lie_side_by_side(draft: str) -> None:
    """A second conversation begins as the first one did, whose next page is in the way; then the first goes
    on. Their common pages go with them."""
    engine = make_engine(MODEL, draft, page_size=PAGE, speculation=Speculation(4, 3, 1))
    params = sampled(max_tokens=9)
    places = []
    for prompt in (TEXT[:30], TEXT[:12] + OTHER[:20], TEXT[:34], TEXT[:12] + OTHER[:24]):
        with unwritten(engine):
            engine.add(Request(0, tuple(prompt), params))
            tokens: list[int] = []
            while engine.has_work:
                for delta in engine.step():
                    tokens += delta.token_ids
                check_pages(engine)
                for seq in engine.scheduler.running:
                    assert seq.pages == list(range(seq.pages[0], seq.pages[-1] + 1))
                    places.append((seq.pages[0], seq.num_cached))
        assert tuple(tokens) == alone(prompt, params)
    starts = list(dict.fromkeys(places))
    assert [cached for _, cached in starts][:2] == [0, 11]
    assert [(cached or 0) >= 27 for _, cached in starts[2:]] == [True, True]
    assert len({start for start, _ in starts}) > 1
    assert_idle(engine)


@pytest.mark.parametrize("draft", ["none", "eagle3", "eagle"])
def test_running_requests_share_pages_and_copy_the_last(draft: str) -> None:
    """Later requests arrive while the first still runs: theirs are the same pages but for the last, which is
    a copy, in both pools."""
    engine = make_engine(MODEL, draft, page_size=PAGE)
    share(engine)
    params = sampled(max_tokens=14)
    prompts = [TEXT[:20], TEXT[:20], TEXT[:16] + OTHER[:7], TEXT[:12]]
    emitted: list[list[int]] = [[] for _ in prompts]
    engine.add(Request(0, tuple(prompts[0]), params))
    for _ in range(4):
        for delta in engine.step():
            emitted[0] += delta.token_ids
    with unwritten(engine):
        for number in (1, 2, 3):
            engine.add(Request(number, tuple(prompts[number]), params))
        for step in range(100):
            for delta in engine.step():
                emitted[delta.request_id] += delta.token_ids
            check_pages(engine)
            if step == 0:
                first, *others = engine.scheduler.running
                assert [seq.num_cached for seq in others] == [19, 15, 11]
                for seq in others:
                    shared = (seq.num_cached or 0) // PAGE
                    assert seq.pages[:shared] == first.pages[:shared]
                    assert not set(seq.pages[shared:]) & set(first.pages)
    assert [tuple(tokens) for tokens in emitted] == [alone(prompt, params) for prompt in prompts]
    assert_idle(engine)


@pytest.mark.parametrize("draft", DRAFTS)
def test_answers_to_one_prompt_read_it_once(draft: str) -> None:
    """The first reads it; the others, asked at once, wait for its rows, but a stranger between them does
    not."""
    engine = make_engine(MODEL, draft, max_num_batched_tokens=32)
    prompt, stranger = tuple(TEXT[:43]), tuple(OTHER[:9])
    params = [sampled(seed=seed) for seed in range(5)]
    asked = [prompt, prompt, stranger, prompt, prompt]
    for request_id, (text, param) in enumerate(zip(asked, params, strict=True)):
        engine.add(Request(request_id, text, param))
    deltas = engine.step()
    assert [seq.request.id for seq in engine.scheduler.running] == [0, 2]
    found: dict[int, list[int]] = {request_id: [] for request_id in range(5)}
    num_cached: dict[int, int] = {}
    while engine.has_work:
        deltas += engine.step()
        check_pages(engine)
    for delta in deltas:
        found[delta.request_id] += delta.token_ids
        num_cached[delta.request_id] = delta.num_cached
    assert num_cached == {0: 0, 1: 39, 2: 0, 3: 39, 4: 39}
    for request_id, (text, param) in enumerate(zip(asked, params, strict=True)):
        assert tuple(found[request_id]) == alone(text, param)
    assert_idle(engine)


def test_salts_do_not_mix() -> None:
    engine = make_engine(MODEL, page_size=PAGE)
    hits = [run(engine, TEXT[:20], sampled(), salt=salt)[1] for salt in ("", "a", "", "a", "b", "a")]
    assert hits == [0, 0, 19, 19, 0, 19]


def test_a_page_is_named_by_all_tokens_before_it() -> None:
    """The same tokens behind others are other rows. A key is made once, whenever its page fills."""
    keys: list[bytes] = []
    extend_keys(keys, TEXT[:11], PAGE, "")
    other: list[bytes] = []
    extend_keys(other, OTHER[:4] + TEXT[4:12], PAGE, "")
    salted: list[bytes] = []
    extend_keys(salted, TEXT[:12], PAGE, "x")
    assert len(keys) == 2
    assert len({*keys, *other, *salted}) == 8
    extend_keys(keys, TEXT[:12], PAGE, "")
    whole: list[bytes] = []
    extend_keys(whole, TEXT[:12], PAGE, "")
    assert keys == whole


def test_without_a_cache_nothing_is_found_or_kept() -> None:
    engine = make_engine(MODEL, page_size=PAGE, prefix_caching=False)
    assert [run(engine, TEXT[:20], sampled())[1] for _ in range(2)] == [0, 0]
    assert engine.scheduler.pages.num_free == engine.scheduler.pages.num_usable
    assert engine.prefix_counts() == (0, 0)


def test_a_recorder_of_features_refuses_to_miss_some() -> None:
    engine = make_engine(MODEL, FeatureRecorder(), page_size=PAGE)
    run(engine, TEXT[:20], sampled())
    with pytest.raises(AssertionError, match="0 recorded rows, but 19 committed"):
        run(engine, TEXT[:20], sampled())


# --- the head's rows


@pytest.mark.parametrize("draft", ["eagle3", "eagle"])
def test_a_head_goes_on_only_behind_rows_of_its_own(draft: str) -> None:
    """Pages of a plain request have no rows of the head: of use to plain requests alone, until a speculating
    one has computed both."""
    engine = make_engine(MODEL, draft, page_size=PAGE)
    order = [(PLAIN, 0), (TREE, 0), (PLAIN, 19), (TREE, 19), (PLAIN, 19), (PLAIN, 19), (TREE, 19)]
    for speculation, expected in order:
        assert run(engine, TEXT[:20], sampled(), speculation) == (alone(TEXT[:20], sampled()), expected)
    with unwritten(engine):
        recording = record(engine, [TEXT[:29]], [sampled(20)], [TREE])
    assert state_error(MODEL, recording, draft) < TOLERANCE
    assert recording.completions[0].num_accepted > 2


def test_a_request_that_cannot_draft_takes_any_rows() -> None:
    """One token is asked for, or the prompt has outgrown the head: the head's rows are not missed."""
    engine = make_engine(MODEL, "eagle", page_size=PAGE)
    assert isinstance(engine.draft, FeatureDraft)
    run(engine, TEXT[:20], sampled(), PLAIN)
    assert run(engine, TEXT[:20], sampled(1))[1] == 19
    engine.draft.max_len = 20
    assert run(engine, TEXT[:20], sampled()) == (alone(TEXT[:20], sampled()), 19)


@pytest.mark.parametrize("draft", ["eagle3", "eagle"])
def test_rows_past_the_head_s_longest_are_the_target_s_alone(draft: str) -> None:
    """A sequence outgrows the head on its way; the pages from there on serve plain requests only."""
    engine = make_engine(MODEL, draft, page_size=PAGE, speculation=CHAIN)
    assert isinstance(engine.draft, FeatureDraft)
    engine.draft.max_len = 24
    params = sampled(max_tokens=20)
    answer, _ = run(engine, TEXT[:14], params)
    whole = [*TEXT[:14], *answer]
    engine.draft.max_len = None
    assert run(engine, whole, params, PLAIN)[1] == 31
    speculating, hit = run(engine, whole, params)
    assert 11 <= hit < 27
    assert speculating == alone(whole, params)


# --- pages


def pool_with(num_cached: int, num_pages: int = 12) -> tuple[PagePool, list[bytes]]:
    """A pool of pages of 4 rows, of which the first were published by one sequence and given back."""
    pool = PagePool(num_pages, PAGE)
    pages: list[int] = []
    assert pool.extend(pages, num_cached * PAGE)
    keys = [bytes([number]) for number in range(num_cached)]
    for page, key in zip(pages, keys, strict=True):
        pool.publish(page, key, has_draft_rows=False)
    pool.shrink(pages, 0)
    return pool, keys


def test_least_recently_used_pages_go_first_and_of_a_chain_the_last() -> None:
    pool, keys = pool_with(8)
    assert (pool.num_free, pool.num_cached, pool.num_held, pool.num_available) == (3, 8, 0, 11)
    hit = [pool.find(key, needs_draft_rows=False) for key in keys[:3]]
    held = [page for page in hit if page is not None]
    assert len(held) == 3
    for page in held:
        pool.hold(page)
    assert (pool.num_cached, pool.num_held) == (5, 3)
    pool.shrink(held, 0)  # used last: pages 0 to 2 stay longer than 3 to 7
    other: list[int] = []
    gone = []
    for number in range(1, 12):
        assert pool.extend(other, number * PAGE)
        gone += [key for key in keys if pool.find(key, needs_draft_rows=False) is None and key not in gone]
    assert not pool.extend(other, 12 * PAGE)
    assert gone == [keys[number] for number in (7, 6, 5, 4, 3, 2, 1, 0)]


def test_given_up_pages_form_runs() -> None:
    """A large pool full of old conversations: a new one still finds pages side by side, with room to grow."""
    pool = PagePool(201, PAGE)
    for conversation in range(20):
        pages: list[int] = []
        assert pool.extend(pages, 10 * PAGE)
        for number, page in enumerate(pages):
            pool.publish(page, bytes([conversation, number]), has_draft_rows=False)
        pool.shrink(pages, 0)
    assert (pool.num_free, pool.num_cached) == (0, 200)
    new: list[int] = []
    assert pool.extend(new, 8 * PAGE)
    assert pool.num_free == 200 // 16 - 8
    assert new == list(range(new[0], new[0] + 8))


def test_the_better_of_two_pages_is_kept() -> None:
    pool = PagePool(5, PAGE)
    owners: list[list[int]] = [[], [], [], []]
    for owner, has_draft_rows in zip(owners, (False, False, True, True), strict=True):
        assert pool.extend(owner, PAGE)
        pool.publish(owner[0], b"key", has_draft_rows)
    assert pool.find(b"key", needs_draft_rows=True) == owners[2][0]
    for owner in owners:
        pool.shrink(owner, 0)
    assert (pool.num_free, pool.num_cached) == (3, 1)


@pytest.mark.parametrize("draft", ["none", "eagle"])
def test_only_the_pages_that_are_missing_are_asked_for(draft: str) -> None:
    """12 pages; two requests of 8 pages fit at once because they share most of them."""
    engine = make_engine(MODEL, draft, num_pages=13, page_size=PAGE, speculation=Speculation(2, 1, 1))
    params = sampled(max_tokens=4)
    share(engine)
    run(engine, TEXT[:28], params)
    assert engine.kv_usage() == 0
    for number in (1, 2):
        engine.add(Request(number, tuple(TEXT[:28]), params))
    engine.step()
    assert engine.num_running == 2
    assert 8 / 12 <= engine.kv_usage() <= 11 / 12
    while engine.has_work:
        engine.step()
    assert_idle(engine)


@pytest.mark.parametrize("draft", ["none", "eagle3"])
def test_a_preempted_request_finds_its_own_rows(draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(MODEL, draft, page_size=PAGE, speculation=Speculation(4, 3, 1))
    params = sampled(max_tokens=20)
    engine.add(Request(0, tuple(TEXT[:15]), params))
    tokens: list[int] = []
    for _ in range(9):
        for delta in engine.step():
            tokens += delta.token_ids
    seq = engine.scheduler.running[0]
    kv_len = seq.kv_len
    engine.scheduler._preempt(seq)
    assert engine.scheduler.pages.num_held == 0
    while engine.has_work:
        for delta in engine.step():
            tokens += delta.token_ids
            assert delta.num_cached == 0  # it came with nothing
        if seq.finish_reason is None:
            assert seq.kv_len >= kv_len - 2 * PAGE
    assert tuple(tokens) == alone(TEXT[:15], params)
    assert_idle(engine)


# --- all of it at once

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
