"""Penalties on tokens that a text has already: the repetition penalty, then frequency and presence.

A token of the prompt or of the answer has its logit divided by ``repetition_penalty`` if that is positive,
and multiplied if not. A token that the answer has c times loses ``c * frequency_penalty`` and, once,
``presence_penalty``. That is vLLM's definition, and its order.

For each sequence there are two rows of a vocabulary's length, which grow by the new tokens of a step: what
the prompt has, and how often the answer has it. Behind a drafted node the counts are larger, but only those
of the few tokens in its tree. So a row is first penalised by what is known, and then, of the tokens in the
tree, by what its path has; both by the same function of a raw logit and its counts, so that no rounding tells
drafted tokens from committed ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.core import Batch, DraftTree, SamplingParams, Sequence


@dataclass(slots=True)
class _Counts:
    """Of one sequence's known tokens."""

    in_prompt: Tensor  # [V] bool
    in_answer: Tensor  # [V] float32: how often
    num_counted: int = 0


@dataclass(frozen=True, slots=True)
class _Strengths:
    """Of b sequences, each [b, 1, 1] float32."""

    repetition: Tensor
    frequency: Tensor
    presence: Tensor

    def apply(self, logits: Tensor, in_prompt: Tensor, in_answer: Tensor) -> Tensor:
        """Penalised logits [b, R, n]. in_prompt, in_answer: of these columns, for all rows or for each."""
        is_known = in_prompt | (in_answer > 0)
        smaller = torch.where(logits > 0, logits / self.repetition, logits * self.repetition)
        logits = torch.where(is_known, smaller, logits)
        return logits - self.frequency * in_answer - self.presence * (in_answer > 0)


class Penalties:
    """The three penalties as one edit (``engine.edits.Edit``)."""

    def __init__(self, vocab_size: int, device: str) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._counts: dict[int, _Counts] = {}

    def applies(self, params: SamplingParams) -> bool:
        return (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1, 0, 0)

    def __call__(self, logits: Tensor, batch: Batch, tree: DraftTree, rows: list[int]) -> None:
        counts = [self._counted(batch, row) for row in rows]
        in_prompt = torch.stack([one.in_prompt for one in counts])[:, None]
        in_answer = torch.stack([one.in_answer for one in counts])[:, None]
        params = [batch.seqs[row].request.sampling for row in rows]
        strengths = _Strengths(
            self._column([one.repetition_penalty for one in params]),
            self._column([one.frequency_penalty for one in params]),
            self._column([one.presence_penalty for one in params]),
        )
        which = torch.tensor(rows, device=logits.device)
        raw = logits[which]
        penalised = strengths.apply(raw, in_prompt, in_answer)
        if tree.tokens.shape[1] > 1:
            # Every drafted token in every row: off a row's path the counts add up to those that are known.
            drafted = tree.tokens[which, 1:]
            is_same = (drafted[:, :, None] == drafted[:, None]).float()
            on_path = tree.ancestors()[which, :, 1:].float() @ is_same
            columns = drafted[:, None].expand_as(on_path)
            in_path = in_answer.expand_as(raw).gather(2, columns) + on_path
            of_prompt = in_prompt.expand_as(raw).gather(2, columns)
            penalised.scatter_(2, columns, strengths.apply(raw.gather(2, columns), of_prompt, in_path))
        logits[which] = penalised

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
            )
        assert counts.num_counted <= batch.num_known(row), "forgotten when it starts over"
        new = torch.tensor(
            batch.known_tokens(row, counts.num_counted), dtype=torch.int64, device=self._device
        )
        num_prompt = max(len(request.prompt) - counts.num_counted, 0)
        counts.in_prompt[new[:num_prompt]] = True
        answer = new[num_prompt:]
        counts.in_answer.scatter_add_(0, answer, torch.ones_like(answer, dtype=torch.float32))
        counts.num_counted += len(new)
        return counts

    def _column(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)[:, None, None]
