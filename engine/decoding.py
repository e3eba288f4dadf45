"""What a step does behind its draft: score the trees, choose, accept, compact.

Nothing in it waits for the device. At its end trees and verdicts come to the host together, in the step's one
copy; whoever asks for log-probabilities gets another.

A step of decodes alone is captured (``engine.graphs``), in one graph for its number of sequences and of
nodes. Two kinds of requests want something in between that only the host knows, and there a graph ends with
the scores: edits of the logits (penalties, grammars, biases, see ``engine.edits``), and log-probabilities.
Prompts are not captured: their shapes are too many, and a forward over a chunk outlasts its launches.
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class _Found:
    """The same on the device. scores and choice are there where somebody may ask for log-probabilities."""

    tree: DraftTree
    verdict: Verdict
    features: Tensor
    scores: Scores | None = None
    choice: Tensor | None = None
    columns: Tensor | None = None  # of the tree, if it has them already


class Decoding:
    """Runs on trees of the target's device; ``graphs`` capture what they can."""

    def __init__(self, target: Target, sampler: Sampler, graphs: Graphs, device: str) -> None:
        self._target, self.sampler, self._graphs = target, sampler, graphs
        self._read = Reader(device)

    def __call__(self, batches: Items[Batch], trees: Items[DraftTree]) -> list[Decoded]:
        """Score the trees of all batches in one forward, and accept a path of each."""
        num_nodes = bucket(trees[0].tokens.shape[1], NODE_BUCKETS)
        if len(batches) == 1 and batches[0].is_fixed and num_nodes is not None:
            found = [self._captured(batches[0], trees[0].resized(num_nodes))]
        else:
            scores = self._target.score(batches, trees)
            found = [self._settled(*of_batch) for of_batch in zip(batches, trees, scores, strict=True)]
        hosted = self._on_host(batches, found)
        return [
            Decoded(tree, verdict, one.features, _logprobs(batch, one, verdict))
            for batch, one, (tree, verdict) in zip(batches, found, hosted, strict=True)
        ]

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

    def _on_host(self, batches: Items[Batch], found: Items[_Found]) -> list[tuple[DraftTree, Verdict]]:
        """Trees and verdicts of the batches' sequences, where the host may look at them."""
        if found[0].tree.tokens.device.type == "cpu":
            return [(one.tree, one.verdict) for one in found]
        packed = []
        for one in found:
            columns = tree_columns(one.tree) if one.columns is None else one.columns
            packed.append(torch.cat((columns, *_verdict_columns(one.verdict)), dim=1))
        landed = self._read(torch.cat([part.flatten() for part in packed]))
        parts = torch.split(landed, [part.numel() for part in packed])
        return [
            _unpacked(part.view(own.shape)[: len(batch.seqs)], one.tree.tokens.shape[1])
            for batch, one, own, part in zip(batches, found, packed, parts, strict=True)
        ]


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


def _verdict_columns(verdict: Verdict) -> tuple[Tensor, Tensor, Tensor]:
    return verdict.path, verdict.length[:, None], verdict.bonus[:, None]


def _unpacked(columns: Tensor, num_nodes: int) -> tuple[DraftTree, Verdict]:
    """columns: of a tree, then those of the verdict on it."""
    of_tree, path = columns[:, : -num_nodes - 2], columns[:, -num_nodes - 2 : -2]
    return tree_of(of_tree, num_nodes), Verdict(path, columns[:, -2], columns[:, -1])
