"""What a batch teaches: the loss over all unrolled steps, against the target's own distributions.

The target's logits follow from the last feature (the last layer's output before the final norm), so they are
recomputed here over the draft vocabulary only, once per row, and looked up by every step: chain start i at
step k predicts what row i + k predicts.

A row counts as much as the target's probability of staying inside the draft vocabulary, where its
distribution is renormalised. That mass would need the target's whole vocabulary, six times the draft's; but
the next token was drawn by the target, so "it lies inside" is a one-sample estimate of the mass, and costs
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draft.train.batches import TrainBatch
from draft.train.loss import SoftTargets
from draft.train.model import Eagle3Module
from draft.train.unroll import unroll


@dataclass(frozen=True, slots=True)
class TargetSide:
    """The frozen parts of the target that training reads."""

    embedding: Tensor  # [V, H]
    norm: Tensor  # [H] the final norm
    head_rows: Tensor  # [draft vocabulary, H] output rows
    eps: float


@dataclass(frozen=True, slots=True)
class Objective:
    """How the steps are weighed. ``chain_share``: which share of the rows goes on past step 0, drawn anew
    each time.
    """

    num_steps: int = 5
    decay: float = 0.8
    chain_share: float = 0.5

    def __call__(
        self, head: Eagle3Module, target: TargetSide, batch: TrainBatch, generator: torch.Generator
    ) -> Tensor:
        """Mean loss of a batch in nats: weighted mean over steps of the mean over rows."""
        rows = batch.loss.nonzero()
        table = target_table(target, batch, rows)
        place = torch.full(batch.loss.shape, -1, device=rows.device)
        place[rows[:, 0], rows[:, 1]] = torch.arange(rows.shape[0], device=rows.device)
        inside = head.t2d[batch.tokens[rows[:, 0], rows[:, 1] + 2]].to(table.dtype)
        targets = SoftTargets(table, head.lm_head.weight)
        keep = torch.rand(batch.loss.shape, generator=generator).to(rows.device) < self.chain_share
        total = table.new_zeros(())
        for step in unroll(head, target.embedding, batch, self.num_steps, keep):
            row = (step.start + step.step).clamp(max=batch.num_rows - 1)
            index = place[step.document, row].clamp(min=0)
            scale = inside[index] * step.exists * (self.decay**step.step / step.exists.sum().clamp(min=1))
            total = total + targets.cross_entropy(head.norm(step.hidden), index, scale)
        return total / sum(self.decay**k for k in range(self.num_steps))


@torch.no_grad()
def target_table(target: TargetSide, batch: TrainBatch, rows: Tensor) -> Tensor:
    """The target's distribution over the draft vocabulary at the given rows. rows: [M, 2] -> [M, vocabulary]
    float.
    """
    hidden_size = target.norm.shape[0]
    feature = batch.features[rows[:, 0], rows[:, 1] + 1, -hidden_size:]
    normed = torch.rms_norm(feature, (hidden_size,), target.norm, target.eps)
    logits = normed @ target.head_rows.t()
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return logits.softmax(-1)
