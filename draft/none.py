"""Plain decoding: the tree is the root alone."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.core import Batch, DraftTree, Sequence, Speculation, Verdict


def root_tokens(batch: Batch) -> Tensor:
    """[B, 1] int64: the last committed token of every sequence."""
    device = batch.kv_lens.device
    return torch.tensor([seq.tokens[-1] for seq in batch.seqs], dtype=torch.int64).to(device)[:, None]


class NoDraft:
    """A draft (core.Draft) that proposes nothing."""

    name = "none"
    rows = None

    def vocab_coverage(self) -> float | None:
        return None

    def scratch_rows(self, speculation: Speculation) -> int:
        return 0

    def propose(self, batch: Batch) -> DraftTree:
        tokens = root_tokens(batch)
        return DraftTree(tokens, torch.full_like(tokens, -1))

    def observe(self, batch: Batch, tree: DraftTree, verdict: Verdict, features: Tensor) -> None:
        pass

    def forget(self, seq: Sequence) -> None:
        pass
