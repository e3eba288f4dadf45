"""The published model's sizes, a tiny one's, and params.json and config.json as published, for any size."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from engine.checkpoint.mistral_tables import VisionShape
from engine.config import Mistral4Config, YarnScaling

SMALL_4: Final = Mistral4Config(
    vocab_size=131072,
    hidden_size=4096,
    num_layers=36,
    num_heads=32,
    q_lora_rank=1024,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=128,
    max_position_embeddings=1048576,
    intermediate_size=12288,
    num_experts=128,
    num_experts_per_tok=4,
    num_shared_experts=1,
    moe_intermediate_size=2048,
    yarn=YarnScaling(128.0, 8192),
    llama_4_beta=0.1,
)
SMALL_4_VISION: Final = VisionShape(
    hidden_size=1024,
    num_layers=24,
    intermediate_size=4096,
    num_channels=3,
    patch_size=14,
    merge_size=2,
    text_hidden_size=4096,
)
TINY: Final = Mistral4Config(
    vocab_size=512,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    q_lora_rank=32,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=32,
    max_position_embeddings=512,
    intermediate_size=96,
    num_experts=8,
    num_experts_per_tok=2,
    num_shared_experts=1,
    moe_intermediate_size=48,
    yarn=YarnScaling(8.0, 64),
    llama_4_beta=0.1,
    llama_4_original_positions=64,
)
TINY_VISION: Final = VisionShape(
    hidden_size=32,
    num_layers=1,
    intermediate_size=48,
    num_channels=3,
    patch_size=14,
    merge_size=2,
    text_hidden_size=64,
)


def head_config(target: Mistral4Config, num_layers: int = 2) -> Mistral4Config:
    """The Eagle head that goes with a target: its trunk with fewer layers and a dense MLP."""
    return dataclasses.replace(
        target,
        num_layers=num_layers,
        num_experts=0,
        num_experts_per_tok=0,
        num_shared_experts=0,
        moe_intermediate_size=0,
    )


def params_json(config: Mistral4Config, quantised: str | None, vision: VisionShape | None) -> dict[str, Any]:
    """Mistral's format. quantised: "fp8", "nvfp4" or None; without experts: of an Eagle head."""
    raw: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "head_dim": config.v_head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_heads,
        "rope_theta": config.rope_theta,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "tied_embeddings": False,
        "max_position_embeddings": config.max_position_embeddings,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "llama_4_scaling": {
            "original_max_position_embeddings": config.llama_4_original_positions,
            "beta": config.llama_4_beta,
        },
    }
    if config.llama_4_beta == 0:
        del raw["llama_4_scaling"]
    if config.yarn is not None:
        raw["yarn"] = {
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_max_position_embeddings,
            "beta": config.yarn.beta_fast,
            "alpha": config.yarn.beta_slow,
            "apply_scale": False,
        }
    if config.num_experts:
        raw["moe"] = {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "expert_hidden_dim": config.moe_intermediate_size,
            "first_k_dense_replace": 0,
            "num_shared_experts": config.num_shared_experts,
            "routed_scale": config.routed_scaling_factor,
            "num_expert_groups": 1,
            "num_expert_groups_per_tok": 1,
            "route_every_n": 1,
            "expert_parallel": 1,
            "expert_model_parallel": 1,
        }
    if quantised == "fp8":
        raw["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    elif quantised == "nvfp4":
        raw["quantization_config"] = _nvfp4_block()
    if vision is not None:
        raw["vision_encoder"] = {
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": max(vision.hidden_size // 64, 1),
            "intermediate_size": vision.intermediate_size,
            "num_channels": vision.num_channels,
            "patch_size": vision.patch_size,
            "image_size": 1540,
            "max_image_size": 1540,
            "rope_theta": 10000.0,
            "spatial_merge_size": vision.merge_size,
            "mm_projector_id": "patch_merge",
            "add_pre_mm_projector_layer_norm": True,
            "adapter_bias": vision.has_bias,
            "image_token_id": 10,
            "image_break_token_id": 12,
            "image_end_token_id": 13,
        }
    return raw


def _nvfp4_block() -> dict[str, Any]:
    four_bits = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    return {
        "quant_method": "compressed-tensors",
        "version": "0.13.0",
        "format": "nvfp4-pack-quantized",
        "config_groups": {
            "NVFP4A16": {
                "targets": ["Linear"],
                "weights": {**four_bits, "dynamic": False, "scale_dtype": "torch.float8_e4m3fn"},
                "input_activations": {**four_bits, "dynamic": "local", "observer": "static_minmax"},
            }
        },
        "kv_cache_scheme": None,
        "ignore": ["model.embed_tokens", "lm_head", "re:.*gate$", "re:.*self_attn.*", "re:.*attention.*"],
    }


def config_json(config: Mistral4Config, quantised: str | None, vision: VisionShape | None) -> dict[str, Any]:
    """Hugging Face's format, a ``mistral3`` around a ``mistral4``. quantised: "fp8" or None."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.yarn is not None:
        rope = {
            "type": "yarn",
            "rope_type": "yarn",
            "rope_theta": config.rope_theta,
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_max_position_embeddings,
            "beta_fast": config.yarn.beta_fast,
            "beta_slow": config.yarn.beta_slow,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
    if config.llama_4_beta:
        rope["llama_4_scaling_beta"] = config.llama_4_beta
    raw: dict[str, Any] = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "dtype": "bfloat16",
        "image_token_index": 10,
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2 if vision is None else vision.merge_size,
        "vision_feature_layer": -1,
        "text_config": {
            "model_type": "mistral4",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "moe_intermediate_size": config.moe_intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_heads,
            "n_shared_experts": config.num_shared_experts,
            "n_routed_experts": config.num_experts,
            "routed_scaling_factor": config.routed_scaling_factor,
            "kv_lora_rank": config.kv_lora_rank,
            "q_lora_rank": config.q_lora_rank,
            "qk_rope_head_dim": config.qk_rope_head_dim,
            "qk_nope_head_dim": config.qk_nope_head_dim,
            "v_head_dim": config.v_head_dim,
            "head_dim": config.qk_nope_head_dim + config.qk_rope_head_dim,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": config.num_experts_per_tok,
            "first_k_dense_replace": 0,
            "norm_topk_prob": True,
            "hidden_act": "silu",
            "max_position_embeddings": config.max_position_embeddings,
            "initializer_range": 0.02,
            "rms_norm_eps": config.rms_norm_eps,
            "tie_word_embeddings": False,
            "rope_interleave": True,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": list(config.eos_token_ids),
            "pad_token_id": 11,
            "rope_parameters": rope,
        },
    }
    if vision is not None:
        raw["vision_config"] = {
            "model_type": "pixtral",
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": max(vision.hidden_size // 64, 1),
            "intermediate_size": vision.intermediate_size,
            "num_channels": vision.num_channels,
            "patch_size": vision.patch_size,
            "image_size": 1540,
        }
    if quantised == "fp8":
        raw["quantization_config"] = {
            "quant_method": "fp8",
            "activation_scheme": "static",
            "weight_block_size": None,
            "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        }
    return raw
