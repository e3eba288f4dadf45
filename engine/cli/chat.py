"""``haast chat``: a conversation in the terminal, with a model in process or with a server (``--url``)."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from engine.cli.client import session, stream_chat
from engine.cli.local import LocalEngine
from engine.cli.options import add_engine_arguments, open_engine
from engine.cli.sampling import add_sampling_arguments, sampling_fields
from engine.errors import EngineError
from engine.server import protocol
from engine.server.metrics import summarise
from engine.server.prepare import Preparer

_HELP = "/reset forgets the conversation, /quit ends (or ctrl-D); ctrl-C stops an answer\n"


class Partner(Protocol):
    """Whoever answers: takes a request body, shows pieces of text, returns the whole text and the metrics."""

    def __call__(
        self, body: dict[str, object], show: Callable[[str], object]
    ) -> tuple[str, dict[str, Any]]: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``haast chat``."""
    add_engine_arguments(parser)
    add_sampling_arguments(parser, temperature=0.7, max_tokens=None)
    group = parser.add_argument_group("chat")
    group.add_argument("--url", help="talk to this server instead of loading a model")
    group.add_argument("--api-key", default=argparse.SUPPRESS, help="the server's key (or HAAST_API_KEY)")
    group.add_argument("--system", metavar="TEXT", help="system prompt")
    group.add_argument("-q", "--question", metavar="TEXT", help="ask this one question and end")
    group.add_argument("--stats", action="store_true", help="show speed and acceptance after each answer")


def run(args: argparse.Namespace) -> int:
    """Talk until the user leaves. Returns 0, or 1 if the one question could not be answered."""
    partner = _remote(args) if args.url else _local(args)
    conversation: list[dict[str, str]] = [{"role": "system", "content": args.system}] if args.system else []
    if args.question is not None:
        _ask(partner, args, [*conversation, {"role": "user", "content": args.question}])
        return 0
    opening = list(conversation)
    sys.stderr.write(_HELP)
    while True:
        line = _read_line()
        if line is None or line in ("/quit", "/exit"):
            return 0
        if line == "/reset":
            conversation = list(opening)
        elif line.startswith("/"):
            sys.stderr.write(_HELP)
        elif line:
            asked = [*conversation, {"role": "user", "content": line}]
            try:
                answer = _ask(partner, args, asked)
            except EngineError as error:  # a refusal ends the turn, not the conversation
                sys.stderr.write(f"error: {error}\n")
            except KeyboardInterrupt:
                sys.stderr.write("\n(stopped; this turn is forgotten)\n")
            else:
                conversation = [*asked, {"role": "assistant", "content": answer}]


def _read_line() -> str | None:
    """A line from the user; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return None


def _ask(partner: Partner, args: argparse.Namespace, messages: list[dict[str, str]]) -> str:
    text, metrics = partner({"messages": messages, **sampling_fields(args)}, _show)
    sys.stdout.write("\n")
    sys.stdout.flush()
    if args.stats:
        sys.stderr.write(_stats_line(metrics))
    return text


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _stats_line(metrics: dict[str, Any]) -> str:
    def number(value: float | None, pattern: str) -> str:
        return "-" if value is None else pattern.format(value)

    speculation = metrics.get("speculative_decoding") or {}
    return (
        f"[TTFT {number(metrics.get('time_to_first_token_ms'), '{:.0f} ms')}, "
        f"TPOT {number(metrics.get('mean_itl_ms'), '{:.1f} ms')}, "
        f"{number(metrics.get('tokens_per_second'), '{:.1f}')} tok/s, acceptance length "
        f"{number(speculation.get('mean_acceptance_length'), '{:.2f}')}]\n"
    )


def _local(args: argparse.Namespace) -> Partner:
    served = open_engine(args)
    preparer, engine = Preparer(served.tokenizer, served.engine.config), LocalEngine(served)

    def answer(body: dict[str, object], show: Callable[[str], object]) -> tuple[str, dict[str, Any]]:
        [request] = preparer.chat(protocol.decode_chat(msgspec.json.encode(body)))
        output = None
        for progress in engine.stream(request):
            output = progress.output
            if progress.text:
                show(progress.text)
        assert output is not None
        metrics: dict[str, Any] = msgspec.to_builtins(summarise([output.stats]))
        return output.text, metrics

    return answer


def _remote(args: argparse.Namespace) -> Partner:
    key = getattr(args, "api_key", os.environ.get("HAAST_API_KEY"))

    async def stream(body: dict[str, object], show: Callable[[str], object]) -> tuple[str, dict[str, Any]]:
        async with session(args.url, key) as http:
            answer = await stream_chat(http, body, show)
        return answer.text, answer.metrics

    def answer(body: dict[str, object], show: Callable[[str], object]) -> tuple[str, dict[str, Any]]:
        model = {"model": args.model} if args.model else {}
        return asyncio.run(stream({**body, **model}, show))

    return answer
