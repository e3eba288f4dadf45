"""Typical trees follow what was drafted, level by level, and say how far they can be trusted."""

from __future__ import annotations

import random

import pytest

from draft.belief import MAX_LEVELS, WIDTH, Belief


def learned(trees: list[list[list[float]]]) -> Belief:
    belief = Belief()
    for tree in trees:
        belief.learn(tree)
    return belief


def test_it_becomes_the_mean_tree() -> None:
    """Sure and unsure trees in turns: the mean of products, which the product of means is far below."""
    sure, unsure = [[0.9, 0.05], [0.81, 0.04], [0.73, 0.03]], [[0.1, 0.09], [0.01, 0.005], [0.001, 0.0]]
    belief = learned([sure, unsure] * 200)
    for level, (one, other) in enumerate(zip(sure, unsure, strict=True)):
        for rank in range(2):
            mean = (one[rank] + other[rank]) / 2
            assert belief.levels(3)[level][rank] == pytest.approx(mean, rel=0.15)
    assert belief.chance(2) == pytest.approx(0.41 / 0.5, rel=0.05)


def test_levels_that_were_not_drafted_keep_their_proportion() -> None:
    belief = learned([[[0.8, 0.1], [0.4, 0.1], [0.2, 0.05]]] * 100)
    for _ in range(100):
        belief.learn([[0.4]])
    levels = belief.levels(3)
    assert [level[0] for level in levels] == pytest.approx([0.4, 0.2, 0.1], rel=0.01)
    assert levels[0][1] == pytest.approx(0.05, rel=0.01), "nor do ranks"


def test_values_never_grow_along_a_path() -> None:
    draw = random.Random(1)
    for _ in range(50):
        belief = Belief()
        for _ in range(30):
            best, tree = 1.0, []
            for _ in range(draw.randint(1, 6)):
                best *= draw.random()
                tree.append(sorted((best * draw.random() for _ in range(draw.randint(0, 3))), reverse=True))
                tree[-1].insert(0, best)
            belief.learn(tree, draw.randint(0, 50))
        levels = belief.levels(MAX_LEVELS)
        assert [len(level) for level in levels] == [WIDTH] * MAX_LEVELS
        for above, below in zip(levels, levels[1:], strict=False):
            assert above[0] >= max(below)


def test_the_longer_ago_the_less_it_counts() -> None:
    after = []
    for steps in (0, 10, 1000):
        belief = learned([[[0.1]]] * 100)
        belief.learn([[0.9]], steps)
        after.append(belief.levels(1)[0][0])
    assert after[0] < 0.2 < after[1] < after[2] == pytest.approx(0.5, rel=0.01)


def test_a_start_is_a_copy() -> None:
    mode = learned([[[0.3]]] * 100)
    request = Belief(mode)
    assert request.levels(4) == mode.levels(4)
    request.learn([[0.9]])
    assert mode.levels(1)[0][0] == pytest.approx(0.3, rel=0.01)


def test_trust_is_accepted_over_expected() -> None:
    belief = Belief()
    assert belief.trust == 1.0
    for _ in range(300):
        belief.judge(2.0, 1)
    assert belief.trust == pytest.approx(0.5, abs=0.03)
    assert belief.trusted([0.8, 0.4]) == pytest.approx([0.8 * belief.trust, 0.4 * belief.trust])
    for _ in range(300):
        belief.judge(1.0, 3)
    assert belief.trusted([0.9]) == [1.0]
