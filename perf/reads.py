"""What a step reads at least, counted from what a model and its head will hold: no file, no device.

A ``Reads`` of the target is one step's, a ``Reads`` of the head one level of drafting: its layers and the
rows of the output that it drafts among. Both are counted from the plan that loading follows, as
``engine.memory`` counts them, but for what is held in another way than it is stored:

    attention's kv_b    in the model's dtype, for it is divided and multiplied into queries
    input scales        not at all: activations stay wide

``held_bytes`` counts the same from the other end, from the tensors that an object holds.
"""

from __future__ import annotations

import gc
import math
import types
from collections.abc import Iterable, Mapping
from typing import cast

from torch import Tensor

from draft.mistral_eagle import copied_output_bytes
from engine.checkpoint import Checkpoint, MistralCheckpoint, expected_tensors
from engine.checkpoint.native import MistralHead
from engine.checkpoint.plan import NVFP4_BLOCK, Planned
from engine.cli.roofline import Reads
from engine.config import EngineConfig, LlamaConfig
from engine.kvcache import KVPool, LatentPool

_HELD_WIDE = "attention.wkv_b.weight"
_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"
_SCALE_BYTES = 4


def target_reads(checkpoint: Checkpoint | MistralCheckpoint, options: EngineConfig) -> Reads:
    """Of a step of the target."""
    config, width = checkpoint.config, options.dtype.itemsize
    row = config.hidden_size * width
    if isinstance(config, LlamaConfig):
        total = width * sum(math.prod(shape) for shape in expected_tensors(config).values())
        table = 0 if config.tie_word_embeddings else config.vocab_size * row
        kv_row = KVPool.bytes_per_slot(
            config.num_layers, config.num_kv_heads, config.head_dim, options.kv_dtype
        )
        return Reads(total - table, 0, 0, 0, row, kv_row)
    weights = cast(MistralCheckpoint, checkpoint).plan.weights
    experts = {name: planned for name, planned in weights.items() if planned.expected.num_experts}
    rest = {name: planned for name, planned in weights.items() if name not in experts}
    del rest[_EMBEDDING]
    return Reads(
        always=_held(rest, width),
        experts=_held(experts, width),
        num_experts=config.num_experts,
        num_experts_per_token=config.num_experts_per_tok,
        token_row=row,
        kv_row=LatentPool.bytes_per_slot(config.num_layers, config.latent_dim, options.kv_dtype),
    )


def draft_reads(head: MistralHead, config: EngineConfig) -> Reads:
    """Of one level of drafting by Mistral's head, whichever its width: the head is dense."""
    of_head, width = head.config, config.dtype.itemsize
    num_rows = min(config.draft_vocab_size or of_head.vocab_size, of_head.vocab_size)
    fp8 = config.device.startswith("cuda") and num_rows < of_head.vocab_size
    own = {
        name: planned for name, planned in head.plan.weights.items() if name.startswith("tok_emb") is False
    }
    return Reads(
        always=_held(own, width) + copied_output_bytes(num_rows, of_head.hidden_size, config.dtype, fp8),
        experts=0,
        num_experts=0,
        num_experts_per_token=0,
        token_row=of_head.hidden_size * width,
        kv_row=LatentPool.bytes_per_slot(of_head.num_layers, of_head.latent_dim, config.dtype),
    )


def prompt_flops(checkpoint: Checkpoint | MistralCheckpoint, length: int) -> float:
    """Multiplications and additions that a prompt of so many tokens takes at least: every token through the
    matrices that it uses, the output for the last one alone, and attention to the tokens before.

    Attention counts as it is without absorption, the cheaper way for prompts.
    """
    config = checkpoint.config
    if isinstance(config, LlamaConfig):
        shapes = expected_tensors(config).items()
        used = float(sum(math.prod(shape) for name, shape in shapes if name.startswith("model.layers.")))
        dims = 2 * config.head_dim
    else:
        layers = {
            name: planned.expected
            for name, planned in cast(MistralCheckpoint, checkpoint).plan.weights.items()
            if name.startswith("layers.")
        }
        chosen = config.num_experts_per_tok / config.num_experts
        used = sum(math.prod(w.stacked) * (chosen if w.num_experts else 1) for w in layers.values())
        dims = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    pairs = length * (length + 1) / 2
    attention = pairs * dims * config.num_heads * config.num_layers
    return 2 * (used * length + attention + config.vocab_size * config.hidden_size)


def _held(weights: Mapping[str, Planned], width: int) -> int:
    """Bytes of weights in memory. width: of a number that is not quantised."""
    total = 0
    for name, planned in weights.items():
        numbers, matrices = math.prod(planned.expected.stacked), planned.expected.num_experts or 1
        if planned.kind == "plain" or name.endswith(_HELD_WIDE):
            total += numbers * width
        elif planned.kind == "fp8":
            total += numbers + _SCALE_BYTES * matrices
        else:
            total += numbers // 2 + numbers // NVFP4_BLOCK + _SCALE_BYTES * matrices
    return total


def held_bytes(root: object, without: Iterable[Tensor] = ()) -> int:
    """Bytes of all tensors that an object holds, however deep, each storage once; ``without`` those."""
    storages = {_storage(tensor)[0]: 0 for tensor in without}
    seen, waiting = set[int](), [root]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, type | types.ModuleType):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            place, num_bytes = _storage(one)
            storages.setdefault(place, num_bytes)
        elif isinstance(one, types.FunctionType):  # what it closes over, not the module that it is from
            waiting += one.__closure__ or ()
        else:
            waiting += gc.get_referents(one)
    return sum(storages.values())


def _storage(tensor: Tensor) -> tuple[int, int]:
    """What tells a tensor's memory from others, and its bytes. What is packed for a CPU's products shares its
    memory with no other."""
    if tensor.is_mkldnn:
        return id(tensor), tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
