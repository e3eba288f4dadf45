"""Log-probabilities of emitted tokens: of the raw logits, before edits, temperature and filters.

A token that was accepted from a draft was chosen behind its parent, so there stands what the target thought
of it, exactly as if it had been decoded plainly.
"""

from __future__ import annotations

from torch import Tensor

from engine.core import Batch, Scores, TokenLogprob, Verdict


def emitted_logprobs(
    scores: Scores, choice: Tensor, verdict: Verdict, batch: Batch
) -> list[tuple[TokenLogprob, ...]]:
    """For every sequence of a batch, what to report of the tokens that a step emits; nothing for those that
    do not ask. scores: raw; choice: [B, R]. Call before the step is committed."""
    found: list[tuple[TokenLogprob, ...]] = []
    if any(seq.request.sampling.logprobs is not None for seq in batch.seqs):
        scores = scores.unpacked()
    for row, seq in enumerate(batch.seqs):
        num_top = seq.request.sampling.logprobs
        if num_top is None or not batch.chooses(row):
            found.append(())
            continue
        # Of a prompt only its last node was scored.
        nodes = slice(0, 1) if batch.is_prefill else verdict.path[row, : int(verdict.length[row])]
        logprobs = scores.logits[row, nodes].log_softmax(-1)
        columns = choice[row, nodes, None].clamp(min=0)  # what stands for NO_CHOICE will not be emitted
        chosen = logprobs.gather(1, columns)[:, 0].tolist()
        top = logprobs.topk(min(num_top, logprobs.shape[-1]))
        found.append(
            tuple(
                TokenLogprob(logprob, tuple(zip(ids, values, strict=True)))
                for logprob, ids, values in zip(
                    chosen, top.indices.tolist(), top.values.tolist(), strict=True
                )
            )
        )
    return found
