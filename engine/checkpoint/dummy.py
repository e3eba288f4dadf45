"""Models without weights: the exact shape that configuration files ask for, filled with random numbers.

For measuring speed and memory where the weights are not: a step reads as many bytes of the same types as the
real model's, and what it answers means nothing, nor does how much of a draft is accepted. Params.json or
config.json are read, a tokenizer where there is one, never a weight file, an index or a header; of a hub
name, only the small files are fetched. What to fill comes from the readers' own tables, how it is stored from
the configuration's quantisation block (``native.announced_weights``, ``mistral_hf.announced_weights``).

Every buffer is filled where it lies, on its device, by a generator there, weight by weight; on a GPU nothing
of the model passes through host memory. A seed means a model, on one kind of device.

    norms        1
    embeddings   spread 1; where they are the output matrix too, as that
    matrices     spread 1 / sqrt(columns), so that inputs of unit spread give outputs of unit spread
      plain      normal
      FP8        codes uniform over the bytes with bit 6 cleared: magnitudes below 2, never NaN (0x7f, 0xff)
      NVFP4      codes uniform over all bytes, block scales over the eight e4m3 numbers from 1 to 1.875
    scales       one number for each matrix, which gives its codes that spread

So every block adds about a unit or less to the residual stream, which grows with the root of the number of
layers, and logits have about unit spread: no token and no expert takes it all.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from engine.checkpoint import hf, mistral_hf, native, open_checkpoint
from engine.checkpoint.base import Checkpoint, MistralCheckpoint, Progress, check_dtype, expected_tensors
from engine.checkpoint.hub import local_directory, wants_native
from engine.checkpoint.mistral import read_head_params, read_hf_config, read_params
from engine.checkpoint.native import PARAMS, MistralHead
from engine.checkpoint.plan import NVFP4_BLOCK, Expected, Kind, Plan, Planned
from engine.checkpoint.safetensors_header import Shape, Stored
from engine.checkpoint.stream import Buffers, allocate, assemble
from engine.config import LlamaConfig, Mistral4Config
from engine.errors import CheckpointError
from engine.nn.weight import Weight, tensors_only
from engine.text.tokenizer import Tokenizer, read_json
from kernels import dequantise_nvfp4

if TYPE_CHECKING:
    from engine.text.mistral import MistralTokenizer

TARGET_SEED: Final = 0
HEAD_SEED: Final = 1  # its layers have the names of the target's
_FP8_BITS: Final = 0xBF
_BLOCK_SCALE_BITS: Final = 0x07  # e4m3's fraction, in eighths
_BLOCK_SCALE_ONE: Final = 0x38  # e4m3 code of 1.0
_INPUT_SCALE: Final = 8 / 448  # eight times the spread of inputs is FP8's largest number

_log = logging.getLogger(__name__)


def open_dummy(path: str | Path) -> Checkpoint | MistralCheckpoint:
    """A target without its weights, from its configuration files.

    path: a directory with params.json or config.json, ``org/name`` on the hub, or a .gguf file, whose
    configuration and tokenizer are inside. Raises CheckpointError, ConfigError.
    """
    local, name = local_directory(path, weights=False)
    if not local.is_dir():
        described = open_checkpoint(local)
        return DummyLlama(local, described.name, described.config, described.tokenizer)
    if wants_native(local):
        return _open_native(local, name)
    file = local / "config.json"
    if not file.is_file():
        found = sorted(entry.name for entry in local.iterdir())[:8]
        raise CheckpointError(
            f"{local}: found {', '.join(found) or 'nothing'}, expected a params.json or config.json, which "
            "--load-format dummy needs to know the shape"
        )
    raw = read_json(file)
    if raw.get("model_type") in mistral_hf.MODEL_TYPES:
        config = read_hf_config(raw, str(file))
        return DummyMistral(local, name, config, mistral_hf.announced_weights(config, raw, file))
    llama = hf.read_config(raw, str(file))
    ids = hf.token_ids(local, llama)
    return DummyLlama(local, name, llama, lambda: hf.read_tokenizer(local, llama, ids))


def open_dummy_head(directory: Path) -> MistralHead:
    """An Eagle head of Mistral Small 4 without its weights, from its params.json.

    Raises CheckpointError, ConfigError.
    """
    file = directory / PARAMS
    params = read_json(file)
    config = read_head_params(params, str(file))
    weights = native.announced_weights(config, params, file)
    return DummyMistralHead(directory, config, {}, Plan(weights, (), ()))


def _open_native(directory: Path, name: str) -> DummyMistral:
    file = directory / PARAMS
    params = read_json(file)
    config = read_params(params, str(file))
    return DummyMistral(directory, name, config, native.announced_weights(config, params, file))


class DummyMistral:
    """A Mistral Small 4 target without its weights (base.MistralCheckpoint)."""

    def __init__(self, path: Path, name: str, config: Mistral4Config, weights: Mapping[str, Planned]) -> None:
        self.path, self.name, self.config = path, name, config
        self.stored: Mapping[str, Stored] = {}
        self.plan = Plan(weights, (), ())

    def load(self, dtype: torch.dtype, device: str, progress: Progress | None = None) -> dict[str, Weight]:
        """Random weights of every shape and type that the files would have."""
        _warn(self.path)
        return fill(self.plan.weights, dtype, device, TARGET_SEED, progress)

    def tokenizer(self) -> MistralTokenizer:
        """tekken.json, which has to be there. Raises CheckpointError."""
        return native.read_tokenizer(self.path, self.config)


class DummyLlama:
    """A Llama target without its weights (base.Checkpoint)."""

    def __init__(
        self, path: Path, name: str, config: LlamaConfig, read_tokenizer: Callable[[], Tokenizer]
    ) -> None:
        self.path, self.name, self.config = path, name, config
        self._read_tokenizer = read_tokenizer

    def load(self, dtype: torch.dtype, device: str, progress: Progress | None = None) -> dict[str, Tensor]:
        """Random tensors of every shape that the files would have, in ``dtype``."""
        _warn(self.path)
        shapes = expected_tensors(self.config)
        embedding = "" if self.config.tie_word_embeddings else "model.embed_tokens.weight"
        return fill_plain(shapes, dtype, device, TARGET_SEED, progress, embedding)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which has to be there. Raises CheckpointError."""
        return self._read_tokenizer()


