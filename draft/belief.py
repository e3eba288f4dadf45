"""What a request's next tree will probably be worth, before it is drafted.

A belief is a *typical tree*: for every level the path values of its best nodes, best first. It is kept level
by level as ratios to the best value of the level before, so that a level that was not drafted for a while
keeps its proportion to those that were. Values in trees are calibrated for all requests together; what sets
one request apart (a language that the head hardly knows) is its *trust*: accepted over expected tokens.

A new request starts from what all requests of its mode, greedy or sampled, have shown.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_LEVELS, WIDTH = 16, 4  # levels, and nodes of a level, of a typical tree

Levels = Sequence[Sequence[float]]  # path values by level, best first within each

_UNSEEN = (0.6, 0.15, 0.06, 0.03)  # ratios before anything was drafted
_GAIN = 0.1  # weight of a tree that follows the last one directly
_FORGET = 0.97  # per step without a tree: the longer ago, the more the next one weighs
_MOST_GAIN = 0.5
_TRUST_TOKENS = 4.0  # expected tokens that the calibration's word counts for
_TRUST_FADE = 0.98  # per judged tree
_LEAST_TRUST, _MOST_TRUST = 0.25, 1.5


class Belief:
    """The typical tree of a request, or of a mode. ``start``: what to believe at first."""

    __slots__ = ("_accepted", "_before", "_expected", "_typical", "_values")

    def __init__(self, start: Belief | None = None) -> None:
        # Running means, of the same trees each: nodes' values, and the best value of the level before.
        self._values: list[list[float]] = [list(_UNSEEN) for _ in range(MAX_LEVELS)]
        self._before: list[float] = [1.0] * MAX_LEVELS
        if start is not None:
            self._values, self._before = [level[:] for level in start._values], start._before[:]
        self._expected, self._accepted = _TRUST_TOKENS, _TRUST_TOKENS
        self._typical: dict[int, list[list[float]]] = {}  # what ``typical`` found since it last changed

    @property
    def trust(self) -> float:
        """Accepted over expected tokens of late: what the request's values are to be multiplied by."""
        return min(max(self._accepted / self._expected, _LEAST_TRUST), _MOST_TRUST)

    def trusted(self, values: Sequence[float]) -> list[float]:
        """Path values or chances as they turn out for this request."""
        trust = self.trust
        return [min(value * trust, 1.0) for value in values]

    def levels(self, num_levels: int) -> list[list[float]]:
        """Typical path values of the first levels. No level's exceed the best of the level before."""
        best, found = 1.0, []
        for values, before in zip(self._values[:num_levels], self._before, strict=False):
            scale = best / before
            found.append([min(value * scale, best) for value in values])
            best = found[-1][0]
        return found

    def typical(self, num_levels: int) -> list[list[float]]:
        """``levels``, trusted. Asked in every step, and the same until something is learned."""
        if num_levels not in self._typical:
            self._typical[num_levels] = [self.trusted(level) for level in self.levels(num_levels)]
        return self._typical[num_levels]

    def chance(self, level: int) -> float:
        """That the best node of a level (from 2) is accepted if its parent was."""
        if level > MAX_LEVELS:
            return 0.0
        return min(self._values[level - 1][0] / self._before[level - 1], 1.0)

    def learn(self, drafted: Levels, steps_since: int = 0, slowness: float = 1.0) -> None:
        """Learn from a drafted tree, before anything is cut from it.

        drafted: calibrated path values by level, best first; steps_since: steps without a tree before it;
        slowness: divides its weight. Nodes that were not drafted keep their proportion to the last that was.
        """
        self._typical.clear()
        gain = min(1.0 - (1.0 - _GAIN) * _FORGET**steps_since, _MOST_GAIN) / slowness
        before = 1.0
        for level, values in enumerate(drafted[:MAX_LEVELS]):
            if not values or before <= 1e-6:
                return
            means = self._values[level]
            value = mean = 1.0
            for place in range(WIDTH):
                # A node that was not drafted is as far below the one before it as ever.
                value = values[place] if place < len(values) else value * means[place] / max(mean, 1e-9)
                mean = means[place]
                means[place] += gain * (value - mean)
            self._before[level] += gain * (before - self._before[level])
            before = values[0]

    def judge(self, expected: float, accepted: int) -> None:
        """Learn from a verdict: tokens that the scored nodes promised, and how many of them were accepted."""
        self._typical.clear()
        self._expected = _TRUST_TOKENS + _TRUST_FADE * (self._expected - _TRUST_TOKENS) + expected
        self._accepted = _TRUST_TOKENS + _TRUST_FADE * (self._accepted - _TRUST_TOKENS) + accepted
