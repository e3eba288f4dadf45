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

_SIZES = (4, 3, 2)  # lengths of the n-gram to look for, longest first


class NgramIndex:
    """Where each n-gram of a growing token list last ended. Only new tokens cost anything."""

    def __init__(self) -> None:
        self._last_end: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0  # ends up to here are known

    def continuation(self, tokens: list[int], num_tokens: int) -> list[int]:
        """Up to num_tokens tokens that followed the most recent earlier occurrence of the longest known
        suffix.

        tokens: the list of the last call with more at its end. Example: [5, 6, 7, 8, 5, 6] continues after
        the
        earlier (5, 6) with [7, 8, 5, 6].
        """
        for end in range(
            self._num_indexed + 1, len(tokens)
        ):  # the suffix itself is not an earlier occurrence
            for size in _SIZES:
                if size <= end:
                    self._last_end[tuple(tokens[end - size : end])] = end
        self._num_indexed = max(len(tokens) - 1, 0)
        for size in _SIZES:
            found = self._last_end.get(tuple(tokens[-size:])) if size < len(tokens) else None
            if found is not None:
                return tokens[found : found + num_tokens]
        return []


class NgramDraft:
    """A draft (core.Draft) that proposes one chain from the sequence's own tokens."""

    def __init__(self) -> None:
        self._indexes: dict[int, NgramIndex] = {}

    name = "ngram"

    def scratch_rows(self, speculation: Speculation) -> int:
        return 0 if speculation.is_off else speculation.nodes - 1

    def propose(self, batch: Batch) -> DraftTree:
        chains = [
            []
            if spec.is_off
            else self._indexes.setdefault(seq.request.id, NgramIndex()).continuation(
                seq.tokens, min(spec.nodes - 1, spec.depth)
            )
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
        self._indexes.pop(seq.request.id, None)
