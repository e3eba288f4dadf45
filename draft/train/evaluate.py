"""Held-out acceptance of a greedy chain, exact and without decoding anything.

A greedy answer is what the target would choose, so a draft token is accepted exactly if it equals the
recorded one and all earlier tokens of its chain did. As long as that holds, the recorded tokens are the
chain's own, so the unrolled forward of training gives every chain of every start at once. Acceptance lengths
follow by walking through each answer as the engine would: draft, accept a tokens, emit a + 1, start again
behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draft.train.batches import load_batch
from draft.train.model import Eagle3Module
from draft.train.shards import Dataset
from draft.train.unroll import unroll


@dataclass(frozen=True, slots=True)
class Acceptance:
    """by_depth[k]: share of chains accepted at depth k + 1 among those accepted up to depth k.
    lengths[K]: mean tokens emitted per step with chains of K draft tokens."""

    by_depth: tuple[float, ...]
    lengths: dict[int, float]
    num_documents: int
    num_tokens: int


@torch.no_grad()
def measure(
    head: Eagle3Module,
    embedding: Tensor,
    dataset: Dataset,
    documents: Sequence[int],
    num_steps: int,
    batch_tokens: int,
    chain_lengths: Sequence[int] = (4, 5),
) -> Acceptance:
    """Acceptance on greedy documents of a dataset, ``num_steps`` levels deep."""
    dtype, device = head.fc.weight.dtype, str(head.fc.weight.device)
    tried, accepted = torch.zeros(num_steps), torch.zeros(num_steps)
    emitted = dict.fromkeys(chain_lengths, 0)
    steps = dict.fromkeys(chain_lengths, 0)
    num_tokens = 0
    ordered = sorted(documents, key=lambda index: dataset.lengths[index])
    start = 0
    while start < len(ordered):
        end = start + 1
        while end < len(ordered) and (end + 1 - start) * dataset.lengths[ordered[end]] <= batch_tokens:
            end += 1
        batch = load_batch(dataset, ordered[start:end], dtype, device)
        start = end
        run = torch.zeros(
            batch.loss.shape, dtype=torch.int64, device=device
        )  # accepted so far, per chain start
        for step in unroll(head, embedding, batch, num_steps, batch.loss):
            row = (step.start + step.step).clamp(max=batch.num_rows - 1)
            guess = (head.norm(step.hidden) @ head.lm_head.weight.t()).argmax(-1)
            right = (guess + head.d2t[guess]) == batch.tokens[step.document, row + 2]
            alive = step.exists & (run[step.document, step.start] == step.step)
            tried[step.step] += float(alive.sum())
            accepted[step.step] += float((alive & right).sum())
            run[step.document, step.start] += alive & right
        for runs, rows in zip(run.tolist(), batch.loss.tolist(), strict=True):
            first = rows.index(True) if True in rows else len(rows)
            last = len(rows) - 1 - rows[::-1].index(True) if True in rows else -1
            num_tokens += last - first + 1
            for length in chain_lengths:
                emitted[length] += last - first
                steps[length] += walk(runs[first + 1 : last + 1], length)
    return Acceptance(
        tuple((accepted / tried.clamp(min=1)).tolist()),
        {length: emitted[length] / max(steps[length], 1) for length in chain_lengths},
        len(ordered),
        num_tokens,
    )


def walk(runs: Sequence[int], chain_length: int) -> int:
    """Decode steps that an answer takes. runs[j]: draft tokens accepted by a chain whose first guess is token
    j.

    Example: chains of 4 over runs [2, 0, 0, 0] emit 2 + 1 tokens, then 1: two steps for four tokens.
    """
    place = steps = 0
    while place < len(runs):
        place += min(runs[place], chain_length) + 1
        steps += 1
    return steps
