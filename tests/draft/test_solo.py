"""One sequence on a CPU: the same trees, rows and tokens as the tensor path gives it."""

from __future__ import annotations

import random
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import draft.growth
import draft.head
from draft.calibration import Calibration
from draft.solo import Children, SoloRows, grow_one
from draft.tree import IsWorth
from engine.core import SPECULATION_OFF, DraftTree, SamplingParams, Speculation
from engine.rows import first_slot
from tests.draft.test_tree import FakeHead, Path, paths_of
from tests.engine.rig import Model, assert_idle, echo_model, make_engine, plain_tokens, prompts_of, record
from tests.engine.state import TOLERANCE, state_error

SIZES = [Speculation(8, 4, 4), Speculation(6, 5, 1), Speculation(2, 1, 1), Speculation(30, 2, 3)]
SIZES += [Speculation(4, 3, 2), Speculation(12, 6, 5)]


@pytest.fixture(scope="module")
def echo() -> Model:
    return echo_model(3)


def grown_alone(head: FakeHead, size: Speculation, is_worth: IsWorth | None = None) -> DraftTree:
    """The fake's tree by ``grow_one``."""
    frontier: list[Path] = [()]

    def children() -> list[Children]:
        return [list(zip(*head.children(0, path), strict=True)) for path in frontier]

    def expand(tokens: list[int], parents: list[int], depth: int) -> list[Children]:
        nonlocal frontier
        head.num_expands += 1
        frontier = [(*frontier[parent], token) for token, parent in zip(tokens, parents, strict=True)]
        assert {len(path) for path in frontier} == {depth}
        return children()

    def value(raw: float, depth: int, rank: int) -> float:
        return float(head.value(torch.tensor(raw), depth))

    return grow_one(100, children()[0], size, expand, value, is_worth)


class TestGrowing:
    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("levels", [None, [0.25, 0.5]], ids=["smooth", "ties"])
    def test_the_same_tree_as_with_tensors(self, size: Speculation, levels: list[float] | None) -> None:
        for seed in range(20):
            theirs, ours = FakeHead(1, seed, 5, levels), FakeHead(1, seed, 5, levels)
            expected, found = theirs.grow([size]), grown_alone(ours, size)
            assert expected.scores is not None
            assert found.scores is not None
            count = len(paths_of(found, 0))
            torch.testing.assert_close(
                found.scores.value[0].sort().values, expected.scores.value[0, :count].sort().values
            )
            if levels is None:  # among equal values either may be taken
                assert paths_of(found, 0) == paths_of(expected, 0)
                assert torch.equal(found.scores.rank[0], expected.scores.rank[0, :count])
                torch.testing.assert_close(found.scores.raw[0], expected.scores.raw[0, :count])
                assert ours.num_expands == theirs.num_expands

    def test_a_head_that_offers_nothing_leaves_the_root(self) -> None:
        tree = grow_one(7, [(1, 0.0)], Speculation(8, 4, 4), lambda *_: [], lambda *_: 1.0)
        assert tree.tokens.tolist() == [[7]]
        assert tree.parents.tolist() == [[-1]]

    def test_a_level_that_is_not_worth_it_is_not_expanded(self) -> None:
        never, always = FakeHead(1, 3, 5), FakeHead(1, 3, 5)
        unexpanded = grown_alone(never, SIZES[0], lambda depth, values, frontier: False)
        assert len(paths_of(unexpanded, 0)) == 5  # the root and its children
        grown_alone(always, SIZES[0])
        assert (never.num_expands, always.num_expands > 0) == (0, True)

    def test_calibration_of_one_score(self) -> None:
        calibration, draw = Calibration("cpu"), random.Random(1)
        curves = (
            torch.rand(calibration._rates.shape, generator=torch.Generator().manual_seed(1)).sort(-1).values
        )
        calibration._rates = curves.double().numpy()
        for _ in range(200):
            raw, depth, sampled = draw.random(), draw.randrange(1, 20), draw.random() < 0.5
            many = calibration(torch.full((1, 1, 10), raw), depth, torch.tensor([sampled]))[0, 0].tolist()
            ones = [calibration.one(raw, depth, rank, sampled) for rank in range(10)]
            assert ones == pytest.approx(many, rel=1e-5)


