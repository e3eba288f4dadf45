"""``haast demo``: the whole way, from a prompt over HTTP to streamed text, with and without speculation.

Starts ``haast serve`` as a process of its own on a free port, streams one answer at temperature 0 to the
terminal as it arrives, asks the same again with ``speculation: "off"``, and compares. Before each of the two,
a short other request warms that way through the engine up, so that neither pays for first use. Exit code 0
means that everything worked and both texts are equal.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from rich.console import Console
from rich.table import Table

from engine.cli.client import ServerError, StreamedAnswer, session, stream_chat
from engine.cli.environment import PREFIX
from engine.cli.options import add_engine_arguments, engine_config, model_name
from engine.text.output_parser import Event, TextDelta

_PROMPT = "Write a short story about an eagle that learns to trust its wings."
_WARM_UP = {"messages": [{"role": "user", "content": "Name three colours."}], "max_tokens": 16}
_STOP_TIMEOUT = 15.0  # seconds for the server to end after SIGTERM
_PASSED_ON = (
    "device",
    "load_format",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "page_size",
    "kv_cache_dtype",
    "kv_cache_memory",
    "kv_cache_dtype",
    "gpu_memory_utilization",
    "enforce_eager",
    "pdl",
    "enable_prefix_caching",
    "quantization",
    "speculative_config",
    "spec_method",
    "spec_tokens",
    "spec_nodes",
    "spec_depth",
    "spec_lookup",
    "spec_plan",
    "spec_top_k",
    "spec_draft_vocab",
    "spec_max_model_len",
    "spec_log",
    "canary",
    "spec_model",
    "dtype",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``haast demo``."""
    add_engine_arguments(parser, dtype="w16a32")
    group = parser.add_argument_group("demo")
    group.add_argument("--prompt", default=_PROMPT, help="what to ask")
    group.add_argument("--max-tokens", type=int, default=200, metavar="N", help="longest answer")


def run(args: argparse.Namespace) -> int:
    """Run the demo. Returns 0 if all went well and the texts are equal, 1 if they differ (raises on
    failure)."""
    engine_config(args)  # a wrong flag is reported here and not by the server
    try:
        return asyncio.run(_demo(args))
    except asyncio.CancelledError:  # SIGTERM; the server has been ended
        return 143


async def _demo(args: argparse.Namespace) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    body = {
        "messages": [{"role": "user", "content": args.prompt}],
        "max_tokens": args.max_tokens,
        "temperature": 0,
    }
    screen = Console(highlight=False)
    async with _server(args) as url, session(url) as http:
        screen.print(f"\n[bold]{args.prompt}[/bold]\n", markup=True)
        fast = await _measure(http, body, "auto")
        sys.stdout.write("\n\n(the same without speculation)\n\n")
        plain = await _measure(http, body, "off")
        sys.stdout.write("\n\n")
    are_equal = fast.text == plain.text and fast.num_tokens == plain.num_tokens
    screen.print(comparison(fast, plain))
    speedup = plain.tpot / fast.tpot if plain.tpot and fast.tpot else None
    screen.print(f"speed-up (TPOT): {_number(speedup, '{:.2f}x')}")
    screen.print(f"texts equal: {'yes' if are_equal else 'no'}")
    if not are_equal:
        sys.stderr.write(_difference(fast.text, plain.text, args.dtype))
    return 0 if are_equal else 1


async def _measure(http: aiohttp.ClientSession, body: dict[str, object], speculation: str) -> StreamedAnswer:
    """Warm up, then stream the answer to the terminal."""
    await stream_chat(http, {**_WARM_UP, "temperature": 0, "speculation": speculation}, lambda piece: None)
    return await stream_chat(http, {**body, "speculation": speculation}, _show)


def comparison(fast: StreamedAnswer, plain: StreamedAnswer) -> Table:
    """The figures of both answers, as the client measured them; acceptance is the server's."""
    table = Table("", "TTFT ms", "TPOT ms", "tok/s", "tokens", "acceptance length")
    for name, answer in (("speculative", fast), ("plain", plain)):
        tpot = answer.tpot
        table.add_row(
            name,
            _number(None if answer.first_at is None else 1000 * answer.first_at, "{:.0f}"),
            _number(None if tpot is None else 1000 * tpot, "{:.2f}"),
            _number(1 / tpot if tpot else None, "{:.1f}"),
            str(answer.num_tokens),
            _number(answer.acceptance_length, "{:.2f}"),
        )
    return table


