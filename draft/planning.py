"""The planner's place in a step: between the scheduler, which asks how much to draft, and the head.

``draft.planner`` decides on numbers; here they are taken from sequences and trees, step by step:

    plan             the scheduler asks, before it reserves rows
    carry_out        the step does what was planned
    begin            the head starts to draft for some sequences of the batch
    is_worth_level   before each further level
    cut              the grown tree, with what prompt lookup added: its best nodes
    observe          what was accepted
    account          what it cost

Where a step begins before the host knows how the one before it ended, all but the last two are about the
newer of them, and the last two about the older.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from draft.planner import Ask, Drafted, Planner
from draft.search import Asked, Load
from draft.tree import prune
from engine.clock import Mark, seconds_between
from engine.core import Decision, DraftTree, Sequence, Speculation, StepCost, depths_of

_USUAL_PENDING = 16  # pairs; a draft that has more to catch up with says what that costs


@dataclass(slots=True)
class _Step:
    """One step, as far as it has got."""

    ids: list[int]  # of the sequences, in the batch's order
    chances: list[list[float]]  # of the lookups' tokens that may be proposed
    active: list[int] = field(default_factory=list)  # places that the head drafts for
    pending: list[int] = field(default_factory=list)  # pairs that each of them catches up with
    level_rows: list[int] = field(default_factory=list)  # of the levels expanded so far
    marks: tuple[Mark, Mark] = (0.0, 0.0)  # of the head's beginning and end
    grown: DraftTree | None = None  # the head's trees of the active ones, read when the step is over


class Planning:
    """Holds the Planner and the steps that it is asked about."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self._planned = self._step = self._observed = _Step(
            [], []
        )  # a plan; the newest step; one that is over
        self._under_way: list[_Step] = []  # carried out, not observed: the oldest first

    def plan(
        self,
        seqs: Items[Sequence],
        limits: Items[Speculation],
        lookups: Items[Items[float]],
        pending: Items[int],
        num_other_rows: int,
    ) -> list[Decision]:
        """Decide for the sequences of a decode step. limits: the most each may use; lookups: chances of the
        tokens that prompt lookup has for each; pending: pairs that the head has not taken in of each;
        num_other_rows: of prompts in the same step."""
        asks = [
            Ask(
                seq.request.id,
                seq.request.sampling.temperature > 0,
                _asked(seq),
                limit,
                own[: limit.lookup],
                waiting,
            )
            for seq, limit, own, waiting in zip(seqs, limits, lookups, pending, strict=True)
        ]
        context = sum(seq.kv_len for seq in seqs) / len(seqs)
        decisions = self.planner.plan(asks, Load(context, num_other_rows)).decisions
        chances = [
            list(own[: decision.speculation.lookup]) for own, decision in zip(lookups, decisions, strict=True)
        ]
        self._planned = _Step([seq.request.id for seq in seqs], chances)
        return list(decisions)

    def carry_out(self, *, ahead: bool = False) -> None:
        """The last plan is what a step does. ahead: before the last step was observed; else nothing is under
        way any more, be it that a step broke."""
        self.planner.carry_out()
        self._step = self._planned
        self._under_way = [*self._under_way, self._step] if ahead else [self._step]

    def begin(self, active: list[int], pending: list[int], sizes: Items[Speculation] = ()) -> None:
        """The head drafts for these places of the batch; pending: pairs that each of them catches up with;
        sizes: of their trees where nobody asks before a level, for there all are expanded."""
        self._step.active, self._step.pending = active, pending
        self._step.level_rows = [
            sum(size.top_k for size in sizes if size.depth > depth)
            for depth in range(1, max((size.depth for size in sizes), default=0))
        ]

    def is_worth_level(self, depth: int, values: Items[Items[float]], frontier: Items[Items[float]]) -> bool:
        """Whether to expand nodes of this depth: path values of all candidates and of those that would be
        expanded, for each active place."""
        step = self._step
        num_seqs, num_drafting = len(step.ids), len(step.active)
        is_worth = self.planner.is_worth_level(
            depth,
            _spread(values, step.active, num_seqs),
            _spread(frontier, step.active, num_seqs),
            num_drafting,
            step.level_rows,
        )
        if is_worth:
            step.level_rows.append(sum(map(len, frontier)))
        return is_worth

    def note(self, tree: DraftTree, marks: tuple[Mark, Mark]) -> None:
        """The head's own trees, of the active places in order, and when it began and ended. A device is not
        asked how they look: there they come with what became of them."""
        self._step.grown, self._step.marks = tree if tree.tokens.device.type == "cpu" else None, marks

    def cut(self, tree: DraftTree) -> DraftTree:
        """The best nodes of the batch's trees, as many as pay for their rows."""
        if tree.scores is None or tree.tokens.device.type != "cpu":
            return tree  # lookups alone are planned to the token, and a device is not waited for
        values = _values(tree)
        counts = self.planner.keep(values, len(self._step.active), self._step.level_rows)
        if counts == [len(own) for own in values]:
            return tree
        return prune(tree, counts)

    def observe(self, request_ids: Items[int], tree: DraftTree, accepted: Items[int]) -> None:
        """Learn what became of the oldest step's trees. request_ids: of the sequences, in order, without
        those that ended while it was under way; accepted: draft tokens, for each."""
        step = self._observed = self._under_way.pop(0)
        places = [step.ids.index(request_id) for request_id in request_ids]
        chances = [step.chances[place] for place in places]
        expected = chances if tree.scores is None else _values(tree)
        if step.grown is not None:
            levels = dict(zip(step.active, _levels(step.grown), strict=True))
        else:
            of_all = _levels(tree) if step.active else []
            levels = {place: own for place, own in zip(places, of_all, strict=False) if place in step.active}
        self.planner.observe(
            [
                Drafted(step.ids[place], levels.get(place, ()), sum(expected[row]), accepted[row])
                for row, place in enumerate(places)
                if expected[row] or place in levels
            ]
        )

    def account(self, cost: StepCost) -> None:
        """Learn what the step took that was observed last."""
        costs, step = self.planner.costs, self._observed
        draft_s = seconds_between(*step.marks)
        if cost.seconds > draft_s:
            costs.observe_verify(cost.num_rows, cost.context, cost.seconds - draft_s)
        if not step.active or draft_s <= 0:
            return
        if max(step.pending) <= _USUAL_PENDING:
            costs.observe_draft(len(step.active), step.level_rows, draft_s)
        else:
            costs.observe_catch_up(len(step.active), step.level_rows, sum(step.pending), draft_s)

    def start_over(self) -> None:
        """As ``Draft.start_over``."""
        self.planner.start_over()

    def forget(self, request_id: int) -> None:
        """Drop what is kept of a request that ended."""
        self.planner.forget(request_id)


