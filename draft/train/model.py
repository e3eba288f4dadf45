"""An EAGLE-3 head as a torch module, under the published tensor names.

One row stands for one position. It knows the token at that position and the feature of the position before,
and predicts the next token (EAGLE-3, arXiv 2503.01840):

    g = fc(three hidden states of the target)          at the first step; later the head's own previous h
    x = [input_layernorm(embedding), hidden_norm(g)]
    h = g + o_proj(attention(x));   h = h + mlp(post_attention_layernorm(h))
    draft logits = lm_head(norm(h))

The embedding is the target's and frozen, so it is no part of the module. ``draft/eagle3.py`` serves what is
trained here; this module only has the pieces that the unrolled forward of ``unroll.py`` puts together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import LlamaConfig
from engine.nn.rope import inverse_frequencies


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """Shape and constants of an EAGLE-3 head. ``feature_layers`` count as in ``engine.models.llama``."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    vocab_size: int
    draft_vocab_size: int
    feature_layers: tuple[int, ...]

    @classmethod
    def for_target(
        cls, target: LlamaConfig, feature_layers: tuple[int, ...], draft_vocab_size: int
    ) -> HeadConfig:
        """A head with the target's own layer shape."""
        return cls(
            target.hidden_size,
            target.intermediate_size,
            target.num_heads,
            target.num_kv_heads,
            target.head_dim,
            target.rms_norm_eps,
            target.rope_theta,
            target.vocab_size,
            min(draft_vocab_size, target.vocab_size),
            feature_layers,
        )


def default_feature_layers(num_layers: int) -> tuple[int, int, int]:
    """A third, two thirds and the end: number i is the input of layer i, ``num_layers`` the last layer's
    output.
    """
    return num_layers // 3, 2 * num_layers // 3, num_layers


def choose_draft_vocab(counts: Tensor, size: int, always: tuple[int, ...]) -> Tensor:
    """Ascending target ids of the draft vocabulary: ``always``, then the most frequent. counts: [V] -> [size]
    int64.
    """
    ranked = counts.clone()
    ranked[torch.tensor(always, dtype=torch.int64)] = counts.max() + 1
    # stable: among tokens of equal count the lower id, which in BPE is the earlier merge
    order = torch.sort(ranked, descending=True, stable=True).indices
    return order[: min(size, counts.shape[0])].sort().values


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in the weight's dtype, whatever arrives: under autocast that is bfloat16, for which torch
    has no fused kernel with a float32 weight, and a norm is the wrong place to round.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class SelfAttention(nn.Module):
    """The projections; attention itself depends on who attends to whom, and that is ``unroll``'s business."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, key, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, key, bias=False)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=False)


class MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class Midlayer(nn.Module):
    """The head's one decoder layer."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)


