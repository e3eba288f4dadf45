"""Prompt lookup against the slow way to say it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draft.ngram import NgramDraft, NgramIndex
from draft.none import NoDraft
from engine.core import Batch, Request, SamplingParams, Sequence, Speculation
from engine.sampler import sampling_tensors


def slow_lookup(tokens: list[int], num_tokens: int) -> list[int]:
    """Longest suffix of 4, 3, 2 tokens that occurs earlier; of its occurrences the last one."""
    for size in (4, 3, 2):
        ends = [
            end
            for end in range(size, len(tokens))
            if tokens[end - size : end] == tokens[len(tokens) - size :]
        ]
        if len(tokens) > size and ends:
            return tokens[ends[-1] : ends[-1] + num_tokens]
    return []


def lookup(tokens: list[int], num_tokens: int) -> list[int]:
    return NgramIndex().continuation(tokens, num_tokens)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=25), st.integers(1, 6), st.lists(st.integers(1, 5), max_size=8))
def test_lookup(tokens: list[int], num_tokens: int, growth: list[int]) -> None:
    assert lookup(tokens, num_tokens) == slow_lookup(tokens, num_tokens)
    index, end = NgramIndex(), 0
    for step in growth:  # the same from an index that has grown along
        end += step
        assert index.continuation(tokens[:end], num_tokens) == slow_lookup(tokens[:end], num_tokens)


def test_examples() -> None:
    assert lookup([5, 6, 7, 8, 5, 6], 9) == [7, 8, 5, 6]
    assert lookup([1, 2, 9, 1, 2, 8, 1, 2], 1) == [8]  # the most recent one
    assert lookup([3, 3, 3], 4) == [3]
    assert lookup([1, 2, 3], 4) == lookup([], 4) == lookup([7], 4) == []
    assert lookup([1, 2] + list(range(10, 4000)) + [1, 2], 2) == [10, 11]


def test_nothing_is_kept_of_a_sequence_that_ended() -> None:
    draft = NgramDraft()
    batch = batch_of([[1, 2, 3, 1, 2]], [Speculation(4, 3, 1)])
    assert draft.propose(batch).tokens.tolist() == [[2, 3, 1, 2]]
    draft.forget(batch.seqs[0])
    assert draft.propose(batch_of([[7, 8, 9, 7, 8]], [Speculation(4, 3, 1)])).tokens.tolist() == [
        [8, 9, 7, 8]
    ]


def batch_of(tokens: list[list[int]], specs: list[Speculation]) -> Batch:
    seqs = tuple(Sequence(Request(i, (0,), SamplingParams()), t, []) for i, t in enumerate(tokens))
    return Batch(
        seqs,
        torch.tensor([seq.kv_len for seq in seqs]),
        torch.zeros(len(seqs), 1, dtype=torch.int64),
        4,
        sampling_tensors([SamplingParams()] * len(seqs), "cpu"),
        tuple(specs),
    )


def test_chains_of_a_batch() -> None:
    repeat = [1, 2, 3, 4, 5, 1, 2]
    specs = [
        Speculation(8, 9, 1),
        Speculation(3, 9, 1),
        Speculation(8, 1, 4),
        Speculation(1, 0, 1),
        Speculation(8, 4, 1),
    ]
    tree = NgramDraft().propose(batch_of([repeat] * 4 + [[9, 8, 7]], specs))
    assert tree.tokens.tolist() == [
        [2, 3, 4, 5, 1, 2],
        [2, 3, 4, 0, 0, 0],
        [2, 3, 0, 0, 0, 0],
        [2] + [0] * 5,
        [7] + [0] * 5,
    ]
    assert (
        tree.parents.tolist()
        == [[-1, 0, 1, 2, 3, 4], [-1, 0, 1, -1, -1, -1], [-1, 0, -1, -1, -1, -1]] + [[-1] * 6] * 2
    )
    assert [NgramDraft().scratch_rows(spec) for spec in specs] == [7, 2, 7, 0, 7]


def test_none_is_the_root_alone() -> None:
    batch = batch_of([[4, 5], [6]], [Speculation()] * 2)
    tree = NoDraft().propose(batch)
    assert tree.tokens.tolist() == [[5], [6]]
    assert tree.parents.tolist() == [[-1], [-1]]
    assert NoDraft().scratch_rows(Speculation()) == 0
