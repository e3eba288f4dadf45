"""What ``haast bench serve`` shows and writes: the result under vLLM's keys, tables, files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from engine.cli.bench_serve import Target
    from engine.cli.bench_serve_plan import Plan
    from perf.load import Part, Trace

Result = dict[str, Any]

_NAMES: Final = {  # of the latencies, in tables
    "ttft": "TTFT ms",
    "tpot": "TPOT ms",
    "itl": "between pieces ms",
    "e2el": "end to end ms",
}
_WIDTH: Final = 120  # of tables in a pipe


def results(
    args: argparse.Namespace, plan: Plan, targets: Sequence[Target], parts: Sequence[Sequence[Part]]
) -> tuple[Result, Result]:
    """The result, and the same with an entry for every request."""
    from perf import provenance, serving

    described = [_described(args, plan, target, own) for target, own in zip(targets, parts, strict=True)]
    result: Result = {**plan.metadata, "benchmark": "serve"} | _setting(args, plan) | described[0][0]
    detailed = result | described[0][1]
    if len(targets) > 1:
        pairs = list(zip(*parts, strict=False))  # the last block may have reached one server only
        second = {
            "num_blocks": len(pairs),
            "ratios": serving.compare(pairs, np.random.default_rng(args.seed)) if pairs else {},
            "texts_equal_share": serving.equal_share(pairs),
        }
        result["compare"] = described[1][0] | second
        detailed["compare"] = result["compare"] | described[1][1]
    command = " ".join(["haast bench serve", *(f"{one.flag} {one.value}".strip() for one in args.given)])
    client = {"client": provenance.machine() | {"command": command}}
    return result | client, detailed | client


def _setting(args: argparse.Namespace, plan: Plan) -> Result:
    from perf import provenance
    from perf.workload import DEFAULT_PROMPTS

    generated = args.dataset_name in ("random", "prefix_repetition")
    path = None if generated else args.dataset_path or DEFAULT_PROMPTS
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": args.backend,
        "backend": args.backend,
        "label": args.label,
        "tokenizer_id": None,  # tokens are the server's count
        "num_prompts": len(plan.asks),
        "num_distinct_prompts": len({ask.prompt for ask in plan.asks}),
        "dataset_name": args.dataset_name,
        "prompt_set_sha256": None if path is None else provenance.file_hash(path),
        "seed": args.seed,
        "output_len": args.output_len,
        "request_rate": "inf" if np.isinf(args.request_rate) else args.request_rate,
        "burstiness": "inf" if np.isinf(args.burstiness) else args.burstiness,
        "max_concurrency": args.max_concurrency,
    }


def _described(
    args: argparse.Namespace, plan: Plan, target: Target, parts: Sequence[Part]
) -> tuple[Result, Result]:
    """The figures of one server, and its requests one by one."""
    from perf import serving

    traces = _traces(parts)
    fields = {key: value for key, value in target.endpoint.fields.items() if key != "model"}
    figures: Result = {"base_url": target.url, "model_id": target.model, "request_fields": fields}
    figures |= serving.summarise(traces, len(plan.asks), sum(part.duration for part in parts), plan.asked) | {
        "kinds": serving.by_kind(traces)
    }
    if not np.isinf(args.request_rate):
        figures |= serving.spread("delay", [trace.delay for trace in traces], plan.asked.percentiles)
    return figures, serving.detail(traces)


def _traces(parts: Sequence[Part]) -> list[Trace]:
    return [trace for part in parts for trace in part.traces]


def plot(path: Path, result: Result, parts: Sequence[Sequence[Part]]) -> None:
    """Draw the run, or both."""
    from perf.plot import plot

    names = [name for name, _ in runs(result)]
    plot(path, dict(zip(names, map(_traces, parts), strict=True)), _traffic(result))


def save(args: argparse.Namespace, result: Result) -> None:
    """Write the result to --result-dir, by default under a name that says what was measured."""
    many = "" if args.max_concurrency is None else f"-concurrency{args.max_concurrency}"
    model = result["model_id"].split("/")[-1]
    label = args.label or args.backend
    name = f"{label}-{args.request_rate}qps{many}-{model}-{result['date']}.json"
    path = args.result_dir / (args.result_filename or name)
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")


def show(result: Result) -> None:
    """Print the tables."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    console.print(_traffic(result), markup=False)
    for name, one in runs(result):
        console.print(f"\n{name}", style="bold", markup=False)
        console.print(_summary(one))
        console.print(_latencies(one))
        console.print(_kinds(one["kinds"]))
        for message, count in one["error_counts"].items():
            console.print(f"{count} failed: {message}", style="red", markup=False)
    if "compare" in result:
        console.print(_comparison(result["compare"]))


