"""``haast generate``: a file of prompts in, a file of answers out, batched through the engine in process.

Each line of the input is a prompt; if the first line is a JSON object, every line is a request: ``{"prompt":
"..."}`` continues a text, ``{"messages": [...]}`` answers a conversation, and any sampling field of the HTTP
API may stand beside it. The output has one JSON object per request, in the order of the input:

    {"index": 0, "text": "...", "finish_reason": "stop", "usage": {...}, "metrics": {...}}
    {"index": 1, "error": {"message": "...", "type": "...", "param": "prompt", "code": "..."}}

An answer to a conversation also has ``reasoning_content`` and ``tool_calls`` where there are any.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from engine.build import Served
from engine.cli.loading import open_engine
from engine.cli.local import LocalEngine, Progress
from engine.cli.options import add_engine_arguments
from engine.cli.sampling import add_sampling_arguments, sampling_fields
from engine.core import Request
from engine.errors import ConfigError, EngineError, RequestError
from engine.server import faults, protocol
from engine.server.metrics import Metrics, summarise
from engine.server.output import Reading
from engine.server.prepare import Preparer
from engine.server.replies import CalledTool, ErrorBody, Usage
from engine.server.ticket import EngineFailedError


class Answer(msgspec.Struct, omit_defaults=True):
    """One line of the output."""

    index: int
    text: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CalledTool] | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    metrics: Metrics | None = None
    error: ErrorBody | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``haast generate``."""
    add_engine_arguments(parser)
    add_sampling_arguments(parser, temperature=0.0, max_tokens=256)
    group = parser.add_argument_group("files")
    group.add_argument("-i", "--input", default="-", metavar="FILE", help="prompts; - is standard input")
    group.add_argument("-o", "--output", default="-", metavar="FILE", help="answers; - is standard output")
    group.add_argument("--chat", action="store_true", help="plain lines are questions to the chat model")


def run(args: argparse.Namespace) -> int:
    """Answer all prompts. Returns 0, or 1 if a request was refused."""
    bodies = _bodies(_read(args.input), args.chat)
    fields = sampling_fields(args)
    served = open_engine(args)
    num_errors = 0
    with _open_output(args.output) as out:
        for answer in answers(served, [{**fields, **body} for body in bodies]):
            num_errors += answer.error is not None
            out.write(msgspec.json.encode(answer) + b"\n")
            out.flush()
    if num_errors:
        sys.stderr.write(f"haast: {num_errors} of {len(bodies)} requests were refused\n")
    return 1 if num_errors else 0


def answers(served: Served, bodies: list[dict[str, Any]]) -> Iterator[Answer]:
    """Answer request bodies in batches, in order. A refused one becomes an answer with an error."""
    engine = LocalEngine(served)
    preparer = Preparer(served.tokenizer, served.engine.config, served.grammar_compiler)
    window = 2 * served.engine.config.max_num_seqs  # the batch stays full, little is held at once
    done: dict[int, Answer] = {}
    index_of: dict[int, int] = {}
    next_in, next_out = 0, 0
    while next_out < len(bodies):
        while next_in < len(bodies) and engine.num_active < window:
            try:
                output = engine.submit(*_prepare(preparer, bodies[next_in]))
                index_of[output.request.id] = next_in
            except EngineError as error:
                done[next_in] = Answer(next_in, error=faults.reply_of(error).error)
            next_in += 1
        for progress in engine.step() if engine.num_active else ():
            if progress.output.finish_reason is not None:
                index = index_of.pop(progress.output.request.id)
                done[index] = _answer(index, progress)
        while next_out in done:
            yield done.pop(next_out)
            next_out += 1


def _prepare(preparer: Preparer, body: dict[str, Any]) -> tuple[Request, Reading]:
    encoded = msgspec.json.encode(body)
    if "messages" in body:
        call = protocol.decode_chat(encoded)
        _check_alone(call)
        [request] = preparer.chat(call)
        return request, Reading.of_chat(call.offers_tools)
    completion = protocol.decode_completion(encoded)
    _check_alone(completion)
    requests = preparer.completion(completion)
    if len(requests) != 1:
        raise RequestError(f"found {len(requests)} prompts in one line, expected one", "prompt")
    return requests[0], Reading.TEXT


def _check_alone(call: protocol.GenerationRequest) -> None:
    """One answer to a line, without log-probabilities."""
    if call.num_choices != 1:
        raise RequestError(f"n is {call.n}, but a line has one answer; repeat the line", "n")
    if call.num_logprobs is not None:
        raise RequestError("logprobs are reported by `haast serve` only", "logprobs")


def _answer(index: int, progress: Progress) -> Answer:
    if progress.error is not None:
        return Answer(index, error=faults.reply_of(EngineFailedError(progress.error)).error)
    output = progress.output
    num_prompt, answer = len(output.request.prompt), output.answer
    return Answer(
        index,
        answer.text,
        answer.reasoning or None,
        [CalledTool.of(call) for call in answer.calls] or None,
        output.finish_reason,
        Usage(num_prompt, output.num_tokens, num_prompt + output.num_tokens),
        summarise([output.stats]),
    )


def _bodies(text: str, is_chat: bool) -> list[dict[str, Any]]:
    """Request bodies from the lines of the input. Raises ConfigError naming the line."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise ConfigError("the input holds no prompts")
    if not lines[0][1].lstrip().startswith("{"):
        return [
            {"messages": [{"role": "user", "content": line}]} if is_chat else {"prompt": line}
            for _, line in lines
        ]
    bodies = []
    for number, line in lines:
        try:
            body = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ConfigError(f"line {number} of the input is not a JSON object: {error}") from error
        if ("prompt" in body) == ("messages" in body):
            raise ConfigError(
                f"line {number} of the input needs either 'prompt' or 'messages', "
                f"found {', '.join(map(repr, body)) or 'neither'}"
            )
        bodies.append(body)
    return bodies


def _read(name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read --input {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--input {name} is not UTF-8: {error}") from error


def _open_output(name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    if name == "-":
        return contextlib.nullcontext(sys.stdout.buffer)
    try:
        return Path(name).open("wb")
    except OSError as error:
        raise ConfigError(f"cannot write --output {name}: {error.strerror}") from error
