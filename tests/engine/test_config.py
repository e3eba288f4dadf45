"""Configurations: what a model's config.json may say, and every refusal with what its message names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.build import build_engine
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.config import HARMLESS, EngineConfig, LlamaConfig, RopeScaling
from engine.errors import ConfigError
from tests.checkpoint.files import random_weights, write_hf

RAW: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALING = RopeScaling(8.0, 1.0, 4.0, 64)


def read(**changes: Any) -> LlamaConfig:
    return LlamaConfig.from_hf(RAW | changes, "some/config.json")


# --- a model's config.json: accepted ----------------------------------------------------------------


def test_defaults_are_those_of_transformers() -> None:
    config = read()
    assert config == LlamaConfig(97, 32, 48, 2, 4, 4, 8, 128, rms_norm_eps=1e-6, rope_theta=10000.0)
    optional = ["head_dim", "num_key_value_heads", "rope_theta", "rope_scaling", "rope_parameters"]
    optional += ["eos_token_id", "bos_token_id", "sliding_window", "tie_word_embeddings"]
    assert read(**dict.fromkeys(optional)) == config
    assert read(unheard_of=5, attention_dropout=0.1, rope_scaling={}) == config


def test_everything_given() -> None:
    config = read(
        head_dim=16,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_theta=500000,
        rope_scaling=LLAMA3,
        tie_word_embeddings=True,
        eos_token_id=[2, 3],
        bos_token_id=0,
    )
    assert config == LlamaConfig(97, 32, 48, 2, 4, 2, 16, 128, 1e-5, 500000.0, SCALING, True, (2, 3), 0)
    assert read(eos_token_id=2).eos_token_ids == (2,)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "rope_type": None, "type": "llama3"}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5, "partial_rotary_factor": 1.0}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": {}, "rope_parameters": LLAMA3},
    ],
)
def test_places_where_the_rope_is_described(keys: dict[str, Any]) -> None:
    config = read(**keys)
    assert (config.rope_theta, config.rope_scaling) == (5e5, SCALING)


@pytest.mark.parametrize(
    ("keys", "context"),
    [
        ({"sliding_window": 64}, 64),
        ({"sliding_window": 64, "use_sliding_window": True}, 64),
        ({"sliding_window": 64, "use_sliding_window": False}, 128),
        ({"sliding_window": 4096}, 128),
    ],
)
def test_a_window_bounds_the_context(keys: dict[str, Any], context: int) -> None:
    assert read(**keys).max_position_embeddings == context


@pytest.mark.parametrize("key", HARMLESS)
def test_values_that_change_nothing(key: str) -> None:
    for value in (None, *HARMLESS[key]):
        assert read(**{key: value}) == read()


def test_a_list_is_harmless_if_all_its_elements_are() -> None:
    assert read(layer_types=["full_attention"] * 2, no_rope_layers=[1, 1]) == read()


# --- a model's config.json: refused -----------------------------------------------------------------

MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": "abc"}, "hidden_size is 'abc', expected a whole number from 1 to"),
    ({"hidden_size": None}, "hidden_size is None, expected a whole number"),
    ({"hidden_size": 32.5}, "hidden_size is 32.5, expected a whole number"),
    ({"hidden_size": -32}, "hidden_size is -32, expected a whole number from 1 to"),
    ({"hidden_size": 33}, "hidden_size is 33, expected a multiple of num_attention_heads 4"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True, expected a whole number"),
    ({"vocab_size": [97]}, r"vocab_size is [97], expected a whole number"),
    ({"max_position_embeddings": 10**30}, "max_position_embeddings is 1000000"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number from 1 to"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0, expected a whole number from 1 to"),
    ({"num_key_value_heads": 3}, "4 query heads cannot share 3 key/value heads, expected a multiple"),
    ({"head_dim": 7}, "head_dim is 7, expected an even number"),
    ({"head_dim": 0}, "head_dim is 0, expected a whole number from 1 to"),
    ({"hidden_size": 36}, "head_dim is 9, expected an even number"),
    ({"rms_norm_eps": None}, "rms_norm_eps is None, expected a positive number"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a positive number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a positive number"),
    ({"rope_theta": -1}, "rope_theta is -1, expected a positive number"),
    ({"rope_theta": float("inf")}, "rope_theta is inf, expected a positive number"),
    ({"rope_theta": 10**400}, "rope_theta is 10000"),
    ({"rope_theta": True}, "rope_theta is True, expected a positive number"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
    ({"sliding_window": 0}, "sliding_window is 0, expected a whole number from 1 to"),
    ({"use_sliding_window": 1}, "use_sliding_window is 1, expected true or false"),
    ({"eos_token_id": "x"}, "eos_token_id is 'x', expected a token id or a list of them"),
    ({"eos_token_id": [2, None]}, "eos_token_id is [2, None], expected a token id or a list of them"),
    ({"eos_token_id": {"id": 2}}, "eos_token_id is {'id': 2}, expected a token id or a list of them"),
    ({"bos_token_id": "x"}, "bos_token_id is 'x', expected a whole number from 0 to"),
    ({"rope_scaling": 5}, "rope_scaling is 5, expected a JSON object"),
    ({"rope_parameters": [1]}, "rope_parameters is [1], expected a JSON object"),
    ({"rope_scaling": {"rope_type": 3}}, "rope_scaling.rope_type is 3, expected a string"),
    ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "rope_scaling.factor is '8', expected a positive number"),
    (
        {"rope_parameters": {**LLAMA3, "rope_theta": -1}},
        "rope_parameters.rope_theta is -1, expected a positive number",
    ),
    (
        {"rope_scaling": {**LLAMA3, "high_freq_factor": 1}},
        "rope_scaling.high_freq_factor is 1, expected more than low_freq_factor 1.0",
    ),
    (
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
        "rope_theta is given as [10000.0, 500000.0], expected one value",
    ),
    (
        {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
        "rope_scaling is {'rope_type': 'llama3'",
    ),
]


@pytest.mark.parametrize(("keys", "message"), MALFORMED, ids=lambda value: str(value)[:40])
def test_malformed_values(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**keys)
    assert str(caught.value).startswith(f"some/config.json: {message}")


@pytest.mark.parametrize("key", RAW)
def test_required_keys(key: str) -> None:
    raw = {name: value for name, value in RAW.items() if name != key}
    with pytest.raises(ConfigError, match=rf"^config\.json: required key '{key}' is missing$"):
        LlamaConfig.from_hf(raw)


@pytest.mark.parametrize("key", [key for key in LLAMA3 if key != "rope_type"])
def test_required_keys_of_llama_3_scaling(key: str) -> None:
    scaling = {name: value for name, value in LLAMA3.items() if name != key}
    for place in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ConfigError, match=rf"required key '{place}\.{key}' is missing"):
            read(**{place: scaling})


UNSUPPORTED: list[tuple[str, Any, str]] = [
    ("hidden_act", "gelu", "'silu'"),
    ("attention_bias", True, "False"),
    ("mlp_bias", True, "False"),
    ("quantization_config", {"quant_method": "gptq"}, "only without it"),
    ("partial_rotary_factor", 0.5, "1"),
    ("layer_types", ["full_attention", "sliding_attention"], "'full_attention'"),
    ("no_rope_layers", [1, 0], "1"),
    ("use_qk_norm", True, "False"),
    ("qk_norm", True, "False"),
    ("parallel_attn", True, "False"),
    ("attention_multiplier", 0.0078125, "only without it"),
    ("embedding_multiplier", 12.0, "1"),
    ("residual_multiplier", 0.22, "1"),
    ("logit_scale", 0.0625, "1"),
    ("attn_logit_softcapping", 50.0, "only without it"),
    ("final_logit_softcapping", 30.0, "only without it"),
]


@pytest.mark.parametrize(("key", "value", "supported"), UNSUPPORTED)
def test_values_that_would_change_the_result(key: str, value: Any, supported: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**{key: value})
    assert str(caught.value) == f"some/config.json: {key} is {value!r}, supported: {supported}"


@pytest.mark.parametrize("key", HARMLESS)
def test_no_key_of_the_table_takes_anything_else(key: str) -> None:
    values: tuple[Any, ...] = (0.37, "other", {}, [0.37])
    for value in values:
        with pytest.raises(ConfigError, match=rf"^some/config\.json: {key} is .*, supported: "):
            read(**{key: value})


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_ropes_that_would_change_the_result(place: str) -> None:
    with pytest.raises(ConfigError, match=rf"{place}\.partial_rotary_factor is 0\.5, supported: 1"):
        read(**{place: {"rope_type": "default", "partial_rotary_factor": 0.5}})
    with pytest.raises(ConfigError, match=rf"{place}\.type is 'yarn', expected 'default' or 'llama3'"):
        read(**{place: {"type": "yarn", "factor": 4.0}})
    with pytest.raises(ConfigError, match=rf"{place}\.full_attention is .*, supported: only without it"):
        read(**{place: {"full_attention": LLAMA3, "sliding_attention": {"rope_type": "default"}}})


# --- the engine's options ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["max_model_len", "max_num_seqs", "max_num_batched_tokens", "page_size", "kv_cache_memory"]
)
@pytest.mark.parametrize("value", [0, -1])
def test_options_below_one(name: str, value: int) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=rf"^{name} must be at least 1, found {value}$"):
        EngineConfig(**options)


def test_one_batched_token_is_too_few() -> None:
    with pytest.raises(ConfigError, match=r"^max_num_batched_tokens must be at least 2, found 1$"):
        EngineConfig(max_num_batched_tokens=1)


@pytest.mark.parametrize(
    ("options", "found"), [({}, "cpu"), ({"device": "cuda", "enforce_eager": True}, "enforce_eager")]
)
def test_dependent_launches_need_graphs(options: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=rf"^pdl is on with {found}, expected a CUDA device with graphs"):
        EngineConfig(pdl=True, **options)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """A model of 128 positions with a KV cache of 2 (k, v) * 2 layers * 4 heads * 8 * 4 bytes a token."""
    config = read()
    return open_checkpoint(write_hf(tmp_path / "tiny", config, random_weights(config)))


def test_a_context_longer_than_the_models(checkpoint: Checkpoint) -> None:
    with pytest.raises(
        ConfigError, match=r"^max_model_len is 129, but tiny was made for at most 128 positions$"
    ):
        build_engine(checkpoint, (), "none", EngineConfig(max_model_len=129))
    assert build_engine(checkpoint, (), "none", EngineConfig(max_model_len=128)).config.max_model_len == 128


def test_too_little_memory_for_one_sequence(checkpoint: Checkpoint) -> None:
    page = 16 * 512
    enough = 5 * page  # 64 tokens and the dummy page
    with pytest.raises(
        ConfigError,
        match=rf"^kv_cache_memory of {enough - 1} bytes holds 48 tokens, less than max_model_len 64; "
        rf"512 bytes a token are needed, {enough} in all$",
    ):
        build_engine(checkpoint, (), "none", EngineConfig(max_model_len=64, kv_cache_memory=enough - 1))
    with pytest.raises(ConfigError, match=r"^kv_cache_memory of 1 bytes holds 0 tokens"):
        build_engine(checkpoint, (), "none", EngineConfig(max_model_len=64, kv_cache_memory=1))
    build_engine(checkpoint, (), "none", EngineConfig(max_model_len=64, kv_cache_memory=enough))


@pytest.mark.parametrize(
    "wrong", [{"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"device": "cuda"}], ids=str
)
def test_half_weights_are_refused_where_they_mean_nothing(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="half_weights is for float32 on a CPU, found torch"):
        EngineConfig(half_weights=True, **wrong)
    assert EngineConfig(half_weights=True).dtype_name == "w16a32"
    assert EngineConfig(dtype=torch.bfloat16).dtype_name == "bfloat16"
