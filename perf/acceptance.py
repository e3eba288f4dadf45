"""What drafting was worth: acceptance by depth and by rank, and speed, of several settings side by side.

Counted per decode step, from the records of ``verify.stats``. A step walks down its tree: it stands at the
root, and as long as the node where it stands has children, the target either accepts one of them and moves
on, or ends the walk. So two things can be said without bias:

    acceptance at depth d    of the walks that stood at depth d - 1 before children, the share that moved on
    acceptance of rank r     of the children of rank r that a walk stood before, the share that it moved to

Children that no walk reached were never judged, and count nowhere. Nodes that only prompt lookup proposed
have no rank in the head's eyes; they are counted under ``lookup``.

A *cell* is one setting: a shape, a temperature, and whether the draft sees the sampler's own noise. All cells
answer every prompt one after another (``perf.latency.interleave``), so that a machine's drift hits all alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, product
from typing import Any
from zlib import crc32

from draft.calibration import Calibration
from draft.head import FeatureDraft
from engine.core import Batch, DraftTree, Request, SamplingParams, Verdict
from engine.errors import ConfigError
from engine.step import Engine
from perf.latency import Mode, Prompt, Row, Run, equal_share, median_ms, ratio, run_engine
from perf.shapes import Shape
from verify.stats import StepSink, StepTimes, step_records

LOOKUP = "lookup"


# --- counting -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Walks:
    """How far steps got. The counters are keyed by depth (from 1) and by rank (from "0", and LOOKUP)."""

    num_steps: int = 0
    num_drafted: int = 0  # nodes without roots
    num_drafting_steps: int = 0
    offered_at: Counter[int] = field(default_factory=Counter)
    accepted_at: Counter[int] = field(default_factory=Counter)
    offered_rank: Counter[str] = field(default_factory=Counter)
    accepted_rank: Counter[str] = field(default_factory=Counter)

    def add(self, record: Mapping[str, Any]) -> None:
        """Follow the walk of one step record."""
        parents, accepted = record["parents"], set(record["accepted"])
        self.num_steps += 1
        self.num_drafted += len(parents) - 1
        self.num_drafting_steps += len(parents) > 1
        stand, depth = 0, 1
        while children := [node for node, parent in enumerate(parents) if parent == stand]:
            self.offered_at[depth] += 1
            self.offered_rank.update(_rank(record, node) for node in children)
            chosen = [node for node in children if node in accepted]
            if not chosen:
                return
            self.accepted_at[depth] += 1
            self.accepted_rank[_rank(record, chosen[0])] += 1
            stand, depth = chosen[0], depth + 1

    def by_depth(self) -> list[dict[str, Any]]:
        """One row per depth that some walk stood before."""
        return _shares("depth", sorted(self.offered_at), self.offered_at, self.accepted_at)

    def by_rank(self) -> list[dict[str, Any]]:
        """One row per rank, lookup last."""
        ranks = sorted(self.offered_rank, key=lambda rank: (rank == LOOKUP, len(rank), rank))
        return _shares("rank", ranks, self.offered_rank, self.accepted_rank)


def _rank(record: Mapping[str, Any], node: int) -> str:
    return str(record["rank"][node]) if record.get("raw") and record["raw"][node] > 0 else LOOKUP


def _shares(
    name: str, keys: Iterable[Any], offered: Counter[Any], accepted: Counter[Any]
) -> list[dict[str, Any]]:
    return [
        {
            name: key,
            "offered": offered[key],
            "accepted": accepted[key],
            "acceptance": round(accepted[key] / offered[key], 4),
        }
        for key in keys
    ]


def walks(runs: Iterable[Run]) -> Walks:
    """The walks of all decode steps of some answers."""
    found = Walks()
    for run in runs:
        for record in run.records:
            found.add(record)
    return found


# --- cells ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting. shared_noise is None where it makes no difference: greedy, or nothing is drafted."""

    shape: Shape
    temperature: float
    shared_noise: bool | None

    @property
    def name(self) -> str:
        noise = {None: "", True: ", shared noise", False: ", no shared noise"}[self.shared_noise]
        return f"{self.shape.name} at {self.temperature:g}{noise}"

    @property
    def baseline(self) -> bool:
        return self.shape.family == "plain"


def cells(shapes: Sequence[Shape], temperatures: Sequence[float], noises: Sequence[bool]) -> list[Cell]:
    """Every combination that differs from the others; per temperature the shapes in their order."""
    found = []
    for temperature, shape in product(temperatures, shapes):
        differ = temperature > 0 and shape.family != "plain"
        found += [Cell(shape, temperature, noise) for noise in (noises if differ else (None,))]
    return found


class StepMemory:
    """Keeps a run's steps (a verify.stats.StepSink) and passes them on to the log that was there before.

    They are made into records when they are taken, so that the steps that are timed do not pay for it.
    """

    def __init__(self, log: StepSink | None = None) -> None:
        self._log = log
        self._steps: list[tuple[Batch, DraftTree, Verdict, StepTimes]] = []

    def write(self, batch: Batch, tree: DraftTree, verdict: Verdict, times: StepTimes) -> None:
        self._steps.append((batch, tree, verdict, times))
        if self._log is not None:
            self._log.write(batch, tree, verdict, times)

    def take(self) -> list[dict[str, Any]]:
        """The records since the last call."""
        steps, self._steps = self._steps, []
        return [record for number, step in enumerate(steps) for record in step_records(number, *step)]

    def close(self) -> None:
        if self._log is not None:
            self._log.close()


