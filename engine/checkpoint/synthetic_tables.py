"""Which tensors the files of Mistral Small 4 and its Eagle head hold, in each published layout.

    native-fp8    one tensor per expert and matrix, 0-d BF16 scales of weight and input
    native-nvfp4  the same names, experts packed to 4 bits, everything else BF16
    native-bf16   the same names without scales
    hf-fp8        experts of a layer fused, gate and up with one scale
    hf-bf16       the same without scales

The text model's names are spelled out here a second time on purpose: the readers' table is not used, so a
reader that asks for a wrong name does not find it in what ``checkpoint/synthetic.py`` writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from engine.checkpoint.mistral_tables import VisionShape
from engine.checkpoint.safetensors_header import ITEM_BYTES, Shape
from engine.config import Mistral4Config
from engine.errors import ConfigError

Layout = Literal["native-fp8", "native-nvfp4", "native-bf16", "hf-fp8", "hf-bf16"]
LAYOUTS: Final[tuple[Layout, ...]] = ("native-fp8", "native-nvfp4", "native-bf16", "hf-fp8", "hf-bf16")
HEAD_LAYOUTS: Final[tuple[Layout, ...]] = ("native-fp8", "native-bf16")

_HF_NAMES: Final[Mapping[str, str]] = {
    "attention_norm": "input_layernorm",
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
    "attention.wkv_a_with_mqa": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate",
    "shared_experts.w1": "mlp.shared_experts.gate_proj",
    "shared_experts.w2": "mlp.shared_experts.down_proj",
    "shared_experts.w3": "mlp.shared_experts.up_proj",
}
_HF_TOP: Final[Mapping[str, str]] = {
    "tok_embeddings": "language_model.model.embed_tokens",
    "norm": "language_model.model.norm",
    "output": "language_model.lm_head",
}
_HF_SUFFIXES: Final[Mapping[str, str]] = {
    "weight": "weight",
    "qscale_weight": "weight_scale_inv",
    "qscale_act": "activation_scale",
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a header says of a tensor."""

    dtype: str  # safetensors' name
    shape: Shape

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ITEM_BYTES[self.dtype]


Table = dict[str, TensorSpec]  # by stored name


@dataclass(frozen=True, slots=True)
class Module:
    """A matrix or vector under its native name, without ``.weight``."""

    name: str
    shape: Shape
    role: Literal["norm", "plain", "linear", "expert"]


def target_table(config: Mistral4Config, layout: Layout, vision: VisionShape | None = None) -> Table:
    """Every tensor of a target's files in a layout."""
    table: Table = {}
    for group in module_groups(config):
        table |= _hf_group_table(group, layout) if layout.startswith("hf") else _group_table(group, layout)
    return table | dict(vision_table(vision, layout))


def head_table(config: Mistral4Config, layout: Layout = "native-fp8") -> Table:
    """Every tensor of an Eagle head's file; config: the head's, without experts."""
    if layout not in HEAD_LAYOUTS:
        raise ConfigError(f"layout of a head is {layout!r}, expected {' or '.join(HEAD_LAYOUTS)}")
    table: Table = {}
    for group in module_groups(config):
        table |= _group_table(group, layout)
    return table


def vision_table(vision: VisionShape | None, layout: Layout) -> list[tuple[str, TensorSpec]]:
    if vision is None:
        return []
    shapes = vision.hf_tensors() if layout.startswith("hf") else vision.native_tensors()
    return [(name, TensorSpec("BF16", shape)) for name, shape in shapes.items()]


def module_groups(config: Mistral4Config) -> Iterator[list[Module]]:
    """Modules that are stored side by side: what stands alone, and all routed experts of a layer."""
    hidden, vocab, is_head = config.hidden_size, config.vocab_size, config.num_experts == 0
    if is_head:
        yield [Module("eagle_linear", (hidden, 2 * hidden), "linear")]
    else:
        yield [Module("tok_embeddings", (vocab, hidden), "plain")]
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}"
        for module in _attention(config, prefix):
            yield [module]
        if is_head:
            yield _mlp(f"{prefix}.feed_forward", hidden, config.intermediate_size, "linear")
            continue
        inner = config.moe_intermediate_size
        yield [Module(f"{prefix}.gate", (config.num_experts, hidden), "plain")]
        yield [
            module
            for expert in range(config.num_experts)
            for module in _mlp(f"{prefix}.experts.{expert}", hidden, inner, "expert")
        ]
        for module in _mlp(f"{prefix}.shared_experts", hidden, config.num_shared_experts * inner, "expert"):
            yield [module]
    yield [Module("norm", (hidden,), "norm")]
    if not is_head:
        yield [Module("output", (vocab, hidden), "plain")]


