"""Penalties on tokens that a text has already: the repetition penalty, then frequency and presence.

A token of the prompt or of the answer has its logit divided by ``repetition_penalty`` if that is positive,
and multiplied if not. A token that the answer has c times loses ``c * frequency_penalty`` and, once,
``presence_penalty``. That is vLLM's definition, and its order.

For each sequence there are two rows of a vocabulary's length, which grow by the new tokens of a step: what
the prompt has, and how often the answer has it. Behind a drafted node the counts are larger, by what its path
has. Only the columns of tokens in the text or in the tree are touched, and each is computed from its raw
logit and its whole count, so that no rounding tells drafted tokens from committed ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.core import Batch, DraftTree, SamplingParams, Sequence


@dataclass(slots=True)
class _Counts:
    """Of one sequence's known tokens."""

    in_prompt: Tensor  # [V] bool
    in_answer: Tensor  # [V] float32: how often
    columns: Tensor  # [K] int64: the tokens that either has, each once
    seen: set[int] = field(default_factory=set)  # the same on the host
    num_counted: int = 0


class Penalties:
    """The three penalties as one edit (``engine.edits.Edit``)."""

    def __init__(self, vocab_size: int, device: str) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._counts: dict[int, _Counts] = {}

    def applies(self, params: SamplingParams) -> bool:
        return (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1, 0, 0)

    def __call__(self, logits: Tensor, batch: Batch, tree: DraftTree, rows: list[int]) -> None:
        ancestors = tree.ancestors().float()
        for row in rows:
            counts = self._counted(batch, row)
            drafted = tree.tokens[row, 1:]
            columns = torch.cat((counts.columns, drafted))  # a token more than once gets the same each time
            on_path = ancestors[row, :, 1:] @ (drafted[:, None] == columns).float()
            raw = logits[row][:, columns]
            in_prompt, in_answer = counts.in_prompt[columns], counts.in_answer[columns] + on_path
            penalised = _penalised(raw, in_prompt, in_answer, batch.seqs[row].request.sampling)
            logits[row].scatter_(1, columns.expand_as(raw), penalised)

    def forget(self, seq: Sequence) -> None:
        self._counts.pop(seq.request.id, None)

    def _counted(self, batch: Batch, row: int) -> _Counts:
        """The counts of a sequence, up to date."""
        request = batch.seqs[row].request
        counts = self._counts.get(request.id)
        if counts is None:
            counts = self._counts[request.id] = _Counts(
                torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device),
                torch.zeros(self._vocab_size, device=self._device),
                self._tensor([]),
            )
        assert counts.num_counted <= batch.num_known(row), "forgotten when it starts over"
        new = batch.known_tokens(row, counts.num_counted)
        num_prompt = max(len(request.prompt) - counts.num_counted, 0)
        answer = self._tensor(new[num_prompt:])
        counts.in_prompt[self._tensor(new[:num_prompt])] = True
        counts.in_answer.scatter_add_(0, answer, torch.ones_like(answer, dtype=torch.float32))
        first_seen = [token for token in dict.fromkeys(new) if token not in counts.seen]
        if first_seen:
            counts.seen.update(first_seen)
            counts.columns = torch.cat((counts.columns, self._tensor(first_seen)))
        counts.num_counted += len(new)
        return counts

    def _tensor(self, token_ids: list[int]) -> Tensor:
        return torch.tensor(token_ids, dtype=torch.int64, device=self._device)


def _penalised(logits: Tensor, in_prompt: Tensor, in_answer: Tensor, params: SamplingParams) -> Tensor:
    """[R, C] of tokens and how a text has them: in_prompt [C] bool, in_answer [R, C] float32."""
    is_known = in_prompt | (in_answer > 0)
    strength = params.repetition_penalty
    repeated = torch.where(logits > 0, logits / strength, logits * strength)
    logits = torch.where(is_known, repeated, logits)
    return logits - params.frequency_penalty * in_answer - params.presence_penalty * (in_answer > 0)