@dataclass(frozen=True, slots=True)
class DummyMistralHead(MistralHead):
    """An Eagle head without its weights."""

    def load(self, dtype: torch.dtype, device: str, progress: Progress | None = None) -> dict[str, Weight]:
        """Random weights of every shape and type that the file would have."""
        _warn(self.path)
        return fill(self.plan.weights, dtype, device, HEAD_SEED, progress)


def _warn(path: Path) -> None:
    _log.warning("%s: random weights in place of the files' (--load-format dummy)", path)


# --- filling


def fill(
    weights: Mapping[str, Planned],
    dtype: torch.dtype,
    device: str,
    seed: int,
    progress: Progress | None = None,
    embedding: str = "tok_embeddings.weight",
) -> dict[str, Weight]:
    """Random weights on ``device``: quantised ones as planned, the others in ``dtype``.

    progress(bytes filled, bytes in all); embedding: the weight whose rows have unit spread. Raises
    CheckpointError for a dtype that no weights have.
    """
    check_dtype(dtype)
    total = sum(_num_bytes(planned, dtype) for planned in weights.values())
    filled: dict[str, Weight] = {}
    done = 0
    for name, planned in weights.items():
        buffers = allocate(name, planned, dtype, device)
        spread = 1.0 if name == embedding else 1 / math.sqrt(planned.expected.shape[-1])
        generator = _generator(device, seed, name)
        for (_, part), buffer in buffers.items():
            if part == "values" and len(planned.expected.shape) == 1:
                buffer.fill_(1.0)
            elif part == "values":
                buffer.normal_(0.0, spread, generator=generator)
            else:
                codes = _random_bytes(buffer, generator)
                if part == "block_scales":
                    codes.bitwise_and_(_BLOCK_SCALE_BITS).bitwise_or_(_BLOCK_SCALE_ONE)
                elif planned.kind == "fp8":
                    codes.bitwise_and_(_FP8_BITS)
        buffers |= _scales(name, planned, spread)
        filled[name] = assemble(name, planned, buffers, device)
        done += _num_bytes(planned, dtype)
        if progress is not None:
            progress(done, total)
    return filled


def fill_plain(
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    device: str,
    seed: int,
    progress: Progress | None = None,
    embedding: str = "",
) -> dict[str, Tensor]:
    """``fill`` for weights that are all plain: vectors are norms, what has two dimensions a matrix."""
    weights = {name: Planned(Expected(shape), "plain") for name, shape in shapes.items()}
    return tensors_only(fill(weights, dtype, device, seed, progress, embedding))


def _random_bytes(buffer: Tensor, generator: torch.Generator) -> Tensor:
    """Fill a contiguous buffer and return it as bytes, [n]. Eight at a time is ten times as fast."""
    codes = buffer.view(torch.uint8).view(-1)
    whole = len(codes) // 8 * 8
    codes[:whole].view(torch.int64).random_(-(1 << 63), None, generator=generator)
    codes[whole:].random_(0, 256, generator=generator)
    return codes


def _generator(device: str, seed: int, name: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def _num_bytes(planned: Planned, dtype: torch.dtype) -> int:
    """Of the buffers that ``allocate`` takes."""
    numbers = math.prod(planned.expected.stacked)
    if planned.kind == "plain":
        return numbers * dtype.itemsize
    return numbers if planned.kind == "fp8" else numbers // 2 + numbers // NVFP4_BLOCK


def _scales(name: str, planned: Planned, spread: float) -> Buffers:
    """Scales of whole matrices, float32 in host memory, that give the codes their spread."""
    shape = (planned.expected.num_experts,) if planned.expected.num_experts else ()
    if planned.kind == "plain":
        return {}
    if planned.kind == "nvfp4":
        return {(name, "divisor"): torch.full(shape, _code_spread("nvfp4") / spread)}
    buffers: Buffers = {(name, "scale"): torch.full(shape, spread / _code_spread("fp8"))}
    if planned.has_input_scale:
        buffers[name, "input_scale"] = torch.full(shape, _INPUT_SCALE)
    return buffers


@cache
def _code_spread(kind: Kind) -> float:
    """Root mean square of what random codes stand for, before the scale of the matrix."""
    codes = torch.arange(256, dtype=torch.uint8)
    if kind == "fp8":
        return _root_mean_square((codes & _FP8_BITS).view(torch.float8_e4m3fn).float())
    scales = (codes & _BLOCK_SCALE_BITS | _BLOCK_SCALE_ONE).view(torch.float8_e4m3fn)
    ones = torch.ones(1, 2 * len(codes) // NVFP4_BLOCK).to(torch.float8_e4m3fn)
    numbers = dequantise_nvfp4(codes[None], ones, torch.ones(()), torch.float32)
    return _root_mean_square(numbers) * _root_mean_square(scales.float())


def _root_mean_square(numbers: Tensor) -> float:
    return float(numbers.square().mean().sqrt())
