"""The roles of a step: what it asks of the target that scores, and of the draft that proposes.

A model or a draft plays its role by having these methods; nobody inherits from them. What they are given and
what they return are the types of ``engine.core``, whose docstring has the letters in shapes and the promises
that both roles keep.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Protocol

from torch import Tensor

from engine.core import Batch, Decision, DraftTree, Scores, Sequence, Speculation, StepCost, Verdict


class DraftMask(Protocol):
    """What grammars let the tokens of a draft be."""

    def __call__(self, seq: Sequence, path: tuple[int, ...]) -> Tensor:
        """[V] bool, on the host: which tokens may follow ``path``, drafted tokens behind those of a sequence
        that has a grammar. None at all where the path itself cannot be."""
        ...


class Target(Protocol):
    """The model served: what the step asks of it, and what a head may share with it."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def embedding(self) -> Tensor:
        """[V, H]; its dtype and device are the model's."""
        ...

    def score(self, batches: Items[Batch], trees: Items[DraftTree]) -> tuple[Scores, ...]:
        """Run the trees of all batches behind their committed rows, in one forward; writes KV rows
        ``kv_len + i``."""
        ...

    def compact(self, batch: Batch, verdict: Verdict) -> None:
        """Move the accepted KV rows to the front of the scratch rows."""
        ...

    def copy_rows(self, source: Tensor, destination: Tensor) -> None:
        """Copy KV rows of all layers. source, destination: [M] slots."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., H] after the final norm -> [.., V] float32."""
        ...

    def output_rows(self, token_ids: Tensor) -> Tensor:
        """Rows of the output matrix, [n, H]."""
        ...


class DraftRows(Protocol):
    """KV rows that a draft keeps in a pool of its own, in the target's slots."""

    def are_needed(self, seq: Sequence, speculation: Speculation) -> bool:
        """Whether a sequence that starts behind rows of others needs the draft's rows of those tokens too."""
        ...

    def num_rows(self, seq: Sequence) -> int | None:
        """How many rows of a sequence, from row 0 on, are written for good; None if none ever will be."""
        ...

    def resume(self, seq: Sequence) -> None:
        """A sequence starts, and its rows 0 to ``kv_len`` are there already."""
        ...

    def copy_rows(self, source: Tensor, destination: Tensor) -> None:
        """As ``Target.copy_rows``."""
        ...


class Draft(Protocol):
    """Whatever proposes."""

    @property
    def rows(self) -> DraftRows | None:
        """None for a draft without a pool."""
        ...

    def vocab_coverage(self) -> float | None:
        """Share of the tokens emitted so far that the draft could have proposed, its vocabulary being smaller
        than the target's; None for a draft without a vocabulary, or before the first token."""
        ...

    def scratch_rows(self, speculation: Speculation) -> int:
        """KV rows past ``kv_len`` that one step may write."""
        ...

    def plan(self, seqs: Items[Sequence], limits: Items[Speculation], num_other_rows: int) -> list[Decision]:
        """How much to draft for the decodes of a step, in order, each within its limits.

        num_other_rows: of prompts in the same step.
        """
        ...

    def propose(self, batch: Batch, mask: DraftMask | None = None) -> DraftTree:
        """Trees for the decodes of a step. mask: asked for what a grammar lets follow, so that nothing is
        drafted in vain; without one nobody has a grammar."""
        ...

    def plan_ahead(self, batch: Batch, limits: Items[Speculation]) -> list[Decision] | None:
        """As ``plan``, for the step behind one that is under way, of which nobody knows yet how it ends.
        None if the draft has to know that first; then it is as if nobody had asked."""
        ...

    def propose_ahead(
        self, batch: Batch, before: Batch, tree: DraftTree, verdict: Verdict, features: Tensor
    ) -> DraftTree:
        """As ``propose``, for a batch that was planned ahead. The others: of the step before, as ``observe``
        will be given them, but all on the device, padding included."""
        ...

    def account(self, cost: StepCost) -> None:
        """Learn what a step of decodes alone took."""
        ...

    def observe(self, batch: Batch, tree: DraftTree, verdict: Verdict, features: Tensor) -> None:
        """Learn what was accepted. tree, verdict: on the host; features: [B, N, F] of the scored nodes, where
        they were computed, and the draft's to keep. By then the next step may have been proposed, ahead."""
        ...

    def start_over(self) -> None:
        """Forget what requests have shown so far, but not what steps cost. Asked while there are none."""
        ...

    def forget(self, seq: Sequence) -> None:
        """Drop everything kept for a sequence that ended or was preempted."""
        ...
