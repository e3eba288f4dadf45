"""What every checkpoint format shares: the table of expected tensors and the checks against it.

A checkpoint goes through three gates. Its *config* must describe a model that we implement. Its *headers*
(names and shapes, no data yet) must equal ``expected_tensors(config)``: nothing missing, nothing unexpected,
no other shape. Its *data* must be finite in the dtype asked for. The first gate that fails raises a
CheckpointError that names the file, the tensor, what was found and what was expected.

Names are those of Hugging Face Llama checkpoints; a format with other names translates on the way in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from engine.checkpoint.plan import Plan
from engine.checkpoint.safetensors_header import Stored
from engine.config import LlamaConfig, Mistral4Config
from engine.errors import CheckpointError
from engine.nn.weight import Weight
from engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from engine.text.mistral import MistralTokenizer

Progress = Callable[[int, int], None]  # (bytes of the file done, bytes of the file in all)
Shape = tuple[int, ...]

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAMES_SHOWN = 4


class Checkpoint(Protocol):
    """A model on disk: its config is read, its weights are not yet."""

    @property
    def name(self) -> str:
        """What to call the model."""
        ...

    @property
    def path(self) -> Path:
        """The file or directory it was read from."""
        ...

    @property
    def config(self) -> LlamaConfig: ...

    def load(self, dtype: torch.dtype, device: str, progress: Progress | None = None) -> dict[str, Tensor]:
        """Every tensor of ``expected_tensors(config)``, contiguous, in ``dtype`` on ``device``."""
        ...

    def tokenizer(self) -> Tokenizer: ...


class MistralCheckpoint(Protocol):
    """A Mistral Small 4 target on disk, in whichever format: its config and headers are read."""

    @property
    def name(self) -> str:
        """What to call the model."""
        ...

    @property
    def path(self) -> Path:
        """The directory it was read from."""
        ...

    @property
    def config(self) -> Mistral4Config: ...

    @property
    def stored(self) -> Mapping[str, Stored]:
        """Every tensor of its files by name."""
        ...

    @property
    def plan(self) -> Plan:
        """What becomes of them: which are used for which weight, how they are stored, which are not read."""
        ...

    def load(self, dtype: torch.dtype, device: str, progress: Progress | None = None) -> dict[str, Weight]:
        """Every weight of ``mistral_tables.expected_weights(config)`` on ``device``, quantised ones exactly
        as stored, the others in ``dtype``. Raises CheckpointError.
        """
        ...

    def tokenizer(self) -> MistralTokenizer: ...


def expected_tensors(config: LlamaConfig) -> dict[str, Shape]:
    """Name and shape ([out, in] for matrices) of every tensor a Llama-style model consists of.

    A model with tied embeddings has no ``lm_head.weight``.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    of_layer: dict[str, Shape] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q_dim, hidden),
        "self_attn.k_proj": (kv_dim, hidden),
        "self_attn.v_proj": (kv_dim, hidden),
        "self_attn.o_proj": (hidden, q_dim),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    expected: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        expected |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    expected["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        expected["lm_head.weight"] = (config.vocab_size, hidden)
    return expected


def check_config(config: LlamaConfig, where: str) -> None:
    """Refuse numbers no model can have (CheckpointError), before shapes are derived from them.

    For formats with metadata of their own; ``LlamaConfig.from_hf`` has done the same.
    """
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
    ):
        if not getattr(config, key) > 0:
            raise CheckpointError(f"{where}: {key} is {getattr(config, key)}, expected a positive number")
    problem = config.mismatch()
    if problem is not None:
        raise CheckpointError(f"{where}: {problem}")


def check_headers(
    found: Mapping[str, Shape], config: LlamaConfig, where: Path, stored_name: Callable[[str], str] = str
) -> None:
    """Compare names and shapes with the table for the config; CheckpointError on the first kind of
    difference.

    ``stored_name`` translates a canonical name to the one in the file, so that the message can be looked up
    there.
    """
    if config.num_layers > len(found):  # before a table for a billion layers is written down
        raise CheckpointError(
            f"{where}: found {len(found)} tensors, expected those of {config.num_layers} layers"
        )
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} of {len(expected)} expected tensors are missing: "
            f"{_some(map(stored_name, missing))}; found {len(found)} tensors"
        )
    unexpected = [name for name in found if name not in expected]
    if unexpected:
        raise CheckpointError(
            f"{where}: {len(unexpected)} unexpected tensors: {_some(map(stored_name, unexpected))}; "
            f"expected the {len(expected)} of a Llama model with this config"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{where}: tensor {stored_name(name)} has shape {list(found[name])}, "
                f"expected {list(shape)} from the config"
            )


def check_vocabulary(tokenizer: Tokenizer, config: LlamaConfig, where: Path) -> Tokenizer:
    """The tokenizer, if every one of its tokens has an embedding; CheckpointError otherwise."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, expected at most "
            f"the {config.vocab_size} that the model has embeddings for"
        )
    return tokenizer


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in SUPPORTED_DTYPES:
        raise CheckpointError(
            f"weights cannot be loaded as {dtype}, supported: {', '.join(map(str, SUPPORTED_DTYPES))}"
        )


def check_finite(weight: Tensor, name: str, where: Path) -> None:
    """Refuse NaN and infinity, whether stored or made by a value too large for the dtype."""
    low, high = torch.aminmax(weight)  # NaN spreads to both; no temporary of the weight's size
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise CheckpointError(
            f"{where}: tensor {name} holds NaN or infinity as {weight.dtype}, expected finite values"
        )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_NAMES_SHOWN]) + (", ..." if len(listed) > _NAMES_SHOWN else "")
