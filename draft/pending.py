"""What a head has yet to take in: pairs of a token and the target's feature before it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class Pending:
    """Pairs of one sequence that wait for extend. Rows 1..num_rows of the head are computed.

    Features are kept as the step left them, which must not overwrite them, and gathered when they are needed:
    while nothing is drafted, that is once in dozens of steps.
    """

    num_rows: int = 0
    tokens: list[int] = field(default_factory=list)
    _features: list[tuple[Tensor, list[int]]] = field(default_factory=list)  # [N, F], and which of the N

    @property
    def num_waiting(self) -> int:
        return len(self.tokens)

    def append(self, tokens: list[int], features: Tensor, nodes: list[int]) -> None:
        """Add pairs: tokens, and the nodes whose features ([N, F]) come before them."""
        assert len(tokens) == len(nodes)
        self.tokens += tokens
        self._features.append((features, nodes))

    def skip(self, count: int) -> None:
        """As many pairs went past here: a device has taken them in before the host knew them."""
        assert not self.tokens, "pairs before them are waiting"
        self.num_rows += count

    def take(self, count: int) -> tuple[list[int], Tensor]:
        """Remove the first ``count`` pairs: tokens, and features [count, F]."""
        # A chain's nodes lie side by side, and then nobody needs a list of them.
        taken = [
            features[: len(nodes)] if nodes == list(range(len(nodes))) else features[nodes]
            for features, nodes in self._features
        ]
        features = taken[0] if len(taken) == 1 else torch.cat(taken)
        tokens, self.tokens = self.tokens[:count], self.tokens[count:]
        self._features = [(features[count:], list(range(len(self.tokens))))] if self.tokens else []
        self.num_rows += count
        return tokens, features[:count]
