"""Files of Mistral's format that are refused: configs, headers and data, each by name."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import engine.checkpoint.stream
from engine.checkpoint import open_model
from engine.checkpoint.synthetic_config import TINY_VISION
from engine.checkpoint.synthetic_tables import Layout
from engine.errors import CheckpointError, ConfigError
from engine.nn.weight import Fp8Weight
from tests.checkpoint.mistral_files import Changes, edit_json, read_all, rewrite, same_bits
from tests.checkpoint.test_mistral_native import open_native, tiny

# --- refusals: configs ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"yarn": {"mscale": 1.0}}, "yarn.mscale is 1.0, expected only the keys factor"),
        ({"yarn": {"apply_scale": True}}, "yarn.apply_scale is True, expected false"),
        ({"yarn": {"apply_scale": None}}, "'yarn.apply_scale' is missing"),
        ({"yarn": {"factor": 0}}, "yarn.factor is 0, expected a positive number"),
        ({"moe": {"first_k_dense_replace": 1}}, "moe.first_k_dense_replace is 1, supported: 0"),
        ({"moe": {"num_expert_groups": 8}}, "moe.num_expert_groups is 8, supported: 1"),
        ({"moe": {"use_load_balancing_bias": True}}, "moe.use_load_balancing_bias is True"),
        ({"moe": {"num_experts_per_tok": 9}}, "9 experts per token, expected at most the 8 there are"),
        ({"moe": None}, "'moe' is missing"),
        ({"n_kv_heads": 2}, "n_kv_heads is 2, expected n_heads 4"),
        ({"tied_embeddings": True}, "tied_embeddings is True, supported: False"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim is 15, expected an even number"),
        ({"q_lora_rank": None}, "'q_lora_rank' is missing"),
        ({"dim": "64"}, "dim is '64', expected a whole number"),
        ({"quantization": {"qformat_weight": "fp8_e5m2"}}, "quantization.qformat_weight is 'fp8_e5m2'"),
        ({"quantization": {"qscheme_act": "CHANNEL"}}, "quantization.qscheme_act is 'CHANNEL'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method is 'awq'"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
            "quantization_config.format is 'pack-quantized', expected 'nvfp4-pack-quantized'",
        ),
        ({"vision_encoder": {"hidden_size": 32}}, "'vision_encoder.num_hidden_layers' is missing"),
    ],
)
def test_params_that_we_do_not_implement_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    edit_json(tiny(tmp_path) / "params.json", changes)
    with pytest.raises(ConfigError) as caught:
        open_model(tmp_path / "tiny")
    assert "params.json: " in str(caught.value)
    assert message in str(caught.value)


def test_other_compressed_tensors_settings_are_refused(tmp_path: Path) -> None:
    file = tiny(tmp_path, "native-nvfp4") / "params.json"
    edit_json(file, {"quantization_config": {"config_groups": {"NVFP4A16": {"weights": {"group_size": 32}}}}})
    with pytest.raises(
        ConfigError, match=r"config_groups\.NVFP4A16\.weights\.group_size is 32, supported: 16"
    ):
        open_model(tmp_path / "tiny")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 3}, r"37 of 242 expected tensors are missing: layers\.2\.attention_norm\.weight"),
        ({"n_layers": 1}, r"101 unexpected tensors: layers\.1\."),
        ({"n_layers": 10**9}, r"found 205 tensors, expected at least the 8000000000 "),
        ({"moe": {"num_experts": 10**9}}, r"expected at least the 2000000000 "),
        ({"dim": 128}, r"tensor tok_embeddings\.weight has shape \[512, 64\], expected \[512, 128\] from"),
    ],
)
def test_params_that_do_not_fit_the_tensors_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    edit_json(tiny(tmp_path) / "params.json", changes)
    with pytest.raises(CheckpointError, match=message):
        open_model(tmp_path / "tiny")


# --- refusals: headers ---

W1 = "layers.1.experts.5.w1"


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("native-fp8", {f"{W1}.weight": None}, rf"tiny: 1 of 205 expected tensors are missing: {W1}\.weight"),
        ("native-fp8", {f"{W1}.qscale_weight": None}, rf"missing: {W1}\.qscale_weight"),
        ("native-fp8", {f"{W1}.qscale_act": None}, rf"missing: {W1}\.qscale_act"),
        ("native-fp8", {"norm.weight": None}, r"missing: norm\.weight"),
        ("native-nvfp4", {f"{W1}.weight_scale": None}, rf"missing: {W1}\.weight_scale"),
        ("native-nvfp4", {f"{W1}.weight_global_scale": None}, rf"missing: {W1}\.weight_global_scale"),
        (
            "native-fp8",
            {"layers.0.attention.wq.weight": torch.ones(4)},
            r"consolidated\.safetensors: 1 unexpected tensors: layers\.0\.attention\.wq\.weight; expected ",
        ),
        ("native-fp8", {"layers.0.router_biases": torch.ones(8)}, r"1 unexpected tensors: layers\.0\.router"),
        ("native-bf16", {"vision_encoder.ln_pre.weight": torch.ones(32)}, r"1 unexpected tensors: vision"),
        (
            "native-fp8",
            {f"{W1}.weight": torch.ones(64, 48).to(torch.float8_e4m3fn)},
            rf"consolidated\.safetensors: tensor {W1}\.weight has shape \[64, 48\], expected \[48, 64\]",
        ),
        (
            "native-fp8",
            {f"{W1}.weight": torch.ones(48, 64)},
            rf"tensor {W1}\.weight has type F32, expected F8_E4M3",
        ),
        (
            "native-fp8",
            {f"{W1}.weight": torch.ones(48, 64).to(torch.float8_e5m2)},
            rf"tensor {W1}\.weight has type F8_E5M2, expected F8_E4M3",
        ),
        (
            "native-fp8",
            {"layers.0.gate.weight": torch.ones(8, 64).to(torch.float8_e4m3fn)},
            r"layers\.0\.gate\.weight has type F8_E4M3, expected BF16 or F16 or F32",
        ),
        (
            "native-fp8",
            {f"{W1}.qscale_weight": torch.ones(48)},
            rf"tensor {W1}\.qscale_weight has shape \[48\], expected \[\] or \[1\]",
        ),
        (
            "native-fp8",
            {f"{W1}.qscale_act": torch.ones(1, dtype=torch.int32)},
            rf"tensor {W1}\.qscale_act has type I32, expected BF16",
        ),
        (
            "native-nvfp4",
            {f"{W1}.weight_packed": torch.zeros(48, 32, dtype=torch.int32)},
            rf"{W1}\.weight_packed has type I32, expected U8",
        ),
        (
            "native-bf16",
            {f"{W1}.weight": torch.ones(48, 64).to(torch.float8_e4m3fn)},
            rf"tiny: {W1} is stored as fp8, expected plain like layers\.1\.experts\.0\.w1",
        ),
        (
            "native-nvfp4",
            {f"{W1}.weight": torch.ones(48, 64)},
            rf"1 unexpected tensors: {W1}\.weight",
        ),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, layout: Layout, changes: Changes, message: str
) -> None:
    rewrite(tiny(tmp_path, layout), changes)
    with pytest.raises(CheckpointError, match=message):
        open_model(tmp_path / "tiny")


def test_a_vision_encoder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    directory = tiny(tmp_path, "native-bf16", vision=TINY_VISION)
    rewrite(directory, {"vision_encoder.ln_pre.weight": None})
    with pytest.raises(
        CheckpointError, match=r"1 of 92 expected tensors are missing: vision_encoder\.ln_pre"
    ):
        open_model(directory)
    rewrite(directory, {"vision_encoder.ln_pre.weight": torch.ones(33)})
    with pytest.raises(
        CheckpointError, match=r"vision_encoder\.ln_pre\.weight has shape \[33\], expected \[32\]"
    ):
        open_model(directory)
    rewrite(directory, dict.fromkeys(TINY_VISION.native_tensors()))
    assert open_native(directory).plan.unread == {}  # a text-only export


def test_every_truncation_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    file = tiny(tmp_path) / "consolidated.safetensors"
    whole = file.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, *range(2000, len(whole), 29_989), len(whole) - 1]:
        file.write_bytes(whole[:size])
        with pytest.raises(
            CheckpointError, match=r"consolidated\.safetensors: not a complete safetensors file"
        ):
            open_model(tmp_path / "tiny")
    file.write_bytes(whole + b"\0")
    with pytest.raises(
        CheckpointError, match=rf"it has {len(whole) + 1} bytes, its header describes {len(whole)}"
    ):
        open_model(tmp_path / "tiny")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF" + bytes(60), "found a GGUF file, expected a safetensors file"),
        (b"PK\x03\x04" + bytes(60), "found a zip archive, as pickled PyTorch weights are"),
        (b"\x80\x02}q\x00" + bytes(60), "found a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "found a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "found an HTML page"),
        (bytes(8), "not a complete safetensors file"),
        (struct.pack("<Q", 4) + b"null", "not a complete safetensors file"),
        (struct.pack("<Q", 2**63) + b"{}", "announce a header of 9223372036854775808 bytes"),
    ],
)
def test_files_that_are_no_safetensors_say_what_they_are(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tiny(tmp_path) / "consolidated.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"consolidated\.safetensors: .*{message}"):
        open_model(tmp_path / "tiny")


def entry(offsets: list[int], shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": entry([0, 8], [3])}, r"tensor a lies at \[0, 8\], expected \[0, 12\]"),
        ({"a": entry([4, 8], [1])}, r"tensor a lies at \[4, 8\], expected \[0, 4\]"),
        ({"a": entry([0, 4], [1]), "b": entry([0, 4], [1])}, r"lies at \[0, 4\], expected \[4, 8\]"),
        ({"a": entry([0, 4], [-1])}, "tensor a has shape .* none negative"),
        ({"a": entry([0, 4], [1], "F8_X")}, "tensor a has type F8_X, supported"),
        ({"a": entry([0, 1 << 50], [1 << 48])}, "its header describes"),
        ({"a": 5}, "not a complete safetensors file"),
    ],
)
def test_headers_that_contradict_themselves_are_refused(
    tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    header = json.dumps(entries).encode()
    (tiny(tmp_path) / "consolidated.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + bytes(8)
    )
    with pytest.raises(CheckpointError, match=rf"consolidated\.safetensors: .*{message}"):
        open_model(tmp_path / "tiny")


def test_shards_that_are_not_all_there_are_refused(tmp_path: Path) -> None:
    directory = tiny(tmp_path, num_shards=3)
    second = directory / "consolidated-00002-of-00003.safetensors"
    second.rename(tmp_path / second.name)
    with pytest.raises(CheckpointError, match=rf"{second.name}: .*No such file"):
        open_model(directory)
    index = directory / "consolidated.safetensors.index.json"
    index.unlink()
    with pytest.raises(CheckpointError, match=r"found 2 files consolidated\*\.safetensors, expected 3"):
        open_model(directory)
    (tmp_path / second.name).rename(second)
    open_model(directory)
    third = directory / "consolidated-00003-of-00003.safetensors"
    save_file({**read_all(directory)}, third)
    with pytest.raises(
        CheckpointError, match=r"00003-of-00003\.safetensors: tensor \S+ is also in consolidated-00001"
    ):
        open_model(directory)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "", 5, "x.bin", "a/b.safetensors"])
def test_an_index_cannot_point_outside_the_directory(tmp_path: Path, shard: object) -> None:
    directory = tiny(tmp_path, num_shards=2)
    edit_json(directory / "consolidated.safetensors.index.json", {"weight_map": {"norm.weight": shard}})
    with pytest.raises(CheckpointError, match=r"index\.json: tensor norm\.weight is in .*plain name"):
        open_model(directory)


def test_an_index_that_disagrees_with_the_shards_is_refused(tmp_path: Path) -> None:
    directory = tiny(tmp_path, num_shards=2)
    index = directory / "consolidated.safetensors.index.json"
    first, second = (f"consolidated-0000{part}-of-00002.safetensors" for part in (1, 2))
    edit_json(index, {"weight_map": {"tok_embeddings.weight": second}})
    with pytest.raises(
        CheckpointError, match=rf"{first}: tensor tok_embeddings\.weight is here, expected in {second}"
    ):
        open_model(directory)
    edit_json(index, {"weight_map": {"tok_embeddings.weight": first, "absent.weight": second}})
    with pytest.raises(CheckpointError, match=rf"{second}: absent\.weight missing, expected here"):
        open_model(directory)


# --- refusals: data ---


def spoil(tensor: Tensor, value: float) -> Tensor:
    spoiled = tensor.clone()
    spoiled.view(-1)[-1] = value
    return spoiled


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.5])
@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("native-fp8", "layers.1.experts.5.w1.qscale_weight"),
        ("native-fp8", "layers.0.attention.wo.qscale_act"),
        ("native-nvfp4", "layers.1.experts.5.w1.weight_global_scale"),
    ],
)
def test_bad_scales_are_told_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout, name: str, value: float
) -> None:
    def allocate(*_: object) -> None:
        raise AssertionError("buffers were allocated")

    rewrite(tiny(tmp_path, layout), {name: torch.tensor([value])})
    monkeypatch.setattr(engine.checkpoint.stream, "allocate", allocate)
    message = rf"consolidated\.safetensors: tensor {name} holds the scale {value}, expected a positive number"
    with pytest.raises(CheckpointError, match=message):
        open_model(tmp_path / "tiny").load(torch.bfloat16, "cpu")


@pytest.mark.parametrize(
    ("layout", "name", "value", "message"),
    [
        ("native-fp8", "layers.1.ffn_norm.weight", float("nan"), "holds NaN or infinity"),
        ("native-bf16", "layers.1.experts.5.w2.weight", float("inf"), "holds NaN or infinity"),
        ("native-bf16", "layers.1.experts.5.w2.weight", 1e6, "holds NaN or infinity as torch.float16"),
        ("native-fp8", "layers.1.experts.5.w2.weight", float("nan"), "holds NaN, expected finite values"),
        ("native-fp8", "layers.0.attention.wo.weight", -float("nan"), "holds NaN, expected finite values"),
        ("native-nvfp4", "layers.0.experts.0.w2.weight_scale", float("nan"), "expected block scales"),
        ("native-nvfp4", "layers.0.experts.0.w2.weight_scale", -1.0, "expected block scales of at least 0"),
    ],
)
def test_bad_values_are_refused(
    tmp_path: Path, layout: Layout, name: str, value: float, message: str
) -> None:
    directory = tiny(tmp_path, layout)
    rewrite(directory, {name: spoil(read_all(directory)[name], value)})
    with pytest.raises(CheckpointError, match=rf"consolidated\.safetensors: tensor {name} .*{message}"):
        open_model(directory).load(torch.float16, "cpu")


def test_both_nan_codes_of_fp8_are_found_and_no_other(tmp_path: Path) -> None:
    name = "layers.0.attention.wo.weight"
    directory = tiny(tmp_path)
    every = torch.arange(256, dtype=torch.uint8)
    for bad in (0x7F, 0xFF):
        codes = torch.where(every == bad, every, 0).repeat(32).view(64, 128)
        rewrite(directory, {name: codes.view(torch.float8_e4m3fn)})
        with pytest.raises(CheckpointError, match=rf"tensor {name} holds NaN"):
            open_model(directory).load(torch.bfloat16, "cpu")
    codes = torch.where((every & 0x7F) == 0x7F, 0, every).repeat(32).view(64, 128)
    rewrite(directory, {name: codes.view(torch.float8_e4m3fn)})
    loaded = open_native(directory).load(torch.bfloat16, "cpu")[name]
    assert isinstance(loaded, Fp8Weight)
    assert same_bits(loaded.codes, codes.view(torch.float8_e4m3fn))


def test_files_that_change_under_the_reader_are_an_error(tmp_path: Path) -> None:
    checkpoint = open_native(tiny(tmp_path))
    file = checkpoint.path / "consolidated.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"the file ends inside tensor \S+, at byte \d+; it changed"):
        checkpoint.load(torch.bfloat16, "cpu")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"consolidated\.safetensors: cannot be read"):
        checkpoint.load(torch.bfloat16, "cpu")


def test_other_dtypes_and_a_missing_tokenizer_are_refused(tmp_path: Path) -> None:
    checkpoint = open_native(tiny(tmp_path))
    with pytest.raises(CheckpointError, match="weights cannot be loaded as torch.float64"):
        checkpoint.load(torch.float64, "cpu")
    with pytest.raises(CheckpointError, match=r"no tekken\.json, found no tokenizer file"):
        checkpoint.tokenizer()
