"""Drafting what grammars allow: nodes that the target could never accept are not proposed.

It is asked level by level, for a token's place in a grammar depends on the path before it. None of it matters
to what is accepted: the sampler masks every node itself, with the same answers.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from engine.core import Sequence
from engine.roles import DraftMask

NEVER = float("-inf")
Path = tuple[int, ...]


def has_grammar(seq: Sequence) -> bool:
    return seq.request.sampling.grammar is not None


def num_allowed(chain: Items[int], seq: Sequence, mask: DraftMask | None) -> int:
    """How many tokens of a chain behind a sequence can be accepted at all."""
    if mask is None or not has_grammar(seq):
        return len(chain)
    for place, token in enumerate(chain):
        if not mask(seq, tuple(chain[:place]))[token]:
            return place
    return len(chain)


class FrontierMask:
    """The frontier of growing trees, seen by the grammars: the path of each of its nodes.

    seqs: those of the trees, in order; token_ids: [Vd] what the columns of the draft's logits stand for.
    Sequences without a grammar cost nothing; with any, every level of a tree is copied to the host.
    """

    def __init__(self, seqs: Items[Sequence], mask: DraftMask | None, token_ids: Tensor) -> None:
        self._mask, self._token_ids = mask, token_ids
        self._seqs = {} if mask is None else {row: seq for row, seq in enumerate(seqs) if has_grammar(seq)}
        self._paths: dict[int, list[Path]] = {row: [()] for row in self._seqs}

    @property
    def applies(self) -> bool:
        """Whether anybody has a grammar."""
        return bool(self._seqs)

    def descend(self, tokens: Tensor, parents: Tensor) -> None:
        """Go on to the next frontier. tokens, parents: [B, F], of its nodes; parents count the frontier
        before."""
        for row, paths in self._paths.items():
            both = zip(tokens[row].tolist(), parents[row].tolist(), strict=True)
            self._paths[row] = [(*paths[parent], token) for token, parent in both]

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [B, F, Vd] of the frontier without what may not follow: a copy if anybody has a grammar."""
        if self._mask is None or not self.applies:
            return logits
        masked = logits.clone()
        columns = self._token_ids.cpu()
        for row, seq in self._seqs.items():
            allowed = torch.stack([self._mask(seq, path)[columns] for path in self._paths[row]])
            masked[row].masked_fill_(~allowed.to(masked.device), NEVER)
        return masked
