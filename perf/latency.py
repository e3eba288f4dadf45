"""Latency of one request at a time, with and without speculation, measured side by side.

Machines drift: other load, clocks, heat. So nothing is measured in one block and then the other; every
prompt runs in all modes right after another, and the order rotates from prompt to prompt. A run is described
by three clocks

    add -> first token            ttft      prefill, and whatever the first step costs
    first token -> last token     decode    tokens after the first event / this time = tok/s
    add -> last token             total     end to end

and a group of runs by sums (tokens / seconds), which weighs every token alike, not by means of rates.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from engine.core import Request
from engine.errors import ConfigError
from engine.step import Engine
from perf.workload import DEFAULT_PROMPTS as DEFAULT_PROMPTS

PLAIN, SPEC = "plain", "spec"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompt set."""

    id: str
    kind: str
    prompt: str


@dataclass(slots=True)
class Run:
    """One answer. Times in seconds; the lists have one entry per decode step and stay empty for a peer, and
    ``records`` (verify.stats.step_records) also where nobody kept them."""

    token_ids: list[int] = field(default_factory=list)
    decode_tokens: int = 0  # tokens after the first event
    ttft_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    draft_s: list[float] = field(default_factory=list)
    verify_s: list[float] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Row:
    """All modes of one prompt in one repeat."""

    prompt: Prompt
    repeat: int
    runs: Mapping[str, Run]


Mode = Callable[[Prompt], Run]


def read_prompts(path: Path) -> list[Prompt]:
    """A JSON Lines file with id, kind and prompt on every line. Raises ConfigError with the line number."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts {path}: cannot be read ({error})") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"prompts {path}, line {number}: not JSON ({error})") from error
        if (
            not isinstance(fields, dict)
            or set(fields) != {"id", "kind", "prompt"}
            or not all(isinstance(value, str) for value in fields.values())
        ):
            raise ConfigError(
                f"prompts {path}, line {number}: expected an object with the strings id, kind "
                f"and prompt, found {line[:80]}"
            )
        prompts.append(Prompt(**fields))
    if not prompts:
        raise ConfigError(f"prompts {path}: no prompt found")
    return prompts


def run_engine(engine: Engine, request: Request, clock: Callable[[], float] = time.perf_counter) -> Run:
    """Answer one request on an otherwise idle engine."""
    run = Run()
    started = before = clock()
    engine.add(request)
    while engine.has_work:
        deltas = engine.step()
        now = clock()
        for delta in deltas:
            if run.token_ids:
                run.decode_tokens += len(delta.token_ids)
            elif delta.token_ids:
                run.ttft_s = now - started
            run.token_ids += delta.token_ids
            if delta.is_decode and delta.token_ids:
                run.step_s.append(now - before)
                run.draft_s.append(engine.last_times.draft_s)
                run.verify_s.append(engine.last_times.verify_s)
        before = now
    run.total_s = before - started
    run.decode_s = run.total_s - run.ttft_s
    return run


def interleave(prompts: Sequence[Prompt], modes: Mapping[str, Mode], repeats: int) -> Iterable[Row]:
    """Run every prompt in every mode; which goes first changes with the prompt and with the repeat."""
    names = list(modes)
    for repeat in range(repeats):
        for number, prompt in enumerate(prompts):
            first = (number + repeat) % len(names)
            runs = {name: modes[name](prompt) for name in names[first:] + names[:first]}
            yield Row(prompt, repeat, {name: runs[name] for name in names})


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of a group of rows: rates in tokens/s, times in ms, None where there is no data."""
    by_mode = {name: [row.runs[name] for row in rows] for name in rows[0].runs}
    summary: dict[str, Any] = {"num_runs": len(rows)}
    for name, runs in by_mode.items():
        tokens = sum(len(r.token_ids) for r in runs)
        summary[f"{name}_tok_s"] = ratio(sum(r.decode_tokens for r in runs), sum(r.decode_s for r in runs))
        summary[f"{name}_e2e_tok_s"] = ratio(tokens, sum(r.total_s for r in runs))
        summary[f"{name}_ttft_ms_p50"] = median_ms([r.ttft_s for r in runs])
        summary[f"{name}_tokens"] = tokens
    plain, spec = by_mode[PLAIN], by_mode[SPEC]
    summary |= {
        "speedup": ratio(summary["spec_tok_s"], summary["plain_tok_s"]),
        "e2e_speedup": ratio(summary["spec_e2e_tok_s"], summary["plain_e2e_tok_s"]),
        "acceptance_length": ratio(sum(r.decode_tokens for r in spec), sum(len(r.step_s) for r in spec)),
        "ttft_ms_p50": summary["spec_ttft_ms_p50"],
        "step_ms_p50": median_ms([t for r in spec for t in r.step_s]),
        "draft_ms_p50": median_ms([t for r in spec for t in r.draft_s]),
        "verify_ms_p50": median_ms([t for r in spec for t in r.verify_s]),
        "plain_step_ms_p50": median_ms([t for r in plain for t in r.step_s]),
        "plain_verify_ms_p50": median_ms([t for r in plain for t in r.verify_s]),
        "texts_equal_share": equal_share(plain, spec),
    }
    for name in by_mode.keys() - {PLAIN, SPEC}:
        summary[f"plain_vs_{name}"] = ratio(summary["plain_tok_s"], summary[f"{name}_tok_s"])
        summary[f"spec_vs_{name}"] = ratio(summary["spec_tok_s"], summary[f"{name}_tok_s"])
        summary[f"{name}_texts_equal_share"] = equal_share(plain, by_mode[name])
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in summary.items()}


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """Summary over all rows, ``kinds`` (the same per kind) and ``speedup_by_repeat`` (how noisy it was)."""
    kinds = list(dict.fromkeys(row.prompt.kind for row in rows))
    repeats = sorted({row.repeat for row in rows})
    return summarise(rows) | {
        "speedup_by_repeat": [
            summarise([row for row in rows if row.repeat == repeat])["speedup"] for repeat in repeats
        ],
        "kinds": {kind: summarise([row for row in rows if row.prompt.kind == kind]) for kind in kinds},
    }


def per_prompt(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One small object per row, for a closer look."""
    found = []
    for row in rows:
        summary = summarise([row])
        keep = (
            "plain_tok_s",
            "spec_tok_s",
            "speedup",
            "acceptance_length",
            "texts_equal_share",
            "spec_tokens",
        )
        found.append({"id": row.prompt.id, "repeat": row.repeat} | {key: summary[key] for key in keep})
    return found


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """None where either is missing or the denominator is 0."""
    return numerator / denominator if numerator is not None and denominator else None


def median_ms(seconds: Sequence[float]) -> float | None:
    """In milliseconds; None of nothing."""
    return median(seconds) * 1e3 if seconds else None


def equal_share(left: Sequence[Run], right: Sequence[Run]) -> float:
    """Share of prompts whose answers are the same, token for token."""
    return sum(a.token_ids == b.token_ids for a, b in zip(left, right, strict=True)) / len(left)