class TestRows:
    @given(
        kv_len=st.integers(0, 20), widths=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data()
    )
    @settings(deadline=None)
    def test_levels_lie_behind_one_another_and_see_their_ancestors(
        self, kv_len: int, widths: list[int], data: Any
    ) -> None:
        rows, chains = SoloRows(100, kv_len), []
        before: list[set[int]] = [set()]
        total = 0
        for width in widths:
            parents = [data.draw(st.integers(0, len(before) - 1)) for _ in range(width)]
            before = [before[parent] | {total + i} for i, parent in enumerate(parents)]
            plan = rows.expand(parents)
            chains.append(before)
            start = 100 + kv_len + 1 + total
            total += width
            assert plan.write == slice(start, start + width)
            (part,) = plan.parts
            assert part.read == (slice(101, 101 + kv_len + total),)
            if part.bias is None:
                assert total == 1
                continue
            assert part.bias.shape == (1, width, kv_len + total)
            for own, row in zip(before, part.bias[0], strict=True):
                seen = set(row.isfinite().nonzero()[:, 0].tolist())
                assert seen == set(range(kv_len)) | {kv_len + node for node in own}


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("head", ["eagle3", "eagle"])
@pytest.mark.parametrize("size", [*SIZES[:3], Speculation(5, 3, 2, lookup=6)], ids=str)
@pytest.mark.parametrize("alone", [True, False], ids=["lists", "tensors"])
def test_one_request_at_a_time(
    echo: Model,
    head: str,
    size: Speculation,
    temperature: float,
    alone: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens and rows are right on either path, and either is really taken."""
    calls = []

    def counted(*args: Any) -> DraftTree:
        calls.append(args)
        return grow_one(*args)

    monkeypatch.setattr(draft.growth, "grow_one", counted)
    if not alone:
        monkeypatch.setattr(draft.head, "first_slot", lambda *_: None)
    prompts = prompts_of([9])
    params = [SamplingParams(temperature=temperature, seed=4, max_tokens=24)]
    engine = make_engine(echo, head, speculation=size, page_size=4)
    recording = record(engine, prompts, params)
    assert [c.token_ids for c in recording.completions] == plain_tokens(echo, prompts, params)
    assert state_error(echo, recording, head) < TOLERANCE
    assert_idle(engine)
    assert bool(calls) == alone
    assert sum(c.num_accepted for c in recording.completions) > 2


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("place", [0, 2])
def test_the_one_of_a_batch_that_drafts(
    echo: Model, place: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its trees are those of the tensor path, from its own rows, with its own noise."""
    prompts = prompts_of([9, 12, 15])
    params = [SamplingParams(temperature=temperature, seed=4 + i, max_tokens=24) for i in range(3)]
    sizes = [Speculation(8, 4, 4) if own == place else SPECULATION_OFF for own in range(3)]
    drafted: dict[bool, list[tuple[int, int]]] = {}
    for alone in (True, False):
        grown = Mock(wraps=grow_one)
        with monkeypatch.context() as patch:
            patch.setattr(draft.growth, "grow_one", grown)
            if not alone:
                patch.setattr(draft.head, "first_slot", lambda *_: None)
            engine = make_engine(echo, "eagle3", page_size=64, num_pages=12)
            recording = record(engine, prompts, params, sizes)
        assert [c.token_ids for c in recording.completions] == plain_tokens(echo, prompts, params)
        assert state_error(echo, recording, "eagle3") < TOLERANCE
        assert bool(grown.call_count) == alone
        drafted[alone] = [(c.num_draft_tokens, c.num_accepted) for c in recording.completions]
    assert drafted[True] == drafted[False]
    assert drafted[True][place][1] > 2


def test_scattered_pages_take_the_tensor_path(echo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that has to go on elsewhere: the pages behind its own are taken."""
    starts = []

    def watched(pages: list[int], page_size: int) -> int | None:
        starts.append(first_slot(pages, page_size))
        return starts[-1]

    monkeypatch.setattr(draft.head, "first_slot", watched)
    params = [SamplingParams(temperature=0, max_tokens=24)]
    engine = make_engine(echo, "eagle3", speculation=SIZES[0], page_size=4, num_pages=16)
    pages = engine.scheduler.pages
    taken: list[int] = []
    assert pages.extend(taken, 4 * 6)
    held, taken[:] = taken[4:], taken[:4]  # the sequence gets pages 1 to 4, then others
    pages.shrink(taken, 0)
    recording = record(engine, prompts_of([9]), params)
    assert [c.token_ids for c in recording.completions] == plain_tokens(echo, prompts_of([9]), params)
    assert state_error(echo, recording, "eagle3") < TOLERANCE
    assert None in starts
    pages.shrink(held, 0)
    assert_idle(engine)