class Eagle3Module(nn.Module):
    """The head. Rows are flat, [M, ..]: which rows belong together is known to the caller."""

    d2t: Tensor  # [draft vocabulary] int64: target id - draft id
    t2d: Tensor  # [V] bool: is this target token in the draft vocabulary
    inv_freq: Tensor

    def __init__(self, config: HeadConfig, draft_vocab: Tensor) -> None:
        """draft_vocab: ascending target ids, [draft_vocab_size] int64."""
        super().__init__()
        assert draft_vocab.shape == (config.draft_vocab_size,)
        self.config = config
        self.fc = nn.Linear(len(config.feature_layers) * config.hidden_size, config.hidden_size, bias=False)
        self.midlayer = Midlayer(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        t2d = torch.zeros(config.vocab_size, dtype=torch.bool)
        t2d[draft_vocab] = True
        self.register_buffer("d2t", draft_vocab - torch.arange(config.draft_vocab_size))
        self.register_buffer("t2d", t2d)
        self.register_buffer(
            "inv_freq", inverse_frequencies(config.head_dim, config.rope_theta, None), persistent=False
        )

    @property
    def draft_vocab(self) -> Tensor:
        """[draft vocabulary] int64 target ids."""
        return self.d2t + torch.arange(self.d2t.shape[0], device=self.d2t.device)

    def mix(self, embedded: Tensor, g: Tensor) -> Tensor:
        """[M, H] twice -> [M, 2H], what attention reads."""
        layer = self.midlayer
        return torch.cat((layer.input_layernorm(embedded), layer.hidden_norm(g)), dim=-1)

    def queries(self, mixed: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """-> [M, heads, D]."""
        q = self.midlayer.self_attn.q_proj(mixed).view(
            mixed.shape[0], self.config.num_heads, self.config.head_dim
        )
        return rotate(q, *rotation)

    def keys_values(self, mixed: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """-> [M, KV heads, D] twice."""
        attention, shape = (
            self.midlayer.self_attn,
            (mixed.shape[0], self.config.num_kv_heads, self.config.head_dim),
        )
        return rotate(attention.k_proj(mixed).view(shape), *rotation), attention.v_proj(mixed).view(shape)

    def finish(self, g: Tensor, attended: Tensor) -> Tensor:
        """The residual stream after attention and feed-forward. g: [M, H]; attended: [M, heads * D] -> [M,
        H].
        """
        layer = self.midlayer
        hidden: Tensor = g + layer.self_attn.o_proj(attended)
        out: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return out

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of positions [M] -> [M, 1, D] twice."""
        angles = positions[:, None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        dtype = self.fc.weight.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, rotate-half layout. x: [M, heads, D]; cos, sin: [M, 1, D]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def initialise(
    head: Eagle3Module, target: Mapping[str, Tensor], num_layers: int, generator: torch.Generator
) -> None:
    """Start from what the target already knows instead of noise.

    ``fc`` passes the last feature through. Query, key and value matrices read embeddings as the target's
    first layer does (with that layer's norm) and hidden states as its last layer does; the rest of the layer
    is a copy of the last, norm and lm_head are the target's. Alternatives tried on SmolLM2-135M, one short
    run each: an embedding half of noise started at 12.4 nats instead of 10.6; with it, 24 steps led to 6.7
    nats, with the residual branches also scaled by 0.1 or 0 to 7.2 and 7.9, and with only noise to 7.8.

    target: weights of the first and last layer and outside the layers, under their Hugging Face names.
    """
    hidden = head.config.hidden_size
    first, last = "model.layers.0", f"model.layers.{num_layers - 1}"
    layer = head.midlayer

    def of_target(name: str, layer_name: str = last) -> Tensor:
        return target[f"{layer_name}.{name}.weight"].float()

    with torch.no_grad():
        head.fc.weight.normal_(std=0.02 / len(head.config.feature_layers), generator=generator)
        head.fc.weight[:, -hidden:] += torch.eye(hidden)
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(layer.self_attn, name).weight
            weight[:, :hidden] = of_target(f"self_attn.{name}", first)
            weight[:, hidden:] = of_target(f"self_attn.{name}")
        layer.self_attn.o_proj.weight.copy_(of_target("self_attn.o_proj"))
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(layer.mlp, name).weight.copy_(of_target(f"mlp.{name}"))
        layer.post_attention_layernorm.weight.copy_(of_target("post_attention_layernorm"))
        layer.hidden_norm.weight.copy_(of_target("input_layernorm"))
        layer.input_layernorm.weight.copy_(of_target("input_layernorm", first))
        head.norm.weight.copy_(target["model.norm.weight"])
        head.lm_head.weight.copy_(lm_head_rows(target, head.draft_vocab))


def lm_head_rows(target: Mapping[str, Tensor], token_ids: Tensor) -> Tensor:
    """The target's output rows of some tokens, [n, H]; the embedding's where they are tied."""
    weight = target.get("lm_head.weight", target["model.embed_tokens.weight"])
    return weight[token_ids.to(weight.device)].float()
