"""What a score is worth is learned from what was accepted, and trees are never worse than chains."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from draft.calibration import Calibration, isotonic
from draft.tree import Limits, Offers, grow
from engine.core import DraftScores, DraftTree, Speculation, Verdict

Truth = Callable[
    [float, int, int], float
]  # raw, depth, rank -> acceptance given that the parent was accepted


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 5)), min_size=1, max_size=6))
def test_isotonic_against_brute_force(points: list[tuple[int, int]]) -> None:
    """The best non-decreasing sequence is constant on blocks, each at its weighted mean: try them all."""
    values, weights = (np.asarray(x, dtype=np.float64) for x in zip(*points, strict=True))
    got = isotonic(values, weights)
    assert (np.diff(got) >= -1e-12).all()
    best = np.inf
    count = len(values)
    for cuts in itertools.chain.from_iterable(
        itertools.combinations(range(1, count), n) for n in range(count)
    ):
        edges = [0, *cuts, count]
        means = [np.average(values[a:b], weights=weights[a:b]) for a, b in itertools.pairwise(edges)]
        if all(a <= b + 1e-12 for a, b in itertools.pairwise(means)):
            fit = np.concatenate(
                [np.full(b - a, mean) for mean, (a, b) in zip(means, itertools.pairwise(edges), strict=True)]
            )
            best = min(best, float((weights * (fit - values) ** 2).sum()))
    assert float((weights * (got - values) ** 2).sum()) == pytest.approx(best, abs=1e-9)


def stream(
    calibration: Calibration,
    truth: Truth,
    steps: int,
    *,
    sampled: bool = False,
    seed: int = 0,
    num_seqs: int = 16,
) -> None:
    """Trees of two siblings, each with one child, judged by the truth."""
    draw = random.Random(seed)
    parents = torch.tensor([[-1, 0, 0, 1, 2]]).repeat(num_seqs, 1)
    rank = torch.tensor([[0, 0, 1, 0, 0]]).repeat(num_seqs, 1)
    for _ in range(steps):
        raw = torch.rand(num_seqs, 5, generator=torch.Generator().manual_seed(draw.randrange(2**31)))
        raw[:, 0] = 1
        paths = torch.full((num_seqs, 5), -1)
        paths[:, 0] = 0
        for row in range(num_seqs):
            for first in (1, 2):
                if draw.random() < truth(float(raw[row, first]), 1, first - 1):
                    paths[row, 1] = first
                    if draw.random() < truth(float(raw[row, first + 2]), 2, 0):
                        paths[row, 2] = first + 2
                    break
        length = (paths >= 0).sum(1)
        tree = DraftTree(torch.zeros(num_seqs, 5, dtype=torch.int64), parents, DraftScores(raw, raw, rank))
        calibration.observe(tree, Verdict(paths, length, length), [sampled] * num_seqs)


def curve(calibration: Calibration, depth: int, rank: int, sampled: bool, points: int = 100) -> Tensor:
    raw = torch.linspace(0.001, 1.0, points)
    scores = torch.zeros(1, points, rank + 1)
    scores[0, :, rank] = raw
    return calibration(scores, depth, torch.tensor([sampled]))[0, :, rank]


def test_untrained_it_is_the_raw_score() -> None:
    got = curve(Calibration("cpu"), 3, 2, True)
    raw = torch.linspace(0.001, 1.0, 100)
    inner = (raw > 0.05) & (raw < 0.95)
    torch.testing.assert_close(got[inner], raw[inner])
    assert bool((got > 0).all())
    assert bool((got <= 1).all())


@pytest.mark.parametrize("sampled", [False, True])
def test_it_converges_to_what_is_accepted(sampled: bool) -> None:
    """A head that is too modest at depth 1 and too sure at depth 2; the other mode keeps its prior."""

    def truth(raw: float, depth: int, rank: int) -> float:
        return raw**0.5 * 0.9 if depth == 1 else 0.2 + 0.3 * raw

    calibration = Calibration("cpu")
    stream(calibration, truth, 800, sampled=sampled)
    raw = torch.linspace(0.001, 1.0, 100)
    inner = (raw > 0.06) & (raw < 0.94)
    for depth in (1, 2):
        expected = torch.tensor([truth(float(x), depth, 0) for x in raw])
        error = (curve(calibration, depth, 0, sampled) - expected)[inner].abs()
        assert float(error.max()) < 0.12
        assert float(error.mean()) < 0.035
        torch.testing.assert_close(curve(calibration, depth, 0, not sampled)[inner], raw[inner])
    later = curve(calibration, 1, 1, sampled)[
        inner
    ]  # of the second sibling, which is only reached by refusing the first
    assert float(later.mean()) < float(curve(calibration, 1, 0, sampled)[inner].mean())


def test_it_is_monotone_and_positive_whatever_it_sees() -> None:
    """Even if the truth runs against the scores."""
    calibration = Calibration("cpu")
    stream(calibration, lambda raw, depth, rank: 0.9 - 0.8 * raw, 200)
    for depth, rank in itertools.product((1, 2, 20), (0, 1, 11)):
        values = curve(calibration, depth, rank, False)
        assert bool((values.diff() >= -1e-6).all())
        assert bool((values > 0).all())
        assert bool((values <= 1).all())


def test_it_follows_the_content() -> None:
    calibration = Calibration("cpu")
    stream(calibration, lambda raw, depth, rank: 0.9, 400)
    high = float(curve(calibration, 1, 0, False).mean())
    stream(calibration, lambda raw, depth, rank: 0.1, 2500, seed=1, num_seqs=4)
    assert high > 0.85
    assert float(curve(calibration, 1, 0, False).mean()) < 0.25


def test_only_judged_nodes_count() -> None:
    """A node below a refused one says nothing; padding says nothing."""
    calibration = Calibration("cpu")
    tree = DraftTree(
        torch.zeros(1, 5, dtype=torch.int64),
        torch.tensor([[-1, 0, 1, 0, -1]]),
        DraftScores(
            torch.tensor([[1, 0.99, 0.5, 0.2, 0.0]]), torch.ones(1, 5), torch.tensor([[0, 0, 0, 1, 0]])
        ),
    )
    verdict = Verdict(torch.tensor([[0, 3, -1, -1, -1]]), torch.tensor([2]), torch.tensor([7]))
    calibration.observe(tree, verdict, [False])
    assert calibration.trials.sum() == pytest.approx(2)
    assert calibration.hits.sum() == pytest.approx(1)
    assert (
        calibration.trials[0, 0, 0, 11] == calibration.trials[0, 0, 1, 2] == calibration.hits[0, 0, 1, 2] == 1
    )


def drafted_value(logits: Tensor, calibration: Calibration, speculation: Speculation) -> float:
    """Expected accepted tokens of the tree grown from a stream of scores, by calibrated value.

    logits: [depth, 64, k]; a node's children are a function of its path, so that chain and tree see the same
    head.
    """
    frontier = [0]

    def offers(depth: int) -> Offers:
        raw = (
            torch.stack([logits[depth, place % 64] for place in frontier])[None]
            .softmax(-1)
            .sort(-1, descending=True)
            .values
        )
        k = min(speculation.top_k, raw.shape[-1])
        return Offers(torch.arange(k).expand(1, len(frontier), k), raw[..., :k])

    def expand(tokens: Tensor, parents: Tensor, depth: int) -> Offers:
        nonlocal frontier
        frontier = [
            frontier[p] * 7 + 1 + t for t, p in zip(tokens[0].tolist(), parents[0].tolist(), strict=True)
        ]
        return offers(depth)

    tree = grow(
        torch.tensor([0]),
        offers(0),
        Limits.of([speculation], "cpu"),
        expand,
        lambda raw, depth: calibration(raw, depth, torch.tensor([False])),
    )
    assert tree.scores is not None
    return float(tree.scores.value[0, 1:].sum())


def test_nodes_of_prompt_lookup_teach_nothing_about_the_head() -> None:
    """They have no score."""
    calibration = Calibration("cpu")
    tree = DraftTree(
        torch.tensor([[5, 6, 7]]),
        torch.tensor([[-1, 0, 1]]),
        DraftScores(
            torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]), torch.zeros(1, 3).long()
        ),
    )
    verdict = Verdict(torch.tensor([[0, 1, 2]]), torch.tensor([3]), torch.tensor([8]))
    calibration.observe(tree, verdict, [False])
    assert calibration.trials.sum() == 0


@pytest.mark.parametrize("spread", [1.0, 2.5, 5.0])
def test_a_tree_is_never_worth_less_than_the_chain_of_its_size(spread: float) -> None:
    """For every N on average over a stream, and at a beam that holds the chain also for every single tree."""
    calibration = Calibration("cpu")
    stream(calibration, lambda raw, depth, rank: 0.1 + 0.8 * raw if rank == 0 else 0.5 * raw, 250)
    generator = torch.Generator().manual_seed(int(spread * 10))
    sizes = (2, 3, 4, 6, 8, 16)
    gains = {size: [] for size in sizes}  # type: dict[int, list[float]]
    for _ in range(12):
        logits = torch.randn(16, 64, 6, generator=generator) * spread
        for size in sizes:
            chain = drafted_value(logits, calibration, Speculation(size, size - 1, 1))
            gains[size].append(drafted_value(logits, calibration, Speculation(size, size - 1, 4)) - chain)
            if size <= 4:  # six children of each of up to six nodes: nothing is cut off
                assert drafted_value(logits, calibration, Speculation(size, size - 1, 6)) >= chain - 1e-5
    for size, found in gains.items():
        assert np.mean(found) >= -1e-6, size
    assert np.mean(gains[8]) > 0.05
