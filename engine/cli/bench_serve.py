"""``haast bench serve``: load on any server with OpenAI's API, with the flags and result keys of vLLM's.

The flags are in ``bench_serve_plan.py``, the prompts in ``perf/workload.py``, the sending in
``perf/load.py``, the figures in ``perf/serving.py``; here is the order of events. With ``--compare`` the same
prompts go to a second server as well, or to the same one with other fields in the request
(``--compare-extra-body '{"speculation": "off"}'``); where that server keeps prefixes, a ``cache_salt`` among
those fields keeps the second from finding what the first has left.

Exit code 0 means that all requests were answered. Otherwise it is 1, and what was measured is reported all
the same.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import Progress

from engine.cli import bench_serve_report as report
from engine.cli.bench_serve_plan import SAMPLING, Plan, check
from engine.cli.bench_serve_plan import add_arguments as add_arguments
from engine.cli.client import model_names, session
from engine.errors import ConfigError

if TYPE_CHECKING:
    from perf.load import Endpoint, Part, Trace
    from perf.workload import Ask

ABOUT = "load on any server with OpenAI's API: throughput and latencies as vLLM measures them"


@dataclass(frozen=True, slots=True)
class Target:
    """A server that is ready."""

    url: str
    model: str
    endpoint: Endpoint


def run(args: argparse.Namespace) -> int:
    """Measure, print tables and the result. Raises ConfigError or ServerError before the measurement."""
    plan = check(args)
    if args.save_result:
        args.result_dir.mkdir(parents=True, exist_ok=True)
    for flag in ("tokenizer", "tokenizer_mode"):
        if getattr(args, flag) is not None:
            _note(f"--{flag.replace('_', '-')}: no effect, tokens are counted by the server")
    targets, parts = asyncio.run(_bench(args, plan))
    result, detailed = report.results(args, plan, targets, parts)
    report.show(result)
    if args.plot is not None:
        report.plot(args.plot, result, parts)
    if args.save_result:
        report.save(args, detailed if args.save_detailed else result)
    sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
    runs = [result, *([result["compare"]] if "compare" in result else [])]
    return 1 if any(one["failed"] or one["not_sent"] for one in runs) else 0


async def _bench(args: argparse.Namespace, plan: Plan) -> tuple[list[Target], list[list[Part]]]:
    """The servers, and the parts of each."""
    from perf import load

    rng = np.random.default_rng([args.seed, 1])
    first_url = args.base_url or f"http://{args.host}:{args.port}"
    extra = args.extra_body or {}
    wanted = [(first_url, extra)]
    if args.compare is not None or args.compare_extra_body is not None:
        wanted.append((args.compare or first_url, extra | (args.compare_extra_body or {})))
    async with AsyncExitStack() as stack:
        targets = [await _open(stack, args, plan, url, fields) for url, fields in wanted]
        cuts = np.linspace(0, len(plan.asks), plan.num_blocks + 1).round().astype(int)
        blocks = [plan.asks[start:end] for start, end in pairwise(cuts)]
        gc.collect()
        gc.freeze()  # a full collection of all that is loaded would stop the clock for tens of milliseconds
        with _progress(len(plan.asks) * len(targets), args.disable_tqdm) as advance:
            parts = await load.alternate(
                blocks,
                [target.endpoint.send for target in targets],
                lambda num: load.arrivals(num, args.request_rate, args.burstiness, rng),
                rng,
                args.max_concurrency,
                advance,
            )
        gc.unfreeze()
    return targets, parts


async def _open(
    stack: AsyncExitStack, args: argparse.Namespace, plan: Plan, url: str, extra: dict[str, Any]
) -> Target:
    """A session to a server that is ready and warm. Raises ServerError."""
    from perf.load import Endpoint, patiently
    from perf.workload import Ask

    http = await stack.enter_async_context(session(url, plan.api_key, plan.headers))
    name = args.served_model_name or args.model

    async def first_model() -> str:
        models = await model_names(http)
        if not models:
            raise ConfigError(f"{url} lists no model, expected one, or --model")
        return models[0]

    model = name or await patiently(first_model, args.ready_check_timeout_sec, _note)
    fields = {"model": model} | {key: value for key in SAMPLING if (value := getattr(args, key)) is not None}
    if args.ignore_eos or args.dataset_name == "random":
        fields["ignore_eos"] = True
    endpoint = Endpoint(http, plan.path, fields | extra, args.request_timeout)

    async def warm_up(ask: Ask) -> None:
        # other words in front: a prompt that comes again later must not be in a prefix cache by then
        trace = await endpoint.send(Ask("Warm-up. " + ask.prompt, ask.kind, ask.output_len), 0.0)
        if trace.error is not None:
            raise trace.error

    for number in range(args.num_warmups):
        ask = plan.asks[number % len(plan.asks)]
        await patiently(partial(warm_up, ask), args.ready_check_timeout_sec, _note)
    return Target(url, model, endpoint)


@contextmanager
def _progress(total: int, is_off: bool) -> Iterator[Any]:
    """A function that counts a finished request, on a bar if stderr is a terminal."""
    console = Console(stderr=True)
    off = is_off or not console.is_terminal
    failed = 0
    with Progress(console=console, transient=True, disable=off, refresh_per_second=2) as bar:
        task = bar.add_task("Measuring", total=total)

        def advance(trace: Trace) -> None:
            nonlocal failed
            failed += trace.error is not None
            bar.update(task, advance=1, description=f"Measuring, {failed} failed" if failed else "Measuring")

        yield advance


def _note(text: str) -> None:
    sys.stderr.write(f"haast bench serve: {text}\n")
