"""The host's share of a step: ``python -m perf.host_cost [MODEL] [--users 16]``.

The server runs in this process as it does in ``haast serve``, the engine on its own thread; the users are
another process. For some seconds with every user busy, explicit timers take apart the engine's thread (by the
clock: a step waits for its phases) and the event loop's (by processor time: it works beside the step):

    models        the target's forward, the head's forwards, moving accepted KV rows
    choosing      the sampler, tensor work over the vocabulary
    engine host   scheduling, growing trees, observing, committing, the rest of the step, between steps
    event loop    detokenising, building events, writing them (all else that the loop's thread did)

Then, in process, what the host does per step at a short and a long context; both ought to be equal. With it
comes the longest list that was made of a tensor or into one, to be held against context and vocabulary.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import uvloop
from aiohttp import web
from rich.console import Console
from rich.table import Table

from draft.head import FeatureDraft
from engine.build import Served
from engine.cli.options import add_engine_arguments, open_engine
from engine.cli.parser import Parser
from engine.core import Request, SamplingParams
from engine.errors import ConfigError, EngineError
from engine.server.lifecycle import app_runner
from engine.server.output import Output
from engine.server.replies import Envelope
from engine.server.state import ServerOptions, ServerState
from engine.step import Engine
from perf.closed_loop import clear
from perf.provenance import provenance
from perf.stopwatch import LargestList, Stopwatch, Timed

GROUPS = {
    "models": ("target", "head", "compact"),
    "choosing": ("sample",),
    "engine host": ("schedule", "propose", "observe", "commit", "rest of step", "between steps"),
    "event loop": ("detokenise", "build events", "write events"),
}
HOST = (*GROUPS["engine host"], *GROUPS["event loop"])
_WARM_UP = 3.0  # seconds after the users have begun
_CONTEXT_STEPS = 48  # decode steps measured at each context; the first few of them are left out
_SKIPPED = 4


def engine_calls(engine: Engine) -> list[Timed]:
    """The phases of a step, and the head's network inside them."""
    calls: list[Timed] = [
        (engine, "step", "rest of step"),
        (engine.decoding, "sampler", "sample"),
        (engine.scheduler, "next_batches", "schedule"),
        (engine.scheduler, "commit", "commit"),
        (engine.target, "score", "target"),
        (engine.target, "compact", "compact"),
        (engine.draft, "propose", "propose"),
        (engine.draft, "observe", "observe"),
    ]
    if isinstance(engine.draft, FeatureDraft):
        calls += [(engine.draft.model, name, "head") for name in ("extend", "forward", "logits", "offers")]
    return calls


LOOP_CALLS: tuple[Timed, ...] = ((Output, "push", "detokenise"), (Envelope, "chunk", "build events"))


# --- behind a server ------------------------------------------------------------------------------------


async def behind_server(served: Served, args: argparse.Namespace) -> dict[str, Any]:
    """Serve the users for a while and take the time apart. Raises ConfigError if they do not come."""
    state = ServerState(ServerOptions(port=0))
    runner = app_runner(state)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    steps, loop = Stopwatch(), Stopwatch(time.thread_time)
    try:
        with steps.on(*engine_calls(served.engine)), loop.on(*LOOP_CALLS):
            serving = state.begin(served)
            host, port = runner.addresses[0][:2]
            words = (f"http://{host}:{port}", args.users, args.max_tokens, args.temperature)
            users = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "perf.chat_users", *map(str, words)
            )
            try:
                await _all_busy(served.engine, args.users, users)
                before = await _reading(steps, loop)
                await asyncio.sleep(args.seconds)
                after = await _reading(steps, loop)
            finally:
                if users.returncode is None:
                    users.terminate()
                await users.wait()
                await serving.runner.stop()
                serving.close()
    finally:
        await runner.cleanup()
    after.subtract(before)
    return {"users": args.users, **accounts(after)}


async def _all_busy(engine: Engine, users: int, process: asyncio.subprocess.Process) -> None:
    while engine.num_running < users:
        if process.returncode is not None:
            raise ConfigError(f"the users' process ended with {process.returncode} before all had begun")
        await asyncio.sleep(0.05)
    await asyncio.sleep(_WARM_UP)


async def _reading(steps: Stopwatch, loop: Stopwatch) -> Counter[str]:
    """All accounts as they are when the next step begins: a phase is booked when it ends, and a reading in
    the middle of one would miss its first part."""
    number = steps.calls["rest of step"]
    while steps.calls["rest of step"] == number:
        await asyncio.sleep(0.0005)
    reading: Counter[str] = Counter(steps.seconds)
    reading.update(loop.seconds)
    reading.update({"clock": time.perf_counter(), "loop cpu": time.thread_time()})
    reading["steps"] = steps.calls["rest of step"]
    return reading


def accounts(spent: Mapping[str, float]) -> dict[str, Any]:
    """From what was spent in a window to milliseconds per step and shares of its time.

    spent: seconds by account, with ``clock`` (all that passed), ``loop cpu`` (the event loop's thread) and
    ``steps`` (their number).
    """
    whole = spent["clock"]
    seconds = {name: spent.get(name, 0.0) for names in GROUPS.values() for name in names}
    on_engine = [name for group in ("models", "choosing", "engine host") for name in GROUPS[group]]
    seconds["between steps"] = whole - sum(seconds[name] for name in on_engine)
    seconds["write events"] = spent["loop cpu"] - seconds["detokenise"] - seconds["build events"]
    return {
        "seconds": round(whole, 2),
        "steps": int(spent["steps"]),
        "step_ms": round(1e3 * whole / spent["steps"], 3),
        "ms_per_step": {name: round(1e3 * value / spent["steps"], 4) for name, value in seconds.items()},
        "share": {name: round(value / whole, 4) for name, value in seconds.items()},
        "group_share": {
            group: round(sum(seconds[name] for name in names) / whole, 4) for group, names in GROUPS.items()
        },
        "host_share": round(sum(seconds[name] for name in HOST) / whole, 4),
        "host_and_choosing_share": round(sum(seconds[name] for name in (*HOST, "sample")) / whole, 4),
    }


