"""GGUF files of Llama models: metadata -> config, blocks -> tensors, token lists -> tokenizer.

The reader and the dequantiser are the ``gguf`` package's; this module decides what to accept. Two facts of
the format matter. Shapes are stored fastest dimension first, so [out, in] reads (in, out) in the header. And
the rows of q and k are stored for interleaved rotary pairs (2i, 2i + 1), while our models rotate halves (i, i
+ d/2), so they are put back:

    head_dim 4, one head, rows as in the file:   a0 b0 a1 b1      (pair i is rows 2i and 2i + 1)
    as our models expect them:                   a0 a1 b0 b1      (pair i is rows i and i + 2)

This is what llama.cpp's converter does to a Hugging Face checkpoint, backwards. Not for: other architectures,
split files, big-endian files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.gguf_reader import ReaderTensor
from gguf.quants import dequantize
from torch import Tensor

from engine.checkpoint.base import (
    Progress,
    Shape,
    check_config,
    check_dtype,
    check_finite,
    check_headers,
    check_vocabulary,
    expected_tensors,
)
from engine.config import LlamaConfig, RopeScaling
from engine.errors import CheckpointError
from engine.text.tokenizer import Tokenizer

QUANT_TYPES = tuple(
    getattr(GGMLQuantizationType, name)
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
)
ROPE_FACTORS = "rope_freqs.weight"

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(0|[1-9]\d*)\.(\w+)\.weight")


class _Reader(GGUFReader):  # type: ignore[misc]  # the package has no types
    """GGUFReader with bounds: the package's own slices past the end of the file, finds nothing there and goes
    on.

    ``np.frombuffer`` refuses instead, and is also about ten times as fast as slicing a memmap, which a
    vocabulary of 100,000 strings makes worth having.
    """

    def _get(
        self,
        offset: int,
        dtype: npt.DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[Any]:
        kind = np.dtype(dtype)
        wanted = int(offset) + kind.itemsize * int(count)
        if wanted > self.data.nbytes:
            raise ValueError(f"truncated: {wanted} bytes are needed, the file has {self.data.nbytes}")
        order = self.byte_order if override_order is None else override_order
        return np.frombuffer(self.data, dtype=kind.newbyteorder(order), count=int(count), offset=int(offset))


def canonical_name(stored: str) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown name is returned as it is."""
    block = _BLOCK.fullmatch(stored)
    if block is not None and block[2] in _LAYER_NAMES:
        return f"model.layers.{block[1]}.{_LAYER_NAMES[block[2]]}.weight"
    top = _TOP_NAMES.get(stored.removesuffix(".weight")) if stored.endswith(".weight") else None
    return stored if top is None else f"{top}.weight"


def stored_name(canonical: str) -> str:
    """The GGUF name of a canonical tensor; the inverse of ``canonical_name``."""
    plain = canonical.removesuffix(".weight")
    for short, name in _TOP_NAMES.items():
        if plain == name:
            return f"{short}.weight"
    for short, name in _LAYER_NAMES.items():
        if plain.startswith("model.layers.") and plain.endswith(f".{name}"):
            return f"blk.{plain.split('.')[2]}.{short}.weight"
    return canonical


