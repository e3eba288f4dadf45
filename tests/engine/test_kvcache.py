"""Where accepted rows go: the worked example of the module, and moves in a batch."""

from __future__ import annotations

import torch

from engine.core import Verdict
from engine.kvcache import KVPool, accepted_slots, compact
from tests.engine.test_rows import batch_of


def test_the_example_of_the_docstring() -> None:
    verdict = Verdict(torch.tensor([[0, 2, -1]]), torch.tensor([2]), torch.tensor([0]))
    source, destination = accepted_slots(batch_of([5], [[7, 2]], 4), verdict)
    assert (source.tolist(), destination.tolist()) == ([11], [10])


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
