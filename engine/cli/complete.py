"""``haast complete [TEXT]``: how a server goes on with a text, without a chat template."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

from engine.cli.chat import stats_line
from engine.cli.client import COMPLETIONS, session, stream_answer
from engine.cli.sampling import add_sampling_arguments, sampling_fields
from engine.errors import ConfigError
from engine.text.output_parser import Event, TextDelta


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``haast complete``."""
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what to go on with; without it, stdin")
    group = parser.add_argument_group("server")
    group.add_argument("--url", default="http://127.0.0.1:8000", help="the server's address")
    group.add_argument("--api-key", default=argparse.SUPPRESS, help="the server's key (or HAAST_API_KEY)")
    group.add_argument("--model", metavar="NAME", help="the model's name there; without it, the only one")
    group.add_argument("--stats", action="store_true", help="show speed and acceptance")
    add_sampling_arguments(parser, temperature=0.7, max_tokens=256)


def run(args: argparse.Namespace) -> int:
    """Stream the completion to stdout. Returns 0. Raises ConfigError or ServerError."""
    text = sys.stdin.read() if args.text is None else args.text
    if not text:
        raise ConfigError("there is no text to go on with; give one as an argument or on stdin")
    body: dict[str, object] = {"prompt": text, **sampling_fields(args)}
    if args.model is not None:
        body["model"] = args.model
    asyncio.run(_complete(args, body))
    return 0


async def _complete(args: argparse.Namespace, body: dict[str, object]) -> None:
    async with session(args.url, getattr(args, "api_key", os.environ.get("HAAST_API_KEY"))) as http:
        answer = await stream_answer(http, COMPLETIONS, body, _show)
    sys.stdout.write("\n")
    if args.stats:
        sys.stderr.write(stats_line(answer.metrics))


def _show(event: Event) -> None:
    if isinstance(event, TextDelta):  # a completion is nothing else
        sys.stdout.write(event.text)
        sys.stdout.flush()
