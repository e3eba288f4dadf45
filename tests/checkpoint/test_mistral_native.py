"""Mistral's own format: what is stored is what is loaded, and everything that does not fit is named."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import engine.checkpoint.stream
from engine.checkpoint import open_checkpoint, open_model
from engine.checkpoint.mistral_tables import expected_weights
from engine.checkpoint.native import NativeCheckpoint, read_mistral_head
from engine.checkpoint.synthetic import write_head, write_target
from engine.checkpoint.synthetic_config import SMALL_4, TINY, TINY_VISION, head_config
from engine.checkpoint.synthetic_tables import Layout
from engine.config import LlamaConfig, Mistral4Config
from engine.errors import CheckpointError, ConfigError
from engine.nn.weight import Fp8Weight, Nvfp4Weight
from tests.checkpoint.files import random_weights, write_hf
from tests.checkpoint.mistral_files import edit_json, read_all, rewrite, same_bits

HEAD = head_config(TINY)

# params.json of the published FP8 target, key by key
PUBLISHED: dict[str, Any] = {
    "dim": 4096, "n_layers": 36, "head_dim": 128, "hidden_dim": 12288, "n_heads": 32, "n_kv_heads": 32,
    "rope_theta": 10000.0, "norm_eps": 1e-6, "vocab_size": 131072, "tied_embeddings": False,
    "max_position_embeddings": 1048576, "q_lora_rank": 1024, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64, "v_head_dim": 128,
    "moe": {
        "num_experts": 128, "num_experts_per_tok": 4, "expert_hidden_dim": 2048, "first_k_dense_replace": 0,
        "num_shared_experts": 1, "routed_scale": 1.0, "num_expert_groups": 1, "num_expert_groups_per_tok": 1,
        "route_every_n": 1, "expert_parallel": 1, "expert_model_parallel": 1,
    },
    "yarn": {
        "factor": 128, "original_max_position_embeddings": 8192, "beta": 32, "alpha": 1, "apply_scale": False,
    },
    "llama_4_scaling": {"original_max_position_embeddings": 8192, "beta": 0.1},
    "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"},
}  # fmt: skip


def tiny(directory: Path, layout: Layout = "native-fp8", **options: Any) -> Path:
    return write_target(directory / "tiny", TINY, layout, **options)


def open_native(directory: Path) -> NativeCheckpoint:
    checkpoint = open_model(directory)
    assert isinstance(checkpoint, NativeCheckpoint)
    return checkpoint


# --- what is stored is what is loaded ---


def test_the_published_params_are_read(tmp_path: Path) -> None:
    from engine.checkpoint.mistral import read_params

    assert read_params(PUBLISHED, "params.json") == SMALL_4
    rope = SMALL_4.yarn
    assert rope is not None
    assert (rope.factor, rope.beta_fast, rope.beta_slow) == (128, 32, 1)
    assert (SMALL_4.llama_4_beta, SMALL_4.softmax_mscale, SMALL_4.eos_token_ids) == (0.1, False, (2,))


def test_fp8_codes_and_scales_are_those_of_the_file(tmp_path: Path) -> None:
    stored = read_all(tiny(tmp_path))
    loaded = open_native(tmp_path / "tiny").load(torch.float32, "cpu")
    assert list(loaded) == list(expected_weights(TINY))
    experts = loaded["layers.1.experts.w3"]
    assert isinstance(experts, Fp8Weight)
    assert experts.input_scale is not None
    for expert in range(TINY.num_experts):
        name = f"layers.1.experts.{expert}.w3"
        assert same_bits(experts.codes[expert], stored[f"{name}.weight"])
        assert float(experts.scale[expert]) == float(stored[f"{name}.qscale_weight"])
        assert float(experts.input_scale[expert]) == float(stored[f"{name}.qscale_act"])
    single = loaded["layers.0.attention.wkv_a_with_mqa.weight"]
    assert isinstance(single, Fp8Weight)
    assert single.input_scale is not None
    assert same_bits(single.codes, stored["layers.0.attention.wkv_a_with_mqa.weight"])
    assert (single.scale.shape, single.scale.dtype) == (torch.Size([]), torch.float32)
    assert float(single.scale) == float(stored["layers.0.attention.wkv_a_with_mqa.qscale_weight"])
    assert float(single.input_scale) == float(stored["layers.0.attention.wkv_a_with_mqa.qscale_act"])
    for name in ("tok_embeddings.weight", "output.weight", "norm.weight", "layers.1.gate.weight"):
        plain = loaded[name]
        assert isinstance(plain, Tensor)
        assert same_bits(plain, stored[name].float())


def test_nvfp4_codes_and_scales_are_those_of_the_file(tmp_path: Path) -> None:
    stored = read_all(tiny(tmp_path, "native-nvfp4"))
    loaded = open_native(tmp_path / "tiny").load(torch.bfloat16, "cpu")
    experts = loaded["layers.0.experts.w2"]
    assert isinstance(experts, Nvfp4Weight)
    assert experts.shape == (TINY.num_experts, TINY.hidden_size, TINY.moe_intermediate_size)
    for expert in range(TINY.num_experts):
        name = f"layers.0.experts.{expert}.w2"
        assert same_bits(experts.codes[expert], stored[f"{name}.weight_packed"])
        assert same_bits(experts.block_scales[expert], stored[f"{name}.weight_scale"])
        assert float(experts.divisor[expert]) == float(stored[f"{name}.weight_global_scale"])
    shared = loaded["layers.1.shared_experts.w1.weight"]
    assert isinstance(shared, Nvfp4Weight)
    assert same_bits(shared.block_scales, stored["layers.1.shared_experts.w1.weight_scale"])
    assert shared.divisor.shape == ()
    attention = loaded["layers.1.attention.wo.weight"]
    assert isinstance(attention, Tensor)
    assert same_bits(attention, stored["layers.1.attention.wo.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_plain_experts_are_stacked_in_the_dtype_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = read_all(tiny(tmp_path, "native-bf16"))
    loaded = open_native(tmp_path / "tiny").load(dtype, "cpu")
    expected = torch.stack([stored[f"layers.0.experts.{i}.w1.weight"] for i in range(TINY.num_experts)])
    experts = loaded["layers.0.experts.w1"]
    assert isinstance(experts, Tensor)
    assert same_bits(experts, expected.to(dtype))


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_load_as_one_file_does(tmp_path: Path, with_index: bool) -> None:
    whole = open_native(tiny(tmp_path / "one", "native-nvfp4")).load(torch.float32, "cpu")
    directory = tiny(tmp_path / "many", "native-nvfp4", num_shards=4)
    if not with_index:
        (directory / "consolidated.safetensors.index.json").unlink()
    parts = open_native(directory).load(torch.float32, "cpu")
    for name, weight in whole.items():
        other = parts[name]
        if isinstance(weight, Tensor):
            assert isinstance(other, Tensor)
            assert same_bits(other, weight)
        else:
            assert type(other) is type(weight)
            for part in dataclasses.fields(weight):
                left, right = getattr(other, part.name), getattr(weight, part.name)
                assert right is None or same_bits(left, right), (name, part.name)


def test_vision_and_input_divisors_are_known_and_not_read(tmp_path: Path) -> None:
    checkpoint = open_native(tiny(tmp_path, "native-nvfp4", vision=TINY_VISION))
    vision = set(TINY_VISION.native_tensors())
    divisors = {name for name in checkpoint.stored if name.endswith("input_global_scale")}
    assert set(checkpoint.plan.unread) == vision | divisors
    assert len(divisors) == TINY.num_layers * (TINY.num_experts + 1) * 3
    read = sum(entry.num_bytes for name, entry in checkpoint.stored.items() if name not in vision | divisors)
    calls: list[tuple[int, int]] = []
    checkpoint.load(torch.bfloat16, "cpu", lambda done, total: calls.append((done, total)))
    assert calls[-1] == (read, read)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_may_have_any_of_these_shapes_and_types(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    names = [
        f"layers.0.{module}.qscale_{of}"
        for module in ("attention.wo", "experts.3.w2")
        for of in ("weight", "act")
    ]
    rewrite(tiny(tmp_path), {name: torch.full(shape, 0.375, dtype=dtype) for name in names})
    loaded = open_native(tmp_path / "tiny").load(torch.bfloat16, "cpu")
    single, experts = loaded["layers.0.attention.wo.weight"], loaded["layers.0.experts.w2"]
    assert isinstance(single, Fp8Weight)
    assert isinstance(experts, Fp8Weight)
    for found in (single.scale, single.input_scale):
        assert found is not None
        assert found.shape == ()
        assert float(found) == 0.375
    assert float(experts.scale[3]) == 0.375
    assert float(experts.scale[2]) != 0.375


def test_dynamic_activations_have_no_scales(tmp_path: Path) -> None:
    stored = read_all(tiny(tmp_path))
    edit_json(tmp_path / "tiny" / "params.json", {"quantization": {"qscheme_act": "NO_SCALES"}})
    with pytest.raises(CheckpointError, match=r"64 unexpected tensors: .*qscale_act"):
        open_model(tmp_path / "tiny")
    rewrite(tmp_path / "tiny", {name: None for name in stored if name.endswith("qscale_act")})
    experts = open_native(tmp_path / "tiny").load(torch.bfloat16, "cpu")["layers.0.experts.w1"]
    assert isinstance(experts, Fp8Weight)
    assert experts.input_scale is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_needs_little_more_memory_than_its_result(tmp_path: Path) -> None:
    config = dataclasses.replace(
        TINY, vocab_size=40_000, hidden_size=512, moe_intermediate_size=1024, num_layers=1
    )
    checkpoint = open_native(write_target(tmp_path, config, "native-fp8"))
    result = checkpoint.plan.num_bytes
    assert result > 90 << 20

    def memory(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is used now
    before = memory("VmRSS")
    loaded = checkpoint.load(torch.float16, "cpu")  # FP8 lands in place, BF16 is converted on the way
    assert memory("VmHWM") - before < result + engine.checkpoint.stream.STAGE_BYTES + (8 << 20)
    assert len(loaded) == len(expected_weights(config))


# --- which format a directory has ---


def test_native_is_preferred_where_both_formats_are_there(tmp_path: Path) -> None:
    write_target(tmp_path, TINY, "native-fp8")
    write_target(tmp_path, TINY, "hf-fp8")
    assert isinstance(open_model(tmp_path), NativeCheckpoint)
    (tmp_path / "consolidated.safetensors").unlink()
    assert not isinstance(open_model(tmp_path), NativeCheckpoint)


def test_older_mistral_models_in_both_formats_stay_llama_models(tmp_path: Path) -> None:
    config = LlamaConfig(64, 32, 48, 1, 4, 2, 8, 128, eos_token_ids=(2,), bos_token_id=1)
    directory = write_hf(tmp_path / "old", config, random_weights(config))
    (directory / "params.json").write_text(json.dumps({"dim": 32, "n_layers": 1, "n_heads": 4}))
    save_file({"norm.weight": torch.ones(32)}, directory / "consolidated.safetensors")
    assert open_checkpoint(directory).config == config


def test_those_who_take_llama_models_only_are_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found a Mistral Small 4 model, expected a Llama model"):
        open_checkpoint(tiny(tmp_path))


@pytest.mark.parametrize(("layout", "wanted"), [("native-fp8", "consolidated"), ("hf-fp8", "model")])
def test_the_hub_is_asked_for_one_format_of_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout, wanted: str
) -> None:
    import huggingface_hub

    directory = write_target(tmp_path / "0123abc", TINY, layout, num_shards=2)
    away = tmp_path / "away"
    away.mkdir()
    for file in directory.glob("*.safetensors"):
        file.rename(away / file.name)
    calls: list[tuple[list[str], str | None]] = []

    def snapshot(repo: str, *, allow_patterns: list[str], revision: str | None = None) -> str:
        assert repo == "org/name"
        calls.append((allow_patterns, revision))
        if revision is not None:
            for file in away.iterdir():
                file.rename(directory / file.name)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    assert open_model("org/name").config == TINY
    assert {"params.json", "tekken.json"} <= set(calls[0][0])
    assert not any("*" in pattern for pattern in calls[0][0])
    assert calls[1:] == [([f"{wanted}*.safetensors"], "0123abc")]
    open_model("org/name")
    assert len(calls) == 3  # the weights are there now


# --- the Eagle head ---


def test_a_head_is_read_as_stored(tmp_path: Path) -> None:
    stored = read_all(write_head(tmp_path, HEAD))
    head = read_mistral_head(tmp_path)
    assert (head.config, head.path, len(head.stored)) == (HEAD, tmp_path, 60)
    loaded = head.load(torch.float32, "cpu")
    assert list(loaded) == list(expected_weights(HEAD))
    linear = loaded["eagle_linear.weight"]
    assert isinstance(linear, Fp8Weight)
    assert same_bits(linear.codes, stored["eagle_linear.weight"])
    assert float(linear.scale) == float(stored["eagle_linear.qscale_weight"])
    norm = loaded["norm.weight"]
    assert isinstance(norm, Tensor)
    assert same_bits(norm, stored["norm.weight"].float())


def test_the_head_loader_is_tolerant(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    embedding = torch.randn(HEAD.vocab_size, HEAD.hidden_size).bfloat16()
    plain = torch.randn(HEAD.hidden_size, 2 * HEAD.hidden_size).bfloat16()
    changes: dict[str, Tensor | None] = {
        "norm.weight": None,
        "eagle_linear.weight": plain,
        "eagle_linear.qscale_weight": None,
        "eagle_linear.qscale_act": None,
        "tok_embeddings.weight": embedding,
        "output.weight": torch.randn(7, HEAD.hidden_size),
    }
    rewrite(write_head(tmp_path, HEAD), changes)
    with caplog.at_level(logging.WARNING):
        head = read_mistral_head(tmp_path)
    no_norm, no_output = (record.getMessage() for record in caplog.records)
    assert "the head has no norm.weight" in no_norm
    assert f"tensor output.weight has shape [7, 64], not [{HEAD.vocab_size}, 64]" in no_output
    loaded = head.load(torch.bfloat16, "cpu")
    assert set(loaded) == set(expected_weights(HEAD)) - {"norm.weight"} | {"tok_embeddings.weight"}
    for name, tensor in (("eagle_linear.weight", plain), ("tok_embeddings.weight", embedding)):
        weight = loaded[name]
        assert isinstance(weight, Tensor)
        assert same_bits(weight, tensor)


def remove_params(directory: Path) -> None:
    (directory / "params.json").unlink()


def add_experts(directory: Path) -> None:
    edit_json(directory / "params.json", {"moe": {"num_experts": 8}})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_params, r"no params\.json"),
        (add_experts, r"params\.json: moe is .*only without it"),
        (
            lambda path: rewrite(path, {"eagle_linear.weight": None}),
            r"tensor eagle_linear\.weight is missing",
        ),
        (lambda path: rewrite(path, {"layers.1.ffn_norm.weight": None}), r"missing: layers\.1\.ffn_norm"),
        (lambda path: rewrite(path, {"fc.weight": torch.ones(3)}), r"1 unexpected tensors: fc\.weight"),
        (lambda path: rewrite(path, {"norm.weight": torch.ones(63)}), r"norm\.weight has shape \[63\]"),
        (
            lambda path: rewrite(path, {"eagle_linear.weight": torch.ones(64, 64).bfloat16()}),
            r"eagle_linear\.weight has shape \[64, 64\], expected \[64, 128\]",
        ),
    ],
)
def test_heads_that_do_not_fit_are_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(write_head(tmp_path, HEAD))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        read_mistral_head(tmp_path)


def test_a_target_is_no_head_and_a_head_no_target(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="moe is"):
        read_mistral_head(tiny(tmp_path))
    with pytest.raises(ConfigError, match="'moe' is missing"):
        open_model(write_head(tmp_path / "head", HEAD))
    assert dataclasses.replace(HEAD, num_layers=TINY.num_layers) == head_config(TINY, TINY.num_layers)
    assert isinstance(HEAD, Mistral4Config)
