"""Prompt lookup: propose what followed the last occurrence of the current n-gram (Saxena 2023, "Prompt Lookup
Decoding").

No weights and hardly any time. Good where the answer repeats the prompt (summaries, code edits), idle
elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draft.none import root_tokens
from engine.core import Batch, DraftTree, Sequence, Speculation, Verdict

_LONGEST, _SHORTEST = 4, 2  # lengths of the n-gram to look for, longest first
_WINDOW = 4096  # how far back to look: bounds the host time of a step


def lookup(tokens: list[int], num_tokens: int) -> list[int]:
    """Up to num_tokens tokens that followed the most recent earlier occurrence of the longest matching
    suffix.

    Example: [5, 6, 7, 8, 5, 6] continues after the earlier (5, 6) with [7, 8, 5, 6].
    """
    recent = tokens[-_WINDOW:]
    for size in range(_LONGEST, _SHORTEST - 1, -1):
        if len(recent) <= size:
            continue
        suffix = recent[-size:]
        for start in range(len(recent) - size - 1, -1, -1):
            if recent[start + size - 1] == suffix[-1] and recent[start : start + size] == suffix:
                return recent[start + size : start + size + num_tokens]
    return []


class NgramDraft:
    """A draft (core.Draft) that proposes one chain from the sequence's own tokens."""

    name = "ngram"

    def scratch_rows(self, speculation: Speculation) -> int:
        return 0 if speculation.is_off else speculation.nodes - 1

    def propose(self, batch: Batch) -> DraftTree:
        chains = [
            [] if spec.is_off else lookup(seq.tokens, min(spec.nodes - 1, spec.depth))
            for seq, spec in zip(batch.seqs, batch.speculation, strict=True)
        ]
        longest = max(map(len, chains))
        tokens = torch.zeros(len(chains), 1 + longest, dtype=torch.int64)
        parents = torch.full_like(tokens, -1)
        for row, chain in enumerate(chains):
            tokens[row, 1 : 1 + len(chain)] = torch.tensor(chain, dtype=torch.int64)
            parents[row, 1 : 1 + len(chain)] = torch.arange(len(chain))
        device = batch.kv_lens.device
        tokens = tokens.to(device)
        tokens[:, :1] = root_tokens(batch)
        return DraftTree(tokens, parents.to(device))

    def observe(self, batch: Batch, tree: DraftTree, verdict: Verdict, features: Tensor) -> None:
        pass

    def forget(self, seq: Sequence) -> None:
        pass