def runs(result: Result) -> list[tuple[str, Result]]:
    """Each server's figures under a name that tells two apart, if only by what is asked of them."""
    runs = [result, *([result["compare"]] if "compare" in result else [])]
    common = set.intersection(*({*map(repr, run["request_fields"].items())} for run in runs))
    found = []
    for number, run in enumerate(runs, start=1):
        name = f"{run['model_id']} at {run['base_url']}"
        own = {key: value for key, value in run["request_fields"].items() if repr((key, value)) not in common}
        name += f" with {json.dumps(own)}" if own else ""
        found.append((f"{number}: {name}" if len(runs) > 1 else name, run))
    return found


def _traffic(result: Result) -> str:
    rate, most = result["request_rate"], result["max_concurrency"]
    sent = "all at once" if rate == "inf" else f"{rate:g} requests/s, burstiness {result['burstiness']}"
    if most is not None:
        sent = f"concurrency {most}" if rate == "inf" else f"{sent}, at most {most} at once"
    return f"{result['num_prompts']} prompts ({result['dataset_name']}), {sent}"


_SUMMARY: Final = (
    ("answered", "completed"),
    ("failed", "failed"),
    ("not sent", "not_sent"),
    ("without token counts", "without_usage"),
    ("seconds", "duration"),
    ("requests/s", "request_throughput"),
    ("goodput requests/s", "request_goodput"),
    ("output tokens", "total_output_tokens"),
    ("output tok/s", "output_throughput"),
    ("most at once", "max_concurrent_requests"),
    ("acceptance length", "spec_decode_acceptance_length"),
    ("acceptance %", "spec_decode_acceptance_rate"),
    ("emitted per verified", "spec_decode_accepted_per_verified"),
    ("sent late ms, median", "median_delay_ms"),
)
_ALWAYS: Final = ("completed", "failed", "duration", "request_throughput", "output_throughput")


def _summary(run: Result) -> Table:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, key in _SUMMARY:
        if key in _ALWAYS or run.get(key):
            table.add_row(name, _cell(run[key]))
    return table


def _latencies(run: Result) -> Table:
    table = Table()
    table.add_column()
    shown = [name for name in _NAMES if f"mean_{name}_ms" in run]
    ends = f"_{shown[0]}_ms"
    figures = [key.removesuffix(ends) for key in run if key.endswith(ends)]
    for figure in figures:
        table.add_column(figure, justify="right")
    for name in shown:
        table.add_row(_NAMES[name], *(_cell(run[f"{figure}_{name}_ms"]) for figure in figures))
    return table


def _kinds(kinds: Mapping[str, Result]) -> Table:
    table = Table()
    table.add_column("kind")
    columns = {
        "answered": "completed",
        "failed": "failed",
        "output tokens": "total_output_tokens",
        "TTFT ms, median": "median_ttft_ms",
        "TPOT ms, median": "median_tpot_ms",
        "acceptance length": "acceptance_length",
    }
    for name in columns:
        table.add_column(name, justify="right")
    for kind, figures in kinds.items():
        table.add_row(kind, *(_cell(figures[key]) for key in columns.values()))
    return table


def _comparison(second: Result) -> Table:
    share = second["texts_equal_share"]
    equal = "" if share is None else f", {100 * share:.0f} % of answers equal"
    table = Table()
    table.add_column(f"{second['num_blocks']} turns{equal}")
    for name in ("1", "2", "2 / 1", "95 % interval"):
        table.add_column(name, justify="right")
    for name, figures in second["ratios"].items():
        low, high = figures["low"], figures["high"]
        interval = "-" if low is None else f"{low:.3f} to {high:.3f}"
        ratio = "-" if figures["ratio"] is None else f"{figures['ratio']:.3f}"
        table.add_row(_spoken(name), _cell(figures["first"]), _cell(figures["second"]), ratio, interval)
    return table


def _spoken(key: str) -> str:
    """A key as a title: "mean_ttft_ms" as "TTFT ms, mean"."""
    figure, _, metric = key.removesuffix("_ms").partition("_")
    return f"{_NAMES[metric]}, {figure}" if metric in _NAMES else "output tok/s"


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"
