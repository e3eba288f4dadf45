"""Who runs next, and what became of it: the one writer of a Sequence.

A sequence waits, runs and ends. While it has ``forced`` tokens (its prompt, or after a preemption all it had)
its steps are chunks of them, afterwards decodes. Every step serves both kinds, within a budget of nodes
(``max_num_batched_tokens``) and in one *order*: by priority, then by arrival. What is promised:

- Every running sequence that decodes does so in every step. No more sequences run than the budget has nodes,
  so this leaves something to the prompts; ``engine.budget`` divides it.
- If pages or places run out, the last in order gives its own back and starts over from its tokens (preemption
  by recompute, behind what the prefix cache still has of them), so the first in order always gets on. Nobody
  makes room for another's tree, and within a priority nobody overtakes at admission, but for answers to a
  prompt that another one reads already. A lower priority waits for as long as higher ones fill the engine.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items

from engine.batches import Batches
from engine.budget import divide
from engine.checks import check_request
from engine.config import EngineConfig
from engine.core import (
    NO_CHOICE,
    Batch,
    Decision,
    Delta,
    DraftTree,
    FinishReason,
    Request,
    Sequence,
    Speculation,
    TokenLogprob,
    Verdict,
    depths_of,
)
from engine.errors import ContextLengthError, RequestError
from engine.grammar import Grammars
from engine.pages import PagePool
from engine.prefix import PrefixCache
from engine.roles import Draft
from kernels import MOST_OWN

_MOST_FORESEEN = 64  # tokens that a grammar may add to a step's: others wait for it meanwhile
_NOTHING_LEFT = "after the tokens so far the model's logits hold no number, or allow no token"


class Scheduler:
    """Owns every Sequence and every page.

    prefixes finds and keeps rows in ``pages``; eos_token_ids end a sequence unless it ignores them; draft is
    asked how much it wants to draft and how many KV rows that may write, and told when a sequence ends or
    starts over, as is ``forget_edits``; grammars say where answers end and what must follow them; captured:
    decodes may be, see ``engine.graphs``.
    """

    def __init__(
        self,
        config: EngineConfig,
        pages: PagePool,
        prefixes: PrefixCache,
        eos_token_ids: tuple[int, ...],
        draft: Draft,
        vocab_size: int,
        forget_edits: Callable[[Sequence], None],
        grammars: Grammars,
        *,
        captured: bool = False,
    ) -> None:
        self.config, self.pages, self.prefixes = config, pages, prefixes
        self.waiting: deque[Sequence] = deque()  # both in order
        self.running: list[Sequence] = []
        self._eos, self._vocab_size = frozenset(eos_token_ids), vocab_size
        most_rows = config.max_model_len + max(MOST_OWN, draft.scratch_rows(config.speculation))
        self._batches = Batches(config.device, pages.page_size, most_rows, fixed=captured)
        self._scratch_rows, self._forget = draft.scratch_rows, draft.forget
        self._plan, self._plan_ahead = draft.plan, draft.plan_ahead
        self._forget_edits, self._grammars = forget_edits, grammars
        self._num_places = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._num_added = 0
        self._aborted: list[Delta] = []

    # --- requests

    def add(self, request: Request) -> None:
        """Queue a request. Raises ContextLengthError or RequestError for one that could never run."""
        assert all(request.id != seq.request.id for seq in (*self.waiting, *self.running)), "ids are unique"
        check_request(request, self._vocab_size)
        self._grammars.check(request)
        prompt_len, limit = len(request.prompt), self.config.max_model_len
        if prompt_len >= limit:
            raise ContextLengthError(prompt_len, limit)
        rows = min(prompt_len + request.sampling.max_tokens, limit)
        if self.pages.pages_for(rows) > self.pages.num_usable:
            raise RequestError(
                f"the request needs up to {rows} KV rows, but the cache holds "
                f"{self.pages.num_usable * self.pages.page_size}; give a smaller "
                "max_tokens or start with more KV cache memory",
                "max_tokens",
            )
        seq = Sequence(request, [request.prompt[0]], list(request.prompt[1:]), arrival=self._num_added)
        self._num_added += 1
        insort(self.waiting, seq, key=_order)

    def abort(self, request_id: int) -> None:
        """End a request in any state. Unknown or finished ids are ignored: the end may have crossed the
        abort."""
        for seq in (*self.waiting, *self.running):
            if seq.request.id == request_id:
                self._end(seq, "abort")
                self._aborted.append(Delta(request_id, (), "abort", num_cached=seq.num_cached or 0))
                return

    def fail_running(self, why: str) -> list[Delta]:
        """End what runs, because a step broke while it worked on it; what waits is untouched.

        Returns the final deltas. A step writes to no Sequence before its commit, so all is as if it had never
        begun, but for rows, which nobody may begin with any more.
        """
        deltas = []
        for seq in self.running.copy():
            self.prefixes.disown(seq)
            self._end(seq, "error")
            deltas.append(Delta(seq.request.id, (), "error", num_cached=seq.num_cached or 0, error=why))
        assert self.pages.num_held == 0, f"{self.pages.num_held} pages are held, but nothing runs"
        return deltas

    def take_aborted(self) -> list[Delta]:
        """Final deltas of requests aborted since the last call."""
        aborted, self._aborted = self._aborted, []
        return aborted

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._aborted)

    # --- building the batches of a step

    def next_batches(self) -> tuple[Batch, ...]:
        """What the next step does, with pages reserved for all of its nodes: the decodes, then the chunks of
        prompts; either may be missing, and both are when there is nothing to do."""
        self._admit()
        decodes: list[tuple[Sequence, int]] = []
        chunks: list[tuple[Sequence, int]] = []
        for seq, num_nodes in self._shares():
            if num_nodes == 0 or seq not in self.running:
                continue  # it waits for nodes, or made room a moment ago for one before it
            if self._reserve(seq, seq.kv_len + (num_nodes if seq.forced else 1)):
                (chunks if seq.forced else decodes).append((seq, num_nodes))
        batches = []
        if decodes:
            seqs = [seq for seq, _ in decodes]
            limits = [self._step_speculation(seq).within(num_nodes) for seq, num_nodes in decodes]
            decided = self._plan(seqs, limits, sum(num_nodes for _, num_nodes in chunks))
            decisions = [self._reserve_tree(seq, one) for seq, one in zip(seqs, decided, strict=True)]
            batches.append(self._batches.of_decodes(seqs, decisions))
        if chunks:
            seqs, sizes = [seq for seq, _ in chunks], [num_nodes for _, num_nodes in chunks]
            speculation = [self._step_speculation(seq) for seq in seqs]
            batches.append(self._batches.of_chunks(seqs, sizes, speculation))
        return tuple(batches)

    def next_ahead(self, batch: Batch) -> Batch | None:
        """What follows a step of decodes that is under way, ``batch``, if that can be said before anybody
        knows how it ends, else None: the same sequences simply go on.

        Nobody could start instead, and nobody ends for sure; there are pages for as much as the step may
        emit, and for the next trees behind that. The pages stay until a ``commit`` behind which nothing is
        launched. Who does end with the step under way is in the next one in vain.

        Roots and lengths of what is returned are those that the step under way began with, for the host knows
        no others: see ``decoding.advance``.
        """
        seqs, emitted = batch.seqs, [one.most_emitted for one in batch.speculation]
        if list(seqs) != self.running or self._somebody_may_start():
            return None
        if any(self._remaining(seq) <= 1 for seq in seqs):
            return None
        most = [self._step_speculation(seq, tokens) for seq, tokens in zip(seqs, emitted, strict=True)]
        budget = self.config.max_num_batched_tokens
        shares, _ = divide(budget, [self._most_nodes(one) for one in most], [], [])
        limits = [one.within(num_nodes) for one, num_nodes in zip(most, shares, strict=True)]
        for seq, tokens, limit in zip(seqs, emitted, limits, strict=True):
            if not self.pages.extend(seq.pages, seq.kv_len + tokens + 1 + self._scratch_rows(limit)):
                return None
        decisions = self._plan_ahead(batch, limits) if self._batches.are_fixed(seqs) else None
        return None if decisions is None else self._batches.of_decodes(seqs, decisions)

    def _somebody_may_start(self) -> bool:
        """Whether one of those that wait may find a place as things are."""
        if not self.waiting:
            return False
        is_full = len(self.running) == self._num_places
        return not is_full or self.waiting[0].order < self.running[-1].order

    def _admit(self) -> None:
        """Let waiting sequences run, in order, while there are places and pages for a first step. Those that
        run but come later in the order make room, if they have enough of it; then that is all for this step,
        or they would come back for the room that they have made."""
        made_room = False
        while not made_room:
            seq = self._next_waiting()
            if seq is None:
                return
            later = [other for other in self.running if other.order > seq.order]
            is_full = len(self.running) == self._num_places
            if is_full and not later:
                return
            while not self._start(seq):
                first_rows = min(len(seq.tokens) + len(seq.forced), self.config.max_num_batched_tokens)
                room = self.pages.num_available + sum(len(other.pages) for other in later)
                if not later or self.pages.pages_for(first_rows) > room:
                    return
                self._preempt(later.pop())
                made_room = True
            if is_full and not made_room:
                self._preempt(later.pop())
                made_room = True
            self.waiting.remove(seq)
            insort(self.running, seq, key=_order)

    def _next_waiting(self) -> Sequence | None:
        """Who may start next. Several answers to one prompt are requests that share it; while one of them
        reads it, and until the draft too has its rows, a step later, the others let everybody else pass: then
        they find it in the prefix cache."""
        being_read = {
            id(seq.request.prompt)
            for seq in self.running
            if seq.num_generated < 2 and self.config.prefix_caching
            if len(seq.request.prompt) > self.pages.page_size
        }
        return next((seq for seq in self.waiting if id(seq.request.prompt) not in being_read), None)

    def _start(self, seq: Sequence) -> bool:
        """Let a waiting sequence begin behind the rows that the prefix cache has of it. False, and nothing
        done, if pages for its first step are missing."""
        speculation = self._step_speculation(seq)
        pages = self.prefixes.begin(seq, speculation, self.config.max_num_batched_tokens)
        if pages is None:
            return False
        known, num_tokens = seq.tokens + seq.forced, max(len(pages) * self.pages.page_size, 1)
        seq.pages, seq.tokens, seq.forced = pages, known[:num_tokens], known[num_tokens:]
        self.prefixes.resume(seq, speculation)
        if seq.num_cached is None:
            seq.num_cached = seq.kv_len
        return True

    def _shares(self) -> list[tuple[Sequence, int]]:
        """How many nodes each running sequence may have in this step, in order."""
        decodes = [seq for seq in self.running if not seq.forced]
        prompts = [seq for seq in self.running if seq.forced]
        trees, chunks = divide(
            self.config.max_num_batched_tokens,
            [self._most_nodes(self._step_speculation(seq)) for seq in decodes],
            [len(seq.forced) + 1 for seq in prompts],
            [seq.request.priority for seq in prompts],
        )
        shares = {id(seq): size for seq, size in zip(decodes + prompts, trees + chunks, strict=True)}
        return [(seq, shares[id(seq)]) for seq in self.running]

    def _most_nodes(self, speculation: Speculation) -> int:
        """The most nodes that a tree can have; a draft that writes fewer rows has fewer."""
        return min(1 + self._scratch_rows(speculation), speculation.nodes + speculation.lookup)

    def _reserve(self, seq: Sequence, num_rows: int) -> bool:
        """Pages for num_rows rows. Sequences behind it in order make room if they must; the first therefore
        always gets on."""
        while not self.pages.extend(seq.pages, num_rows):
            later = [other for other in self.running[self.running.index(seq) + 1 :] if other.pages]
            if not later:
                return False
            self._preempt(later[-1])
        return True

    def _reserve_tree(self, seq: Sequence, decision: Decision) -> Decision:
        """What to draft after all: where pages are short, nothing."""
        num_rows = seq.kv_len + 1 + self._scratch_rows(decision.speculation)
        if self.pages.extend(seq.pages, num_rows):
            return decision
        return Decision(decision.speculation.within(1), "no pages left for a draft")

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._give_back(seq)
        seq.forced = seq.tokens[1:] + seq.forced
        seq.tokens = seq.tokens[:1]
        insort(self.waiting, seq, key=_order)

    def _speculation(self, request: Request) -> Speculation:
        """What a request may have drafted; of a tree's nodes no more than the kernels' words have bits."""
        asked = self.config.speculation if request.speculation is None else request.speculation
        return asked.within(MOST_OWN)

    def _step_speculation(self, seq: Sequence, num_under_way: int = 0) -> Speculation:
        """What to draft now: never more tokens than the request may still emit, the bonus not counted.
        num_under_way: tokens that a step under way may emit."""
        return self._speculation(seq.request).limited(self._remaining(seq) - num_under_way - 1)

    def _remaining(self, seq: Sequence) -> int:
        return min(
            seq.request.sampling.max_tokens - seq.num_generated,
            self.config.max_model_len - len(seq.tokens) - len(seq.forced),
        )

    # --- committing

    def commit(
        self,
        batch: Batch,
        tree: DraftTree,
        verdict: Verdict,
        logprobs: Items[tuple[TokenLogprob, ...]],
        *,
        goes_on: bool = False,
    ) -> list[Delta]:
        """Write the accepted tokens, end what is finished, return surplus pages. All of it from the step's
        one copy to the host, but for logprobs (of the chosen tokens of each sequence, see
        ``engine.logprobs``). goes_on: the batch's next step is launched already, and keeps its pages."""
        paths, bonuses, lengths = verdict.path.tolist(), verdict.bonus.tolist(), verdict.length.tolist()
        tree_tokens = tree.tokens.tolist()
        parents = tree.parents.tolist() if batch.prompt is None else [[-1]] * len(paths)
        deltas = []
        for row, seq in enumerate(batch.seqs):
            new_tokens = [tree_tokens[row][node] for node in paths[row][1 : lengths[row]]]
            if bonuses[row] != NO_CHOICE:
                new_tokens.append(bonuses[row])
            num_known = min(len(new_tokens), len(seq.forced))
            seq.tokens.extend(new_tokens[:num_known])
            del seq.forced[:num_known]
            emitted = self._emit(seq, new_tokens[num_known:])
            foreseen = self._foresee(seq)
            if bonuses[row] == NO_CHOICE and seq.finish_reason is None:
                seq.finish_reason = "error"
                self.prefixes.disown(seq)
            else:
                self.prefixes.publish(seq)
            error = self._problem(seq) if seq.finish_reason == "error" else None
            if seq.finish_reason is not None:
                self._end(seq, seq.finish_reason)
            elif not goes_on:
                self.pages.shrink(seq.pages, seq.kv_len + 1)
            depths = depths_of(parents[row])
            deltas.append(
                Delta(
                    seq.request.id,
                    emitted + foreseen,
                    seq.finish_reason,
                    logprobs=logprobs[row][: len(emitted)],
                    is_decode=batch.prompt is None,
                    num_draft_tokens=sum(depth > 0 for depth in depths),
                    num_accepted=min(lengths[row] - 1, len(emitted)) if batch.prompt is None else 0,
                    draft_depth=max(depths),
                    num_cached=seq.num_cached or 0,
                    decision=batch.decisions[row] if batch.decisions else None,
                    num_forced=len(foreseen),
                    error=error,
                )
            )
        return deltas

    def _emit(self, seq: Sequence, new_tokens: list[int]) -> tuple[int, ...]:
        """Append chosen tokens up to the first that ends the sequence; sets its finish reason."""
        for count, token in enumerate(new_tokens, start=1):
            seq.tokens.append(token)
            seq.finish_reason = self._ending(seq, token)
            if seq.finish_reason is not None:
                return tuple(new_tokens[:count])
        return tuple(new_tokens)

    def _foresee(self, seq: Sequence) -> tuple[int, ...]:
        """Tokens that need no step, for the grammar leaves no choice: they are emitted at once, and pass
        through the model with what comes next, as a prompt does."""
        run: list[int] = []
        if seq.request.sampling.grammar is None or seq.forced:
            return ()
        while seq.finish_reason is None and len(run) < _MOST_FORESEEN:
            token = self._grammars.after(seq).only
            if token is None:
                break
            run.append(token)
            seq.forced.append(token)
            seq.finish_reason = self._ending(seq, token)
        return tuple(run)

    def _ending(self, seq: Sequence, token: int) -> FinishReason | None:
        """Whether a sequence ends with the token that was added last, and why."""
        sampling = seq.request.sampling
        end = None if sampling.grammar is None else self._grammars.after(seq).end
        if end is not None:
            return end
        may_stop = seq.num_generated > sampling.min_tokens  # only a grammar forces a stop token before that
        if may_stop and (
            token in sampling.stop_token_ids or (token in self._eos and not sampling.ignore_eos)
        ):
            return "stop"
        return "length" if self._remaining(seq) < 1 else None

    def _problem(self, seq: Sequence) -> str:
        """Why nothing could follow a sequence's tokens."""
        grammar = seq.request.sampling.grammar
        return (self._grammars.after(seq).problem if grammar is not None else "") or _NOTHING_LEFT

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        seq.finish_reason = reason
        if seq in self.running:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)
        self._give_back(seq)

    def _give_back(self, seq: Sequence) -> None:
        """All that is kept for a sequence, but for what the prefix cache keeps for others."""
        self.prefixes.leave(seq)
        self.pages.shrink(seq.pages, 0)
        self._forget(seq)
        self._forget_edits(seq)


def _order(seq: Sequence) -> tuple[int, int]:
    return seq.order
