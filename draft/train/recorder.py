"""A draft that proposes nothing and remembers what it observed: the features of every committed token.

Training data is the engine's own output, so the features a head will be given in service can be kept while
the engine decodes, at the price of a copy. A sequence that ends is moved aside with its tokens until ``take``
collects it; one that is preempted or aborted is dropped, since the engine recomputes it or nobody wants it.

Row i of a recorded sequence is the feature of token i. The last token was never run through the model, so n
tokens come with n - 1 rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draft.none import Unplanned, root_tokens
from engine.core import Batch, DraftTree, Sequence, Speculation, Verdict
from engine.roles import DraftMask


@dataclass(frozen=True, slots=True)
class Recording:
    """One finished sequence: prompt and answer, and the features of all tokens but the last."""

    tokens: tuple[int, ...]
    prompt_len: int
    features: Tensor  # [len(tokens) - 1, F] bfloat16, on the host


class FeatureRecorder(Unplanned):
    """roles.Draft: the root alone, and a notebook. The engine must run without a prefix cache, for the
    features of tokens that are not computed cannot be recorded."""

    rows = None

    def __init__(self) -> None:
        self._rows: dict[int, list[Tensor]] = {}
        self._counts: dict[int, int] = {}
        self._finished: dict[int, Recording] = {}

    def vocab_coverage(self) -> float | None:
        return None

    def scratch_rows(self, speculation: Speculation) -> int:
        """No row past the root's is ever written."""
        return 0

    def propose(self, batch: Batch, mask: DraftMask | None = None) -> DraftTree:
        """The last committed token of every sequence."""
        roots = root_tokens(batch)
        return DraftTree(roots, torch.full_like(roots, -1))

    def observe(self, batch: Batch, tree: DraftTree, verdict: Verdict, features: Tensor) -> None:
        """Keep the accepted nodes' features. features: [B, N, F]; the rows extend positions kv_len, kv_len +
        1, ...
        """
        host = features.to("cpu", torch.bfloat16)
        if host.data_ptr() == features.data_ptr():
            host = host.clone()  # the engine may reuse its buffer
        paths, lengths = verdict.path.cpu(), verdict.length.tolist()
        for index, seq in enumerate(batch.seqs):
            length = lengths[index]
            key = seq.request.id
            rows = host[index, :1] if length == 1 else host[index, paths[index, :length]]
            known = self._counts.get(key, 0)
            assert known == seq.kv_len, (
                f"sequence {key}: {known} recorded rows, but {seq.kv_len} committed ones"
            )
            self._rows.setdefault(key, []).append(rows)
            self._counts[key] = known + length

    def forget(self, seq: Sequence) -> None:
        """The sequence ended (it becomes a recording) or starts over (its rows are dropped)."""
        key = seq.request.id
        rows = self._rows.pop(key, [])
        count = self._counts.pop(key, 0)
        if seq.finish_reason not in ("stop", "length") or not rows:
            return
        num_rows = len(seq.tokens) - 1
        assert count >= num_rows, f"sequence {key}: {count} recorded rows for {len(seq.tokens)} tokens"
        self._finished[key] = Recording(
            tuple(seq.tokens), len(seq.request.prompt), torch.cat(rows)[:num_rows]
        )

    def take(self, seq_id: int) -> Recording:
        """Hand out a finished sequence and forget it. KeyError if it never finished here."""
        return self._finished.pop(seq_id)