def _asked(seq: Sequence) -> Asked:
    asked = seq.request.speculation
    if asked is None:
        return "auto"
    return "off" if asked.is_off else "fixed"


def _spread(lists: Items[Items[float]], places: list[int], count: int) -> list[Items[float]]:
    """Lists of some places as lists of all; the others' are empty."""
    found: list[Items[float]] = [()] * count
    for place, own in zip(places, lists, strict=True):
        found[place] = own
    return found


def _values(tree: DraftTree) -> list[list[float]]:
    """Path values of every tree's nodes, the root and padding left out."""
    assert tree.scores is not None
    return [
        [value for value, parent in zip(own[1:], parents[1:], strict=True) if parent >= 0]
        for own, parents in zip(tree.scores.value.tolist(), tree.parents.tolist(), strict=True)
    ]


def _levels(tree: DraftTree) -> list[list[list[float]]]:
    """Path values by level of every tree, best first, of nodes that the head has offered."""
    assert tree.scores is not None
    found = []
    for parents, raws, values in zip(
        tree.parents.tolist(), tree.scores.raw.tolist(), tree.scores.value.tolist(), strict=True
    ):
        depths = depths_of(parents)
        levels: list[list[float]] = [[] for _ in range(max(depths))]
        for depth, raw, value in zip(depths, raws, values, strict=True):
            if depth > 0 and raw > 0:
                levels[depth - 1].append(value)
        found.append([sorted(level, reverse=True) for level in levels if level])
    return found
