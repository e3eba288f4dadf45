"""Where rows go and what they read: the worked example of the module, and every plan against the obvious one.

A plan is spelled out as what it means: for every node of every sequence, the slot it is written to and the
slots it sees.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.core import Batch, DraftTree, PromptChunk, Request, SamplingParams, Sequence
from engine.rows import (
    BatchRows,
    RowPlan,
    _own_words,
    _padded_rows,
    _prompt_rows,
    batch_rows,
    chain_bias,
    first_slot,
    join_plans,
    plan_chains,
    plan_own,
    plan_spans,
    span,
    tree_bias,
)
from engine.sampler import sampling_tensors
from engine.step import prompt_chain
from kernels.paged import TreeRows, seen_rows

Meaning = list[tuple[int, set[int]]]  # of every row: where it is written, what it sees


def batch_of(
    kv_lens: list[int], pages: list[list[int]], page_size: int, prompt: PromptChunk | None = None
) -> Batch:
    seqs = tuple(
        Sequence(Request(i, (0,), SamplingParams()), [0] * (n + 1), [], p)
        for i, (n, p) in enumerate(zip(kv_lens, pages, strict=True))
    )
    width = max(map(len, pages))
    return Batch(
        seqs,
        torch.tensor(kv_lens),
        torch.tensor([p + [0] * (width - len(p)) for p in pages]),
        page_size,
        sampling_tensors([SamplingParams()] * len(seqs), "cpu"),
        (),
        prompt,
    )


def tree_of(parents: list[list[int]]) -> DraftTree:
    """Trees padded to the largest."""
    width = max(map(len, parents))
    return DraftTree(
        torch.zeros(len(parents), width, dtype=torch.int64),
        torch.tensor([row + [-1] * (width - len(row)) for row in parents]),
    )


def chunk_of(lengths: list[int]) -> PromptChunk:
    return PromptChunk(
        torch.zeros(len(lengths), max(lengths), dtype=torch.int64),
        torch.tensor(lengths),
        torch.full((len(lengths),), -1),
        tuple(lengths),
    )


def meaning(plan: RowPlan) -> Meaning:
    """What a plan says of its rows."""
    write = plan.write
    slots = list(range(write.start, write.stop)) if isinstance(write, slice) else write.tolist()
    found: Meaning = []
    for part in plan.parts:
        read_of, bias_of = part.read, part.bias
        if part.tree is not None:
            read_of, bias_of = seen_rows(part.tree, part.num_nodes)
        for seq in range(part.num_seqs):
            read = read_of[seq]
            readable = list(range(read.start, read.stop)) if isinstance(read, slice) else read.tolist()
            for node in range(part.num_nodes):
                seen = readable
                if bias_of is not None:
                    row = bias_of[seq, node, : len(readable)].tolist()
                    assert set(row) <= {0.0, float("-inf")}
                    seen = [slot for slot, bias in zip(readable, row, strict=True) if bias == 0]
                found.append((slots[len(found)], set(seen)))
    assert len(found) == len(slots)
    return found


def expected(batch: Batch, parents: list[list[int]]) -> Meaning:
    """The same from the definition: node i lies at row kv_len + i and sees the committed rows, itself and its
    ancestors."""
    found: Meaning = []
    for seq, own in zip(batch.seqs, parents, strict=True):
        at = [page * batch.page_size + row for page in seq.pages for row in range(batch.page_size)]
        for node in range(len(own)):
            seen, up = set(at[: seq.kv_len]), node
            while up >= 0:
                seen.add(at[seq.kv_len + up])
                up = own[up]
            found.append((at[seq.kv_len + node], seen))
    return found


def test_the_example_of_the_docstring() -> None:
    decodes = batch_rows(batch_of([5], [[3, 4]], 4), tree_of([[-1, 0, 0]]))
    batch = batch_of([0], [[6]], 4, chunk_of([2]))
    prompts = batch_rows(batch, prompt_chain(batch))
    plan = join_plans([decodes.plan, prompts.plan])
    assert isinstance(plan.write, Tensor)
    assert plan.write.tolist() == [17, 18, 19, 24, 25]
    assert [(part.num_seqs, part.num_nodes) for part in plan.parts] == [(1, 3), (1, 2)]
    first = set(range(12, 17))
    assert meaning(plan) == [
        (17, first | {17}),
        (18, first | {17, 18}),
        (19, first | {17, 19}),
        (24, {24}),
        (25, {24, 25}),
    ]


def test_plain_decoding_reads_in_place_and_shares_a_part() -> None:
    """Consecutive pages are runs; neighbours of one size are one part, written at once if they can be."""
    found = batch_rows(batch_of([5, 3, 6], [[3, 4], [5], [9, 8]], 4), tree_of([[-1], [-1], [-1]]))
    assert found.num_rows == 3
    assert [(part.num_seqs, part.bias) for part in found.plan.parts] == [(2, None), (1, None)]
    assert found.plan.parts[0].read == (slice(12, 18), slice(20, 24))
    alone = batch_rows(batch_of([5], [[3, 4]], 4), tree_of([[-1]]))
    assert alone.plan.write == slice(17, 18)
    side_by_side = batch_rows(batch_of([3, 0], [[1], [2]], 4), tree_of([[-1], [-1]]))
    assert side_by_side.plan.write == slice(7, 9)


def random_batch(draw: random.Random, num_seqs: int, sizes: list[int]) -> Batch:
    """Sequences of any length on pages in order, or in none, with room for ``sizes`` nodes."""
    page_size = draw.choice([1, 2, 5])
    kv_lens = [draw.randrange(12) for _ in sizes]
    order, pages = list(range(1, 200)), []
    if draw.random() < 0.5:
        draw.shuffle(order)
    for kv_len, size in zip(kv_lens, sizes, strict=True):
        count = -(-(kv_len + size) // page_size)
        pages.append(order[:count])
        del order[:count]
    return batch_of(kv_lens, pages, page_size)


@given(st.randoms(use_true_random=False), st.lists(st.integers(1, 7), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_ragged_trees(draw: random.Random, sizes: list[int]) -> None:
    """On a host without padding, on a device with it: both mean what the definition says."""
    batch = random_batch(draw, len(sizes), sizes)
    parents = [[-1] + [draw.randrange(node) for node in range(1, size)] for size in sizes]
    tree = tree_of(parents)
    packed = batch_rows(batch, tree)
    assert packed.num_rows == sum(sizes)
    assert meaning(packed.plan) == expected(batch, parents)
    padded = _padded_rows(batch, tree)
    assert padded.num_rows == tree.tokens.numel()
    real = [bool(node) for node in tree.real().flatten()]
    of_padding = [slot for is_real, (slot, _) in zip(real, meaning(padded.plan), strict=True) if not is_real]
    assert all(0 <= slot < batch.page_size for slot in of_padding), "padding is written to the dummy page"
    of_nodes = [row for is_real, row in zip(real, meaning(padded.plan), strict=True) if is_real]
    assert of_nodes == expected(batch, parents)


@given(st.randoms(use_true_random=False), st.lists(st.integers(1, 9), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_ragged_chunks(draw: random.Random, sizes: list[int]) -> None:
    seqs = random_batch(draw, len(sizes), sizes)
    batch = batch_of(
        [s.kv_len for s in seqs.seqs], [s.pages for s in seqs.seqs], seqs.page_size, chunk_of(sizes)
    )
    for rows in (batch_rows, _prompt_rows):  # on a host, on a device
        found = rows(batch, prompt_chain(batch))
        assert found.num_rows == sum(sizes)
        assert meaning(found.plan) == expected(batch, [list(range(-1, size - 1)) for size in sizes])


@given(st.randoms(use_true_random=False), st.lists(st.integers(1, 9), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_chains_of_a_head(draw: random.Random, sizes: list[int]) -> None:
    """Through page tables as through slots: from any row on, and never from row 0, which a head has not."""
    batch = random_batch(draw, len(sizes), sizes)
    firsts = [seq.kv_len or 1 for seq in batch.seqs]
    counts = [size if seq.kv_len else 1 for seq, size in zip(batch.seqs, sizes, strict=True)]
    spans = [
        span(seq.pages, batch.page_size, first, chain_bias(count), start=1)
        for seq, first, count in zip(batch.seqs, firsts, counts, strict=True)
        if first + count <= len(seq.pages) * batch.page_size
    ]
    if len(spans) < len(sizes):
        return
    found = plan_chains(batch.page_table, batch.page_size, torch.tensor(firsts), counts, start=1)
    assert meaning(found) == meaning(plan_spans(spans, torch.device("cpu")))


@given(st.randoms(use_true_random=False), st.integers(1, 3), st.integers(1, 4), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_own_rows_in_words_and_in_a_mask(
    draw: random.Random, num_seqs: int, num_nodes: int, num_own: int
) -> None:
    batch = random_batch(draw, num_seqs, [num_own] * num_seqs)
    longest = max(seq.kv_len for seq in batch.seqs)
    start = draw.randint(0, min([1] + [seq.kv_len for seq in batch.seqs]))  # a head has no row 0
    rows = TreeRows(batch.page_table, batch.page_size, batch.kv_lens, None, num_own, start=start)
    own = torch.tensor(
        [[[draw.random() < 0.5 for _ in range(num_own)] for _ in range(num_nodes)] for _ in range(num_seqs)]
    )
    write = torch.arange(num_seqs * num_nodes).view(num_seqs, num_nodes)
    assert meaning(_own_words(write, rows, own)) == meaning(plan_own(write, rows, own, longest))


def test_padding_is_packed_away_and_comes_back_as_the_last_node() -> None:
    found = batch_rows(batch_of([1, 2, 3], [[1], [2], [3]], 6), tree_of([[-1, 0, 0], [-1], [-1, 0]]))
    nodes = torch.tensor([[10, 11, 12], [20, 0, 0], [30, 31, 0]])
    rows = found.pack(nodes)
    assert rows.tolist() == [10, 11, 12, 20, 30, 31]
    assert found.unpack(rows).tolist() == [[10, 11, 12], [20, 20, 20], [30, 31, 31]]
    assert found.last(rows).tolist() == [12, 20, 31]
    wide = rows[:, None].expand(-1, 4)
    assert found.unpack(wide).shape == (3, 3, 4)
    full = BatchRows((2, 3), found.plan)
    assert full.unpack(full.pack(nodes[:2])).tolist() == nodes[:2].tolist()
    assert full.last(full.pack(nodes[:2])).tolist() == [12, 0]


def test_a_head_reads_from_row_one() -> None:
    plan = plan_spans(
        [span([2, 3], 4, 3, chain_bias(2), start=1), span([9, 5], 4, 4, None, start=1)], torch.device("cpu")
    )
    assert meaning(plan) == [(11, {9, 10, 11}), (12, {9, 10, 11, 12}), (20, {37, 38, 39, 20})]


def test_rows_that_nobody_reserved_are_not_planned() -> None:
    with pytest.raises(AssertionError, match="rows up to 9 on 2 pages of 4"):
        batch_rows(batch_of([6], [[1, 2]], 4), tree_of([[-1, 0, 0]]))


@given(parents=st.lists(st.integers(0, 9), max_size=9))
@settings(deadline=None)
def test_bias_of_a_tree(parents: list[int]) -> None:
    parents = [-1] + [parent % (node + 1) for node, parent in enumerate(parents)]
    bias = tree_bias(parents)
    if bias is None:
        assert len(parents) == 1
        return
    assert torch.equal(bias == 0, tree_of([parents]).ancestors()[0])
    chain = chain_bias(len(parents))
    assert chain is not None
    assert torch.equal(chain == 0, tree_of([list(range(-1, len(parents) - 1))]).ancestors()[0])


def test_consecutive_pages() -> None:
    assert first_slot([3, 4, 5], 16) == 48
    assert first_slot([3], 4) == 12
    assert first_slot([3, 5], 4) is None
    assert first_slot([5, 4], 4) is None
    assert first_slot([], 4) is None
