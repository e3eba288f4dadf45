"""A tiny target world for the training tests: features are a fixed function of the tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from draft.train.model import Eagle3Module, HeadConfig
from draft.train.objective import TargetSide
from draft.train.shards import Dataset, Document, Manifest, ShardWriter
from tests.oracles.unrolled_head import HeadShape

VOCAB, DRAFT_VOCAB, HIDDEN, LAYERS = 24, 16, 16, (1, 2, 4)
CONFIG = HeadConfig(
    hidden_size=HIDDEN,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=100.0,
    vocab_size=VOCAB,
    draft_vocab_size=DRAFT_VOCAB,
    feature_layers=LAYERS,
)
SHAPE = HeadShape(4, 2, 8, 1e-5, 100.0)


def draft_vocab() -> Tensor:
    """16 of 24 target tokens, so that draft and target ids differ."""
    return torch.arange(VOCAB)[torch.arange(VOCAB) % 3 != 1]


def make_head(seed: int = 0, dtype: torch.dtype = torch.float64) -> Eagle3Module:
    """A random head with scores of about unit spread."""
    generator = torch.Generator().manual_seed(seed)
    head = Eagle3Module(CONFIG, draft_vocab()).to(dtype)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else noise / fan_in**0.5)
    return head


def make_target(seed: int = 1, dtype: torch.dtype = torch.float64) -> TargetSide:
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=dtype)
    head_rows = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=dtype)[draft_vocab()]
    return TargetSide(embedding, torch.ones(HIDDEN, dtype=dtype), head_rows, 1e-5)


def random_document(
    length: int, prompt_len: int, generator: torch.Generator, greedy: bool = True
) -> Document:
    tokens = torch.randint(0, VOCAB, (length,), generator=generator, dtype=torch.int32)
    features = torch.randn(length - 1, len(LAYERS) * HIDDEN, generator=generator).bfloat16()
    answer = torch.zeros(length, dtype=torch.bool)
    answer[prompt_len:] = True
    return Document(tokens, features, answer, greedy)


def learnable_dataset(directory: Path, num_documents: int = 24, shard_tokens: int = 150) -> Dataset:
    """Documents that count upwards inside the draft vocabulary; the last feature points at the next token's
    row.
    """
    target, ids = make_target(dtype=torch.float32), draft_vocab()
    generator = torch.Generator().manual_seed(5)
    writer = ShardWriter(
        Manifest.open(directory, {"target": "tiny", "feature_layers": list(LAYERS)}), shard_tokens
    )
    for number in range(num_documents):
        length = 8 + int(torch.randint(0, 9, (1,), generator=generator))
        first = int(torch.randint(0, DRAFT_VOCAB, (1,), generator=generator))
        draft_ids = (first + torch.arange(length)) % DRAFT_VOCAB
        tokens = ids[draft_ids]
        following = target.head_rows[(draft_ids[:-1] + 1) % DRAFT_VOCAB]
        features = torch.cat(
            [target.embedding[tokens[:-1]], torch.zeros(length - 1, HIDDEN), 3 * following], -1
        )
        answer = torch.arange(length) >= 3
        if writer.add(Document(tokens.int(), features.bfloat16(), answer, True, f"prompt {number}")):
            writer.flush(number + 1, 1.0)
    writer.flush(num_documents, 1.0)
    return Dataset(directory)
