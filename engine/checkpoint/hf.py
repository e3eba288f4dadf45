"""Hugging Face directories of Llama models: config.json, safetensors in one file or in shards,
tokenizer.json.

The safetensors library validates each file's header (offsets inside the file, no holes); this module
validates what the files say together: every tensor in exactly one shard and where the index says, of the
shape the config asks for. Not for: pickled weights (pytorch_model.bin), quantised checkpoints,
sentencepiece's tokenizer.model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoint.base import (
    Progress,
    Shape,
    check_dtype,
    check_finite,
    check_headers,
    check_vocabulary,
    expected_tensors,
)
from engine.checkpoint.safetensors_header import read_index
from engine.config import Fields, LlamaConfig
from engine.errors import CheckpointError
from engine.text.tokenizer import Tokenizer, read_json

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # a buffer that old files kept


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor lies and what its header says."""

    file: Path
    shape: Shape
    num_bytes: int


class HfCheckpoint:
    """A directory with a Llama model."""

    def __init__(self, path: Path, name: str) -> None:
        """Read the config and all headers and check them. Raises CheckpointError, ConfigError."""
        self.path, self.name = path, name
        raw = read_json(path / "config.json")
        self.config = read_config(raw, str(path / "config.json"))
        self._token_ids = token_ids(path, self.config)
        self._stored = _read_headers(path)
        if self.config.tie_word_embeddings:
            # some writers store the tied matrix twice; the head is then the embedding by definition
            head = self._stored.get("lm_head.weight")
            embedding = self._stored.get("model.embed_tokens.weight")
            if head is not None and embedding is not None and head.shape == embedding.shape:
                del self._stored["lm_head.weight"]
        found = {name: stored.shape for name, stored in self._stored.items()}
        check_headers(found, self.config, path)

    def load(self, dtype: torch.dtype, device: str, progress: Progress | None = None) -> dict[str, Tensor]:
        """Copy every tensor out of the mapped files, one shard at a time. See ``Checkpoint.load``."""
        check_dtype(dtype)
        total, done = sum(stored.num_bytes for stored in self._stored.values()), 0
        weights: dict[str, Tensor] = {}
        for file in dict.fromkeys(stored.file for stored in self._stored.values()):
            names = [name for name, stored in self._stored.items() if stored.file == file]
            for name, mapped in _read_tensors(file, names):
                weight = torch.empty(mapped.shape, dtype=dtype, device=device).copy_(mapped)
                check_finite(weight, name, file)
                weights[name] = weight
                done += self._stored[name].num_bytes
                if progress is not None:
                    progress(done, total)
        return {name: weights[name] for name in expected_tensors(self.config)}

    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the weights. Raises CheckpointError."""
        return read_tokenizer(self.path, self.config, self._token_ids)


def read_tokenizer(
    directory: Path, config: LlamaConfig, ids: tuple[int | None, tuple[int, ...]]
) -> Tokenizer:
    """tokenizer.json of a Llama directory. ids: of ``token_ids``. Raises CheckpointError."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        found = sorted(entry.name for entry in directory.glob("*token*"))
        raise CheckpointError(
            f"{directory}: no tokenizer.json, found {', '.join(found) or 'no tokenizer file'}"
        )
    bos, eos = ids
    tokenizer = Tokenizer.from_file(
        file, directory / "tokenizer_config.json", eos_token_ids=eos, bos_token_id=bos
    )
    return check_vocabulary(tokenizer, config, file)


def read_config(raw: dict[str, Any], where: str) -> LlamaConfig:
    """LlamaConfig from a parsed config.json. Raises CheckpointError for another architecture, ConfigError for
    values that are malformed or unsupported."""
    architectures = raw.get("architectures")
    if architectures not in [[name] for name in ARCHITECTURES]:
        raise CheckpointError(
            f"{where}: architectures is {architectures!r}, supported: {', '.join(ARCHITECTURES)}"
        )
    return LlamaConfig.from_hf(raw, where)


def token_ids(path: Path, config: LlamaConfig) -> tuple[int | None, tuple[int, ...]]:
    """(BOS, EOS ids) of config.json and, where there is one, generation_config.json. Raises ConfigError."""
    file = path / "generation_config.json"
    extra = Fields(read_json(file) if file.is_file() else {}, str(file)).wholes(
        "eos_token_id", "a token id or a list of them"
    )
    return config.bos_token_id, tuple(dict.fromkeys((*config.eos_token_ids, *extra)))


def _read_headers(directory: Path) -> dict[str, _Stored]:
    """Every tensor of the checkpoint by name, each found exactly once. Raises CheckpointError."""
    index = _index_of(directory)
    files = [_SINGLE] if index is None else sorted(set(index.values()))
    stored: dict[str, _Stored] = {}
    for file_name in files:
        for name, entry in _read_header(directory / file_name):
            if _IGNORED.fullmatch(name):
                continue
            if name in stored:
                raise CheckpointError(
                    f"{entry.file}: tensor {name} is also in {stored[name].file.name}, expected in one file"
                )
            if index is not None and index.get(name) != file_name:
                raise CheckpointError(
                    f"{entry.file}: tensor {name} is here, expected in "
                    f"{index.get(name, 'no file')} according to {_INDEX}"
                )
            stored[name] = entry
    for name, file_name in (index or {}).items():
        if name not in stored and not _IGNORED.fullmatch(name):
            raise CheckpointError(
                f"{directory / file_name}: tensor {name} is missing, expected here according to {_INDEX}"
            )
    return stored


def _index_of(directory: Path) -> dict[str, str] | None:
    """Tensor name -> shard's file name; None for a checkpoint in a single file. Raises CheckpointError."""
    if (directory / _SINGLE).is_file():
        return None
    index = read_index(directory / _INDEX)
    if index is None:
        weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
        found = sorted(entry.name for entry in directory.iterdir() if entry.suffix in weights)
        raise CheckpointError(
            f"{directory}: no {_SINGLE} and no {_INDEX}, found {', '.join(found[:4]) or 'no weights'}"
        )
    return index


def _read_header(file: Path) -> Iterator[tuple[str, _Stored]]:
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            headers = [(name, opened.get_slice(name)) for name in opened.keys()]  # noqa: SIM118 - not a dict
            described = [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in headers]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a complete safetensors file: {error}") from error
    for name, shape, dtype in described:
        if dtype not in DTYPE_BYTES:
            raise CheckpointError(
                f"{file}: tensor {name} has type {dtype}, supported: {', '.join(DTYPE_BYTES)}"
            )
        yield name, _Stored(file, shape, math.prod(shape) * DTYPE_BYTES[dtype])


def _read_tensors(file: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Views of the mapped file; valid until the next one is asked for."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in names:
                yield name, opened.get_tensor(name)
    except (SafetensorError, OSError) as error:  # changed since the headers were read
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
