"""What steps of an engine cost and how near that is to their floor: all figures of one model on one device.

The floor of a figure is what it reads (``perf.reads``, with the experts that were counted) at the bandwidth
that a copy reaches on this very device; of a prompt, what it multiplies, if that takes longer.

Random weights accept no drafts. So tokens per second are given for assumed acceptance alone, and say so: a
profile is the chance of each level that it is accepted if the level before was, and a step with a chain of
three emits 1 + a + ab + abc tokens in the time that was measured.

A run has a time budget. The figures come in the order of what they are worth, each is measured whole or not
at all, and what was left out is named with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from draft.head import FeatureDraft
from engine.checkpoint import Checkpoint, MistralCheckpoint
from engine.checkpoint.native import MistralHead
from engine.cli.roofline import Reads, routing_overlap, step_bytes
from engine.config import EngineConfig
from kernels import can_be_dependent
from perf.kernel_timing import Ceilings
from perf.reads import draft_reads, held_bytes, prompt_flops, target_reads
from perf.steps import LONGEST_CHAIN, NoRoomError, Setting, Steps, Timing

UNIFORM, ALIKE = "uniform", "alike"
PROFILES: Final[Mapping[str, tuple[float, ...]]] = {"high": (0.8, 0.7, 0.6), "middle": (0.7, 0.55, 0.45)}
_VERIFIED: Final = 4  # nodes of a tree where only one size is timed beside plain steps
_PROMPTS: Final = 3  # of each length


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to time. nodes, batches, contexts, prompts: ascending; overlap: of the routing of alike texts."""

    nodes: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 12, 16)
    batches: tuple[int, ...] = (1, 2, 4, 8, 32)
    contexts: tuple[int, ...] = (1024, 32768)
    prompts: tuple[int, ...] = (128, 1024, 8192, 32768)
    overlap: float = 0.45
    num_steps: int = 16
    seconds: float = 480.0


@dataclass(frozen=True, slots=True)
class Floors:
    """The least times of one model, its head and one device."""

    checkpoint: Checkpoint | MistralCheckpoint
    target: Reads
    head: Reads | None
    limits: Ceilings
    chunk: int  # tokens of a prompt that run at once

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint | MistralCheckpoint,
        head: MistralHead | None,
        config: EngineConfig,
        limits: Ceilings,
    ) -> Floors:
        return cls(
            checkpoint,
            target_reads(checkpoint, config),
            None if head is None else draft_reads(head, config),
            limits,
            config.max_num_batched_tokens,
        )

    def verify_ms(self, setting: Setting, distinct: float | None) -> float:
        """Of the forward over trees. distinct: experts that were counted."""
        num_bytes = step_bytes(self.target, setting.nodes, setting.batch, setting.context, distinct)
        return 1e3 * num_bytes / self.limits.bandwidth

    def draft_ms(self, setting: Setting) -> float | None:
        """Of all levels of drafting; each reads the head and the rows of the cache."""
        if self.head is None:
            return None
        level = step_bytes(self.head, 1, setting.batch, setting.context)
        return 1e3 * setting.levels * level / self.limits.bandwidth

    def prompt_ms(self, length: int) -> float:
        """Of a prompt: its bytes, chunk by chunk, or its multiplications, whichever take longer."""
        num_bytes = sum(
            step_bytes(self.target, min(self.chunk, length - first), context=first)
            for first in range(0, length, self.chunk)
        )
        work = prompt_flops(self.checkpoint, length)
        return 1e3 * max(num_bytes / self.limits.bandwidth, work / self.limits.flops)


