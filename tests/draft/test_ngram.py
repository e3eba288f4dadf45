"""Prompt lookup against the slow way to say it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draft.ngram import MAX_MATCH, MatchRates, NgramDraft, NgramIndex, PromptLookup
from draft.none import NoDraft
from engine.core import Batch, Grammar, Request, SamplingParams, Sequence, Speculation
from engine.sampler import sampling_tensors


def slow_lookup(tokens: list[int], num_tokens: int) -> list[int]:
    """Longest suffix of 4, 3, 2 tokens that occurs earlier; of its occurrences the last one. The list is
    thought to go on as it did there."""
    for size in (4, 3, 2):
        ends = [
            end
            for end in range(size, len(tokens))
            if tokens[end - size : end] == tokens[len(tokens) - size :]
        ]
        if len(tokens) > size and ends:
            longer = list(tokens)
            while len(longer) < len(tokens) + num_tokens:
                longer.append(longer[ends[-1] + len(longer) - len(tokens)])
            return longer[len(tokens) :]
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
    assert lookup([5, 6, 7, 8, 5, 6], 6) == [7, 8, 5, 6, 7, 8]
    assert lookup([1, 2, 9, 1, 2, 8, 1, 2], 1) == [8]  # the most recent one
    assert lookup([3, 3, 3], 4) == [3, 3, 3, 3]
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
        [2, 3, 4, 5, 1, 2, 3, 4],
        [2, 3, 4, 0, 0, 0, 0, 0],
        [2, 3, 0, 0, 0, 0, 0, 0],
        [2] + [0] * 7,
        [7] + [0] * 7,
    ]
    assert (
        tree.parents.tolist()
        == [[-1, 0, 1, 2, 3, 4, 5, 6], [-1, 0, 1] + [-1] * 5, [-1, 0] + [-1] * 6] + [[-1] * 8] * 2
    )
    assert [NgramDraft().scratch_rows(spec) for spec in specs] == [7, 2, 7, 0, 7]


def test_none_is_the_root_alone() -> None:
    batch = batch_of([[4, 5], [6]], [Speculation()] * 2)
    tree = NoDraft().propose(batch)
    assert tree.tokens.tolist() == [[5], [6]]
    assert tree.parents.tolist() == [[-1], [-1]]
    assert NoDraft().scratch_rows(Speculation()) == 0


def sequence_of(tokens: list[int], request_id: int = 0) -> Sequence:
    return Sequence(Request(request_id, (tokens[0],), SamplingParams(0.0)), list(tokens), [])


class TestRates:
    def test_longer_matches_go_on_more_often_until_shown_otherwise(self) -> None:
        rates = MatchRates()
        values = [rates(length) for length in range(2, MAX_MATCH + 1)]
        assert values == sorted(values)
        assert values[0] == 0.5
        for _ in range(200):
            rates.count(5, went_on=False)
        assert rates(5) < 0.1
        assert rates(4) == pytest.approx(4 / 6)
        assert rates(MAX_MATCH + 9) == rates(MAX_MATCH)

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.booleans(), max_size=60))
    def test_a_rate_is_a_share(self, outcomes: list[bool]) -> None:
        rates = MatchRates()
        for outcome in outcomes:
            rates.count(3, outcome)
            assert 0 < rates(3) < 1


class TestPromptLookup:
    def test_a_chain_is_as_long_as_it_is_likely(self) -> None:
        lookup = PromptLookup()
        short = lookup.propose(sequence_of([1, 2, 9, 8, 7, 6, 5, 4, 3, 1, 2]), 16)
        assert short is not None
        # 0.5, 0.5 * 0.6, .. * 0.667, .. * 0.714, .. * 0.75 is 0.107, the next one less than 0.1
        assert short.tokens == [9, 8, 7, 6, 5]
        assert short.chances == pytest.approx([1 / 2, 3 / 10, 1 / 5, 1 / 7, 3 / 28])
        sure = lookup.propose(sequence_of([1, 2, 3, 4, 5, 6, 7, 8] * 3, 1), 12)
        assert sure is not None
        assert sure.tokens == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4]
        assert sure.chances[0] == pytest.approx(MAX_MATCH / (MAX_MATCH + 2))

    def test_no_match_and_no_wish_give_nothing(self) -> None:
        lookup = PromptLookup()
        assert lookup.propose(sequence_of([1, 2, 3, 4]), 8) is None
        assert lookup.propose(sequence_of([1, 2, 1, 2]), 0) is None

    def test_outcomes_are_counted_once_up_to_the_first_mistake(self) -> None:
        lookup, seq = PromptLookup(), sequence_of([1, 2, 9, 8, 1, 2])
        before = [lookup.rates(seq)(length) for length in (2, 3, 4)]
        assert lookup.propose(seq, 3) is not None  # 9, 8, 1 after a match of two
        seq.tokens += [9, 7]
        lookup.propose(seq, 3)
        after = [lookup.rates(seq)(length) for length in (2, 3, 4)]
        assert after[0] > before[0]
        assert after[1] < before[1]
        assert after[2] == before[2]
        lookup.propose(seq, 3)
        assert [lookup.rates(seq)(length) for length in (2, 3, 4)] == after

    def test_kinds_of_answers_learn_apart(self) -> None:
        lookup = PromptLookup()
        tokens, kinds = [1, 2, 9, 8, 1, 2], [SamplingParams(0.0), SamplingParams(0.7)]
        kinds += [replace(kind, grammar=Grammar("json_object", "")) for kind in kinds]
        seqs = [Sequence(Request(i, (1,), kind), tokens[:], []) for i, kind in enumerate(kinds)]
        assert [lookup.rates(seq)(2) for seq in seqs] == [1 / 2, 2 / 5] * 2
        for place, seq in enumerate(seqs):
            before = [lookup.rates(seq)(2) for seq in seqs]
            lookup.propose(seq, 1)
            seq.tokens.append(7)
            lookup.propose(seq, 1)
            after = [lookup.rates(seq)(2) for seq in seqs]
            assert [old != new for old, new in zip(before, after, strict=True)] == [
                other == place for other in range(len(seqs))
            ]

    def test_a_sequence_that_started_over_is_indexed_anew(self) -> None:
        lookup = PromptLookup()
        lookup.propose(sequence_of([1, 2, 3, 1, 2]), 4)
        lookup.forget(sequence_of([1]))
        found = lookup.propose(sequence_of([7, 8, 9, 7, 8]), 4)
        assert found is not None
        assert found.tokens[0] == 9
