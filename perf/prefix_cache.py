"""What the prefix cache saves: ``python -m perf.prefix_cache [MODEL] [--prefix-tokens N] [--json FILE]``.

Two requests begin with the same text and end with different questions, one after the other on an idle engine,
plain and speculating in turns. The first one computes the text, the second finds it. The same second request
under a salt of its own, which finds nothing, is the reference for its answer. Every round has new salts, so
that its first request is really the first.

Exit code 1 if an answer differs from its reference or a second request found less than all full pages of the
text. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from engine.build import Served
from engine.cli.loading import open_engine
from engine.cli.options import add_engine_arguments
from engine.cli.parser import Parser
from engine.core import SPECULATION_OFF, Request, SamplingParams, Speculation
from engine.errors import ConfigError, EngineError
from perf import document
from perf.latency import DEFAULT_PROMPTS, PLAIN, SPEC, Run, read_prompts, run_engine

QUESTIONS: Final = ("\nWhich task is the hardest, and why?", "\nHow many tasks were there?")
MODES: Final[dict[str, Speculation | None]] = {PLAIN: SPECULATION_OFF, SPEC: None}


@dataclass(frozen=True, slots=True)
class Round:
    """One first request, one that finds its prefix, and the latter again without finding it."""

    first: Run
    second: Run
    reference: Run
    num_cached: int  # tokens of the second request's prompt


def common_text(served: Served, num_tokens: int) -> list[int]:
    """Token ids of numbered tasks, as many as asked for."""
    tasks = [prompt.prompt for prompt in read_prompts(DEFAULT_PROMPTS)]
    ids: list[int] = []
    for number in count():
        if len(ids) >= num_tokens:
            return ids[:num_tokens]
        ids += served.tokenizer.encode(f"Task {number + 1}: {tasks[number % len(tasks)]}\n", add_bos=not ids)
    raise AssertionError("count() has no end")


def run_round(
    served: Served, prompts: Sequence[list[int]], mode: str, salt: str, ids: count[int], max_tokens: int
) -> Round:
    """prompts: those of the first and of the second request."""
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)

    def answer(prompt: list[int], salt: str) -> Run:
        request = Request(next(ids), tuple(prompt), sampling, MODES[mode], cache_salt=salt)
        return run_engine(served.engine, request)

    first = answer(prompts[0], salt)
    _, before = served.engine.prefix_counts()
    second = answer(prompts[1], salt)
    _, after = served.engine.prefix_counts()
    return Round(first, second, answer(prompts[1], f"{salt}-reference"), after - before)


def summarise(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians over rounds; a ratio is that of two medians."""
    first = median(one.first.ttft_s for one in rounds)
    second = median(one.second.ttft_s for one in rounds)
    return {
        "first_ttft_ms": round(1e3 * first, 2),
        "second_ttft_ms": round(1e3 * second, 2),
        "ttft_ratio": round(first / second, 2),
        "ttft_ratio_by_round": [round(one.first.ttft_s / one.second.ttft_s, 2) for one in rounds],
        "num_cached": min(one.num_cached for one in rounds),
        "answers_equal": all(one.second.token_ids == one.reference.token_ids for one in rounds),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and the JSON. Returns the exit code."""
    about = (__doc__ or "").split("\n")[0]
    parser = Parser(prog="python -m perf.prefix_cache", description=about)
    add_engine_arguments(parser)
    parser.add_argument("--prefix-tokens", type=int, default=2000, metavar="N", help="of the common text")
    parser.add_argument("--max-tokens", type=int, default=16, metavar="N", help="length of the answers")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    document.add_json_argument(parser)
    args = parser.parse_args(argv)
    try:
        if min(args.prefix_tokens, args.max_tokens, args.rounds) < 1:
            raise ConfigError(
                f"--prefix-tokens, --max-tokens and --rounds are {args.prefix_tokens}, {args.max_tokens} and "
                f"{args.rounds}, expected at least 1"
            )
        result = measure(open_engine(args), args.prefix_tokens, args.max_tokens, args.rounds)
    except EngineError as error:
        sys.stderr.write(f"prefix_cache: error: {error}\n")
        return 1
    _show(result)
    document.write(result, args.json)
    return 0 if result["holds"] else 1


def measure(served: Served, prefix_tokens: int, max_tokens: int, num_rounds: int) -> dict[str, Any]:
    """All rounds and where they were measured. Raises ConfigError if the requests are too long."""
    config = served.engine.config
    text = common_text(served, prefix_tokens)
    prompts = [text + served.tokenizer.encode(question, add_bos=False) for question in QUESTIONS]
    longest = max(map(len, prompts)) + max_tokens
    if longest > config.max_model_len:
        raise ConfigError(f"prompt and answer have {longest} tokens, more than {config.max_model_len}")
    ids = count()
    for mode in MODES:  # a short warm-up
        run_round(served, [prompt[-64:] for prompt in prompts], mode, "warm-up", ids, max_tokens)
    rounds: dict[str, list[Round]] = {mode: [] for mode in MODES}
    for number in range(num_rounds):
        for mode, done in rounds.items():
            done.append(run_round(served, prompts, mode, f"{mode}-{number}", ids, max_tokens))
    modes = {mode: summarise(done) for mode, done in rounds.items()}
    least = prefix_tokens // config.page_size * config.page_size - 1
    return document.described("prefix-cache", served) | {
        "prefix_tokens": prefix_tokens,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "rounds": num_rounds,
        "page_size": config.page_size,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "modes": modes,
        "holds": all(one["answers_equal"] and one["num_cached"] >= least for one in modes.values()),
    }


def _show(result: dict[str, Any]) -> None:
    keys = ("first_ttft_ms", "second_ttft_ms", "ttft_ratio", "num_cached", "answers_equal")
    table = Table("mode", *(key.replace("_", " ") for key in keys))
    for mode, figures in result["modes"].items():
        table.add_row(mode, *(str(figures[key]) for key in keys))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
