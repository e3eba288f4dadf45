"""What every target does around its layers: embed, run them, pick features, score the rows asked for.

A model is a ``Decoder`` with its own layers, rotation and pool; it sets the attributes below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.config import POST_NORM, LlamaConfig, Mistral4Config
from engine.core import Batch, DraftTree, Scores, Verdict
from engine.kvcache import KVPool, LatentPool, RowPlan, compact, plan_rows
from engine.nn.linear import Linear
from kernels import compact_rows, rms_norm


class Decoder:
    """A target (core.Target) but for its constructor.

    feature_layers: which hidden states a head wants, concatenated in this order. Number i is the input of
    layer i, ``num_layers`` the output of the last layer before the final norm, ``POST_NORM`` the one after
    it. layers: (x, rotation, rows of the layer, plan) -> x; rope: positions -> the rotation they take.
    """

    config: LlamaConfig | Mistral4Config
    feature_layers: tuple[int, ...]
    embedding: Tensor  # [V, H]
    dtype: torch.dtype
    device: str
    lm_head: Linear
    norm: Tensor  # [H]
    layers: Sequence[Callable[[Tensor, Any, Any, RowPlan], Tensor]]
    rope: Callable[[Tensor], Any]
    pool: KVPool | LatentPool

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def max_positions(self) -> int:
        return self.config.max_position_embeddings

    def compact(self, batch: Batch, verdict: Verdict) -> None:
        """Move the accepted rows of every layer to the front of the scratch rows."""
        compact(self.pool, batch, verdict)

    def copy_rows(self, source: Tensor, destination: Tensor) -> None:
        """Copy rows of every layer. source, destination: [M] slots."""
        compact_rows(self.pool.rows, source, destination)

    def output_rows(self, token_ids: Tensor) -> Tensor:
        """Rows of the output matrix, [n, H]: a head may share them."""
        if self.lm_head.weight is not None:
            return self.lm_head.weight[token_ids]
        # Packed: the product with the identity gives the matrix back, exactly.
        columns = self.lm_head(torch.eye(self.hidden_size, dtype=self.dtype, device=self.device))
        return columns[:, token_ids].T.contiguous()

    def score(self, batch: Batch, tree: DraftTree, positions: Tensor) -> Scores:
        """Logits of every node, or of the last real node of each prompt chunk; their rows are written."""
        hidden, features = self._forward(tree.tokens, positions, plan_rows(batch, tree))
        if batch.prompt is not None:
            last = (batch.prompt.num_nodes - 1)[:, None]
            hidden = hidden.gather(1, last[..., None].expand(-1, 1, hidden.shape[-1]))
            positions = positions.gather(1, last)
        return Scores(self.logits(hidden), positions, features)

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., H] after the final norm -> [.., V] float32."""
        return self.lm_head(hidden).float()

    def _forward(self, tokens: Tensor, positions: Tensor, plan: RowPlan) -> tuple[Tensor, Tensor]:
        x = self.embedding[tokens]
        rotation = self.rope(positions)
        inputs: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            if index in self.feature_layers:
                inputs[index] = x
            x = layer(x, rotation, self.pool.layer(index), plan)
        inputs[len(self.layers)] = x
        x = rms_norm(x, self.norm, self.config.rms_norm_eps)
        inputs[POST_NORM] = x
        features = (
            torch.cat([inputs[i] for i in self.feature_layers], -1) if self.feature_layers else x[..., :0]
        )
        return x, features
