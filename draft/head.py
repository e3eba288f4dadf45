"""What all heads that read target features have in common: pending features, and extend.

A head's row i is f(embedding of token i, feature i - 1). After a step the target has computed features for
the rows it accepted; each is paired with the token that followed it and waits as *pending* until the next
proposal, when all pending pairs run through the head in one pass (*extend*). The last of them is the root's
row, from which the tree grows (``draft.growth``). Rows written while growing are scratch: they hold the
head's own guesses of features and are recomputed from true ones when they are accepted.

Example: rows 0..4 are committed, token 5 is the root. The step accepts two nodes (rows 5, 6, 7 now hold their
KV) and chooses a bonus. Pending are then the pairs (token 6, feature 5), (token 7, feature 6), (bonus,
feature 7); extend writes the head's rows 6, 7 and 8, and row 8 is the new root's.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace

import torch
from torch import Tensor

from draft.calibration import Calibration
from draft.captured import CapturedProposals, Pairs, Shape
from draft.coverage import Coverage
from draft.growth import Growth, HeadModel
from draft.masking import FrontierMask, has_grammar, num_allowed
from draft.ngram import Lookup, PromptLookup
from draft.none import Unplanned, root_tokens, roots_alone
from draft.pending import Pending
from draft.planner import Planner
from draft.planning import Planning
from draft.tree import graft
from engine.clock import Clock, Mark
from engine.core import Batch, Decision, DraftScores, DraftTree, Sequence, Speculation, StepCost, Verdict
from engine.graphs import Graphs
from engine.roles import DraftMask, DraftRows
from engine.rows import RowPlan, chain_bias, first_slot, plan_chains, plan_spans, span
from kernels import compact_rows

_MOST_PENDING = 256  # pairs that wait while nothing is drafted; most answers end before that many


class FeatureDraft:
    """A draft (roles.Draft) around a HeadModel.

    shared_noise: rank candidates with the sampler's own noise; max_len: tokens of a sequence up to which the
    head is used, None for no limit. A sequence that has outgrown it has no trees any more, lookups only;
    planner: decides how much to draft, where a request does not; without one all is drafted that the limits
    allow; graphs: capture proposals. It is its own DraftRows, too.
    """

    def __init__(
        self,
        model: HeadModel,
        name: str,
        *,
        shared_noise: bool = True,
        max_len: int | None = None,
        planner: Planner | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        self.model, self.name, self.shared_noise, self.max_len = model, name, shared_noise, max_len
        self.device = str(model.token_ids.device)
        self._planning = None if planner is None else Planning(planner)
        self._clock = Clock(self.device)
        self.calibration = Calibration(self.device)
        anything = FrontierMask((), None, model.token_ids)
        self._growth = Growth(model, self.calibration, shared_noise, anything, None)
        self._captured = CapturedProposals(self._growth, Graphs() if graphs is None else graphs, self.device)
        self._pending: dict[int, Pending] = {}
        self._taken: frozenset[int] = frozenset()  # whose pairs the device takes in ahead
        self.start_over()

    def start_over(self) -> None:
        self.calibration.start_over()
        self.coverage = Coverage(self.model.token_ids)
        self.lookup = PromptLookup()
        if self._planning is not None:
            self._planning.start_over()

    @property
    def rows(self) -> DraftRows:
        return self

    def vocab_coverage(self) -> float | None:
        return self.coverage.share

    def scratch_rows(self, speculation: Speculation) -> int:
        """The tree's nodes for the target, or those expanded while growing, whichever is more."""
        if speculation.is_off:
            return 0
        scored = speculation.nodes - 1 + speculation.lookup
        return max(scored, speculation.top_k * (speculation.depth - 1) if speculation.has_tree else 0)

    def forget(self, seq: Sequence) -> None:
        self._pending.pop(seq.request.id, None)
        self.coverage.forget(seq)
        self.lookup.forget(seq)
        if self._planning is not None:
            self._planning.forget(seq.request.id)

    def _num_waiting(self, seq: Sequence) -> int:
        """Pairs that wait. Without any there is no row to grow a tree from: so before the first step of a
        sequence that starts with a single token, or with rows of all its tokens."""
        pending = self._pending.get(seq.request.id)
        return 0 if pending is None else pending.num_waiting

    def _has_outgrown(self, seq: Sequence, speculation: Speculation, num_under_way: int = 0) -> bool:
        """Whether a tree behind the sequence, its known prompt and so many tokens under way included, would
        reach past ``max_len``."""
        if self.max_len is None:
            return False
        return len(seq.tokens) + len(seq.forced) + num_under_way + speculation.depth > self.max_len

    # --- rows of others

    def are_needed(self, seq: Sequence, speculation: Speculation) -> bool:
        """Of sequences for which the head may ever propose: it reads all rows before its own."""
        return speculation.has_tree and not self._has_outgrown(seq, speculation)

    def num_rows(self, seq: Sequence) -> int | None:
        """Row 0, which does not exist, is never missing. None if the head does not follow the sequence."""
        pending = self._pending.get(seq.request.id)
        return None if pending is None else pending.num_rows + 1

    def resume(self, seq: Sequence) -> None:
        """Follow a sequence from behind rows that are there already."""
        self._pending[seq.request.id] = Pending(seq.kv_len)

    def copy_rows(self, source: Tensor, destination: Tensor) -> None:
        """Copy rows of every layer. source, destination: [M] slots."""
        compact_rows(self.model.pool.rows, source, destination)

    # --- learning

    def observe(self, batch: Batch, tree: DraftTree, verdict: Verdict, features: Tensor) -> None:
        """Pair the features of the accepted nodes with the tokens that followed them."""
        if tree.scores is not None:
            sampled = [seq.request.sampling.temperature > 0 for seq in batch.seqs]
            self.calibration.observe(tree, verdict, sampled)
        lengths, paths, bonuses = verdict.length.tolist(), verdict.path.tolist(), verdict.bonus.tolist()
        tree_tokens = tree.tokens.tolist()
        ready: list[tuple[int, int]] = []  # rows of the batch, and how many of their pairs can run now
        taken, self._taken = self._taken, frozenset()
        for row, seq in enumerate(batch.seqs):
            if self._has_outgrown(seq, batch.speculation[row]):
                self._pending.pop(seq.request.id, None)
                continue
            is_late = seq.kv_len > 0  # to begin here, for the rows before are missing
            may_begin = batch.speculation[row].may_resume and not is_late
            if seq.request.id not in self._pending and not may_begin:
                continue
            path = paths[row][: lengths[row]]
            pending = self._pending.setdefault(seq.request.id, Pending())
            if seq.request.id in taken:
                pending.skip(len(path))
                continue
            tokens = [tree_tokens[row][node] for node in path[1:]]
            pending.append([*tokens, bonuses[row]], features[row], path)
            # The pair of the last token stays: its row may lie on a page that is not reserved yet, and for
            # the first answer token's sake the last chunk waits until that token is out.
            goes_on = batch.prompt is not None and not batch.chooses(row)
            if (goes_on and pending.num_waiting > 1) or pending.num_waiting > _MOST_PENDING:
                ready.append((row, pending.num_waiting - 1))
        if ready:
            self._extend(batch, ready)
        if self._planning is not None and batch.prompt is None:
            ids = [seq.request.id for seq in batch.seqs]
            self._planning.observe(ids, tree, [length - 1 for length in lengths])

    def account(self, cost: StepCost) -> None:
        if self._planning is not None:
            self._planning.account(cost)

    # --- proposing

    def plan(self, seqs: Items[Sequence], limits: Items[Speculation], num_other_rows: int) -> list[Decision]:
        """What the planner decides, or all that is allowed."""
        can_grow = [self._can_grow(seq, limit) for seq, limit in zip(seqs, limits, strict=True)]
        return self._decide(seqs, limits, can_grow, num_other_rows)

    def plan_ahead(self, batch: Batch, limits: Items[Speculation]) -> list[Decision] | None:
        """The head can take in what a step leaves on the device, and nothing besides: where pairs are waiting
        here, nobody begins to draft ahead; nor is there a lookup before the text is known. If the plan has
        one of these, the host reads first and plans anew. So whatever pays comes a step late at most.
        """
        can_grow = [
            limit.has_tree and self._is_followed(seq, limit, before.most_emitted)
            for seq, limit, before in zip(batch.seqs, limits, batch.speculation, strict=True)
        ]
        decisions = self._decide(batch.seqs, limits, can_grow, 0)
        sizes = [
            decision.speculation if grows else replace(decision.speculation, nodes=1)
            for decision, grows in zip(decisions, can_grow, strict=True)
        ]
        for seq, size in zip(batch.seqs, sizes, strict=True):
            if size.has_tree and self._num_waiting(seq):
                return None
            if self.lookup.propose(seq, size.lookup) is not None:
                return None
        if any(size.has_tree for size in sizes) and self._shape_ahead(batch, 1, sizes) is None:
            return None
        return [
            replace(decision, speculation=replace(size, lookup=0))
            for decision, size in zip(decisions, sizes, strict=True)
        ]

    def _shape_ahead(self, before: Batch, num_seqs: int, sizes: Items[Speculation]) -> Shape | None:
        """The graph that drafts behind a step, ``before``, that is under way; None where none does, or nobody
        drafts."""
        active = [row for row, size in enumerate(sizes) if size.has_tree]
        if not active:
            return None
        most_pairs = max(before.speculation[row].most_emitted for row in active)
        return Shape.of(num_seqs, most_pairs, 0, [self._growth.bounded(sizes[row]) for row in active])

    def _decide(
        self, seqs: Items[Sequence], limits: Items[Speculation], can_grow: Items[bool], num_other_rows: int
    ) -> list[Decision]:
        """can_grow: whether there is anything to grow a tree from."""
        if self._planning is None:
            return Unplanned().plan(seqs, limits, num_other_rows)
        allowed = [
            limit if grows else replace(limit, nodes=1) for limit, grows in zip(limits, can_grow, strict=True)
        ]
        found = [self.lookup.propose(seq, limit.lookup) for seq, limit in zip(seqs, limits, strict=True)]
        chances = [[] if lookup is None else lookup.chances for lookup in found]
        waiting = [self._num_waiting(seq) for seq in seqs]
        return self._planning.plan(seqs, allowed, chances, waiting, num_other_rows)

    def _can_grow(self, seq: Sequence, speculation: Speculation) -> bool:
        """Whether the head can draft for a sequence as much as is asked for."""
        return (
            speculation.has_tree and self._num_waiting(seq) > 0 and not self._has_outgrown(seq, speculation)
        )

    def _is_followed(self, seq: Sequence, speculation: Speculation, num_under_way: int) -> bool:
        """Whether the head will have a row to grow such a tree from, behind so many tokens under way."""
        return seq.request.id in self._pending and not self._has_outgrown(seq, speculation, num_under_way)

    def propose(self, batch: Batch, mask: DraftMask | None = None) -> DraftTree:
        """Trees for the sequences that speculate, the root alone for the others."""
        self._carry_out(ahead=False)
        both = list(zip(batch.seqs, batch.speculation, strict=True))
        lookups = [self._look_up(seq, spec.lookup, mask) for seq, spec in both]
        active = [row for row, of in enumerate(both) if self._can_grow(*of)]
        shape = self._captured_shape(batch, active, lookups, mask)
        if shape is not None:
            return self._propose_captured(batch, shape, active, lookups)
        tree = self._trees(batch, active, mask)
        if any(lookups):
            chains = [([], []) if lookup is None else (lookup.tokens, lookup.chances) for lookup in lookups]
            chains += [([], [])] * (len(tree.tokens) - len(chains))
            longest = max(len(tokens) for tokens, _ in chains)
            tokens = [tokens + [-1] * (longest - len(tokens)) for tokens, _ in chains]
            chances = [chances + [0.0] * (longest - len(chances)) for _, chances in chains]
            tree = graft(
                tree,
                torch.tensor(tokens, dtype=torch.int64).to(self.device),
                torch.tensor(chances, dtype=torch.float32).to(self.device),
            )
        return tree if self._planning is None else self._planning.cut(tree)

    def propose_ahead(
        self, batch: Batch, before: Batch, tree: DraftTree, verdict: Verdict, features: Tensor
    ) -> DraftTree:
        """Trees for the sequences for which that was planned."""
        self._carry_out(ahead=True)
        shape = self._shape_ahead(before, len(batch.kv_lens), batch.speculation)
        if shape is None:
            return roots_alone(batch)
        active = [row for row, size in enumerate(batch.speculation) if size.has_tree]
        self._taken = frozenset(batch.seqs[row].request.id for row in active)
        started = self._begin(batch, active, [shape.num_pairs] * len(active))
        sizes = [self._growth.bounded(size) if size.has_tree else None for size in batch.speculation]
        drafted = self._captured.ahead(batch, shape, sizes, tree, verdict, features)
        self._end(drafted, started)
        return drafted

    def _carry_out(self, *, ahead: bool) -> None:
        """The step that was planned begins. ahead: before the last one was observed."""
        self._taken = frozenset()
        if self._planning is not None:
            self._planning.carry_out(ahead=ahead)

    def _look_up(self, seq: Sequence, most: int, mask: DraftMask | None) -> Lookup | None:
        """A lookup's chain, as far as the sequence's grammar allows it."""
        found = self.lookup.propose(seq, most)
        num = 0 if found is None else num_allowed(found.tokens, seq, mask)
        return Lookup(found.tokens[:num], found.chances[:num]) if found is not None and num else None

    def _captured_shape(
        self, batch: Batch, active: list[int], lookups: Items[Lookup | None], mask: DraftMask | None
    ) -> Shape | None:
        """The graph that proposes for a batch, None where it is done step by step: what grammars allow is
        asked level by level, and at first a sequence has its whole prompt pending."""
        if not batch.is_fixed or not active:
            return None
        if mask is not None and any(has_grammar(seq) for seq in batch.seqs):
            return None
        return Shape.of(
            len(batch.kv_lens),
            max(self._pending[batch.seqs[row].request.id].num_waiting for row in active),
            max((len(found.tokens) for found in lookups if found is not None), default=0),
            [self._growth.bounded(batch.speculation[row]) for row in active],
        )

    def _propose_captured(
        self, batch: Batch, shape: Shape, active: list[int], lookups: Items[Lookup | None]
    ) -> DraftTree:
        pendings = [self._pending[batch.seqs[row].request.id] for row in active]
        started = self._begin(batch, active, [pending.num_waiting for pending in pendings])
        pairs: list[Pairs | None] = [None] * len(batch.seqs)
        for row, pending in zip(active, pendings, strict=True):
            pairs[row] = Pairs(*pending.take(pending.num_waiting))
        sizes = [self._growth.bounded(spec) for spec in batch.speculation]
        tree = self._captured(batch, shape, sizes, pairs, lookups)
        self._end(tree, started)
        return tree

    def _begin(self, batch: Batch, active: list[int], pending: list[int]) -> Mark:
        """The head is about to draft for some sequences of a batch; pending: see ``Planning.begin``."""
        for row in active:
            self.coverage.count(batch.seqs[row])
        if self._planning is not None:
            sizes = [] if self.device == "cpu" else [batch.speculation[row] for row in active]
            self._planning.begin(active, pending, sizes)
        return self._clock.mark()

    def _end(self, tree: DraftTree, started: Mark) -> None:
        """It has drafted."""
        if self._planning is not None:
            self._planning.note(tree, (started, self._clock.mark()))

    def _trees(self, batch: Batch, active: list[int], mask: DraftMask | None) -> DraftTree:
        """The head's trees for some rows of a batch, the root alone for the others."""
        roots = root_tokens(batch)
        if not active:
            return DraftTree(roots, torch.full_like(roots, -1))
        pendings = [self._pending[batch.seqs[row].request.id] for row in active]
        started = self._begin(batch, active, [pending.num_waiting for pending in pendings])
        tree = self._grown(batch, active, roots, mask)
        self._end(tree, started)
        return tree if len(active) == len(roots) else _spread(tree, active, roots)

    def _grown(self, batch: Batch, active: list[int], roots: Tensor, mask: DraftMask | None) -> DraftTree:
        """The head's trees for some rows of a batch, [len(active), N]."""
        growth = replace(
            self._growth,
            masked=FrontierMask([batch.seqs[row] for row in active], mask, self.model.token_ids),
            is_worth=None if self._planning is None else self._planning.is_worth_level,
        )
        features = self._extend_all(batch, active)
        if len(active) == 1 and self.device == "cpu":
            start = first_slot(batch.seqs[active[0]].pages, batch.page_size)
            if start is not None:
                return growth.alone(batch, active[0], start, features)
        return growth.together(batch, active, roots, features)

    def _extend_all(self, batch: Batch, active: list[int]) -> Tensor:
        """Run all pending pairs; returns the feature after each root, [b, 1, H]."""
        pendings = [self._pending[batch.seqs[row].request.id] for row in active]
        waiting = [(row, pending.num_waiting) for row, pending in zip(active, pendings, strict=True)]
        roots = self._extend(batch, waiting)
        assert all(p.num_rows == batch.seqs[row].kv_len for p, row in zip(pendings, active, strict=True))
        return roots[:, None]

    def _extend(self, batch: Batch, wanted: list[tuple[int, int]]) -> Tensor:
        """Run pending pairs, side by side: for each (row of the batch, count) the first ``count`` of them.
        Returns the feature after the last of each, [b, H]."""
        tokens, positions = list[int](), list[int]()
        features, firsts = [], []
        for row, count in wanted:
            pending = self._pending[batch.seqs[row].request.id]
            firsts.append(pending.num_rows + 1)
            positions += range(pending.num_rows, pending.num_rows + count)
            pair_tokens, pair_features = pending.take(count)
            tokens += pair_tokens
            features.append(pair_features)
        counts = [count for _, count in wanted]
        out = self.model.extend(
            torch.tensor(tokens).to(self.device),
            features[0] if len(features) == 1 else torch.cat(features),
            torch.tensor(positions).to(self.device),
            self._chains(batch, [row for row, _ in wanted], firsts, counts),
        )
        if len(counts) == 1:
            return out[-1:]
        last = torch.tensor(counts).cumsum(0) - 1
        return out[last.to(self.device)]

    def _chains(self, batch: Batch, index: list[int], firsts: list[int], counts: list[int]) -> RowPlan:
        """``counts`` rows of some sequences, from rows ``firsts`` on. Row 0 does not exist, so none is read
        before row 1."""
        if self.device == "cpu":
            own = zip(index, firsts, counts, strict=True)
            spans = [
                span(batch.seqs[row].pages, batch.page_size, first, chain_bias(count), start=1)
                for row, first, count in own
            ]
            return plan_spans(spans, torch.device(self.device))
        table = batch.page_table[torch.tensor(index).to(self.device)]
        return plan_chains(table, batch.page_size, torch.tensor(firsts).to(self.device), counts, start=1)


def _spread(tree: DraftTree, rows: list[int], roots: Tensor) -> DraftTree:
    """Trees of some sequences as trees of the whole batch; the others get their root alone. roots: [B, 1]."""
    assert tree.scores is not None
    shape = (roots.shape[0], tree.tokens.shape[1])

    def whole(part: Tensor, padding: int, root: Tensor | int) -> Tensor:
        out = torch.full(shape, padding, dtype=part.dtype, device=part.device)
        out[:, :1] = root
        out[rows] = part
        return out

    scores = DraftScores(
        whole(tree.scores.raw, 0, 1), whole(tree.scores.value, 0, 1), whole(tree.scores.rank, 0, 0)
    )
    return DraftTree(whole(tree.tokens, 0, roots), whole(tree.parents, -1, -1), scores)
