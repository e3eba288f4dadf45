"""Mistral Small 4: multi-head latent attention, and in every layer a mixture of experts beside a shared one.

The model is assembled from a dict of weights under their native names (``tok_embeddings``, ``layers.N``,
``norm``, ``output``), plain or quantised as stored, the routed experts of a layer stacked. Checkpoint readers
deliver that dict, already checked against the config. ``DecoderLayer`` also builds the Eagle head's layers,
which differ in one thing: their MLP is dense.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import Mistral4Config
from engine.kvcache import LatentPool
from engine.models.decoder import Decoder
from engine.nn.linear import Linear, fuse
from engine.nn.mla import MultiHeadLatentAttention
from engine.nn.mlp import SwiGLU
from engine.nn.moe import Experts, MixtureOfExperts, Router
from engine.nn.rope import PairRope, PairRotation
from engine.nn.weight import Weights, dequantise
from engine.rows import RowPlan
from kernels import add_rms_norm, rms_norm


def take_plain(weights: Weights, name: str) -> Tensor:
    """Remove a weight that is never quantised (norms, embeddings, the router)."""
    weight = weights.pop(name)
    assert isinstance(weight, Tensor), f"{name} is quantised"
    return weight


class DecoderLayer:
    """x + attention(norm x), then x + mlp(norm x); the MLP is dense where the config has no experts.

    weights is consumed: popped, so that memory is freed while layers are built. dtype: the activations'.
    """

    def __init__(
        self, config: Mistral4Config, weights: Weights, prefix: str, dtype: torch.dtype, half: bool = False
    ) -> None:
        self.eps = config.rms_norm_eps
        self.attention_norm = take_plain(weights, f"{prefix}.attention_norm.weight")
        self.ffn_norm = take_plain(weights, f"{prefix}.ffn_norm.weight")
        self.attention = _attention(config, weights, f"{prefix}.attention", dtype, half)
        self.mlp: SwiGLU | MixtureOfExperts
        if config.num_experts:
            self.mlp = _mixture(config, weights, prefix, half)
        else:
            self.mlp = _swiglu(weights, f"{prefix}.feed_forward", half)

    def __call__(self, x: Tensor, rotation: PairRotation, pool: Tensor, plan: RowPlan) -> Tensor:
        attended = self.attention(rms_norm(x, self.attention_norm, self.eps), rotation, pool, plan)
        x, normed = add_rms_norm(x, attended, self.ffn_norm, self.eps)
        return x + self.mlp(normed)


def _attention(
    config: Mistral4Config, weights: Weights, prefix: str, dtype: torch.dtype, half: bool
) -> MultiHeadLatentAttention:
    down = (weights.pop(f"{prefix}.wq_a.weight"), weights.pop(f"{prefix}.wkv_a_with_mqa.weight"))
    return MultiHeadLatentAttention(
        config,
        fuse(*down, half=half),
        take_plain(weights, f"{prefix}.q_a_norm.weight"),
        Linear(weights.pop(f"{prefix}.wq_b.weight"), half=half),
        take_plain(weights, f"{prefix}.kv_a_norm.weight"),
        dequantise(weights.pop(f"{prefix}.wkv_b.weight"), dtype),
        Linear(weights.pop(f"{prefix}.wo.weight"), half=half),
    )


def _mixture(config: Mistral4Config, weights: Weights, prefix: str, half: bool) -> MixtureOfExperts:
    gate = take_plain(weights, f"{prefix}.gate.weight")
    return MixtureOfExperts(
        Router(gate, config.num_experts_per_tok, config.routed_scaling_factor),
        Experts(*(weights.pop(f"{prefix}.experts.{part}") for part in ("w1", "w3", "w2"))),
        _swiglu(weights, f"{prefix}.shared_experts", half) if config.num_shared_experts else None,
    )


def _swiglu(weights: Weights, prefix: str, half: bool) -> SwiGLU:
    w1, w3, w2 = (weights.pop(f"{prefix}.{part}.weight") for part in ("w1", "w3", "w2"))
    return SwiGLU(fuse(w1, w3, half=half), Linear(w2, half=half))


class Mistral4(Decoder):
    """A target (roles.Target). ``weights`` is consumed; the embedding's dtype is the model's.

    feature_layers: which hidden states a head wants, concatenated in this order. Number i is the input of
    layer i, ``num_layers`` the output of the last layer before the final norm, ``POST_NORM`` the one after
    it. half_weights: matrices in float16 where a CPU multiplies those faster (see engine.nn.linear); routed
    experts stay as they are.
    """

    layers: list[DecoderLayer]

    def __init__(
        self,
        config: Mistral4Config,
        weights: Weights,
        num_slots: int,
        feature_layers: tuple[int, ...] = (),
        half_weights: bool = False,
    ) -> None:
        self.config = config
        self.feature_layers = feature_layers
        self.embedding = take_plain(weights, "tok_embeddings.weight")
        self.dtype, self.device = self.embedding.dtype, str(self.embedding.device)
        self.lm_head = Linear(weights.pop("output.weight"), half=half_weights)
        self.norm = take_plain(weights, "norm.weight")
        self.layers = [
            DecoderLayer(config, weights, f"layers.{i}", self.dtype, half_weights)
            for i in range(config.num_layers)
        ]
        assert not weights, f"weights left over: {sorted(weights)[:3]}"
        self.rope = PairRope(config, self.device)
        self.pool = LatentPool(config.num_layers, config.latent_dim, num_slots, self.dtype, self.device)
