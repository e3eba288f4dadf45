"""Other engines on the same weights in the same process, so that a comparison shares machine, moment and
rounding.

transformers is optional: it comes with the ``test`` extra and is imported when a peer is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.config import LlamaConfig
from engine.errors import ConfigError
from perf.latency import Run


class _Clock:
    """A streamer that notes when tokens arrive; it is handed the prompt, then one token at a time."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.token_ids: list[int] = []
        self._saw_prompt = False

    def put(self, value: Tensor) -> None:
        if self._saw_prompt:
            self.times.append(time.perf_counter())
            self.token_ids += value.flatten().tolist()
        self._saw_prompt = True

    def end(self) -> None:
        """Nothing is buffered."""


def transformers_llama(
    config: LlamaConfig, weights: Mapping[str, Tensor], eos_token_ids: Sequence[int] = ()
) -> Any:
    """``transformers.LlamaForCausalLM`` around tensors with Hugging Face names.

    weights decide dtype and device. Raises ConfigError if transformers is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("--peer transformers: run `pip install transformers` first") from error
    sample = weights["model.embed_tokens.weight"]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    raw = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        head_dim=config.head_dim,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=list(eos_token_ids) or None,
    )
    model = transformers.LlamaForCausalLM(raw).to(sample.dtype)
    missing, unexpected = model.load_state_dict(dict(weights), strict=False, assign=True)
    assert not unexpected, unexpected
    assert not missing or (config.tie_word_embeddings and missing == ["lm_head.weight"]), missing
    model.tie_weights()
    return model.to(sample.device).eval()


class TransformersPeer:
    """``transformers``' own Llama and ``generate``, fed from a dict of tensors with Hugging Face names."""

    def __init__(
        self, config: LlamaConfig, weights: Mapping[str, Tensor], eos_token_ids: Sequence[int]
    ) -> None:
        """Weights decide dtype and device. Raises ConfigError if transformers is missing."""
        self.model = transformers_llama(config, weights, eos_token_ids)
        self.model.generation_config.pad_token_id = min(eos_token_ids, default=0)

    @torch.inference_mode()
    def run(self, prompt: Sequence[int], max_tokens: int, temperature: float = 0.0, seed: int = 0) -> Run:
        """Answer one prompt and time it as ``perf.latency.run_engine`` does."""
        ids = torch.tensor([list(prompt)], device=self.model.device)
        clock = _Clock()
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
        torch.manual_seed(seed)
        started = time.perf_counter()
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, streamer=clock, **sampling
        )
        first, last = clock.times[0], clock.times[-1]
        return Run(clock.token_ids, len(clock.token_ids) - 1, first - started, last - first, last - started)
