"""From a target's weights and a data set to a head that is ready for its first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from draft.train.batches import generator_for
from draft.train.model import Eagle3Module, HeadConfig, choose_draft_vocab, initialise, lm_head_rows
from draft.train.objective import TargetSide
from draft.train.shards import Dataset
from engine.config import LlamaConfig


def prepare(
    target: LlamaConfig,
    weights: Mapping[str, Tensor],
    dataset: Dataset,
    training: Sequence[int],
    draft_vocab: int,
    eos_token_ids: tuple[int, ...],
    seed: int,
) -> tuple[Eagle3Module, TargetSide]:
    """The head before its first step, on the host, and the target's parts that training reads.

    weights: float32, Hugging Face names; training: documents whose answers decide the draft vocabulary, of
    ``draft_vocab`` tokens, ``eos_token_ids`` among them.
    """
    layers = tuple(dataset.settings["feature_layers"])
    vocab = choose_draft_vocab(dataset.answer_counts(target.vocab_size, training), draft_vocab, eos_token_ids)
    head = Eagle3Module(HeadConfig.for_target(target, layers, draft_vocab), vocab)
    read = ("model.layers.0.", f"model.layers.{target.num_layers - 1}.")
    needed = [key for key in weights if key.startswith(read) or not key.startswith("model.layers.")]
    initialise(head, {key: weights[key].cpu() for key in needed}, target.num_layers, generator_for(seed, 3))
    side = TargetSide(
        weights["model.embed_tokens.weight"],
        weights["model.norm.weight"],
        lm_head_rows(weights, vocab),
        target.rms_norm_eps,
    )
    return head, side
