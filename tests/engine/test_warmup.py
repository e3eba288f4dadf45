"""The first steps on made-up text: what they teach, and that nothing else is left of them."""

from __future__ import annotations

import pytest

from draft.head import FeatureDraft
from draft.planner import Planner
from engine.config import EngineConfig
from engine.core import Batch, DraftTree, SamplingParams, Speculation, Verdict
from engine.warmup import sizes, warm_up
from tests.engine.rig import Model, assert_idle, echo_model, make_engine, plain_tokens, prompts_of
from verify.stats import StepTimes

LIMITS = Speculation(9, 4, 3, lookup=5)


class Forbidden:
    """A step log that nobody may write to."""

    def write(self, batch: Batch, tree: DraftTree, verdict: Verdict, times: StepTimes) -> None:
        raise AssertionError("made-up text is nobody's")

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def echo() -> Model:
    return echo_model(3)


@pytest.mark.parametrize("draft", ["eagle3", "eagle"])
def test_costs_are_learned_and_acceptance_is_not(echo: Model, draft: str) -> None:
    planner = Planner(stops_early=True)
    engine = make_engine(echo, draft, speculation=LIMITS, planner=planner)
    engine.step_log = log = Forbidden()
    warm_up(engine)
    assert engine.step_log is log
    assert {1, 2, 3, 4, 6, 8, 12} <= set(planner.costs._rows._seen), "rows of the target, by size"
    assert {1, 2, 8} <= set(planner.costs._first._seen), "sequences that the head drafts for"
    assert planner.costs._level.is_known
    assert_idle(engine)
    assert engine.prefix_counts() == (0, 0)
    assert isinstance(engine.draft, FeatureDraft)
    assert not engine.draft.calibration.trials.any()
    assert engine.draft.coverage.emitted == 0
    assert planner._memories == {}
    engine.step_log = None
    prompts, params = prompts_of([5, 24]), [SamplingParams(temperature=0, max_tokens=20)] * 2
    found = [completion.token_ids for completion in engine.generate(prompts, params)]
    assert found == plain_tokens(echo, prompts, params)


def test_nothing_is_run_where_nothing_is_planned(echo: Model) -> None:
    for engine in (make_engine(echo, "eagle3"), make_engine(echo, "ngram", planner=Planner())):
        engine.step_log = Forbidden()
        warm_up(engine)


def test_a_short_context_ends_it_early(echo: Model) -> None:
    """No room for a prompt of its length: then the first requests teach what they cost, as ever."""
    engine = make_engine(echo, "eagle3", planner=Planner(), max_model_len=24)
    warm_up(engine)
    assert_idle(engine)


def test_sizes_keep_within_the_limits() -> None:
    found = list(sizes(EngineConfig(speculation=Speculation(4, 2, 2), max_num_seqs=2)))
    assert [(count, shape.nodes, shape.depth) for count, shape in found] == [
        *((1, nodes, depth) for nodes, depth in ((1, 0), (2, 1), (3, 2), (4, 2))),
        *((2, nodes, depth) for nodes, depth in ((1, 0), (2, 1))),
    ]
