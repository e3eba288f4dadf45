"""Costs are learned from noisy live steps: curves of any monotone form, and they follow the machine."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draft.costs import Curve, StepCosts, calibration_sizes, grid_size

# Seconds of a target step by rows.
FORMS: dict[str, Callable[[int], float]] = {
    "flat": lambda n: 0.01,
    "linear": lambda n: 0.02 + 0.001 * n,
    "jump and concave": lambda n: 0.01 + 0.006 * (n > 1) + 0.004 * (n - 1) ** 0.5,
    "knee": lambda n: 0.01 + 0.001 * max(n - 24, 0),
}


def noisy(draw: random.Random, seconds: float, outliers: float = 0.05) -> float:
    """A tenth of jitter, and now and then a hiccup of three to thirty times."""
    hiccup = draw.uniform(3, 30) if draw.random() < outliers else 1.0
    return seconds * draw.lognormvariate(0.0, 0.1) * hiccup


def warmed_up(form: Callable[[int], float], draw: random.Random, largest: int = 64) -> Curve:
    """After the calibration at start-up, whose first pass over the sizes compiled."""
    curve = Curve()
    for slow in (20.0, 1.0, 1.0):
        for size in calibration_sizes(largest):
            curve.observe(size, noisy(draw, form(size), outliers=0.0) * slow)
    return curve


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_curve_converges_in_spite_of_noise_and_outliers(form: Callable[[int], float]) -> None:
    draw = random.Random(1)
    curve = warmed_up(form, draw)
    for _ in range(1500):
        size = draw.randint(1, 64)
        curve.observe(size, noisy(draw, form(size)))
    errors = [abs(curve(size) / form(size) - 1) for size in range(1, 65)]
    assert max(errors) < 0.12
    assert sum(errors) / len(errors) < 0.05


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_start_up_calibration_suffices(form: Callable[[int], float]) -> None:
    curve = warmed_up(form, random.Random(2))
    assert max(abs(curve(size) / form(size) - 1) for size in range(1, 65)) < 0.25


def test_the_first_row_says_nothing_about_the_slope() -> None:
    """Beyond what was seen a curve goes on as the speculative sizes did, not as from one row to two."""
    curve = Curve()
    for size, seconds in ((1, 0.010), (2, 0.020), (3, 0.021), (4, 0.022)):
        for _ in range(4):
            curve.observe(size, seconds)
    assert curve(1) == pytest.approx(0.010)
    assert curve(2) == pytest.approx(0.020)
    assert curve(8) == pytest.approx(0.026, rel=0.02)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 100), st.floats(1e-4, 10.0)), min_size=1, max_size=60),
    st.integers(1, 200),
)
def test_a_curve_never_falls(samples: list[tuple[int, float]], largest: int) -> None:
    curve = Curve()
    for size, seconds in samples:
        curve.observe(size, seconds)
    values = [curve(size) for size in range(1, largest + 1)]
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(values))
    assert min(values) > 0
    assert curve.run(1, largest) == values


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_change_of_the_machine_is_followed_at_all_sizes(factor: float) -> None:
    """Only size 4 is visited after it, yet 1 and 16 are expected to have changed likewise."""
    draw = random.Random(3)
    form = FORMS["linear"]
    curve = warmed_up(form, draw)
    for _ in range(600):
        size = draw.choice((1, 4, 16))
        curve.observe(size, noisy(draw, form(size)))
    for _ in range(12):
        curve.observe(4, noisy(draw, factor * form(4)))
    for size in (1, 4, 16):
        assert curve(size) == pytest.approx(factor * form(size), rel=0.25)


def test_a_change_of_one_size_is_learned() -> None:
    """Content that touches more experts makes four rows dearer, one row not."""
    draw = random.Random(4)
    curve = warmed_up(lambda n: 0.02, draw)
    for _ in range(400):
        size = draw.choice((1, 4))
        curve.observe(size, noisy(draw, 0.02 if size == 1 else 0.03))
    assert curve(1) == pytest.approx(0.02, rel=0.06)
    assert curve(4) == pytest.approx(0.03, rel=0.06)


def test_a_lasting_change_is_blamed_on_the_size_that_showed_it() -> None:
    """The other sizes were not seen since: it may have been the machine, but that is ever less likely."""
    draw = random.Random(8)
    curve = warmed_up(lambda n: 0.02, draw)
    for _ in range(500):
        curve.observe(4, noisy(draw, 0.03))
    assert curve(1) == pytest.approx(0.02, rel=0.12)
    assert curve(4) == pytest.approx(0.03, rel=0.12)


def test_one_hiccup_is_a_shrug() -> None:
    curve = warmed_up(FORMS["linear"], random.Random(5))
    before = curve(4)
    curve.observe(4, 50.0)
    assert curve(4) == pytest.approx(before, rel=0.03)


def test_attention_is_told_apart_from_rows() -> None:
    """Contexts of 200 to 4,000 tokens: the slope is found, and applies to sizes and contexts never seen."""
    draw = random.Random(6)
    costs = StepCosts()

    def seconds(rows: int, context: float) -> float:
        return 0.02 + 0.001 * rows + 1e-6 * rows * context

    for _ in range(800):
        context, rows = draw.uniform(200, 4000), draw.choice((1, 2, 4, 8))
        costs.observe_verify(rows, context, noisy(draw, seconds(rows, context)))
    for rows, context in ((1, 500.0), (4, 3000.0), (8, 200.0), (6, 8000.0)):
        assert costs.verify(rows, context) == pytest.approx(seconds(rows, context), rel=0.12)
    run = costs.verify_run(3, 4, 1000.0)
    assert run == [costs.verify(rows, 1000.0) for rows in range(3, 7)]


def test_passes_of_a_draft_are_told_apart() -> None:
    """From totals alone, since drafts stop after different numbers of levels."""
    draw = random.Random(7)
    costs = StepCosts()
    costs.observe_verify(1, 100, 0.02)
    for _ in range(600):
        levels = draw.choice((1, 2, 3))
        costs.observe_draft(1, [2] * (levels - 1), noisy(draw, 0.002 + 0.0007 * (levels - 1)))
    assert costs.first(1) == pytest.approx(0.002, rel=0.12)
    assert costs.level(2) == pytest.approx(0.0007, rel=0.2)
    assert costs.draft(1, [2, 2]) == pytest.approx(costs.first(1) + 2 * costs.level(2))


def test_sane_before_anything_was_seen() -> None:
    """Rows cost a little and levels too; one real step sets the scale of all."""
    costs = StepCosts()
    ratio = costs.draft(1, [4, 4]) / costs.verify(1, 0.0)
    assert 0 < costs.verify(1, 0.0) < costs.verify(2, 0.0) < 1.5 * costs.verify(1, 0.0)
    assert 0.05 < ratio < 0.5
    costs.observe_verify(4, 100, 0.03)
    assert costs.verify(4, 100) == pytest.approx(0.03)
    assert 0.02 < costs.verify(1, 100) < 0.03 < costs.verify(8, 100)
    assert costs.draft(1, [4, 4]) / costs.verify(1, 0.0) == pytest.approx(ratio)


def test_sizes_of_the_grid() -> None:
    assert [grid_size(size) for size in range(1, 20)] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        10,
        10,
        12,
        12,
        14,
        14,
        16,
        16,
        16,
        20,
        20,
    ]
    assert calibration_sizes(40) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40]
    assert calibration_sizes(1) == [1]


def test_what_catching_up_costs_is_learned_apart() -> None:
    costs = StepCosts()
    costs.observe_verify(1, 100, 0.01)
    assert 0 < costs.catch_up(10) < costs.verify(1, 100), "before anything was seen"
    for _ in range(3):
        costs.observe_draft(1, [2], 0.002)
    usual = costs.draft(1, [2])
    costs.observe_catch_up(1, [2], 50, 0.002 + 0.005)
    assert costs.catch_up(20) == pytest.approx(0.002, rel=0.1)
    for _ in range(40):
        costs.observe_catch_up(2, [2, 2], 100, costs.draft(2, [2, 2]) + 0.02)
    assert costs.catch_up(20) == pytest.approx(0.004, rel=0.1)
    assert costs.draft(1, [2]) == usual, "and changes nothing else"
