"""From sequences to the tensors of a step: the scheduler has decided, here its decisions become a Batch."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from engine.core import Batch, Decision, PromptChunk, SamplingParams, SamplingTensors, Sequence, Speculation
from engine.graphs import SEQ_BUCKETS, Mailbox, bucket
from engine.sampler import sampling_columns, sampling_tensors, tensors_of

_PADDING = SamplingParams(temperature=0)  # of rows that belong to nobody


class Batches:
    """Builds the batches of an engine, on its device.

    fixed: decodes lie in tensors that are there for good (see ``core.Batch``), with pages for ``most_rows``
    rows of every sequence.
    """

    def __init__(self, device: str, page_size: int, most_rows: int = 0, *, fixed: bool = False) -> None:
        self._device, self._page_size, self._fixed = device, page_size, fixed
        self._table_width = -(-most_rows // page_size)
        self._mailboxes: dict[int, Mailbox] = {}  # by number of sequences
        self._sampling = [SamplingParams()], sampling_tensors([SamplingParams()], device)

    def of_decodes(self, seqs: Items[Sequence], decisions: Items[Decision]) -> Batch:
        """The decodes of a step. decisions: what to draft for each; pages for it are reserved."""
        if self.are_fixed(seqs):
            return self._fixed_batch(seqs, decisions)
        return self._batch(seqs, [decision.speculation for decision in decisions], None, decisions)

    def are_fixed(self, seqs: Items[Sequence]) -> bool:
        """Whether a batch of these decodes lies in tensors that are there for good."""
        if not self._fixed or bucket(len(seqs), SEQ_BUCKETS) is None:
            return False
        return max(len(seq.pages) for seq in seqs) <= self._table_width

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

    def _fixed_batch(self, seqs: Items[Sequence], decisions: Items[Decision]) -> Batch:
        """One copy takes everything to the device."""
        num_seqs = bucket(len(seqs), SEQ_BUCKETS)  # with padding
        assert num_seqs is not None
        box = self._mailboxes.get(num_seqs)
        if box is None:
            box = self._mailboxes[num_seqs] = Mailbox(self._fields(num_seqs), self._device)
        host, missing = box.host, num_seqs - len(seqs)
        params = [seq.request.sampling for seq in seqs]
        columns = {
            "roots": torch.tensor([seq.tokens[-1] for seq in seqs] + [0] * missing),
            "kv_lens": torch.tensor([seq.kv_len for seq in seqs] + [0] * missing),
            **sampling_columns(params + [_PADDING] * missing),
        }
        for name, column in columns.items():
            host[name].copy_(column)
        _fill(host["page_table"], [seq.pages for seq in seqs])
        box.send()
        return Batch(
            seqs=tuple(seqs),
            kv_lens=box.device["kv_lens"],
            page_table=box.device["page_table"],
            page_size=self._page_size,
            sampling=tensors_of(params, box.device),
            speculation=tuple(decision.speculation for decision in decisions),
            decisions=tuple(decisions),
            roots=box.device["roots"],
        )

    def _fields(self, num_seqs: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            "roots": ((num_seqs,), torch.int64),
            "kv_lens": ((num_seqs,), torch.int64),
            "page_table": ((num_seqs, self._table_width), torch.int64),
            **{name: ((num_seqs,), column.dtype) for name, column in sampling_columns([]).items()},
        }

    def _sampling_tensors(self, seqs: Items[Sequence]) -> SamplingTensors:
        """Where the sequences are those of the step before, as nearly always, the same tensors."""
        params = [seq.request.sampling for seq in seqs]
        if params != self._sampling[0]:
            self._sampling = params, sampling_tensors(params, self._device)
        return self._sampling[1]


def _fill(table: Tensor, pages: Items[list[int]]) -> None:
    """Write the pages of each sequence; what is behind them, and behind the sequences, is the dummy page."""
    table.zero_()
    for row, own in enumerate(pages):
        table[row, : len(own)] = torch.tensor(own)