@asynccontextmanager
async def _server(args: argparse.Namespace) -> AsyncIterator[str]:
    """A running, ready server; yields its URL and ends it whatever happens. Raises ServerError if it dies."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "engine.cli.main",
        "serve",
        *_serve_flags(args),
        stderr=asyncio.subprocess.PIPE,
        stdin=asyncio.subprocess.PIPE,  # closes when we end, even if we are killed
        env=_environment(),
        start_new_session=True,
    )
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    is_ready = asyncio.Event()
    forward = asyncio.create_task(_forward(process, address, is_ready))
    try:
        await _ready(process, address, forward)
        is_ready.set()
        yield address.result()
        if process.returncode is not None:
            raise ServerError(f"the server died with exit code {process.returncode}")
    finally:
        await _end(process)
        await forward


async def _ready(
    process: asyncio.subprocess.Process, address: asyncio.Future[str], forward: asyncio.Task[None]
) -> None:
    """Wait until /ready says yes."""
    await asyncio.wait((address, forward), return_when=asyncio.FIRST_COMPLETED)
    while not forward.done():
        async with session(address.result()) as http:
            try:
                async with http.get("/ready") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass  # it is going down; its end will show
        await asyncio.wait((forward,), timeout=0.1)
    code = await process.wait()
    raise ServerError(f"the server ended with exit code {code} before it was ready; its last lines say why")


async def _forward(
    process: asyncio.subprocess.Process, address: asyncio.Future[str], is_ready: asyncio.Event
) -> None:
    """Copy the server's log to our stderr, once it is ready its warnings only, and pick its address out."""
    assert process.stderr is not None
    async for raw in process.stderr:
        line = raw.decode("utf-8", "replace")
        if not (is_ready.is_set() and line.startswith("INFO ")):
            sys.stderr.write(line)
        found = re.search(r"Listening on (http://\S+?),? ", line)
        if found and not address.done():
            address.set_result(found[1])


async def _end(process: asyncio.subprocess.Process) -> None:
    """Terminate the server; kill it if it does not listen."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(_STOP_TIMEOUT):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def _serve_flags(args: argparse.Namespace) -> list[str]:
    flags = ["--port", "0", "--shutdown-timeout", "1", "--exit-with-parent"]
    model = model_name(args)
    if model is not None:
        flags += ["--model", model]
    for name in _PASSED_ON:
        value = getattr(args, name)
        flag = f"--{name.replace('_', '-')}"
        if value is False:
            flags.append(f"--no-{flag.removeprefix('--')}")
        elif value is not None:
            flags.append(flag if value is True else f"{flag}={value}")
    return flags


def _environment() -> dict[str, str]:
    """Ours, without values for flags: the shared ones are passed on, and a key, a config file or a log level
    that hides the address are not meant for this server.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(PREFIX) or name == "HAAST_CPU_KERNELS"
    }


def _difference(fast: str, plain: str, dtype: str) -> str:
    at = next(
        (i for i, (left, right) in enumerate(zip(fast, plain, strict=False)) if left != right),
        min(len(fast), len(plain)),
    )
    why = (
        ""
        if dtype in ("float32", "w16a32")
        else (
            f" ({dtype}: other batch shapes round differently, so near-ties may fall differently; "
            "--dtype float32 does not have this)"
        )
    )
    return (
        f"the texts differ from character {at} on{why}:\n  speculative: {fast[at : at + 60]!r}\n"
        f"  plain:       {plain[at : at + 60]!r}\n"
    )


def _show(piece: Event) -> None:
    if isinstance(piece, TextDelta):
        sys.stdout.write(piece.text)
        sys.stdout.flush()


def _number(value: float | None, pattern: str) -> str:
    return "-" if value is None else pattern.format(value)
