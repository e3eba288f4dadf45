"""From a target's weights and a data set to a head that is ready for its first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from draft.load import check_shapes, eagle3_shapes, read_head, read_weights
from draft.train.batches import generator_for
from draft.train.model import Eagle3Module, HeadConfig, choose_draft_vocab, initialise, lm_head_rows
from draft.train.objective import TargetSide
from draft.train.shards import Dataset
from engine.config import LlamaConfig
from engine.errors import ConfigError


def prepare(
    target: LlamaConfig,
    weights: Mapping[str, Tensor],
    dataset: Dataset,
    training: Sequence[int],
    draft_vocab: int,
    eos_token_ids: tuple[int, ...],
    seed: int,
    init_head: Path | None = None,
) -> tuple[Eagle3Module, TargetSide]:
    """The head before its first step, on the host, and the target's parts that training reads.

    weights: float32, Hugging Face names; training: documents whose answers decide the draft vocabulary, of
    ``draft_vocab`` tokens, ``eos_token_ids`` among them; init_head: the directory of a head to go on from.
    Its draft vocabulary is kept if it has output rows of its own; the target's rows suit any choice.
    """
    layers = tuple(dataset.settings["feature_layers"])
    counts = dataset.answer_counts(target.vocab_size, training)
    vocab = choose_draft_vocab(counts, draft_vocab, eos_token_ids)
    if init_head is not None:
        head = _existing(init_head, HeadConfig.for_target(target, layers, draft_vocab), weights, vocab)
        vocab = head.draft_vocab
    else:
        head = Eagle3Module(HeadConfig.for_target(target, layers, draft_vocab), vocab)
        read = ("model.layers.0.", f"model.layers.{target.num_layers - 1}.")
        needed = {
            key: weights[key].cpu()
            for key in weights
            if key.startswith(read) or not key.startswith("model.layers.")
        }
        initialise(head, needed, target.num_layers, generator_for(seed, 3))
    side = TargetSide(
        weights["model.embed_tokens.weight"],
        weights["model.norm.weight"],
        lm_head_rows(weights, vocab),
        target.rms_norm_eps,
    )
    return head, side


def _existing(path: Path, wanted: HeadConfig, target: Mapping[str, Tensor], vocab: Tensor) -> Eagle3Module:
    """A trained head as a module, with ``vocab`` if its output rows are the target's.

    Raises ConfigError or CheckpointError if it is not of the wanted shape.
    """
    found = read_head(path)
    tensors = read_weights(path, torch.float32, "cpu")
    shares_rows = "lm_head.weight" not in tensors
    for key, value, expected in (
        ("kind", found.kind, "eagle3"),
        ("feature layers", found.feature_layers, wanted.feature_layers),
        (
            "draft_vocab_size",
            wanted.draft_vocab_size if shares_rows else found.draft_vocab_size,
            wanted.draft_vocab_size,
        ),
    ):
        if value != expected:
            raise ConfigError(f"--init-head {path}: its {key} is {value}, this run has {expected}")
    tensors.pop("t2d", None)
    places = torch.arange(wanted.draft_vocab_size)
    if shares_rows:
        tensors |= {"d2t": vocab - places, "lm_head.weight": lm_head_rows(target, vocab).cpu()}
    ids = places + tensors["d2t"]
    shape = dataclasses.replace(found.config, vocab_size=wanted.draft_vocab_size)
    check_shapes(path, tensors, eagle3_shapes(shape, wanted.draft_vocab_size))
    head = Eagle3Module(wanted, ids)
    head.load_state_dict({**tensors, "t2d": head.t2d})
    return head
