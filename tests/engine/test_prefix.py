"""The prefix cache: a hit changes no token and no row, of the target or of a head."""

from __future__ import annotations

import pytest

from draft.head import FeatureDraft
from draft.train.recorder import FeatureRecorder
from engine.core import Request, Speculation
from engine.prefix import extend_keys
from tests.engine.prefixes import DRAFTS, MODEL, OTHER, PAGE, TEXT, alone, run, sampled, share, unwritten
from tests.engine.rig import CHAIN, PLAIN, TREE, assert_idle, make_engine, record
from tests.engine.state import TOLERANCE, state_error
from tests.engine.test_scheduler import check_pages

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
