"""GGUF: what is written comes back, for every quantisation; what is broken is refused by name."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine.checkpoint import expected_tensors, open_checkpoint
from engine.checkpoint.gguf import canonical_name, stored_name, unpermute
from engine.config import LlamaConfig, RopeScaling
from engine.errors import CheckpointError, EngineError
from tests.checkpoint.files import (
    arrays_for_mappings,
    default_gguf,
    gguf_name,
    interleave,
    random_weights,
    write_gguf,
)

CONFIG = LlamaConfig(
    vocab_size=288,
    hidden_size=32,
    intermediate_size=64,
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
WEIGHTS = random_weights(CONFIG)
Change = Callable[[gguf.GGUFWriter], None]


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_every_tensor_comes_back_in_every_type_that_can_be_written(tmp_path: Path, quant: str) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", CONFIG, WEIGHTS, quant))
    assert checkpoint.config == CONFIG
    assert checkpoint.name == "tiny"
    loaded = checkpoint.load(torch.float32, "cpu")
    assert list(loaded) == list(expected_tensors(CONFIG))
    kind = gguf.GGMLQuantizationType[quant]
    for name, weight in WEIGHTS.items():
        rows = weight.numpy()
        if rows.ndim == 2:  # rows are quantised one by one, so their order does not matter here
            rows = gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind)
        assert torch.equal(loaded[name], torch.from_numpy(rows)), name
        assert loaded[name].is_contiguous()


def test_weights_are_cast_once_and_progress_counts_the_files_bytes(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", CONFIG, WEIGHTS, "F16"))
    calls: list[tuple[int, int]] = []
    loaded = checkpoint.load(torch.bfloat16, "cpu", lambda done, total: calls.append((done, total)))
    for name, weight in WEIGHTS.items():
        stored = weight if weight.ndim == 1 else weight.half()
        assert torch.equal(loaded[name], stored.bfloat16()), name
    total = sum(weight.numel() * (4 if weight.ndim == 1 else 2) for weight in WEIGHTS.values())
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert len(calls) == len(WEIGHTS)
    assert {size for _, size in calls} == {total}
    assert calls[-1][0] == total


def test_tied_embeddings_are_a_file_without_an_output_matrix(tmp_path: Path) -> None:
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    weights = {name: weight for name, weight in WEIGHTS.items() if name != "lm_head.weight"}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tied.gguf", tied, weights))
    assert checkpoint.config == tied
    assert "lm_head.weight" not in checkpoint.load(torch.float32, "cpu")


@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 2), (1, 4), (3, 8), (4, 6)])
def test_unpermute_undoes_the_converter(num_heads: int, head_dim: int) -> None:
    rows = np.arange(num_heads * head_dim * 3, dtype=np.float32).reshape(-1, 3)
    assert np.array_equal(unpermute(interleave(rows, num_heads), num_heads), rows)
    if head_dim > 2:
        assert not np.array_equal(interleave(rows, num_heads), rows)


def test_names_translate_both_ways() -> None:
    for name in expected_tensors(CONFIG):
        assert stored_name(name) == gguf_name(name)
        assert canonical_name(gguf_name(name)) == name
    for unknown in ("blk.0.attn_q.bias", "blk.00.attn_q.weight", "blk.0.other.weight", "output", "x"):
        assert canonical_name(unknown) == unknown


# --- K quants: gguf cannot write them, so the blocks are random bytes; the oracle reads value by value ---


def q4_k_block(block: bytes) -> list[float]:
    """256 values: half d, half dmin, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles."""
    d, dmin = struct.unpack("<ee", block[:4])
    packed, nibbles = block[4:16], block[16:]
    values = []
    for group in range(8):
        if group < 4:
            scale, minimum = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = (packed[group + 4] & 15) | (packed[group - 4] >> 6) << 4
            minimum = (packed[group + 4] >> 4) | (packed[group] >> 6) << 4
        for index in range(32):
            byte = nibbles[group // 2 * 32 + index]
            values.append(d * scale * (byte >> 4 if group % 2 else byte & 15) - dmin * minimum)
    return values


def q6_k_block(block: bytes) -> list[float]:
    """256 values: 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 signed scales, half d."""
    low, high, scales = block[:128], block[128:192], struct.unpack("<16b", block[192:208])
    (d,) = struct.unpack("<e", block[208:])
    values = []
    for index in range(256):
        half, quarter, column = index // 128, index % 128 // 32, index % 32
        byte = low[half * 64 + quarter % 2 * 32 + column]
        nibble = byte >> 4 if quarter >= 2 else byte & 15
        bits = high[half * 32 + column] >> 2 * quarter & 3
        values.append(d * scales[index // 16] * ((nibble | bits << 4) - 32))
    return values


@pytest.mark.parametrize(
    ("quant", "size", "halves", "oracle"),
    [("Q4_K", 144, (0, 2), q4_k_block), ("Q6_K", 210, (208,), q6_k_block)],
)
def test_k_quants_equal_a_slow_reading_of_their_blocks(
    tmp_path: Path, quant: str, size: int, halves: tuple[int, ...], oracle: Callable[[bytes], list[float]]
) -> None:
    config = dataclasses.replace(CONFIG, hidden_size=256, num_layers=1)
    weights = random_weights(config)
    name = "model.layers.0.mlp.gate_proj.weight"
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (64, size), dtype=np.uint8)
    for half in halves:  # random bytes might be NaN
        blocks[:, half : half + 2] = rng.normal(size=(64, 1)).astype(np.float16).view(np.uint8)

    def change(writer: gguf.GGUFWriter) -> None:
        del writer.tensors[0][gguf_name(name)]
        writer.add_tensor(gguf_name(name), blocks, raw_dtype=gguf.GGMLQuantizationType[quant])

    path = write_gguf(tmp_path / "k.gguf", config, weights, change=change)
    loaded = open_checkpoint(path).load(torch.float32, "cpu")[name]
    expected = torch.tensor([oracle(row.tobytes()) for row in blocks])
    torch.testing.assert_close(loaded, expected, rtol=1e-5, atol=1e-5)


# --- rotary scaling ---

ROPE_CONFIG = dataclasses.replace(
    CONFIG, hidden_size=128, head_dim=64, num_heads=2, num_kv_heads=1, num_layers=1
)


def llama31_factors(config: LlamaConfig, scaling: RopeScaling) -> npt.NDArray[np.float32]:
    """What a converter stores: the plain frequencies divided by transformers' scaled ones."""
    from transformers import LlamaConfig as TransformersConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    oracle = TransformersConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        head_dim=config.head_dim,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": config.rope_theta,
            **dataclasses.asdict(scaling),
        },
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](oracle, torch.device("cpu"))
    plain = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    factors: npt.NDArray[np.float32] = (plain / scaled).float().numpy()
    return factors


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama31_rope_factors_become_the_scaling_that_made_them(tmp_path: Path, factor: float) -> None:
    config = ROPE_CONFIG
    scaling = RopeScaling(factor, 1.0, 4.0, 8192)
    factors = llama31_factors(config, scaling)
    assert len(np.unique(factors.round(3))) > 2  # the smooth part is there
    path = write_gguf(
        tmp_path / "tiny.gguf",
        config,
        random_weights(config),
        change=lambda writer: writer.add_tensor("rope_freqs.weight", factors),
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == dataclasses.replace(config, rope_scaling=scaling)
    assert len(checkpoint.load(torch.float32, "cpu")) == len(expected_tensors(config))


@pytest.mark.parametrize("scaling", [RopeScaling(8.0, 1.0, 3.0, 8192), RopeScaling(8.0, 1.0, 4.0, 4096)])
def test_other_rope_factors_are_refused(tmp_path: Path, scaling: RopeScaling) -> None:
    config = ROPE_CONFIG
    factors = llama31_factors(config, scaling)
    path = write_gguf(
        tmp_path / "tiny.gguf",
        config,
        random_weights(config),
        change=lambda writer: writer.add_tensor("rope_freqs.weight", factors),
    )
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: tensor rope_freqs\.weight .* Llama-3 scaling"):
        open_checkpoint(path)


# --- refusals ---


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "qwen2"}, r"general\.architecture is 'qwen2', supported: 'llama'"),
        ({"llama.rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type is 'yarn', supported: 'none'"),
        ({"llama.rope.scale_linear": 4.0}, r"llama\.rope\.scale_linear is 4\.0"),
        ({"llama.expert_count": 8}, r"llama\.expert_count is 8, supported: 0"),
        (
            {"llama.rope.dimension_count": 4},
            r"llama\.rope\.dimension_count is 4, expected the head's width 8",
        ),
        (
            {"llama.attention.value_length": 16},
            r"llama\.attention\.value_length is 16, expected the head's width 8",
        ),
        (
            {"llama.attention.head_count": [4, 4]},
            r"llama\.attention\.head_count is \[4, 4\], expected one number",
        ),
        ({"llama.block_count": None}, r"metadata llama\.block_count is missing"),
        (
            {"llama.block_count": 3},
            r"9 of 30 expected tensors are missing: blk\.2\.attn_norm\.weight, .*, \.\.\.",
        ),
        ({"llama.block_count": 1}, r"9 unexpected tensors: blk\.1\."),
        ({"llama.block_count": 1 << 31}, r"found 21 tensors, expected those of 2147483648 layers"),
        ({"llama.block_count": 0}, r"num_layers is 0, expected a positive number"),
        ({"llama.attention.head_count": 0}, r"llama\.attention\.head_count is 0"),
        ({"llama.attention.head_count_kv": 3}, r"4 query heads cannot share 3 key/value heads"),
        ({"llama.attention.head_count_kv": 4}, r"attn_k\.weight has shape \[16, 32\], expected \[32, 32\]"),
        ({"llama.feed_forward_length": 65}, r"ffn_gate\.weight has shape \[64, 32\], expected \[65, 32\]"),
        ({"llama.vocab_size": 300}, r"token_embd\.weight has shape \[288, 32\], expected \[300, 32\]"),
        ({"llama.rope.freq_base": float("nan")}, r"rope_theta is nan, expected a positive number"),
        ({"split.count": 2}, r"split\.count is 2"),
    ],
)
def test_metadata_that_cannot_be_honoured_is_refused_by_name(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    path = write_gguf(tmp_path / "bad.gguf", CONFIG, WEIGHTS, metadata=metadata)
    with pytest.raises(CheckpointError, match=rf"bad\.gguf: .*{message}"):
        open_checkpoint(path)


def replace_tensor(name: str, rows: npt.NDArray[Any] | None, quant: str = "F32") -> Change:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.tensors[0].pop(name, None)
        if rows is not None:
            kind = gguf.GGMLQuantizationType[quant]
            writer.add_tensor(name, gguf.quants.quantize(rows, kind), raw_dtype=kind)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            replace_tensor("blk.1.ffn_up.weight", None),
            r"1 of 21 expected tensors are missing: blk\.1\.ffn_up\.weight",
        ),
        (
            replace_tensor("blk.0.attn_q.bias", np.zeros(32, np.float32)),
            r"1 unexpected tensors: blk\.0\.attn_q\.bias",
        ),
        (
            replace_tensor("output_norm.weight", np.ones(31, np.float32)),
            r"output_norm\.weight has shape \[31\], .*\[32\]",
        ),
        (
            replace_tensor("output_norm.weight", np.ones((1, 32), np.float32)),
            r"has shape \[1, 32\], expected \[32\]",
        ),
        (
            replace_tensor("blk.0.ffn_up.weight", np.ones((64, 32), np.float32), "Q5_0"),
            r"blk\.0\.ffn_up\.weight has type Q5_0, supported: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K",
        ),
    ],
)
def test_tensors_that_differ_from_the_table_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    path = write_gguf(tmp_path / "bad.gguf", CONFIG, WEIGHTS, change=change)
    with pytest.raises(CheckpointError, match=rf"bad\.gguf: .*{message}"):
        open_checkpoint(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    rows = np.ones((64, 32), np.float32)
    rows[5, 7] = value
    change = replace_tensor("blk.1.ffn_up.weight", rows)
    path = write_gguf(tmp_path / "nan.gguf", CONFIG, WEIGHTS, change=change)
    with pytest.raises(
        CheckpointError, match=r"nan\.gguf: tensor blk\.1\.ffn_up\.weight holds NaN or infinity"
    ):
        open_checkpoint(path).load(torch.float32, "cpu")


def test_a_value_too_large_for_the_dtype_is_refused(tmp_path: Path) -> None:
    rows = np.full((64, 32), 1e5, np.float32)
    change = replace_tensor("blk.0.ffn_up.weight", rows)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "big.gguf", CONFIG, WEIGHTS, change=change))
    assert checkpoint.load(torch.bfloat16, "cpu")
    with pytest.raises(
        CheckpointError, match=r"blk\.0\.ffn_up\.weight holds NaN or infinity as torch\.float16"
    ):
        checkpoint.load(torch.float16, "cpu")
    with pytest.raises(CheckpointError, match=r"torch\.int8, supported: torch\.float32"):
        checkpoint.load(torch.int8, "cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("whole") / "whole.gguf", CONFIG, WEIGHTS).read_bytes()


def test_every_truncation_is_an_error_that_names_the_file(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "cut.gguf"
    cuts = [*range(200), *range(200, len(whole), 997), len(whole) - 1]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        reason = r"truncated: \d+ bytes are needed, the file has \d+" if cut else "empty file"
        with pytest.raises(CheckpointError, match=rf"cut\.gguf: not a complete GGUF file .*{reason}"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    ("offset", "patch"),
    [
        (0, b"GGML"),  # another format
        (4, struct.pack("<I", 99)),  # a version to come
        (4, struct.pack(">I", 3)),  # the other byte order
        (8, struct.pack("<Q", 1 << 60)),  # more tensors than bytes
        (16, struct.pack("<Q", 1 << 60)),  # more metadata than bytes
        (24, struct.pack("<Q", 1 << 63)),  # a name longer than the file
    ],
)
def test_a_corrupt_header_is_refused(tmp_path: Path, whole: bytes, offset: int, patch: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(whole[:offset] + patch + whole[offset + len(patch) :])
    with pytest.raises(CheckpointError, match=r"bad\.gguf"):
        open_checkpoint(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), min_size=1, max_size=4))
@example([(31, 255)])
def test_no_damage_makes_anything_but_an_engine_error(
    tmp_path: Path, whole: bytes, damage: list[tuple[int, int]]
) -> None:
    broken = bytearray(whole)
    for offset, value in damage:
        broken[offset] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(broken)
    try:
        checkpoint = open_checkpoint(path)
        checkpoint.load(torch.float32, "cpu")
        checkpoint.tokenizer()
    except EngineError as error:
        assert str(error)  # noqa: PT017 - either outcome is right, any other exception is not


# --- the default model ---


def test_the_default_model_is_read_as_what_it_is() -> None:
    checkpoint = open_checkpoint(default_gguf())
    assert checkpoint.config == LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        eos_token_ids=(2,),
        bos_token_id=1,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_the_default_models_weights_equal_transformers_own_conversion() -> None:
    from transformers import AutoModelForCausalLM

    path = default_gguf()
    with arrays_for_mappings():
        oracle = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = oracle.state_dict()
    loaded = open_checkpoint(path).load(torch.float32, "cpu")
    assert set(state) - set(loaded) == {"lm_head.weight"}
    for name, weight in loaded.items():
        assert torch.equal(weight, state[name]), name
