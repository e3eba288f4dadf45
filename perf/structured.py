"""Does speculation pay on JSON? ``python -m perf.structured [MODEL] [--rounds N] [--json FILE]``.

Questions are answered under JSON schemas in four modes, in turns: plainly without a grammar, for comparison;
plainly with it; with a draft that does not know of the grammar; and with one that does. All three with the
grammar must give the same answers, and these must be whole JSON values. The acceptance length is that of
steps which drafted, forced tokens not counted; tokens per step are those of all steps behind the first token.

Exit code 1 if an answer differs or is cut. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from engine.build import Served
from engine.cli.loading import open_engine
from engine.cli.options import add_engine_arguments
from engine.cli.parser import Parser
from engine.core import SPECULATION_OFF, Batch, DraftTree, Grammar, Request, SamplingParams, Speculation
from engine.errors import ConfigError, EngineError
from engine.roles import Draft, DraftMask
from engine.text.conversation import conversation_ids
from perf import document

_TEXT: Final = {"type": "string", "maxLength": 40}


def _schema(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_LINE: Final = _schema(product=_TEXT, quantity={"type": "integer", "minimum": 1, "maximum": 99})
TASKS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    (
        "Invent a person who lives in Lisbon. Answer in JSON.",
        _schema(
            first_name=_TEXT,
            last_name=_TEXT,
            age={"type": "integer", "minimum": 18, "maximum": 99},
            city=_TEXT,
            hobbies={"type": "array", "items": _TEXT, "minItems": 2, "maxItems": 4},
        ),
    ),
    (
        "Take this order as JSON: Ms Green wants three chairs, one table and two lamps, delivered on Friday.",
        _schema(
            customer=_TEXT,
            delivery_day={"enum": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]},
            lines={"type": "array", "items": _LINE, "minItems": 3, "maxItems": 3},
        ),
    ),
    (
        "Is this review good or bad, and why? 'The soup was cold and the waiter was rude.' Answer in JSON.",
        _schema(
            sentiment={"enum": ["positive", "negative", "neutral"]},
            confidence={"enum": ["low", "medium", "high"]},
            reasons={"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 3},
        ),
    ),
    (
        "List three European capitals with their countries as JSON.",
        _schema(
            capitals={
                "type": "array",
                "items": _schema(capital=_TEXT, country=_TEXT),
                "minItems": 3,
                "maxItems": 3,
            }
        ),
    ),
)

FREE, PLAIN, UNMASKED, MASKED = "plain, no grammar", "plain", "draft unmasked", "draft masked"
MODES: Final = (FREE, PLAIN, UNMASKED, MASKED)


class Unmasked:
    """A draft that is not told of grammars; all else is left to the one inside."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft

    def __getattr__(self, name: str) -> Any:
        return getattr(self._draft, name)

    def propose(self, batch: Batch, mask: DraftMask | None = None) -> DraftTree:
        return self._draft.propose(batch)


