"""The command: see ``perf.hardship``. Exit code 1 if anything was not as it should be."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.table import Table

from engine.cli.client import session
from engine.cli.parser import Parser
from engine.errors import EngineError
from perf import document
from perf.hardship.census import Census, Observer
from perf.hardship.failures import broken_step, dead_engine
from perf.hardship.process import SERVE, serving
from perf.hardship.questions import questions
from perf.hardship.stage import QUICK, Findings, Scale, Stage
from perf.hardship.trials import TRIALS, Trial, fuzzing
from perf.provenance import machine

BROKEN: Final = ("perf.hardship.broken_server",)
# Bytes that the server may keep from all trials, which it went through before. It was 7 to 34 MB, up and
# down: what the allocator makes of bodies and answers that come and go. 700 requests that leave 100 kB each
# would be more.
MOST_GROWTH: Final = 64 << 20
_PATIENCE_S: Final = 10.0  # for everything to be let go


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything, print the table and the JSON. Returns the exit code."""
    parser = Parser(prog="python -m perf.hardship", description="What a server goes through.")
    parser.add_argument("--quick", action="store_true", help="a little of everything, in seconds")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of questions, moments and nonsense")
    document.add_json_argument(parser)
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="of haast serve, the model among them")
    args = parser.parse_args(argv)
    try:
        result = asyncio.run(run(args.flags, QUICK if args.quick else Scale(), args.seed))
    except EngineError as error:
        sys.stderr.write(f"hardship: error: {error}\n")
        return 1
    _show(result)
    document.write(result, args.json)
    return 0 if result["holds"] else 1


async def run(flags: Sequence[str], scale: Scale, seed: int) -> dict[str, Any]:
    """All trials on a server, then all failures on another. flags: of ``haast serve``.

    The server goes through a little of everything first, so that what it builds once and keeps (threads,
    compiled grammars, the allocator's arenas) is there when it is counted. Raises ServerError if a server
    does not start.
    """
    limits = [
        *("--max-num-seqs", str(scale.num_seqs), "--max-num-queued-reqs", str(scale.num_queued)),
        *("--max-model-len", "512", "--dtype", "float32", "--kv-cache-memory", "96MiB"),
    ]
    result: dict[str, Any] = {"benchmark": "hardship", "seed": seed, "scale": dataclasses.asdict(scale)}
    async with _stage([*limits, *flags], SERVE, scale, seed) as stage:
        result |= await _about(stage.observer)
        rows = [await _row("each alone", stage, Stage.learn_truth)]
        truth, lone_s = stage.truth, stage.lone_s
        small = dataclasses.replace(stage, scale=scale.small())
        for name in TRIALS if scale != QUICK else ("fuzzing", "nonsense"):
            rows.append(await _row(f"{name}, a little", small, TRIALS[name]))
        before = await stage.observer.at_rest(_PATIENCE_S)
        rows += [await _row(name, stage, trial, before) for name, trial in TRIALS.items()]
        rows.append(await _end("end", stage, 0, before))
    async with _stage([*limits, *flags], BROKEN, scale, seed) as stage:
        stage.truth, stage.lone_s = truth, lone_s
        rows.append(await _row("fuzzing, before failures", stage, fuzzing))
        before = await stage.observer.at_rest(_PATIENCE_S)
        rows.append(await _row("broken step", stage, broken_step, before))
        rows.append(await _row("dead engine", stage, dead_engine))
        rows.append(await _end("end of a dead engine", stage, 1))
    return result | {"trials": rows, "holds": not any(row["num_problems"] for row in rows)} | machine()


@asynccontextmanager
async def _stage(
    flags: Sequence[str], module: Sequence[str], scale: Scale, seed: int
) -> AsyncIterator[Stage]:
    """A ready server with all that trials need."""
    async with serving(flags, module) as server, Observer(server.url, server.pid) as observer:
        asked = questions(scale.num_questions, scale.most_tokens, seed)
        yield Stage(server, observer, scale, seed, asked)


async def _about(observer: Observer) -> dict[str, Any]:
    """What the server says of itself."""
    _, body = await observer.get("server_info")
    found = msgspec.json.decode(body)
    keys = ("model", "dtype", "device", "max_model_len", "max_num_seqs", "speculation")
    return {key: found[key] for key in keys}


async def _row(name: str, stage: Stage, trial: Trial, before: Census | None = None) -> dict[str, Any]:
    """Run a trial, with connections of its own, and see what it leaves behind."""
    findings, started = Findings(), time.perf_counter()
    async with session(stage.server.url) as stage.http:
        await trial(stage, findings)
    ended = time.perf_counter()
    row: dict[str, Any] = {"trial": name, "seconds": round(ended - started, 3)}
    if before is not None:
        census = await stage.observer.settled(before, _PATIENCE_S)
        row |= {"settled_s": round(time.perf_counter() - ended, 3), "census": dataclasses.asdict(census)}
        for what, (then, now) in census.leftovers(before).items():
            findings.complain(f"{what}: found {now:g} afterwards, {then:g} before")
    sys.stderr.write(f"{name}: {row['seconds']:.1f} s, {findings.num_problems} problems\n")
    return row | dataclasses.asdict(findings)


async def _end(name: str, stage: Stage, expected: int, before: Census | None = None) -> dict[str, Any]:
    """End a server that works, and look at its memory and its log first; or one that does not."""
    findings = Findings()
    if before is not None:
        findings.figures["census_before"] = dataclasses.asdict(before)
        grown = (await stage.observer.take()).memory - before.memory
        findings.figures["memory_growth_bytes"] = grown
        findings.expect(grown <= MOST_GROWTH, f"memory grew by {grown} bytes, expected at most {MOST_GROWTH}")
        for line in stage.server.complaints:
            findings.complain(f"in the server's log: {line}")
    code = await stage.server.end()
    findings.expect(code == expected, f"the server ended with exit code {code}, expected {expected}")
    return {"trial": name, "seconds": 0.0} | dataclasses.asdict(findings)


def _show(result: dict[str, Any]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    table = Table("trial", "s", "problems", "figures")
    for row in result["trials"]:
        figures = ", ".join(f"{name} {value}" for name, value in row["figures"].items())
        table.add_row(row["trial"], f"{row['seconds']:.1f}", str(row["num_problems"]), figures)
    console.print(table)
    for row in result["trials"]:
        for problem in row["problems"]:
            console.print(f"{row['trial']}: {problem}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
