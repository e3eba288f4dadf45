"""What a step does behind its draft: score the trees, choose, accept, compact.

Nothing in it waits for the device: the step is *launched*. Trees and verdicts are then on their way to the
host together, in the step's one copy, and whoever reads it waits; log-probabilities, where they are asked
for, are another.

A step of decodes alone is captured (``engine.graphs``), in one graph for its number of sequences and of
nodes. Two kinds of requests want something in between that only the host knows, and there a graph ends with
the scores: edits of the logits (penalties, grammars, biases, see ``engine.edits``), and log-probabilities.
Prompts are not captured: their shapes are too many, and a forward over a chunk outlasts its launches.

A step that is captured whole leaves on the device all that the next one begins from, so that this can be
launched before the first is read: see ``Launched.left`` and ``advance``.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.core import Batch, DraftScores, DraftTree, Scores, TokenLogprob, Verdict
from engine.graphs import NODE_BUCKETS, Graphs, Reader, bucket
from engine.logprobs import emitted_logprobs
from engine.roles import Target
from engine.sampler import Sampler
from verify.accept import accept, accept_all


@dataclass(frozen=True, slots=True)
class Decoded:
    """What became of one batch: on the host, but for ``features`` [B, N, F]."""

    tree: DraftTree
    verdict: Verdict
    features: Tensor
    logprobs: list[tuple[TokenLogprob, ...]]  # of each sequence, what it asks for

    def select(self, rows: list[int]) -> Decoded:
        """Of some sequences of the batch."""
        return Decoded(
            DraftTree(self.tree.tokens[rows], self.tree.parents[rows], _scores_of(self.tree.scores, rows)),
            Verdict(self.verdict.path[rows], self.verdict.length[rows], self.verdict.bonus[rows]),
            self.features[torch.tensor(rows, dtype=torch.int64).to(self.features.device)],
            [self.logprobs[row] for row in rows],
        )


@dataclass(frozen=True, slots=True)
class _Found:
    """The same on the device. scores and choice are there where somebody may ask for log-probabilities."""

    tree: DraftTree
    verdict: Verdict
    features: Tensor
    scores: Scores | None = None
    choice: Tensor | None = None
    columns: Tensor | None = None  # of the tree, if it has them already; once launched, of the verdict too


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that the device is at work on, or has done if it is a CPU."""

    batches: tuple[Batch, ...]
    found: tuple[_Found, ...]
    land: Callable[[], Tensor] | None  # waits for the columns of all batches; None on a CPU

    @property
    def is_whole(self) -> bool:
        """Whether it was captured from its trees to its verdict: so no host has a part in it, nor in what the
        next step begins from."""
        return self.batches[0].is_fixed and self.found[0].choice is None

    @property
    def is_over(self) -> bool:
        """Whether nobody is left whom it concerns."""
        return all(seq.finish_reason is not None for batch in self.batches for seq in batch.seqs)

    def left(self) -> tuple[DraftTree, Verdict, Tensor]:
        """What a whole step leaves on the device: trees, verdicts, features. In memory of its own, which no
        other step writes to."""
        (found,) = self.found
        assert self.is_whole
        assert found.columns is not None
        num_nodes = found.tree.tokens.shape[1]
        tree = DraftTree(found.columns[:, :num_nodes], found.columns[:, num_nodes : 2 * num_nodes])
        return tree, _verdict_of(found.columns, num_nodes), found.features

    def read(self) -> list[tuple[Batch, Decoded]]:
        """Wait for what became of every batch: of those that ended in the meantime, nothing."""
        return [
            _of_living(batch, Decoded(tree, verdict, one.features, _logprobs(batch, one, verdict)))
            for batch, one, (tree, verdict) in zip(self.batches, self.found, self._on_host(), strict=True)
        ]

    def _on_host(self) -> list[tuple[DraftTree, Verdict]]:
        """Trees and verdicts of the batches' sequences, where the host may look at them."""
        if self.land is None:
            return [(one.tree, one.verdict) for one in self.found]
        columns = [one.columns for one in self.found if one.columns is not None]
        parts = torch.split(self.land(), [own.numel() for own in columns])
        return [
            _unpacked(part.view(own.shape)[: len(batch.seqs)], one.tree.tokens.shape[1])
            for batch, one, own, part in zip(self.batches, self.found, columns, parts, strict=True)
        ]