class NoiseSwitch:
    """Lets one draft work with the sampler's noise and without it, by turns.

    What a score is worth depends on whether noise is in it, so each way has a calibration of its own; else
    either would draft by what the other learned.
    """

    def __init__(self, engine: Engine) -> None:
        """Raises ConfigError for a draft that has no scores to add noise to."""
        if not isinstance(engine.draft, FeatureDraft):
            name = getattr(engine.draft, "name", type(engine.draft).__name__)
            raise ConfigError(f"noise is shared with a draft head, found the draft {name!r}")
        self._engine, self._draft = engine, engine.draft
        self._calibrations = {
            engine.draft.shared_noise: engine.draft.calibration,
            not engine.draft.shared_noise: Calibration(engine.draft.device),
        }

    def set(self, shared: bool) -> None:
        """Draft so from now on. The engine must be idle."""
        assert not self._engine.has_work, "a request keeps the noise that it began with"
        self._draft.shared_noise, self._draft.calibration = shared, self._calibrations[shared]


class Bench:
    """Answers prompts on an idle engine, one cell after another.

    switches: whether some cell drafts without the sampler's noise; raises ConfigError if the draft cannot.
    prompt_ids: a prompt's tokens; max_tokens: longest answer.
    """

    def __init__(
        self, engine: Engine, switches: bool, prompt_ids: Callable[[Prompt], tuple[int, ...]], max_tokens: int
    ) -> None:
        self._engine, self._prompt_ids, self._max_tokens = engine, prompt_ids, max_tokens
        self._switch = NoiseSwitch(engine) if switches else None
        self._memory = engine.step_log = StepMemory(engine.step_log)
        self._ids = count()

    def mode(self, cell: Cell) -> Mode:
        """How a cell answers a prompt. A prompt's n-th answer has the same seed in every cell."""
        asked = Counter[str]()

        def answer(prompt: Prompt) -> Run:
            if self._switch is not None:
                self._switch.set(cell.shared_noise is not False)
            seed = crc32(prompt.id.encode()) + asked[prompt.id]
            asked[prompt.id] += 1
            sampling = SamplingParams(temperature=cell.temperature, max_tokens=self._max_tokens, seed=seed)
            request = Request(next(self._ids), self._prompt_ids(prompt), sampling, cell.shape.speculation)
            run = run_engine(self._engine, request)
            run.records = self._memory.take()
            return run

        return answer


# --- report ---------------------------------------------------------------------------------------------


def summarise(runs: Sequence[Run], plain: Sequence[Run]) -> dict[str, Any]:
    """The figures of a cell's answers beside plain decoding's of the same prompts: rates in tokens/s, times
    in ms, None where there is no data."""
    seen = walks(runs)
    rate = _tok_s(runs)
    figures = {
        "num_runs": len(runs),
        "tok_s": rate,
        "speedup": ratio(rate, _tok_s(plain)),
        "acceptance_length": ratio(sum(r.decode_tokens for r in runs), sum(len(r.step_s) for r in runs)),
        "texts_equal_share": equal_share(runs, plain),
        "ttft_ms_p50": median_ms([r.ttft_s for r in runs]),
        "step_ms_p50": median_ms([t for r in runs for t in r.step_s]),
        "draft_ms_p50": median_ms([t for r in runs for t in r.draft_s]),
        "verify_ms_p50": median_ms([t for r in runs for t in r.verify_s]),
        "drafting_steps_share": ratio(seen.num_drafting_steps, seen.num_steps),
        "nodes_per_step": ratio(seen.num_drafted + seen.num_steps, seen.num_steps),
    }
    rounded = {key: round(x, 4) if isinstance(x, float) else x for key, x in figures.items()}
    return rounded | {"by_depth": seen.by_depth(), "by_rank": seen.by_rank()}


def _tok_s(runs: Iterable[Run]) -> float | None:
    pairs = [(run.decode_tokens, run.decode_s) for run in runs]
    return ratio(sum(tokens for tokens, _ in pairs), sum(seconds for _, seconds in pairs))


def report(rows: Sequence[Row], cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One object per cell: its setting, the figures over all prompts, and ``kinds`` (the same per kind)."""
    plain = {cell.temperature: cell.name for cell in cells if cell.baseline}
    kinds = dict.fromkeys(row.prompt.kind for row in rows)
    found = []
    for cell in cells:

        def figures(some: Sequence[Row], cell: Cell = cell) -> dict[str, Any]:
            runs = [row.runs[cell.name] for row in some]
            return summarise(runs, [row.runs[plain[cell.temperature]] for row in some])

        setting = {
            "shape": cell.shape.name,
            "family": cell.shape.family,
            "temperature": cell.temperature,
            "shared_noise": cell.shared_noise,
        }
        by_kind = {kind: figures([row for row in rows if row.prompt.kind == kind]) for kind in kinds}
        found.append(setting | figures(rows) | {"kinds": by_kind})
    return found
