"""Growing the tree of a single sequence on a CPU: of one user at a machine without a GPU, or of the one among
several for whom it pays.

``draft.tree`` and ``draft.growth`` keep the books of many trees in tensors, which is what a device needs. For
one small tree on a CPU, a hundred tensor calls of a few microseconds each then cost more than the head's own
arithmetic. Here the books are lists and numbers, and rows are written and read in place. The trees are the
same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from draft.tree import IsWorth
from engine.core import DraftScores, DraftTree, Speculation
from engine.rows import Part, RowPlan, tree_bias

# Children of one node, best first: (token, raw score). A score of 0 means "not possible".
Children = list[tuple[int, float]]
# (tokens, parents, depth) of chosen nodes -> the children of each; parents count the level before.
Expand = Callable[[list[int], list[int], int], list[Children]]
# (raw score, depth, rank) -> calibrated conditional acceptance
Value = Callable[[float, int, int], float]


class _Candidate(NamedTuple):
    value: float
    token: int
    parent: int  # number of the candidate it is a child of, -1 for the root
    raw: float
    rank: int


def grow_one(
    root: int,
    first: Children,
    size: Speculation,
    expand: Expand,
    value: Value,
    is_worth: IsWorth | None = None,
) -> DraftTree:
    """As ``draft.tree.grow`` for one sequence."""
    candidates: list[_Candidate] = []
    frontier, offers = [(-1, 1.0)], [first]  # candidates (number, value) and their children
    for depth in range(1, size.depth + 1):
        start = len(candidates)
        places = []  # in the frontier, of each candidate's parent
        for place, ((parent, parent_value), children) in enumerate(zip(frontier, offers, strict=True)):
            for rank, (token, raw) in enumerate(children[: size.top_k]):
                if raw > 0:
                    worth = parent_value * min(value(raw, depth, rank), 1.0)
                    candidates.append(_Candidate(worth, token, parent, raw, rank))
                    places.append(place)
        level = range(start, len(candidates))
        best = sorted(level, key=lambda number: -candidates[number].value)[: size.top_k]
        if depth == size.depth or not best or _is_settled(candidates, best, size):
            break
        if is_worth is not None:
            values = [candidate.value for candidate in candidates]
            if not is_worth(depth, [values], [[values[number] for number in best]]):
                break
        chosen = [candidates[number] for number in best]
        offers = expand([c.token for c in chosen], [places[number - start] for number in best], depth)
        frontier = [(number, candidates[number].value) for number in best]
    return _keep_best(root, candidates, size)


def _is_settled(candidates: list[_Candidate], best: list[int], size: Speculation) -> bool:
    """Whether no child of the frontier can still get among the kept nodes."""
    if len(candidates) < size.nodes - 1:
        return False
    values = sorted((candidate.value for candidate in candidates), reverse=True)
    return candidates[best[0]].value <= values[size.nodes - 2]


def _keep_best(root: int, candidates: list[_Candidate], size: Speculation) -> DraftTree:
    """The best candidates in order of creation, as a tree with the root in front."""
    order = sorted(range(len(candidates)), key=lambda number: -candidates[number].value)
    kept = sorted(order[: size.nodes - 1])
    node_of = {-1: 0} | {number: node for node, number in enumerate(kept, start=1)}
    nodes = [candidates[number] for number in kept]
    return DraftTree(
        torch.tensor([[root, *(node.token for node in nodes)]]),
        torch.tensor([[-1, *(node_of[node.parent] for node in nodes)]]),
        DraftScores(
            torch.tensor([[1.0, *(node.raw for node in nodes)]]),
            torch.tensor([[1.0, *(node.value for node in nodes)]]),
            torch.tensor([[0, *(node.rank for node in nodes)]]),
        ),
    )


@dataclass(slots=True)
class SoloRows:
    """Where the head's rows of one sequence lie: consecutive slots, row r at ``start + r``.

    Rows 1 to kv_len are committed; those behind are scratch, in order of expansion.
    """

    start: int
    kv_len: int
    _parents: list[int] = field(default_factory=list)  # of every expanded node, -1 where that is the root
    _level_start: int = 0  # number of the first node of the last level

    def expand(self, parents: list[int]) -> RowPlan:
        """The plan for a level of scratch rows; parents count the level before, all 0 for the first one."""
        begin = len(self._parents)
        offset = self._level_start if begin else -1
        self._parents += [parent + offset if begin else -1 for parent in parents]
        self._level_start = begin
        num_nodes, row = len(self._parents), self.start + self.kv_len + 1
        bias, own = None, tree_bias(self._parents)
        if own is not None:
            bias = torch.zeros(1, num_nodes - begin, self.kv_len + num_nodes)
            bias[0, :, self.kv_len :] = own[begin:]
        read = slice(self.start + 1, row + num_nodes)
        return RowPlan(slice(row + begin, row + num_nodes), (Part(1, num_nodes - begin, (read,), bias),))
