"""Llama-style targets: RMSNorm, grouped-query attention with rope, SwiGLU, tied or untied embeddings.

Covers SmolLM2, Llama 2 and 3, Mistral 7B and their like. The model is assembled from a dict of weights under
their Hugging Face names; checkpoint readers deliver that dict, already checked against the config.
"""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from engine.config import LlamaConfig
from engine.kvcache import KVPool
from engine.models.decoder import Decoder
from engine.nn.attention import Attention
from engine.nn.layer import DecoderLayer, LayerStack
from engine.nn.linear import Linear, fuse
from engine.nn.mlp import SwiGLU
from engine.nn.rope import RopeTable
from engine.rows import RowPlan


def _layer(config: LlamaConfig, weights: dict[str, Tensor], prefix: str, half: bool) -> DecoderLayer:
    def take(name: str) -> Tensor:
        return weights.pop(
            f"{prefix}.{name}.weight"
        )  # popped, so that memory is freed while layers are built

    return DecoderLayer(
        take("input_layernorm"),
        Attention(
            fuse(take("self_attn.q_proj"), take("self_attn.k_proj"), take("self_attn.v_proj"), half=half),
            Linear(take("self_attn.o_proj"), half=half),
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        ),
        take("post_attention_layernorm"),
        SwiGLU(
            fuse(take("mlp.gate_proj"), take("mlp.up_proj"), half=half),
            Linear(take("mlp.down_proj"), half=half),
        ),
        config.rms_norm_eps,
    )


class Llama(Decoder):
    """A target (roles.Target). ``weights`` is consumed.

    feature_layers: which hidden states a head wants, concatenated in this order. Number i is the input of
    layer i, ``num_layers`` the output of the last layer before the final norm, ``POST_NORM`` the one after
    it. half_weights: matrices in float16 where a CPU multiplies those faster (see engine.nn.linear).
    """

    layers: list[DecoderLayer]

    def __init__(
        self,
        config: LlamaConfig,
        weights: dict[str, Tensor],
        num_slots: int,
        feature_layers: tuple[int, ...] = (),
        half_weights: bool = False,
    ) -> None:
        self.config, self.tied = config, config.tie_word_embeddings
        self.feature_layers = feature_layers
        self.embedding = weights.pop("model.embed_tokens.weight")
        self.dtype, self.device = self.embedding.dtype, str(self.embedding.device)
        self.lm_head = Linear(
            self.embedding if config.tie_word_embeddings else weights.pop("lm_head.weight"), half=half_weights
        )
        self.norm = weights.pop("model.norm.weight")
        self.layers = [
            _layer(config, weights, f"model.layers.{i}", half_weights) for i in range(config.num_layers)
        ]
        assert not weights, f"weights left over: {sorted(weights)[:3]}"
        self.rope = RopeTable(
            config.head_dim,
            config.rope_theta,
            config.rope_scaling,
            config.max_position_embeddings,
            self.dtype,
            self.device,
        )
        self.pool = KVPool(
            config.num_layers, config.num_kv_heads, config.head_dim, num_slots, self.dtype, self.device
        )

        self._stacks = {
            first: LayerStack(self.layers[first:last], [self.pool.layer(i) for i in range(first, last)])
            for first, last in itertools.pairwise(self.bounds)
        }

    def _run(self, first: int, last: int, x: Tensor, rotation: Any, plan: RowPlan) -> Tensor:
        return self._stacks[first](x, rotation, plan)

    def output_rows(self, token_ids: Tensor) -> Tensor:
        """Rows of the output matrix, [n, H]; where it is the embedding, of that, which is never rounded."""
        return self.embedding[token_ids] if self.tied else super().output_rows(token_ids)
