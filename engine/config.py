"""Frozen configurations: of the engine (ours, strict) and of a Llama-style model (somebody's file, tolerant
of unknown keys)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from engine.core import Speculation
from engine.errors import ConfigError

POST_NORM = -1  # feature layer number of the hidden state after the final norm (EAGLE-1 heads)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Options of the engine. Memory in bytes, lengths in tokens."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    max_model_len: int = 2048
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    page_size: int = 16
    kv_cache_memory: int = 1 << 30
    speculation: Speculation = field(default_factory=Speculation)
    spec_log: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "page_size",
            "kv_cache_memory",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.max_num_batched_tokens < 2:
            raise ConfigError("max_num_batched_tokens must be at least 2, found 1")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama-3 frequency scaling (Llama 3.1 release notes; transformers ``_compute_llama3_parameters``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Shape and constants of a Llama-style decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @classmethod
    def from_hf(cls, raw: dict[str, Any], where: str = "config.json") -> LlamaConfig:
        """Read a Hugging Face config. Keys we do not know are ignored; known keys with values we do not
        implement are refused by name (ConfigError)."""

        def need(key: str) -> Any:
            if raw.get(key) is None:
                raise ConfigError(f"{where}: required key {key!r} is missing")
            return raw[key]

        def refuse(key: str, allowed: tuple[Any, ...]) -> None:
            if key in raw and raw[key] not in allowed:
                raise ConfigError(
                    f"{where}: {key} is {raw[key]!r}, supported: {', '.join(map(repr, allowed))}"
                )

        refuse("hidden_act", ("silu",))
        refuse("attention_bias", (False, None))
        refuse("mlp_bias", (False, None))
        refuse("pretraining_tp", (1, None))
        refuse("quantization_config", (None,))
        window, context = raw.get("sliding_window"), need("max_position_embeddings")
        if window is not None and raw.get("use_sliding_window", True) and window < context:
            context = window  # Mistral 7B v0.1: inside the window, windowed and full attention are the same
        rope = dict(raw.get("rope_parameters") or {})  # transformers 5 keeps theta and scaling in one place
        scaling_raw = raw.get("rope_scaling") or rope
        scaling: RopeScaling | None = None
        kind = scaling_raw.get("rope_type", scaling_raw.get("type", "default")) if scaling_raw else "default"
        if kind == "llama3":
            scaling = RopeScaling(
                float(scaling_raw["factor"]),
                float(scaling_raw["low_freq_factor"]),
                float(scaling_raw["high_freq_factor"]),
                int(scaling_raw["original_max_position_embeddings"]),
            )
        elif kind != "default":
            raise ConfigError(
                f"{where}: rope scaling {kind!r} is not supported, supported: 'default', 'llama3'"
            )
        heads, hidden = int(need("num_attention_heads")), int(need("hidden_size"))
        eos = raw.get("eos_token_id")
        return cls(
            vocab_size=int(need("vocab_size")),
            hidden_size=hidden,
            intermediate_size=int(need("intermediate_size")),
            num_layers=int(need("num_hidden_layers")),
            num_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            max_position_embeddings=int(context),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            rope_scaling=scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            eos_token_ids=() if eos is None else (tuple(eos) if isinstance(eos, list) else (int(eos),)),
            bos_token_id=raw.get("bos_token_id") if isinstance(raw.get("bos_token_id"), int) else None,
        )
