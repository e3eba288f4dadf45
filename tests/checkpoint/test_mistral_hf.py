"""Hugging Face's format of Mistral Small 4: every spelling of the same model loads as the same weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint import open_model
from engine.checkpoint.mistral import read_hf_config
from engine.checkpoint.mistral_hf import MistralHfCheckpoint
from engine.checkpoint.mistral_tables import expected_weights
from engine.checkpoint.synthetic import write_target
from engine.checkpoint.synthetic_config import SMALL_4, TINY, TINY_VISION
from engine.checkpoint.synthetic_tables import Layout
from engine.config import YarnScaling
from engine.errors import CheckpointError, ConfigError
from engine.nn.weight import Fp8Weight
from tests.checkpoint.mistral_files import Changes, edit_json, read_all, rewrite, same_bits, wide

STACK = "language_model.model.layers.1.mlp.experts"
INNER = TINY.moe_intermediate_size

# text_config and what stands around it in the published config.json, key by key
TEXT: dict[str, Any] = {
    "model_type": "mistral4", "vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 12288,
    "moe_intermediate_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 32, "n_shared_experts": 1, "n_routed_experts": 128, "routed_scaling_factor": 1.0,
    "kv_lora_rank": 256, "q_lora_rank": 1024, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64,
    "v_head_dim": 128, "head_dim": 128, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4,
    "first_k_dense_replace": 0, "norm_topk_prob": True, "hidden_act": "silu",
    "max_position_embeddings": 1048576, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "rope_interleave": True, "attention_bias": False, "attention_dropout": 0,
    "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 11,
    "rope_parameters": {
        "type": "yarn", "rope_type": "yarn", "rope_theta": 10000, "factor": 128,
        "original_max_position_embeddings": 8192, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
        "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    },
}  # fmt: skip
PUBLISHED: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "spatial_merge_size": 2,
    "text_config": TEXT,
}


def tiny(directory: Path, layout: Layout = "hf-fp8", **options: Any) -> Path:
    return write_target(directory / "tiny", TINY, layout, **options)


def open_hf(directory: Path) -> MistralHfCheckpoint:
    checkpoint = open_model(directory)
    assert isinstance(checkpoint, MistralHfCheckpoint)
    return checkpoint


def rename(directory: Path, names: Mapping[str, str]) -> Path:
    """Rename tensors whose names match a pattern, by the first pattern that does."""
    changes: dict[str, Tensor | None] = {}
    for name, tensor in read_all(directory).items():
        for pattern, replacement in names.items():
            renamed = re.sub(pattern, replacement, name)
            if renamed != name:
                changes |= {name: None, renamed: tensor}
                break
    assert changes
    return rewrite(directory, changes)


# --- what is stored is what is loaded ---


def test_the_published_config_is_read() -> None:
    assert read_hf_config(PUBLISHED, "config.json") == SMALL_4
    assert read_hf_config(TEXT, "config.json") == SMALL_4


def test_fused_experts_come_apart(tmp_path: Path) -> None:
    stored = read_all(tiny(tmp_path))
    loaded = open_hf(tmp_path / "tiny").load(torch.float32, "cpu")
    assert list(loaded) == list(expected_weights(TINY))
    fused = stored[f"{STACK}.gate_up_proj"]
    parts = {
        "w1": (fused[:, :INNER], "gate_up_proj"),
        "w3": (fused[:, INNER:], "gate_up_proj"),
        "w2": (stored[f"{STACK}.down_proj"], "down_proj"),
    }
    for part, (codes, source) in parts.items():
        weight = loaded[f"layers.1.experts.{part}"]
        assert isinstance(weight, Fp8Weight)
        assert weight.input_scale is not None
        assert weight.codes.is_contiguous()
        assert same_bits(weight.codes, codes.contiguous())
        assert same_bits(weight.scale, stored[f"{STACK}.{source}_scale_inv"].view(-1).float())
        assert same_bits(weight.input_scale, stored[f"{STACK}.{source}_activation_scale"].float())
    linear = loaded["layers.0.attention.wkv_b.weight"]
    assert isinstance(linear, Fp8Weight)
    name = "language_model.model.layers.0.self_attn.kv_b_proj"
    assert same_bits(linear.codes, stored[f"{name}.weight"])
    assert same_bits(linear.scale, stored[f"{name}.weight_scale_inv"].float())
    output = loaded["output.weight"]
    assert isinstance(output, Tensor)
    assert same_bits(output, stored["language_model.lm_head.weight"].float())


def test_both_formats_agree_within_one_fp8_step(tmp_path: Path) -> None:
    native = open_model(write_target(tmp_path / "native", TINY, "native-fp8")).load(torch.float32, "cpu")
    hf = open_hf(tiny(tmp_path)).load(torch.float32, "cpu")
    num_rounded = 0
    for name, weight in native.items():
        other = hf[name]
        if not name.endswith(("experts.w1", "experts.w3")):
            assert torch.equal(wide(weight), wide(other)), name
            continue
        assert isinstance(other, Fp8Weight)
        # half a step: 1/16 of the number, or half the distance of the smallest codes
        most = (wide(weight).abs() / 16).maximum(other.scale[:, None, None] * 2**-10)
        error = (wide(weight) - wide(other)).abs()
        assert bool((error <= most * 1.001).all()), name
        num_rounded += int((error > 0).sum())
    assert num_rounded > 1000


@pytest.mark.parametrize("layout", ["hf-fp8", "hf-bf16"])
@pytest.mark.parametrize(
    "names",
    [
        {r"^language_model\.model\.": "model.language_model.", r"^language_model\.lm_head": "lm_head",
         r"^(vision_tower|multi_modal_projector)\.": r"model.\1."},
        {r"^language_model\.model\.": "model.", r"^language_model\.lm_head": "lm_head"},
        {r"\.weight_scale_inv$": ".weight_scale", r"\.activation_scale$": ".input_scale",
         r"_activation_scale$": "_input_scale", r"_proj_scale_inv$": "_proj_weight_scale",
         r"^language_model\.lm_head": "lm_head"},
    ],
)  # fmt: skip
def test_every_spelling_of_names_is_read(tmp_path: Path, layout: Layout, names: Mapping[str, str]) -> None:
    expected = open_hf(tiny(tmp_path, layout, vision=TINY_VISION)).load(torch.float32, "cpu")
    checkpoint = open_hf(rename(tmp_path / "tiny", names))
    loaded = checkpoint.load(torch.float32, "cpu")
    assert all(torch.equal(wide(loaded[name]), wide(weight)) for name, weight in expected.items())
    assert len(checkpoint.plan.unread) == len(TINY_VISION.hf_tensors()) == 15


@pytest.mark.parametrize("layout", ["hf-fp8", "hf-bf16"])
def test_experts_may_be_stored_one_by_one(tmp_path: Path, layout: Layout) -> None:
    directory = tiny(tmp_path, layout)
    expected = open_hf(directory).load(torch.float32, "cpu")
    changes: dict[str, Tensor | None] = {}
    for name, tensor in read_all(directory).items():
        found = re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj(_scale_inv|_activation_scale)?", name)
        if found is None:
            continue
        suffix = {None: ".weight", "_scale_inv": ".weight_scale_inv"}.get(found[3], ".activation_scale")
        changes[name] = None
        for expert, one in enumerate(tensor):
            parts = {"down": one} if found[2] == "down" else {"gate": one, "up": one}
            if found[2] == "gate_up" and suffix == ".weight":
                parts = {"gate": one[:INNER], "up": one[INNER:]}
            for part, numbers in parts.items():
                changes[f"{found[1]}.{expert}.{part}_proj{suffix}"] = numbers.clone()
    loaded = open_hf(rewrite(directory, changes)).load(torch.float32, "cpu")
    for name, weight in expected.items():
        assert torch.equal(wide(loaded[name]), wide(weight)), name


@pytest.mark.parametrize("shape", [(), (1,), (8,), (8, 1), (8, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("of", ["scale_inv", "activation_scale"])
def test_scales_may_have_any_of_these_shapes_and_types(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype, of: str
) -> None:
    numbers = torch.arange(1.0, 1.0 + torch.Size(shape).numel()).view(shape).to(dtype)
    rewrite(tiny(tmp_path), {f"{STACK}.gate_up_proj_{of}": numbers})
    loaded = open_hf(tmp_path / "tiny").load(torch.bfloat16, "cpu")
    for part in ("w1", "w3"):
        weight = loaded[f"layers.1.experts.{part}"]
        assert isinstance(weight, Fp8Weight)
        scale = weight.scale if of == "scale_inv" else weight.input_scale
        assert scale is not None
        assert same_bits(scale, numbers.float().view(-1).expand(8).contiguous())


def test_dynamic_activations_need_no_scales(tmp_path: Path) -> None:
    directory = tiny(tmp_path)
    rewrite(directory, {name: None for name in read_all(directory) if name.endswith("activation_scale")})
    with pytest.raises(CheckpointError, match=r"missing: language_model\.model\.\S+\.activation_scale"):
        open_model(directory)
    edit_json(directory / "config.json", {"quantization_config": {"activation_scheme": "dynamic"}})
    weight = open_hf(directory).load(torch.bfloat16, "cpu")["layers.0.experts.w2"]
    assert isinstance(weight, Fp8Weight)
    assert weight.input_scale is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_directory_that_transformers_saved(tmp_path: Path) -> None:
    from transformers import Mistral4Config as TransformersConfig
    from transformers import Mistral4ForCausalLM

    sizes = {key: TEXT[key] for key in ("mlp_bias",)} | {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 6,
        "num_experts_per_tok": 2, "kv_lora_rank": 16, "q_lora_rank": 20, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 12, "max_position_embeddings": 512, "pad_token_id": 0,
    }  # fmt: skip
    rope = {**TEXT["rope_parameters"], "factor": 8.0, "original_max_position_embeddings": 64}
    oracle = Mistral4ForCausalLM(TransformersConfig(**sizes, rope_parameters=rope))
    oracle.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    checkpoint = open_hf(tmp_path / "saved")
    assert checkpoint.config.yarn == YarnScaling(8.0, 64, 32.0, 1.0)
    loaded = checkpoint.load(torch.float32, "cpu")
    state = oracle.state_dict()
    assert sum(wide(weight).numel() for weight in loaded.values()) == sum(map(torch.numel, state.values()))
    layer = oracle.model.layers[1]
    pairs = {
        "tok_embeddings.weight": oracle.model.embed_tokens.weight,
        "norm.weight": oracle.model.norm.weight,
        "output.weight": oracle.lm_head.weight,
        "layers.1.attention_norm.weight": layer.input_layernorm.weight,
        "layers.1.attention.wq_a.weight": layer.self_attn.q_a_proj.weight,
        "layers.1.attention.q_a_norm.weight": layer.self_attn.q_a_layernorm.weight,
        "layers.1.attention.wq_b.weight": layer.self_attn.q_b_proj.weight,
        "layers.1.attention.wkv_a_with_mqa.weight": layer.self_attn.kv_a_proj_with_mqa.weight,
        "layers.1.attention.kv_a_norm.weight": layer.self_attn.kv_a_layernorm.weight,
        "layers.1.attention.wkv_b.weight": layer.self_attn.kv_b_proj.weight,
        "layers.1.attention.wo.weight": layer.self_attn.o_proj.weight,
        "layers.1.ffn_norm.weight": layer.post_attention_layernorm.weight,
        "layers.1.gate.weight": layer.mlp.gate.weight,
        "layers.1.experts.w1": layer.mlp.experts.gate_up_proj[:, :24],
        "layers.1.experts.w3": layer.mlp.experts.gate_up_proj[:, 24:],
        "layers.1.experts.w2": layer.mlp.experts.down_proj,
        "layers.1.shared_experts.w1.weight": layer.mlp.shared_experts.gate_proj.weight,
        "layers.1.shared_experts.w3.weight": layer.mlp.shared_experts.up_proj.weight,
        "layers.1.shared_experts.w2.weight": layer.mlp.shared_experts.down_proj.weight,
    }
    assert {name for name in loaded if not name.startswith("layers.0.")} == set(pairs)
    for name, weight in pairs.items():
        assert torch.equal(wide(loaded[name]), weight.detach()), name


# --- refusals ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"model_type": "mistral"}, "text_config.model_type is 'mistral', expected 'mistral4'"),
        ({"hidden_act": "gelu"}, "text_config.hidden_act is 'gelu'"),
        ({"rope_interleave": False}, "rope_interleave is False, supported: True"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"n_group": 2}, "n_group is 2"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace is 3"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid', supported: 'softmax'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1, expected num_attention_heads 4"),
        ({"kv_lora_rank": None}, "'text_config.kv_lora_rank' is missing"),
        ({"rope_theta": 5000.0}, "rope_theta is 10000.0, expected the outer rope_theta 5000.0"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "only one of rope_parameters and rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type is 'llama3', expected 'default' or 'yarn'"),
        ({"rope_parameters": {"low_freq": 1}}, "rope_parameters.low_freq is 1, expected only the keys"),
        ({"rope_parameters": {"mscale_all_dim": 0.5}}, "mscale_all_dim is 0.5, expected mscale 1.0"),
        ({"rope_parameters": {"mscale_all_dim": 0.0}}, "mscale_all_dim is 0.0, expected a positive number"),
        ({"rope_parameters": {"mscale": None}}, "'text_config.rope_parameters.mscale' is missing"),
        ({"rope_parameters": {"attention_factor": 1.485}}, "attention_factor is 1.485, supported: 1"),
        ({"rope_parameters": {"truncate": False}}, "truncate is False"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "is 0.25, expected 16 of 32"),
    ],
)  # fmt: skip
def test_configs_that_we_do_not_implement_are_refused(
    tmp_path: Path, text: dict[str, Any], message: str
) -> None:
    edit_json(tiny(tmp_path) / "config.json", {"text_config": text})
    with pytest.raises(ConfigError) as caught:
        open_model(tmp_path / "tiny")
    assert "config.json: " in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq"}, "quantization_config.quant_method is 'awq', expected 'fp8'"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"quant_method": "compressed-tensors"}, "is 'compressed-tensors', expected 'fp8'; NVFP4"),
        ({"weight_block_size": [128, 128]}, r"weight_block_size is [128, 128], supported: only without it"),
        ({"activation_scheme": "token"}, "activation_scheme is 'token'"),
    ],
)  # fmt: skip
def test_other_quantisations_are_refused_by_name(
    tmp_path: Path, quantization: dict[str, Any], message: str
) -> None:
    edit_json(tiny(tmp_path) / "config.json", {"quantization_config": quantization})
    with pytest.raises(ConfigError) as caught:
        open_model(tmp_path / "tiny")
    assert message in str(caught.value)


def test_magnitudes_may_be_settled_by_an_attention_factor(tmp_path: Path) -> None:
    rope = {"attention_factor": 1.0, "mscale": None, "mscale_all_dim": 0.0}
    edit_json(tiny(tmp_path) / "config.json", {"text_config": {"rope_parameters": rope}})
    assert open_hf(tmp_path / "tiny").config == TINY


GATE_UP, DOWN = f"{STACK}.gate_up_proj", f"{STACK}.down_proj"
FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("hf-fp8", {GATE_UP: None}, rf"tiny: 1 of 73 expected tensors are missing: {re.escape(GATE_UP)};"),
        ("hf-fp8", {f"{GATE_UP}_scale_inv": None}, rf"missing: {re.escape(GATE_UP)}_scale_inv"),
        ("hf-fp8", {f"{DOWN}_activation_scale": None}, rf"missing: {re.escape(DOWN)}_activation_scale"),
        ("hf-bf16", {"language_model.lm_head.weight": None}, r"missing: language_model\.lm_head\.weight"),
        ("hf-fp8", {GATE_UP: torch.ones(8, 96, 63).to(FP8)}, r"shape \[8, 96, 63\], expected \[8, 96, 64\]"),
        ("hf-fp8", {DOWN: torch.ones(7, 64, 48).to(FP8)}, r"shape \[7, 64, 48\], expected \[8, 64, 48\]"),
        ("hf-fp8", {GATE_UP: torch.ones(8, 96, 64)}, r"gate_up_proj has type F32, expected F8_E4M3"),
        ("hf-bf16", {GATE_UP: torch.ones(8, 96, 64).to(FP8)}, r"missing: \S+gate_up_proj_scale_inv"),
        ("hf-fp8", {f"{DOWN}_scale_inv": torch.ones(8, 64)}, r"shape \[8, 64\], expected \[\] or \[1\] or"),
        ("hf-fp8", {f"{STACK}.bias": torch.ones(1)}, r"safetensors: 1 unexpected tensors: \S+\.bias"),
        ("hf-fp8", {"vision_tower.ln_pre.weight": torch.ones(32)}, r"1 unexpected tensors: vision_tower"),
        ("hf-fp8", {"lm_head.weight": torch.ones(512, 64)}, r"lm_head\.weight is also stored as \S*lm_head"),
        ("hf-fp8", {"model.norm.weight": torch.ones(64)}, r"norm\.weight is also stored as \S*norm\.weight"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, layout: Layout, changes: Changes, message: str
) -> None:
    rewrite(tiny(tmp_path, layout), changes)
    with pytest.raises(CheckpointError, match=message):
        open_model(tmp_path / "tiny")


def test_one_bad_number_among_many_is_named(tmp_path: Path) -> None:
    directory = tiny(tmp_path)
    scales = torch.ones(8, 1, 1)
    scales[6] = float("nan")
    rewrite(directory, {f"{DOWN}_scale_inv": scales})
    with pytest.raises(CheckpointError, match=rf"tensor {re.escape(DOWN)}_scale_inv holds the scale nan"):
        open_model(directory).load(torch.bfloat16, "cpu")
    codes = torch.zeros(8, 96, 64, dtype=torch.uint8)
    codes[7, 95, 63] = 0xFF  # of the last expert's w3
    rewrite(directory, {f"{DOWN}_scale_inv": scales.nan_to_num(1.0), GATE_UP: codes.view(FP8)})
    with pytest.raises(CheckpointError, match=rf"tensor {re.escape(GATE_UP)} holds NaN"):
        open_model(directory).load(torch.bfloat16, "cpu")


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    directory = tiny(tmp_path, num_shards=3)
    second = directory / "model-00002-of-00003.safetensors"
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{second.name}: not a complete safetensors file: it has"):
        open_model(directory)
