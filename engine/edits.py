"""Edits: what requests change about the logits before temperature and filters.

An edit is exact per path. The row of a node is edited as plain decoding would have edited it with the node's
path as its text: what is committed, the node's drafted ancestors, the node itself. So whatever an edit keeps
for a sequence is a function of known tokens, and drafted ones are looked up in the tree, node by node;
nothing is ever undone when a draft is refused, and what is dropped in a preemption can be made anew.

Here is the order in which they apply, and those that touch a few columns of a row only: ``min_tokens``,
``bad_words`` and ``logit_bias``. Each of them says what is to be *added* to which columns, minus infinity to
what must not come. ``engine.penalties`` has the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from engine.core import Batch, DraftTree, Request, SamplingParams, Sequence
from engine.penalties import Penalties

NEVER = float("-inf")
_NO_TOKEN = -1  # before an answer's first token
_ANY_TOKEN = -2  # before a word's first token: matches everything


class Edit(Protocol):
    """One kind of change."""

    def applies(self, params: SamplingParams) -> bool:
        """Whether a request asks for it. Asked once per request."""
        ...

    def __call__(self, logits: Tensor, batch: Batch, tree: DraftTree, rows: list[int]) -> None:
        """Change, in place, the logits of the sequences ``rows`` of the batch, and no others.

        logits: [B, R, V] float32; tree: [B, R], node i of which is what row i stands behind. Node 0 is the
        last of ``batch.known_tokens(row)``, also where that is a prompt; the others were drafted.
        """
        ...

    def forget(self, seq: Sequence) -> None:
        """Drop what is kept for a sequence that ended or was preempted, if anything is."""
        ...


def sampling_edits(vocab_size: int, device: str, eos_token_ids: tuple[int, ...]) -> list[Edit]:
    """The edits that sampling parameters ask for, in vLLM's order. A tokenizer may know more tokens, also
    among ``eos_token_ids``, than the model has logits."""
    return [
        MinTokens(device, tuple(token for token in eos_token_ids if token < vocab_size)),
        BadWords(device),
        LogitBias(device),
        Penalties(vocab_size, device),
    ]


class EditList:
    """Edits in order, and who asked for which of them."""

    def __init__(self, edits: Items[Edit]) -> None:
        self._edits = tuple(edits)
        self._asked: dict[int, tuple[int, ...]] = {}  # by request id: numbers of edits

    def apply_to(self, batch: Batch) -> bool:
        """Whether a sequence of the batch asks for any."""
        return any(self._of(seq) for seq in batch.seqs)

    def edited(self, logits: Tensor, batch: Batch, tree: DraftTree) -> Tensor:
        """Logits [B, R, V] after all edits: a copy, or themselves if nobody asks for any.

        tree: what was scored. The row of a prompt's chunk is edited only if a token will be chosen from it.
        """
        asked = [self._of(seq) for seq in batch.seqs]
        if not any(asked):
            return logits
        if batch.prompt is not None:
            asked = [numbers if batch.chooses(row) else () for row, numbers in enumerate(asked)]
            tree = _last_nodes(tree, batch.prompt.num_nodes)
        edited = logits.clone()
        for number, edit in enumerate(self._edits):
            rows = [row for row, numbers in enumerate(asked) if number in numbers]
            if rows:
                edit(edited, batch, tree, rows)
        return edited

    def forget(self, seq: Sequence) -> None:
        """Drop everything kept for a sequence."""
        for number in self._asked.pop(seq.request.id, ()):
            self._edits[number].forget(seq)

    def _of(self, seq: Sequence) -> tuple[int, ...]:
        found = self._asked.get(seq.request.id)
        if found is None:
            params = seq.request.sampling
            found = tuple(number for number, edit in enumerate(self._edits) if edit.applies(params))
            self._asked[seq.request.id] = found
        return found


def _last_nodes(chain: DraftTree, num_nodes: Tensor) -> DraftTree:
    """The last nodes of chunks of prompts as trees of a root alone."""
    last = chain.tokens.gather(1, (num_nodes - 1)[:, None])
    return DraftTree(last, torch.full_like(last, -1))


Kept = TypeVar("Kept")


class _ColumnEdit(ABC, Generic[Kept]):
    """An edit that adds something to a few columns; what follows from the request is prepared once."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._kept: dict[int, Kept] = {}

    def __call__(self, logits: Tensor, batch: Batch, tree: DraftTree, rows: list[int]) -> None:
        for row in rows:
            request = batch.seqs[row].request
            if request.id not in self._kept:
                self._kept[request.id] = self._prepare(request)
            found = self._columns(self._kept[request.id], batch, tree, row)
            if found is not None:
                columns, amounts = found
                logits[row].scatter_add_(1, columns.expand_as(amounts), amounts)

    def forget(self, seq: Sequence) -> None:
        self._kept.pop(seq.request.id, None)

    @abstractmethod
    def _prepare(self, request: Request) -> Kept:
        """What every step needs of a request."""

    @abstractmethod
    def _columns(self, kept: Kept, batch: Batch, tree: DraftTree, row: int) -> tuple[Tensor, Tensor] | None:
        """Columns [K] int64, the same one more than once if need be, and what to add to them, [R, K] float32;
        None for nothing."""

    def _tensor(self, values: Items[int] | Items[Items[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


class MinTokens(_ColumnEdit[Tensor]):
    """No token that could end the answer before it has ``min_tokens`` of them."""

    def __init__(self, device: str, eos_token_ids: tuple[int, ...]) -> None:
        super().__init__(device)
        self._eos = eos_token_ids

    def applies(self, params: SamplingParams) -> bool:
        return params.min_tokens > 0

    def _prepare(self, request: Request) -> Tensor:
        return self._tensor(self._eos + request.sampling.stop_token_ids)

    def _columns(self, kept: Tensor, batch: Batch, tree: DraftTree, row: int) -> tuple[Tensor, Tensor] | None:
        request = batch.seqs[row].request
        missing = request.sampling.min_tokens - (batch.num_known(row) - len(request.prompt))
        if missing < 1:
            return None
        is_short = tree.depths()[row, :, None] < missing
        return kept, torch.where(is_short, NEVER, 0.0).expand(-1, len(kept))


@dataclass(frozen=True, slots=True)
class _Words:
    """Words of up to 1 + P tokens. Tokens before the last stand in reverse, padded by ``_ANY_TOKEN``."""

    last: Tensor  # [W]
    before: Tensor  # [W, P]


class BadWords(_ColumnEdit[_Words]):
    """Token sequences that never come: the last token of one may not follow the tokens before it, as far as
    these belong to the answer."""

    def applies(self, params: SamplingParams) -> bool:
        return bool(params.bad_words)

    def _prepare(self, request: Request) -> _Words:
        words = request.sampling.bad_words
        most = max(map(len, words)) - 1
        before = [[*word[-2::-1], *[_ANY_TOKEN] * (most + 1 - len(word))] for word in words]
        return _Words(self._tensor([word[-1] for word in words]), self._tensor(before).view(len(words), most))

    def _columns(self, kept: _Words, batch: Batch, tree: DraftTree, row: int) -> tuple[Tensor, Tensor]:
        path = self._path_ends(batch, tree, row, kept.before.shape[1])
        matches = (path[:, None] == kept.before) | (kept.before == _ANY_TOKEN)
        return kept.last, torch.where(matches.all(-1), NEVER, 0.0)

    def _path_ends(self, batch: Batch, tree: DraftTree, row: int, num: int) -> Tensor:
        """[R, num]: the last tokens of every node's path, from the node itself back to the answer's first.

        Known tokens are put before the tree as a chain, so that going up from a node means the same
        everywhere. Example: the answer so far is [7, 8] and the tree is 8 -> 9. Of num = 3 the chain is
        [_NO_TOKEN, 7, 8, 9] and the ends are [8, 7, _NO_TOKEN] and [9, 8, 7].
        """
        prompt_len = len(batch.seqs[row].request.prompt)
        known = batch.known_tokens(row, max(prompt_len, batch.num_known(row) - num))
        chain = self._tensor([_NO_TOKEN] * (num - len(known)) + known)
        tokens = torch.cat((chain, tree.tokens[row, 1:]))
        up = torch.cat((torch.arange(-1, num - 1, device=chain.device), tree.parents[row, 1:] + num - 1))
        node = torch.arange(num - 1, len(tokens), device=chain.device)
        ends = torch.empty(len(node), num, dtype=torch.int64, device=node.device)
        for distance in range(num):
            ends[:, distance] = tokens[node]
            node = up[node].clamp(min=0)
        return ends


class LogitBias(_ColumnEdit[tuple[Tensor, Tensor]]):
    """Something added to the logits of some tokens, wherever they stand."""

    def applies(self, params: SamplingParams) -> bool:
        return bool(params.logit_bias)

    def _prepare(self, request: Request) -> tuple[Tensor, Tensor]:
        ids, amounts = zip(*request.sampling.logit_bias, strict=True)
        return self._tensor(ids), torch.tensor(amounts, dtype=torch.float32, device=self._device)

    def _columns(
        self, kept: tuple[Tensor, Tensor], batch: Batch, tree: DraftTree, row: int
    ) -> tuple[Tensor, Tensor]:
        ids, amounts = kept
        return ids, amounts.expand(tree.tokens.shape[1], -1)
