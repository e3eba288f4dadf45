"""What verification did: times of a step, acceptance by depth, and the per-step log.

The log holds one JSON record per request and decode step (``--spec-log FILE``); ``perf/replay.py`` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import msgspec

from engine.clock import Mark, seconds_between
from engine.core import Batch, DraftTree, Verdict
from engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a step's phases. ``draft_s`` contains scheduling, ``other_s`` choosing, accepting and
    committing."""

    draft_s: float = 0.0
    verify_s: float = 0.0
    other_s: float = 0.0

    @classmethod
    def between(cls, started: Mark, drafted: Mark, scored: Mark, ended: Mark) -> StepTimes:
        """The times between marks."""
        return cls(
            seconds_between(started, drafted),
            seconds_between(drafted, scored),
            seconds_between(scored, ended),
        )

    @property
    def total_s(self) -> float:
        return self.draft_s + self.verify_s + self.other_s


def _state(batch: Batch, row: int, num_nodes: int) -> dict[str, Any]:
    """Whether a sequence speculated in this step, and why or why not."""
    decision = batch.decisions[row] if batch.decisions else None
    state = {
        "speculation": "on" if num_nodes > 1 else "off",
        "reason": decision.reason if decision is not None else None,
    }
    if decision is not None and num_nodes == 1 and not decision.speculation.is_off:
        state["reason"] = f"{decision.reason}: nothing was proposed"
    return state


def step_records(
    step: int, batch: Batch, tree: DraftTree, verdict: Verdict, times: StepTimes
) -> list[dict[str, Any]]:
    """One record per sequence of a decode step; lists are per node, root first."""
    tokens, parents, depths = tree.tokens.tolist(), tree.parents.tolist(), tree.depths().tolist()
    scores = tree.scores
    counts, paths, lengths = tree.real().sum(1).tolist(), verdict.path.tolist(), verdict.length.tolist()
    kv_lens, records = batch.kv_lens.tolist(), []
    for row, seq in enumerate(batch.seqs):
        nodes = slice(0, counts[row])
        record: dict[str, Any] = {
            "step": step,
            "request": seq.request.id,
            "context_len": kv_lens[row] + 1,
            "batch_size": len(batch.seqs),
            "temperature": seq.request.sampling.temperature,
            "tokens": tokens[row][nodes],
            "parents": parents[row][nodes],
            "depth": depths[row][nodes],
            "accepted": paths[row][1 : lengths[row]],
            **_state(batch, row, counts[row]),
            "draft_ms": round(times.draft_s * 1e3, 4),
            "verify_ms": round(times.verify_s * 1e3, 4),
        }
        if scores is not None:
            record |= {
                "rank": scores.rank[row].tolist()[nodes],
                "raw": [round(x, 6) for x in scores.raw[row].tolist()[nodes]],
                "value": [round(x, 6) for x in scores.value[row].tolist()[nodes]],
            }
        records.append(record)
    return records


class StepSink(Protocol):
    """What the engine tells of its decode steps: the file below, or a measurement's memory."""

    def write(self, batch: Batch, tree: DraftTree, verdict: Verdict, times: StepTimes) -> None: ...
    def close(self) -> None: ...


class StepLog:
    """Appends step records to a JSON Lines file."""

    def __init__(self, path: str) -> None:
        try:
            self._file: IO[bytes] = Path(path).open("ab")  # noqa: SIM115 - lives as long as the engine
        except OSError as error:
            raise ConfigError(f"--spec-log {path}: cannot be written ({error.strerror})") from error
        self._step = 0

    def write(self, batch: Batch, tree: DraftTree, verdict: Verdict, times: StepTimes) -> None:
        """Log one decode step."""
        for record in step_records(self._step, batch, tree, verdict, times):
            self._file.write(msgspec.json.encode(record) + b"\n")
        self._file.flush()
        self._step += 1

    def close(self) -> None:
        self._file.close()
