"""Which pages the prefix cache keeps and gives up, and who needs how many."""

from __future__ import annotations

import pytest

from engine.core import Request, Speculation
from engine.pages import PagePool
from tests.engine.prefixes import MODEL, PAGE, TEXT, alone, run, sampled, share
from tests.engine.rig import assert_idle, make_engine


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
