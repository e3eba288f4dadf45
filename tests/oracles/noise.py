"""What Gumbel noise must look like, whichever integer hash makes it.

ARCHITECTURE.md section 5 promises a pure function of (seed, position, token id). An oracle for it is not
another copy of the hash but the properties that sampling rests on: the marginal distribution, no dependence
along any of the three axes, and that Gumbel argmax draws a token with exactly its probability. Each function
returns a number in units of its own standard error, so that a test compares with the same small bound (5 is
one false alarm in two million).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def ks_score(noise: Array) -> float:
    """sqrt(n) times the Kolmogorov-Smirnov distance to the Gumbel law exp(-exp(-x)). Above 2.2: p < 1e-4."""
    ordered = np.sort(noise.ravel())
    cdf = np.exp(-np.exp(-ordered))
    ranks = np.arange(len(ordered) + 1) / len(ordered)
    distance = max(float(np.max(np.abs(ranks[1:] - cdf))), float(np.max(np.abs(cdf - ranks[:-1]))))
    return math.sqrt(len(ordered)) * distance


def correlation_score(left: Array, right: Array) -> float:
    """Absolute rank-free correlation of two equally long samples in standard errors (1 / sqrt(n)).

    Taken on the uniforms exp(-exp(-x)), whose tails are bounded.
    """
    left_uniform = np.exp(-np.exp(-left.ravel())) - 0.5
    right_uniform = np.exp(-np.exp(-right.ravel())) - 0.5
    return abs(float(np.mean(left_uniform * right_uniform))) * 12 * math.sqrt(left.size)


def neighbour_scores(noise: Array) -> list[float]:
    """Correlation of neighbours along every axis of a grid such as [seeds, positions, tokens]."""
    scores = []
    for axis in range(noise.ndim):
        length = noise.shape[axis]
        left, right = noise.take(range(length - 1), axis), noise.take(range(1, length), axis)
        scores.append(correlation_score(left, right))
    return scores


def frequency_score(picked: Sequence[int] | NDArray[np.int64], probs: Array) -> float:
    """How far drawn tokens are from their probabilities: the chi-square statistic as a normal score.

    Tokens expected fewer than 5 times are pooled, as the chi-square approximation demands.
    """
    counts = np.bincount(np.asarray(picked), minlength=len(probs)).astype(np.float64)
    expected = probs * counts.sum()
    rare = expected < 5
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    chi_square = float(np.sum((counts - expected) ** 2 / expected))
    return (chi_square - freedom) / math.sqrt(2 * freedom)
