"""Multi-head latent attention over paged latent rows (DeepSeek-V2, arXiv 2405.04434); shared by target and
head.

    q      = q_b(norm(q_a x))              per head [content | rotated]
    latent = norm(kv_a x), and beside it one rotated key for all heads: the row that is cached
    k, v   = kv_b latent                   per head [key content | value]

``kv_b`` is never applied to x: it is split, once, into what maps queries into the latent space and what maps
results out of it (see ``kernels.mla``), or expands cached rows where a chunk of a prompt is long enough to
pay.
"""

from __future__ import annotations

import math

from torch import Tensor

from engine.config import Mistral4Config
from engine.nn.linear import Linear
from engine.nn.norm import Norm
from engine.nn.rope import PairRotation
from engine.rows import Part, RowPlan
from kernels import absorb_queries, expand_values, rope_latent_write
from kernels import mla_tree_attention as paged_attention
from kernels.mla import mla_prompt_attention, mla_tree_attention


def softmax_scale(config: Mistral4Config) -> float:
    """1 / sqrt(query width), times YaRN's mscale squared where the config's disputed switch says so."""
    scale = math.pow(config.qk_nope_head_dim + config.qk_rope_head_dim, -0.5)
    if config.softmax_mscale and config.yarn is not None and config.yarn.factor > 1:
        scale *= (0.1 * math.log(config.yarn.factor) + 1.0) ** 2
    return scale


def most_absorbed(config: Mistral4Config) -> int:
    """Nodes of a sequence up to which the absorbed form takes fewer multiplications, whatever the context.

    Per cached row and head, absorbed attention takes R + P + R a node, unabsorbed K + P + V a node and
    R (K + V) once. 153 for Mistral Small 4.
    """
    rank, content, value = config.kv_lora_rank, config.qk_nope_head_dim, config.v_head_dim
    saved = 2 * rank - content - value
    return rank * (content + value) // saved if saved > 0 else 1 << 30


class MultiHeadLatentAttention:
    """Projections, rotation, write the new rows, attend, output projection.

    down: q_a and kv_a in one product, so [x width] -> [q_lora_rank | kv_lora_rank | rotated key]; q_b and out
    as above; kv_b: [H * (K + V), R], dequantised, head after head with the key's rows first.
    """

    def __init__(
        self,
        config: Mistral4Config,
        down: Linear,
        q_norm: Tensor,
        q_b: Linear,
        kv_norm: Tensor,
        kv_b: Tensor,
        out: Linear,
    ) -> None:
        self.down, self.q_b, self.out = down, q_b, out
        self.q_norm, self.kv_norm = Norm(q_norm, config.rms_norm_eps), Norm(kv_norm, config.rms_norm_eps)
        self.num_heads, self.q_rank, self.kv_rank = config.num_heads, config.q_lora_rank, config.kv_lora_rank
        self.content_dim = config.qk_nope_head_dim
        self.scale = softmax_scale(config)
        self.most_absorbed = most_absorbed(config)
        heads = kv_b.view(config.num_heads, self.content_dim + config.v_head_dim, self.kv_rank)
        self.key_up = heads[:, : self.content_dim].contiguous()  # [H, K, R]
        self.value_up = heads[:, self.content_dim :].contiguous()  # [H, V, R]

    def __call__(self, x: Tensor, norm: Norm, rotation: PairRotation, pool: Tensor, plan: RowPlan) -> Tensor:
        """x + attention of x, normed. x: [T, hidden] -> the same; pool: [S, R + P]. The latents of all rows
        are written before they are read."""
        down = self.down(x, norm)
        low, latents = down[:, : self.q_rank], down[:, self.q_rank :]
        q = self.q_b(low, self.q_norm).view(len(x), self.num_heads, -1)
        turn, scale = (rotation.cos, rotation.sin), rotation.query_scale
        q = rope_latent_write(q, latents, *self.kv_norm, *turn, scale, pool, plan.write)

        def attention(q: Tensor, part: Part) -> Tensor:
            if part.tree is not None:
                q = absorb_queries(q, self.key_up)
                latents = paged_attention(q, pool, part.tree, self.scale, self.kv_rank)
                return expand_values(latents, self.value_up)
            if part.num_nodes > self.most_absorbed:
                ups = self.key_up, self.value_up
                return mla_prompt_attention(q, pool, *ups, part.read, part.bias, self.scale)
            q = absorb_queries(q, self.key_up)
            latents = mla_tree_attention(q, pool, part.read, part.bias, self.scale, self.kv_rank)
            return expand_values(latents, self.value_up)

        return self.out(plan.attend(q, attention), residual=x)