def unpermute(rows: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Interleaved rotary pairs -> halves, per head. rows: [num_heads * head_dim, hidden]."""
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """One tensor in a file, as its header describes it."""

    dtype: str  # GGUF's name, as Q8_0
    num_elements: int
    num_bytes: int


class GgufCheckpoint:
    """One .gguf file of a Llama model."""

    def __init__(self, path: Path) -> None:
        """Read metadata and tensor headers and check them. Raises CheckpointError."""
        self.path = path
        reader = _open(path)
        self._fields = _metadata(reader, path)
        self._stored: dict[str, ReaderTensor] = {}
        self.stored: dict[str, StoredBlocks] = {}  # every tensor of the file, by canonical name
        factors: ReaderTensor | None = None
        for tensor in reader.tensors:
            if tensor.data_offset < reader.data_offset or tensor.data_offset % reader.alignment:
                raise CheckpointError(
                    f"{path}: the data of tensor {tensor.name} is at byte {tensor.data_offset}, expected "
                    f"{reader.data_offset} or more and a multiple of {reader.alignment}"
                )
            if tensor.tensor_type not in QUANT_TYPES:
                raise CheckpointError(
                    f"{path}: tensor {tensor.name} has type {tensor.tensor_type.name}, supported: "
                    f"{', '.join(kind.name for kind in QUANT_TYPES)}"
                )
            self.stored[canonical_name(tensor.name)] = StoredBlocks(
                tensor.tensor_type.name, int(tensor.n_elements), int(tensor.n_bytes)
            )
            if tensor.name == ROPE_FACTORS:
                factors = tensor
            else:
                self._stored[canonical_name(tensor.name)] = tensor
        tied = "lm_head.weight" not in self._stored
        scaling = None if factors is None else _read_rope_factors(self._fields, factors, path)
        self.config = read_config(self._fields, path, tied, scaling)
        check_config(self.config, str(path))
        found: dict[str, Shape] = {name: _shape(tensor) for name, tensor in self._stored.items()}
        check_headers(found, self.config, path, stored_name)
        self.name = path.stem

    def load(self, dtype: torch.dtype, device: str, progress: Progress | None = None) -> dict[str, Tensor]:
        """Dequantise every tensor. See ``Checkpoint.load``."""
        check_dtype(dtype)
        heads = {"self_attn.q_proj": self.config.num_heads, "self_attn.k_proj": self.config.num_kv_heads}
        total, done = sum(tensor.n_bytes for tensor in self._stored.values()), 0
        weights: dict[str, Tensor] = {}
        for name in expected_tensors(self.config):
            tensor = self._stored[name]
            values = dequantize(tensor.data, tensor.tensor_type)
            num_heads = next((count for key, count in heads.items() if key in name), None)
            if num_heads is not None:
                values = unpermute(values, num_heads)
            elif not values.flags.writeable:
                values = values.copy()  # float32 comes back as a view of the read-only file
            weight = torch.from_numpy(values).to(device=device, dtype=dtype).contiguous()
            check_finite(weight, tensor.name, self.path)
            weights[name] = weight
            done += tensor.n_bytes
            if progress is not None:
                progress(done, total)
        return weights

    def tokenizer(self) -> Tokenizer:
        """The tokenizer stored in the file. Raises CheckpointError."""
        tokenizer = Tokenizer.from_gguf(self._fields, where=str(self.path))
        return check_vocabulary(tokenizer, self.config, self.path)


def read_config(
    fields: Mapping[str, Any], path: Path, tied: bool, scaling: RopeScaling | None
) -> LlamaConfig:
    """LlamaConfig from decoded metadata. Metadata that would change the computation is refused by name."""
    arch = fields.get("general.architecture")
    if arch != "llama":
        raise CheckpointError(f"{path}: general.architecture is {arch!r}, supported: 'llama'")

    def number(key: str, default: float | None = None) -> float:
        value = fields.get(f"llama.{key}", default)
        if value is None:
            raise CheckpointError(f"{path}: metadata llama.{key} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{path}: llama.{key} is {value!r:.80}, expected one number")
        return value

    def refuse(key: str, allowed: tuple[Any, ...]) -> None:
        value = fields.get(key, allowed[0])
        if value not in allowed:
            raise CheckpointError(
                f"{path}: {key} is {value!r:.80}, supported: {', '.join(map(repr, allowed))}"
            )

    refuse("llama.rope.scaling.type", ("none",))
    refuse("llama.rope.scale_linear", (1.0, 0.0))
    refuse("llama.expert_count", (0,))
    refuse("llama.attention.causal", (True,))
    refuse("split.count", (1, 0))
    hidden, heads = int(number("embedding_length")), int(number("attention.head_count"))
    if hidden < 1 or heads < 1:
        raise CheckpointError(
            f"{path}: llama.embedding_length is {hidden} and llama.attention.head_count is {heads}, "
            "expected positive numbers"
        )
    head_dim = int(number("attention.key_length", hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if int(number(key, head_dim)) != head_dim:
            raise CheckpointError(
                f"{path}: llama.{key} is {number(key)}, expected the head's width {head_dim}"
            )
    tokens = fields.get("tokenizer.ggml.tokens")
    vocab_size = int(number("vocab_size", len(tokens) if isinstance(tokens, list) else None))
    eos = [fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    bos = fields.get("tokenizer.ggml.bos_token_id")
    context = int(number("context_length"))
    window = int(number("attention.sliding_window", 0))
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=int(number("feed_forward_length")),
        num_layers=int(number("block_count")),
        num_heads=heads,
        num_kv_heads=int(number("attention.head_count_kv", heads)),
        head_dim=head_dim,
        # inside the window, windowed and full attention are the same
        max_position_embeddings=min(context, window) if window > 0 else context,
        rms_norm_eps=_short_float(number("attention.layer_norm_rms_epsilon")),
        rope_theta=_short_float(number("rope.freq_base", 10000.0)),
        rope_scaling=scaling,
        tie_word_embeddings=tied,
        eos_token_ids=tuple(dict.fromkeys(int(token) for token in eos if token is not None)),
        bos_token_id=None if bos is None else int(bos),
    )


def llama3_factors(scaling: RopeScaling, head_dim: int, theta: float) -> npt.NDArray[np.float64]:
    """[head_dim / 2] what each rotary frequency is divided by under Llama-3 scaling."""
    wavelen = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_position_embeddings / wavelen
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 0 where divided in full, 1 where left alone
    return np.asarray(1.0 / ((1.0 - smooth) / scaling.factor + smooth))


def _read_rope_factors(fields: Mapping[str, Any], tensor: ReaderTensor, path: Path) -> RopeScaling:
    """Find the Llama-3 scaling whose factors the file stores; CheckpointError if none gives exactly these.

    The file keeps the factors and not the four numbers behind them. The published Llama 3.1 to 3.3 models
    differ in ``factor`` only, and that is the largest factor.
    """
    plain = read_config(fields, path, tied=True, scaling=None)
    factors = dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
    if factors.shape == (plain.head_dim // 2,) and np.isfinite(factors).all() and factors.max() > 1:
        scaling = RopeScaling(
            factor=_short_float(float(factors.max())),
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        )
        candidate = llama3_factors(scaling, plain.head_dim, plain.rope_theta)
        if np.allclose(factors, candidate, rtol=1e-4, atol=0.0):
            return scaling
    raise CheckpointError(
        f"{path}: tensor {ROPE_FACTORS} of shape {list(factors.shape)} holds rotary factors "
        f"{factors.min(initial=np.inf):g} to {factors.max(initial=-np.inf):g}, not those of "
        "Llama-3 scaling (low_freq_factor 1, high_freq_factor 4, original context 8192)"
    )


def _short_float(value: float) -> float:
    """The decimal number that was rounded to float32 in the file: 9.999999747378752e-06 is 1e-5."""
    return float(str(np.float32(value)))


def _shape(tensor: ReaderTensor) -> Shape:
    return tuple(int(size) for size in reversed(tensor.shape.tolist()))


def _open(path: Path) -> _Reader:
    try:
        with np.errstate(over="raise"):  # offsets near 2**64 must not wrap around to valid ones
            reader = _Reader(path)
    except (ValueError, KeyError, IndexError, TypeError, ArithmeticError, MemoryError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete GGUF file (version 2 or 3): {error}") from error
    if reader.byte_order != "I":
        raise CheckpointError(f"{path}: the file's byte order is not this machine's, which is not supported")
    return reader


def _metadata(reader: _Reader, path: Path) -> dict[str, Any]:
    try:
        return {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError) as error:  # a string that is not UTF-8, an empty part
        raise CheckpointError(f"{path}: the metadata cannot be decoded: {error}") from error
