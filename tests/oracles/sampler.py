"""Sampling written out for one row in numpy float64: temperature, min_p, top-k, top-p, then the noisy argmax.

Written from SPECULATION.md section 2: the order is vLLM's, every filter works on what the one before it
left. Ties: all tokens tied with the k-th best survive top-k; top-p takes tied tokens in order of their id;
the lowest id wins an argmax.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Row = NDArray[np.float64]


def softmax(row: Row) -> Row:
    """Probabilities of one row; -inf becomes 0."""
    exp = np.exp(row - row.max())
    probs: Row = exp / exp.sum()
    return probs


def process(
    logits: ArrayLike, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Row:
    """[V] log-probabilities after all filters, -inf where a token was removed. temperature > 0."""
    assert temperature > 0, "greedy rows are not processed"
    row: Row = np.asarray(logits, dtype=np.float64) / temperature
    if min_p > 0:
        probs = softmax(row)
        row = np.where(probs >= min_p * probs.max(), row, -np.inf)
    if 0 < top_k < len(row):
        kth_best = sorted(row, reverse=True)[top_k - 1]
        row = np.where(row >= kth_best, row, -np.inf)
    if top_p < 1:
        probs = softmax(row)
        kept: list[int] = []
        total = 0.0
        for token in sorted(range(len(row)), key=lambda token: (-probs[token], token)):
            kept.append(token)
            total += probs[token]
            if total >= top_p:
                break
        keep = np.zeros(len(row), dtype=bool)
        keep[kept] = True
        row = np.where(keep, row, -np.inf)
    with np.errstate(divide="ignore"):
        return np.log(softmax(row))


def choose(
    logits: ArrayLike,
    noise: ArrayLike,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """The sampler's token for one row. noise: [V] Gumbel noise, unused at temperature 0."""
    if temperature == 0:
        return int(np.argmax(np.asarray(logits, dtype=np.float64)))
    log_probs = process(logits, temperature, top_k, top_p, min_p)
    return int(np.argmax(log_probs + np.asarray(noise, dtype=np.float64)))