class Decoding:
    """Runs on trees of the target's device; ``graphs`` capture what they can."""

    def __init__(self, target: Target, sampler: Sampler, graphs: Graphs, device: str) -> None:
        self._target, self.sampler, self._graphs = target, sampler, graphs
        self._read = Reader(device)

    def __call__(self, batches: Items[Batch], trees: Items[DraftTree]) -> Launched:
        """Score the trees of all batches in one forward, and accept a path of each."""
        num_nodes = bucket(trees[0].tokens.shape[1], NODE_BUCKETS)
        if len(batches) == 1 and batches[0].is_fixed and num_nodes is not None:
            found = [self._captured(batches[0], trees[0].resized(num_nodes))]
        else:
            scores = self._target.score(batches, trees)
            found = [self._settled(*of_batch) for of_batch in zip(batches, trees, scores, strict=True)]
        if found[0].tree.tokens.device.type == "cpu":
            return Launched(tuple(batches), tuple(found), None)
        packed = [replace(one, columns=_packed(one)) for one in found]
        columns = [one.columns.flatten() for one in packed if one.columns is not None]
        return Launched(tuple(batches), tuple(packed), self._read(torch.cat(columns)))

    def _settled(self, batch: Batch, tree: DraftTree, scores: Scores) -> _Found:
        """The verdict on scored trees; accepted rows go first, rows past them are scratch."""
        choice = self.sampler(scores, batch, tree)  # the target's own token after every scored node
        if batch.prompt is not None:
            verdict = accept_all(batch.prompt, choice)
        else:
            verdict = accept(tree, choice)
            self._target.compact(batch, verdict)
        return _Found(tree, verdict, scores.features, scores, choice)

    def _captured(self, batch: Batch, tree: DraftTree) -> _Found:
        # What is captured knows no sequence: there is nothing in one that may be asked.
        bare = replace(batch, seqs=(), speculation=(), decisions=())
        columns = tree_columns(tree)  # a copy, for what the draft's graph has left is gone with the next one
        tree = tree_of(columns, tree.tokens.shape[1])
        shape = tuple(tree.tokens.shape)
        if _asks_for_logprobs(batch) or self.sampler.edits(batch):

            def score(tokens: Tensor, parents: Tensor) -> Scores:
                return self._target.score([bare], [_evenly(DraftTree(tokens, parents))])[0]

            scores = self._graphs(("score", *shape), score, tree.tokens, tree.parents)
            found = self._settled(batch, tree, scores)
        else:

            def decode(tokens: Tensor, parents: Tensor) -> tuple[Verdict, Tensor]:
                tree = DraftTree(tokens, parents)
                (scores,) = self._target.score([bare], [_evenly(tree)])
                verdict = accept(tree, self.sampler.choose(scores, bare))
                self._target.compact(bare, verdict)
                return verdict, scores.features

            key = ("decode", *shape, batch.sampling.facts)
            verdict, features = self._graphs(key, decode, tree.tokens, tree.parents)
            found = _Found(tree, verdict, features)
        return replace(found, columns=columns, features=found.features.clone())  # a head keeps features


def advance(batch: Batch, verdict: Verdict) -> None:
    """Bring a batch's roots and lengths from where the step under way began to where it leaves them. verdict:
    of that step, on the device.

    Padding stays: its pages are the dummy page, and no real sequence has that. Where there was no choice the
    sequence ends, but its row goes along, and must be of a token that there is.
    """
    assert batch.roots is not None
    batch.roots.copy_(verdict.bonus.clamp(min=0))
    batch.kv_lens.add_(verdict.length * (batch.page_table[:, 0] > 0))


def _of_living(batch: Batch, found: Decoded) -> tuple[Batch, Decoded]:
    """A batch without the sequences that ended while its step was under way."""
    living = [row for row, seq in enumerate(batch.seqs) if seq.finish_reason is None]
    if len(living) == len(batch.seqs):
        return batch, found
    return batch.select(living), found.select(living)


def _evenly(tree: DraftTree) -> DraftTree:
    """The same trees; padding repeats the root's token, and so asks for the experts that the root asks for
    anyway: others would have to be read."""
    return replace(tree, tokens=torch.where(tree.real(), tree.tokens, tree.tokens[:, :1]))


def _asks_for_logprobs(batch: Batch) -> bool:
    return any(seq.request.sampling.logprobs is not None for seq in batch.seqs)


def _logprobs(batch: Batch, found: _Found, verdict: Verdict) -> list[tuple[TokenLogprob, ...]]:
    if found.scores is None or found.choice is None:
        return [()] * len(batch.seqs)
    return emitted_logprobs(found.scores, found.choice, verdict, batch)


# --- trees and verdicts as columns of whole numbers, to be copied as one


def tree_columns(tree: DraftTree) -> Tensor:
    """[B, 2 N] int64: tokens and parents; of trees with scores [B, 5 N], rank, raw score and value behind."""
    columns = [tree.tokens, tree.parents]
    if tree.scores is not None:
        numbers = torch.cat((tree.scores.raw, tree.scores.value), dim=1)
        columns += [tree.scores.rank, numbers.view(torch.int32).long()]
    return torch.cat(columns, dim=1)


def tree_of(columns: Tensor, num_nodes: int) -> DraftTree:
    """The trees that ``tree_columns`` was given."""
    tokens, parents, *of_scores = torch.split(columns, num_nodes, dim=1)
    if not of_scores:
        return DraftTree(tokens, parents)
    rank, raw, value = of_scores
    return DraftTree(
        tokens, parents, DraftScores(raw.int().view(torch.float32), value.int().view(torch.float32), rank)
    )


def _scores_of(scores: DraftScores | None, rows: list[int]) -> DraftScores | None:
    if scores is None:
        return None
    return DraftScores(scores.raw[rows], scores.value[rows], scores.rank[rows])


def _packed(found: _Found) -> Tensor:
    """Columns of a tree, then those of the verdict on it: path, length, bonus."""
    of_tree = tree_columns(found.tree) if found.columns is None else found.columns
    verdict = found.verdict
    return torch.cat((of_tree, verdict.path, verdict.length[:, None], verdict.bonus[:, None]), dim=1)


def _verdict_of(columns: Tensor, num_nodes: int) -> Verdict:
    return Verdict(columns[:, -num_nodes - 2 : -2], columns[:, -2], columns[:, -1])


def _unpacked(columns: Tensor, num_nodes: int) -> tuple[DraftTree, Verdict]:
    """What ``_packed`` was given."""
    return tree_of(columns[:, : -num_nodes - 2], num_nodes), _verdict_of(columns, num_nodes)
