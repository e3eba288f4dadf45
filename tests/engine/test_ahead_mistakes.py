"""Mistakes that a step ahead of its host makes easy, planted: each of them is seen.

What the head is given wrongly changes no token, but its rows; see ``tests.engine.test_mutants``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

import draft.captured
import engine.graphs
import engine.step
from draft.pending import Pending
from engine.core import Batch, SamplingParams, Verdict
from engine.scheduler import Scheduler
from tests.engine.rig import TREE, known_plain_tokens, record
from tests.engine.state import TOLERANCE, state_error
from tests.engine.test_ahead import MODEL, PROMPTS, gpu, on_device
from tests.engine.test_scheduler import check_pages
from tests.simulated import GraphError, Simulated

__all__ = ["gpu"]  # a fixture

Mutate = Callable[[pytest.MonkeyPatch], None]


def lengths_stay(patch: pytest.MonkeyPatch) -> None:
    """The device does not advance them."""

    def wrong(batch: Batch, verdict: Verdict) -> None:
        assert batch.roots is not None
        batch.roots.copy_(verdict.bonus.clamp(min=0))

    patch.setattr(engine.step, "advance", wrong)


def roots_stay(patch: pytest.MonkeyPatch) -> None:
    def wrong(batch: Batch, verdict: Verdict) -> None:
        batch.kv_lens.add_(verdict.length)

    patch.setattr(engine.step, "advance", wrong)


def pairs_of_the_host(patch: pytest.MonkeyPatch) -> None:
    """Sent after the device has made its own."""
    take = draft.captured._take

    def wrong(sent: dict[str, Tensor], *given: Any) -> None:
        stale = sent["tokens"].clone(), sent["counts"].clone()
        take(sent, *given)
        sent["tokens"].copy_(stale[0]), sent["counts"].copy_(stale[1])

    patch.setattr(draft.captured, "_take", wrong)


def one_buffer(patch: pytest.MonkeyPatch) -> None:
    """The host writes to what is still to be copied."""
    patch.setattr(engine.graphs, "_NUM_BUFFERS", 1)


def pages_go_too_early(patch: pytest.MonkeyPatch) -> None:
    """Those that the step under way writes to are given back, and are somebody else's, or nobody's, then."""
    commit = Scheduler.commit

    def wrong(self: Scheduler, *given: Any, goes_on: bool = False) -> Any:
        return commit(self, *given)

    patch.setattr(Scheduler, "commit", wrong)


def too_few_pages(patch: pytest.MonkeyPatch) -> None:
    """Hardly more than for the step under way."""
    patch.setattr("engine.core.Speculation.most_emitted", -9)


def the_dead_are_committed(patch: pytest.MonkeyPatch) -> None:
    """What became of somebody who ended a step ago."""
    patch.setattr("engine.decoding._of_living", lambda batch, found: (batch, found))


def pairs_are_taken_twice(patch: pytest.MonkeyPatch) -> None:
    """The host believes twice over that the device has taken them in."""
    skip = Pending.skip
    patch.setattr(Pending, "skip", lambda self, count: skip(self, 2 * count))


def pairs_are_not_taken(patch: pytest.MonkeyPatch) -> None:
    """The host believes that the device has taken them in."""
    take = draft.captured._take

    def wrong(sent: dict[str, Tensor], *given: Any) -> None:
        take(sent, *given)
        sent["counts"].clamp_(max=1)

    patch.setattr(draft.captured, "_take", wrong)


def features_of_the_first_nodes(patch: pytest.MonkeyPatch) -> None:
    """Not of those that were accepted."""
    take = draft.captured._take

    def wrong(sent: Any, gathered: Tensor, tokens: Tensor, verdict: Verdict, features: Tensor) -> None:
        take(sent, gathered, tokens, verdict, features)
        width = min(gathered.shape[1], features.shape[1])
        gathered[:, :width].copy_(features[:, :width])

    patch.setattr(draft.captured, "_take", wrong)


def tokens_before_the_features(patch: pytest.MonkeyPatch) -> None:
    """Every feature with its own token instead of the one after it."""
    take = draft.captured._take

    def wrong(sent: Any, gathered: Tensor, tokens: Tensor, verdict: Verdict, features: Tensor) -> None:
        take(sent, gathered, tokens, verdict, features)
        node = verdict.path[:, : gathered.shape[1]].clamp(min=0)
        sent["tokens"][:, : node.shape[1]].copy_(tokens.gather(1, node))

    patch.setattr(draft.captured, "_take", wrong)


def is_right(gpu: Simulated) -> bool:
    """Three requests of which one ends when nobody expects it, in pages of a single row, of which there are
    few: their tokens and their rows."""
    params = [SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=16) for i in range(3)]
    params[1] = replace(params[1], stop_token_ids=(known_plain_tokens(MODEL, PROMPTS, params)[1][7],))
    device = on_device(gpu, "eagle3", speculation=TREE, page_size=1, num_pages=110)
    try:
        recording = record(device, PROMPTS, params, after_step=check_pages)
    except (AssertionError, GraphError, IndexError, RuntimeError, ValueError):
        return False  # it shows at once
    expected = known_plain_tokens(MODEL, PROMPTS, params)
    found = [one.token_ids for one in recording.completions]
    return found == expected and state_error(MODEL, recording, "eagle3") < TOLERANCE


def test_without_a_mistake_it_is_right(gpu: Simulated) -> None:
    assert is_right(gpu)


@pytest.mark.parametrize(
    "mutate",
    [
        lengths_stay,
        roots_stay,
        pairs_of_the_host,
        one_buffer,
        pages_go_too_early,
        too_few_pages,
        the_dead_are_committed,
        pairs_are_taken_twice,
        pairs_are_not_taken,
        features_of_the_first_nodes,
        tokens_before_the_features,
    ],
)
def test_mistakes_show(gpu: Simulated, monkeypatch: pytest.MonkeyPatch, mutate: Mutate) -> None:
    mutate(monkeypatch)
    assert not is_right(gpu)
