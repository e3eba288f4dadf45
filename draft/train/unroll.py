"""Training-time test: the head run on its own output, many chains at once.

In service a chain starts at row i, the last one whose feature is true. Its next rows take the head's own
hidden state instead of a feature. They attend to the true rows 0 .. i and to the chain's own rows i + 1 .. i
+ k, never to the true rows past i, which would not exist yet. Training repeats this for many starts in
parallel:

    step 0   every row of every document, plain causal attention: the true keys and values
    step k   one row per chain, i + k: reads the true rows up to i, then the chain's own keys of steps 1 .. k

Example: chain start 3 at step 2 is row 5, sees true rows 0 1 2 3 and own rows 4 5, and predicts what row 5
predicts, token 7. So the target's distributions are computed once, per row, and chains look them up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from draft.train.batches import TrainBatch
from draft.train.model import Eagle3Module


@dataclass(frozen=True, slots=True)
class StepRows:
    """One step of the unrolled forward. M chains; chain m is at row ``start + step`` of its document."""

    step: int
    hidden: Tensor  # [M, H] before the final norm
    document: Tensor  # [M] int64
    start: Tensor  # [M] int64
    exists: Tensor  # [M] bool: the row predicts a token of the answer; False once a chain ran past its end


@dataclass(frozen=True, slots=True)
class _Chains:
    """Flat chains [M] and their places in a grid [B, C], C the most chains of one document."""

    document: Tensor
    start: Tensor
    slot: Tensor  # [M] document * C + column
    width: int  # C
    bias: Tensor  # [B, 1, 1, C, L]: 0 where a chain may read a true row, -inf elsewhere


def unroll(
    head: Eagle3Module, embedding: Tensor, batch: TrainBatch, num_steps: int, continues: Tensor
) -> Iterator[StepRows]:
    """Run the head ``num_steps`` steps. embedding: [V, H], the target's.

    continues: [B, L] bool, which loss rows go on past step 0; all of them take part in step 0.
    """
    document, row = batch.valid.nonzero(as_tuple=True)
    g = head.fc(batch.features[document, row])
    rotation = head.rotation(row)
    mixed = head.mix(embedding[batch.tokens[document, row + 1]].to(g.dtype), g)
    keys, values = head.keys_values(mixed, rotation)
    true_rows = _scatter(keys, values, document * batch.num_rows + row, batch.valid.shape)

    chains = _chains(batch.loss, g.dtype)
    picked = batch.loss[document, row].nonzero()[:, 0]  # both walk the grid in row-major order
    queries = head.queries(mixed[picked], (rotation[0][picked], rotation[1][picked]))
    hidden = head.finish(g[picked], _attend(queries, chains, true_rows, []))
    yield StepRows(0, hidden, chains.document, chains.start, torch.ones_like(chains.start, dtype=torch.bool))

    going = continues[chains.document, chains.start].nonzero()[:, 0]
    if num_steps == 1 or not going.numel():
        return
    g = hidden[going]
    chains = _chains(continues & batch.loss, g.dtype)
    own: list[tuple[Tensor, Tensor]] = []
    for step in range(1, num_steps):
        row = chains.start + step
        inside = row < batch.num_rows
        token = batch.tokens[chains.document, (row + 1).clamp(max=batch.tokens.shape[1] - 1)]
        rotation = head.rotation(row)
        mixed = head.mix(embedding[token].to(g.dtype), g)
        own.append(head.keys_values(mixed, rotation))
        hidden = head.finish(g, _attend(head.queries(mixed, rotation), chains, true_rows, own))
        exists = inside & batch.loss[chains.document, row.clamp(max=batch.num_rows - 1)]
        yield StepRows(step, hidden, chains.document, chains.start, exists)
        g = hidden


def _chains(starts: Tensor, dtype: torch.dtype) -> _Chains:
    """starts: [B, L] bool, the rows at which chains start."""
    document, start = starts.nonzero(as_tuple=True)
    column = (starts.cumsum(1) - 1)[document, start]
    num_docs, num_rows = starts.shape
    width = int(column.max()) + 1
    slot = document * width + column
    last_read = torch.full((num_docs * width,), num_rows, device=starts.device)  # empty places read anything
    last_read[slot] = start
    hidden = torch.arange(num_rows, device=starts.device) > last_read.view(num_docs, width, 1)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=starts.device).masked_fill_(hidden, float("-inf"))
    return _Chains(document, start, slot, width, bias[:, None, None])


def _scatter(keys: Tensor, values: Tensor, slot: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Flat rows [M, Hkv, D] -> [B, Hkv, L, D]; missing rows are zero."""

    def grid(rows: Tensor) -> Tensor:
        empty = rows.new_zeros(shape.numel(), *rows.shape[1:])
        return empty.index_copy(0, slot, rows).view(*shape, *rows.shape[1:]).transpose(1, 2)

    return grid(keys), grid(values)


def _attend(
    queries: Tensor, chains: _Chains, true_rows: tuple[Tensor, Tensor], own: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """One softmax over the true rows a chain may read and its own rows. queries: [M, heads, D] -> [M, heads *
    D].

    Query heads that share a KV head are rows of one matrix, so every document is a few plain matrix products.
    """
    keys, values = true_rows
    num_docs, num_kv_heads, num_rows, head_dim = keys.shape
    group, width = queries.shape[1] // num_kv_heads, chains.width

    def grid(rows: Tensor) -> Tensor:
        empty = rows.new_zeros(num_docs * width, *rows.shape[1:])
        return empty.index_copy(0, chains.slot, rows).view(num_docs, width, num_kv_heads, -1, head_dim)

    q = grid(queries * head_dim**-0.5).permute(0, 2, 3, 1, 4)  # [B, Hkv, G, C, D]
    flat = q.reshape(num_docs, num_kv_heads, group * width, head_dim)
    scores = (flat @ keys.transpose(2, 3)).view(num_docs, num_kv_heads, group, width, num_rows) + chains.bias
    if own:
        own_keys = torch.stack([grid(k).squeeze(3) for k, _ in own], dim=3)  # [B, C, Hkv, K, D]
        own_values = torch.stack([grid(v).squeeze(3) for _, v in own], dim=3)
        own_scores = torch.einsum("bhgcd,bchkd->bhgck", q, own_keys)
        probs = torch.cat((scores, own_scores), dim=-1).softmax(-1)
        out = probs[..., :num_rows].reshape(num_docs, num_kv_heads, group * width, num_rows) @ values
        out = out.view(q.shape) + torch.einsum("bhgck,bchkd->bhgcd", probs[..., num_rows:], own_values)
    else:
        out = (scores.softmax(-1).view(num_docs, num_kv_heads, group * width, num_rows) @ values).view(
            q.shape
        )
    rows = out.permute(0, 3, 1, 2, 4).reshape(num_docs * width, -1)
    return rows.index_select(0, chains.slot)
