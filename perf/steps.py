"""An engine's own steps, timed one by one behind made-up contexts: what they cost, not what they answer.

Nothing here is a copy of the engine: requests are added, ``Engine.step`` runs, and the clock stands around
it. What is made up is the past. The prefix cache is told that it holds the rows of a random prompt (they are
random numbers), so a request begins behind 32,000 tokens at once, and everything from there on is real:
pages, the forward over tree and rows, the choice, the head.

    shape       nodes 1              the root: plain decoding
                nodes 2 to 5         a chain, one level of drafting for each node but the root
                more                 four levels, four children a node, the best so many nodes

How alike tokens are decides how many experts they choose. ``alike`` fills the embedding with rows that have a
part in common, so that every text is alike to that degree, and ``Steps.experts`` counts what is chosen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor

from draft.head import FeatureDraft
from engine.cli.roofline import routing_overlap
from engine.config import Mistral4Config
from engine.core import SPECULATION_OFF, Batch, DraftTree, Request, SamplingParams, Speculation
from engine.core import Sequence as Seq
from engine.errors import EngineError
from engine.models.decoder import Decoder
from engine.sampler import sampling_tensors
from engine.step import Engine
from kernels import route
from kernels.moe import Routing
from verify.stats import StepTimes

LONGEST_CHAIN: Final = 5  # nodes
_LEVELS, _CHILDREN = 4, 4
_WARM_UP: Final = 3  # steps of a setting that are not counted
_PATIENCE: Final = 4  # steps for each that is counted, before a setting is given up
_OVERLAP_NODES: Final = 4  # of the tree whose routing is made alike
_HALVINGS, _COUNTS = 7, 3  # of the search for how much texts have in common, and forwards for each


def room(num_steps: int) -> int:
    """Tokens that the steps of a setting add to a context at most, if so many are counted."""
    return _PATIENCE * (_WARM_UP + num_steps) * LONGEST_CHAIN


class NoRoomError(EngineError):
    """The KV cache is too small for a setting."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is timed: sequences, the tokens that each is behind, and the nodes of each tree."""

    batch: int
    context: int
    nodes: int

    @property
    def speculation(self) -> Speculation:
        """What to draft, so that a tree has so many nodes."""
        if self.nodes == 1:
            return SPECULATION_OFF
        if self.nodes <= LONGEST_CHAIN:
            return Speculation(self.nodes, self.nodes - 1, 1)
        return Speculation(self.nodes, _LEVELS, _CHILDREN)

    @property
    def levels(self) -> int:
        """Levels of drafting."""
        return self.speculation.depth


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians over the steps of a setting, in milliseconds, and the tokens that a sequence got in one.

    step_ms: by the host's clock from one step's end to the next; the others by marks of the device, other_ms
    being what comes behind the forward.
    """

    step_ms: float
    draft_ms: float
    verify_ms: float
    other_ms: float
    tokens: float
    num_steps: int


class Steps:
    """Times an engine that is idle, alone and without a planner.

    num_steps: to be counted for each figure; seed: of all that is made up. A sequence gets
    ``room(num_steps)`` tokens behind its context.
    """

    def __init__(self, engine: Engine, num_steps: int, seed: int = 0) -> None:
        assert isinstance(engine.target, Decoder), "the bench fills the rows of a model of ours"
        self.engine, self.target, self.num_steps = engine, engine.target, num_steps
        self._generator = torch.Generator().manual_seed(seed)
        self._on_device = torch.Generator(engine.target.device).manual_seed(seed)
        self._next_id = 0
        self._fill_rows()

    def _fill_rows(self) -> None:
        """Random numbers in all KV rows: what no prompt has written must not be zeros."""
        pools = [self.target.pool.rows]
        if isinstance(self.engine.draft, FeatureDraft):
            pools.append(self.engine.draft.model.pool.rows)
        for rows in pools:
            for layer in rows:  # one at a time: a pool may be most of the memory
                layer.copy_(
                    torch.empty_like(layer, dtype=self.target.dtype).normal_(generator=self._on_device)
                )

    # --- decoding

    def time(self, setting: Setting) -> Timing:
        """Run steps of a setting. Raises NoRoomError where the KV cache cannot hold it, and EngineError if
        logits are not finite or trees do not come out as asked for."""
        wanted = _WARM_UP + self.num_steps
        with self._running(setting):
            taken: list[tuple[float, StepTimes, int]] = []
            for _ in range(_PATIENCE * wanted):
                wall, tokens = self._step(setting)
                if tokens is not None:
                    taken.append((wall, self.engine.last_times, tokens))
                if len(taken) == wanted:
                    return _timing(taken[_WARM_UP:], setting.batch)
        raise EngineError(f"{setting}: {len(taken)} steps had such trees, expected {wanted}")

    @contextmanager
    def launched(self, pdl: bool) -> Iterator[None]:
        """Steps are captured anew, with dependent launches or without, and anew afterwards as they were."""
        graphs = self.engine.graphs
        before = graphs.pdl
        graphs.start_over(pdl)
        try:
            yield
        finally:
            graphs.start_over(before)

    def experts(self, setting: Setting) -> float | None:
        """Distinct experts that a layer's tokens choose in one forward, the mean over layers; None without
        experts. Counted apart from the clock, in a forward of its own over random tokens."""
        with self._running(setting):
            while any(seq.forced for seq in self.engine.scheduler.running) or not self._all_run(setting):
                self.engine.step()
            batch, tree = self._chains(setting)
            with recorded_routing() as chosen, torch.inference_mode():
                self.target.score([batch], [tree])
        return sum(len(torch.unique(ids)) for ids in chosen) / len(chosen) if chosen else None

    def _step(self, setting: Setting) -> tuple[float, int | None]:
        """Seconds of one step, and the tokens emitted; None if it was not one of the setting."""
        started = time.perf_counter()
        deltas = self.engine.step()
        wall = time.perf_counter() - started
        for delta in deltas:
            if delta.finish_reason == "error":
                raise EngineError(f"{setting}: {delta.error}")
        drafted = [delta.num_draft_tokens for delta in deltas if delta.is_decode]
        if drafted != [setting.nodes - 1] * setting.batch:
            return wall, None
        return wall, sum(len(delta.token_ids) for delta in deltas)

    def _check_room(self, batch: int, length: int) -> None:
        pages = self.engine.scheduler.pages
        needed = batch * (pages.pages_for(length) + 1)  # one more for scratch rows
        if needed > pages.num_usable:
            raise NoRoomError(
                f"{batch} x {length} tokens need {needed} pages of the KV cache, which has {pages.num_usable}"
            )

    def _all_run(self, setting: Setting) -> bool:
        return len(self.engine.scheduler.running) == setting.batch

    @contextmanager
    def _running(self, setting: Setting) -> Iterator[None]:
        """Sequences of a setting, from their first step on and to their end."""
        more = room(self.num_steps)
        self._check_room(setting.batch, setting.context + more)
        requests = [self._request(setting.context, setting.speculation, more) for _ in range(setting.batch)]
        for request in requests:
            pretend_cached(self.engine, request)
            self.engine.add(request)
        try:
            yield
        finally:
            for request in requests:
                self.engine.abort(request.id)
            while self.engine.has_work:
                self.engine.step()

    def _request(self, length: int, speculation: Speculation, max_tokens: int) -> Request:
        """A random prompt, greedy, on pages of its own."""
        self._next_id += 1
        prompt = torch.randint(self.target.vocab_size, (length,), generator=self._generator).tolist()
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        return Request(self._next_id, tuple(prompt), sampling, speculation, cache_salt=str(self._next_id))

    def _chains(self, setting: Setting) -> tuple[Batch, DraftTree]:
        """What runs, as a batch with chains of random tokens in place of trees."""
        seqs, device = tuple(self.engine.scheduler.running), self.target.device
        pages = self.engine.scheduler.pages
        for seq in seqs:
            enough = pages.extend(seq.pages, seq.kv_len + setting.nodes)
            assert enough, "room was counted before"
        width = max(len(seq.pages) for seq in seqs)
        table = torch.tensor([seq.pages + [0] * (width - len(seq.pages)) for seq in seqs])
        shape = setting.batch, setting.nodes
        tokens = torch.randint(self.target.vocab_size, shape, generator=self._generator)
        parents = torch.arange(-1, setting.nodes - 1).repeat(setting.batch, 1)
        batch = Batch(
            seqs,
            torch.tensor([seq.kv_len for seq in seqs]).to(device),
            table.to(device),
            pages.page_size,
            sampling_tensors([seq.request.sampling for seq in seqs], device),
            (setting.speculation,) * setting.batch,
        )
        return batch, DraftTree(tokens.to(device), parents.to(device))

    # --- prompts

    def time_to_first_token(self, length: int, num_prompts: int) -> float:
        """Milliseconds from a request's arrival to its first token, the median of some prompts that nothing
        is known of. Raises NoRoomError."""
        self._check_room(1, length + 1)
        times = []
        for _ in range(num_prompts):
            request = self._request(length, SPECULATION_OFF, 1)
            started = time.perf_counter()
            self.engine.add(request)
            while self.engine.has_work:
                for delta in self.engine.step():
                    if delta.finish_reason == "error":
                        raise EngineError(f"a prompt of {length} tokens: {delta.error}")
            times.append(time.perf_counter() - started)
        return 1e3 * median(times)

    # --- how alike texts are

    def make_alike(self, share: float) -> None:
        """See ``alike``."""
        alike(self.target.embedding, share, self._on_device)

    def share_for(self, overlap: float, context: int) -> float:
        """How much embeddings must have in common for the routing of a small chain to overlap so much; found
        by halving. The embedding is left at that."""
        setting, low, high = Setting(1, context, _OVERLAP_NODES), 0.0, 1.0
        config = self.target.config
        assert isinstance(config, Mistral4Config), "a model without experts has no routing"
        for _ in range(_HALVINGS):
            share = (low + high) / 2
            self.make_alike(share)
            counts = [self.experts(setting) for _ in range(_COUNTS)]
            distinct = sum(count for count in counts if count is not None) / _COUNTS
            found = routing_overlap(config.num_experts, config.num_experts_per_tok, setting.nodes, distinct)
            low, high = (share, high) if found < overlap else (low, share)
        return share


def _timing(taken: Sequence[tuple[float, StepTimes, int]], batch: int) -> Timing:
    """taken: seconds, phases and tokens of every step."""
    return Timing(
        1e3 * median(wall for wall, _, _ in taken),
        1e3 * median(times.draft_s for _, times, _ in taken),
        1e3 * median(times.verify_s for _, times, _ in taken),
        1e3 * median(times.other_s for _, times, _ in taken),
        sum(tokens for _, _, tokens in taken) / (len(taken) * batch),
        len(taken),
    )


def pretend_cached(engine: Engine, request: Request) -> None:
    """Let the prefix cache hold the rows of a request's prompt, as if another one like it had been there.

    Nothing is computed: the rows are whatever lies on the pages. There must be room.
    """
    scheduler, prompt = engine.scheduler, list(request.prompt)
    speculation = engine.config.speculation if request.speculation is None else request.speculation
    seq = Seq(request, prompt[:1], prompt[1:])
    begun = scheduler.prefixes.begin(seq, speculation, len(prompt))
    enough = scheduler.pages.extend(seq.pages, len(prompt))
    assert not begun, "the prompt is new"
    assert enough, "there is room"
    seq.tokens, seq.forced = prompt, []
    rows = engine.draft.rows
    if rows is not None and rows.are_needed(seq, speculation):
        rows.resume(seq)
    scheduler.prefixes.publish(seq)
    scheduler.prefixes.leave(seq)
    engine.draft.forget(seq)
    scheduler.pages.shrink(seq.pages, 0)


@contextmanager
def recorded_routing() -> Iterator[list[Tensor]]:
    """The expert ids [T, k] that every layer's router chooses while the context lasts, layer after layer."""
    chosen: list[Tensor] = []

    def recorded(x: Tensor, gate: Tensor, num_chosen: int, *rest: Any) -> Routing:
        routing = route(x, gate, num_chosen, *rest)
        chosen.append(routing.ids[:, :num_chosen])  # shared ones come last
        return routing

    with patch("engine.nn.moe.route", recorded):
        yield chosen


def alike(embedding: Tensor, share: float, generator: torch.Generator) -> None:
    """Fill an embedding [V, H] with random rows of unit spread, of whose variance ``share``, 0 to 1, is the
    same for all."""
    embedding.normal_(generator=generator).mul_(math.sqrt(1 - share))
    common = torch.empty_like(embedding[0]).normal_(generator=generator)
    embedding.add_(common.mul_(math.sqrt(share)))
