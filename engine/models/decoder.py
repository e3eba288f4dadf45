"""What every target does around its layers: embed, run them, pick features, score the rows asked for.

A model is a ``Decoder`` with its own layers, rotation and pool; it sets the attributes below.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.config import POST_NORM, LlamaConfig, Mistral4Config
from engine.core import Batch, DraftTree, Scores, Verdict
from engine.kvcache import KVPool, LatentPool, compact
from engine.nn.linear import Linear
from engine.rows import BatchRows, RowPlan, batch_rows, join_plans
from kernels import compact_rows, rms_norm


class Decoder:
    """A target (roles.Target) but for its constructor.

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

    def score(self, batches: Sequence[Batch], trees: Sequence[DraftTree]) -> tuple[Scores, ...]:
        """One forward over the trees of all batches: logits of every node, or of the last node of each chunk
        of a prompt. Their rows are written."""
        both = list(zip(batches, trees, strict=True))
        rows = [batch_rows(batch, tree) for batch, tree in both]
        positions = [batch.kv_lens[:, None] + tree.depths() for batch, tree in both]
        hidden, features = self._forward(
            _joined([part.pack(tree.tokens) for part, tree in zip(rows, trees, strict=True)]),
            _joined([part.pack(places) for part, places in zip(rows, positions, strict=True)]),
            join_plans([part.plan for part in rows]),
        )
        sizes = [part.num_rows for part in rows]
        scored = [
            part.last(own) if batch.is_prefill else own
            for part, batch, own in zip(rows, batches, torch.split(hidden, sizes), strict=True)
        ]
        logits = torch.split(self.logits(_joined(scored)), [len(own) for own in scored])
        return tuple(
            _scores(*of_batch)
            for of_batch in zip(batches, rows, positions, logits, torch.split(features, sizes), strict=True)
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., H] after the final norm -> [.., V] float32."""
        return self.lm_head(hidden).float()

    def _forward(self, tokens: Tensor, positions: Tensor, plan: RowPlan) -> tuple[Tensor, Tensor]:
        """tokens, positions: [T] -> hidden [T, H] after the final norm, and features [T, F]."""
        x = self.embedding[tokens]
        rotation = self.rope(positions)
        inputs: dict[int, Tensor] = {}
        for first, last in itertools.pairwise(self.bounds):
            inputs[first] = x
            x = self._run(first, last, x, rotation, plan)
        inputs[len(self.layers)] = x
        x = rms_norm(x, self.norm, self.config.rms_norm_eps)
        inputs[POST_NORM] = x
        features = (
            torch.cat([inputs[i] for i in self.feature_layers], -1) if self.feature_layers else x[..., :0]
        )
        return x, features

    @property
    def bounds(self) -> list[int]:
        """Numbers of the layers before which somebody looks at the rows, the first and the end among them."""
        inner = (layer for layer in self.feature_layers if 0 < layer < len(self.layers))
        return sorted({0, *inner, len(self.layers)})

    def _run(self, first: int, last: int, x: Tensor, rotation: Any, plan: RowPlan) -> Tensor:
        """Layers ``first`` to ``last`` - 1 on x [T, H]."""
        for index in range(first, last):
            x = self.layers[index](x, rotation, self.pool.layer(index), plan)
        return x


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows behind one another; a single part itself, without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _scores(batch: Batch, rows: BatchRows, positions: Tensor, logits: Tensor, features: Tensor) -> Scores:
    """A batch's own part of a forward. logits: of the rows that were scored; features: of all rows."""
    if batch.prompt is not None:
        last = (batch.kv_lens + batch.prompt.num_nodes - 1)[:, None]
        return Scores(logits[:, None], last, rows.unpack(features))
    if rows.packing is None:
        logits = rows.unpack(logits)
    return Scores(logits, positions, rows.unpack(features), rows.packing)
