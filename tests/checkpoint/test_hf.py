"""Hugging Face directories: whole, sharded, tied; and every way in which the files can disagree."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint import expected_tensors, open_checkpoint
from engine.config import LlamaConfig, RopeScaling
from engine.errors import CheckpointError, ConfigError
from tests.checkpoint.files import random_weights, write_gguf, write_hf, write_tokenizer

CONFIG = LlamaConfig(
    vocab_size=288,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    eos_token_ids=(2,),
    bos_token_id=1,
)
TIED = dataclasses.replace(CONFIG, tie_word_embeddings=True)
WEIGHTS = random_weights(CONFIG)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_comes_back(tmp_path: Path, num_shards: int, stored: torch.dtype) -> None:
    weights = {name: weight.to(stored) for name, weight in WEIGHTS.items()}
    checkpoint = open_checkpoint(write_hf(tmp_path / "tiny", CONFIG, weights, num_shards))
    assert checkpoint.config == CONFIG
    assert checkpoint.name == "tiny"
    calls: list[tuple[int, int]] = []
    loaded = checkpoint.load(torch.float32, "cpu", lambda done, total: calls.append((done, total)))
    assert list(loaded) == list(expected_tensors(CONFIG))
    for name, weight in weights.items():
        assert torch.equal(loaded[name], weight.float()), name
    total = sum(weight.nbytes for weight in weights.values())
    assert len(calls) == len(weights)
    assert calls[-1] == (total, total)


def test_weights_are_our_own_copy_and_not_the_mapped_file(tmp_path: Path) -> None:
    directory = write_hf(tmp_path / "tiny", CONFIG, WEIGHTS)
    loaded = open_checkpoint(directory).load(torch.float32, "cpu")
    file = directory / "model.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)  # in place: a mapping would see it
    assert all(torch.equal(loaded[name], weight) for name, weight in WEIGHTS.items())


def test_both_formats_of_one_model_load_equal(tmp_path: Path) -> None:
    paths = write_gguf(tmp_path / "tiny.gguf", CONFIG, WEIGHTS), write_hf(tmp_path / "tiny", CONFIG, WEIGHTS)
    from_gguf, from_hf = (open_checkpoint(path).load(torch.bfloat16, "cpu") for path in paths)
    assert all(torch.equal(from_gguf[name], from_hf[name]) for name in expected_tensors(CONFIG))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_directory_that_transformers_saved(tmp_path: Path, tied: bool) -> None:
    from transformers import LlamaConfig as TransformersConfig
    from transformers import LlamaForCausalLM

    scaling = RopeScaling(8.0, 1.0, 4.0, 64)
    oracle = LlamaForCausalLM(
        TransformersConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            max_position_embeddings=512,
            eos_token_id=[2, 3],
            rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **dataclasses.asdict(scaling)},
        )
    )
    oracle.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    checkpoint = open_checkpoint(tmp_path / "saved")
    assert checkpoint.config.rope_scaling == scaling
    assert checkpoint.config.rope_theta == 5e5
    assert checkpoint.config.eos_token_ids == (2, 3)
    loaded = checkpoint.load(torch.float32, "cpu")
    state = oracle.state_dict()
    assert set(state) - set(loaded) == ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(weight, state[name]) for name, weight in loaded.items())


def test_a_redundant_tied_head_and_old_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    extra = {
        "lm_head.weight": torch.zeros(288, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    checkpoint = open_checkpoint(write_hf(tmp_path / "tied", TIED, random_weights(TIED) | extra))
    assert list(checkpoint.load(torch.float32, "cpu")) == list(expected_tensors(TIED))


def test_end_tokens_come_from_all_three_files(tmp_path: Path) -> None:
    directory = write_hf(tmp_path / "tiny", CONFIG, WEIGHTS, eos_token_id=7)
    write_tokenizer(directory, CONFIG.vocab_size)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    tokenizer = open_checkpoint(directory).tokenizer()
    # config.json, generation_config.json, tokenizer_config.json, then the vocabulary's own end-of-turn tokens
    assert tokenizer.eos_token_ids == (7, 9, 2, 0)
    assert tokenizer.bos_token_id == 1


# --- refusals ---


@pytest.mark.parametrize("found", ["</s>", [2, "</s>"], True, -1, {"id": 2}])
def test_end_tokens_of_the_generation_config_that_are_none(tmp_path: Path, found: object) -> None:
    directory = write_hf(tmp_path / "bad", CONFIG, WEIGHTS)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": found}))
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(directory)
    assert f"generation_config.json: eos_token_id is {found!r}, expected a token id or" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"architectures": ["Qwen2ForCausalLM"]},
            r"\['Qwen2ForCausalLM'\], supported: LlamaForCausalLM, Mistral",
        ),
        ({"architectures": None}, r"architectures is None, supported"),
        ({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}, r"architectures is \["),
        (
            {"num_hidden_layers": 3},
            r"9 of 30 expected tensors are missing: model\.layers\.2\.input_layernorm\.weight",
        ),
        ({"num_hidden_layers": 1}, r"9 unexpected tensors: model\.layers\.1\."),
        ({"num_hidden_layers": 10**9}, r"found 21 tensors, expected those of 1000000000 layers"),
        (
            {"intermediate_size": 64},
            r"gate_proj\.weight has shape \[48, 32\], expected \[64, 32\] from the config",
        ),
        ({"tie_word_embeddings": True, "vocab_size": 289}, r"embed_tokens\.weight has shape \[288, 32\]"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    directory = write_hf(tmp_path / "bad", CONFIG, WEIGHTS, **keys)
    with pytest.raises(CheckpointError, match=rf"bad.*{message}"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two', expected a whole number"),
        ({"eos_token_id": {"id": 2}}, r"eos_token_id is \{'id': 2\}, expected a token id"),
        ({"eos_token_id": ["</s>"]}, r"eos_token_id is \['</s>'\], expected a token id"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"head_dim": 7}, "head_dim is 7, expected an even number"),
        ({"hidden_size": -32}, "hidden_size is -32, expected a whole number"),
    ],
)
def test_config_values_that_are_wrong_or_not_implemented_are_refused(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
        open_checkpoint(write_hf(tmp_path / "bad", CONFIG, WEIGHTS, **keys))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, r"1 unexpected tensors: .*q_proj\.bias"),
        (
            {"model.norm.weight": torch.ones(1, 32)},
            r"model\.norm\.weight has shape \[1, 32\], expected \[32\]",
        ),
        (
            {"model.norm.weight": torch.ones(32, dtype=torch.float64)},
            r"model\.norm\.weight has type F64, supported: F32",
        ),
        ({"model.norm.weight": torch.ones(32, dtype=torch.int8)}, r"model\.norm\.weight has type I8"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, extra: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"bad.*{message}"):
        open_checkpoint(write_hf(tmp_path / "bad", CONFIG, WEIGHTS | extra))


def test_a_redundant_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    weights = random_weights(TIED) | {"lm_head.weight": torch.zeros(287, 32)}
    with pytest.raises(CheckpointError, match=r"1 unexpected tensors: lm_head\.weight"):
        open_checkpoint(write_hf(tmp_path / "tied", TIED, weights))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    spoiled = torch.ones(32)
    spoiled[3] = float("nan")
    weights = WEIGHTS | {"model.norm.weight": spoiled}
    checkpoint = open_checkpoint(write_hf(tmp_path / "bad", CONFIG, weights, num_shards=2))
    with pytest.raises(
        CheckpointError, match=r"safetensors: tensor model\.norm\.weight holds NaN or infinity"
    ):
        checkpoint.load(torch.float32, "cpu")


def test_every_truncation_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    directory = write_hf(tmp_path / "cut", CONFIG, WEIGHTS)
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    for cut in [0, 1, 7, 8, 9, 100, *range(2000, len(whole), 4999), len(whole) - 1]:
        file.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: not a complete safetensors file"):
            open_checkpoint(directory)


def test_offsets_beyond_the_file_are_refused(tmp_path: Path) -> None:
    directory = write_hf(tmp_path / "bad", CONFIG, WEIGHTS)
    entry = {"dtype": "F32", "shape": [32], "data_offsets": [1 << 40, (1 << 40) + 128]}
    header = json.dumps({"model.norm.weight": entry})
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a complete safetensors file"):
        open_checkpoint(directory)


def edit_index(directory: Path, changes: dict[str, Any]) -> None:
    file = directory / "model.safetensors.index.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({"weight_map": raw["weight_map"] | changes}))


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..",
        "model.bin",
        "a\\b.safetensors",
        "x.safetensors\0",
        "",
        5,
    ],
)
def test_an_index_cannot_point_outside_the_directory(tmp_path: Path, shard: object) -> None:
    directory = write_hf(tmp_path / "bad", CONFIG, WEIGHTS, 2)
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    edit_index(directory, {"model.norm.weight": shard})
    with pytest.raises(CheckpointError, match=r"index\.json: tensor model\.norm\.weight is in .*plain name"):
        open_checkpoint(directory)


def test_shards_that_disagree_with_the_index_are_refused(tmp_path: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    names = list(WEIGHTS)  # even ones in the first shard

    directory = write_hf(tmp_path / "moved", CONFIG, WEIGHTS, 2)
    edit_index(directory, {names[0]: second})
    with pytest.raises(CheckpointError, match=rf"{first}: tensor {names[0]} is here, expected in {second}"):
        open_checkpoint(directory)

    directory = write_hf(tmp_path / "twice", CONFIG, WEIGHTS, 2)
    save_file(load_file(directory / second) | {names[0]: WEIGHTS[names[0]]}, directory / second)
    with pytest.raises(CheckpointError, match=rf"{second}: tensor {names[0]} is also in {first}"):
        open_checkpoint(directory)

    directory = write_hf(tmp_path / "lacking", CONFIG, WEIGHTS, 2)
    shard = load_file(directory / second)
    del shard[names[1]]
    save_file(shard, directory / second)
    with pytest.raises(CheckpointError, match=rf"{second}: tensor {names[1]} is missing, expected here"):
        open_checkpoint(directory)

    directory = write_hf(tmp_path / "gone", CONFIG, WEIGHTS, 2)
    (directory / second).unlink()
    with pytest.raises(CheckpointError, match=second):
        open_checkpoint(directory)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff"])
def test_json_files_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    directory = write_hf(tmp_path / "bad", CONFIG, WEIGHTS)
    (directory / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        open_checkpoint(directory)


def test_directories_without_what_we_read_say_what_they_hold(tmp_path: Path) -> None:
    directory = write_hf(tmp_path / "bad", CONFIG, WEIGHTS)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, found no tokenizer file"):
        open_checkpoint(directory).tokenizer()
    (directory / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, found tokenizer\.model"):
        open_checkpoint(directory).tokenizer()
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors and no .*, found pytorch_model\.bin"):
        open_checkpoint(directory)
    (directory / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"no config\.json in this directory, found pytorch_model\.bin, token"
    ):
        open_checkpoint(directory)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path: Path) -> None:
    directory = write_tokenizer(write_hf(tmp_path / "bad", CONFIG, WEIGHTS), 289)
    with pytest.raises(CheckpointError, match=r"tokenizer has 289 tokens, expected at most the 288"):
        open_checkpoint(directory).tokenizer()


# --- what open_checkpoint takes ---


def test_other_arguments_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").touch()
    with pytest.raises(
        CheckpointError, match=r"found a file named \*\.pt, expected a \.gguf file or a directory"
    ):
        open_checkpoint(tmp_path / "weights.pt")
    for missing in (tmp_path / "nothing", "nothing", "a/b/c", "../x/y", "-x/y"):
        with pytest.raises(CheckpointError, match="no such file or directory, and not a hub name"):
            open_checkpoint(missing)


def test_a_hub_name_is_one_snapshot_of_the_files_we_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    directory = write_hf(tmp_path / "snapshot", CONFIG, WEIGHTS)
    calls: list[tuple[str, list[str]]] = []

    def snapshot(repo: str, *, allow_patterns: list[str]) -> str:
        calls.append((repo, allow_patterns))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint("some-org/some.model")
    assert checkpoint.name == "some-org/some.model"
    assert checkpoint.path == directory
    [(repo, patterns)] = calls
    assert repo == "some-org/some.model"
    assert not [pattern for pattern in patterns if pattern.endswith((".bin", ".py", ".pt"))]


def test_a_hub_that_does_not_answer_is_a_checkpoint_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"^org/name: no such local path, and the hub did not deliver it: \S"
    ):
        open_checkpoint("org/name")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
