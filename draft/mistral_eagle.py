"""Mistral's Eagle head: an EAGLE-1 network on latent attention, whose feature is taken after its final norm.

    x = eagle_linear([embedding of token i, feature i - 1])    the feature: the target's, after its final norm
    x = decoder layers with latent attention and a dense MLP, none of them without its input norm
    g = norm(x)                                                the identity where the checkpoint has none
    logits = the target's output(g);  g is the next feature

So a drafted feature is what a true one is, the input of the output matrix, and nothing is normed twice.
Positions are one less than the token's own (pair i runs at position i - 1), as in ``draft.head``.

The whole output matrix is nearly three quarters of what a level of drafting reads. So the head usually drafts
among the most frequent tokens, with a copy of their rows; on a GPU in FP8, for what a draft rounds changes no
token that is emitted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from draft.tree import Offers
from engine.config import POST_NORM, Mistral4Config
from engine.kvcache import LatentPool
from engine.models.mistral4 import DecoderLayer, take_plain
from engine.nn.linear import Linear
from engine.nn.rope import PairRope
from engine.nn.weight import Fp8Weight, Weights
from engine.rows import RowPlan
from kernels import quantise_fp8, rms_norm

_ROWS_AT_ONCE = 4096  # rounded together, in float32


def copied_output(rows_of: Callable[[Tensor], Tensor], token_ids: Tensor, fp8: bool) -> Linear:
    """A head's own copy of some rows of the output matrix.

    rows_of: token ids [n] int64 -> rows [n, H]; token_ids: [Vd], which rows to copy; fp8: round them, each to
    a scale of its own.
    """
    if not fp8:
        return Linear(rows_of(token_ids), half=True)
    # A row is rounded as a matrix of its own.
    parts = [quantise_fp8(rows_of(some)[:, None]) for some in torch.split(token_ids, _ROWS_AT_ONCE)]
    codes = torch.cat([codes[:, 0].view(torch.uint8) for codes, _ in parts]).view(torch.float8_e4m3fn)
    return Linear(Fp8Weight(codes, torch.cat([scale for _, scale in parts])))


def copied_output_bytes(num_rows: int, hidden_size: int, dtype: torch.dtype, fp8: bool) -> int:
    """What ``copied_output`` holds, which is also what a level of drafting reads of it."""
    return num_rows * (hidden_size + torch.float32.itemsize if fp8 else hidden_size * dtype.itemsize)


class MistralEagleModel:
    """The network (draft.growth.HeadModel).

    config: the head's own, without experts; weights: native names, consumed, plain or quantised whatever the
    target's are; embedding: [V, H], and output: [.., H] -> [.., Vd] float32, usually the target's own;
    token_ids: [Vd] int64, which token each column of the output stands for, all of the vocabulary in order
    if None.
    """

    feature_layers: tuple[int, ...] = (POST_NORM,)

    def __init__(
        self,
        config: Mistral4Config,
        weights: Weights,
        embedding: Tensor,
        output: Callable[[Tensor], Tensor],
        num_slots: int,
        token_ids: Tensor | None = None,
    ) -> None:
        assert config.num_experts == 0, "the head's MLP is dense"
        self.config, self.embedding, self._output = config, embedding, output
        dtype, device = embedding.dtype, str(embedding.device)
        self.token_ids = torch.arange(len(embedding), device=device) if token_ids is None else token_ids
        self.eagle_linear = Linear(weights.pop("eagle_linear.weight"))
        self.norm = take_plain(weights, "norm.weight") if "norm.weight" in weights else None
        self.layers = [DecoderLayer(config, weights, f"layers.{i}", dtype) for i in range(config.num_layers)]
        assert not weights, f"weights left over: {sorted(weights)[:3]}"
        self.rope = PairRope(config, device)
        self.pool = LatentPool(config.num_layers, config.latent_dim, num_slots, dtype, device)

    def extend(self, tokens: Tensor, features: Tensor, positions: Tensor, plan: RowPlan) -> Tensor:
        return self.forward(tokens, features, positions, plan)  # the target's features are like its own

    def forward(self, tokens: Tensor, feature: Tensor, positions: Tensor, plan: RowPlan) -> Tensor:
        x = self.eagle_linear(torch.cat((self.embedding[tokens], feature), dim=-1))
        rotation = self.rope(positions)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotation, self.pool.layer(index), plan)
        return x if self.norm is None else rms_norm(x, self.norm, self.config.rms_norm_eps)

    def logits(self, feature: Tensor) -> Tensor:
        return self._output(feature)

    def offers(self, feature: Tensor, count: int) -> Offers:
        return Offers.best(self.logits(feature), self.token_ids, count)
