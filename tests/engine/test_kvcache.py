"""Where rows go: the worked example of the module, and moves in a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.core import Batch, DraftTree, Request, SamplingParams, Sequence, Verdict
from engine.kvcache import KVPool, accepted_slots, compact, plan_rows
from engine.sampler import sampling_tensors


def batch_of(kv_lens: list[int], pages: list[list[int]], page_size: int) -> Batch:
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
    )


def as_list(slots: Tensor | slice | tuple[slice, ...]) -> list[list[int]]:
    if isinstance(slots, slice):
        return [list(range(slots.start, slots.stop))]
    if isinstance(slots, tuple):
        return [list(range(run.start, run.stop)) for run in slots]
    rows: list[list[int]] = slots.reshape(-1, slots.shape[-1]).tolist()
    return rows


def test_the_example_of_the_docstring() -> None:
    batch = batch_of([5], [[7, 2]], 4)
    tree = DraftTree(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[-1, 0, 0]]))
    plan = plan_rows(batch, tree)
    assert as_list(plan.write) == [[9, 10, 11]]
    assert as_list(plan.read) == [[28, 29, 30, 31, 8, 9, 10, 11]]
    assert plan.bias is not None
    seen = (plan.bias[0] == 0).tolist()
    assert seen == [[True] * 6 + [False, False], [True] * 7 + [False], [True] * 6 + [False, True]]
    source, destination = accepted_slots(
        batch, Verdict(torch.tensor([[0, 2, -1]]), torch.tensor([2]), torch.tensor([0]))
    )
    assert (source.tolist(), destination.tolist()) == ([11], [10])


def test_consecutive_pages_are_read_in_place() -> None:
    tree = DraftTree(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[-1]]))
    plan = plan_rows(batch_of([5], [[3, 4]], 4), tree)
    assert plan.read == (slice(12, 18),)
    assert plan.write == slice(17, 18)
    assert plan.bias is None


def test_padding_is_written_to_the_dummy_page() -> None:
    batch = batch_of([3, 1], [[1, 2], [5]], 4)
    tree = DraftTree(torch.zeros(2, 4, dtype=torch.int64), torch.tensor([[-1, 0, 1, 1], [-1, 0, -1, -1]]))
    plan = plan_rows(batch, tree)
    write = as_list(plan.write)[0]
    assert write[:4] == [7, 8, 9, 10]
    assert write[4:6] == [21, 22]
    assert all(0 <= slot < 4 for slot in write[6:])
    assert plan.bias is not None
    short = plan.bias[1] == 0
    assert short[1].nonzero()[:, 0].tolist() == [0, 1, 2]  # one committed row, the root and itself


def test_compact_moves_every_sequence_at_once() -> None:
    """Rows across page borders, one sequence that moves nothing, one whose moves overlap."""
    batch = batch_of([3, 0, 6], [[4, 2], [1, 6], [3, 5, 7]], 4)
    pool = KVPool(2, 1, 3, 40, torch.float32, "cpu")
    pool.rows.copy_(torch.randn(pool.rows.shape))
    before = pool.rows.clone()
    path = torch.tensor([[0, 1, 2, -1, -1], [0, 2, 3, 4, -1], [0, 4, -1, -1, -1]])
    compact(pool, batch, Verdict(path, torch.tensor([3, 4, 2]), torch.zeros(3, dtype=torch.int64)))
    expected = before.clone()
    for row, seq in enumerate(batch.seqs):
        for place, node in enumerate(path[row].tolist()):
            if node >= 0:
                old, new = seq.kv_len + node, seq.kv_len + place
                expected[:, :, :, seq.pages[new // 4] * 4 + new % 4] = before[
                    :, :, :, seq.pages[old // 4] * 4 + old % 4
                ]
    assert torch.equal(pool.rows, expected)


def test_bytes_per_slot() -> None:
    pool = KVPool(3, 2, 8, 10, torch.bfloat16, "cpu")
    assert KVPool.bytes_per_slot(3, 2, 8, torch.bfloat16) * 10 == pool.rows.numel() * 2
    keys, values = pool.layer(2)
    assert keys.shape == values.shape == (2, 10, 8)
