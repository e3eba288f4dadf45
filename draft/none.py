"""Plain decoding: the tree is the root alone."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from engine.core import Batch, Decision, DraftTree, Sequence, Speculation, StepCost, Verdict
from engine.roles import DraftMask


def root_tokens(batch: Batch) -> Tensor:
    """[B, 1] int64: the last committed token of every sequence."""
    if batch.roots is not None:
        return batch.roots[:, None]
    device = batch.kv_lens.device
    return torch.tensor([seq.tokens[-1] for seq in batch.seqs], dtype=torch.int64).to(device)[:, None]


def roots_alone(batch: Batch) -> DraftTree:
    """Trees of one node."""
    tokens = root_tokens(batch)
    return DraftTree(tokens, torch.full_like(tokens, -1))


class Unplanned:
    """The part of a draft (roles.Draft) that does what it is asked to, whatever that costs."""

    def plan(self, seqs: Items[Sequence], limits: Items[Speculation], num_other_rows: int) -> list[Decision]:
        """All that the limits allow."""
        return [Decision(limit, "request said off" if limit.is_off else "as asked") for limit in limits]

    def plan_ahead(self, batch: Batch, limits: Items[Speculation]) -> list[Decision] | None:
        """Nothing is drafted from a text that nobody knows yet."""
        return self.plan(batch.seqs, limits, 0) if all(limit.is_off for limit in limits) else None

    def propose_ahead(
        self, batch: Batch, before: Batch, tree: DraftTree, verdict: Verdict, features: Tensor
    ) -> DraftTree:
        return roots_alone(batch)

    def account(self, cost: StepCost) -> None:
        pass

    def start_over(self) -> None:
        pass


class NoDraft(Unplanned):
    """A draft (roles.Draft) that proposes nothing."""

    name = "none"
    rows = None

    def vocab_coverage(self) -> float | None:
        return None

    def scratch_rows(self, speculation: Speculation) -> int:
        return 0

    def plan_ahead(self, batch: Batch, limits: Items[Speculation]) -> list[Decision] | None:
        return self.plan(batch.seqs, limits, 0)

    def propose(self, batch: Batch, mask: DraftMask | None = None) -> DraftTree:
        return roots_alone(batch)

    def observe(self, batch: Batch, tree: DraftTree, verdict: Verdict, features: Tensor) -> None:
        pass

    def forget(self, seq: Sequence) -> None:
        pass