# --- by context -----------------------------------------------------------------------------------------


def by_context(
    engine: Engine, contexts: Sequence[int], users: int, temperature: float
) -> list[dict[str, Any]]:
    """The engine host's milliseconds per decode step with so many users at each context; the engine is idle
    before and after."""
    return [at_context(engine, context, users, temperature) for context in contexts]


def at_context(engine: Engine, context: int, users: int, temperature: float) -> dict[str, Any]:
    """As above for one context, in tokens of the prompt."""
    chance = random.Random(context)
    sampling = SamplingParams(
        temperature=temperature, max_tokens=engine.config.max_model_len - context, ignore_eos=True
    )
    for number in range(users):
        prompt = tuple(chance.randrange(engine.target.vocab_size) for _ in range(context))
        engine.add(Request(number, prompt, sampling))
    started = 0
    while started < users:  # the prompts
        started += sum(not delta.is_decode and bool(delta.token_ids) for delta in engine.step())
    watch, lists = Stopwatch(), LargestList()
    with watch.on(*engine_calls(engine)), lists.watched():
        for _ in range(_SKIPPED):
            engine.step()
        before = Counter(watch.seconds)
        for _ in range(_CONTEXT_STEPS - _SKIPPED):
            engine.step()
    clear(engine, range(users))
    watch.seconds.subtract(before)
    num_steps = _CONTEXT_STEPS - _SKIPPED
    spent = {name: round(1e3 * watch.seconds[name] / num_steps, 4) for name in watch.seconds}
    host = [name for name in GROUPS["engine host"] if name in spent]
    return {
        "context": context,
        "users": users,
        "host_ms": round(sum(spent[name] for name in host), 4),
        "ms_per_step": spent,
        "longest_list": lists.most,
    }


# --- the command ----------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns the exit code."""
    parser = Parser(prog="python -m perf.host_cost", description=(__doc__ or "").split("\n")[0])
    add_engine_arguments(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument("--users", type=int, default=16, metavar="C", help="of the server, all busy")
    group.add_argument("--seconds", type=float, default=20.0, help="of the server's measurement")
    group.add_argument("--max-tokens", type=int, default=128, metavar="N", help="longest answer")
    group.add_argument("--temperature", type=float, default=0.0)
    group.add_argument("--contexts", type=int, nargs="+", default=[200, 1800], metavar="TOKENS")
    group.add_argument("--context-users", type=int, default=4, metavar="C", help="at each context")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's choice")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")
    args = parser.parse_args(argv)
    try:
        _check(args)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        served = open_engine(args)
        contexts = by_context(served.engine, args.contexts, args.context_users, args.temperature)
        result = uvloop.run(behind_server(served, args))
    except EngineError as error:
        sys.stderr.write(f"host_cost: error: {error}\n")
        return 1
    config = served.engine.config
    facts = {"model": served.name, "draft": served.draft_name, "vocab_size": served.engine.target.vocab_size}
    result = {"benchmark": "host_cost", **facts, "temperature": args.temperature, **result}
    result |= {"contexts": contexts, **provenance(config.device, config.dtype_name)}
    show(result)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises ConfigError naming the flag that cannot be."""
    for flag in ("users", "max_tokens", "context_users", "threads"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} is {value}, expected at least 1")
    if args.seconds <= 0:
        raise ConfigError(f"--seconds is {args.seconds}, expected more than 0")
    if max(args.users, args.context_users) > args.max_num_seqs:
        raise ConfigError(
            f"--users is {args.users} and --context-users {args.context_users}, expected at most "
            f"--max-num-seqs, which is {args.max_num_seqs}"
        )
    most = args.max_model_len - 17 * _CONTEXT_STEPS // 4  # room for the answers of the steps measured
    if not 1 <= min(args.contexts) <= max(args.contexts) <= most:
        raise ConfigError(f"--contexts is {args.contexts}, expected 1 to {most} at this --max-model-len")
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise ConfigError(f"--json {args.json}: the directory does not exist")


def show(result: Mapping[str, Any]) -> None:
    """Print two tables."""
    console = Console(highlight=False)
    table = Table("group", "part")
    for title in ("ms a step", "share"):
        table.add_column(title, justify="right")
    for group, names in GROUPS.items():
        table.add_row(group, "", "", f"{result['group_share'][group]:.1%}", style="bold")
        for name in names:
            table.add_row("", name, f"{result['ms_per_step'][name]:.3f}", f"{result['share'][name]:.1%}")
    table.caption = (
        f"{result['users']} users, {result['step_ms']:.1f} ms a step, {result['steps']} steps; the host "
        f"takes {result['host_share']:.1%}, with choosing {result['host_and_choosing_share']:.1%}"
    )
    console.print(table)
    phases = [name for name in GROUPS["engine host"] if name in result["contexts"][0]["ms_per_step"]]
    table = Table("context", *phases, "engine host", "longest list")
    for row in result["contexts"]:
        parts = [f"{row['ms_per_step'][name]:.3f}" for name in phases]
        table.add_row(str(row["context"]), *parts, f"{row['host_ms']:.3f}", str(row["longest_list"]))
    table.caption = f"ms a decode step, {result['contexts'][0]['users']} users"
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
