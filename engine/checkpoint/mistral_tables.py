"""Which tensors Mistral Small 4, its Eagle head and its vision encoder consist of.

``expected_weights`` names what a reader must deliver: Mistral's own spelling, a layer's experts stacked into
one weight. The vision encoder is known by name and shape only, in both spellings; nothing reads it, but
a tensor that claims to belong to it must look as if it did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine.checkpoint.plan import Expected
from engine.checkpoint.safetensors_header import Shape
from engine.config import Fields, Mistral4Config

EAGLE_LINEAR: Final = "eagle_linear.weight"  # the head's first product, over [embedding, feature]


def expected_weights(config: Mistral4Config) -> dict[str, Expected]:
    """Every weight of the model by canonical name. An Eagle head has no embedding and no output."""
    hidden, vocab = config.hidden_size, config.vocab_size
    if config.num_experts:
        expected = {"tok_embeddings.weight": Expected((vocab, hidden))}
    else:
        expected = {EAGLE_LINEAR: Expected((hidden, 2 * hidden), is_linear=True)}
    for layer in range(config.num_layers):
        expected |= {f"layers.{layer}.{name}": weight for name, weight in _of_layer(config).items()}
    expected["norm.weight"] = Expected((hidden,))
    if config.num_experts:
        expected["output.weight"] = Expected((vocab, hidden))
    return expected


def _of_layer(config: Mistral4Config) -> dict[str, Expected]:
    hidden, heads = config.hidden_size, config.num_heads
    nope, rotary, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim

    def linear(out_features: int, in_features: int, num_experts: int = 0) -> Expected:
        return Expected((out_features, in_features), num_experts, is_linear=True)

    expected = {
        "attention_norm.weight": Expected((hidden,)),
        "attention.wq_a.weight": linear(config.q_lora_rank, hidden),
        "attention.q_a_norm.weight": Expected((config.q_lora_rank,)),
        "attention.wq_b.weight": linear(heads * (nope + rotary), config.q_lora_rank),
        "attention.wkv_a_with_mqa.weight": linear(config.latent_dim, hidden),
        "attention.kv_a_norm.weight": Expected((config.kv_lora_rank,)),
        "attention.wkv_b.weight": linear(heads * (nope + value), config.kv_lora_rank),
        "attention.wo.weight": linear(hidden, heads * value),
        "ffn_norm.weight": Expected((hidden,)),
    }
    if not config.num_experts:
        return expected | _mlp("feed_forward.{}.weight", hidden, config.intermediate_size)
    inner, experts = config.moe_intermediate_size, config.num_experts
    expected["gate.weight"] = Expected((experts, hidden))
    expected |= _mlp("experts.{}", hidden, inner, experts)
    return expected | _mlp("shared_experts.{}.weight", hidden, config.num_shared_experts * inner)


def _mlp(name: str, hidden: int, inner: int, num_experts: int = 0) -> dict[str, Expected]:
    """gate (w1), up (w3) and down (w2) of a SwiGLU MLP."""
    shapes: dict[str, Shape] = {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}
    return {name.format(part): Expected(shape, num_experts, True) for part, shape in shapes.items()}


@dataclass(frozen=True, slots=True)
class VisionShape:
    """Sizes of the Pixtral encoder and of the adapter behind it."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_channels: int
    patch_size: int
    merge_size: int
    text_hidden_size: int
    has_bias: bool = False  # of the adapter

    @classmethod
    def from_params(cls, params: Mapping[str, Any], where: str) -> VisionShape | None:
        """From a parsed params.json; None if it has no vision encoder. Raises ConfigError."""
        fields = Fields(params, where)
        vision = fields.inner("vision_encoder")
        if not vision.raw:
            return None
        vision.refuse_all_but(
            {"mm_projector_id": ("patch_merge",), "add_pre_mm_projector_layer_norm": (True,)}
        )
        return cls(
            hidden_size=vision.whole("hidden_size"),
            num_layers=vision.whole("num_hidden_layers"),
            intermediate_size=vision.whole("intermediate_size"),
            num_channels=vision.whole("num_channels", 3),
            patch_size=vision.whole("patch_size"),
            merge_size=vision.whole("spatial_merge_size"),
            text_hidden_size=fields.whole("dim"),
            has_bias=vision.flag("adapter_bias", False),
        )

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], text_hidden_size: int, where: str) -> VisionShape | None:
        """From a parsed config.json; None if it has no vision_config. Raises ConfigError."""
        fields = Fields(raw, where)
        vision = fields.inner("vision_config")
        if not vision.raw:
            return None
        return cls(
            hidden_size=vision.whole("hidden_size"),
            num_layers=vision.whole("num_hidden_layers"),
            intermediate_size=vision.whole("intermediate_size"),
            num_channels=vision.whole("num_channels", 3),
            patch_size=vision.whole("patch_size"),
            merge_size=fields.whole("spatial_merge_size"),
            text_hidden_size=text_hidden_size,
            has_bias=fields.flag("multimodal_projector_bias", False),
        )

    def native_tensors(self) -> dict[str, Shape]:
        """Stored name -> shape in files of Mistral's format."""
        hidden, inner = self.hidden_size, self.intermediate_size
        of_layer: dict[str, Shape] = {f"attention.{part}.weight": (hidden, hidden) for part in _ATTENTION}
        of_layer |= {"attention_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
        of_layer |= {f"feed_forward.{part}.weight": (inner, hidden) for part in ("w1", "w3")}
        of_layer["feed_forward.w2.weight"] = (hidden, inner)
        tensors: dict[str, Shape] = {
            "vision_encoder.patch_conv.weight": (hidden, self.num_channels, self.patch_size, self.patch_size),
            "vision_encoder.ln_pre.weight": (hidden,),
            "pre_mm_projector_norm.weight": (hidden,),
            "patch_merger.merging_layer.weight": (hidden, hidden * self.merge_size**2),
            "vision_language_adapter.w_in.weight": (self.text_hidden_size, hidden),
            "vision_language_adapter.w_out.weight": (self.text_hidden_size, self.text_hidden_size),
        }
        if self.has_bias:
            tensors |= {f"vision_language_adapter.{part}.bias": (self.text_hidden_size,) for part in _ADAPTER}
        for layer in range(self.num_layers):
            prefix = f"vision_encoder.transformer.layers.{layer}"
            tensors |= {f"{prefix}.{name}": shape for name, shape in of_layer.items()}
        return tensors

    def hf_tensors(self) -> dict[str, Shape]:
        """Stored name -> shape in Hugging Face files, without the ``model.`` that some put in front."""
        return {_hf_vision_name(name): shape for name, shape in self.native_tensors().items()}


_ATTENTION: Final = ("wq", "wk", "wv", "wo")
_ADAPTER: Final = ("w_in", "w_out")
_HF_VISION: Final[Mapping[str, str]] = {
    "pre_mm_projector_norm": "multi_modal_projector.norm",
    "patch_merger": "multi_modal_projector.patch_merger",
    "vision_language_adapter.w_in": "multi_modal_projector.linear_1",
    "vision_language_adapter.w_out": "multi_modal_projector.linear_2",
    "attention.wq": "attention.q_proj",
    "attention.wk": "attention.k_proj",
    "attention.wv": "attention.v_proj",
    "attention.wo": "attention.o_proj",
    "feed_forward.w1": "feed_forward.gate_proj",
    "feed_forward.w3": "feed_forward.up_proj",
    "feed_forward.w2": "feed_forward.down_proj",
    "vision_encoder": "vision_tower",
}


def _hf_vision_name(native: str) -> str:
    for theirs, ours in _HF_VISION.items():
        native = native.replace(f"{theirs}.", f"{ours}.")
    return native
