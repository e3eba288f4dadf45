"""``haast chat``: a conversation in the terminal, with a model in process or with a server (``--url``).

The answer goes to stdout; what the model thinks before it, dimmed, to stderr. Tools can be offered to see
what the model would call; nothing here runs them, so a turn that calls one is shown and forgotten.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from engine.cli.client import session, stream_chat
from engine.cli.loading import open_engine
from engine.cli.local import LocalEngine
from engine.cli.options import add_engine_arguments
from engine.cli.sampling import add_sampling_arguments, sampling_fields
from engine.errors import ConfigError, EngineError
from engine.server import protocol
from engine.server.metrics import summarise
from engine.server.output import Reading
from engine.server.prepare import Preparer
from engine.server.ticket import EngineFailedError
from engine.text.output_parser import (
    Answer,
    Event,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallStart,
    assemble,
)

_HELP = "/reset forgets the conversation, /quit ends (or ctrl-D); ctrl-C stops an answer\n"

Show = Callable[[Event], object]


class Partner(Protocol):
    """Whoever answers: takes a request body, shows what comes, returns the whole answer and the metrics."""

    def __call__(self, body: dict[str, object], show: Show) -> tuple[Answer, dict[str, Any]]: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``haast chat``."""
    add_engine_arguments(parser)
    add_sampling_arguments(parser, temperature=0.7, max_tokens=None)
    group = parser.add_argument_group("chat")
    group.add_argument("--url", help="talk to this server instead of loading a model")
    group.add_argument("--api-key", default=argparse.SUPPRESS, help="the server's key (or HAAST_API_KEY)")
    group.add_argument("--system", metavar="TEXT", help="system prompt")
    group.add_argument("--reasoning-effort", metavar="LEVEL", help="how long to think; what the model knows")
    group.add_argument("--tools", type=Path, metavar="FILE", help="offer the tools of this JSON list")
    group.add_argument("-q", "--question", metavar="TEXT", help="ask this one question and end")
    group.add_argument("--stats", action="store_true", help="show speed and acceptance after each answer")


def run(args: argparse.Namespace) -> int:
    """Talk until the user leaves. Returns 0, or 1 if the one question could not be answered."""
    fields = _fields(args)
    partner = _remote(args) if args.url else _local(args)
    conversation: list[dict[str, str]] = [{"role": "system", "content": args.system}] if args.system else []
    if args.question is not None:
        _ask(partner, fields, [*conversation, {"role": "user", "content": args.question}], args.stats)
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
                answer = _ask(partner, fields, asked, args.stats)
            except EngineError as error:  # a refusal ends the turn, not the conversation
                sys.stderr.write(f"error: {error}\n")
            except KeyboardInterrupt:
                sys.stderr.write("\n(stopped; this turn is forgotten)\n")
            else:
                if answer.calls:
                    sys.stderr.write("(nothing here runs tools; this turn is forgotten)\n")
                elif not (answer.text or answer.reasoning):  # some formats have no place for such a turn
                    sys.stderr.write("(the answer is empty; this turn is forgotten)\n")
                else:
                    conversation = [*asked, _turn(answer)]


def _read_line() -> str | None:
    """A line from the user; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return None


def _fields(args: argparse.Namespace) -> dict[str, object]:
    """The flags as fields of a request body. Raises ConfigError for a file of tools that cannot be read."""
    fields = sampling_fields(args)
    if args.reasoning_effort is not None:
        fields["reasoning_effort"] = args.reasoning_effort
    if args.tools is not None:
        try:
            fields["tools"] = msgspec.json.decode(args.tools.read_bytes(), type=list[dict[str, Any]])
        except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
            raise ConfigError(
                f"--tools {args.tools}: cannot be read as a JSON list of tools: {error}"
            ) from error
    return fields


def _ask(
    partner: Partner, fields: dict[str, object], messages: list[dict[str, str]], with_stats: bool
) -> Answer:
    screen = _Screen()
    try:
        answer, metrics = partner({"messages": messages, **fields}, screen.show)
    finally:
        screen.end()
    if with_stats:
        sys.stderr.write(stats_line(metrics))
    return answer


def _turn(answer: Answer) -> dict[str, str]:
    """An answer as a message of the conversation."""
    thoughts = {"reasoning_content": answer.reasoning} if answer.reasoning else {}
    return {"role": "assistant", "content": answer.text, **thoughts}


class _Screen:
    """Shows one answer as it comes: thoughts, text and calls each begin a line."""

    def __init__(self) -> None:
        self._open = ""  # what the current line belongs to
        self._dim, self._plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")

    def show(self, event: Event) -> None:
        match event:
            case ReasoningDelta(text):
                self._begin("reasoning")
                sys.stderr.write(f"{self._dim}{text}{self._plain}")  # whole, should the next piece not come
                sys.stderr.flush()
                return
            case TextDelta(text):
                self._begin("text")
            case ToolCallStart(index, _, name):
                self._begin(f"call {index}")
                text = f"{name}("
            case ToolCallArguments(_, text):
                pass
        sys.stdout.write(text)
        sys.stdout.flush()

    def end(self) -> None:
        """End the line, if one is open."""
        if self._open:
            stream = sys.stderr if self._open == "reasoning" else sys.stdout
            stream.write(")\n" if self._open.startswith("call") else "\n")
            stream.flush()
        self._open = ""

    def _begin(self, what: str) -> None:
        if what != self._open:
            self.end()
            self._open = what


def stats_line(metrics: dict[str, Any]) -> str:
    """Speed and acceptance of an answer, from its ``metrics``."""

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
    preparer = Preparer(served.tokenizer, served.engine.config, served.grammar_compiler)
    engine = LocalEngine(served)

    def answer(body: dict[str, object], show: Show) -> tuple[Answer, dict[str, Any]]:
        call = protocol.decode_chat(msgspec.json.encode(body))
        [request] = preparer.chat(call)
        output = None
        for progress in engine.stream(request, Reading.of_chat(call.offers_tools)):
            if progress.error is not None:
                raise EngineFailedError(progress.error)
            output = progress.output
            for event in progress.events:
                show(event)
        assert output is not None
        metrics: dict[str, Any] = msgspec.to_builtins(summarise([output.stats]))
        return output.answer, metrics

    return answer


def _remote(args: argparse.Namespace) -> Partner:
    key = getattr(args, "api_key", os.environ.get("HAAST_API_KEY"))

    async def stream(body: dict[str, object], show: Show) -> tuple[Answer, dict[str, Any]]:
        async with session(args.url, key) as http:
            found = await stream_chat(http, body, show)
        return assemble(found.events), found.metrics

    def answer(body: dict[str, object], show: Show) -> tuple[Answer, dict[str, Any]]:
        model = {"model": args.model} if args.model else {}
        return asyncio.run(stream({**body, **model}, show))

    return answer
