"""The EAGLE-3 head (Li et al., arXiv 2503.01840): three target layers in, one decoder layer, a reduced
vocabulary.

    g = fc(features of position i - 1)                        or the head's own last output while drafting
    x = [input_layernorm(embedding of token i), hidden_norm(g)]
    h = g + attention(x);  h = h + mlp(post_attention_layernorm(h))
    logits over the draft vocabulary = lm_head(norm(h));      h is the next g

Weights carry the published names (``fc``, ``midlayer.*``, ``norm``, ``lm_head``, ``d2t``, ``t2d``); the
embedding is the target's unless the checkpoint brings its own. ``target id = draft id + d2t[draft id]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draft.tree import Offers
from engine.config import LlamaConfig
from engine.kvcache import KVPool
from engine.nn.attention import Attention
from engine.nn.layer import DecoderLayer
from engine.nn.linear import Linear, fuse
from engine.nn.mlp import SwiGLU
from engine.nn.norm import Norm
from engine.nn.rope import RopeTable
from engine.rows import RowPlan
from kernels import fused_head, rms_norm


class Eagle3Model:
    """The network (draft.growth.HeadModel).

    config: shape of the head's layer, ``vocab_size`` being the draft vocabulary's; weights: published names,
    consumed; embedding: [V, H]; feature_layers: as in engine.models.llama; half: see engine.nn.linear.
    """

    def __init__(
        self,
        config: LlamaConfig,
        weights: dict[str, Tensor],
        embedding: Tensor,
        feature_layers: tuple[int, ...],
        num_slots: int,
        *,
        half: bool = False,
    ) -> None:
        def linear(*names: str) -> Linear:
            return fuse(*(take(name) for name in names), half=half, coarse=True)

        def take(name: str) -> Tensor:
            return weights.pop(f"{name}.weight")

        self.config, self.feature_layers, self.embedding = config, feature_layers, embedding
        self.eps = config.rms_norm_eps
        dtype, device = embedding.dtype, str(embedding.device)
        d2t = weights.pop("d2t")
        self.token_ids = torch.arange(len(d2t), device=d2t.device) + d2t
        self.fc = linear("fc")
        self.input_norm, self.hidden_norm = take("midlayer.input_layernorm"), take("midlayer.hidden_norm")
        self.layer = DecoderLayer(
            None,
            Attention(
                linear(*(f"midlayer.self_attn.{part}_proj" for part in "qkv")),
                linear("midlayer.self_attn.o_proj"),
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
            ),
            take("midlayer.post_attention_layernorm"),
            SwiGLU(
                linear("midlayer.mlp.gate_proj", "midlayer.mlp.up_proj"), linear("midlayer.mlp.down_proj")
            ),
            self.eps,
        )
        self.norm, self.lm_head = take("norm"), linear("lm_head")
        assert not weights, f"weights left over: {sorted(weights)[:3]}"
        self.rope = RopeTable(
            config.head_dim,
            config.rope_theta,
            config.rope_scaling,
            config.max_position_embeddings,
            dtype,
            device,
        )
        self._fused = fused_head(
            self.layer.fused,
            (self.input_norm, self.hidden_norm, self.norm),
            embedding,
            (self.rope.cos, self.rope.sin),
            self.fc.packed,
            self.lm_head.packed,
            self.token_ids,
            self.eps,
        )
        self.pool = KVPool(1, config.num_kv_heads, config.head_dim, num_slots, dtype, device)

    def extend(self, tokens: Tensor, features: Tensor, positions: Tensor, plan: RowPlan) -> Tensor:
        return self._forward(tokens, features, positions, plan, is_target=True)

    def forward(self, tokens: Tensor, feature: Tensor, positions: Tensor, plan: RowPlan) -> Tensor:
        return self._forward(tokens, feature, positions, plan, is_target=False)

    def _forward(
        self, tokens: Tensor, feature: Tensor, positions: Tensor, plan: RowPlan, *, is_target: bool
    ) -> Tensor:
        pool = self.pool.layer(0)
        if self._fused is not None:
            rows = plan.for_layers(self._fused.layer, None, pool)
            if rows is not None:
                return self._fused.forward(tokens, feature, positions, rows, pool, is_target=is_target)
        if is_target:
            feature = self.fc(feature)
        given = torch.cat(
            (
                rms_norm(self.embedding[tokens], self.input_norm, self.eps),
                rms_norm(feature, self.hidden_norm, self.eps),
            ),
            dim=-1,
        )
        return self.layer(feature, self.rope(positions), pool, plan, given)

    def logits(self, feature: Tensor) -> Tensor:
        return self.lm_head(feature, Norm(self.norm, self.eps)).float()

    def offers(self, feature: Tensor, count: int) -> Offers:
        if self._fused is not None:
            return Offers(*self._fused.offers(feature, count))
        return Offers.best(self.logits(feature), self.token_ids, count)
