"""Time per token from a step log: what the draft's values promised, and what came of it.

A step takes one time for all requests that share it. It promises, for each of them, one token (the target's
own) and every drafted node with the chance that its path value says; it emits what was accepted and the
target's own token. Hence, over steps that scored about as many nodes,

    predicted   median time of such a step / tokens that it promises on average
    measured    time of all such steps / tokens that they emitted

A planner that multiplies step costs with calibrated acceptance believes the first and gets the second. They
differ where values are wrong, where steps' times have a long tail, and by what prompt lookup brought: its
nodes have no value, so it promises nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean, median
from typing import Any

from perf.step_log import read_records

_BOUNDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)  # nodes scored; past the last: one group


@dataclass(frozen=True, slots=True)
class StepCost:
    """One step, over all requests that shared it."""

    nodes: int  # that the target scored, roots included
    num_seqs: int
    ms: float  # drafting and scoring
    promised: float  # tokens
    emitted: int


def read_costs(path: Path) -> list[StepCost]:
    """The steps of a log written by --spec-log, drafted or not. Raises ConfigError with the line number."""
    records = read_records(path, _checked)
    # Records of a step stand together; a log that was appended to counts from 0 again.
    return [_cost(list(group)) for _, group in groupby(records, key=lambda record: int(record["step"]))]


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    """A record that has all that ``_cost`` reads."""
    _cost([record])
    return record


def _cost(records: Sequence[dict[str, Any]]) -> StepCost:
    return StepCost(
        sum(len(record["parents"]) for record in records),
        len(records),
        float(records[0]["draft_ms"]) + float(records[0]["verify_ms"]),
        sum(1.0 + sum(record.get("value", ())[1:]) for record in records),
        sum(1 + len(record["accepted"]) for record in records),
    )


def time_per_token(costs: Iterable[StepCost]) -> list[dict[str, Any]]:
    """One row for each group of steps that scored about as many nodes; times in ms."""
    groups: dict[int, list[StepCost]] = {}
    for cost in costs:
        bound = next((bound for bound in _BOUNDS if cost.nodes <= bound), cost.nodes)
        groups.setdefault(min(bound, _BOUNDS[-1] + 1), []).append(cost)
    rows = []
    for bound in sorted(groups):
        group = groups[bound]
        promised, emitted = mean(cost.promised for cost in group), mean(cost.emitted for cost in group)
        row = {
            "nodes_up_to": bound if bound <= _BOUNDS[-1] else None,
            "num_steps": len(group),
            "mean_seqs": mean(cost.num_seqs for cost in group),
            "step_ms": median(cost.ms for cost in group),
            "tokens_promised": promised,
            "tokens_emitted": emitted,
            "predicted_ms": median(cost.ms for cost in group) / promised,
            "measured_ms": mean(cost.ms for cost in group) / emitted,
        }
        rows.append(
            {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        )
    return rows
