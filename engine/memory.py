"""How much memory the KV cache may take and how many pages that is, decided before a weight is loaded.

The models take their pools when they are made, so what the weights will take has to be known earlier: it is
counted from their headers, or for a dummy from its configuration. On a CPU the memory is what the config
says. On a GPU it is a share of all there is, less the weights and what a step needs besides them.

    gpu_memory_utilization x total    or what is free, if that is less
    - GPU_RESERVE                     CUDA itself, fragments
    - weight_bytes                    of target and head
    - activation_bytes                of the largest step
    - graph_bytes                     of captured steps
    = kv_cache_memory                 in pages of both models' rows, and one page that is nobody's
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Final, cast

import torch

from draft.load import DummyHeadCheckpoint, HeadCheckpoint, eagle3_shapes, eagle_shapes
from draft.mistral_eagle import copied_output_bytes
from engine.checkpoint import Checkpoint, MistralCheckpoint, expected_tensors
from engine.checkpoint.native import MistralHead
from engine.checkpoint.plan import NVFP4_BLOCK, Plan
from engine.checkpoint.safetensors_header import read_header
from engine.config import EngineConfig, LlamaConfig, Mistral4Config
from engine.errors import ConfigError
from engine.graphs import NODE_BUCKETS, SEQ_BUCKETS, bucket
from engine.kvcache import KVPool, LatentPool
from engine.roles import Draft

# Bytes for CUDA itself, fragments, and few matrices that are held wider than stored; as in ``haast check``.
GPU_RESERVE: Final = 2_000_000_000
_GIB: Final = 1 << 30
# Of graphs: what one of them takes beside its tensors, and how many there are before rare ones.
_LAUNCH_BYTES: Final = 8 << 20
_NUM_GRAPHS: Final = 48
_WANTED: Final = re.compile(r"Tried to allocate ([0-9.]+) ([KMG]i)B")
_UNITS: Final = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


def num_pages(
    model: LlamaConfig | Mistral4Config,
    draft: HeadCheckpoint | MistralHead | Draft | str,
    config: EngineConfig,
) -> int:
    """Pages that the KV memory holds for target and head together, the dummy page included."""
    per_slot = _pair_bytes_per_slot(model, draft, config)
    # More than every sequence at full length plus its scratch could ever use is not worth reserving.
    most = config.max_num_seqs * (-(-(config.max_model_len + 64) // config.page_size) + 1) + 1
    count = min(config.kv_cache_memory // (per_slot * config.page_size), most)
    if (count - 1) * config.page_size < config.max_model_len:
        needed = (-(-config.max_model_len // config.page_size) + 1) * config.page_size * per_slot
        raise ConfigError(
            f"kv_cache_memory of {config.kv_cache_memory} bytes holds "
            f"{max(count - 1, 0) * config.page_size} tokens, less than "
            f"max_model_len {config.max_model_len}; {per_slot} bytes a token are needed, {needed} in all"
        )
    return count


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
    activations = activation_bytes(checkpoint.config, config) + graph_bytes(checkpoint.config, config)
    budget = kv_budget(total, free, share, weights, activations)
    per_slot = _pair_bytes_per_slot(checkpoint.config, draft, config)
    slack = 2 * config.page_size  # the dummy page, and a last page that is not full
    needed = (config.max_model_len + slack) * per_slot
    if budget < needed:
        fits = max(budget // per_slot - slack, 0)
        raise ConfigError(
            f"max_model_len {config.max_model_len} does not fit: {share:.0%} of {total / _GIB:.1f} GiB "
            f"({free / _GIB:.1f} GiB are free), less {weights / _GIB:.1f} GiB for weights and "
            f"{(activations + GPU_RESERVE) / _GIB:.1f} GiB for activations, graphs and CUDA, leave "
            f"{max(budget, 0) / _GIB:.1f} GiB for the KV cache, which needs {needed / _GIB:.1f} GiB; "
            + (f"--max-model-len {fits} would fit" if fits else "no length would fit")
            + ", a larger --gpu-memory-utilization or smaller --max-num-batched-tokens leaves more"
            + ("" if config.enforce_eager else ", and so does --enforce-eager")
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
            fp8 = config.device.startswith("cuda")
            num_bytes += copied_output_bytes(num_rows, model.hidden_size, config.dtype, fp8)
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

    queries   of a chunk, mapped into the latent space where attention is over latents, and its results there,
              each twice while they change places
    stream    of a chunk: residual, projections and a dense MLP, together below 20 widths a token
    experts   of a chunk: of each choice, shared experts among them, its inner numbers, and in float32 what
              comes of those
    logits    of the trees of all sequences, chains of prompt lookup with them: float32, and four such copies
              while tokens are chosen

    Nothing has the size of rows times rows read: nodes find their rows through page tables.
    """
    width, rows = config.dtype.itemsize, config.max_num_batched_tokens
    stream = rows * model.hidden_size * 20 * width
    num_nodes = config.max_num_seqs * (config.speculation.nodes + config.speculation.lookup)
    logits = num_nodes * model.vocab_size * 4 * 5
    queries = experts = 0
    if isinstance(model, Mistral4Config):
        num_choices = model.num_experts_per_tok + model.num_shared_experts
        experts = rows * num_choices * (width * model.moe_intermediate_size + 4 * model.hidden_size)
        queries = 2 * rows * model.num_heads * (model.latent_dim + model.kv_lora_rank) * width
    return queries + stream + experts + logits


