"""Frozen configurations: of the engine (ours, strict) and of a Llama-style model (somebody's file, tolerant
of unknown keys).

A model's config.json comes from anywhere. ``Fields`` reads one key at a time and refuses what has the wrong
type or cannot be a size; ``HARMLESS`` lists the keys that turn a Llama into another model, with the values
that do not. Everything refused is a ConfigError that names file, key, found and expected.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from engine.core import Speculation
from engine.errors import ConfigError

POST_NORM = -1  # feature layer number of the hidden state after the final norm (EAGLE-1 heads)

# Keys that change what a model computes, in ways that we do not implement, with the values that change
# nothing. A key that is absent or null is harmless too; a list is when each of its elements is.
HARMLESS: Final[Mapping[str, tuple[Any, ...]]] = {
    # MLP and projections
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "qkv_bias": (False,),
    "pretraining_tp": (1,),
    "num_local_experts": (0,),
    "num_experts": (0,),
    "quantization_config": (),
    # which positions attention sees and how they are told apart
    "layer_types": ("full_attention",),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "full_attention": (),  # inside rope_parameters: one rope for each kind of layer
    "sliding_attention": (),
    "no_rope_layers": (1,),  # despite the name, 1 marks a layer that rotates
    "alibi": (False,),
    # inside a layer
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "qk_layernorm": (False,),
    "clip_qkv": (),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "norm_before_residual": (False,),  # a variant of EAGLE-3 heads
    # constants multiplied in (Granite, Cohere, MiniCPM) and soft caps (Gemma 2)
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
}

_LARGEST: Final = 2**31 - 1  # of sizes and token ids


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Options of the engine. Memory in bytes, lengths in tokens."""

    dtype: torch.dtype = torch.float32
    half_weights: bool = False  # with float32 on a CPU: matrices in float16, all else in float32 (w16a32)
    device: str = "cpu"
    max_model_len: int = 2048
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    page_size: int = 16
    kv_cache_memory: int = 1 << 30
    kv_cache_dtype: torch.dtype | None = None  # of the target's rows: float8_e4m3fn, or None for ``dtype``
    prefix_caching: bool = True  # keep rows for later requests that begin with the same tokens
    gpu_memory_utilization: float | None = None  # of a GPU's memory for all; decides kv_cache_memory if given
    speculation: Speculation = field(default_factory=Speculation)
    planned: bool = True  # with a head, that is the most to draft and a planner decides; else always drafted
    draft_vocab_size: int = 32768  # tokens that Mistral's head drafts among; 0: the whole vocabulary
    draft_max_model_len: int = 16384  # longer sequences are decoded plainly by Mistral's head
    enforce_eager: bool = False  # on a GPU: no graphs (engine.graphs)
    pdl: bool = False  # on a GPU: kernels in graphs begin before the one before has ended (kernels.launches)
    canary: float = 0.0  # share of the decode steps that are decoded once more, plainly: see engine.canary
    spec_log: str | None = None
    dummy_weights: bool = False  # random numbers in the shape of model and head; weight files are not read

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
        if self.draft_vocab_size < 0 or self.draft_max_model_len < 1:
            raise ConfigError(
                f"draft_vocab_size is {self.draft_vocab_size} and draft_max_model_len "
                f"{self.draft_max_model_len}, expected 0 or more and 1 or more"
            )
        share = self.gpu_memory_utilization
        if share is not None and not (0 < share <= 1 and self.device.startswith("cuda")):
            raise ConfigError(
                f"gpu_memory_utilization is {share} on {self.device}, expected more than 0 and at most 1 "
                "of a CUDA device's memory"
            )
        if self.kv_cache_dtype is not None and not self.device.startswith("cuda"):
            raise ConfigError(
                f"kv_cache_dtype is {str(self.kv_cache_dtype).removeprefix('torch.')} on {self.device}, "
                "expected a CUDA device: only its kernels read rows in FP8"
            )
        if self.pdl and (self.enforce_eager or not self.device.startswith("cuda")):
            found = "enforce_eager" if self.enforce_eager else self.device
            raise ConfigError(
                f"pdl is on with {found}, expected a CUDA device with graphs: a kernel that is launched by "
                "itself comes after the one before anyhow"
            )
        if not 0 <= self.canary <= 1:
            raise ConfigError(f"canary is {self.canary}, expected a share of all steps, 0 to 1")
        if self.max_num_batched_tokens < 2:
            raise ConfigError("max_num_batched_tokens must be at least 2, found 1")
        if self.half_weights and (self.dtype != torch.float32 or self.device != "cpu"):
            raise ConfigError(
                f"half_weights is for float32 on a CPU, found {self.dtype} on {self.device}; "
                "there the weights have the dtype of everything else"
            )

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of the target's KV rows."""
        return self.kv_cache_dtype or self.dtype

    @property
    def dtype_name(self) -> str:
        """What the command line calls it."""
        return "w16a32" if self.half_weights else str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama-3 frequency scaling (Llama 3.1 release notes; transformers ``_compute_llama3_parameters``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN frequencies (arXiv 2309.00071), without its factor on cosine and sine."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, slots=True)
class Mistral4Config:
    """Shape and constants of Mistral Small 4's decoder, or, with ``num_experts`` 0, of its Eagle head.

    Multi-head latent attention: the cache keeps ``kv_lora_rank + qk_rope_head_dim`` numbers per token and
    layer. Queries at position p are multiplied by 1 + llama_4_beta * ln(1 + floor(p / original positions)).
    softmax_mscale: multiply the softmax scale by YaRN's mscale squared, as transformers 5 does and Mistral's
    own params.json (yarn.apply_scale false) says not to.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    max_position_embeddings: int
    intermediate_size: int = 0  # of the dense MLP, where there are no experts
    num_experts: int = 0
    num_experts_per_tok: int = 0
    num_shared_experts: int = 0
    moe_intermediate_size: int = 0
    routed_scaling_factor: float = 1.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    yarn: YarnScaling | None = None
    llama_4_beta: float = 0.0
    llama_4_original_positions: int = 8192
    softmax_mscale: bool = False
    eos_token_ids: tuple[int, ...] = (2,)
    bos_token_id: int | None = 1

    @property
    def latent_dim(self) -> int:
        """Numbers per token and layer in the cache."""
        return self.kv_lora_rank + self.qk_rope_head_dim


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
        """Read a Hugging Face config, a parsed JSON object. Keys we do not know are ignored; known keys with
        values of the wrong type, or that we do not implement, are refused by name (ConfigError).

        where: the file, for messages.
        """
        fields = Fields(raw, where)
        fields.refuse_all_but(HARMLESS)
        heads, hidden = fields.whole("num_attention_heads"), fields.whole("hidden_size")
        head_dim = fields.whole("head_dim", hidden // heads)
        if fields.absent("head_dim") and hidden % heads:
            raise ConfigError(
                f"{where}: hidden_size is {hidden}, expected a multiple of num_attention_heads {heads}"
            )
        context = fields.whole("max_position_embeddings")
        if fields.flag("use_sliding_window", True):
            # Mistral 7B v0.1: inside the window, windowed and full attention are the same
            context = min(context, fields.whole("sliding_window", context))
        theta, scaling = _read_rope(fields)
        config = cls(
            vocab_size=fields.whole("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.whole("intermediate_size"),
            num_layers=fields.whole("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=fields.whole("num_key_value_heads", heads),
            head_dim=head_dim,
            max_position_embeddings=context,
            rms_norm_eps=fields.real("rms_norm_eps") if "rms_norm_eps" in raw else 1e-6,
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            eos_token_ids=fields.wholes("eos_token_id", "a token id or a list of them"),
            bos_token_id=None if fields.absent("bos_token_id") else fields.whole("bos_token_id", least=0),
        )
        problem = config.mismatch()
        if problem is not None:
            raise ConfigError(f"{where}: {problem}")
        return config

    def mismatch(self) -> str | None:
        """What about the heads does not fit together, None if all does; found and expected, for a message."""
        if self.num_heads % self.num_kv_heads:
            return (
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads, "
                "expected a multiple"
            )
        if self.head_dim % 2:
            return f"head_dim is {self.head_dim}, expected an even number (rotary pairs)"
        return None


class Fields:
    """A JSON object that is read key by key. Every method raises ConfigError naming file, key, found and
    expected; null counts as absent.
    """

    def __init__(self, raw: Mapping[str, Any], where: str, prefix: str = "") -> None:
        """where: the file; prefix: what stands before a key of this object in messages, as in ``outer.``."""
        self.raw, self.where, self._prefix = raw, where, prefix

    def absent(self, key: str) -> bool:
        return self.raw.get(key) is None

    def error(self, key: str, expected: str) -> ConfigError:
        """To be raised. The value found is cut after 80 characters."""
        if key not in self.raw:
            return ConfigError(f"{self.where}: required key {self._prefix + key!r} is missing")
        return ConfigError(f"{self.where}: {self._prefix}{key} is {self.raw[key]!r:.80}, expected {expected}")

    def whole(self, key: str, default: int | None = None, least: int = 1, most: int = _LARGEST) -> int:
        """A whole number in [least, most]; required if there is no default."""
        if default is not None and self.absent(key):
            return default
        value = self.raw.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(key, f"a whole number from {least} to {most}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number greater than 0; required if there is no default."""
        if default is not None and self.absent(key):
            return default
        value = self.raw.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, "a positive number")
        if not 0 < value <= sys.float_info.max:  # NaN is not
            raise self.error(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = default if self.absent(key) else self.raw[key]
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def inner(self, key: str) -> Fields:
        """An object inside this one; an empty one if absent."""
        value = {} if self.absent(key) else self.raw[key]
        if not isinstance(value, dict):
            raise self.error(key, "a JSON object")
        return Fields(value, self.where, f"{self._prefix}{key}.")

    def wholes(self, key: str, expected: str, least: int = 0) -> tuple[int, ...]:
        """A whole number of at least ``least`` or a list of them; () if absent. expected: for the message."""
        value = [] if self.absent(key) else self.raw[key]
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= _LARGEST:
                raise self.error(key, expected)
        return tuple(numbers)

    def refuse_all_but(self, harmless: Mapping[str, tuple[Any, ...]]) -> None:
        """harmless: the values of a key that we may go on with; see HARMLESS."""
        for key, allowed in harmless.items():
            if self.absent(key):
                continue
            value = self.raw[key]
            if not all(item in allowed for item in (value if isinstance(value, list) else [value])):
                supported = ", ".join(map(repr, allowed)) or "only without it"
                raise ConfigError(
                    f"{self.where}: {self._prefix}{key} is {value!r:.80}, supported: {supported}"
                )

    def text(self, key: str, default: str) -> str:
        value = default if self.absent(key) else self.raw[key]
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value


def _read_rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """(theta, scaling). Theta stands beside ``rope_scaling`` or, since transformers 5, both are in
    ``rope_parameters``. Readers disagree on which one wins, so what is said twice must be the same.
    """
    parts = [part for part in map(fields.inner, ("rope_scaling", "rope_parameters")) if part.raw]
    for part in parts:
        part.refuse_all_but(HARMLESS)
    thetas = {part.real("rope_theta") for part in (fields, *parts) if not part.absent("rope_theta")}
    if len(thetas) > 1:
        raise ConfigError(f"{fields.where}: rope_theta is given as {sorted(thetas)}, expected one value")
    scalings = {_read_scaling(part) for part in parts}
    if len(scalings) > 1:
        raise fields.error("rope_scaling", "the same scaling as in rope_parameters")
    return next(iter(thetas), 10000.0), next(iter(scalings), None)


def _read_scaling(part: Fields) -> RopeScaling | None:
    key = "type" if part.absent("rope_type") else "rope_type"
    kind = part.text(key, "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise part.error(key, "'default' or 'llama3'")
    scaling = RopeScaling(
        part.real("factor"),
        part.real("low_freq_factor"),
        part.real("high_freq_factor"),
        part.whole("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise part.error("high_freq_factor", f"more than low_freq_factor {scaling.low_freq_factor}")
    return scaling
