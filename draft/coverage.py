"""How much of what is emitted a head could have said."""

from __future__ import annotations

from torch import Tensor

from engine.core import Sequence


class Coverage:
    """How many emitted tokens a head with a reduced vocabulary could have drafted at all."""

    def __init__(self, token_ids: Tensor) -> None:
        self.emitted, self.covered = 0, 0
        self._ids = frozenset(token_ids.tolist())
        self._counted: dict[int, int] = {}  # tokens of each sequence that are counted, or are its prompt

    @property
    def share(self) -> float | None:
        """None before the first token."""
        return self.covered / self.emitted if self.emitted else None

    def count(self, seq: Sequence) -> None:
        """Count what a sequence has emitted since the last call; the first call only starts."""
        start = self._counted.get(seq.request.id, len(seq.tokens))
        self._counted[seq.request.id] = len(seq.tokens)
        self.emitted += len(seq.tokens) - start
        self.covered += sum(token in self._ids for token in seq.tokens[start:])

    def forget(self, seq: Sequence) -> None:
        """Count the rest of a sequence, and drop it."""
        if seq.request.id in self._counted:
            self.count(seq)
            del self._counted[seq.request.id]