@dataclass(slots=True)
class Figures:
    """Sums over answers."""

    seconds: float = 0.0  # from the first token on
    num_tokens: int = 0  # after those that came with the first
    num_steps: int = 0  # that emitted them
    num_spec_steps: int = 0
    num_accepted: int = 0
    num_drafted: int = 0
    num_forced: int = 0
    answers: list[tuple[int, ...]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        steps = self.num_spec_steps
        return {
            "tok_s": round(self.num_tokens / self.seconds, 2) if self.seconds else None,
            "tokens_per_step": round(self.num_tokens / self.num_steps, 3) if self.num_steps else None,
            "acceptance_length": round(1 + self.num_accepted / steps, 3) if steps else None,
            "acceptance_rate": round(self.num_accepted / self.num_drafted, 3) if self.num_drafted else None,
            "forced_tokens": self.num_forced,
            "tokens": self.num_tokens,
            "steps": self.num_steps,
        }


def answer(served: Served, request: Request, figures: Figures) -> None:
    """Run one request on an idle engine and add what it took."""
    engine, tokens = served.engine, list[int]()
    engine.add(request)
    started = time.perf_counter()
    while engine.has_work:
        for delta in engine.step():
            figures.num_forced += delta.num_forced
            if not tokens:
                started = time.perf_counter()
            elif delta.token_ids:
                figures.num_tokens += len(delta.token_ids)
                figures.num_steps += 1
                figures.num_spec_steps += delta.num_draft_tokens > 0
                figures.num_accepted += delta.num_accepted
                figures.num_drafted += delta.num_draft_tokens
            tokens += delta.token_ids
    figures.seconds += time.perf_counter() - started
    figures.answers.append(tuple(tokens))


def run_mode(served: Served, mode: str, ids: count[int], max_tokens: int, temperature: float) -> Figures:
    """All tasks in one mode."""
    figures = Figures()
    engine, draft = served.engine, served.engine.draft
    speculation: Speculation | None = SPECULATION_OFF if mode in (FREE, PLAIN) else None
    if mode == UNMASKED:
        engine.draft = Unmasked(draft)
    for number, (question, schema) in enumerate(TASKS):
        prompt = conversation_ids(served.tokenizer, [{"role": "user", "content": question}])
        grammar = None if mode == FREE else Grammar("json_schema", json.dumps(schema))
        sampling = SamplingParams(temperature, seed=number, max_tokens=max_tokens, grammar=grammar)
        answer(served, Request(next(ids), tuple(prompt), sampling, speculation), figures)
    engine.draft = draft
    return figures


def measure(served: Served, max_tokens: int, num_rounds: int) -> dict[str, Any]:
    """All modes at temperature 0 and 1, and where they were measured."""
    ids = count()
    temperatures: dict[str, Any] = {}
    holds = True
    for temperature in (0.0, 1.0):
        for mode in MODES:  # a short warm-up
            run_mode(served, mode, ids, 4, temperature)
        sums = {mode: Figures() for mode in MODES}
        for number in range(num_rounds):
            for place in range(len(MODES)):
                mode = MODES[(place + number) % len(MODES)]
                add(sums[mode], run_mode(served, mode, ids, max_tokens, temperature))
        equal = sums[PLAIN].answers == sums[UNMASKED].answers == sums[MASKED].answers
        complete = [json_of(served, tokens) is not None for tokens in sums[PLAIN].answers]
        holds = holds and equal and all(complete)
        temperatures[f"{temperature:g}"] = {
            "answers_equal": equal,
            "answers_complete": sum(complete) / len(complete),
            **{mode: figures.summary() for mode, figures in sums.items()},
        }
    return document.described("structured", served) | {
        "tasks": len(TASKS),
        "rounds": num_rounds,
        "max_tokens": max_tokens,
        "temperatures": temperatures,
        "holds": holds,
    }


def add(total: Figures, more: Figures) -> None:
    """Count the answers of ``more`` with those of ``total``."""
    for name in Figures.__slots__:
        setattr(total, name, getattr(total, name) + getattr(more, name))


def json_of(served: Served, tokens: Sequence[int]) -> Any:
    """The value that an answer is, None if it is none."""
    try:
        return json.loads(served.tokenizer.decode(tokens))
    except ValueError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and the JSON. Returns the exit code."""
    parser = Parser(prog="python -m perf.structured", description=(__doc__ or "").split("\n")[0])
    add_engine_arguments(parser)
    parser.add_argument("--max-tokens", type=int, default=200, metavar="N", help="length of the answers")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    document.add_json_argument(parser)
    args = parser.parse_args(argv)
    try:
        if min(args.max_tokens, args.rounds) < 1:
            raise ConfigError(
                f"--max-tokens and --rounds are {args.max_tokens} and {args.rounds}, expected at least 1"
            )
        result = measure(open_engine(args), args.max_tokens, args.rounds)
    except EngineError as error:
        sys.stderr.write(f"structured: error: {error}\n")
        return 1
    _show(result)
    document.write(result, args.json)
    return 0 if result["holds"] else 1


def _show(result: dict[str, Any]) -> None:
    keys = ("tok_s", "tokens_per_step", "acceptance_length", "acceptance_rate", "forced_tokens", "steps")
    table = Table("temperature", "mode", *(key.replace("_", " ") for key in keys))
    for temperature, modes in result["temperatures"].items():
        for mode in MODES:
            table.add_row(temperature, mode, *(str(modes[mode][key]) for key in keys))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
