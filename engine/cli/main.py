"""``haast VERB ...``: finds the verb's module and hands over.

Only the module of the verb that was asked for is imported, so that help and mistakes answer at once and not
after torch has been loaded.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from engine.cli.parser import Parser as Parser

VERBS = {
    "serve": "HTTP server with OpenAI's API",
    "chat": "talk to a model, in process or through a server",
    "complete": "how a server goes on with a text",
    "generate": "answer a file of prompts, JSONL out",
    "check": "say what a model is and which GPUs hold it, from its headers",
    "bench": "measure speed",
    "train": "train a draft head for a model",
    "env": "versions and hardware, for a report of a problem",
    "demo": "one answer over HTTP, with and without speculation",
    "synth": "write a random model in a published format, for tests and measurements",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (``sys.argv`` by default) and return the exit code: 0, 1 failed, 2 wrong usage, 130
    ^C."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "--help=all", "help"):
        sys.stdout.write(_help())
        return 0 if words else 2
    if words[0] in ("--version", "version"):
        from engine.server.version import version

        sys.stdout.write(f"haast {version()}\n")
        return 0
    verb = words[0]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(VERBS)}"
        return _fail(f"unknown verb {verb!r}; {hint}", 2)
    return _run(verb, words[1:])


def _run(verb: str, words: list[str]) -> int:
    from engine.errors import EngineError

    try:
        module = importlib.import_module(f"engine.cli.{verb}")
        parser = Parser(prog=f"haast {verb}", description=VERBS[verb] + ".")
        module.add_arguments(parser)
        code: int = module.run(parser.parse_args(words))
    except EngineError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:  # our reader left, as `head` does; keep the interpreter from writing again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return 130
    return code


def _help() -> str:
    width = max(map(len, VERBS)) + 2
    lines = "".join(f"  {verb:<{width}}{what}\n" for verb, what in VERBS.items())
    return (
        "usage: haast VERB [MODEL] [flags]\n\n"
        "A latency-first engine for large language models with Eagle speculative decoding.\n\n"
        f"{lines}\n`haast VERB --help` lists the flags of a verb; `haast --version`.\n"
    )


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"haast: error: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
