"""The engine: one step after another. Start reading here.

Every step drafts a tree for each sequence, scores all trees with the target in one forward, lets the sampler
choose a token after every node, accepts the path on which both agree, and commits it. Prompts take the same
road, in the same forward, as chains that are accepted in advance.

A host needs about as long for what it does between two steps as a GPU needs for one: it plans, commits and
streams. So a device is given the next step *before* the host reads what became of this one, wherever the next
one needs no more than the device itself knows by then: captured decodes of sequences that simply go on. Every
``step`` still reads one step and returns its deltas; it has launched the one behind it first.

    device                | step 1 | step 2                         | step 3                         | ..
    host      launch 1, launch 2 | read 1, commit, stream, launch 3 | read 2, commit, stream, launch 4 | ..

Who ends in step 1 is in step 2 in vain, and what it does there is dropped: its rows lie behind what is
committed, on pages that nobody writes to before step 2 is over, since the device works in the order in which
it is given work. Otherwise, where somebody comes, leaves or ends, or a prompt lookup pays, which needs the
text, the host reads first and then goes on as it would at the beginning. Tokens are the same either way.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch

from engine.canary import Canary, CanaryCounts
from engine.clock import Clock, Mark
from engine.config import EngineConfig
from engine.core import Batch, Delta, DraftTree, FinishReason, Request, SamplingParams, Speculation, StepCost
from engine.decoding import Decoded, Decoding, Launched, advance
from engine.edits import sampling_edits
from engine.errors import EngineError
from engine.grammar import Grammars
from engine.graphs import Graphs
from engine.pages import PagePool
from engine.prefix import PrefixCache
from engine.roles import Draft, Target
from engine.sampler import Sampler
from engine.scheduler import Scheduler
from engine.text.grammar import GrammarCompiler
from verify.stats import StepSink, StepTimes


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request of ``Engine.generate``."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_steps: int  # decode steps; the first token comes from the prefill
    num_decoded: int  # tokens emitted by decode steps
    num_draft_tokens: int
    num_accepted: int

    @property
    def acceptance_length(self) -> float:
        """Mean tokens emitted per decode step."""
        return self.num_decoded / self.num_steps if self.num_steps else 1.0


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that is launched, and when its phases begin and end."""

    launched: Launched
    started: Mark  # of one behind another: when that one is verified
    drafted: Mark
    verified: Mark


def prompt_chain(batch: Batch) -> DraftTree:
    """The chunk of known text as a tree in which every node has one child."""
    assert batch.prompt is not None
    node = torch.arange(batch.prompt.tokens.shape[1], device=batch.kv_lens.device)[None]
    return DraftTree(batch.prompt.tokens, torch.where(node < batch.prompt.num_nodes[:, None], node - 1, -1))


