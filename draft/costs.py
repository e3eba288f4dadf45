"""What a step costs, learned from the steps that run anyway.

A step of the target takes ``verify(rows, context)`` seconds: a curve over all rows of the step, whatever
sequences they belong to, plus attention, which grows with rows x context. A draft takes a first pass of the
head over its sequences and a pass for every further level.

The curves have no formula, because none fits all machines: rows may be free until a knee, cost a straight
line, or, where the target is a mixture of experts, jump from the first to the second and flatten after. A
``Curve`` therefore knows a value for each seen size, makes them non-decreasing, and draws lines in between.
Beyond the largest seen size it goes on with the slope of the speculative sizes alone: the first row's jump
says nothing about them.

Most of what changes on a live machine changes all sizes alike (clocks, neighbours), and at any time only few
sizes are visited. So a curve is *pace x shape*: the pace follows the last few steps whatever their size, the
shape follows slowly, size by size. Times are compared as logarithms and far ones count no more than near
ones, so that a compilation or a hiccup is a shrug.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from draft.calibration import isotonic

# Before a size was seen: every further row costs this share of the first one, and a pass of the head this
# share of a target step of one row.
_PRIOR_ROW, _PRIOR_PASS = 0.05, 0.05
_FIRST = 3  # samples of a size of which the (lower) median is taken; later ones nudge it
_NUDGE = 1 / 16  # how far a later sample moves a size's value
_FAR = 0.25  # log units past which a sample counts no further: 28%
_PACE_STEPS = 9  # the pace is the median surprise of so many steps
_PACE_SHARE = 0.9  # the rest of a lasting surprise goes to the shape of the sizes that showed it
_LEAST_PACE = 0.1  # log units: a smaller median surprise is noise
_MOST_WEIGHT = 16
_PAIR_GAIN = 1 / 8
_REFRESH = 16  # samples between rebuilds of a curve's table

Floats = NDArray[np.float64]


def grid_size(size: int) -> int:
    """The size under which a size is kept: itself up to 8, then the nearest of four per octave."""
    if size <= 8:
        return size
    step = 1 << (size.bit_length() - 3)
    return (size + step // 2) // step * step


def calibration_sizes(max_rows: int) -> list[int]:
    """Numbers of rows that a calibration at start-up should time, ``_FIRST`` times each, smallest first.

    Two per octave, so that a knee is found within a third: 1, 2, 3, 4, 6, 8, 12, .. up to max_rows.
    """
    sizes = sorted({*(1 << n for n in range(20)), *(3 << n for n in range(20))})
    return [size for size in sizes if size < max_rows] + [max_rows]


def prior_shape(size: int) -> float:
    """Seconds of a size in units of size 1, as long as nothing is known."""
    return 1.0 + _PRIOR_ROW * (size - 1)


@dataclass(slots=True)
class _Seen:
    """What is known of one size: log seconds at pace 1."""

    first: list[float] = field(default_factory=list)  # sorted
    value: float = 0.0
    count: int = 0


class Curve:
    """Seconds by size (a positive integer); sizes seen so far decide, ``prior_shape`` fills in the rest."""

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}
        self._surprises = deque([0.0] * _PACE_STEPS, maxlen=_PACE_STEPS)
        self._pace = 1.0
        self._fit: tuple[Floats, Floats, float] | None = None
        self._table: list[float] = []  # seconds of sizes 0, 1, .. at pace 1; 0 costs what 1 does
        self._since_refresh = 0

    @property
    def is_known(self) -> bool:
        return bool(self._seen)

    def observe(self, size: int, seconds: float) -> None:
        """Learn from one pass."""
        at = grid_size(size)
        place = math.log(seconds)
        if self._seen and at != size:  # as if it had been of the size under which it is kept
            place += math.log(self(at) / self(size))
        seen = self._seen.setdefault(at, _Seen())
        seen.count += 1
        if seen.count <= _FIRST:
            insort(seen.first, place - math.log(self._pace))
            seen.value = seen.first[(seen.count - 1) // 2]
            self._since_refresh = _REFRESH
        else:
            surprise = place - seen.value
            self._surprises.append(surprise)
            usual = sorted(self._surprises)[_PACE_STEPS // 2]
            pace = _PACE_SHARE * usual if abs(usual) > _LEAST_PACE else 0.0
            self._pace = math.exp(pace)
            seen.value += _NUDGE * min(max(surprise - pace, -_FAR), _FAR)
            self._since_refresh += 1
        if self._since_refresh >= _REFRESH:
            self._fit, self._table, self._since_refresh = None, [], 0

    def __call__(self, size: int) -> float:
        """Seconds of one size."""
        if size >= len(self._table):
            self._build(size)
        return self._pace * self._table[size]

    def run(self, first: int, count: int) -> list[float]:
        """Seconds of ``count`` sizes from ``first`` on."""
        if first + count > len(self._table):
            self._build(first + count)
        pace = self._pace
        return [pace * seconds for seconds in self._table[first : first + count]]

    def _build(self, largest: int) -> None:
        """Tabulate all sizes up to at least ``largest``."""
        if self._fit is None:
            self._fit = self._fitted()
        sizes, seconds, slope = self._fit
        largest = max(largest, int(sizes[-1]), 63)
        all_sizes = np.arange(1 << largest.bit_length(), dtype=np.float64)
        table = np.interp(all_sizes, sizes, seconds)
        below, above = all_sizes < sizes[0], all_sizes > sizes[-1]
        prior = np.maximum(1.0 + _PRIOR_ROW * (all_sizes - 1), 1.0)
        table[below] = seconds[0] * prior[below] / prior[int(sizes[0])]
        table[above] = seconds[-1] + slope * (all_sizes[above] - sizes[-1])
        self._table = table.tolist()

    def _fitted(self) -> tuple[Floats, Floats, float]:
        """Seen sizes, their seconds made non-decreasing, and seconds per row beyond them; all at pace 1."""
        assert self._seen, "a curve is asked only after something was seen"
        sizes = sorted(self._seen)
        weights = np.asarray([min(self._seen[size].count, _MOST_WEIGHT) ** 2.0 for size in sizes])
        seconds = np.exp(isotonic(np.asarray([self._seen[size].value for size in sizes]), weights))
        places = np.asarray(sizes, dtype=np.float64)
        slope = _slope(places, seconds, weights)
        if slope is None:
            slope = float(seconds[-1]) * _PRIOR_ROW / prior_shape(sizes[-1])
        return places, seconds, slope


def _slope(sizes: Floats, seconds: Floats, weights: Floats) -> float | None:
    """Seconds per row over the upper half of the seen speculative sizes; None if fewer than two were seen."""
    upper = (sizes >= 2) & (sizes >= sizes[-1] / 4)
    if upper.sum() < 2:
        return None
    x, y, weight = sizes[upper], seconds[upper], weights[upper]
    x = x - np.average(x, weights=weight)
    return max(float((weight * x * y).sum() / (weight * x * x).sum()), 0.0)


class _Attention:
    """Seconds per row and token of context: how step times vary with rows x context within a size.

    Each size has its own mean (a fixed effect), all share the slope; old steps fade.
    """

    _FADE, _WINDOW = 0.998, 256
    _PRIOR = 1e7  # (rows x tokens) squared that must have been seen before a slope is believed

    def __init__(self) -> None:
        self._means: dict[int, tuple[float, float, int]] = {}  # size -> rows x context, seconds, samples
        self._products, self._squares = 0.0, 0.0

    @property
    def slope(self) -> float:
        return max(self._products, 0.0) / (self._squares + self._PRIOR)

    def observe(self, rows: int, context: float, seconds: float) -> None:
        size, amount = grid_size(rows), rows * context
        mean_amount, mean_seconds, count = self._means.get(size, (amount, seconds, 0))
        count = min(count + 1, self._WINDOW)
        surprise = min(max(seconds - mean_seconds, -mean_seconds / 2), mean_seconds / 2)
        before, after = amount - mean_amount, (amount - mean_amount) * (1 - 1 / count)
        self._products = self._FADE * self._products + after * surprise
        self._squares = self._FADE * self._squares + before * after
        self._means[size] = (mean_amount + before / count, mean_seconds + surprise / count, count)


class StepCosts:
    """Live costs of target and draft; seconds. ``verify`` holds all of a step but the draft.

    Before the first step was seen the unit is a target step of one row instead.
    """

    def __init__(self) -> None:
        self._rows, self._first, self._level = Curve(), Curve(), Curve()
        self._attention = _Attention()
        self._pair: float | None = None  # seconds

    def verify(self, num_rows: int, context: float) -> float:
        """Seconds of a target step of so many rows in all, behind ``context`` tokens on average."""
        return self.verify_run(num_rows, 1, context)[0]

    def verify_run(self, first: int, count: int, context: float) -> list[float]:
        """The same for ``count`` numbers of rows from ``first`` on."""
        if not self._rows.is_known:
            return [prior_shape(rows) for rows in range(first, first + count)]
        per_row = self._attention.slope * context
        runs = enumerate(self._rows.run(first, count), start=first)
        return [seconds + per_row * rows for rows, seconds in runs]

    def draft(self, num_seqs: int, level_rows: Sequence[int]) -> float:
        """Seconds of a draft: the first pass over num_seqs sequences, then a level of each number of rows."""
        seconds = self.first(num_seqs)
        level, before = 0.0, -1
        for rows in level_rows:  # most levels are as wide as the one before
            if rows != before:
                level, before = self.level(rows), rows
            seconds += level
        return seconds

    def first(self, num_seqs: int) -> float:
        """Seconds of a draft's first pass, which offers the first level."""
        return self._pass(self._first, num_seqs)

    def level(self, num_rows: int) -> float:
        """Seconds of every further level."""
        return self._pass(self._level, num_rows)

    def catch_up(self, num_pairs: int) -> float:
        """Seconds that a first pass takes longer where so many pairs have been waiting."""
        pair = _PRIOR_ROW * self.first(1) if self._pair is None else self._pair
        return num_pairs * pair

    def _pass(self, curve: Curve, size: int) -> float:
        if curve.is_known:
            return curve(size)
        return _PRIOR_PASS * prior_shape(size) * self.verify(1, 0.0)

    def observe_verify(self, num_rows: int, context: float, seconds: float) -> None:
        """Learn from the target's part of a step. ``num_rows`` counts prompt rows too, padding not."""
        attention = self._attention.slope * num_rows * context
        self._rows.observe(num_rows, max(seconds - attention, seconds / 5))
        self._attention.observe(num_rows, context, seconds)

    def observe_catch_up(
        self, num_seqs: int, level_rows: Sequence[int], num_pairs: int, seconds: float
    ) -> None:
        """Learn from a draft before which ``num_pairs`` pairs had been waiting: what it took more than
        usual."""
        pair = max(seconds - self.draft(num_seqs, level_rows), 0.0) / num_pairs
        self._pair = pair if self._pair is None else self._pair + _PAIR_GAIN * (pair - self._pair)

    def observe_draft(self, num_seqs: int, level_rows: Sequence[int], seconds: float) -> None:
        """Learn from a draft: the passes share what it took more or less than expected.

        Drafts of different numbers of levels tell the passes apart.
        """
        ratio = seconds / self.draft(num_seqs, level_rows)
        first = self.first(num_seqs)
        levels = [(rows, self.level(rows)) for rows in dict.fromkeys(level_rows)]
        self._first.observe(num_seqs, first * ratio)
        for rows, level in levels:
            self._level.observe(rows, level * ratio)
