"""Grow a tree level by level and keep its best nodes.

The head offers k children for every frontier node. A child's path value is the product of calibrated
acceptances from the root down to it, which is the chance that the step gets that far. The ``beam`` best
children of a level are expanded next, and at the end the N - 1 best of all candidates are kept. A value never
exceeds its parent's, and ties go to the older candidate, so whatever is kept has its ancestors kept too.
(EAGLE-2, arXiv 2406.16858, grows the same way with raw probabilities.)

``graft`` adds a chain that came from elsewhere, sharing the nodes that both have.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.core import DraftScores, DraftTree, Speculation
from kernels import best

NEVER = float("-inf")  # the value of a candidate that must not be taken


@dataclass(frozen=True, slots=True)
class Offers:
    """Children that a head offers for F frontier nodes, best first."""

    tokens: Tensor  # [B, F, k] int64 target token ids, distinct along k
    raw: Tensor  # [B, F, k] float32 the head's conditional scores in [0, 1]; 0 means "not possible"

    @classmethod
    def best(cls, logits: Tensor, token_ids: Tensor, count: int) -> Offers:
        """The ``count`` largest of logits [B, F, Vd], and their shares of all mass; token_ids: [Vd]."""
        values, columns, mass = best(logits, count)
        return cls(token_ids[columns], torch.exp(values - mass[..., None]).nan_to_num(0.0))


@dataclass(frozen=True, slots=True)
class Limits:
    """Tree sizes of the sequences of a batch."""

    nodes: Tensor  # [B, 1] int64
    depth: Tensor  # [B, 1]
    top_k: Tensor  # [B, 1]
    max_nodes: int
    max_depth: int
    max_top_k: int

    @classmethod
    def of(cls, speculation: list[Speculation], device: str) -> Limits:
        def column(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64).to(device)[:, None]

        nodes, depth = [s.nodes for s in speculation], [s.depth for s in speculation]
        top_k = [s.top_k for s in speculation]
        return cls(column(nodes), column(depth), column(top_k), max(nodes), max(depth), max(top_k))


Expand = Callable[[Tensor, Tensor, int], Offers]
Value = Callable[[Tensor, int], Tensor]
# (depth, path values of all candidates so far, and of the nodes of that depth that would be expanded; both by
# sequence) -> whether the level behind them is worth its time.
IsWorth = Callable[[int, Items[Items[float]], Items[Items[float]]], bool]


def grow(
    root: Tensor, first: Offers, limits: Limits, expand: Expand, value: Value, is_worth: IsWorth | None = None
) -> DraftTree:
    """Build the trees of a batch.

    root: [B] tokens; first: offers after the root ([B, 1, k]); expand(tokens [B, F], parents [B, F], depth)
    runs the head on chosen nodes of that depth, where parents are frontier numbers of the level before, and
    returns their offers; value(raw [B, F, k], depth) is the calibrated conditional acceptance of children at
    that depth; is_worth: asked before nodes are expanded (on a host only).
    """
    num_seqs, device = root.shape[0], root.device
    beam = limits.max_top_k
    tokens, parents, raws, values, ranks = [], [], [], [], []
    offers, parent_value = first, torch.ones(num_seqs, 1, device=device)
    parent_candidate = torch.full((num_seqs, 1), -1, dtype=torch.int64, device=device)
    num_candidates = 0
    for depth in range(1, limits.max_depth + 1):
        k = offers.tokens.shape[-1]
        rank = torch.arange(k, device=device).expand_as(offers.tokens)
        level = parent_value[..., None] * value(offers.raw, depth).clamp(max=1.0)
        allowed = (offers.raw > 0) & (rank < limits.top_k[..., None]) & (limits.depth >= depth)[..., None]
        level = torch.where(allowed, level, NEVER).flatten(1)
        tokens.append(offers.tokens.flatten(1))
        parents.append(parent_candidate[..., None].expand_as(offers.tokens).flatten(1))
        raws.append(offers.raw.flatten(1))
        values.append(level)
        ranks.append(rank.flatten(1))
        if depth == limits.max_depth:
            break
        best = level.topk(min(beam, level.shape[1]), dim=1)
        if _is_settled(values, best.values, limits):
            break
        if not _asks(is_worth, depth, values, best.values, limits):
            break
        chosen = best.indices
        offers = expand(tokens[-1].gather(1, chosen), chosen // k, depth)
        # A sequence expands as many nodes a level as it has children, whoever else is in the batch.
        in_beam = torch.arange(chosen.shape[1], device=device) < limits.top_k
        parent_value = torch.where(in_beam, best.values, NEVER)
        parent_candidate = chosen + num_candidates
        num_candidates += level.shape[1]
    return _keep_best(
        root,
        limits,
        torch.cat(tokens, 1),
        torch.cat(parents, 1),
        torch.cat(raws, 1),
        torch.cat(values, 1),
        torch.cat(ranks, 1),
    )


def _asks(
    is_worth: IsWorth | None, depth: int, values: list[Tensor], frontier: Tensor, limits: Limits
) -> bool:
    """What ``is_worth`` says of expanding a frontier, values [B, F]; on a device, that it is."""
    if is_worth is None or frontier.device.type != "cpu":
        return True
    in_beam = torch.arange(frontier.shape[1]) < limits.top_k
    return is_worth(depth, _taken(torch.cat(values, 1)), _taken(torch.where(in_beam, frontier, NEVER)))


def _taken(values: Tensor) -> list[list[float]]:
    """Rows of values without those that must not be taken."""
    return [[value for value in row if value > NEVER] for row in values.tolist()]


def _is_settled(values: list[Tensor], frontier: Tensor, limits: Limits) -> bool:
    """Whether no child of the frontier (values [B, F], best first) can still get among the kept nodes. Host
    only: a device is never waited for."""
    if frontier.device.type != "cpu":
        return False
    pool = torch.cat(values, 1)
    if pool.shape[1] < limits.max_nodes - 1:
        return False
    worst_kept = pool.topk(limits.max_nodes - 1, dim=1).values.gather(1, limits.nodes - 2)[:, 0]
    return bool((frontier[:, 0] <= worst_kept).all())


def _keep_best(
    root: Tensor, limits: Limits, tokens: Tensor, parents: Tensor, raws: Tensor, values: Tensor, ranks: Tensor
) -> DraftTree:
    """The N - 1 best candidates ([B, M] each) in order of creation, as a tree with the root in front."""
    num_seqs, num_candidates = tokens.shape
    device = tokens.device
    num_kept = min(limits.max_nodes - 1, num_candidates)
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :num_kept]
    place = torch.arange(num_kept, device=device)
    keep = (place < limits.nodes - 1) & (values.gather(1, order) > NEVER)
    kept = torch.where(keep, order, num_candidates).sort(dim=1).values  # creation order, padding last
    real = kept < num_candidates
    node_of = torch.zeros(num_seqs, num_candidates + 1, dtype=torch.int64, device=device)
    node_of.scatter_(1, kept, (place + 1).expand_as(kept))
    kept = kept.clamp(max=num_candidates - 1)
    parent = parents.gather(1, kept)
    parent_node = torch.where(parent < 0, 0, node_of.gather(1, parent.clamp(min=0)))

    def with_root(first: Tensor, rest: Tensor, padding: int) -> Tensor:
        return torch.cat((first, torch.where(real, rest, padding)), dim=1)

    one, zero = (
        torch.ones(num_seqs, 1, device=device),
        torch.zeros(num_seqs, 1, dtype=torch.int64, device=device),
    )
    return DraftTree(
        with_root(root[:, None], tokens.gather(1, kept), 0),
        with_root(zero - 1, parent_node, -1),
        DraftScores(
            with_root(one, raws.gather(1, kept), 0),
            with_root(one, values.gather(1, kept), 0),
            with_root(zero, ranks.gather(1, kept), 0),
        ),
    )


def graft(tree: DraftTree, chains: Tensor, chances: Tensor | None = None) -> DraftTree:
    """Trees with a chain from each root added; where tree and chain agree, they share nodes.

    tree: [B, N]; chains: [B, L] int64 tokens after the root, padded with -1 at the end; chances: [B, L]
    float32 that the chain is right so far, 0 if not given. Returns at most N + L nodes, padding last; grafted
    ones have a raw score of 0, which no offer has, and their chance for a value; shared ones have the greater
    value, so that values still never grow along a path. Example: root with children a and b, chain a c: c
    becomes a child of a.
    """
    if tree.tokens.device.type == "cpu":
        return _graft_on_host(tree, chains, chances)
    return graft_on_device(tree, chains, chances)


def graft_on_device(tree: DraftTree, chains: Tensor, chances: Tensor | None = None) -> DraftTree:
    """As ``graft``, without asking the device for anything: N + L nodes."""
    num_seqs, num_nodes = tree.tokens.shape
    length = chains.shape[1]
    tokens = torch.cat((tree.tokens, chains.clamp(min=0)), dim=1)
    parents = torch.cat((tree.parents, torch.full_like(chains, -1)), dim=1)
    value = None
    if tree.scores is not None:
        given = tree.scores.value.new_zeros(num_seqs, length) if chances is None else chances
        value = torch.cat((tree.scores.value, given), dim=1)
    node = torch.zeros(num_seqs, 1, dtype=torch.int64, device=tokens.device)  # where the chain has got to
    for place in range(length):
        wanted = chains[:, place : place + 1]
        shared = (parents == node) & (tokens == wanted)
        exists, real = shared.any(dim=1, keepdim=True), wanted >= 0
        own = num_nodes + place
        parents[:, own : own + 1] = torch.where(real & ~exists, node, -1)
        node = torch.where(real, torch.where(exists, shared.long().argmax(1, keepdim=True), own), node)
        if value is not None:  # of an own node that is not needed after all: padding, and never looked at
            value.scatter_(1, node, torch.maximum(value.gather(1, node), value[:, own : own + 1]))
    scores = None
    if tree.scores is not None and value is not None:

        def widened(part: Tensor) -> Tensor:
            return torch.cat((part, part.new_zeros(num_seqs, length)), dim=1)

        scores = DraftScores(widened(tree.scores.raw), value, widened(tree.scores.rank))
    return _padding_last(DraftTree(tokens, parents, scores))


def _graft_on_host(tree: DraftTree, chains: Tensor, chances: Tensor | None) -> DraftTree:
    """As ``graft`` on a CPU, where walks through short lists are faster than dozens of tensor calls."""
    trees = _nodes(tree)
    given = torch.zeros(chains.shape) if chances is None else chances
    for own, chain, own_chances in zip(trees, chains.tolist(), given.tolist(), strict=True):
        at = 0
        for token, chance in zip(chain, own_chances, strict=True):
            if token < 0:
                break
            children = (place for place, node in enumerate(own) if node.parent == at and node.token == token)
            shared = next(children, None)
            if shared is None:
                own.append(_Node(token, at, 0.0, chance, 0))
                at = len(own) - 1
            else:
                own[shared] = own[shared]._replace(value=max(own[shared].value, chance))
                at = shared
    return _tree_of(trees, has_scores=tree.scores is not None)


def prune(tree: DraftTree, counts: Items[int]) -> DraftTree:
    """The same trees with the best nodes alone: counts: of each, the root not counted.

    On a host: a device is not asked what its nodes are worth. Values never grow along a path and ties go to
    the older node, so what is kept has its ancestors kept.
    """
    assert tree.scores is not None
    kept = []
    for own, count in zip(_nodes(tree), counts, strict=True):
        best = sorted(
            range(len(own)), key=lambda place: -own[place].value
        )  # the root first, which is worth 1
        places = sorted(best[: count + 1])
        node_of = {place: node for node, place in enumerate(places)}
        kept.append([own[place]._replace(parent=node_of.get(own[place].parent, -1)) for place in places])
    return _tree_of(kept, has_scores=True)


class _Node(NamedTuple):
    """A node of a tree on a host; without scores, the last three say nothing."""

    token: int
    parent: int
    raw: float
    value: float
    rank: int


def _nodes(tree: DraftTree) -> list[list[_Node]]:
    """The nodes of every tree, padding left out."""
    columns = [tree.tokens.tolist(), tree.parents.tolist()]
    if tree.scores is not None:
        columns += [part.tolist() for part in (tree.scores.raw, tree.scores.value, tree.scores.rank)]
    else:
        columns += [torch.zeros(tree.tokens.shape).tolist()] * 3
    return [
        [_Node(*node) for place, node in enumerate(zip(*own, strict=True)) if node[1] >= 0 or place == 0]
        for own in zip(*columns, strict=True)
    ]


def _tree_of(trees: list[list[_Node]], *, has_scores: bool) -> DraftTree:
    """Trees of lists of nodes, padded to the largest."""
    most = max(map(len, trees))
    padding = _Node(0, -1, 0.0, 0.0, 0)
    of_all = [zip(*own, *[padding] * (most - len(own)), strict=True) for own in trees]
    tokens, parents, raw, value, rank = (torch.tensor(column) for column in zip(*of_all, strict=True))
    return DraftTree(tokens, parents, DraftScores(raw, value, rank) if has_scores else None)


def _padding_last(tree: DraftTree) -> DraftTree:
    """The same trees with every sequence's nodes in front: node i takes row ``kv_len + i``, and a sequence
    has reserved rows for its own nodes alone, however large others of the batch are."""
    order = tree.real().long().argsort(dim=1, descending=True, stable=True)
    place = torch.zeros_like(tree.parents)
    place.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    parents = tree.parents.gather(1, order)
    parents = torch.where(parents >= 0, place.gather(1, parents.clamp(min=0)), -1)
    scores = None
    if tree.scores is not None:
        scores = DraftScores(
            tree.scores.raw.gather(1, order),
            tree.scores.value.gather(1, order),
            tree.scores.rank.gather(1, order),
        )
    return DraftTree(tree.tokens.gather(1, order), parents, scores)