class Engine:
    """Requests in, tokens out. Not thread-safe: one thread adds, aborts and steps."""

    def __init__(
        self,
        config: EngineConfig,
        target: Target,
        draft: Draft,
        pages: PagePool,
        eos_token_ids: tuple[int, ...],
        step_log: StepSink | None = None,
        grammar_compiler: GrammarCompiler | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        self.config, self.target, self.draft = config, target, draft
        self.graphs = Graphs() if graphs is None else graphs
        self.grammars = Grammars(grammar_compiler, target.vocab_size)
        edits = sampling_edits(target.vocab_size, config.device, eos_token_ids)
        self.sampler = Sampler([*edits, self.grammars])
        prefixes = PrefixCache(
            pages, target, draft.rows, off=not config.prefix_caching, side_by_side=config.device == "cpu"
        )
        self.scheduler = Scheduler(
            config,
            pages,
            prefixes,
            eos_token_ids,
            draft,
            target.vocab_size,
            self.sampler.forget,
            self.grammars,
            captured=self.graphs.are_on,
        )
        self.decoding = Decoding(target, self.sampler, self.graphs, config.device)
        self.canary = Canary(config, target, self.sampler, pages)
        self.step_log = step_log
        self.last_times = StepTimes()
        self._next: _Step | None = None  # launched before the host knew what becomes of the one before it
        self._clock = Clock(config.device)
        self._deltas: list[Delta] = []  # of the current step, as far as it has come
        self._next_id = 0

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Run one iteration: draft trees, score them all at once, accept a path of each, commit it."""
        deltas = self._deltas = self.scheduler.take_aborted()
        step, self._next = self._next, None
        if step is None or step.launched.is_over:
            step = self._launch()
        if step is None:
            return deltas
        self._next = self._launch_ahead(step)
        decoded = step.launched.read()  # the host's one wait for the device
        for batch, found in decoded:
            self.draft.observe(batch, found.tree, found.verdict, found.features)
            deltas += self.scheduler.commit(
                batch, found.tree, found.verdict, found.logprobs, goes_on=self._next is not None
            )
        ended = self._clock.mark() if self._next is None else step.verified
        self._account(step, decoded, deltas, ended)
        if self.config.canary:
            self.canary.check(self.scheduler.running, deltas)
        return deltas

    def _launch(self) -> _Step | None:
        """Hand the device a step; None if there is nothing to do."""
        started = self._clock.mark()
        batches = self.scheduler.next_batches()  # pages for every node are reserved here
        if not batches:
            return None
        trees = [
            prompt_chain(batch) if batch.is_prefill else self.draft.propose(batch, self.grammars.allowed)
            for batch in batches
        ]
        drafted = self._clock.mark()
        launched = self.decoding(batches, trees)  # score, choose, accept, compact
        return _Step(launched, started, drafted, self._clock.mark())

    def _launch_ahead(self, before: _Step) -> _Step | None:
        """Hand the device the step behind one that it is at work on, if that needs nothing of the host that
        only the first one's verdict can tell."""
        if not before.launched.is_whole:
            return None
        (earlier,) = before.launched.batches
        batch = self.scheduler.next_ahead(earlier)
        if batch is None:
            return None
        tree, verdict, features = before.launched.left()
        advance(batch, verdict)
        trees = [self.draft.propose_ahead(batch, earlier, tree, verdict, features)]
        drafted = self._clock.mark()
        launched = self.decoding((batch,), trees)
        return _Step(launched, before.verified, drafted, self._clock.mark())

    def _account(
        self, step: _Step, decoded: Items[tuple[Batch, Decoded]], deltas: list[Delta], ended: Mark
    ) -> None:
        """Tell what a step took, and what it did."""
        times = self.last_times = StepTimes.between(step.started, step.drafted, step.verified, ended)
        batch, found = decoded[0]
        if batch.is_prefill:  # decodes come first
            return
        if len(decoded) == 1 and batch is step.launched.batches[0]:
            self.draft.account(_cost(batch, deltas, times))
        if self.step_log is not None:
            self.step_log.write(_as_it_began(batch, deltas), found.tree, found.verdict, times)

    # --- requests

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError (ContextLengthError among them) if it could never run."""
        self.scheduler.add(request)

    def abort(self, request_id: int) -> None:
        """End a request in any state; its last Delta comes with the next step."""
        self.scheduler.abort(request_id)

    def fail_running(self, why: str) -> list[Delta]:
        """After a ``step`` that raised: end the requests that run, with ``why`` as their error. Those that
        wait go on. Returns the final deltas, and whatever the step had done before."""
        self._next = None
        return self._deltas + self.scheduler.fail_running(why)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    def vocab_coverage(self) -> float | None:
        """As ``Draft.vocab_coverage``."""
        return self.draft.vocab_coverage()

    def kv_usage(self) -> float:
        """Share of the pages that requests hold, 0 to 1; those merely cached are not counted."""
        pages = self.scheduler.pages
        return pages.num_held / pages.num_usable

    def prefix_counts(self) -> tuple[int, int]:
        """Tokens of all prompts so far, and how many of them the prefix cache had. (0, 0) without one."""
        prefixes = self.scheduler.prefixes
        return prefixes.num_asked, prefixes.num_found

    def canary_counts(self) -> CanaryCounts:
        """What re-scoring steps has shown so far; all zero without ``EngineConfig.canary``."""
        return self.canary.counts

    def generate(
        self,
        prompts: Items[Items[int]],
        sampling: SamplingParams | Items[SamplingParams],
        speculation: Speculation | None = None,
    ) -> list[Completion]:
        """Answer token-id prompts as one batch, in order, on an idle engine. Stop strings need a tokenizer
        and
        are not looked at here.
        """
        assert not self.has_work, "generate drives the engine alone"
        params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        first_id = self._next_id
        self._next_id += len(prompts)
        requests = [
            Request(first_id + i, tuple(prompt), param, speculation)
            for i, (prompt, param) in enumerate(zip(prompts, params, strict=True))
        ]
        try:
            for request in requests:
                self.add(request)
        except EngineError:  # all or nothing: what was queued before the one refused goes
            for request in requests:
                self.abort(request.id)
            self.scheduler.take_aborted()
            raise
        deltas: dict[int, list[Delta]] = {request.id: [] for request in requests}
        while self.scheduler.has_work:
            for delta in self.step():
                deltas[delta.request_id].append(delta)
        return [_completion(request, deltas[request.id]) for request in requests]


def _as_it_began(batch: Batch, deltas: Items[Delta]) -> Batch:
    """Decodes that are committed, with the lengths that they began with: the tensors that they lay in may be
    the next step's by now."""
    own = deltas[-len(batch.seqs) :]
    lengths = [
        seq.kv_len - len(delta.token_ids) + delta.num_forced
        for seq, delta in zip(batch.seqs, own, strict=True)
    ]
    return replace(batch, kv_lens=torch.tensor(lengths))


def _cost(batch: Batch, deltas: Items[Delta], times: StepTimes) -> StepCost:
    """What a step of decodes alone took. A prompt's rows are cheaper than a tree's, of which every one is
    scored: steps that have both would say that trees are cheap."""
    own = deltas[-len(batch.seqs) :]  # behind those of aborted requests, which have no rows
    rows = sum(1 + delta.num_draft_tokens for delta in own)
    context = sum(seq.kv_len for seq in batch.seqs) / len(batch.seqs)
    return StepCost(rows, context, times.total_s)


def _completion(request: Request, deltas: list[Delta]) -> Completion:
    finish_reason = deltas[-1].finish_reason
    assert finish_reason is not None
    decodes = [delta for delta in deltas if delta.is_decode and delta.token_ids]
    return Completion(
        request.prompt,
        tuple(token for delta in deltas for token in delta.token_ids),
        finish_reason,
        len(decodes),
        sum(len(delta.token_ids) - delta.num_forced for delta in decodes),
        sum(delta.num_draft_tokens for delta in decodes),
        sum(delta.num_accepted for delta in decodes),
    )