def graph_bytes(model: LlamaConfig | Mistral4Config, config: EngineConfig) -> int:
    """What graphs hold: launches, and in their pool, which no other step uses, the logits of the largest
    captured one as in ``activation_bytes``. 0 without graphs."""
    if config.enforce_eager or not config.device.startswith("cuda"):
        return 0
    most_nodes = config.speculation.nodes + config.speculation.lookup
    num_seqs = bucket(config.max_num_seqs, SEQ_BUCKETS) or SEQ_BUCKETS[-1]
    num_nodes = bucket(most_nodes, NODE_BUCKETS) or NODE_BUCKETS[-1]
    return num_seqs * num_nodes * model.vocab_size * 4 * 5 + _LAUNCH_BYTES * _NUM_GRAPHS


def out_of_memory(error: torch.OutOfMemoryError, config: EngineConfig, free: int, total: int) -> ConfigError:
    """What to say of an allocation that failed at start: what to lower, and by how much. free, total: bytes
    of the GPU now."""
    found = _WANTED.search(str(error))
    wanted = float(found[1]) * _UNITS[found[2]] if found is not None else 0.0
    missing = max(wanted - free, 0.0) + _GIB // 2  # and some room beside it
    share = config.gpu_memory_utilization
    if share is None:
        advice = f"lower --kv-cache-memory by {missing / _GIB:.1f} GiB"
    else:
        less = max(share - missing / total, 0.0)
        advice = f"lower --gpu-memory-utilization from {share:.2f} to {less:.2f} ({missing / _GIB:.1f} GiB)"
    eager = "" if config.enforce_eager else ", or give --enforce-eager, which needs none for graphs"
    return ConfigError(
        f"out of memory at start: {wanted / _GIB:.2f} GiB were asked for, {free / _GIB:.2f} of "
        f"{total / _GIB:.1f} GiB are free; {advice}{eager}"
    )


def _head_numbers(head: HeadCheckpoint) -> int:
    """In its files or in the shapes of its config, whichever is more: either may leave out the output. Files
    beside a dummy's config are not looked at.
    """
    files = () if isinstance(head, DummyHeadCheckpoint) else head.path.glob("*.safetensors")
    stored = sum(entry.num_elements for file in files for entry in read_header(file))
    shapes = (
        eagle3_shapes(head.config, head.draft_vocab_size)
        if head.kind == "eagle3"
        else eagle_shapes(head.config, {})
    )
    return max(stored, sum(math.prod(shape) for shape in shapes.values()))


def _bytes_per_slot(model: LlamaConfig | Mistral4Config, dtype: torch.dtype) -> int:
    if isinstance(model, LlamaConfig):
        return KVPool.bytes_per_slot(model.num_layers, model.num_kv_heads, model.head_dim, dtype)
    return LatentPool.bytes_per_slot(model.num_layers, model.latent_dim, dtype)


def _pair_bytes_per_slot(
    model: LlamaConfig | Mistral4Config,
    draft: HeadCheckpoint | MistralHead | Draft | str,
    config: EngineConfig,
) -> int:
    """Of target and head together; a head's rows have the model's dtype."""
    of_head = draft.config if isinstance(draft, HeadCheckpoint | MistralHead) else None
    head_bytes = 0 if of_head is None else _bytes_per_slot(of_head, config.dtype)
    return _bytes_per_slot(model, config.kv_dtype) + head_bytes
