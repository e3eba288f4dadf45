"""What a draft score is worth: a map from (mode, depth, rank, raw score) to observed acceptance, learned
online.

A head's softmax is not a probability of acceptance: under greedy decoding it is far too modest about sure
tokens, and products of too modest factors push a tree's budget into breadth. So acceptance is counted per
bucket of the raw score, with the raw score itself as the prior, old counts fading so that the map follows the
content. Within a mode, depth and rank the map is monotone in the raw score (pool-adjacent-violators), and it
is interpolated between bucket centres, so that ties among candidates stay rare.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.core import DraftTree, Verdict, depths_of
from engine.graphs import Mailbox

NUM_BUCKETS = 12
_MAX_DEPTH, _MAX_RANK = 16, 8  # deeper and later ones share the last entry
_PRIOR_TRIALS = 8.0  # how many observations the raw score itself counts for
_DECAY = 0.999  # per observed step
_REFRESH = 8  # observed steps between rebuilds of the map


def isotonic(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest non-decreasing sequence in weighted least squares (pool adjacent violators). 1-D arrays."""
    blocks: list[list[float]] = []  # value, weight, length
    for value, weight in zip(values, weights, strict=True):
        blocks.append([float(value), float(weight), 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            last, before = blocks.pop(), blocks[-1]
            total = before[1] + last[1]
            before[0] = (before[0] * before[1] + last[0] * last[1]) / total
            before[1], before[2] = total, before[2] + last[2]
    return np.concatenate([np.full(int(length), value) for value, _, length in blocks])


class Calibration:
    """Counts of offers and acceptances, and the map made from them. Modes: 0 greedy, 1 sampled."""

    def __init__(self, device: str) -> None:
        shape = (2, _MAX_DEPTH, _MAX_RANK, NUM_BUCKETS)
        self.trials, self.hits = np.zeros(shape), np.zeros(shape)
        self._centres = (np.arange(NUM_BUCKETS) + 0.5) / NUM_BUCKETS
        self._rates = np.broadcast_to(self._centres, shape).copy()
        self._touched: set[tuple[int, int, int]] = set()
        self._sent = Mailbox({"rates": (shape, torch.float32)}, device)  # at an address that graphs may hold
        self._is_stale = True
        self._observed = 0

    def start_over(self) -> None:
        """Forget what was observed."""
        self.trials[:], self.hits[:], self._rates[:] = 0.0, 0.0, self._centres
        self._touched.clear()
        self._is_stale = True
        self._observed = 0

    def send(self) -> None:
        """Bring the device's map up to date: before a graph runs that reads it."""
        if self._is_stale:
            self._sent.host["rates"].copy_(torch.from_numpy(self._rates))
            self._sent.send()
            self._is_stale = False

    def __call__(self, raw: Tensor, depth: int, sampled: Tensor) -> Tensor:
        """Calibrated conditional acceptance of children at one depth.

        raw: [B, F, k] scores of ranks 0..k-1; depth: of the children, from 1; sampled: [B] bool. Returns [B,
        F, k] in (0, 1].
        """
        k = raw.shape[-1]
        rank = torch.arange(k, device=raw.device).clamp(max=_MAX_RANK - 1)
        self.send()
        curves = self._sent.device["rates"][sampled.long(), min(depth, _MAX_DEPTH) - 1][
            :, rank
        ]  # [B, k, buckets]
        place = (raw * NUM_BUCKETS - 0.5).clamp(0, NUM_BUCKETS - 1)
        low = place.floor().long().clamp(max=NUM_BUCKETS - 2)
        curves = curves[:, None].expand(-1, raw.shape[1], -1, -1)
        left = curves.gather(-1, low[..., None])[..., 0]
        right = curves.gather(-1, low[..., None] + 1)[..., 0]
        return left + (right - left) * (place - low)

    def one(self, raw: float, depth: int, rank: int, sampled: bool) -> float:
        """The same for one score, on the host."""
        curve = self._rates[int(sampled), min(depth, _MAX_DEPTH) - 1, min(rank, _MAX_RANK - 1)]
        place = min(max(raw * NUM_BUCKETS - 0.5, 0.0), NUM_BUCKETS - 1.0)
        low = min(int(place), NUM_BUCKETS - 2)
        left, right = float(curve[low]), float(curve[low + 1])
        return left + (right - left) * (place - low)

    def observe(self, tree: DraftTree, verdict: Verdict, sampled: Sequence[bool]) -> None:
        """Count every node whose parent was accepted: only there did the target judge it. All of it on the
        host; sampled: of each sequence.

        Grafted nodes, which have no score, are none of the head's.
        """
        assert tree.scores is not None
        parents = tree.parents.tolist()
        depths = [depths_of(own) for own in parents]
        raws, ranks = tree.scores.raw.tolist(), tree.scores.rank.tolist()
        self.trials *= _DECAY
        self.hits *= _DECAY
        for row, path in enumerate(verdict.path.tolist()):
            accepted = set(path)
            for node in range(1, len(parents[row])):
                if parents[row][node] in accepted and raws[row][node] > 0:
                    key = (
                        int(sampled[row]),
                        min(depths[row][node], _MAX_DEPTH) - 1,
                        min(ranks[row][node], _MAX_RANK - 1),
                        min(int(raws[row][node] * NUM_BUCKETS), NUM_BUCKETS - 1),
                    )
                    self.trials[key] += 1
                    self.hits[key] += node in accepted
                    self._touched.add(key[:3])
        self._observed += 1
        if self._observed % _REFRESH == 0:
            self._rebuild()

    def _rebuild(self) -> None:
        """Make the curves anew that were observed since the last time."""
        for curve in self._touched:
            weights = self.trials[curve] + _PRIOR_TRIALS
            rates = (self.hits[curve] + _PRIOR_TRIALS * self._centres) / weights
            if (np.diff(rates) < 0).any():
                rates = isotonic(rates, weights)
            self._rates[curve] = rates
        self._touched.clear()
        self._is_stale = True
