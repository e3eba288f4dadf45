"""From sequences to the tensors of a step: the scheduler has decided, here its decisions become a Batch."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch

from engine.core import Batch, Decision, PromptChunk, SamplingParams, SamplingTensors, Sequence, Speculation
from engine.sampler import sampling_tensors


class Batches:
    """Builds the batches of an engine, on its device."""

    def __init__(self, device: str, page_size: int) -> None:
        self._device, self._page_size = device, page_size
        self._sampling = [SamplingParams()], sampling_tensors([SamplingParams()], device)

    def of_decodes(self, seqs: Items[Sequence], decisions: Items[Decision]) -> Batch:
        """The decodes of a step. decisions: what to draft for each; pages for it are reserved."""
        return self._batch(seqs, [decision.speculation for decision in decisions], None, decisions)

    def of_chunks(self, seqs: Items[Sequence], sizes: Items[int], speculation: Items[Speculation]) -> Batch:
        """A step's chunks of prompts. sizes: nodes of each, the root and then known tokens; speculation:
        what may be drafted for each later."""
        tokens = torch.zeros(len(seqs), max(sizes), dtype=torch.int64)
        next_token = torch.full((len(seqs),), -1, dtype=torch.int64)
        for row, (seq, size) in enumerate(zip(seqs, sizes, strict=True)):
            tokens[row, :size] = torch.tensor(seq.tokens[-1:] + seq.forced[: size - 1])
            if size <= len(seq.forced):
                next_token[row] = seq.forced[size - 1]
        lengths = torch.tensor(sizes).to(self._device)
        chunk = PromptChunk(tokens.to(self._device), lengths, next_token.to(self._device), tuple(sizes))
        return self._batch(seqs, speculation, chunk)

    def _batch(
        self,
        seqs: Items[Sequence],
        speculation: Items[Speculation],
        chunk: PromptChunk | None,
        decisions: Items[Decision] = (),
    ) -> Batch:
        width = max(len(seq.pages) for seq in seqs)
        table = torch.tensor([seq.pages + [0] * (width - len(seq.pages)) for seq in seqs], dtype=torch.int64)
        return Batch(
            seqs=tuple(seqs),
            kv_lens=torch.tensor([seq.kv_len for seq in seqs], dtype=torch.int64).to(self._device),
            page_table=table.to(self._device),
            page_size=self._page_size,
            sampling=self._sampling_tensors(seqs),
            speculation=tuple(speculation),
            decisions=tuple(decisions),
            prompt=chunk,
        )

    def _sampling_tensors(self, seqs: Items[Sequence]) -> SamplingTensors:
        """Where the sequences are those of the step before, as nearly always, the same tensors."""
        params = [seq.request.sampling for seq in seqs]
        if params != self._sampling[0]:
            self._sampling = params, sampling_tensors(params, self._device)
        return self._sampling[1]