def _attention(config: Mistral4Config, prefix: str) -> list[Module]:
    hidden, heads, latent = config.hidden_size, config.num_heads, config.kv_lora_rank
    nope, rotary, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    return [
        Module(f"{prefix}.attention_norm", (hidden,), "norm"),
        Module(f"{prefix}.attention.wq_a", (config.q_lora_rank, hidden), "linear"),
        Module(f"{prefix}.attention.q_a_norm", (config.q_lora_rank,), "norm"),
        Module(f"{prefix}.attention.wq_b", (heads * (nope + rotary), config.q_lora_rank), "linear"),
        Module(f"{prefix}.attention.wkv_a_with_mqa", (latent + rotary, hidden), "linear"),
        Module(f"{prefix}.attention.kv_a_norm", (latent,), "norm"),
        Module(f"{prefix}.attention.wkv_b", (heads * (nope + value), latent), "linear"),
        Module(f"{prefix}.attention.wo", (hidden, heads * value), "linear"),
        Module(f"{prefix}.ffn_norm", (hidden,), "norm"),
    ]


def _mlp(prefix: str, hidden: int, inner: int, role: Literal["linear", "expert"]) -> list[Module]:
    return [
        Module(f"{prefix}.w1", (inner, hidden), role),
        Module(f"{prefix}.w2", (hidden, inner), role),
        Module(f"{prefix}.w3", (inner, hidden), role),
    ]


def _group_table(group: list[Module], layout: Layout) -> Table:
    table: Table = {}
    for module in group:
        if layout.endswith("fp8") and module.role in ("linear", "expert"):
            table[f"{module.name}.weight"] = TensorSpec("F8_E4M3", module.shape)
            table[f"{module.name}.qscale_weight"] = TensorSpec("BF16", ())
            table[f"{module.name}.qscale_act"] = TensorSpec("BF16", ())
        elif layout == "native-nvfp4" and module.role == "expert":
            rows, columns = module.shape
            input_scale = "BF16" if ".shared_experts." in module.name else "F32"
            table[f"{module.name}.weight_packed"] = TensorSpec("U8", (rows, columns // 2))
            table[f"{module.name}.weight_scale"] = TensorSpec("F8_E4M3", (rows, columns // 16))
            table[f"{module.name}.weight_global_scale"] = TensorSpec("F32", (1,))
            table[f"{module.name}.input_global_scale"] = TensorSpec(input_scale, (1,))
        else:
            table[f"{module.name}.weight"] = TensorSpec("BF16", module.shape)
    return table


def _hf_group_table(group: list[Module], layout: Layout) -> Table:
    if len(group) == 1:
        return {hf_name(name): spec for name, spec in _group_table(group, layout).items()}
    num_experts, (inner, hidden) = len(group) // 3, group[0].shape
    stack = hf_stack(group)
    shapes = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
    table: Table = {}
    for part, shape in shapes.items():
        table[f"{stack}.{part}"] = TensorSpec(
            "F8_E4M3" if layout == "hf-fp8" else "BF16", (num_experts, *shape)
        )
        if layout == "hf-fp8":
            table[f"{stack}.{part}_scale_inv"] = TensorSpec("BF16", (num_experts, 1, 1))
            table[f"{stack}.{part}_activation_scale"] = TensorSpec("BF16", (num_experts,))
    return table


def hf_name(native: str) -> str:
    module, _, suffix = native.rpartition(".")
    if module in _HF_TOP:
        return f"{_HF_TOP[module]}.{_HF_SUFFIXES[suffix]}"
    layers, number, inside = module.split(".", 2)
    return f"language_model.model.{layers}.{number}.{_HF_NAMES[inside]}.{_HF_SUFFIXES[suffix]}"


def hf_stack(group: list[Module]) -> str:
    return f"language_model.model.layers.{group[0].name.split('.')[1]}.mlp.experts"
