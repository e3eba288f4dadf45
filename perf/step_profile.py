"""Where the time of a step goes: ``python -m perf.step_profile [--spec-model HEAD] [--json FILE]``.

Runs the default pair at batch 1, plain and speculative, twice each: once by the clock for the phases of the
step (draft, verify, rest), once under torch's profiler for the operations inside. The profiler slows small
operations down, so its figures are given as shares of the profiled time only; kernels compiled by
``kernels.cpu`` and the interpreter's own time are no operators of torch and in none of the shares. The last
line of stdout is one JSON object.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from engine.build import Served
from engine.cli.loading import open_engine
from engine.cli.options import add_engine_arguments
from engine.cli.parser import Parser
from engine.core import SPECULATION_OFF, Request, SamplingParams, Speculation
from engine.errors import ConfigError, EngineError
from engine.step import Engine
from engine.text.conversation import conversation_ids
from perf import document
from verify.stats import StepTimes

_PROMPT = "Tell me a long story about a dog who learns to sail."
_SKIPPED = 3  # first decode steps, which meet cold caches
_GROUPS = {
    "linear": ("linear", "addmm", "aten::mm"),
    "attention": ("bmm", "softmax", "scaled_dot_product", "index_select"),
    "norm": ("norm", "rsqrt"),
    "choose": ("argmax", "topk", "sort", "logsumexp", "log_", "cumsum", "bitwise"),
    "copy": ("copy_", "cat", "index", "roll", "gather", "scatter"),
}


def decode(engine: Engine, request: Request) -> Iterator[tuple[StepTimes, int]]:
    """Times and emitted tokens of every decode step of one request."""
    engine.add(request)
    while engine.has_work:
        for delta in engine.step():
            if delta.is_decode and delta.token_ids:
                yield engine.last_times, len(delta.token_ids)


def phases(steps: Sequence[tuple[StepTimes, int]]) -> dict[str, float]:
    """Median milliseconds of each phase, but for the first steps, and tokens per step."""
    times = [step for step, _ in steps[_SKIPPED:]]
    found = {
        name: round(1e3 * statistics.median(getattr(step, f"{name}_s") for step in times), 3)
        for name in ("draft", "verify", "other", "total")
    }
    return found | {"tokens_per_step": round(sum(count for _, count in steps) / len(steps), 3)}


def shares(profiled: Any) -> dict[str, float]:
    """Share of the profiled CPU time by kind of operation; what fits no kind is "rest"."""
    total: dict[str, float] = dict.fromkeys([*_GROUPS, "rest"], 0.0)
    for event in profiled.key_averages():
        group = next((g for g, names in _GROUPS.items() if any(name in event.key for name in names)), "rest")
        total[group] += event.self_cpu_time_total
    whole = sum(total.values())
    return {group: round(time / whole, 4) for group, time in total.items()}


def measure(served: Served, max_tokens: int) -> dict[str, Any]:
    """Both modes by the clock and under the profiler. Raises ConfigError if answers are too short."""
    engine = served.engine
    prompt = tuple(conversation_ids(served.tokenizer, [{"role": "user", "content": _PROMPT}]))
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    result = document.described("step-profile", served)
    result |= {"tree": str(engine.config.speculation), "modes": {}}
    modes: dict[str, Speculation | None] = {"plain": SPECULATION_OFF, "speculative": None}
    for number, (name, speculation) in enumerate(modes.items()):
        list(decode(engine, Request(10 * number, prompt, sampling, speculation)))  # warm up, calibrate
        steps = list(decode(engine, Request(10 * number + 1, prompt, sampling, speculation)))
        if len(steps) <= _SKIPPED:
            raise ConfigError(f"--max-tokens {max_tokens} took {len(steps)} steps, expected over {_SKIPPED}")
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            list(decode(engine, Request(10 * number + 2, prompt, sampling, speculation)))
        result["modes"][name] = {"ms": phases(steps), "share_of_profiled_time": shares(profiled)}
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Profile and print. Returns the exit code."""
    about = (__doc__ or "").split("\n")[0]
    parser = Parser(prog="python -m perf.step_profile", description=about)
    add_engine_arguments(parser)
    parser.set_defaults(enable_prefix_caching=False)  # decode steps alone are profiled, on rows of their own
    parser.add_argument("--max-tokens", type=int, default=96, metavar="N", help="length of the answers")
    document.add_json_argument(parser)
    args = parser.parse_args(argv)
    try:
        result = measure(open_engine(args), args.max_tokens)
    except EngineError as error:
        sys.stderr.write(f"step_profile: error: {error}\n")
        return 1
    _show(result)
    document.write(result, args.json)
    return 0


def _show(result: dict[str, Any]) -> None:
    table = Table("ms a step", *result["modes"])
    for key in ("draft", "verify", "other", "total", "tokens_per_step"):
        table.add_row(key, *(f"{mode['ms'][key]:.2f}" for mode in result["modes"].values()))
    table.add_section()
    for group in [*_GROUPS, "rest"]:
        table.add_row(
            group, *(f"{mode['share_of_profiled_time'][group]:.1%}" for mode in result["modes"].values())
        )
    Console(highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
