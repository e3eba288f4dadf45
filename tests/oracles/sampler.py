"""Sampling written out for one row in numpy float64: the edits of a text so far, temperature, min_p, top-k,
top-p, then the noisy argmax.

Written from SPECULATION.md section 2: the order is vLLM's, every filter works on what the one before it
left. Ties: all tokens tied with the k-th best survive top-k; top-p takes tied tokens in order of their id;
the lowest id wins an argmax.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Row = NDArray[np.float64]


def softmax(row: Row) -> Row:
    """Probabilities of one row; -inf becomes 0."""
    exp = np.exp(row - row.max())
    probs: Row = exp / exp.sum()
    return probs


def edit(
    logits: ArrayLike,
    prompt: Sequence[int],
    answer: Sequence[int],
    *,
    ends: Sequence[int] = (),
    min_tokens: int = 0,
    bad_words: Sequence[Sequence[int]] = (),
    logit_bias: Sequence[tuple[int, float]] = (),
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
) -> Row:
    """[V] logits of the token after ``prompt`` and ``answer``. ends: the tokens that could end the answer."""
    row: Row = np.array(logits, dtype=np.float64)
    if len(answer) < min_tokens:
        for token in ends:
            row[token] = -np.inf
    for word in bad_words:
        before = list(word[:-1])
        if len(answer) >= len(before) and list(answer[len(answer) - len(before) :]) == before:
            row[word[-1]] = -np.inf
    for token, bias in logit_bias:
        row[token] += bias
    for token in {*prompt, *answer}:
        row[token] *= 1 / repetition_penalty if row[token] > 0 else repetition_penalty
    for token in set(answer):
        row[token] -= frequency_penalty * list(answer).count(token) + presence_penalty
    return row


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
