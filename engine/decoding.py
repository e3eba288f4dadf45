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
import torch.nn.functional as F
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


class Decoding:
    """Runs on trees of the target's device; ``graphs`` capture what they can."""

    def __init__(self, target: Target, sampler: Sampler, graphs: Graphs, device: str) -> None:
        self._target, self._sampler, self._graphs = target, sampler, graphs
        self._read = Reader(device)

    def __call__(self, batches: Items[Batch], trees: Items[DraftTree]) -> list[Decoded]:
        """Score the trees of all batches in one forward, and accept a path of each."""
        num_nodes = bucket(trees[0].tokens.shape[1], NODE_BUCKETS)
        if len(batches) == 1 and batches[0].is_fixed and num_nodes is not None:
            found = [self._captured(batches[0], padded(trees[0], num_nodes))]
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
        choice = self._sampler(scores, batch, tree)  # the target's own token after every scored node
        if batch.prompt is not None:
            verdict = accept_all(batch.prompt, choice)
        else:
            verdict = accept(tree, choice)
            self._target.compact(batch, verdict)
        return _Found(tree, verdict, scores.features, scores, choice)

    def _captured(self, batch: Batch, tree: DraftTree) -> _Found:
        # What is captured knows no sequence: there is nothing in one that may be asked.
        bare = replace(batch, seqs=(), speculation=(), decisions=())
        shape = tuple(tree.tokens.shape)
        if _asks_for_logprobs(batch) or self._sampler.edits(batch):

            def score(tokens: Tensor, parents: Tensor) -> Scores:
                return self._target.score([bare], [DraftTree(tokens, parents)])[0]

            scores = self._graphs(("score", *shape), score, tree.tokens, tree.parents)
            found = self._settled(batch, tree, scores)
        else:

            def decode(tokens: Tensor, parents: Tensor) -> tuple[Verdict, Tensor]:
                tree = DraftTree(tokens, parents)
                (scores,) = self._target.score([bare], [tree])
                verdict = accept(tree, self._sampler.choose(scores, bare))
                self._target.compact(bare, verdict)
                return verdict, scores.features

            sampling = batch.sampling
            key = ("decode", *shape, sampling.all_greedy, sampling.any_filter)
            verdict, features = self._graphs(key, decode, tree.tokens, tree.parents)
            found = _Found(tree, verdict, features)
        return replace(found, features=found.features.clone())  # a head may keep them for many steps

    def _on_host(self, batches: Items[Batch], found: Items[_Found]) -> list[tuple[DraftTree, Verdict]]:
        """Trees and verdicts of the batches' sequences, where the host may look at them."""
        if found[0].tree.tokens.device.type == "cpu":
            return [(one.tree, one.verdict) for one in found]
        packed = [pack(one.tree, one.verdict) for one in found]
        landed = self._read(torch.cat([part.flatten() for part in packed]))
        parts = torch.split(landed, [part.numel() for part in packed])
        return [
            unpack(part.view(own.shape)[: len(batch.seqs)], has_scores=one.tree.scores is not None)
            for batch, one, own, part in zip(batches, found, packed, parts, strict=True)
        ]


def _asks_for_logprobs(batch: Batch) -> bool:
    return any(seq.request.sampling.logprobs is not None for seq in batch.seqs)


def _logprobs(batch: Batch, found: _Found, verdict: Verdict) -> list[tuple[TokenLogprob, ...]]:
    if found.scores is None or found.choice is None:
        return [()] * len(batch.seqs)
    return emitted_logprobs(found.scores, found.choice, verdict, batch)


def padded(tree: DraftTree, num_nodes: int) -> DraftTree:
    """The trees with so many nodes each, padding last."""
    missing = num_nodes - tree.tokens.shape[1]
    if missing == 0:
        return tree
    scores = None
    if tree.scores is not None:
        scores = DraftScores(
            F.pad(tree.scores.raw, (0, missing)),
            F.pad(tree.scores.value, (0, missing)),
            F.pad(tree.scores.rank, (0, missing)),
        )
    return DraftTree(F.pad(tree.tokens, (0, missing)), F.pad(tree.parents, (0, missing), value=-1), scores)


def pack(tree: DraftTree, verdict: Verdict) -> Tensor:
    """Trees and the verdicts on them as one [B, 3 N + 2] int64, of trees with scores [B, 6 N + 2]: tokens,
    parents and path, rank, raw score and value, length and bonus."""
    columns = [tree.tokens, tree.parents, verdict.path]
    if tree.scores is not None:
        numbers = torch.cat((tree.scores.raw, tree.scores.value), dim=1)
        columns += [tree.scores.rank, numbers.view(torch.int32).long()]
    return torch.cat([*columns, verdict.length[:, None], verdict.bonus[:, None]], dim=1)


def unpack(packed: Tensor, *, has_scores: bool) -> tuple[DraftTree, Verdict]:
    """What ``pack`` made one of."""
    num_nodes = (packed.shape[1] - 2) // (6 if has_scores else 3)
    columns = torch.split(packed[:, :-2], num_nodes, dim=1)
    length, bonus = packed[:, -2:].unbind(1)
    scores = None
    if has_scores:
        raw, value = (column.int().view(torch.float32) for column in columns[4:])
        scores = DraftScores(raw, value, columns[3])
    return DraftTree(columns[0], columns[1], scores), Verdict(columns[2], length, bonus)
