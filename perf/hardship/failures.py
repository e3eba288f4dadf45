"""What happens to a server whose engine breaks: see ``perf.hardship.broken_server``."""

from __future__ import annotations

import asyncio
from collections import Counter

from perf.hardship.broken_server import BREAK_STEP, END_THREAD
from perf.hardship.client import Outcome, ask, completion
from perf.hardship.stage import Findings, Stage


async def broken_step(stage: Stage, findings: Findings) -> None:
    """A step raises: what ran fails and says so, what waited goes on, and so does the server."""
    outcomes = await _beside(stage, BREAK_STEP, findings)
    fates = Counter("request_failed" if outcome.code else "complete" for _, outcome in outcomes)
    for number, outcome in outcomes:
        if outcome.code != "request_failed":
            stage.judge(number, outcome, findings)
        findings.expect(outcome.has_ended, f"{stage.describe(number)}: the stream has no end mark")
    most = stage.scale.num_seqs
    findings.expect(
        fates["request_failed"] <= most,
        f"{fates['request_failed']} others failed, expected at most the {most} that ran",
    )
    for number in range(len(stage.questions)):
        stage.judge(number, await stage.ask(number), findings)
    metrics = await stage.observer.metrics()
    failed = metrics["haast:failed_steps_total"]
    findings.expect(failed == 1, f"found {failed} failed steps, expected 1")
    status, _ = await stage.observer.get("health")
    findings.expect(status == 200, f"/health: found status {status}, expected 200")
    findings.figures |= {"others": dict(fates), "health": status}


async def dead_engine(stage: Stage, findings: Findings) -> None:
    """The engine's thread ends: everything in flight is told, then the server ends by itself, and its exit
    code says why."""
    outcomes = await _beside(stage, END_THREAD, findings)
    fates = Counter(outcome.code or "complete" for _, outcome in outcomes)
    for number, outcome in outcomes:
        if outcome.code not in ("engine_failed", "engine_dead"):
            stage.judge(number, outcome, findings)
        findings.expect(outcome.has_ended, f"{stage.describe(number)}: the stream has no end mark")
    code = await stage.server.ended()
    findings.expect(code == 1, f"the server ended with exit code {code}, expected 1, and no signal")
    findings.figures |= {"others": dict(fates), "exit_code": code}


async def _beside(stage: Stage, fault: int, findings: Findings) -> list[tuple[int, Outcome]]:
    """Ask all questions that find a place at once, the fault among the first; returns what became of the
    others."""
    others = [number for number, question in enumerate(stage.questions) if "n" not in question.body]
    others = others[: stage.scale.capacity - 1]
    faulty = completion("Once upon a time", max_tokens=32, ignore_eos=True, temperature=0, seed=fault)
    first, *outcomes = await asyncio.gather(
        ask(stage.http, faulty, stream=True), *(stage.ask(number) for number in others)
    )
    findings.expect(first.code is not None, "the request that broke the engine ended without an error")
    return list(zip(others, outcomes, strict=True))