class Costs:
    """Collects the figures of one engine. clock: seconds, for the budget."""

    def __init__(
        self, steps: Steps, floors: Floors, wanted: Wanted, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.steps, self.floors, self._wanted, self._clock = steps, floors, wanted, clock
        self.rows: list[dict[str, Any]] = []
        self.launches: list[dict[str, Any]] = []
        self.prompts: list[dict[str, Any]] = []
        self.left_out: list[dict[str, str]] = []
        self.embedding_share: float | None = None  # that makes routing overlap as wanted

    def measure(self, began: float) -> Iterator[str]:
        """All that the time allows, figure by figure: yields the name of each that was tried. began: when the
        budget's time started. Raises EngineError for logits that are not finite."""
        for name, figure in self._figures():
            if self._clock() - began > self._wanted.seconds:
                self.left_out.append({"what": name, "why": f"{self._wanted.seconds:g} s had passed"})
                continue
            try:
                figure()
            except (NoRoomError, torch.OutOfMemoryError) as error:
                self.left_out.append({"what": name, "why": str(error)})
            yield name

    def _figures(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Name and measurement of every figure, the most important first."""
        wanted, near, far = self._wanted, self._wanted.contexts[0], self._wanted.contexts[1:]
        has_head = isinstance(self.steps.engine.draft, FeatureDraft)
        trees = [nodes for nodes in wanted.nodes if nodes == 1 or has_head]
        if len(trees) < len(wanted.nodes):
            self.left_out.append({"what": "trees", "why": "there is no head to draft them"})
        few = [nodes for nodes in (1, _VERIFIED) if nodes in trees]
        yield from self._decodes(UNIFORM, [Setting(1, near, nodes) for nodes in trees])
        yield from ((f"prompt of {length}", self._prompt(length)) for length in wanted.prompts[:2])
        if self.floors.target.num_experts and has_head:
            yield f"{ALIKE}: how much texts have in common", self._make_alike(near)
            yield from self._decodes(ALIKE, [Setting(1, near, nodes) for nodes in trees])
            yield "uniform again", lambda: self.steps.make_alike(0.0)
        else:
            self.left_out.append({"what": ALIKE, "why": "there are no experts to choose, or no trees"})
        yield from self._launched([Setting(1, near, nodes) for nodes in few])
        yield from self._decodes(UNIFORM, [Setting(1, context, n) for context in far for n in few])
        yield from self._decodes(
            UNIFORM, [Setting(batch, near, n) for batch in wanted.batches[1:] for n in few]
        )
        yield from ((f"prompt of {length}", self._prompt(length)) for length in wanted.prompts[2:])
        crowds = [Setting(batch, context, n) for context in far for batch in wanted.batches[1:] for n in few]
        yield from self._decodes(UNIFORM, crowds)

    def _decodes(self, routing: str, settings: Sequence[Setting]) -> Iterator[tuple[str, Callable[[], None]]]:
        for setting in settings:
            name = f"{routing}: {setting.batch} x {setting.context}, {setting.nodes} nodes"
            yield name, lambda setting=setting: self._decode(routing, setting)  # type: ignore[misc]

    def _launched(self, settings: Sequence[Setting]) -> Iterator[tuple[str, Callable[[], None]]]:
        """Steps with dependent launches and without, one after the other, where graphs hold launches."""
        graphs = self.steps.engine.graphs
        if not graphs.are_on:
            return
        if not can_be_dependent(self.steps.target.device):
            self.left_out.append({"what": "dependent launches", "why": "the GPU has none"})
            return
        for setting in settings:
            for pdl in (not graphs.pdl, graphs.pdl):
                name = f"{'with' if pdl else 'without'} dependent launches: {setting.nodes} nodes"
                yield name, lambda setting=setting, pdl=pdl: self._launch(setting, pdl)  # type: ignore[misc]

    def _launch(self, setting: Setting, pdl: bool) -> None:
        with self.steps.launched(pdl):
            timing = self.steps.time(setting)
        self.launches.append(rounded({"pdl": pdl, **asdict(setting), **asdict(timing)}))

    def _decode(self, routing: str, setting: Setting) -> None:
        timing = self.steps.time(setting)
        distinct = self.steps.experts(setting)
        self.rows.append(self._row(routing, setting, timing, distinct))

    def _row(self, routing: str, setting: Setting, timing: Timing, distinct: float | None) -> dict[str, Any]:
        floor, draft_floor = self.floors.verify_ms(setting, distinct), self.floors.draft_ms(setting)
        row = {"routing": routing, **asdict(setting), "levels": setting.levels, **asdict(timing)}
        row |= {"floor_ms": floor, "floor_share": floor / timing.verify_ms, "experts_per_layer": distinct}
        reads, num_tokens = self.floors.target, setting.nodes * setting.batch
        if distinct is not None and num_tokens > 1:
            shared = routing_overlap(reads.num_experts, reads.num_experts_per_token, num_tokens, distinct)
            row["routing_overlap"] = shared
        if draft_floor:
            row |= {"draft_floor_ms": draft_floor, "draft_floor_share": draft_floor / timing.draft_ms}
        return rounded(row)

    def _prompt(self, length: int) -> Callable[[], None]:
        def figure() -> None:
            found, floor = self.steps.time_to_first_token(length, _PROMPTS), self.floors.prompt_ms(length)
            self.prompts.append(
                rounded({"tokens": length, "ttft_ms": found, "floor_ms": floor, "floor_share": floor / found})
            )

        return figure

    def _make_alike(self, context: int) -> Callable[[], None]:
        def figure() -> None:
            self.embedding_share = self.steps.share_for(self._wanted.overlap, context)

        return figure


def assumed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tokens per second at batch 1 with chains whose acceptance is assumed, beside those of plain steps."""
    found: list[dict[str, Any]] = []
    alone = [row for row in rows if row["batch"] == 1]
    plain = {(row["routing"], row["context"]): row["step_ms"] for row in alone if row["nodes"] == 1}
    for row in alone:
        place, levels = (row["routing"], row["context"]), row["nodes"] - 1
        if place not in plain or not 0 < levels < LONGEST_CHAIN:
            continue
        for name, chances in PROFILES.items():
            if levels <= len(chances):
                tokens = emitted(chances[:levels])
                found.append(
                    rounded(
                        {
                            "assumed_acceptance": name,
                            "chances": list(chances),
                            "routing": place[0],
                            "context": place[1],
                            "levels": levels,
                            "tokens_per_step": tokens,
                            "tok_s": 1e3 * tokens / row["step_ms"],
                            "plain_tok_s": 1e3 / plain[place],
                            "speedup": tokens * plain[place] / row["step_ms"],
                        }
                    )
                )
    return found


def emitted(chances: Sequence[float]) -> float:
    """Tokens that a step emits with a chain, each level accepted with its chance if the one before was."""
    tokens, reached = 1.0, 1.0
    for chance in chances:
        reached *= chance
        tokens += reached
    return tokens


def memory(steps: Steps) -> dict[str, int | None]:
    """Bytes: of weights and KV rows as the tensors say, and on a GPU what its allocator and driver say."""
    target, draft = steps.target, steps.engine.draft
    pools = [target.pool.rows]
    if isinstance(draft, FeatureDraft):
        pools.append(draft.model.pool.rows)
    found: dict[str, int | None] = {
        "weights": held_bytes((target, getattr(draft, "model", None)), pools),
        "kv_pools": sum(rows.nbytes for rows in pools),
        "graphs": steps.engine.graphs.num_bytes,
        "allocated": None,
        "allocated_at_most": None,
        "reserved": None,
        "in_use_on_device": None,
    }
    if target.device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(target.device)
        found |= {
            "allocated": torch.cuda.memory_allocated(target.device),
            "allocated_at_most": torch.cuda.max_memory_allocated(target.device),
            "reserved": torch.cuda.memory_reserved(target.device),
            "in_use_on_device": total - free,
        }
    return found


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """With four decimals for every number that has any."""
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
