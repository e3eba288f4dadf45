"""From documents to padded batches, in an order that depends on (seed, epoch) alone.

Rows. The head's row r of a document takes token r + 1 and the feature of token r, and predicts token r + 2;
the target's own distribution for that prediction comes from the feature of token r + 1. A document of n
tokens has features of tokens 0 .. n - 2, so its rows are r = 0 .. n - 3. Example, n = 5:

    row   token in   feature in   target feature   predicts
    0     1          0            1                2
    1     2          1            2                3
    2     3          2            3                4

Only rows that predict a token of the answer bear loss or start a chain; the others are read as keys and
values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draft.train.shards import Dataset, Document

_BATCHES_PER_POOL = 24  # documents are sorted by length within a pool, so that a batch holds little padding


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """Documents padded to the longest. B documents, T tokens, L = T - 2 rows, F features."""

    tokens: Tensor  # [B, T] int64, 0 padded
    features: Tensor  # [B, T - 1, F]
    valid: Tensor  # [B, L] bool: the row exists
    loss: Tensor  # [B, L] bool: the row exists and predicts a token of the answer

    @property
    def num_rows(self) -> int:
        return self.loss.shape[1]


def collate(documents: Sequence[Document], dtype: torch.dtype, device: str) -> TrainBatch:
    """Pad documents of at least 3 tokens into one batch."""
    longest = max(doc.tokens.shape[0] for doc in documents)
    num_docs, width = len(documents), documents[0].features.shape[1]
    tokens = torch.zeros(num_docs, longest, dtype=torch.int64)
    features = torch.zeros(num_docs, longest - 1, width, dtype=dtype)
    valid = torch.zeros(num_docs, longest - 2, dtype=torch.bool)
    loss = torch.zeros_like(valid)
    for index, doc in enumerate(documents):
        length = doc.tokens.shape[0]
        tokens[index, :length] = doc.tokens
        features[index, : length - 1] = doc.features
        valid[index, : length - 2] = True
        loss[index, : length - 2] = doc.answer[2:]
    return TrainBatch(tokens.to(device), features.to(device), valid.to(device), loss.to(device))


def generator_for(*key: int) -> torch.Generator:
    """A generator that is a function of a few small integers."""
    mixed = 0
    for part in key:
        mixed = (mixed * 1_000_003 + part + 1) % (1 << 62)
    return torch.Generator().manual_seed(mixed)


def plan_epoch(
    lengths: Sequence[int], documents: Sequence[int], batch_tokens: int, seed: int, epoch: int
) -> list[list[int]]:
    """Batches of document numbers for one epoch; each holds up to ``batch_tokens`` padded tokens, at least
    one document.
    """
    generator = generator_for(seed, epoch, 1)
    order = [documents[i] for i in torch.randperm(len(documents), generator=generator).tolist()]
    batches: list[list[int]] = []
    pool: list[int] = []
    pool_tokens = 0
    for index in order:
        pool.append(index)
        pool_tokens += lengths[index]
        if pool_tokens >= _BATCHES_PER_POOL * batch_tokens:
            batches += _cut(sorted(pool, key=lambda i: lengths[i]), lengths, batch_tokens)
            pool, pool_tokens = [], 0
    batches += _cut(sorted(pool, key=lambda i: lengths[i]), lengths, batch_tokens)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _cut(ordered: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in ordered:  # ascending, so the newest is the longest
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def load_batch(dataset: Dataset, documents: Sequence[int], dtype: torch.dtype, device: str) -> TrainBatch:
    """Read documents from the cache as one batch."""
    return collate([dataset.load(index) for index in documents], dtype, device)
