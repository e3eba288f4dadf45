"""The EAGLE-1 and EAGLE-2 head (Li et al., arXiv 2401.15077, 2406.16858): the target's last feature in, its
vocabulary out.

    x = fc([embedding of token i, feature i - 1])             the feature is the target's, after its final
    norm
    x = decoder layers (the first usually without an input norm)
    logits = the target's lm_head(x), or lm_head(norm(x)) where the checkpoint has a final norm;  x is the
    next feature

EAGLE-2 is the same network; what it changed, dynamic trees, is ``draft/tree.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from draft.tree import Offers
from engine.config import POST_NORM, LlamaConfig
from engine.kvcache import KVPool
from engine.nn.attention import Attention
from engine.nn.layer import DecoderLayer
from engine.nn.linear import Linear, fuse
from engine.nn.mlp import SwiGLU
from engine.nn.rope import RopeTable
from engine.rows import RowPlan
from kernels import rms_norm


def _layer(config: LlamaConfig, weights: dict[str, Tensor], prefix: str) -> DecoderLayer:
    def take(name: str) -> Tensor:
        return weights.pop(f"{prefix}.{name}.weight")

    return DecoderLayer(
        weights.pop(f"{prefix}.input_layernorm.weight", None),
        Attention(
            fuse(*(take(f"self_attn.{part}_proj") for part in "qkv")),
            Linear(take("self_attn.o_proj")),
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        ),
        take("post_attention_layernorm"),
        SwiGLU(fuse(take("mlp.gate_proj"), take("mlp.up_proj")), Linear(take("mlp.down_proj"))),
        config.rms_norm_eps,
    )


class EagleModel:
    """The network (draft.growth.HeadModel). weights: published names, consumed; target_logits: the target's
    lm_head."""

    feature_layers: tuple[int, ...] = (POST_NORM,)

    def __init__(
        self,
        config: LlamaConfig,
        weights: dict[str, Tensor],
        embedding: Tensor,
        target_logits: Callable[[Tensor], Tensor],
        num_slots: int,
    ) -> None:
        self.config, self.embedding, self._target_logits = config, embedding, target_logits
        dtype, device = embedding.dtype, str(embedding.device)
        self.token_ids = torch.arange(len(embedding), device=embedding.device)  # whatever its config says
        self.fc = Linear(weights.pop("fc.weight"))
        self.fc_bias = weights.pop("fc.bias", None)
        self.norm = weights.pop("norm.weight", None)
        self.layers = [_layer(config, weights, f"layers.{i}") for i in range(config.num_layers)]
        assert not weights, f"weights left over: {sorted(weights)[:3]}"
        self.rope = RopeTable(
            config.head_dim,
            config.rope_theta,
            config.rope_scaling,
            config.max_position_embeddings,
            dtype,
            device,
        )
        self.pool = KVPool(config.num_layers, config.num_kv_heads, config.head_dim, num_slots, dtype, device)

    def extend(self, tokens: Tensor, features: Tensor, positions: Tensor, plan: RowPlan) -> Tensor:
        return self.forward(tokens, features, positions, plan)  # the target's features are like its own

    def forward(self, tokens: Tensor, feature: Tensor, positions: Tensor, plan: RowPlan) -> Tensor:
        x = self.fc(torch.cat((self.embedding[tokens], feature), dim=-1))
        if self.fc_bias is not None:
            x = x + self.fc_bias
        cos_sin = self.rope(positions)
        for index, layer in enumerate(self.layers):
            # the first layer of published heads has no norm of its own
            given = x if layer.input_norm is None else None
            x = layer(x, cos_sin, self.pool.layer(index), plan, given)
        return x

    def logits(self, feature: Tensor) -> Tensor:
        if self.norm is not None:
            feature = rms_norm(feature, self.norm, self.config.rms_norm_eps)
        return self._target_logits(feature)

    def offers(self, feature: Tensor, count: int) -> Offers:
        return Offers.best(self.logits(feature), self.token_ids, count)
